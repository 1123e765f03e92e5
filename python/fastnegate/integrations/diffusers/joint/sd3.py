# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 3 and 3.5: image before text, which has no positions, and a processor that asks no
dispatcher."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor

from ....engine.engine import Engine
from .families import Boarded, Given, JointFamily, no_words
from .riders import Layout, Riders
from .seam import Layer, dispatched, members, seam_of


def _board(model: Any, given: Given, riders: Riders, tokens: Tensor, _image: int | None) -> Boarded:
    no_words(given, "joint_attention_kwargs", "scale")
    text, (height, width) = given["encoder_hidden_states"], given["hidden_states"].shape[-2:]
    boarded = {**given, "encoder_hidden_states": torch.cat([text, tokens.expand(len(text), -1, -1)], 1)}
    patch = model.config.patch_size
    return boarded, Layout(
        text.shape[1], riders.count, (height // patch) * (width // patch), image_first=True
    )


class _Joint(JointAttnProcessor2_0):  # type: ignore[misc]
    """The model's own processor while nothing acts, and else the same around our attention."""

    _layer: Layer
    inner: Any

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        # Some blocks have a layer more, in which the image attends to itself.
        if not self._layer.riding() or encoder_hidden_states is None:
            return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)
        image = (attn.to_q, attn.to_k, attn.to_v)
        text = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        norms = (attn.norm_q, attn.norm_k, None), (attn.norm_added_q, attn.norm_added_k, None)
        joint: list[Tensor] = []
        for of_image, of_text, norm, added in zip(image, text, *norms):
            parts = []
            for project, hidden, normed in (
                (of_image, hidden_states, norm),
                (of_text, encoder_hidden_states, added),
            ):
                part = project(hidden).unflatten(-1, (attn.heads, -1))
                parts.append(part if normed is None else normed(part))
            joint.append(torch.cat(parts, 1))
        attended = dispatched(joint[0], joint[1], joint[2]).flatten(2)
        n = hidden_states.shape[1]
        hidden, told = attended[:, :n], attended[:, n:]
        if not attn.context_pre_only:
            told = attn.to_add_out(told)
        return attn.to_out[1](attn.to_out[0](hidden)), told


_Negating = type("JointAttnProcessor2_0", (_Joint,), members(JointAttnProcessor2_0))


def _wrap(inner: Any, engine: Engine, name: str, backend: str) -> Any:
    made: Any = _Negating()
    made.__dict__.update(
        inner.__dict__, _layer=Layer(engine, seam_of(engine), name, None, backend), inner=inner
    )
    return made


SD3 = JointFamily((JointAttnProcessor2_0,), _board, _wrap)
