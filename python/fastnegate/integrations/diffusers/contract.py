# SPDX-License-Identifier: Apache-2.0
"""What the table of families says, read from pipelines: their models and layers, and, from a call that is in
progress, which step this is and how classifier-free guidance lays out the rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Container, Iterable, Mapping
from types import CodeType, FrameType
from typing import Any, NamedTuple

import diffusers
from torch import Tensor, nn

from ...engine.errors import UnsupportedModelError
from .around import base_class
from .families import TABLE, Family
from .layers.known import text_layers
from .refused import reason


def _code(pipeline: type) -> CodeType:
    """Of its call, without the decorators around it."""
    code: CodeType = inspect.unwrap(pipeline.__call__).__code__  # type: ignore[operator]
    return code


# diffusers puts something else in the place of classes that need a package which is not installed.
_KNOWN: dict[Any, Family] = {
    known: entry
    for known, entry in ((getattr(diffusers, name), entry) for name, entry in TABLE.items())
    if issubclass(known, (diffusers.DiffusionPipeline, diffusers.ModularPipeline))
}
_OF_CODE = {_code(known): entry for known, entry in _KNOWN.items() if not entry.guider}


def family(pipe: Any) -> Family:
    """The family of a pipeline.

    Raises:
        UnsupportedModelError: not in the table, or a subclass that changes `__call__`, whose batch
            layout is therefore unknown.
    """
    for known, entry in _KNOWN.items():
        of = base_class(pipe)
        # What is made of blocks is called alike whatever the blocks do.
        same = of is known if entry.guider else issubclass(of, known) and of.__call__ is known.__call__
        if same:
            if entry.variant is not None and pipe.config.get(entry.variant[0]):
                return entry.variant[1]
            return entry
    name = type(pipe).__name__
    because = f" ({why})" if (why := reason(name)) is not None else ""
    raise UnsupportedModelError(
        f"{name} is not supported{because}; supported pipelines are {', '.join(TABLE)}"
    )


def encoder_of(pipe: Any) -> Any:
    """A pipeline that encodes texts as `pipe` does: itself, unless it does so in blocks, or with pictures."""
    encoder = family(pipe).encoder
    if encoder is None:
        return pipe
    kind = getattr(diffusers, encoder)
    taken = inspect.signature(kind.__init__).parameters
    whole = kind(**{part: thing for part, thing in pipe.components.items() if part in taken})
    whole.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return whole


def encoders_of(pipe: Any, seen: Container[str] = ()) -> list[tuple[str, str]]:
    """Attributes of its tokenizers and text encoders, without one that it does without and that was not
    `seen` in it before."""
    entry = family(pipe)
    optional = entry.encoders[-1][1] if entry.tail else None
    return [
        names
        for names in entry.encoders
        if names[1] != optional or names[1] in seen or getattr(pipe, names[1]) is not None
    ]


def frame(pipe: Any) -> tuple[str, str]:
    """What a pipeline puts before and behind a text, in a chat template say."""
    framed = family(pipe).framed
    if framed is None:
        return "", ""
    mark = "\ufffc"  # which no frame holds
    before, after = framed(pipe, mark).split(mark)
    return before, after


def text_tokenizer(component: Any) -> Any:
    """The tokenizer of a pipeline: some have one within what prepares pictures as well."""
    return component if hasattr(component, "get_vocab") else component.tokenizer


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """The models that the pipeline calls at its steps, as it holds them (perhaps compiled), by attribute."""
    models = {name: getattr(pipe, name, None) for name in family(pipe).denoisers}
    return {name: model for name, model in models.items() if model is not None}


def denoiser(pipe: Any) -> nn.Module:
    """The first of them."""
    return next(iter(denoisers(pipe).values()))


def bare(model: Any) -> Any:
    """The model within what `torch.compile` makes of it."""
    return getattr(model, "_orig_mod", model)


def cross_attention_layers(model: nn.Module, sound: bool = False) -> dict[str, Any]:
    """Text cross-attention modules by name, as in `attn_processors` without ".processor"; those of `sound`
    only if asked for."""
    return text_layers(bare(model), sound)


def project_context(entry: Family, model: Any, embeddings: Tensor) -> Tensor:
    """Text embeddings [1, T, C] as the cross-attention layers of `model` receive them."""
    for path in entry.projection:
        embeddings = _part(bare(model), path)(embeddings)
    return embeddings


def project_for(model: Any, embeddings: Tensor) -> Tensor:
    """`project_context` for a model whose pipeline is not known; None: for none."""
    found: Family | None = None
    for entry in TABLE.values() if model is not None else ():
        # By names: processors by hand are not told their pipeline, and PixArt has a part of Sana's.
        if entry.projection and all(_part(model, path) is not None for path in entry.projection):
            found = entry if found is None or len(entry.projection) > len(found.projection) else found
    return embeddings if found is None else project_context(found, model, embeddings)


def _part(model: Any, path: str) -> Any:
    """A module of a model, or None."""
    if path == "encoder_hid_proj":  # of a UNet: images that an adapter brings take its place
        moved = getattr(model, "text_encoder_hid_proj", None)
        of_text = moved is None and model.config.get("encoder_hid_dim_type") == "text_proj"
        return model.encoder_hid_proj if of_text else moved
    for name in path.split("."):
        model = getattr(model, name, None)
    return model


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
        part: which of the step's denoiser calls this is: there may be one for each kind of rows.
        image: tokens of the image that is made, where latents are tokens.
        unconditional: whether all rows are, by the text that they get; None if that cannot be told.
    """

    pipe: Any
    own: bool
    prompts: int | None
    guided: bool
    timesteps: Any
    at: int
    callback: bool
    part: int = 0
    unconditional: bool | None = False
    image: int | None = None


