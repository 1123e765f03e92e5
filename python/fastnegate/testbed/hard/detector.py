# SPDX-License-Identifier: Apache-2.0
"""What is in a picture of the hard world, told without a learned judge: blobs, named by what was drawn.

What stands out from the ground falls into blobs, and each is stretched to a fixed grid and compared with
every kind of the world, drawn on that ground and stretched in the same way. The nearest names it, unless it
is too far: then the blob is nobody's, which is neither a concept that stayed nor an object that was kept.
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
from ..verdict import Verdict, verdict
from .concepts import meaning_of
from .drawing import LARGEST, SIZE, SMALLEST, canvas, draw
from .words import GROUNDS, KINDS, Kind, Thing

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Thresholds:
    """When something is an object, and when the object has a name.

    Args:
        contrast: in [0, 1]; pixels count from this difference to the ground on, in any component.
        min_area: pixels; smaller blobs are nothing at all.
        min_side: pixels; a blob whose longer side is shorter has no name.
        faintest: in (0, 1]; an object may be mixed with the ground down to this share of itself.
        max_distance: root mean square over the grid's RGB in [0, 1], for the object at its full strength;
            from this distance to every kind on, a blob has no name.
    """

    contrast: float
    min_area: int
    min_side: int
    faintest: float
    max_distance: float


# Fixed from renders, before any picture of a model was judged; the shares are of all kinds on all grounds.
STRICT = Thresholds(contrast=0.15, min_area=24, min_side=11, faintest=0.75, max_distance=0.16)
"""A clear object: judges what must stay.

It names rightly 95 % at three fifths of the contrast, 97 % of what is blurred by 1.2 pixels and 99 % at two
thirds of the smallest size; wrongly, 4 % at most. Of pictures put together from halves of two kinds it names
one in twenty."""

LOOSE = Thresholds(contrast=0.1, min_area=12, min_side=7, faintest=0.35, max_distance=0.25)
"""A faint remnant too: judges what must go.

It names rightly 95 % at three tenths of the contrast and 99 % at two fifths of the smallest size; wrongly,
3 % at most. A concept that it does not find has left no trace, whereas `STRICT` would also call gone what is
only faint."""


@dataclass(frozen=True)
class Detection:
    """One object found in a picture.

    Args:
        kind: what it is, or None where it is nobody's.
        distance: to the nearest kind, also where it names none: see `Thresholds.max_distance`.
        area: pixels.
        box: left, top, right, bottom in pixels; right and bottom are exclusive.
    """

    kind: Kind | None
    distance: float
    area: int
    box: tuple[int, int, int, int]


def detect(image: NDArray[Any] | Image, thresholds: Thresholds = STRICT) -> list[Detection]:
    """Find the objects of a picture.

    Args:
        image: 48x48 picture: a PIL image, or a float array [48, 48, 3] of RGB in [0, 1].
        thresholds: `STRICT`, `LOOSE` or others.

    Returns:
        The objects from left to right.

    Raises:
        ValueError: another size, an array that is not floating-point, or values outside [0, 1].
    """
    pixels = as_array(image, SIZE)
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    level = np.median(border, 0)
    ground = min(GROUNDS, key=lambda name: float(np.abs(_ground(name) - level).sum()))
    # From the ground that the picture has, which comes near to one of the world's.
    ink = pixels - level
    grain = float(np.quantile(np.abs(border - level), 0.9))
    marked = np.abs(ink).max(-1) > max(thresholds.contrast, min(_GRAIN * grain, _COARSE))

    found = []
    for blob in _blobs(marked):
        if (area := int(blob.sum())) >= thresholds.min_area:
            cells, box = _stretched(np.where((marked & ~blob)[..., None], 0, ink), blob)
            kind, distance = _nearest(cells, box, ground, thresholds.faintest)
            longer = max(box[2] - box[0], box[3] - box[1])
            named = longer >= thresholds.min_side and distance < thresholds.max_distance
            found.append(Detection(kind if named else None, distance, area, box))
    return sorted(found, key=lambda detection: detection.box)


def shows(detections: Sequence[Detection], concept: str) -> bool:
    """Whether any detection is of a kind that a concept means.

    Raises:
        ValueError: `concept` is not in `CONCEPTS`.
    """
    meaning = meaning_of(concept)
    return any(found.kind in meaning for found in detections)


def judge(image: NDArray[Any] | Image, case: Case[Thing]) -> Verdict:
    """What became of a case's prompt in a picture: see `Verdict`.

    Args:
        image: as `detect` takes it.
        case: of `suite`.

    Raises:
        ValueError: as `detect`.
    """
    strict, loose = detect(image, STRICT), detect(image, LOOSE)
    malformed = sum(found.kind is None for found in loose)
    return verdict(case, strict, loose, shows, lambda found, thing: found.kind in thing.kinds, malformed)


# Noise must not join everything into one blob. Nine tenths of the border's differences are below 1.6 standard
# deviations of its noise; three times that is almost five (four, where white or black clips one side).
_GRAIN = 3.0
_COARSE = 0.25  # from this contrast on noise is no ground any more, but a blob that is nobody's


def _ground(name: str) -> NDArray[np.float64]:
    return np.array(GROUNDS[name]) / 255


def _blobs(marked: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Connected pixels, across clefts of one pixel too: parts of a sprite may have the ground's colour."""
    joined = np.pad(marked, ((0, 1), (0, 1)))
    joined[1:] |= joined[:-1]
    joined[:, 1:] |= joined[:, :-1]
    return [blob[:-1, :-1] & marked for blob in components(joined)]


