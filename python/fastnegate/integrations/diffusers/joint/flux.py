# SPDX-License-Identifier: Apache-2.0
"""FLUX.1 and FLUX.2: text before image, and positions are arguments of the model."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.models.transformers.transformer_flux2 import Flux2AttnProcessor, Flux2ParallelSelfAttnProcessor
from torch import Tensor

from ....engine.errors import UnsupportedModelError
from .families import Boarded, Given, JointFamily, no_words
from .riders import Layout, Riders


def _flux(_model: Any, given: Given, riders: Riders, tokens: Tensor, image: int | None) -> Boarded:
    """Riders stand where the prompt does: FLUX.1 has all text at 0, FLUX.2 counts tokens on the last axis."""
    no_words(given, "joint_attention_kwargs", "scale")
    if given.get("kv_cache_mode") is not None:
        raise UnsupportedModelError(f"kv_cache_mode={given['kv_cache_mode']!r}: negation knows none")
    text, hidden = given["encoder_hidden_states"], given["hidden_states"]
    ids, image_ids = (
        (t[0] if t.dim() == 3 else t) for t in (given["txt_ids"], given["img_ids"])
    )  # as they do
    theirs = ids.new_zeros(riders.count, ids.shape[1])
    if ids.shape[1] == 4:
        theirs[:, 3] = riders.place.to(ids.dtype)
    if image is None:  # nobody says: pictures to go by come after it, and their first coordinate is not 0
        made = (image_ids[:, 0] == 0).long()
        first = made.cumprod(0).sum()  # before any other
        image = int(torch.where(first == made.sum(), first, 0))
        if not image:
            raise UnsupportedModelError(
                "img_ids: an image has 0 on their first axis, and comes before pictures to go by"
            )
    boarded = {
        **given,
        "encoder_hidden_states": torch.cat([text, tokens.expand(len(text), -1, -1)], 1),
        "txt_ids": torch.cat([ids, theirs]),
    }
    return boarded, Layout(text.shape[1], riders.count, image, hidden.shape[1] - image)


FLUX = JointFamily((FluxAttnProcessor,), _flux)
FLUX2 = JointFamily((Flux2AttnProcessor, Flux2ParallelSelfAttnProcessor), _flux)
