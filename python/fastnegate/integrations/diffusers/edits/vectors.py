# SPDX-License-Identifier: Apache-2.0
"""Task vectors, and Diverse Inversion, which chooses how far to go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ....engine.errors import UnsupportedModelError
from ....engine.prologue.vectors import Choice, moved_away, smallest_strength
from ....operator.rule import check_number
from ..contract import bare, denoiser
from .edit import Edit, offloaded_by_groups
from .weights import WeightEdit, checked

DEFAULT_GRID = tuple(round(0.25 * i, 2) for i in range(1, 13))

Trained = nn.Module | Mapping[str, Tensor]


def task_vector(
    pipe: Any, trained: Trained, strength: float = 1.0, *, layers: Sequence[str] = ("*",)
) -> Edit:
    """Move the denoiser away from what it became when it was trained on a concept (Pham et al., "Robust
    Concept Erasure Using Task Vectors", arXiv 2404.03631): θ - strength (θ_trained - θ).

    Args:
        pipe: a supported pipeline; of several denoisers the first is edited.
        trained: the same model after training on the concept, or its state dict; a part of it is enough.
        strength: α, at least 0; see `diverse_inversion`.
        layers: patterns for names of weights, `*` for any characters: only these are edited.

    Returns:
        The edit; leaving `with` restores all weights to the bit.

    Raises:
        ValueError: a weight that the denoiser does not have, or that has another shape, nan or inf; a pattern
            that matches nothing; a bad strength.
        UnsupportedModelError: weights are quantized, on the meta device or offloaded by groups.
    """
    check_number("strength", strength, low=0.0)
    pairs = _pairs(pipe, trained, layers)
    with torch.no_grad():
        new = {weight: moved_away(weight.detach(), after, strength) for weight, after in pairs.items()}
    return WeightEdit(pipe, "task_vector", new)


def diverse_inversion(
    pipe: Any,
    trained: Trained,
    embeddings: Sequence[Tensor],
    loss: Callable[[Any, Tensor], float],
    bound: float,
    *,
    grid: Sequence[float] = DEFAULT_GRID,
    layers: Sequence[str] = ("*",),
) -> Choice:
    """The smallest strength of a task vector at which the concept cannot be made any more (same source), not
    even with embeddings that were learned to make it, the more diverse the better.

    The paper looks for the strength by what an inverted set of embeddings still makes; that the strengths are
    those of a grid, and what is compared with a bound, is ours.

    Args:
        pipe, trained, layers: as for `task_vector`.
        embeddings: learned embeddings [T, C] of the concept.
        loss: of the edited pipeline and one of them: the denoising loss of the concept's pictures, say, or
            how sure a judge is that the concept is gone. It grows as the concept goes.
        bound: what it must exceed with every embedding.
        grid: strengths to try, ascending.

    Returns:
        The strength, and all losses that were looked at. The pipeline is as it was.

    Raises:
        As `task_vector`; ValueError: no embeddings, a bad grid, a loss that is nan, or no strength suffices.
    """
    if isinstance(embeddings, Tensor) or not embeddings:
        raise ValueError("embeddings: must be a list of at least one tensor [T, C]")
    for i, one in enumerate(embeddings):
        if not isinstance(one, Tensor) or one.dim() != 2 or not len(one):
            raise ValueError(f"embeddings[{i}]: must be a tensor [T, C], T > 0")
    for strength in grid:
        check_number("grid", strength, low=0.0)
    _pairs(pipe, trained, layers)

    def losses(strength: float) -> list[float]:
        with task_vector(pipe, trained, strength, layers=layers):
            return [float(loss(pipe, one)) for one in embeddings]

    return smallest_strength(grid, losses, bound)


def _pairs(pipe: Any, trained: Trained, layers: Sequence[str]) -> dict[nn.Parameter, Tensor]:
    """The weights to edit, and what they became."""
    model = bare(denoiser(pipe))
    if offloaded_by_groups(model):
        raise UnsupportedModelError("task_vector cannot write into weights: they are offloaded by groups")
    own = dict(model.named_parameters())
    if isinstance(layers, str):
        raise ValueError(f"layers={layers!r}: must be a list of patterns")
    after = dict(trained.named_parameters() if isinstance(trained, nn.Module) else trained)
    unknown = [name for name in after if name not in own and name not in dict(model.named_buffers())]
    if unknown:
        raise ValueError(f"trained has {unknown[0]!r}: {type(model).__name__} has no such weight")
    for pattern in layers:
        if not any(fnmatchcase(name, pattern) for name in after):
            raise ValueError(f"layers: {pattern!r} matches no weight of trained")
    pairs = {}
    for name, value in after.items():
        if name not in own or not any(fnmatchcase(name, pattern) for pattern in layers):
            continue
        weight = checked(name, own[name], "task_vector")
        if value.shape != weight.shape:
            raise ValueError(f"trained[{name!r}] has shape {list(value.shape)}: must be {list(weight.shape)}")
        if value.is_meta or not value.isfinite().all():
            raise ValueError(f"trained[{name!r}] holds nan or inf, or is on the meta device")
        pairs[weight] = value.detach()
    if not pairs:
        raise ValueError("trained has no weight that could be edited")
    return pairs
