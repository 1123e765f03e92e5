# SPDX-License-Identifier: Apache-2.0
"""Outlines of the shapes that the worlds of the testbed draw."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]

OUTLINES: tuple[str, ...] = ("circle", "ring", "square", "triangle", "diamond", "cross", "heart")


def signed_distance(shape: str, x: FloatArray, y: FloatArray, radius: float) -> FloatArray:
    """Signed distance, in pixels and negative inside, from offsets to the outline of a shape.

    Args:
        shape: one of `OUTLINES`.
        x, y: offsets from the shape's centre in pixels, y downwards; any shapes that broadcast.
        radius: half of the shape's extent, in pixels.

    Raises:
        ValueError: `shape` is not in `OUTLINES`.
    """
    distance: FloatArray
    if shape == "circle":
        distance = np.hypot(x, y) - radius
    elif shape == "ring":
        distance = np.abs(np.hypot(x, y) - 0.74 * radius) - 0.26 * radius
    elif shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - 0.9 * radius
    elif shape == "triangle":
        sides = (1.75 * np.abs(x) - y - 0.95 * radius) / np.hypot(1.75, 1)
        distance = np.maximum(y - 0.8 * radius, sides)
    elif shape == "diamond":
        distance = (1.25 * np.abs(x) + np.abs(y) - 1.1 * radius) / np.hypot(1.25, 1)
    elif shape == "cross":
        upright = np.maximum(np.abs(x) - 0.36 * radius, np.abs(y) - radius)
        level = np.maximum(np.abs(x) - radius, np.abs(y) - 0.36 * radius)
        distance = np.minimum(upright, level)
    elif shape == "heart":
        # Two discs, and a wedge whose sides touch them; its top runs through the discs.
        right = np.abs(x)
        discs = np.hypot(right - 0.48 * radius, y + 0.36 * radius) - 0.52 * radius
        sides = (right + 0.95 * y - 0.855 * radius) / np.hypot(1, 0.95)
        top = (0.42 * right - y - 0.36 * radius) / np.hypot(1, 0.42)
        distance = np.minimum(discs, np.maximum(sides, top))
    else:
        raise ValueError(f"shape={shape!r}; allowed: {', '.join(OUTLINES)}")
    return distance