def in_progress(
    model: Any, frame: FrameType | None, given: Mapping[str, Any] | None = None
) -> InProgress | None:
    """The pipeline call around a frame that calls `model`, with the arguments `given`, or runs within it;
    None if there is none.

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
                return _by_guider(pipe, entry, facts, frame, frame is first)
            return _by_call(pipe, entry, facts, frame is first, given or {})
        frame = frame.f_back
    return None


def _has(pipe: Any, entry: Family, model: Any) -> bool:
    if pipe is None or model is None:
        return pipe is not None
    return any(bare(getattr(pipe, name, None)) is bare(model) for name in entry.denoisers)


def _guider_family(pipe: Any) -> Family | None:
    """Of a pipeline made of blocks whose loop asks a guider."""
    try:
        entry = family(pipe)
    except UnsupportedModelError:
        return None
    return entry if entry.guider else None


def _by_call(
    pipe: Any, entry: Family, facts: Mapping[str, Any], own: bool, given: Mapping[str, Any]
) -> InProgress:
    guided = False
    if entry.guided is not None:
        guided = bool(facts[entry.guided] if entry.guided in facts else getattr(pipe, entry.guided))
    latents = facts.get("latents")
    unconditional: bool | None = False
    part = next((i for i, name in enumerate(entry.further, 1) if given.get(name)), 0)
    if entry.texts is not None and own:
        prompt, negative = (facts.get(name) for name in entry.texts)
        text = given.get("encoder_hidden_states")
        unconditional = _is_negative([text], prompt, negative if guided else None)  # it may be there unused
    return InProgress(
        pipe=pipe,
        own=own,
        prompts=facts[entry.prompts],
        guided=guided and entry.texts is None and not part,
        timesteps=facts[entry.timesteps],
        at=facts[entry.index],
        callback=any(facts.get(name) is not None for name in entry.callbacks),
        part=part or int(unconditional is True),
        unconditional=unconditional,
        image=latents.shape[1] if isinstance(latents, Tensor) and latents.dim() == 3 else None,
    )


def _by_guider(pipe: Any, entry: Family, facts: Mapping[str, Any], frame: FrameType, own: bool) -> InProgress:
    """diffusers' guiders call the denoiser once for each kind of rows. Not all of them know which it is, but
    the loop has what it gives to each call. How many prompts there are is in the state that the blocks hand
    on."""
    prompts, above = None, frame.f_back
    while prompts is None and above is not None:
        state = above.f_locals.get("state")
        if isinstance(state, diffusers.modular_pipelines.PipelineState):
            prompts = state.get("batch_size")
        above = above.f_back
    state, batch = facts["block_state"], facts[_GUIDED]
    assert entry.texts is not None
    texts = (getattr(state, name, None) for name in entry.texts)
    return InProgress(
        pipe=pipe,
        own=own,
        prompts=prompts,
        guided=False,
        timesteps=state.timesteps,
        at=facts["i"],
        callback=False,
        part=next(i for i, other in enumerate(facts["guider_state"]) if other is batch),
        unconditional=own and _is_negative(batch.as_dict().values(), *texts),
    )


def _is_negative(given: Iterable[Any], prompt: Any, negative: Any) -> bool | None:
    """Whether a call is given the negative prompt's text rather than the prompt's; None if that cannot be
    told. By identity: two prompts may have equal embeddings; one tensor for both does not tell."""
    given = list(given)
    is_prompt, is_negative = (
        text is not None and any(x is text for x in given) for text in (prompt, negative)
    )
    return is_negative if is_prompt != is_negative else None
