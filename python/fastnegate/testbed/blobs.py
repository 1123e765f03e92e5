# SPDX-License-Identifier: Apache-2.0
"""What the detectors of all worlds begin with: the checked picture, and its connected blobs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image


def as_array(image: NDArray[Any] | Image, size: int) -> NDArray[np.float64]:
    """The checked picture as float64 [size, size, 3] RGB in [0, 1].

    Args:
        image: a PIL image, or a floating-point array [size, size, 3] of RGB in [0, 1].
        size: height and width, in pixels.

    Raises:
        ValueError: another size, an array that is not floating-point, or values outside [0, 1].
    """
    if not isinstance(image, np.ndarray):
        image = np.asarray(image.convert("RGB")) / 255
    if image.shape != (size, size, 3):
        raise ValueError(f"image has the shape {image.shape}; allowed: {(size, size, 3)}")
    if not np.issubdtype(image.dtype, np.floating):
        raise ValueError(f"image has dtype {image.dtype}; allowed: floating-point, in [0, 1]")
    # Written so that NaN fails too.
    if not (image.min() >= 0 and image.max() <= 1):
        raise ValueError(f"image spans {image.min()} to {image.max()}; allowed: [0, 1]")
    return image.astype(np.float64)


def components(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """The 8-connected components of a mask [H, W], each as a mask [H, W]."""
    height, width = mask.shape
    labels = np.zeros((height + 2, width + 2), np.int64)
    inner = labels[1:-1, 1:-1]
    inner[mask] = np.flatnonzero(mask) + 1
    while True:
        # Every pixel takes the largest label around it, until each component has one label.
        before = inner.copy()
        across = np.maximum(np.maximum(labels[:, :-2], labels[:, 1:-1]), labels[:, 2:])
        spread = np.maximum(np.maximum(across[:-2], across[1:-1]), across[2:])
        np.multiply(spread, mask, out=inner)
        if np.array_equal(before, inner):
            return [inner == label for label in np.unique(inner[mask])]
