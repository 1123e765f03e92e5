# SPDX-License-Identifier: Apache-2.0
"""Layers that normalise queries and keys across all heads, before these are split: Sana, LTX, Wan."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ....engine.errors import NegationNotAppliedError
from .kind import Attend, mask_of


class Across:
    """LTX-Video; in other kinds something is different."""

    scaled = rides = False

    def parts(self, attn: Any) -> list[str]:
        return ["to_k", "to_v"] + ["norm_k"] * (attn.norm_k is not None)

    def project(self, attn: Any, text: Tensor) -> tuple[Tensor, Tensor]:
        return self._split(attn, attn.to_k(text), attn.norm_k), self._split(attn, attn.to_v(text))

    def forward(
        self, inner: Any, attn: Any, attend: Attend, hidden: Tensor, text: Tensor, mask: Tensor | None,
        *rest: Any,
    ) -> Tensor:  # fmt: skip
        if any(given is not None for given in rest):
            raise NegationNotAppliedError(f"{type(attn).__name__} was given more than text and its mask")
        query = self._split(attn, attn.to_q(hidden), attn.norm_q)
        output = attend(query, *self.project(attn, text), mask if mask is None else mask_of(attn, mask, text))
        output = output.transpose(1, 2).flatten(2)
        for module in attn.to_out:  # linear, dropout
            output = module(output)
        return output

    @staticmethod
    def _split(attn: Any, states: Tensor, norm: Any = None) -> Tensor:
        """[B, L, H * D] -> [B, H, L, D]."""
        if norm is not None:
            states = norm(states)
        batch, length, _ = states.shape
        return states.view(batch, length, attn.heads, -1).transpose(1, 2)


class Sana(Across):
    """Its self-attention is linear, its cross-attention is not."""

    def forward(self, inner: Any, attn: Any, *arguments: Any) -> Tensor:
        output: Tensor = super().forward(inner, attn, *arguments) / attn.rescale_output_factor
        return output
