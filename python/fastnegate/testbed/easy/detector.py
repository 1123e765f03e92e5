# SPDX-License-Identifier: Apache-2.0
"""What is in a picture, told without a learned judge: colour blobs, named by shape templates.

Shapes and colours of the world are known exactly, so a picture can be judged by rules: connected
saturated pixels of one hue are an object, and the template that overlaps it best names its shape.
The rules are exact on rendered scenes; `STRICT` and `LOOSE` say what they make of blurred ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..blobs import as_array, components
from ..cases import Case
from ..shapes import signed_distance
from ..verdict import Verdict, matched, verdict
from .concepts import covers, members
from .world import (
    ALIASES,
    COLOR_UMBRELLAS,
    COLORS,
    PALETTE,
    SHAPE_UMBRELLAS,
    SHAPES,
    SIZE,
    PromptObject,
    check_prompt,
)

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Thresholds:
    """When a blob of one hue is an object, and when the object's shape has a name.

    Args:
        min_saturation: in [0, 1]; pixels count from this difference of largest and smallest RGB
            component on.
        min_area: pixels; smaller blobs are no objects.
        min_shape_area: pixels; the shape of smaller objects has no name.
        min_score: in [0, 1]; with a smaller overlap with every template a shape has no name.
        max_aspect: at least 1; a shape longer than this, as a multiple of its width (or the
            reverse), has no name.
    """

    min_saturation: float
    min_area: int
    min_shape_area: int
    min_score: float
    max_aspect: float


# Fixed from renders, before any generated picture was judged. The palest colour of the palette has
# a saturation of 0.51, the smallest object of the training images covers 62 pixels.
STRICT = Thresholds(min_saturation=0.25, min_area=18, min_shape_area=18, min_score=0.6, max_aspect=2.0)
"""A clear object: half of the palest colour, a third of the smallest size.

Judges what must stay."""

LOOSE = Thresholds(min_saturation=0.125, min_area=6, min_shape_area=18, min_score=0.5, max_aspect=2.5)
"""A faint remnant too: a quarter of the palest colour, a tenth of the smallest size, rougher shape.

