# SPDX-License-Identifier: Apache-2.0
"""Random scenes of the hard world with captions, as its models are trained on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..world import Drawn, Scene, pick
from .drawing import LARGEST, PLACES, SMALLEST, canvas, draw, scatter, settled
from .words import (
    ALIASES,
    COLOR_UMBRELLAS,
    COLORS,
    GROUNDS,
    MEANINGS,
    SHAPE_UMBRELLAS,
    SHAPES,
    SPRITE_UMBRELLAS,
    SPRITES,
    Kind,
    Thing,
    caption,
    exactly,
)

MOST = 3
"""Objects in a scene, at most."""

# How often things are drawn and said; what is left of a sum is the plain case.
_COUNTS = (0.25, 0.45, 0.30)
_SPRITES, _STRIPED = 0.45, 0.3
_ALIAS, _UMBRELLA = 0.18, 0.18
_SHAPE_UMBRELLA, _NO_SHAPE, _NO_COLOR = 0.1, 0.05, 0.05
_BARE, _GROUND = 0.2, 0.3


def scene(rng: np.random.Generator, *, places: str = "grid", count: int | None = None) -> Scene[Thing, Kind]:
    """A random scene: one to three different kinds, named plainly, by an alias or by an umbrella word.

    The caption's order says nothing about places.

    Args:
        rng: draws everything.
        places: one of `PLACES`; the hosts have seen "grid".
        count: objects, 1 to `MOST`; None draws it (25, 45 and 30 %).

    Raises:
        ValueError: another `places` or `count`.
    """
    _check(1 if count is None else count, places)
    if count is None:
        count = 1 + int(np.searchsorted(np.cumsum(_COUNTS[:-1]), rng.random(), side="right"))
    kinds: list[Kind] = []
    while len(kinds) < count:
        kind = draw_kind(rng)
        if kind not in kinds:
            kinds.append(kind)
    things = [_named(rng, kind) for kind in kinds]
    ground = pick(rng, tuple(GROUNDS))
    if len(kinds) == 1 and rng.random() < _BARE:
        # The bare word of a concept, so that a concept's own prompt is one that the model has read.
        alone = [Thing((word,)) for word in MEANINGS if word != "shape" and word not in ALIASES]
        fitting = [thing.words[0] for thing in alone if kinds[0] in thing.kinds]
        things = [Thing((pick(rng, fitting),))]
        text = things[0].words[0]
    else:
        text = caption(things, ground if rng.random() < _GROUND else None)
    image, where = render(kinds, ground, rng=rng, places=places)
    objects = tuple(Drawn(thing, kind, *at) for thing, kind, at in zip(things, kinds, where))
    return Scene(text, image, objects)


def render(
    kinds: Sequence[Kind],
    ground: str = "gray",
    *,
    rng: np.random.Generator,
    places: str = "grid",
) -> tuple[NDArray[np.float32], list[tuple[float, float, float]]]:
    """Draw these kinds at random places and sizes.

    Args:
        kinds: 1 to `MOST` of them.
        ground: one of `GROUNDS`.
        rng: draws places and sizes.
        places: one of `PLACES`.

    Returns:
        float32 [SIZE, SIZE, 3] RGB in [0, 1], and centre x, centre y and radius of each object in pixels.

    Raises:
        ValueError: another number of kinds, another ground, or other places.
    """
    _check(len(kinds), places)
    if ground not in GROUNDS:
        raise ValueError(f"ground={ground!r}; allowed: {', '.join(GROUNDS)}")
    radii = rng.uniform(SMALLEST, LARGEST, len(kinds)).tolist()
    centres = scatter(rng, radii, places)
    where = [settled(kind, x, y, r) for kind, (x, y), r in zip(kinds, centres, radii)]
    image = canvas(ground)
    for kind, at in zip(kinds, where):
        draw(image, kind, *at)
    return np.clip(image, 0, 1), where


def _check(count: int, places: str) -> None:
    if not 1 <= count <= MOST:
        raise ValueError(f"a scene of {count} objects; allowed: 1 to {MOST}")
    if places not in PLACES:
        raise ValueError(f"places={places!r}; allowed: {', '.join(PLACES)}")


def draw_kind(rng: np.random.Generator) -> Kind:
    """A random kind: a sprite in 45 % of the draws, else a shape, striped in 30 %."""
    if rng.random() < _SPRITES:
        return Kind(pick(rng, SPRITES))
    fill = "striped" if rng.random() < _STRIPED else "solid"
    return Kind(pick(rng, SHAPES), pick(rng, COLORS), fill)


def by_umbrella(word: str) -> Thing:
    """A sprite called by an umbrella word: "a pet", but "a wild animal", "a citrus fruit"."""
    noun = {"wild": "animal", "citrus": "fruit"}.get(word)
    return Thing((word, noun) if noun else (word,))


def _named(rng: np.random.Generator, kind: Kind) -> Thing:
    """A kind in random words that fit it."""
    plain = exactly(kind)
    alias = next((word for word, hidden in ALIASES.items() if hidden == kind), None)
    how = rng.random()
    if alias is not None and how < (_ALIAS if kind.color is None else 0.5):
        return Thing((alias,))
    if kind.color is None:
        umbrellas = [word for word, covered in SPRITE_UMBRELLAS.items() if kind.name in covered]
        if umbrellas and rng.random() < _UMBRELLA:
            return by_umbrella(pick(rng, umbrellas))
        return plain

    color: str | None = kind.color
    if rng.random() < _UMBRELLA:
        color = next(word for word, covered in COLOR_UMBRELLAS.items() if kind.color in covered)
    noun: tuple[str, ...] = (kind.name,)
    how = rng.random()
    if how < _SHAPE_UMBRELLA:
        words = [(word, "shape") for word, covered in SHAPE_UMBRELLAS.items() if kind.name in covered]
        noun = words[0] if words else noun
    elif how < _SHAPE_UMBRELLA + _NO_SHAPE:
        noun = ("shape",)
    elif how < _SHAPE_UMBRELLA + _NO_SHAPE + _NO_COLOR:
        color = None
    return Thing(tuple(w for w in ("striped" if kind.fill == "striped" else None, color, *noun) if w))
