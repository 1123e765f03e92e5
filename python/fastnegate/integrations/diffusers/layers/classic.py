# SPDX-License-Identifier: Apache-2.0
"""The layers of UNets and PixArt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .kind import Attend, mask_of


@dataclass(frozen=True)
class Classic:
    """diffusers' `Attention`: UNets, PixArt. `AttnProcessor`, the older of its processors, scales by
    `attn.scale` and ignores norm_q and norm_k."""

    scaled: bool = False
    rides: ClassVar[bool] = False

    def parts(self, attn: Any) -> list[str]:
        return ["to_k", "to_v"] + ["norm_cross"] * bool(attn.norm_cross) + ["norm_k"] * bool(attn.norm_k)

    def project(self, attn: Any, text: Tensor) -> tuple[Tensor, Tensor]:
        if attn.norm_cross:
            text = attn.norm_encoder_hidden_states(text)
        batch, length, _ = text.shape
        key = attn.to_k(text).view(batch, length, attn.heads, -1).transpose(1, 2)
        value = attn.to_v(text).view(batch, length, attn.heads, -1).transpose(1, 2)
        return (attn.norm_k(key) if attn.norm_k is not None and not self.scaled else key), value

    def forward(
        self, inner: Any, attn: Any, attend: Attend, hidden: Tensor, text: Tensor, mask: Tensor | None,
        *rest: Any,
    ) -> Tensor:  # fmt: skip
        residual, shape = hidden, hidden.shape
        if attn.spatial_norm is not None:
            hidden = attn.spatial_norm(hidden, rest[0] if rest else None)
            shape = hidden.shape
        if hidden.ndim == 4:
            hidden = hidden.flatten(2).transpose(1, 2)
        if mask is not None:
            mask = mask_of(attn, mask, text)
        if attn.group_norm is not None:
            hidden = attn.group_norm(hidden.transpose(1, 2)).transpose(1, 2)
        query = attn.to_q(hidden)
        query = query.view(*query.shape[:2], attn.heads, -1).transpose(1, 2)
        key, value = self.project(attn, text)
        if attn.norm_q is not None and not self.scaled:
            query = attn.norm_q(query)
        hidden = attend(query, key, value, mask).transpose(1, 2).flatten(2)
        for module in attn.to_out:  # linear, dropout
            hidden = module(hidden)
        if len(shape) == 4:
            hidden = hidden.transpose(-1, -2).reshape(shape)
        if attn.residual_connection:
            hidden = hidden + residual
        output: Tensor = hidden / attn.rescale_output_factor
        return output


CLASSIC = Classic()
