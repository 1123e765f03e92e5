# SPDX-License-Identifier: Apache-2.0
"""What is in the hard world, and the words for it.

114 kinds of objects: eight colours of six shapes, plain or striped, and 18 sprites. A word means the set of
kinds that it is true of, and a phrase what all its words are true of: "warm" is 48 kinds, "a warm polygon
shape" nine, "a ruby" one, "a wild animal" is a fox, a lion or a tiger. Concepts are such sets too, so
whether a concept covers an object, and whether an object in a picture is the one that a prompt asked for, is
a question of subsets and members, not of spelling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from ..world import check_words

COLORS: tuple[str, ...] = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "diamond", "cross", "heart")
FILLS: tuple[str, ...] = ("solid", "striped")
SPRITES: tuple[str, ...] = (
    *("cat", "dog", "rabbit", "fox", "lion", "tiger"),
    *("apple", "lemon", "tangerine", "sun"),
    *("car", "taxi", "bus"),
    *("rose", "tulip", "sunflower"),
    *("bomb", "gun"),
)
"""The pictures in `sprites/sprites.png`, from left to right. Many look alike on purpose: cat, fox, lion and
tiger; lemon, tangerine and sun; sun and sunflower; car and taxi."""


class Kind(NamedTuple):
    """One thing that can be drawn: a sprite (then colour and fill are None), or a shape."""

    name: str
    color: str | None = None
    fill: str | None = None


KINDS: tuple[Kind, ...] = (
    *(Kind(shape, color, fill) for shape in SHAPES for color in COLORS for fill in FILLS),
    *(Kind(sprite) for sprite in SPRITES),
)

COLOR_UMBRELLAS: Mapping[str, tuple[str, ...]] = {
    "warm": ("red", "orange", "yellow", "pink"),
    "cold": ("green", "cyan", "blue", "purple"),
}
SHAPE_UMBRELLAS: Mapping[str, tuple[str, ...]] = {
    "polygon": ("square", "triangle", "diamond"),
    "curved": ("circle", "heart"),
}
SPRITE_UMBRELLAS: Mapping[str, tuple[str, ...]] = {
    "animal": ("cat", "dog", "rabbit", "fox", "lion", "tiger"),
    "pet": ("cat", "dog", "rabbit"),
    "wild": ("fox", "lion", "tiger"),
    "feline": ("cat", "lion", "tiger"),
    "fruit": ("apple", "lemon", "tangerine"),
    "citrus": ("lemon", "tangerine"),
    "vehicle": ("car", "taxi", "bus"),
    "flower": ("rose", "tulip", "sunflower"),
    "weapon": ("bomb", "gun"),
}
UMBRELLAS: Mapping[str, tuple[str, ...]] = {**COLOR_UMBRELLAS, **SHAPE_UMBRELLAS, **SPRITE_UMBRELLAS}
"""Umbrella word -> the colours, shapes or sprites that it covers."""

ALIASES: Mapping[str, Kind] = {
    "ruby": Kind("diamond", "red", "solid"),
    "brick": Kind("square", "red", "solid"),
    "valentine": Kind("heart", "red", "solid"),
    "cone": Kind("triangle", "orange", "solid"),
    "coin": Kind("circle", "yellow", "solid"),
    "emerald": Kind("diamond", "green", "solid"),
    "iceberg": Kind("triangle", "cyan", "solid"),
    "amethyst": Kind("diamond", "purple", "solid"),
    "kitty": Kind("cat"),
    "puppy": Kind("dog"),
    "bunny": Kind("rabbit"),
    "vixen": Kind("fox"),
    "mandarin": Kind("tangerine"),
    "auto": Kind("car"),
    "cab": Kind("taxi"),
    "pistol": Kind("gun"),
    "grenade": Kind("bomb"),
}
"""Word that hides what it shows -> the kind that it stands for."""

GROUNDS: Mapping[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (140, 140, 140),
    "mint": (170, 228, 200),
}
"""8-bit RGB of every ground."""

VOCABULARY: tuple[str, ...] = (
    *("<pad>", "<eos>", "<bos>", "a", "an", "and", "on", "shape", "striped"),
    *COLORS,
    *SHAPES,
    *SPRITES,
    *UMBRELLAS,
    *ALIASES,
    *GROUNDS,
)
"""Every word of the tokenizer, in the order of its ids."""

WORDS: tuple[str, ...] = VOCABULARY[3:]
"""The words that a prompt may use."""

MAX_WORDS = 22
"""Longest prompt, in words: the text encoder reads 24 tokens, two of them begin and end."""


def check_prompt(prompt: str) -> None:
    """Check that a model of this world can read `prompt`: known words, at most `MAX_WORDS` of them.

    Case does not matter; the empty prompt is allowed (it is the unconditional caption).

    Raises:
        ValueError: naming the first unknown word and the vocabulary, or the number of words.
    """
    check_words(prompt, WORDS, MAX_WORDS)


def _true_of(word: str, kind: Kind) -> bool:
    if word in ALIASES:
        return kind == ALIASES[word]
    if word == "shape":
        return kind.color is not None
    return not {word, *UMBRELLAS.get(word, ())}.isdisjoint(kind)


MEANINGS: Mapping[str, frozenset[Kind]] = {
    word: frozenset(kind for kind in KINDS if _true_of(word, kind))
    for word in ("shape", "striped", *COLORS, *SHAPES, *SPRITES, *UMBRELLAS, *ALIASES)
}
"""Word -> the kinds that it is true of."""


@dataclass(frozen=True)
class Thing:
    """One object as a caption names it.

    Args:
        words: at least one word that says what the object is, in their order: ("striped", "red", "circle").

    Raises:
        ValueError: an unknown word, or words that nothing fits.
    """

    words: tuple[str, ...]

    def __post_init__(self) -> None:
        for word in self.words:
            if word not in MEANINGS:
                raise ValueError(f"words={self.words!r} has {word!r}; allowed: {', '.join(MEANINGS)}")
        if not self.words or not self.kinds:
            raise ValueError(f"words={self.words!r}: nothing is all of that; join two objects with 'and'")

    @property
    def kinds(self) -> frozenset[Kind]:
        """Every kind that the words fit. Plain is not said: what is not "striped" is solid."""
        return _kinds_of(self.words)

    def __str__(self) -> str:
        return f"{article(self.words[0])} {' '.join(self.words)}"


@cache
def _kinds_of(words: tuple[str, ...]) -> frozenset[Kind]:
    fitting = frozenset(KINDS).intersection(*(MEANINGS[word] for word in words))
    return fitting if "striped" in words else frozenset(kind for kind in fitting if kind.fill != "striped")


def exactly(kind: Kind) -> Thing:
    """The thing whose plain words fit this kind alone."""
    said = ("striped" if kind.fill == "striped" else None, kind.color, kind.name)
    return Thing(tuple(word for word in said if word))


def article(word: str) -> str:
    """The indefinite article of `word`: "a" or "an"."""
    return "an" if word[0] in "aeiou" else "a"


def caption(things: Sequence[Thing], ground: str | None = None) -> str:
    """The caption of a scene: "a cat and a striped red circle", "a pet on white"."""
    words = " and ".join(map(str, things))
    return f"{words} on {ground}" if ground else words


def objects_in(prompt: str) -> list[Thing]:
    """The objects that a caption names, in its order, without its ground.

    Raises:
        ValueError: an unknown word (see `check_prompt`), or words for one object that contradict each other.
    """
    check_prompt(prompt)
    groups: list[list[str]] = [[]]
    for word in prompt.lower().split():
        # "on" ends an object just as "and" does; what follows it is a ground, which names no object.
        if word in ("and", "on"):
            groups.append([])
        elif word in MEANINGS:
            groups[-1].append(word)
    return [Thing(tuple(words)) for words in groups if words]
