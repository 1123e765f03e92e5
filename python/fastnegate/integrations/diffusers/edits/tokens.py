# SPDX-License-Identifier: Apache-2.0
"""SAFREE: the prompt's tokens, as the denoiser reads them at its first steps, without the concepts."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from types import FrameType, MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModel

from ....engine.errors import NegationNotAppliedError, UnsupportedModelError
from ....engine.prologue.text import Safree, subspace
from ....operator.rule import check_number
from ..contract import family, in_progress
from ..text.words import Words, turn
from .edit import AroundDenoiser, Edit, check_plain, conditional_rows
from .given import Several, concepts_of, pooled


class _Prompt:
    """One prompt of a pipeline call.

    Attributes:
        masked: pooled encodings [L, C], each without one of its tokens.
        starts: special tokens before them.
        tokens: filtered, [L, C], once they were seen as the denoiser gets them.
        last: the last step that reads the filtered ones.
    """

    def __init__(self, masked: Tensor, starts: int) -> None:
        self.masked, self.starts = masked, starts
        self.tokens: Tensor | None = None
        self.last = -1


# Of the call at work, by the edit.
_PROMPTS: ContextVar[Mapping[Edit, list[_Prompt]]] = ContextVar(
    "fastnegate_safree", default=MappingProxyType({})
)


class _Tokens(AroundDenoiser):
    def __init__(self, pipe: Any, concepts: Tensor, method: Safree) -> None:
        super().__init__(pipe, "safree")
        self._concepts, self._method = concepts, method
        self._put()

    def _generate(
        self, pipe: Any, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType
    ) -> Any:
        """A call of the pipeline: what its prompts are without each of their tokens."""
        prompts = kwargs.get("prompt", args[0] if args else None)
        if prompts is None:
            raise NegationNotAppliedError("safree needs prompt=: it reads the words, prompt_embeds have none")
        listed = [prompts] if isinstance(prompts, str) else list(prompts)
        words = Words(pipe)
        token = _PROMPTS.set({**_PROMPTS.get(), self: [self._masked(words, prompt) for prompt in listed]})
        try:
            return super()._generate(pipe, call, args, kwargs, frame)
        finally:
            _PROMPTS.reset(token)

    @torch.no_grad()
    def _masked(self, words: Words, prompt: str) -> _Prompt:
        """As the published code masks: token 0 takes the place of each token in turn."""
        pipe = words.pipe
        if hasattr(pipe, "maybe_convert_prompt"):
            prompt = pipe.maybe_convert_prompt(prompt, pipe.tokenizer)
        with turn:
            length = pipe.tokenizer.model_max_length
            ids = pipe.tokenizer(prompt, truncation=True, max_length=length, verbose=False).input_ids
            padded = pipe.tokenizer(
                prompt, truncation=True, max_length=length, padding="max_length", return_tensors="pt"
            ).input_ids
        count = len(ids) - words.starts - words.ends
        masked = padded.repeat(count, 1)
        masked[range(count), range(words.starts, words.starts + count)] = 0
        encoder = pipe.text_encoder
        encoded = encoder(masked.to(encoder.device)).pooler_output if count else self._concepts[:0]
        return _Prompt(encoded.double().cpu(), words.starts)

    def _denoise(
        self, model: Any, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType
    ) -> Any:
        given = self._arguments(model, args, kwargs)
        progress, text = in_progress(model, frame, given), given["encoder_hidden_states"]
        rows = conditional_rows(progress, self.pipe, len(text), "safree")
        now = _PROMPTS.get().get(self)
        if progress is None or not progress.own or now is None:
            raise NegationNotAppliedError(
                "safree: this call of the denoiser is not the edited pipeline's own"
            )
        at = [i for i, conditional in enumerate(rows) if conditional]
        each, rest = divmod(len(at), max(len(now), 1))
        if rest:
            raise NegationNotAppliedError(f"safree: {len(at)} rows are not images of {len(now)} prompts")
        filtered = text.clone()
        for i, row in enumerate(at):
            self._filter(now[i // each], filtered[row], progress.at)
        return call(**{**given, "encoder_hidden_states": filtered})

    def _filter(self, prompt: _Prompt, text: Tensor, step: int) -> None:
        """Write over the prompt's tokens in its text [L, C]."""
        if not len(prompt.masked):  # the empty prompt
            return
        tokens = text[prompt.starts : prompt.starts + len(prompt.masked)]
        if prompt.tokens is None:
            before = tokens.double().cpu()
            prompt.tokens = self._method.filtered(before, prompt.masked, self._concepts)
            prompt.last = self._method.last_step(before, prompt.tokens)
        if step <= prompt.last:
            tokens.copy_(prompt.tokens)


def safree(
    pipe: Any,
    concepts: Several,
    *,
    margin: float = 0.01,
    most_steps: float = 10.0,
    rise: float = 2.5,
    middle: float = 5.333,
) -> Edit:
    """SAFREE's adaptive filter of the prompt (Yoon et al., ICLR 2025, arXiv 2410.12761): tokens without which
    the prompt is farther from the concepts than without others are projected out of the concepts' subspace,
    for as many of the first steps as they change by it. Its filter of skip features, a further pass, is not
    part of it.

    Args:
        pipe: a Stable Diffusion pipeline with CLIP's text encoder.
        concepts: words, each its own direction; embeddings [T, C], a mapping from names to either, several,
            or a `ConceptBank`.
        margin: α, at least 0.
        most_steps: γ, at least 0.
        rise, middle: k and t0: with β the mean change of the prompt's tokens, 1 - cos, the filter holds up to
            step γ σ(2 k (10 β - t0)). The numbers are the paper's for nudity; for artists 3.5 and 5.5.

    Returns:
        The edit. It adds no passes, and one call of the text encoder for each prompt.

    Raises:
        UnsupportedModelError: another text encoder, or several, or a denoiser that is compiled or cached.
        ValueError: a bad argument.
        NegationNotAppliedError: in a later call, if that has no `prompt`, or the denoiser is called by
            another pipeline.
    """
    for name, number in (("margin", margin), ("most_steps", most_steps)):
        check_number(name, number, low=0.0)
    check_number("rise", rise, above=0.0)
    check_number("middle", middle)
    encoders = [getattr(pipe, name, None) for _, name in family(pipe).encoders]
    if len(encoders) > 1 or not isinstance(encoders[0], CLIPTextModel):
        found = " and ".join(type(encoder).__name__ for encoder in encoders)
        raise UnsupportedModelError(
            "safree needs one text encoder, CLIP's, whose pooled output is a token of the text: "
            f"{type(pipe).__name__} has {found}"
        )
    check_plain(pipe, "safree")
    named = concepts_of(pipe, concepts)
    vectors = torch.cat([pooled(concept, name) for name, concept in named.items()])
    return _Tokens(pipe, subspace(vectors.double()), Safree(margin, most_steps, rise, middle))
