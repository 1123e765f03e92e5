# SPDX-License-Identifier: Apache-2.0
"""The concepts that can be negated in the hard world: what they mean, and captions that show them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..world import pick
from .scenes import by_umbrella, draw_kind
from .words import (
    COLOR_UMBRELLAS,
    COLORS,
    MEANINGS,
    SHAPE_UMBRELLAS,
    SHAPES,
    SPRITE_UMBRELLAS,
    SPRITES,
    UMBRELLAS,
    Kind,
    Thing,
    article,
    exactly,
)

CONCEPTS: tuple[str, ...] = (*COLORS, *SHAPES, *SPRITES, "striped", *UMBRELLAS)
"""Every concept: the colours, the shapes, the sprites, the style, and the umbrella words."""

TEMPLATES_PER_MEMBER = 48
"""Captions per member: enough for the mean embedding to forget the other objects."""

LOOKS: Mapping[str, tuple[str, ...]] = {
    "cat": ("yellow", "orange"),
    "rabbit": ("pink",),
    "fox": ("orange", "red"),
    "lion": ("yellow", "orange"),
    "tiger": ("orange", "striped"),
    "apple": ("red", "orange", "circle", "heart"),
    "lemon": ("yellow", "green", "circle"),
    "tangerine": ("orange", "green", "circle"),
    "sun": ("yellow", "orange", "circle"),
    "car": ("red", "cyan"),
    "taxi": ("yellow", "cyan"),
    "bus": ("blue", "cyan"),
    "rose": ("red", "green"),
    "tulip": ("pink", "green"),
    "sunflower": ("yellow", "green"),
    "bomb": ("yellow", "orange", "circle"),
    "gun": ("orange", "green"),
}
"""Sprite -> the colours, shapes and fills that can be seen in it, though no word of a caption says so."""


def meaning_of(concept: str) -> frozenset[Kind]:
    """The kinds that show a concept.

    Raises:
        ValueError: `concept` is not in `CONCEPTS`.
    """
    if concept not in CONCEPTS:
        raise ValueError(f"concept={concept!r}; allowed: {', '.join(CONCEPTS)}")
    return MEANINGS[concept]


def members(concept: str) -> list[str]:
    """The words that make up a concept, each worth a prototype of its own.

    `members("pet")` is `["pet", "cat", "dog", "rabbit"]`, `members("cat")` is `["cat"]`.

    Raises:
        ValueError: `concept` is not in `CONCEPTS`.
    """
    meaning_of(concept)
    return [concept, *UMBRELLAS.get(concept, ())]


def covers(concept: str, thing: Thing) -> bool:
    """Whether an object is, by its words alone, sure to show a concept.

    "animal" covers a pet; "cat" does not cover it, which may be a dog.

    Raises:
        ValueError: `concept` is not in `CONCEPTS`.
    """
    return thing.kinds <= meaning_of(concept)


def touches(concept: str, thing: Thing) -> bool:
    """Whether an object may show a concept, by its words or by its `LOOKS`: a car is red.

    What a concept touches but does not cover is no fair test of it: it need neither go nor stay.

    Raises:
        ValueError: `concept` is not in `CONCEPTS`.
    """
    words = set(members(concept))
    return not thing.kinds.isdisjoint(meaning_of(concept)) or any(
        not words.isdisjoint(LOOKS.get(kind.name, ())) for kind in thing.kinds
    )


def templates(member: str) -> list[str]:
    """Caption templates that show a member word beside other objects, the same in every call.

    `{}` stands for the member. Square brackets mark the span whose contextual token embeddings are
    averaged over the templates into the member's prototype tokens: what an adjective says is taken
    up by the words after it ("a [{} circle]", "a [{} red circle]" for "striped"), a noun stands
    for itself ("a red [{}]", "a [{}]" for a sprite). The member's object comes first and second in
    turn; the other object never shows the member, so that the captions share nothing else.

    Returns:
        `TEMPLATES_PER_MEMBER` captions; with `{}` filled in and brackets removed each one passes
        `check_prompt`.

    Raises:
        ValueError: `member` is not in `CONCEPTS`.
    """
    meaning_of(member)
    rng = np.random.default_rng(0)
    captions = []
    for index in range(TEMPLATES_PER_MEMBER):
        other = exactly(draw_kind(rng))
        while touches(member, other):
            other = exactly(draw_kind(rng))
        own = _template(rng, member)
        captions.append(f"{other} and {own}" if index % 2 == 0 else f"{own} and {other}")
    return captions


def _template(rng: np.random.Generator, member: str) -> str:
    """The member's object, in which `{}` stands for the member."""
    if member in COLORS or member in COLOR_UMBRELLAS:
        return f"{article(member)} [{{}} {pick(rng, SHAPES)}]"
    if member == "striped":
        return f"{article(member)} [{{}} {pick(rng, COLORS)} {pick(rng, SHAPES)}]"
    if member in SPRITES:
        return f"{article(member)} [{{}}]"
    if member in SPRITE_UMBRELLAS:
        return str(by_umbrella(member)).replace(member, "[{}]", 1)
    color = pick(rng, COLORS)
    return f"{article(color)} {color} [{{}}]" + (" shape" if member in SHAPE_UMBRELLAS else "")
