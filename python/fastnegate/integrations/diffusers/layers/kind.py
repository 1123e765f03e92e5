# SPDX-License-Identifier: Apache-2.0
"""What a kind of cross-attention layers is. It repeats what diffusers' own processor computes, with a hole
where the softmax is; whatever is around that (norms, fused projections, gates, image tokens) stays the
model's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

# query [B, H, N, D], key and value [B, H, M, D] of the text, its mask -> [B, H, N, D]
Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]


class Kind(Protocol):
    """What is the same for all layers of a kind; `attn` is the layer."""

    @property
    def scaled(self) -> bool:
        """Whether logits are scaled by `attn.scale`; else by 1 / sqrt(D)."""

    @property
    def rides(self) -> bool:
        """Whether concepts come with the text, behind it, as its model changes it from layer to layer."""

    def parts(self, attn: Any) -> list[str]:
        """The modules that `project` calls."""

    def project(self, attn: Any, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, T, D] of text [B, T, C]. Modules are called, weights never read, so LoRA,
        quantization and offload hooks act."""

    def forward(
        self, inner: Any, attn: Any, attend: Attend, hidden: Tensor, text: Tensor, mask: Tensor | None,
        *rest: Any,
    ) -> Tensor:  # fmt: skip
        """The layer's output. `inner` is the processor that it had before ours; `rest` is what its model
        passes on besides."""


def mask_of(attn: Any, mask: Tensor, text: Tensor) -> Tensor:
    """[B, 1, M] as models pass it on -> [B, H, 1, M]."""
    batch, length, _ = text.shape
    prepared: Tensor = attn.prepare_attention_mask(mask, length, batch)
    return prepared.view(batch, attn.heads, -1, prepared.shape[-1])
