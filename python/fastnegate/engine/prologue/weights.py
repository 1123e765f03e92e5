# SPDX-License-Identifier: Apache-2.0
"""UCE and RECE: key and value projections that answer a concept's words with another one's, in closed form.

Sources: "Unified Concept Editing in Diffusion Models" (WACV 2024, arXiv 2308.14761), "Reliable and Efficient
Concept Erasure of Text-to-Image Diffusion Models" (ECCV 2024, arXiv 2407.12383).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class ClosedForm:
    """The part of UCE's normal equations that all layers share, solved once.

    The edited weight minimises, over W' [O, C],

        erase_scale Σ_e |W' c_e - v_e|² + keep_scale Σ_p |W' c_p - W c_p|² + ridge |W' - W|²

    Args:
        erased: embeddings [N, C] that get new answers v_e.
        kept: embeddings [M, C] whose answers stay.
        ridge: how much the weight itself stays; above 0.
    """

    def __init__(
        self, erased: Tensor, kept: Tensor, *, erase_scale: float, keep_scale: float, ridge: float
    ) -> None:
        self._erased, kept = erased.double(), kept.double()
        left = erase_scale * self._erased.T @ self._erased + keep_scale * kept.T @ kept
        left.diagonal().add_(ridge)
        # [C, N]: what the weight has to change for one more in each answer.
        self._change = torch.cholesky_solve(erase_scale * self._erased.T, torch.linalg.cholesky(left))

    def of(self, weight: Tensor, answers: Tensor) -> Tensor:
        """The edited weight, float64 [O, C], for wanted answers [N, O]."""
        weight = weight.double()
        missing = answers.double() - self._erased @ weight.T
        return weight + missing.T @ self._change.T


def answers(weight: Tensor, erased: Tensor, targets: Tensor, orthogonal: bool) -> Tensor:
    """What a layer with weight [O, C] shall say to erased embeddings [N, C]: what it says to the targets
    [N, C] ("replace"), or of that the part orthogonal to what it said ("tensor"). float64 [N, O]."""
    wanted = targets.double() @ weight.double().T
    if not orthogonal:
        return wanted
    before = erased.double() @ weight.double().T
    length = before.square().sum(-1, keepdim=True)
    return wanted - (wanted * before).sum(-1, keepdim=True) / length.clamp(min=1e-300) * before


def resurfacing(pairs: Iterable[tuple[Tensor, Tensor]], concepts: Tensor, ridge: float) -> Tensor:
    """RECE's adversarial embeddings, float64 [N, C]: those with which edited layers come nearest to what the
    original ones said to concepts [N, C],

        c' = argmin Σ_l |W'_l c' - W_l c|² + ridge |c'|² = (ridge I + Σ W'ᵀW')⁻¹ (Σ W'ᵀW) c

    Args:
        pairs: (W'_l, W_l), edited and original weight [O, C] of each layer.
        ridge: above 0.
    """
    concepts = concepts.double()
    left = ridge * torch.eye(concepts.shape[1], dtype=torch.float64, device=concepts.device)
    right = torch.zeros_like(left)
    for edited, original in pairs:
        left += edited.double().T @ edited.double()
        right += edited.double().T @ original.double()
    return torch.cholesky_solve(right @ concepts.T, torch.linalg.cholesky(left)).T


def evened(erased: Sequence[Tensor], targets: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Embeddings [N, C] to erase and their targets [N, C], of concepts [T_i, C] and targets [S_i, C] token by
    token; what a shorter target lacks is its last token."""
    pairs = [
        (old, torch.cat([new, new[-1:].expand(max(len(old) - len(new), 0), -1)])[: len(old)])
        for old, new in zip(erased, targets)
    ]
    return torch.cat([old for old, _ in pairs]), torch.cat([new for _, new in pairs])
