# SPDX-License-Identifier: Apache-2.0
"""Qwen-Image: text before image, padding is masked, and the model itself counts the positions of text."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from torch import Tensor, nn

from ..around import base_class
from .families import Boarded, Given, JointFamily, no_words
from .riders import Layout, Riders
from .seam import Seam


def _board(_model: Any, given: Given, riders: Riders, tokens: Tensor, _image: int | None) -> Boarded:
    no_words(given, "attention_kwargs", "scale")
    text, mask = given["encoder_hidden_states"], given.get("encoder_hidden_states_mask")
    boarded = {**given, "encoder_hidden_states": torch.cat([text, tokens.expand(len(text), -1, -1)], 1)}
    if mask is not None:
        boarded["encoder_hidden_states_mask"] = torch.cat([mask, mask.new_ones(len(text), riders.count)], 1)
    total = given["hidden_states"].shape[1]
    # One image of [frames, height, width]; pictures to go by come after it.
    shapes = given["img_shapes"][0]
    image = math.prod(shapes[0] if isinstance(shapes, list) else shapes)
    return boarded, Layout(text.shape[1], riders.count, image, total - image)


def _positions(model: Any, seam: Seam) -> list[tuple[nn.Module, dict[str, Any]]]:
    """Riders stand where the prompt begins, not where it ends."""
    positions = model.pos_embed
    forward = base_class(positions).forward  # type: ignore[attr-defined]

    def restarted(self: Any, *args: Any, max_txt_seq_len: int, **kwargs: Any) -> tuple[Tensor, Tensor]:
        joint = seam.joint
        if joint is not None:
            max_txt_seq_len = max(max_txt_seq_len, joint.riders.reach)
        image, text = forward(self, *args, max_txt_seq_len=max_txt_seq_len, **kwargs)
        if joint is not None:
            text = torch.cat([text[: joint.layout.prompt], text[joint.riders.place]])
        return image, text

    return [(positions, {"forward": restarted})]


QWEN = JointFamily((QwenDoubleStreamAttnProcessor2_0,), _board, overrides=_positions)
