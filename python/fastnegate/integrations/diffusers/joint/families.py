# SPDX-License-Identifier: Apache-2.0
"""Joint families as data: where text enters the model, and where in the sequence it sits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor

from ....engine.errors import UnsupportedModelError
from .riders import Layout

Given = Mapping[str, Any]  # arguments of a denoiser call by name
Boarded = tuple[dict[str, Any], Layout]  # the arguments with riders, and the layout that follows


@dataclass(frozen=True)
class JointFamily:
    """How riders board one kind of model.

    Attributes:
        processors: classes of the attention processors that it may have.
        board: puts riders [B, T, C] behind the prompt.
    """

    processors: tuple[type, ...]
    board: Callable[[Given, Tensor], Boarded]


def _flux(given: Given, riders: Tensor) -> Boarded:
    """FLUX.1: text before image. All positions of text are zero: riders stand where the prompt does."""
    text, image, ids = given["encoder_hidden_states"], given["hidden_states"], given["txt_ids"]
    if (given.get("joint_attention_kwargs") or {}).keys() - {"scale"}:
        raise UnsupportedModelError(
            f"joint_attention_kwargs={sorted(given['joint_attention_kwargs'])}: negation takes scale alone"
        )
    ids = ids[0] if ids.dim() == 3 else ids  # as the model does
    boarded = {
        **given,
        "encoder_hidden_states": torch.cat([text, riders.expand(len(text), -1, -1)], 1),
        "txt_ids": torch.cat([ids, ids.new_zeros(riders.shape[1], ids.shape[1])]),
    }
    return boarded, Layout(text.shape[1], riders.shape[1], image.shape[1])


FLUX = JointFamily((FluxAttnProcessor,), _flux)
