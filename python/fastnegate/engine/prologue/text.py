# SPDX-License-Identifier: Apache-2.0
"""SAFREE: tokens of the prompt that carry a concept are projected out of the concept's subspace, before the
denoiser reads them.

Source: "SAFREE: Training-Free and Adaptive Guard for Safe Text-to-Image and Video Generation" (ICLR 2025,
arXiv 2410.12761). Its second part, which filters skip features of UNets in a further pass, is not here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def subspace(vectors: Tensor) -> Tensor:
    """An orthonormal basis [R, C] of what vectors [N, C] span: R is their rank. The paper's projector
    C (CᵀC)⁺ Cᵀ, with the vectors as the columns of C, is basisᵀ basis."""
    _, values, basis = torch.linalg.svd(vectors, full_matrices=False)
    most = max(vectors.shape) * torch.finfo(vectors.dtype).eps
    kept: Tensor = basis[values > most * values.max()]
    return kept


def onto(vectors: Tensor, basis: Tensor) -> Tensor:
    """The projection of vectors [..., C] onto the span of an orthonormal basis [R, C]."""
    return (vectors @ basis.T) @ basis


@dataclass(frozen=True)
class Safree:
    """The numbers of the method; the paper's for nudity, for artists `rise=3.5, middle=5.5`.

    Attributes:
        margin: α: a token is a trigger if without it the prompt is by that much farther from the concept than
            without another one.
        most_steps: γ: the filter holds for so many steps at most.
        rise, middle: k and t0: how fast the steps grow with the change that the filter makes, and where.
    """

    margin: float = 0.01
    most_steps: float = 10.0
    rise: float = 2.5
    middle: float = 5.333

    def triggers(self, masked: Tensor, concepts: Tensor) -> Tensor:
        """Which tokens of a prompt carry the concepts, bool [L].

        Args:
            masked: pooled encodings [L, C] of the prompt, each with one token masked.
            concepts: orthonormal basis [R, C] of the concepts' subspace.

        Token i is one if d_i >= (1 + α) mean_{j≠i} d_j, where d_i = |(I - P_C) p_i|. A single token has no
        others to compare with, and is taken for one.
        """
        distance = (masked - onto(masked, concepts)).norm(dim=-1)
        if len(distance) < 2:
            return torch.ones_like(distance, dtype=torch.bool)
        others = (distance.sum() - distance) / (len(distance) - 1)
        carries: Tensor = distance >= (1 + self.margin) * others
        return carries

    def filtered(self, tokens: Tensor, masked: Tensor, concepts: Tensor) -> Tensor:
        """Tokens [L, C] of a prompt: triggers become (I - P_C) P_I e, where P_I projects onto the span of the
        masked prompts. `masked` and `concepts` as for `triggers`."""
        inside = onto(tokens, subspace(masked))
        projected = inside - onto(inside, concepts)
        return torch.where(self.triggers(masked, concepts).unsqueeze(-1), projected, tokens)

    def last_step(self, before: Tensor, after: Tensor) -> int:
        """The last step, counted from 0, that reads the filtered tokens: round(γ σ(2 k (10 β - t0))), with
        β = 1 - mean cos(e, e') over the tokens [L, C] of the prompt."""
        change = 1 - torch.cosine_similarity(before, after, dim=-1).mean()
        growth = torch.sigmoid(2 * self.rise * (10 * change - self.middle))
        return round(self.most_steps * growth.item())
