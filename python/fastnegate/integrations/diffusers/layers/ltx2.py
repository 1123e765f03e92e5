# SPDX-License-Identifier: Apache-2.0
"""LTX-2: six attentions in a block, of which the one from video to text is negated, before its output is
gated head by head. Blocks of LTX-2.3 modulate text by the timestep before it becomes keys and values, so
concepts ride behind the prompt: what happens to a prompt's tokens happens to theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ....engine.errors import UnsupportedModelError
from .across import Across
from .kind import Attend


class Ltx2(Across):
    """`LTX2Attention`."""

    rides = True

    def forward(
        self, inner: Any, attn: Any, attend: Attend, hidden: Tensor, text: Tensor, mask: Tensor | None,
        *rest: Any,
    ) -> Tensor:  # fmt: skip
        if attn.to_gate_logits is None:
            return super().forward(inner, attn, attend, hidden, text, mask, *rest)
        gates = 2.0 * torch.sigmoid(attn.to_gate_logits(hidden))  # [B, N, H]

        def gated(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
            return attend(query, key, value, bias) * gates.transpose(1, 2).unsqueeze(-1)

        return super().forward(inner, attn, gated, hidden, text, mask, *rest)


def board(model: Any, given: Mapping[str, Any], concepts: Tensor, sound: bool) -> dict[str, Any]:
    """The arguments of a denoiser call, with concepts [1, T, C] behind each row's prompt for the video, and
    also behind that for the `sound`. The prompt's mask stays as it is: layers part the two again.

    Raises:
        UnsupportedModelError: the rows are at different timesteps, and the model modulates text by them.
        ValueError: concepts have not the channels of the texts that they ride in.
    """
    sigma = given.get("sigma")
    texts = {name: given[name] for name in ("encoder_hidden_states", "audio_encoder_hidden_states")}
    widths = [text.shape[2] for text in texts.values()]
    width = concepts.shape[2]
    if width != sum(widths) and (sound or width != widths[0]):
        raise ValueError(
            f"concepts have {width} channels: must be {widths[0]} for the video and {widths[1]} for the sound"
        )
    if hasattr(model, "prompt_adaln") and sigma is not None and not _alike(sigma):
        raise UnsupportedModelError(
            f"sigma={sigma.tolist()}: rows must be at one timestep, by which this model modulates text"
        )
    own = concepts[:, :, : widths[0]], concepts[:, :, widths[0] :]
    boarded = dict(given)
    for (name, text), tokens in list(zip(texts.items(), own))[: 1 + sound]:
        boarded[name] = torch.cat([text, tokens.expand(len(text), -1, -1)], 1)
    return boarded


def apart(boarded: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What a layer gets of that: the text, and `count` concept tokens [1, T, C], the same in all rows."""
    length = boarded.shape[1] - count
    return boarded[:, :length], boarded[:1, length:]


def _alike(values: Tensor) -> bool:
    """Of a tensor that repeats one number this is known without asking the device."""
    return values.numel() == 1 or values.stride(0) == 0 or bool((values == values[0]).all())
