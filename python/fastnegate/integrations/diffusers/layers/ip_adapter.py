# SPDX-License-Identifier: Apache-2.0
"""IP-Adapter: a layer attends to text and, by itself, to the tokens of images; the two are added. Text is
negated, images are attended to as before."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ....engine.errors import NegationNotAppliedError
from .classic import Classic
from .kind import Attend


class WithImages(Classic):
    """Layers with an IP-Adapter's processor, which is given the images beside the text."""

    def forward(
        self, inner: Any, attn: Any, attend: Attend, hidden: Tensor, text: Any, mask: Tensor | None,
        *rest: Any,
    ) -> Tensor:  # fmt: skip
        if not isinstance(text, tuple):
            raise NegationNotAppliedError(
                "an IP-Adapter was given text and images in one tensor: they must be a pair"
            )
        text, images = text
        _temb, _scale, masks = rest

        def with_images(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
            return attend(query, key, value, bias) + _to_images(inner, attn, query, images, masks)

        return super().forward(inner, attn, with_images, hidden, text, mask, *rest)


def _to_images(inner: Any, attn: Any, query: Tensor, images: Any, masks: Any) -> Tensor:
    """As the wrapped processor attends to images, with its scales and masks: [B, H, N, D]."""
    flat = query.transpose(1, 2).flatten(2)
    nothing = flat.new_zeros(flat.shape[0], 1, flat.shape[2])
    output: Tensor = inner(_Bare(attn), flat, (nothing, images), ip_adapter_masks=masks)
    heads: Tensor = output.unflatten(2, (attn.heads, -1))
    return heads.transpose(1, 2)


class _Bare:
    """A layer with nothing around its attention. The processor is given a query that is made, and a text of
    one token whose key and value are zero: what it attends to there is zero, so images alone are left."""

    spatial_norm = group_norm = None
    norm_cross = residual_connection = False
    rescale_output_factor = 1.0

    def __init__(self, attn: Any) -> None:
        self.heads = attn.heads
        self.head_to_batch_dim, self.batch_to_head_dim = attn.head_to_batch_dim, attn.batch_to_head_dim
        self.get_attention_scores = attn.get_attention_scores
        self.to_q = self.to_k = self.to_v = _same
        self.to_out = (_same, _same)

    @staticmethod
    def prepare_attention_mask(mask: None, *_sizes: int) -> None:
        """There is none."""


def _same(states: Tensor) -> Tensor:
    return states


class Adapted:
    """What a processor around an IP-Adapter's is besides: a module that has the weights of the wrapped one
    under the same names, with its scales. diffusers looks for its classes where it sets scales and unloads.
    """

    inner: Any

    def __init__(self, *arguments: Any, inner: Any = None, **options: Any) -> None:
        nn.Module.__init__(self)  # type: ignore[arg-type]
        super().__init__(*arguments, inner=inner, **options)  # type: ignore[call-arg]
        self.to_k_ip, self.to_v_ip = inner.to_k_ip, inner.to_v_ip
        self.num_tokens = inner.num_tokens
        self.hidden_size, self.cross_attention_dim = inner.hidden_size, inner.cross_attention_dim

    @property
    def scale(self) -> Any:
        """Of each adapter."""
        return self.inner.scale

    @scale.setter
    def scale(self, scale: Any) -> None:
        self.inner.scale = scale

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        scale: float = 1.0,
        ip_adapter_masks: Any = None,
    ) -> Tensor:
        """By the names of the wrapped processor: `Attention` passes on those alone."""
        output: Tensor = super().__call__(  # type: ignore[misc]
            attn, hidden_states, encoder_hidden_states, attention_mask, temb, scale, ip_adapter_masks
        )
        return output