_CELLS = 14  # blobs are compared on a grid of 14x14 cells, stretched over their bounding box
_RADII = (SMALLEST, (SMALLEST + LARGEST) / 2, LARGEST)
_ASPECT = 0.12  # distance for a box e times as wide, for its height, as the kind's


@cache
def _averages(length: int) -> NDArray[np.float64]:
    """[_CELLS, length]: each cell's weights for the pixels that it lies over, or between."""
    edges = np.arange(_CELLS + 1) * (length / _CELLS)
    pixel = np.arange(length)
    over = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    weights = np.maximum(over, 0)
    averages: NDArray[np.float64] = weights / weights.sum(1, keepdims=True)
    return averages


def _stretched(
    ink: NDArray[np.float64], blob: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], tuple[int, int, int, int]]:
    """Ink [H, W, 3] within a blob's box averaged to [_CELLS * _CELLS * 3], and the box."""
    rows, columns = np.flatnonzero(blob.any(1)), np.flatnonzero(blob.any(0))
    left, top, right, bottom = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    part = ink[top:bottom, left:right].transpose(2, 0, 1)
    cells = _averages(bottom - top) @ part @ _averages(right - left).T
    return cells.ravel(), (left, top, right, bottom)


def _aspect(box: tuple[int, int, int, int]) -> float:
    return float(np.log((box[2] - box[0]) / (box[3] - box[1])))


@cache
def _drawn(ground: str) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Every kind at every radius on a ground: ink [n, cells], its squared length [n], log of aspect [n]."""
    inks, aspects = [], []
    for kind in KINDS:
        for radius in _RADII:
            image = canvas(ground)
            draw(image, kind, SIZE / 2, SIZE / 2, radius)
            ink = np.clip(image, 0, 1).astype(np.float64) - _ground(ground)
            cells, box = _stretched(ink, np.abs(ink).max(-1) > STRICT.contrast)
            inks.append(cells)
            aspects.append(_aspect(box))
    stacked = np.stack(inks)
    return stacked, (stacked**2).sum(1), np.array(aspects)


def _nearest(
    cells: NDArray[np.float64], box: tuple[int, int, int, int], ground: str, faintest: float
) -> tuple[Kind, float]:
    """The kind that a blob's ink is nearest to, and its distance.

    Every kind is compared at the strength at which it fits best, between `faintest` and 1, and what
    is left is divided by that strength: a pale object is as far from its kind as the same one in full.
    """
    inks, squares, aspects = _drawn(ground)
    alike = inks @ cells
    strength = np.clip(alike / squares, faintest, 1)
    left = np.maximum(cells @ cells - 2 * strength * alike + strength**2 * squares, 0)
    distance = np.sqrt(left / cells.size) / strength + _ASPECT * np.abs(aspects - _aspect(box))
    best = int(distance.argmin())
    return KINDS[best // len(_RADII)], float(distance[best])
