# SPDX-License-Identifier: Apache-2.0
"""What is known of each pipeline class, as data: where its denoiser and text are, and how to read, from a
call of it that is in progress, which step this is and how classifier-free guidance lays out the rows. What is
not in the table is refused.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any, NamedTuple

import diffusers
from torch import Tensor, nn

from ...engine.errors import UnsupportedModelError
from .around import base_class
from .layers.kinds import text_layers


@dataclass(frozen=True)
class Family:
    """One pipeline class.

    Attributes:
        denoiser: attribute of the pipeline that holds the model.
        encoders: (tokenizer, text encoder) attributes, in the order of their use.
        constants: which published constants presets take (`Rule.preset(family=...)`).
        masked_padding: whether the model masks padding tokens (else it attends to them).
        projection: attribute of the denoiser: the module between text encoder and attention, or None.
        guided: name of what says whether rows are [unconditional, conditional] halves: a local variable of
            the pipeline's call, or else an attribute of the pipeline.
        prompts, timesteps, index: local variables of its call: how many prompts, the timesteps that it runs,
            and which of them is at hand.
        callbacks: local variables of its call that may hold the user's code, which runs between steps.
        guider: whether it is made of blocks, in whose loop a guider says which rows are conditional; names
            above are then not used.
    """

    denoiser: str
    encoders: tuple[tuple[str, str], ...]
    constants: Callable[[Any], str]
    masked_padding: bool = False
    projection: str | None = None
    guided: str = "do_classifier_free_guidance"
    prompts: str = "batch_size"
    timesteps: str = "timesteps"
    index: str = "i"
    callbacks: tuple[str, ...] = ("callback_on_step_end", "callback")
    guider: bool = False


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
)

_TABLE: dict[str, Family] = {
    "StableDiffusionPipeline": _SD,
    "StableDiffusionImg2ImgPipeline": _SD,
    "StableDiffusionInpaintPipeline": _SD,
    "StableDiffusionXLPipeline": _SDXL,
    "StableDiffusionXLImg2ImgPipeline": _SDXL,
    "StableDiffusionXLInpaintPipeline": _SDXL,
    "StableDiffusionXLModularPipeline": dataclasses.replace(_SDXL, guider=True),
    "PixArtAlphaPipeline": _PIXART,
    "PixArtSigmaPipeline": _PIXART,
}


def _code(pipeline: type) -> CodeType:
    """Of its call, without the decorators around it."""
    code: CodeType = inspect.unwrap(pipeline.__call__).__code__  # type: ignore[operator]
    return code


_OF_CODE = {_code(getattr(diffusers, name)): entry for name, entry in _TABLE.items() if not entry.guider}


def family(pipe: Any) -> Family:
    """The family of a pipeline.

    Raises:
        UnsupportedModelError: not in the table, or a subclass that changes `__call__`, whose batch
            layout is therefore unknown.
    """
    for name, entry in _TABLE.items():
        known = getattr(diffusers, name)
        if isinstance(pipe, known) and base_class(pipe).__call__ is known.__call__:
            return entry
    raise UnsupportedModelError(
        f"{type(pipe).__name__} is not supported; supported pipelines are {', '.join(_TABLE)}"
    )


def encoder_of(pipe: Any) -> Any:
    """A pipeline that encodes prompts as `pipe` does: itself, unless it does that in blocks."""
    if not family(pipe).guider:
        return pipe
    parts = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")
    whole = diffusers.StableDiffusionXLPipeline(**{name: getattr(pipe, name) for name in parts})
    whole.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return whole


def denoiser(pipe: Any) -> nn.Module:
    """The model that the pipeline calls at each step, as the pipeline holds it (perhaps compiled)."""
    model: nn.Module = getattr(pipe, family(pipe).denoiser)
    return model


def bare(model: Any) -> Any:
    """The model within what `torch.compile` makes of it."""
    return getattr(model, "_orig_mod", model)


def cross_attention_layers(model: nn.Module) -> dict[str, Any]:
    """Text cross-attention modules by name, as in `attn_processors` without ".processor"."""
    return text_layers(bare(model))


def project_context(entry: Family, model: Any, embeddings: Tensor) -> Tensor:
    """Text embeddings [1, T, C] as the cross-attention layers of `model` receive them."""
    if entry.projection is None:
        return embeddings
    projected: Tensor = getattr(bare(model), entry.projection)(embeddings)
    return projected


def project_for(model: Any, embeddings: Tensor) -> Tensor:
    """`project_context` for a model whose pipeline is not known; None: for none."""
    for entry in _TABLE.values() if model is not None else ():
        if entry.projection is not None and getattr(model, entry.projection, None) is not None:
            return project_context(entry, model, embeddings)
    return embeddings


_GUIDED = "guider_state_batch"  # local variable of loops that ask a guider


class InProgress(NamedTuple):
    """A pipeline call that a denoiser call is made in.

    Attributes:
        pipe: the pipeline.
        own: whether the pipeline's loop makes the denoiser call, rather than, say, a callback.
        prompts: of the call, if known.
        guided: whether the rows are [unconditional, conditional] halves (classifier-free guidance).
        timesteps: those that it runs; the object is this call's own.
        at: which of them is at hand.
        callback: whether the user's code runs between steps.
        part: which of the step's denoiser calls this is: a guider makes one for each kind of rows.
        unconditional: whether a guider has all rows unconditional.
    """

    pipe: Any
    own: bool
    prompts: int | None
    guided: bool
    timesteps: Any
    at: int
    callback: bool
    part: int = 0
    unconditional: bool = False


def in_progress(model: Any, frame: FrameType | None) -> InProgress | None:
    """The pipeline call around a frame that calls `model` or runs within it; None if there is none.

    What a pipeline remembers of its last call says nothing about rows that somebody else sends to the
    denoiser, so the call itself is looked for on the stack; not all pipelines keep these facts anywhere but
    in local variables of it.
    """
    first = frame
    while frame is not None:
        entry, facts = _OF_CODE.get(frame.f_code), None
        if entry is not None:
            facts = frame.f_locals
            pipe = facts.get("self")
        elif _GUIDED in frame.f_code.co_varnames or _GUIDED in frame.f_code.co_cellvars:
            facts = frame.f_locals
            pipe = facts.get("components")
            entry = _guider_family(pipe)
        if entry is not None and facts is not None and _has(pipe, entry, model):
            if entry.guider:
                return _by_guider(pipe, facts, frame, frame is first)
            return _by_call(pipe, entry, facts, frame is first)
        frame = frame.f_back
    return None


def _has(pipe: Any, entry: Family, model: Any) -> bool:
    return pipe is not None and (model is None or bare(getattr(pipe, entry.denoiser, None)) is bare(model))


def _guider_family(pipe: Any) -> Family | None:
    """Of a pipeline made of blocks whose loop asks a guider."""
    try:
        entry = family(pipe)
    except UnsupportedModelError:
        return None
    return entry if entry.guider else None


def _by_call(pipe: Any, entry: Family, facts: Mapping[str, Any], own: bool) -> InProgress:
    guided = facts[entry.guided] if entry.guided in facts else getattr(pipe, entry.guided)
    return InProgress(
        pipe=pipe,
        own=own,
        prompts=facts[entry.prompts],
        guided=bool(guided),
        timesteps=facts[entry.timesteps],
        at=facts[entry.index],
        callback=any(facts.get(name) is not None for name in entry.callbacks),
    )


def _by_guider(pipe: Any, facts: Mapping[str, Any], frame: FrameType, own: bool) -> InProgress:
    """diffusers' guiders call the denoiser once for each kind of rows, and say which it is. How many prompts
    there are is in the state that the blocks hand on."""
    guider, prompts, above = pipe.guider, None, frame.f_back
    while prompts is None and above is not None:
        state = above.f_locals.get("state")
        if isinstance(state, diffusers.modular_pipelines.PipelineState):
            prompts = state.get("batch_size")
        above = above.f_back
    return InProgress(
        pipe=pipe,
        own=own,
        prompts=prompts,
        guided=False,
        timesteps=facts["block_state"].timesteps,
        at=facts["i"],
        callback=False,
        part=guider.get_state()["count_prepared"],
        unconditional=own and not guider.is_conditional,
    )
