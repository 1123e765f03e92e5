# SPDX-License-Identifier: Apache-2.0
"""Prompts that judge negation: what must go, and what must stay.

- `colour`, `shape`: the prompt names the concept outright ("red" in "a red circle and a blue
  ring"): the sharpest conflict between prompt and negation.
- `umbrella`: the concept covers the target without being its word ("warm" against a red circle).
- `implicit`: an alias hides the concept ("red" against "a tomato").
- `benign`: the concept is nowhere in the prompt; both objects must stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from .concepts import covers
from .world import ALIASES, COLORS, SHAPES, UMBRELLAS, PromptObject, article, caption, phrase

SUITES: tuple[str, ...] = ("colour", "shape", "umbrella", "implicit", "benign")


@dataclass(frozen=True)
class Case:
    """One prompt and what a negation of `concept` should make of it.

    Args:
        prompt: a caption of two objects that differ in colour and in shape.
        concept: the concept to negate, one of `CONCEPTS`.
        target: the object that shows the concept and should lose it; in `benign` it should stay.
        other: the object that does not show the concept and should stay.
    """

    prompt: str
    concept: str
    target: PromptObject
    other: PromptObject


def suite(name: str, n: int, seed: int) -> list[Case]:
    """The first `n` cases of a suite.

    The same seed draws the same scenes for all suites, so that `colour`, `shape` and `benign` of
    one seed share their captions; a longer list begins with the shorter one.

    Args:
        name: one of `SUITES`.
        n: number of cases, at least 1.
        seed: at least 0.

    Raises:
        ValueError: an unknown name, or a number out of its range.
    """
    if name not in SUITES:
        raise ValueError(f"name={name!r}; allowed: {', '.join(SUITES)}")
    if n < 1:
        raise ValueError(f"n={n}; allowed: at least 1")
    if seed < 0:
        raise ValueError(f"seed={seed}; allowed: at least 0")
    drawn = (cases[name] for cases in _draw(np.random.default_rng(seed)) if name in cases)
    return list(islice(drawn, n))


def _draw(rng: np.random.Generator) -> Iterator[dict[str, Case]]:
    """Draw one scene after another, and from each a case of every suite that it has one for."""
    while True:
        target, other = _draw_object(rng), _draw_object(rng)
        if not _distinct(target, other):
            continue
        first, second = (target, other) if rng.random() >= 0.5 else (other, target)
        prompt = caption([first, second])
        cases = {
            "colour": Case(prompt, str(target.color), target, other),
            "shape": Case(prompt, str(target.shape), target, other),
        }

        umbrellas = [u for u in UMBRELLAS if covers(u, target) and not covers(u, other)]
        if umbrellas:
            concept = umbrellas[rng.integers(len(umbrellas))]
            cases["umbrella"] = Case(prompt, concept, target, other)

        alias = list(ALIASES)[rng.integers(len(ALIASES))]
        hidden = ALIASES[alias]
        if _distinct(hidden, other):
            phrases = [f"{article(alias)} {alias}", phrase(other)]
            if rng.random() >= 0.5:
                phrases.reverse()
            attribute = hidden.color if rng.random() < 0.5 else hidden.shape
            cases["implicit"] = Case(" and ".join(phrases), str(attribute), hidden, other)

        absent = [c for c in (*COLORS, *SHAPES) if not covers(c, target) and not covers(c, other)]
        concept = absent[rng.integers(len(absent))]
        cases["benign"] = Case(prompt, concept, target, other)
        yield cases


def _draw_object(rng: np.random.Generator) -> PromptObject:
    shape = SHAPES[rng.integers(len(SHAPES))]
    color = COLORS[rng.integers(len(COLORS))]
    return PromptObject(color, shape)


def _distinct(first: PromptObject, second: PromptObject) -> bool:
    """Whether two objects differ in colour and in shape: only then is one's concept not both's."""
    return first.color != second.color and first.shape != second.shape