Judges what must go: a concept that `LOOSE` does not find has left no trace, whereas `STRICT` would
also call it gone when it is only blurred. Shapes of fewer than 18 pixels stay nameless: of renders
that small, a third and more would get the wrong name. (`STRICT` may still find what `LOOSE` does
not: fainter pixels can join two blobs, or change an outline.)"""


@dataclass(frozen=True)
class Detection:
    """One object found in a picture.

    Args:
        shape: one of `SHAPES`, or None where no template fits.
        color: one of `COLORS`.
        area: pixels.
        score: in [0, 1], intersection over union with the best template, also where it names none.
        box: left, top, right, bottom in pixels; right and bottom are exclusive.
    """

    shape: str | None
    color: str
    area: int
    score: float
    box: tuple[int, int, int, int]


def detect(image: NDArray[Any] | Image, thresholds: Thresholds = STRICT) -> list[Detection]:
    """Find the objects of a picture.

    Args:
        image: 32x32 picture: a PIL image, or a float array [32, 32, 3] of RGB in [0, 1].
        thresholds: `STRICT`, `LOOSE` or others.

    Returns:
        The objects from left to right.

    Raises:
        ValueError: another size, an array that is not floating-point, or values outside [0, 1].
    """
    pixels = as_array(image, SIZE)
    saturation = pixels.max(-1) - pixels.min(-1)
    # Mixing with a gray background scales the chroma but keeps its direction: antialiased rims
    # have the hue of their object.
    chroma = pixels - pixels.mean(-1, keepdims=True)
    hue = (chroma @ _hues().T).argmax(-1)

    detections = []
    for index, color in enumerate(COLORS):
        for blob in components((saturation > thresholds.min_saturation) & (hue == index)):
            covered = blob & (saturation > _half_coverage(saturation[blob]))
            if covered.sum() >= thresholds.min_area:
                detections.append(_describe(covered, color, thresholds))
    return sorted(detections, key=lambda detection: detection.box)


def shows(detections: Sequence[Detection], concept: str) -> bool:
    """Whether any detection has a concept's colour or shape, or one that an umbrella word covers.

    Raises:
        ValueError: `concept` is not in `CONCEPTS`.
    """
    words = members(concept)
    return any(found.color in words or found.shape in words for found in detections)


def objects_in(prompt: str) -> list[PromptObject]:
    """The objects that a caption names, in its order, without its background.

    Aliases are resolved ("a tomato" is a red circle), umbrella words stay ("a warm circle"), the
    narrower word wins ("a warm red circle" is red), and what is not named is None ("a red shape",
    "circle").

    Raises:
        ValueError: an unknown word (see `check_prompt`), or contradicting words for one object.
    """
    check_prompt(prompt)
    groups: list[list[str]] = [[]]
    for word in prompt.lower().split():
        # "left of" and "on" end an object just as "and" does; what follows "on" names no object.
        if word in ("and", "left", "on"):
            groups.append([])
        elif word in _OBJECT_WORDS:
            groups[-1].append(word)
    return [_object_of(words, prompt) for words in groups if words]


def kept(detections: Sequence[Detection], objects: Sequence[PromptObject], concept: str) -> bool:
    """Whether every object of a prompt that a concept does not cover is in the picture.

    An object is in the picture if a detection has its colour and its shape, as far as they are
    named; every object needs a detection of its own.

    Args:
        detections: of the picture.
        objects: of the prompt, as `objects_in` gives them.
        concept: the negated concept.

    Raises:
        ValueError: `concept` is not in `CONCEPTS`.
    """
    return matched([thing for thing in objects if not covers(concept, thing)], detections, _fits)


def judge(image: NDArray[Any] | Image, case: Case[PromptObject]) -> Verdict:
    """What became of a case's prompt in a picture: see `Verdict`.

    Args:
        image: as `detect` takes it.
        case: of `suite`.

    Raises:
        ValueError: as `detect`.
    """
    strict, loose = detect(image, STRICT), detect(image, LOOSE)
    malformed = sum(found.shape is None for found in loose)
    return verdict(case, strict, loose, shows, _fits, malformed)


def _fits(found: Detection, thing: PromptObject) -> bool:
    return (thing.color is None or found.color in members(thing.color)) and (
        thing.shape is None or found.shape in members(thing.shape)
    )


_COLOR_WORDS = (*COLORS, *COLOR_UMBRELLAS)
_SHAPE_WORDS = (*SHAPES, *SHAPE_UMBRELLAS)
_OBJECT_WORDS = (*_COLOR_WORDS, *_SHAPE_WORDS, *ALIASES, "shape")


def _object_of(words: Sequence[str], prompt: str) -> PromptObject:
    """The object that a group of colour, shape and alias words names."""
    aliases = [ALIASES[word] for word in words if word in ALIASES]
    colors = [word for word in words if word in _COLOR_WORDS] + [str(a.color) for a in aliases]
    shapes = [word for word in words if word in _SHAPE_WORDS] + [str(a.shape) for a in aliases]
    return PromptObject(_narrowest(colors, prompt), _narrowest(shapes, prompt))


def _narrowest(words: Sequence[str], prompt: str) -> str | None:
    """The word that all the others cover; None of no words."""
    if not words:
        return None
    narrowest = min(words, key=lambda word: len(members(word)))
    for word in words:
        if narrowest not in members(word):
            raise ValueError(
                f"prompt={prompt!r} calls one object {word!r} and {narrowest!r}; join two objects with 'and'"
            )
    return narrowest


@cache
def _hues() -> NDArray[np.float64]:
    """[colours, 3]: the unit chroma (RGB less its mean) of every palette colour."""
    palette = np.array([PALETTE[color] for color in COLORS], np.float64)
    chroma = palette - palette.mean(-1, keepdims=True)
    hues: NDArray[np.float64] = chroma / np.linalg.norm(chroma, axis=-1, keepdims=True)
    return hues


def _half_coverage(saturation: NDArray[np.float64]) -> float:
    """Saturation of a pixel that a blob covers by half: half of the blob's own saturation.

    The blob's own saturation is the median without the lowest two fifths: those are rim pixels.
    """
    inner = saturation[saturation >= np.quantile(saturation, 0.4)]
    return 0.5 * float(np.median(inner))


_CELLS = 16  # shapes are compared on a grid of 16x16 cells, stretched over their bounding box


def _on_grid(mask: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], tuple[int, int, int, int]]:
    """A mask's content stretched to [_CELLS, _CELLS], and its box (left, top, right, bottom)."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    left, right = int(columns[0]), int(columns[-1]) + 1
    steps = (np.arange(_CELLS) + 0.5) / _CELLS
    y = top + (steps * (bottom - top)).astype(int)
    x = left + (steps * (right - left)).astype(int)
    return mask[np.ix_(y, x)], (left, top, right, bottom)


@cache
def _templates() -> NDArray[np.bool_]:
    """[shapes, _CELLS, _CELLS]: every shape, drawn large and stretched to its bounding box."""
    offsets = np.arange(96) + 0.5 - 48
    masks = [signed_distance(s, offsets[None, :], offsets[:, None], 36.0) < 0 for s in SHAPES]
    return np.stack([_on_grid(mask)[0] for mask in masks])


def _describe(covered: NDArray[np.bool_], color: str, thresholds: Thresholds) -> Detection:
    """Name the shape of a blob's covered pixels [32, 32]."""
    grid, box = _on_grid(covered)
    overlap = (grid & _templates()).sum((1, 2)) / (grid | _templates()).sum((1, 2))
    best = int(overlap.argmax())
    area, score = int(covered.sum()), float(overlap[best])
    width, height = box[2] - box[0], box[3] - box[1]
    named = (
        area >= thresholds.min_shape_area
        and score > thresholds.min_score
        and max(width, height) < thresholds.max_aspect * min(width, height)
    )
    return Detection(SHAPES[best] if named else None, color, area, score, box)
