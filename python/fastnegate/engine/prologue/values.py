# SPDX-License-Identifier: Apache-2.0
"""AdaVD: what a concept's value shares with each value of the prompt is subtracted, before attention.

Source: "Precise, Fast, and Low-cost Concept Erasure in Value Space" (CVPR 2025, arXiv 2412.06143).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shift:
    """How much of the shared part is taken: δ = strength / (1 + exp(-steepness (cos(V, V*) - threshold))), or
    the strength everywhere where there is no threshold. The paper's numbers are 2, 100 and 0.93."""

    strength: float = 1.0
    threshold: float | None = None
    steepness: float = 100.0

    def of(self, values: Tensor, targets: Tensor) -> Tensor:
        """δ [..., K] of values [..., C] and targets [K, C]."""
        if self.threshold is None:
            return values.new_full((*values.shape[:-1], len(targets)), self.strength)
        cosine = torch.nn.functional.normalize(values, dim=-1) @ torch.nn.functional.normalize(targets).T
        return self.strength * torch.sigmoid(self.steepness * (cosine - self.threshold))


def gram_schmidt(targets: Tensor) -> tuple[Tensor, Tensor]:
    """The orthogonal basis [K, C] of targets [K, C], in their order, and the unit lower triangular P [K, K]
    with basis = P targets. A target that depends on those before it has the basis vector 0."""
    count = len(targets)
    basis, factors = targets.clone(), torch.eye(count, dtype=targets.dtype, device=targets.device)
    tiny = count * torch.finfo(targets.dtype).eps
    for k in range(count):
        for j in range(k):
            length = basis[j] @ basis[j]
            if length == 0:
                continue
            shared = (basis[k] @ basis[j]) / length
            basis[k] -= shared * basis[j]
            factors[k] -= shared * factors[j]
        if basis[k].norm() <= tiny * targets[k].norm():
            basis[k] = 0
    return basis, factors


def without_concepts(values: Tensor, targets: Tensor, shift: Shift) -> Tensor:
    """AdaVD's edit of values [..., C] by the values of concepts, targets [K, C]: with B = P V* their
    Gram-Schmidt basis,

        V' = V - sum_k <V, b_k> / <b_k, b_k> [P (δ ∘ V*)]_k

    so that δ = 1 leaves what is orthogonal to all of them. C is the full width, all heads; computed in at
    least float32, returned in the dtype of `values`.
    """
    wide = torch.promote_types(values.dtype, torch.float32)
    full, targets = values.to(wide), targets.to(wide)
    basis, factors = gram_schmidt(targets)
    length = basis.square().sum(-1)
    shares = torch.where(length > 0, full @ basis.T / length.where(length > 0, 1), 0)
    removed = ((shares @ factors) * shift.of(full, targets)) @ targets
    return (full - removed).to(values.dtype)
