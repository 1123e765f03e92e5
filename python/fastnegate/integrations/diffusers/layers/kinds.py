# SPDX-License-Identifier: Apache-2.0
"""The kinds of cross-attention layers. A kind repeats what diffusers' own processor computes, with a hole
where the softmax is; whatever is around that (norms, fused projections, gates, image tokens) stays the
model's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from ....engine.errors import UnsupportedModelError

# query [B, H, N, D], key and value [B, H, M, D] of the text, its mask -> [B, H, N, D]
Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]


class Kind(Protocol):
    """What is the same for all layers of a kind; `attn` is the layer."""

    @property
    def scaled(self) -> bool:
        """Whether logits are scaled by `attn.scale`; else by 1 / sqrt(D)."""

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


@dataclass(frozen=True)
class Classic:
    """diffusers' `Attention`: UNets, PixArt. `AttnProcessor`, the older of its processors, scales by
    `attn.scale` and ignores norm_q and norm_k."""

    scaled: bool = False

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


def mask_of(attn: Any, mask: Tensor, text: Tensor) -> Tensor:
    """[B, 1, M] as models pass it on -> [B, H, 1, M]."""
    batch, length, _ = text.shape
    prepared: Tensor = attn.prepare_attention_mask(mask, length, batch)
    return prepared.view(batch, attn.heads, -1, prepared.shape[-1])


CLASSIC = Classic()

# The processors whose arithmetic is repeated; others (IP-Adapter, PAG, ...) add their own.
_KINDS: dict[type, Kind] = {AttnProcessor2_0: CLASSIC, AttnProcessor: Classic(scaled=True)}

# Which modules of a class attend from image or video to text, by the module and the last part of its name.
_IS_TEXT: dict[type[nn.Module], Callable[[Any, str], bool]] = {
    Attention: lambda attn, _name: attn.is_cross_attention,
}


def kind_of(processor: Any) -> Kind:
    """The kind of the layers that have a processor.

    Raises:
        UnsupportedModelError: it does something that no kind repeats.
    """
    kind = _KINDS.get(type(processor))
    if kind is None:
        raise UnsupportedModelError(
            f"processor {type(processor).__name__} cannot be wrapped: supported are "
            f"{', '.join(known.__name__ for known in _KINDS)}"
        )
    return kind


def text_layers(model: nn.Module) -> dict[str, Any]:
    """Text cross-attention modules by name, as in `attn_processors` without ".processor"."""
    return {
        name: module
        for name, module in model.named_modules()
        for known, is_text in _IS_TEXT.items()
        if isinstance(module, known) and is_text(module, name.rpartition(".")[2])
    }
