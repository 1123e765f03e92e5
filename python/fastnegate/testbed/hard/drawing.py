# SPDX-License-Identifier: Apache-2.0
"""Pictures of the hard world: where objects stand, and how a kind looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..shapes import signed_distance
from .words import GROUNDS, SPRITES, Kind

SIZE = 48
"""Height and width of every image, in pixels."""

PALETTE: Mapping[str, tuple[int, int, int]] = {
    "red": (215, 25, 30),
    "orange": (250, 135, 15),
    "yellow": (245, 225, 40),
    "green": (30, 165, 60),
    "cyan": (40, 205, 220),
    "blue": (35, 80, 225),
    "purple": (145, 45, 175),
    "pink": (250, 130, 190),
}
"""8-bit RGB of every colour."""

PLACES: tuple[str, ...] = ("free", "grid")
"""Where objects may stand: anywhere apart from each other, or one in each of four quarters."""

SMALLEST, LARGEST = 9.0, 10.0
"""Radius of an object, in pixels: half the longer side of a sprite, half the extent of a shape."""

GAP = 4.0
"""Pixels between two objects, at least; half of it to the edge of the picture. The largest fill a quarter."""

_STRIPES = 2.7  # from dark to dark, over the extent of a shape
_DARK = 0.4  # of the colour is left in the dark stripes
_SHEET = Path(__file__).parent / "sprites" / "sprites.png"

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


def canvas(ground: str) -> NDArray[np.float32]:
    """An empty picture: float32 [SIZE, SIZE, 3] RGB in [0, 1]."""
    return np.full((SIZE, SIZE, 3), np.array(GROUNDS[ground], np.float32) / 255)


def draw(image: NDArray[np.float32], kind: Kind, x: float, y: float, radius: float) -> None:
    """Draw an object into a picture, with an antialiased outline.

    Args:
        image: float32 [SIZE, SIZE, 3] RGB in [0, 1], changed in place.
        kind: what to draw.
        x, y, radius: centre and radius in pixels; of a sprite, what `settled` makes of them.
    """
    if kind.color is None:
        x, y, radius = settled(kind, x, y, radius)
        side, left, top = int(2 * radius), int(x - radius), int(y - radius)
        inked = sprite(kind.name, side)
        part = image[top : top + side, left : left + side]
        part *= 1 - inked[..., 3:]
        part += inked[..., :3]
        return
    reach = radius + 1
    rows = slice(max(int(y - reach), 0), min(int(y + reach) + 1, SIZE))
    columns = slice(max(int(x - reach), 0), min(int(x + reach) + 1, SIZE))
    down = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] + 0.5 - y
    right = np.arange(columns.start, columns.stop, dtype=np.float32)[None, :] + 0.5 - x
    coverage = np.clip(0.5 - signed_distance(kind.name, right, down, radius), 0, 1)[..., None]
    color = np.array(PALETTE[kind.color], np.float32) / 255
    if kind.fill == "striped":
        # A wave, steep enough that a stripe has an edge of about a pixel.
        light = np.clip(0.5 + 2 * np.cos(down * (np.pi * _STRIPES / radius)), 0, 1)[..., None]
        color = color * (_DARK + (1 - _DARK) * light)
    part = image[rows, columns]
    part += coverage * (color - part)


@cache
def sprite(name: str, side: int) -> NDArray[np.float32]:
    """A sprite whose longer side is `side` pixels: float32 [side, side, 4], RGB times alpha, and alpha."""
    from PIL import Image

    left = 64 * SPRITES.index(name)
    with Image.open(_SHEET) as sheet:
        whole = sheet.convert("RGBA").crop((left, 0, left + 64, 64))
    box = whole.getchannel("A").point([255 * (alpha > 40) for alpha in range(256)]).getbbox()
    ink = whole.crop(box)
    longer = max(ink.size)
    square = Image.new("RGBA", (longer, longer))
    square.paste(ink, ((longer - ink.width) // 2, (longer - ink.height) // 2))
    pixels = np.asarray(square, np.float32) / 255
    # Colours count by their alpha when pixels are averaged, else clear pixels would darken the outline.
    pixels = np.concatenate([pixels[..., :3] * pixels[..., 3:], pixels[..., 3:]], -1)
    channels = [Image.fromarray(np.ascontiguousarray(pixels[..., i])) for i in range(4)]
    return np.stack([np.asarray(c.resize((side, side), Image.Resampling.BOX)) for c in channels], -1)


def scatter(rng: np.random.Generator, radii: Sequence[float], places: str) -> list[tuple[float, float]]:
    """Centres, in pixels, of one to three objects with these radii, in their order and `GAP` apart.

    "grid": each somewhere within a quarter of its own. "free": a random cut parts the picture in two, a
    random object stands on one side and the rest on the other, cut again until each has a piece for itself.
    No draw is ever rejected, and every layout of up to three boxes that do not overlap can come out.
    """
    pieces: list[Box] = []
    order = rng.permutation(len(radii))
    if places == "grid":
        half = SIZE / 2
        slots = [(half * (slot % 2), half * (slot // 2)) for slot in rng.permutation(4)]
        pieces = [(left, top, left + half, top + half) for left, top in slots[: len(radii)]]
    else:
        pieces = _cut(rng, (0.0, 0.0, float(SIZE), float(SIZE)), [2 * radii[i] + GAP for i in order])
    centres = [(0.0, 0.0)] * len(radii)
    for index, (left, top, right, bottom) in zip(order, pieces):
        margin = radii[index] + GAP / 2
        centres[index] = (
            rng.uniform(left + margin, right - margin),
            rng.uniform(top + margin, bottom - margin),
        )
    return centres


def _cut(rng: np.random.Generator, box: Box, needs: Sequence[float]) -> list[Box]:
    """A piece of `box` for each object, at least as wide and as high as it needs."""
    need, *rest = needs
    if not rest:
        return [box]
    # Three objects do not fit in a row: across a cut, the rest need no more than the largest of them.
    ours, theirs = need, max(rest)
    axes = [axis for axis in (0, 1) if box[axis + 2] - box[axis] >= ours + theirs]
    axis = axes[rng.integers(len(axes))]
    first_is_low = rng.random() < 0.5
    below, above = (ours, theirs) if first_is_low else (theirs, ours)
    at = rng.uniform(box[axis] + below, box[axis + 2] - above)
    left, top, right, bottom = box
    low, high = (
        ((left, top, at, bottom), (at, top, right, bottom))
        if axis == 0
        else ((left, top, right, at), (left, at, right, bottom))
    )
    mine, others = (low, high) if first_is_low else (high, low)
    return [mine, *_cut(rng, others, rest)]


def settled(kind: Kind, x: float, y: float, radius: float) -> tuple[float, float, float]:
    """Centre and radius, in pixels, of what `draw` draws when asked for these: sprites take whole pixels."""
    if kind.color is not None:
        return x, y, radius
    side = round(2 * radius)
    return round(x - side / 2) + side / 2, round(y - side / 2) + side / 2, side / 2
