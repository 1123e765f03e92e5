# SPDX-License-Identifier: Apache-2.0
"""The table of supported model families: where the text cross-attention is, how text gets there, and
how classifier-free guidance lays out the batch. What is not in the table is refused.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

import diffusers
from torch import Tensor, nn

from ...engine.errors import UnsupportedModelError


@dataclass(frozen=True)
class Family:
    """One pipeline class.

    Attributes:
        denoiser: attribute of the pipeline that holds the model.
        encoders: (tokenizer, text encoder) attributes, in the order of their use.
        constants: which published constants presets take (`Rule.preset(family=...)`).
        masked_padding: whether the model masks padding tokens (else it attends to them).
        projection: attribute path of the module between text encoder and attention, or None.
        tells_guidance: whether the pipeline has an attribute `do_classifier_free_guidance`; if not,
            it is a local variable of its call.
    """

    denoiser: str
    encoders: tuple[tuple[str, str], ...]
    constants: Callable[[Any], str]
    masked_padding: bool = False
    projection: str | None = None
    tells_guidance: bool = True


_SD = Family(
    "unet",
    (("tokenizer", "text_encoder"),),
    # Stable Diffusion 2 is the one with OpenCLIP's width.
    lambda pipe: "sd2" if pipe.unet.config.cross_attention_dim == 1024 else "sd15",
)
_SDXL = Family(
    "unet", (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")), lambda pipe: "sdxl"
)
_PIXART = Family(
    "transformer",
    (("tokenizer", "text_encoder"),),
    lambda pipe: "pixart",
    masked_padding=True,
    projection="caption_projection",
    tells_guidance=False,
)

_TABLE: dict[str, Family] = {
    "StableDiffusionPipeline": _SD,
    "StableDiffusionXLPipeline": _SDXL,
    "PixArtAlphaPipeline": _PIXART,
    "PixArtSigmaPipeline": _PIXART,
}


def family(pipe: Any) -> Family:
    """The family of a pipeline.

    Raises:
        UnsupportedModelError: not in the table, or a subclass that changes `__call__`, whose batch
            layout is therefore unknown.
    """
    for name, entry in _TABLE.items():
        known = getattr(diffusers, name)
        if isinstance(pipe, known) and type(pipe).__call__ is known.__call__:
            return entry
    raise UnsupportedModelError(
        f"{type(pipe).__name__} is not supported; supported pipelines are {', '.join(_TABLE)}"
    )


def denoiser(pipe: Any) -> nn.Module:
    """The model that the pipeline calls at each step, as the pipeline holds it (perhaps compiled)."""
    model: nn.Module = getattr(pipe, family(pipe).denoiser)
    return model


def cross_attention_layers(model: nn.Module) -> dict[str, Any]:
    """Text cross-attention modules by name, as in `attn_processors` without ".processor"."""
    from diffusers.models.attention_processor import Attention

    model = getattr(model, "_orig_mod", model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Attention) and module.is_cross_attention
    }


def project_context(pipe: Any, embeddings: Tensor) -> Tensor:
    """Text embeddings [T, C] as the cross-attention layers receive them."""
    entry = family(pipe)
    if entry.projection is None:
        return embeddings
    model = getattr(denoiser(pipe), "_orig_mod", denoiser(pipe))
    projected: Tensor = getattr(model, entry.projection)(embeddings.unsqueeze(0)).squeeze(0)
    return projected


class Call(NamedTuple):
    """A pipeline call in progress: its prompts, and whether its batch is [unconditional, conditional]
    halves (classifier-free guidance)."""

    prompts: int
    guided: bool


def call_in_progress(pipe: Any) -> Call | None:
    """The call of `pipe` that this function is called from, or None.

    What a pipeline remembers of its last call says nothing about rows that somebody else sends to
    the denoiser, so the call itself is looked for on the stack; not all pipelines keep these facts
    anywhere but in local variables of it.
    """
    code = inspect.unwrap(type(pipe).__call__).__code__
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not (frame.f_code is code and frame.f_locals.get("self") is pipe):
        frame = frame.f_back
    if frame is None:
        return None
    told = family(pipe).tells_guidance
    guided = pipe.do_classifier_free_guidance if told else frame.f_locals["do_classifier_free_guidance"]
    return Call(frame.f_locals["batch_size"], bool(guided))


def guided(pipe: Any) -> bool:
    """Whether the pipeline call in progress uses classifier-free guidance.

    Raises:
        UnsupportedModelError: no call is in progress, so nobody can tell.
    """
    call = call_in_progress(pipe)
    if call is None:
        raise UnsupportedModelError(
            "cannot tell which batch rows are conditional outside a pipeline call: say so with "
            "engine.set_rows(..., conditional=...) or NegationAttnProcessor(..., conditional=...)"
        )
    return call.guided
