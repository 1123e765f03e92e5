# SPDX-License-Identifier: Apache-2.0
"""AdaVD: the values of the prompt, as each layer makes them, without what they share with a concept's."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from types import FrameType, MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ....engine.errors import NegationNotAppliedError, UnsupportedModelError
from ....engine.prologue.values import Shift, without_concepts
from ....operator.rule import check_number
from ..contract import encoder_of, family, in_progress
from ..hook import SAMPLE
from ..text.words import Words
from .edit import ALONE, AroundDenoiser, Edit, check_plain, conditional_rows
from .given import Several, as_received, check_tokens, concepts_of, subject, text_hosts


class _Call:
    """A denoiser call: its conditional rows [B], the text of the layer at work, layers that were edited."""

    def __init__(self, rows: list[bool]) -> None:
        self.rows = rows
        self.text: Tensor | None = None
        self.edited: set[nn.Module] = set()


# Those at work, by the edit.
_CALLS: ContextVar[Mapping[Edit, _Call]] = ContextVar("fastnegate_adavd", default=MappingProxyType({}))


class _Values(AroundDenoiser):
    def __init__(self, pipe: Any, targets: dict[str, Tensor], shift: Shift, starts: int) -> None:
        super().__init__(pipe, "adavd")
        self._shift, self._starts = shift, starts
        self._handles: list[Any] = []
        self._layers: dict[str, list[nn.Module]] = {}
        for name, layers in text_hosts(pipe, "adavd", ("to_k", "to_v")).items():
            self._layers[name] = list(layers.values())
            for attn in layers.values():
                self._hook(attn, targets[name])
        self._put()

    def _undo(self) -> None:
        super()._undo()
        for handle in self._handles:
            handle.remove()

    def _denoise(
        self,
        model: Any,
        call: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        frame: FrameType,
    ) -> Any:
        given = self._arguments(model, args, kwargs)
        batch = len(next(given[name] for name in SAMPLE if name in given))
        now = _Call(conditional_rows(in_progress(model, frame, given), self.pipe, batch, "adavd"))
        token = _CALLS.set({**_CALLS.get(), self: now})
        try:
            result = call(*args, **kwargs)
        finally:
            _CALLS.reset(token)
        name = next(name for name, held in self._models.items() if held is model)
        missed = sum(attn not in now.edited for attn in self._layers[name])
        if missed:
            raise NegationNotAppliedError(
                f"adavd: {missed} of {len(self._layers[name])} layers made no values of the prompt's text"
            )
        return result

    def _hook(self, attn: Any, targets: Tensor) -> None:
        """Have the layer tell its text, and edit what `to_v` makes of that. Other texts may come by: concepts
        to be negated, which are left as they are. So are copies of the layer, which have its hooks."""

        def before(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if layer is attn and (now := self._now()) is not None:
                text = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
                now.text = text[0] if isinstance(text, tuple) else text

        def after(to_v: Any, args: tuple[Any, ...], made: Tensor) -> Tensor | None:
            now = self._now() if to_v is attn.to_v else None
            if now is None or now.text is None or not _same_storage(args[0], now.text):
                return None
            now.edited.add(attn)
            if not any(now.rows):
                return None
            # The module's own forward: adapters and offloaded weights act, this hook does not.
            concepts = to_v.forward(targets.to(device=args[0].device, dtype=args[0].dtype))
            edited = made.clone()
            rows = torch.tensor(now.rows, device=made.device)
            edited[rows, self._starts :] = without_concepts(made[rows, self._starts :], concepts, self._shift)
            return edited

        self._handles.append(attn.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(attn.to_v.register_forward_hook(after))

    def _now(self) -> _Call | None:
        """The call at work; None where the denoiser runs for a concept alone.

        Raises:
            NegationNotAppliedError: the layer is run past what prepares it.
        """
        if ALONE.get():
            return None
        now = _CALLS.get().get(self)
        if now is None:
            raise NegationNotAppliedError("adavd: a layer runs outside a call of the pipeline's denoiser")
        return now


def _same_storage(a: Tensor, b: Tensor) -> bool:
    """A part of a text is that text: some models cut off what comes before it."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def adavd(
    pipe: Any,
    concepts: Several,
    strength: float = 1.0,
    *,
    threshold: float | None = None,
    steepness: float = 100.0,
    tokens: str = "prompt",
) -> Edit:
    """Adaptive Value Decomposer: in every layer, each value of the prompt loses its part along the concepts'
    values (Wang et al., CVPR 2025, arXiv 2412.06143):

        V' = V - δ <V, V*> / <V*, V*> V*

    over the full width, all heads; several concepts by Gram-Schmidt. Conditional rows alone are edited, each
    by itself, the start of the text never. (The published code joins both rows of guidance into one vector.)

    Args:
        pipe: a pipeline whose layers read the prompt as it was encoded: UNets, PixArt, Sana, Wan, LTX-Video.
        concepts: words, embeddings [T, C], a mapping from names to either, several, or a `ConceptBank`.
        strength: δ; with a threshold c, its largest value.
        threshold: b of the paper's shift δ = c / (1 + exp(-a (cos(V, V*) - b))), in [-1, 1]; the paper has
            c = 2, a = 100, b = 0.93. None: no shift.
        steepness: a.
        tokens: what V* are values of: `prompt`, as published, the last token of the concept's words; or
            `prototype`, what its members are in any context.

    Returns:
        The edit. It adds no passes.

    Raises:
        UnsupportedModelError: image and text are one sequence, projections are fused, padding comes first, or
            the denoiser is compiled or cached.
        ValueError: a bad argument.
        NegationNotAppliedError: in a later call, where rows cannot be told or a layer was left out.
    """
    check_number("strength", strength, low=0.0)
    check_number("steepness", steepness, above=0.0)
    if threshold is not None:
        check_number("threshold", threshold, low=-1.0, high=1.0)
    check_tokens(tokens)
    hosts = text_hosts(pipe, "adavd", ("to_k", "to_v"))
    if family(pipe).left(pipe):
        raise UnsupportedModelError(f"adavd: {type(pipe).__name__} pads texts on the left")
    check_plain(pipe, "adavd")
    found = concepts_of(pipe, concepts)
    targets = torch.cat([subject(concept, tokens, name) for name, concept in found.items()])
    received = {attribute: as_received(pipe, attribute, targets) for attribute in hosts}
    return _Values(pipe, received, Shift(strength, threshold, steepness), Words(encoder_of(pipe)).starts)
