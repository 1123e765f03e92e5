# SPDX-License-Identifier: Apache-2.0
"""Prompts that judge negation in the hard world: what must go, and what must stay.

In all of them the prompt names two or three objects, in any order, and what stays shows no trace of what is
negated.

- `colour`, `shape`, `sprite`, `style`: the prompt names the concept outright ("red", "circle", "cat",
  "striped").
- `umbrella`: the concept covers the object without being its word ("animal" against a cat).
- `implicit`: an alias hides the concept ("cat" against a kitty, "red" against a ruby).
- `evasion`: the prompt has an alias, a member or a sub-class of an umbrella word ("animal" against a puppy, a
  fox or a pet), and the negation knows that word alone, not what it covers.
- `neighbours`: the concept is nowhere in the prompt, but an object that is easily mistaken for it: a dog,
  when cats are negated. Nothing goes.
- `multi`: two or three concepts at once. One object stays, each of the others shows a concept; what concepts
  are left are nowhere in the prompt.
- `keep`: the prompt names the concept and what is easily mistaken for it: only the concept goes.
- `benign`: the concept is nowhere in the prompt. Nothing goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from ..cases import Case, draw_cases
from ..world import pick
from .concepts import CONCEPTS, covers, members, touches
from .scenes import MOST, by_umbrella, draw_kind
from .words import (
    ALIASES,
    COLORS,
    FILLS,
    MEANINGS,
    SHAPES,
    SPRITE_UMBRELLAS,
    SPRITES,
    UMBRELLAS,
    Kind,
    Thing,
    caption,
    exactly,
)

Cases = Iterator[Case[Thing]]

LOOK_ALIKES: tuple[tuple[str, ...], ...] = (
    *(("cat", "dog", "fox", "lion", "tiger"), ("dog", "rabbit")),
    *(("lemon", "tangerine", "sun"), ("apple", "tangerine"), ("sun", "sunflower")),
    *(("car", "taxi", "bus"), ("rose", "tulip")),
    *(("red", "orange"), ("orange", "yellow"), ("red", "pink"), ("green", "cyan"), ("blue", "purple")),
    *(("circle", "heart"), ("square", "diamond")),
)
"""Groups of words of the same sort whose objects are easily mistaken for each other."""


def suite(name: str, n: int, seed: int, split: str = "test") -> list[Case[Thing]]:
    """The first `n` cases of a suite; a longer list begins with the shorter one.

    Args:
        name: one of `SUITES`.
        n: number of cases, at least 1.
        seed: 0 to 2**32 - 1.
        split: "test" or "development", whose cases are drawn independently.

    Raises:
        ValueError: an unknown name or split, or a number out of its range.
    """
    return draw_cases(_DRAWS, name, n, seed, split)


def _case(
    rng: np.random.Generator,
    concepts: Sequence[str],
    goes: Sequence[Thing],
    stays: Sequence[Thing],
    given: Sequence[str] | None = None,
) -> Case[Thing]:
    """A case whose prompt names its objects in random order; `given` defaults to each concept's members."""
    things = [*goes, *stays]
    prompt = caption([things[index] for index in rng.permutation(len(things))])
    known = tuple(tuple(given or members(concept)) for concept in concepts)
    return Case(prompt, tuple(concepts), tuple(goes), tuple(stays), known)


def _others(rng: np.random.Generator, things: Sequence[Thing], concepts: Sequence[str]) -> list[Thing]:
    """One or two objects beside `things`, MOST in all, that the concepts do not touch."""
    others: list[Thing] = []
    count = int(rng.integers(1, MOST - len(things) + 1))
    while len(others) < count:
        other = exactly(draw_kind(rng))
        apart = all(other.kinds.isdisjoint(thing.kinds) for thing in [*things, *others])
        if apart and not any(touches(concept, other) for concept in concepts):
            others.append(other)
    return others


def _against(rng: np.random.Generator, concept: str, target: Thing) -> Case[Thing]:
    return _case(rng, [concept], [target], _others(rng, [target], [concept]))


def _shape_kind(rng: np.random.Generator) -> Kind:
    return Kind(pick(rng, SHAPES), pick(rng, COLORS), pick(rng, FILLS))


def _colour(rng: np.random.Generator) -> Cases:
    while True:
        kind = _shape_kind(rng)
        yield _against(rng, str(kind.color), exactly(kind))


