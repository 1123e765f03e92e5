# SPDX-License-Identifier: Apache-2.0
"""Which layers attend to text, and of what kind they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0,
)
from diffusers.models.transformers.sana_transformer import SanaAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttention
from diffusers.models.transformers.transformer_flux2 import Flux2Attention, Flux2ParallelSelfAttention
from diffusers.models.transformers.transformer_ltx import LTXAttention, LTXVideoAttnProcessor
from diffusers.models.transformers.transformer_ltx2 import (
    LTX2Attention,
    LTX2AudioVideoAttnProcessor,
    LTX2PerturbedAttnProcessor,
)
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from diffusers.models.transformers.transformer_z_image import ZSingleStreamAttnProcessor
from torch import nn

from ....engine.errors import UnsupportedModelError
from .across import Across, Sana
from .classic import CLASSIC, Classic
from .ip_adapter import WithImages
from .kind import Kind
from .ltx2 import Ltx2
from .wan import Wan

# The processors whose arithmetic is repeated; others (PAG, xformers, ...) add their own.
_KINDS: dict[type, Kind] = {
    AttnProcessor2_0: CLASSIC,
    AttnProcessor: Classic(scaled=True),
    IPAdapterAttnProcessor2_0: WithImages(),
    IPAdapterAttnProcessor: WithImages(scaled=True),
    SanaAttnProcessor2_0: Sana(),
    LTXVideoAttnProcessor: Across(),
    LTX2AudioVideoAttnProcessor: Ltx2(),
    LTX2PerturbedAttnProcessor: Ltx2(),  # what it perturbs is attention of video to itself
    WanAttnProcessor: Wan(),
}


def _attention(attn: Any, name: str) -> bool:
    """Of the class that many models share."""
    if isinstance(attn.processor, ZSingleStreamAttnProcessor):
        return name.startswith("layers.")  # those before them have text alone, or the image alone
    return attn.is_cross_attention or attn.added_kv_proj_dim is not None  # image and text are one sequence


SOUND = "audio_attn2"  # what attends from sound to text is called so


# Which modules of a class attend from image or video to text, by the module and its name.
_IS_TEXT: dict[type[nn.Module], Callable[[Any, str], bool]] = {
    Attention: _attention,
    LTXAttention: lambda _attn, name: name.rpartition(".")[2] == "attn2",
    LTX2Attention: lambda _attn, name: name.rpartition(".")[2] in ("attn2", SOUND),
    WanAttention: lambda attn, _name: attn.is_cross_attention,
    FluxAttention: lambda _attn, _name: True,
    Flux2Attention: lambda _attn, _name: True,
    Flux2ParallelSelfAttention: lambda _attn, _name: True,
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


def text_layers(model: nn.Module, sound: bool = False) -> dict[str, Any]:
    """Text cross-attention modules by name, as in `attn_processors` without ".processor"; those of `sound`
    only if asked for."""
    return {
        name: module
        for name, module in model.named_modules()
        for known, is_text in _IS_TEXT.items()
        if isinstance(module, known) and is_text(module, name) and (sound or not name.endswith(SOUND))
    }
