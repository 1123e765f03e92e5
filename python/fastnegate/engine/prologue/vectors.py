# SPDX-License-Identifier: Apache-2.0
"""Task vectors: a model moves away from what it became when it was trained on a concept.

Source: "Robust Concept Erasure Using Task Vectors" (arXiv 2404.03631).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def moved_away(before: Tensor, trained: Tensor, strength: float) -> Tensor:
    """θ - strength (θ_trained - θ), in at least float32, in the dtype of `before`."""
    wide = torch.promote_types(before.dtype, torch.float32)
    start, end = before.to(wide), trained.to(device=before.device, dtype=wide)
    return (start - strength * (end - start)).to(before.dtype)


class Choice(NamedTuple):
    """What Diverse Inversion chose.

    Attributes:
        strength: the smallest on the grid that suffices.
        losses: for each strength that was tried, the concept's loss with each embedding.
    """

    strength: float
    losses: dict[float, list[float]]


def smallest_strength(
    grid: Sequence[float], losses: Callable[[float], Sequence[float]], bound: float
) -> Choice:
    """The smallest strength of an ascending grid at which the concept's loss is above `bound` with every
    embedding.

    Raises:
        ValueError: the grid is empty or does not ascend, a loss is nan, or no strength suffices.
    """
    if not grid or any(b <= a for a, b in itertools.pairwise(grid)):
        raise ValueError(f"grid={list(grid)!r}: must be strengths that ascend")
    tried: dict[float, list[float]] = {}
    for strength in grid:
        found = tried[strength] = [float(loss) for loss in losses(strength)]
        if any(loss != loss for loss in found):
            raise ValueError(f"loss is nan at strength {strength}: {found}")
        if min(found) > bound:
            return Choice(strength, tried)
    raise ValueError(
        f"bound={bound}: no strength of grid={list(grid)!r} exceeds it with every embedding; the smallest "
        f"loss at {grid[-1]} is {min(tried[grid[-1]]):g}"
    )
