# SPDX-License-Identifier: Apache-2.0
"""Wan's layers: keys and values may be fused, and where a video starts from an image, the tokens of that come
before the text and are attended to by themselves."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from ....engine.errors import NegationNotAppliedError
from .across import Across
from .kind import Attend

TEXT = 512  # tokens, padding included: all of them are attended to


class Wan(Across):
    """`WanAttention`."""

    def parts(self, attn: Any) -> list[str]:
        return ["to_kv", "norm_k"] if attn.fused_projections else super().parts(attn)

    def project(self, attn: Any, text: Tensor) -> tuple[Tensor, Tensor]:
        if not attn.fused_projections:
            return super().project(attn, text)
        key, value = attn.to_kv(text).chunk(2, dim=-1)
        return self._split(attn, key, attn.norm_k), self._split(attn, value)

    def forward(
        self, inner: Any, attn: Any, attend: Attend, hidden: Tensor, text: Tensor, mask: Tensor | None,
        *rest: Any,
    ) -> Tensor:  # fmt: skip
        if attn.add_k_proj is None:
            return super().forward(inner, attn, attend, hidden, text, mask, *rest)
        image = text[:, :-TEXT]
        if not image.shape[1]:
            raise NegationNotAppliedError(
                f"{text.shape[1]} tokens of image and text: must be more than the {TEXT} of the text"
            )

        def with_image(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
            return attend(query, key, value, bias) + self._to_image(inner, attn, query, image)

        return super().forward(inner, attn, with_image, hidden, text[:, -TEXT:], mask, *rest)

    def _to_image(self, inner: Any, attn: Any, query: Tensor, image: Tensor) -> Tensor:
        """As the wrapped processor attends to image tokens: [B, H, N, D]."""
        if attn.fused_projections:
            key, value = attn.to_added_kv(image).chunk(2, dim=-1)
        else:
            key, value = attn.add_k_proj(image), attn.add_v_proj(image)
        key, value = self._split(attn, key, attn.norm_added_k), self._split(attn, value)
        output: Tensor = dispatch_attention_fn(
            *(states.transpose(1, 2) for states in (query, key, value)), backend=inner._attention_backend
        )
        return output.transpose(1, 2)
