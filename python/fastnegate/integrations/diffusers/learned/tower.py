# SPDX-License-Identifier: Apache-2.0
"""What pictures show in words, by a pair of image and text tower that a pipeline has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ....engine.errors import UnsupportedModelError
from ..contract import encoders_of
from ..text.encode import evaluating
from ..text.words import Words, turn

_SCALE = 100.0  # trained CLIP models have it: theirs is learned, and stopped there


@torch.no_grad()
def likeness(pipe: Any, images: Sequence[Any], phrases: Sequence[str]) -> Tensor:
    """See `Host.likeness`. Widths tell whether towers can be of one space; that they were trained together is
    for whoever put them together to know.

    Raises:
        UnsupportedModelError: no image tower with a projection and what prepares pictures for it, or no text
            encoder with a projection of that width.
        ValueError: a phrase that cannot be encoded whole.
    """
    seeing, preparing = (getattr(pipe, name, None) for name in ("image_encoder", "feature_extractor"))
    width = getattr(getattr(seeing, "visual_projection", None), "out_features", None)
    reading = [names for names in encoders_of(pipe) if _width(getattr(pipe, names[1])) == width]
    if seeing is None or width is None or preparing is None or not reading:
        raise UnsupportedModelError(
            f"{type(pipe).__name__} has no image_encoder with a feature_extractor and a text encoder that "
            "projects to the same width, so nothing compares pictures with words: learn the concept from the "
            "pictures, with fastnegate.invert"
        )
    words = Words(pipe)
    for phrase in phrases:
        words.check("phrases", phrase)
    tokenizer, encoder = (getattr(words.pipe, name) for name in reading[0])
    length = words.starts + words.room + words.ends
    with turn, evaluating([seeing, encoder]):
        ids = tokenizer(list(phrases), padding="max_length", max_length=length, return_tensors="pt")
        told = encoder(ids.input_ids.to(encoder.device)).text_embeds
        pixels = preparing(images=list(images), return_tensors="pt").pixel_values
        seen = seeing(pixels.to(seeing.device, seeing.dtype)).image_embeds
    told, seen = (F.normalize(part.float().cpu(), dim=-1) for part in (told, seen))
    return _SCALE * seen @ told.T


def _width(encoder: Any) -> int | None:
    width: int | None = getattr(getattr(encoder, "text_projection", None), "out_features", None)
    return width
