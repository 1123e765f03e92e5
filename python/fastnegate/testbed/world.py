# SPDX-License-Identifier: Apache-2.0
"""What a world of the testbed is.

A world is a package with the names of `World`: pictures and captions to train on, concepts, prompts that
negation is judged by, and a detector that judges. What it draws and how a prompt names it are its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from .cases import Case
from .verdict import Verdict

if TYPE_CHECKING:
    from PIL.Image import Image

ThingT = TypeVar("ThingT")
KindT = TypeVar("KindT")


@dataclass(frozen=True)
class Drawn(Generic[ThingT, KindT]):
    """An object in a scene.

    Args:
        thing: as the caption names it.
        kind: as it is drawn.
        x, y: centre in pixels, from the picture's upper left corner.
        radius: in pixels: half the longer side of a sprite, half the extent of a shape.
    """

    thing: ThingT
    kind: KindT
    x: float
    y: float
    radius: float


@dataclass(frozen=True, eq=False)
class Scene(Generic[ThingT, KindT]):
    """A captioned picture to train on.

    Args:
        caption: passes the world's `check_prompt`.
        image: float32 [SIZE, SIZE, 3] RGB in [0, 1].
        objects: in the caption's order.
    """

    caption: str
    image: NDArray[np.float32]
    objects: tuple[Drawn[ThingT, KindT], ...]


class World(Protocol):
    """The names of a world's package."""

    @property
    def NAME(self) -> str: ...
    @property
    def SIZE(self) -> int:
        """Height and width of its pictures, in pixels."""

    @property
    def VOCABULARY(self) -> tuple[str, ...]:
        """Every word of the tokenizer, in the order of its ids."""

    @property
    def WORDS(self) -> tuple[str, ...]:
        """The words that a prompt may use."""

    @property
    def MAX_WORDS(self) -> int:
        """Longest prompt, in words; its tokens are two more, for begin and end."""

    @property
    def CONCEPTS(self) -> tuple[str, ...]: ...
    @property
    def SUITES(self) -> tuple[str, ...]: ...
    @property
    def STRICT(self) -> Any: ...
    @property
    def LOOSE(self) -> Any: ...

    def check_prompt(self, prompt: str) -> None:
        """Raises ValueError for a prompt that its models cannot read."""

    def members(self, concept: str) -> list[str]:
        """The words that make up a concept, each worth a prototype."""

    def covers(self, concept: str, thing: Any) -> bool:
        """Whether an object is, by its words alone, sure to show a concept."""

    def templates(self, member: str) -> list[str]:
        """Captions with `{}` for a member, and square brackets around the span of its prototype."""

    def suite(self, name: str, n: int, seed: int, split: str = "test") -> list[Case[Any]]:
        """The first `n` cases of a suite: the same for the same arguments, and first of any longer list."""

    def detect(self, image: NDArray[Any] | Image, thresholds: Any = ...) -> list[Any]:
        """The objects of a picture, from left to right."""

    def judge(self, image: NDArray[Any] | Image, case: Case[Any]) -> Verdict:
        """What became of a case's prompt in a picture."""

    def scene(self, rng: np.random.Generator) -> Scene[Any, Any]:
        """A random captioned picture to train on."""


def pick(rng: np.random.Generator, options: Sequence[KindT]) -> KindT:
    """One of `options`, each as likely as the others."""
    return options[int(rng.integers(len(options)))]


def check_words(prompt: str, words: Sequence[str], most: int) -> None:
    """Check that a prompt is of these words, in any case, and of at most so many.

    Raises:
        ValueError: naming the first unknown word and the vocabulary, or the number of words.
    """
    said = prompt.lower().split()
    for word in said:
        if word not in words:
            raise ValueError(f"prompt={prompt!r} has the unknown word {word!r}; allowed: {', '.join(words)}")
    if len(said) > most:
        raise ValueError(f"prompt={prompt!r} has {len(said)} words; at most {most} fit")
