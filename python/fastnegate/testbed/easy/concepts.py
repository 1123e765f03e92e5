# SPDX-License-Identifier: Apache-2.0
"""The concepts that can be negated in the testbed: their members, and captions that show them."""

from __future__ import annotations

import numpy as np

from .world import (
    COLOR_UMBRELLAS,
    COLORS,
    SHAPES,
    UMBRELLAS,
    PromptObject,
    article,
    phrase,
)

CONCEPTS: tuple[str, ...] = (*COLORS, *SHAPES, *UMBRELLAS)
"""Every concept: the colours, the shapes and the umbrella words."""

TEMPLATES_PER_MEMBER = 48
"""Captions per member: enough for the mean embedding to forget the other objects."""


def members(concept: str) -> list[str]:
    """The words that make up a concept, each worth a prototype of its own.

    `members("warm")` is `["warm", "red", "orange", "yellow"]`, `members("red")` is `["red"]`.

    Raises:
        ValueError: `concept` is not in `CONCEPTS`.
    """
    if concept not in CONCEPTS:
        raise ValueError(f"concept={concept!r}; allowed: {', '.join(CONCEPTS)}")
    return [concept, *UMBRELLAS.get(concept, ())]


def covers(concept: str, thing: PromptObject) -> bool:
    """Whether an object is, by its words alone, sure to show a concept.

    "warm" covers a red circle; "red" does not cover a warm circle, which may be orange.

    Raises:
        ValueError: `concept` is not in `CONCEPTS`.
    """
    covered = set(members(concept))
    named = [word for word in (thing.color, thing.shape) if word is not None]
    return any(covered.issuperset(members(word)) for word in named)


def templates(member: str) -> list[str]:
    """Caption templates that show a member word beside other objects, the same in every call.

    `{}` stands for the member. Square brackets mark the span whose contextual token embeddings are
    averaged over the templates into the member's prototype tokens: the member and the noun after it
    for a colour ("a [{} circle] and a green ring"), since the noun takes up its colour; the member
    alone for a shape ("a red [{}] and a blue square"). The member's object comes first and second
    in turn; the other object never shows the member, so that the captions share nothing else.

    Returns:
        `TEMPLATES_PER_MEMBER` captions; with `{}` filled in and brackets removed each one passes
        `check_prompt`.

    Raises:
        ValueError: `member` is not in `CONCEPTS`.
    """
    is_color = member in COLORS or member in COLOR_UMBRELLAS
    is_adjective = member == "round"
    excluded = set(members(member))
    other_colors = [color for color in COLORS if color not in excluded]
    other_shapes = [shape for shape in SHAPES if shape not in excluded]

    rng = np.random.default_rng(0)
    captions = []
    for index in range(TEMPLATES_PER_MEMBER):
        other = phrase(PromptObject(str(rng.choice(other_colors)), str(rng.choice(other_shapes))))
        if is_color:
            own = f"{article(member)} [{{}} {rng.choice(SHAPES)}]"
        else:
            color = str(rng.choice(COLORS))
            own = f"{article(color)} {color} [{{}}]" + (" shape" if is_adjective else "")
        captions.append(f"{other} and {own}" if index % 2 == 0 else f"{own} and {other}")
    return captions
