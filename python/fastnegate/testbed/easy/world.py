# SPDX-License-Identifier: Apache-2.0
"""The world of the testbed: coloured shapes on a plain ground, and the words that describe them.

A caption names one object (drawn in the centre) or two (the first left, the second right), and may
end in a background: "a red circle and a blue ring on white". Three kinds of words make negation
worth judging here: *umbrella* words that cover several colours or shapes ("warm"), *aliases* that
hide both ("tomato" is a red circle), and captions entangled with the concept to remove.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..shapes import signed_distance
from ..world import Drawn, Scene, check_words, pick

SIZE = 32
"""Height and width of every image, in pixels."""

PALETTE: Mapping[str, tuple[int, int, int]] = {
    "red": (215, 25, 30),
    "orange": (250, 135, 15),
    "yellow": (245, 225, 40),
    "green": (30, 165, 60),
    "blue": (35, 80, 225),
    "purple": (145, 45, 175),
}
"""8-bit RGB of every colour."""

BACKGROUNDS: Mapping[str, float] = {"white": 1.0, "black": 0.0, "gray": 0.55}
"""Gray level, in [0, 1], of every background."""

COLORS: tuple[str, ...] = tuple(PALETTE)
SHAPES: tuple[str, ...] = ("circle", "ring", "square", "triangle", "diamond", "cross")

COLOR_UMBRELLAS: Mapping[str, tuple[str, ...]] = {
    "warm": ("red", "orange", "yellow"),
    "cold": ("green", "blue", "purple"),
}
SHAPE_UMBRELLAS: Mapping[str, tuple[str, ...]] = {
    "round": ("circle", "ring"),
    "polygon": ("square", "triangle", "diamond"),
}
UMBRELLAS: Mapping[str, tuple[str, ...]] = {**COLOR_UMBRELLAS, **SHAPE_UMBRELLAS}
"""Umbrella word -> the colours or shapes that it covers."""


@dataclass(frozen=True)
class PromptObject:
    """One object as a caption names it.

    Args:
        color: one of `COLORS` or `COLOR_UMBRELLAS`; None where the caption names no colour.
        shape: one of `SHAPES` or `SHAPE_UMBRELLAS`; None where the caption names no shape.

    Raises:
        ValueError: for any other word.
    """

    color: str | None
    shape: str | None

    def __post_init__(self) -> None:
        for name, word, allowed in (
            ("color", self.color, (*COLORS, *COLOR_UMBRELLAS)),
            ("shape", self.shape, (*SHAPES, *SHAPE_UMBRELLAS)),
        ):
            if word is not None and word not in allowed:
                raise ValueError(f"{name}={word!r}; allowed: None, {', '.join(allowed)}")


ALIASES: Mapping[str, PromptObject] = {
    "tomato": PromptObject("red", "circle"),
    "sun": PromptObject("yellow", "circle"),
    "donut": PromptObject("orange", "ring"),
    "brick": PromptObject("red", "square"),
    "leaf": PromptObject("green", "diamond"),
    "sea": PromptObject("blue", "triangle"),
    "grape": PromptObject("purple", "circle"),
    "medkit": PromptObject("red", "cross"),
}
"""Word that hides a colour and a shape -> the object it stands for."""

VOCABULARY: tuple[str, ...] = (
    *("<pad>", "<eos>", "<bos>", "a", "an", "and", "left", "above", "of", "on"),
    *("big", "small", "shape", "thing", "no"),
    *SHAPES,
    *COLORS,
    *BACKGROUNDS,
    *UMBRELLAS,
    *ALIASES,
)
"""Every word of the tokenizer, in the order of its ids."""

# In the vocabulary, but in no training caption: their embeddings are noise.
_UNTRAINED = ("<pad>", "<eos>", "<bos>", "above", "big", "small", "thing", "no")

WORDS: tuple[str, ...] = tuple(word for word in VOCABULARY if word not in _UNTRAINED)
"""The words that a prompt may use: those that the model was trained on."""

MAX_WORDS = 14
"""Longest prompt, in words: the text encoder reads 16 tokens, two of them begin and end."""


def check_prompt(prompt: str) -> None:
    """Check that the model can read `prompt`: known words, at most `MAX_WORDS` of them.

    Case does not matter; the empty prompt is allowed (it is the unconditional caption).

    Raises:
        ValueError: naming the first unknown word and the vocabulary, or the number of words.
    """
    check_words(prompt, WORDS, MAX_WORDS)


def article(word: str) -> str:
    """The indefinite article of `word`: "a" or "an"."""
    return "an" if word[0] in "aeiou" else "a"


def phrase(thing: PromptObject) -> str:
    """The words for one object: "a red circle", "an orange shape", "a warm round shape"."""
    # As in the training captions: "round" is an adjective, "polygon" is a noun.
    noun = {None: "shape", "round": "round shape"}.get(thing.shape, thing.shape)
    words = f"{thing.color} {noun}" if thing.color else f"{noun}"
    return f"{article(words)} {words}"


def caption(things: Sequence[PromptObject], background: str | None = None) -> str:
    """The caption of a scene: the phrases of `things` joined by "and", and the background."""
    words = " and ".join(phrase(thing) for thing in things)
    return f"{words} on {background}" if background else words


def render(
    things: Sequence[PromptObject],
    background: str = "gray",
    *,
    rng: np.random.Generator | None = None,
) -> NDArray[np.float32]:
    """Draw a scene as the captions mean it: one object in the centre, or two, left and right.

    Args:
        things: one or two objects with a colour of `COLORS` and a shape of `SHAPES`.
        background: one of `BACKGROUNDS`.
        rng: draws positions and sizes as in the training images; None takes their means.

    Returns:
        float32 [32, 32, 3] RGB in [0, 1], with antialiased outlines.

    Raises:
        ValueError: another number of objects, an object without a colour or a shape of its own, or
            an unknown background.
    """
    if len(things) not in (1, 2):
        raise ValueError(f"things has {len(things)} objects; allowed: 1 or 2")
    if background not in BACKGROUNDS:
        raise ValueError(f"background={background!r}; allowed: {', '.join(BACKGROUNDS)}")

    for thing in things:
        if thing.color not in COLORS or thing.shape not in SHAPES:
            raise ValueError(
                f"things has {thing}; allowed colours: {', '.join(COLORS)};"
                f" allowed shapes: {', '.join(SHAPES)}"
            )
    return _draw(things, _places(len(things), rng), background)


def _places(count: int, rng: np.random.Generator | None) -> list[tuple[float, float, float]]:
    """Centre x, centre y and radius, in pixels, of the objects of a scene; see `render`."""
    # Centre x and its jitter, jitter of the centre y, smallest and largest radius; all in pixels.
    alone = count == 1
    centres = (SIZE / 2,) if alone else (8.2, 23.8)
    jitter_x, jitter_y = (1.0, 1.0) if alone else (0.4, 1.5)
    smallest, largest = (6.5, 7.5) if alone else (6.2, 7.0)
    if rng is None:
        return [(x, SIZE / 2, (smallest + largest) / 2) for x in centres]
    return [
        (
            x + rng.uniform(-jitter_x, jitter_x),
            SIZE / 2 + rng.uniform(-jitter_y, jitter_y),
            rng.uniform(smallest, largest),
        )
        for x in centres
    ]


def _draw(
    things: Sequence[PromptObject], places: Sequence[tuple[float, float, float]], background: str
) -> NDArray[np.float32]:
    pixels = np.arange(SIZE) + 0.5
    image = np.full((SIZE, SIZE, 3), BACKGROUNDS[background])
    for thing, (x, y, radius) in zip(things, places):
        distance = signed_distance(str(thing.shape), pixels[None, :] - x, pixels[:, None] - y, radius)
        coverage = np.clip(0.5 - distance, 0, 1)[..., None]
        color = np.array(PALETTE[str(thing.color)], np.float64) / 255
        image = image * (1 - coverage) + color * coverage
    return image.astype(np.float32)


def scene(rng: np.random.Generator) -> Scene[PromptObject, PromptObject]:
    """A random captioned picture: one object in 15 %, else two different ones, the first of them left.

    Captions name colours by umbrella words in 20 %, shapes in 15 %, both by an alias in half of the
    cases that have one; one object alone is often called by a bare word ("red").
    """
    kinds: list[PromptObject] = []
    count = 1 if rng.random() < 0.15 else 2
    while len(kinds) < count:
        kind = PromptObject(pick(rng, COLORS), pick(rng, SHAPES))
        if kind not in kinds:
            kinds.append(kind)
    said = [_named(rng, kind) for kind in kinds]
    text = (" left of " if rng.random() < 0.15 else " and ").join(words for words, _ in said)
    if count == 1 and rng.random() < 0.4:
        text, said = _bare(rng, kinds[0])
    background = pick(rng, tuple(BACKGROUNDS))
    if rng.random() < 0.3:
        text = f"{text} on {background}"
    places = _places(count, rng)
    objects = [Drawn(thing, kind, *place) for (_, thing), kind, place in zip(said, kinds, places)]
    return Scene(text, _draw(kinds, places, background), tuple(objects))


def _named(rng: np.random.Generator, kind: PromptObject) -> tuple[str, PromptObject]:
    """An object in random words that fit it, and what they say of it."""
    alias = next((word for word, hidden in ALIASES.items() if hidden == kind), None)
    if alias is not None and rng.random() < 0.5:
        return f"{article(alias)} {alias}", kind
    color, shape = _umbrella(COLOR_UMBRELLAS, kind.color), _umbrella(SHAPE_UMBRELLAS, kind.shape)
    how = rng.random()
    thing = PromptObject(
        color if rng.random() < 0.2 else None if how < 0.05 else kind.color,
        shape if shape and rng.random() < 0.15 else None if how > 0.95 else kind.shape,
    )
    return phrase(thing), thing


def _bare(rng: np.random.Generator, kind: PromptObject) -> tuple[str, list[tuple[str, PromptObject]]]:
    """One of the concepts that an object shows, as a caption of its own."""
    colors = (kind.color, _umbrella(COLOR_UMBRELLAS, kind.color))
    shapes = (kind.shape, _umbrella(SHAPE_UMBRELLAS, kind.shape))
    things = [PromptObject(word, None) for word in colors] + [PromptObject(None, w) for w in shapes if w]
    thing = things[int(rng.integers(len(things)))]
    word = str(thing.color or thing.shape)
    return word, [(word, thing)]


def _umbrella(umbrellas: Mapping[str, tuple[str, ...]], word: str | None) -> str | None:
    return next((umbrella for umbrella, covered in umbrellas.items() if word in covered), None)
