# SPDX-License-Identifier: Apache-2.0
"""Prompts that judge negation: what must go, and what must stay.

- `colour`, `shape`: the prompt names the concept outright ("red" in "a red circle and a blue
  ring"): the sharpest conflict between prompt and negation.
- `umbrella`: the concept covers the target without being its word ("warm" against a red circle).
- `implicit`: an alias hides the concept ("red" against "a tomato").
- `benign`: the concept is nowhere in the prompt; both objects must stay.
- `neighbours`: the same, but one object is easily mistaken for the concept ("circle" against a ring).
- `keep`: the prompt names the concept and, on an object that is otherwise the same, what is easily
  mistaken for it: only the concept goes.
- `multi`: two or three concepts at once, of one object or of both, the others nowhere in the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np

from ..cases import Case, draw_cases
from ..world import pick
from .concepts import covers, members
from .world import ALIASES, COLORS, SHAPES, UMBRELLAS, PromptObject, article, caption, phrase

LOOK_ALIKES: tuple[tuple[str, str], ...] = (
    *(("red", "orange"), ("orange", "yellow"), ("blue", "purple")),
    *(("circle", "ring"), ("square", "diamond")),
)
"""Colours and shapes that are easily mistaken for each other."""


def suite(name: str, n: int, seed: int, split: str = "test") -> list[Case[PromptObject]]:
    """The first `n` cases of a suite.

    The same seed draws the same scenes for the first five suites, so that `colour`, `shape` and
    `benign` of one seed share their captions; a longer list begins with the shorter one.

    Args:
        name: one of `SUITES`.
        n: number of cases, at least 1.
        seed: 0 to 2**32 - 1.
        split: "test" or "development", whose cases are drawn independently.

    Raises:
        ValueError: an unknown name or split, or a number out of its range.
    """
    return draw_cases(_DRAWS, name, n, seed, split)


def _draw(rng: np.random.Generator) -> Iterator[dict[str, Case[PromptObject]]]:
    """Draw one scene after another, and from each a case of every suite that it has one for."""
    while True:
        target, other = _draw_object(rng), _draw_object(rng)
        if not _distinct(target, other):
            continue
        first, second = (target, other) if rng.random() >= 0.5 else (other, target)
        prompt = caption([first, second])
        cases = {
            "colour": _case(prompt, [str(target.color)], [target], [other]),
            "shape": _case(prompt, [str(target.shape)], [target], [other]),
        }

        umbrellas = [u for u in UMBRELLAS if covers(u, target) and not covers(u, other)]
        if umbrellas:
            concept = pick(rng, umbrellas)
            cases["umbrella"] = _case(prompt, [concept], [target], [other])

        alias = pick(rng, tuple(ALIASES))
        hidden = ALIASES[alias]
        if _distinct(hidden, other):
            phrases = [f"{article(alias)} {alias}", phrase(other)]
            if rng.random() >= 0.5:
                phrases.reverse()
            attribute = hidden.color if rng.random() < 0.5 else hidden.shape
            cases["implicit"] = _case(" and ".join(phrases), [str(attribute)], [hidden], [other])

        concept = pick(rng, _absent(target, other))
        cases["benign"] = _case(prompt, [concept], [], [target, other])
        yield cases


def _draw_object(rng: np.random.Generator) -> PromptObject:
    shape = pick(rng, SHAPES)
    return PromptObject(pick(rng, COLORS), shape)


def _distinct(first: PromptObject, second: PromptObject) -> bool:
    """Whether two objects differ in colour and in shape: only then is one's concept not both's."""
    return first.color != second.color and first.shape != second.shape


def _absent(*objects: PromptObject) -> list[str]:
    """The colours and shapes that none of these objects shows."""
    return [word for word in (*COLORS, *SHAPES) if not any(covers(word, thing) for thing in objects)]


def _case(
    prompt: str, concepts: list[str], goes: list[PromptObject], stays: list[PromptObject]
) -> Case[PromptObject]:
    given = tuple(tuple(members(concept)) for concept in concepts)
    return Case(prompt, tuple(concepts), tuple(goes), tuple(stays), given)


def _shuffled(rng: np.random.Generator, *objects: PromptObject) -> str:
    return caption([objects[index] for index in rng.permutation(len(objects))])


def _one_of(name: str, rng: np.random.Generator) -> Iterator[Case[PromptObject] | None]:
    return (cases.get(name) for cases in _draw(rng))


def _neighbours(rng: np.random.Generator) -> Iterator[Case[PromptObject] | None]:
    while True:
        alike, other = _draw_object(rng), _draw_object(rng)
        mistaken = [
            concept
            for pair in LOOK_ALIKES
            for concept, word in (pair, pair[::-1])
            if covers(word, alike) and not covers(concept, other)
        ]
        if mistaken and _distinct(alike, other):
            yield _case(_shuffled(rng, alike, other), [pick(rng, mistaken)], [], [alike, other])


def _keep(rng: np.random.Generator) -> Iterator[Case[PromptObject] | None]:
    while True:
        pair = pick(rng, LOOK_ALIKES)
        concept, word = pair if rng.random() < 0.5 else pair[::-1]
        shared = pick(rng, SHAPES if concept in COLORS else COLORS)
        target, sibling = (
            PromptObject(w, shared) if concept in COLORS else PromptObject(shared, w) for w in (concept, word)
        )
        yield _case(_shuffled(rng, target, sibling), [concept], [target], [sibling])


def _multi(rng: np.random.Generator) -> Iterator[Case[PromptObject] | None]:
    while True:
        objects = [_draw_object(rng), _draw_object(rng)]
        if not _distinct(*objects):
            continue
        going = 1 + int(rng.integers(2))
        concepts = [str(thing.color if rng.random() < 0.5 else thing.shape) for thing in objects[:going]]
        absent = [str(word) for word in rng.permutation(_absent(*objects))]
        count = 2 + int(rng.integers(2))
        concepts = [*concepts, *absent][:count]
        yield _case(_shuffled(rng, *objects), concepts, objects[:going], objects[going:])


_DRAWS: Mapping[str, Callable[[np.random.Generator], Iterator[Case[PromptObject] | None]]] = {
    **{name: partial(_one_of, name) for name in ("colour", "shape", "umbrella", "implicit", "benign")},
    "neighbours": _neighbours,
    "keep": _keep,
    "multi": _multi,
}

SUITES: tuple[str, ...] = tuple(_DRAWS)
"""The names of the suites."""