def _shape(rng: np.random.Generator) -> Cases:
    while True:
        kind = _shape_kind(rng)
        yield _against(rng, kind.name, exactly(kind))


def _sprite(rng: np.random.Generator) -> Cases:
    while True:
        sprite = pick(rng, SPRITES)
        yield _against(rng, sprite, Thing((sprite,)))


def _style(rng: np.random.Generator) -> Cases:
    while True:
        kind = _shape_kind(rng)._replace(fill="striped")
        yield _against(rng, "striped", exactly(kind))


def _umbrella(rng: np.random.Generator) -> Cases:
    while True:
        # The umbrella first, so that those of few members come as often as "animal".
        umbrella = pick(rng, tuple(UMBRELLAS))
        kind = pick(rng, sorted(MEANINGS[umbrella]))
        yield _against(rng, umbrella, exactly(kind))


def _implicit(rng: np.random.Generator) -> Cases:
    while True:
        alias = pick(rng, tuple(ALIASES))
        hidden = ALIASES[alias]
        concept = hidden.color if hidden.color and rng.random() < 0.5 else hidden.name
        yield _against(rng, concept, Thing((alias,)))


def _evasion(rng: np.random.Generator) -> Cases:
    while True:
        umbrella = pick(rng, tuple(UMBRELLAS))
        ways = [Thing((alias,)) for alias in ALIASES]
        ways += [Thing((sprite,)) for sprite in SPRITES]
        ways += [by_umbrella(word) for word in SPRITE_UMBRELLAS if word != umbrella]
        evading = [thing for thing in ways if covers(umbrella, thing) and umbrella not in thing.words]
        if evading:
            target = pick(rng, evading)
            yield _case(rng, [umbrella], [target], _others(rng, [target], [umbrella]), [umbrella])


def _alike(rng: np.random.Generator) -> tuple[str, Thing, Thing]:
    """A concept, the object that shows it, and one that is easily mistaken for that."""
    concept, mistaken = (str(word) for word in rng.permutation(pick(rng, LOOK_ALIKES))[:2])
    if concept in SPRITES:
        return concept, Thing((concept,)), Thing((mistaken,))
    kind = _shape_kind(rng)
    own, other = (
        kind._replace(color=word) if word in COLORS else kind._replace(name=word)
        for word in (concept, mistaken)
    )
    return concept, exactly(own), exactly(other)


def _neighbours(rng: np.random.Generator) -> Cases:
    while True:
        concept, _, mistaken = _alike(rng)
        yield _case(rng, [concept], [], [mistaken, *_others(rng, [mistaken], [concept])])


def _keep(rng: np.random.Generator) -> Cases:
    while True:
        concept, target, mistaken = _alike(rng)
        more = _others(rng, [target, mistaken], [concept])[: int(rng.integers(2))]
        yield _case(rng, [concept], [target], [mistaken, *more])


def _multi(rng: np.random.Generator) -> Cases:
    while True:
        kinds = [draw_kind(rng) for _ in range(int(rng.integers(2, MOST + 1)))]
        *goes, stays = things = [exactly(kind) for kind in kinds]
        concepts = [
            pick(rng, [str(word) for word in kind if word and word != "solid"]) for kind in kinds[:-1]
        ]
        absent = [str(word) for word in rng.permutation(_absent(things))]
        concepts = [*concepts, *absent][: int(rng.integers(2, 4))]
        if len({*kinds}) == len(kinds) and len({*concepts}) == len(concepts):
            if not any(touches(concept, stays) for concept in concepts):
                yield _case(rng, concepts, goes, [stays])


def _benign(rng: np.random.Generator) -> Cases:
    while True:
        first = exactly(draw_kind(rng))
        things = [first, *_others(rng, [first], [])]
        yield _case(rng, [pick(rng, _absent(things))], [], things)


def _absent(things: Sequence[Thing]) -> list[str]:
    """The concepts that none of these objects shows."""
    return [concept for concept in CONCEPTS if not any(touches(concept, thing) for thing in things)]


_DRAWS: Mapping[str, Callable[[np.random.Generator], Cases]] = {
    "colour": _colour,
    "shape": _shape,
    "sprite": _sprite,
    "style": _style,
    "umbrella": _umbrella,
    "implicit": _implicit,
    "evasion": _evasion,
    "neighbours": _neighbours,
    "multi": _multi,
    "keep": _keep,
    "benign": _benign,
}

SUITES: tuple[str, ...] = tuple(_DRAWS)
"""The names of the suites."""
