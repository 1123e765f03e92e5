# SPDX-License-Identifier: Apache-2.0
"""`NegationAttnProcessor`: diffusers' attention contract around `negated_attention`."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.models import attention_processor
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0,
)
from torch import Tensor

from ...engine.bank import ConceptBank
from ...engine.engine import Engine
from ...engine.errors import NegationNotAppliedError, UnsupportedModelError
from ...engine.session.call import RUNNING, Running
from ...operator.attention import negated_attention, negated_attention_with_statistics
from ...operator.choice import check_backend
from ...operator.rule import Rule
from ...operator.tokens import ConceptTokens
from . import by_hand, recompute
from .contract import family
from .layers.classic import CLASSIC
from .layers.ip_adapter import Adapted
from .layers.kept import Kept
from .layers.known import SOUND, kind_of
from .layers.ltx2 import apart


class NegationAttnProcessor:
    """Cross-attention with concept negation; self-attention and calls without a live entry are left
    to `inner`, so their result is the one of the untouched model.

    Made by `install`, it shares an `Engine` and knows its layer. Made by hand from a bank, one
    instance serves all layers of `set_attn_processor`: every conditional row negates every concept
    of the bank, at all steps, and concept keys and values are projected at each call.

    Args:
        bank: the concepts; None makes a processor that only calls `inner` (diffusers constructs
            processors without arguments in places).
        rule: `Rule` or preset name; presets take the constants of the family of the bank's pipeline.
        strengths: concept name -> relative strength, default 1.0 for all of the bank.
        conditional: which batch rows are negated: `"all"`, or one bool per row. None asks the
            pipeline call in progress, and raises where there is none that can tell.
        inner: the processor to wrap, default `AttnProcessor2_0`.
        backend: as for `negated_attention`.

    Raises:
        UnsupportedModelError: `inner` does something besides plain attention; or, when it is called, the
            layer is none of diffusers' `Attention`, for which there is `install`.
        ValueError: unknown rule, concept or strength.
    """

    inner: Any

    def __new__(cls, *_arguments: Any, inner: Any = None, **_options: Any) -> NegationAttnProcessor:
        made: NegationAttnProcessor = object.__new__(_ADAPTED.get(type(inner), cls))
        return made

    def __init__(
        self,
        bank: ConceptBank | None = None,
        rule: Rule | str = "protore",
        *,
        strengths: Mapping[str, float] | None = None,
        conditional: str | Sequence[bool] | None = None,
        inner: Any = None,
        backend: str = "auto",
    ) -> None:
        check_backend(backend)
        # A module's weights stay where they are named: it is no part of ours.
        object.__setattr__(self, "inner", AttnProcessor2_0() if inner is None else inner)
        self.backend = backend
        self.bank = bank
        if isinstance(rule, str):
            pipe = bank.pipe if bank is not None else None
            rule = Rule.preset(rule, family=family(pipe).constants(pipe) if pipe is not None else None)
        self.rule = rule
        self.conditional = conditional
        self.engine: Engine | None = None
        self.layer = ""
        self._kind = CLASSIC if bank is None else kind_of(self.inner)
        self._kept: Kept | None = None
        self._tokens: ConceptTokens | None = None
        if isinstance(conditional, str) and conditional != "all":
            raise ValueError(f"conditional={conditional!r}: must be 'all', one bool per row, or None")
        self._own = None if bank is None else by_hand.Concepts(bank, self.rule, strengths)

    @classmethod
    def bound(cls, engine: Engine, layer: str, inner: Any, backend: str = "auto") -> NegationAttnProcessor:
        """The processor of one layer of an installed engine."""
        kind = kind_of(inner)
        processor = cls(rule=engine.rule, inner=inner, backend=backend)
        processor.engine, processor.layer, processor._kind = engine, layer, kind
        return processor

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        text: Tensor | None = encoder_hidden_states
        if isinstance(encoder_hidden_states, tuple):
            if not isinstance(self, Adapted):
                raise NegationNotAppliedError(
                    f"layer {self.layer or '?'} is given images, and the processor that is wrapped is not an "
                    "IP-Adapter's: load that first"
                )
            text, _images = encoder_hidden_states
        engine, compiling = self.engine, torch.compiler.is_compiling()
        if engine is None and not isinstance(attn, Attention):
            raise UnsupportedModelError(
                f"{type(attn).__name__} has processors of its own, so a NegationAttnProcessor cannot be set "
                "by hand: use fastnegate.install or fastnegate.negate"
            )
        running = None if engine is None or compiling else RUNNING.get()
        if engine is not None and (running is None or running.engine is not engine):
            running = self._unprepared(text)
        elif running is not None and running.gradients and text is not None:
            recompute.remember(text, running)
        # Compiled code always takes the negated path: one graph, whatever the schedule.
        acts = running.live if running is not None else compiling if engine is not None else self.by_hand
        if engine is not None and running is not None and running.call.fixed and _capturing(hidden_states):
            acts = engine.fixed.captured = True  # so does a graph that is captured
        if self._kind.rides and running is not None:
            acts = running.joint is not None  # then concepts came with the text, and have to leave it again
        rest = () if temb is None and not args else (temb, *args)  # not every processor takes that
        if text is None or not acts:
            result: Tensor = self.inner(
                attn, hidden_states, encoder_hidden_states, attention_mask, *rest, **kwargs
            )
            if running is not None and running.gradients:
                recompute.hold(result, running)
            return result
        context = None
        if self._kind.rides:
            encoder_hidden_states, context = apart(text, self._aboard(running))
        attend = functools.partial(self._attend, attn, running, context)
        output = self._kind.forward(
            self.inner, attn, attend, hidden_states, encoder_hidden_states, attention_mask, *rest
        )
        if running is not None and running.gradients:
            recompute.hold(output, running)
        return output

    @property
    def _attention_backend(self) -> Any:
        """What runs while nothing is negated, as `set_attention_backend` chooses it where the wrapped
        processor has that choice."""
        return self.inner._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.inner._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        """As `enable_parallelism` sets it where the wrapped processor has it."""
        return self.inner._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.inner._parallel_config = config

    @property
    def by_hand(self) -> bool:
        """Whether it negates without an engine."""
        return self.bank is not None and self.engine is None

    def _unprepared(self, text: Tensor | None) -> Running | None:
        """No denoiser call of the engine is around this one: it is traced, recomputed, or past the hook.

        Raises:
            NegationNotAppliedError: it got past the hook, and somebody asked for negation, or the code is
                compiled and must not read the rows of another call.
        """
        assert self.engine is not None
        compiling = torch.compiler.is_compiling()
        if compiling and self.engine.fixed.ready:
            return None
        if not compiling:
            if recompute.in_backward():
                return recompute.running_of(text, self.engine, self.layer)
            if not self.engine.armed:
                self.engine.check_spoken(self.engine.ledger())
                return None
        raise NegationNotAppliedError(
            f"layer {self.layer}: the denoiser runs without the hook that prepares its rows"
        )

    def _aboard(self, running: Running | None) -> int:
        """How many concept tokens come with the text."""
        if running is not None:
            return int(running.joint)
        assert self.engine is not None and self.engine.fixed.context is not None
        return self.engine.fixed.context.shape[1]

    def _concepts(
        self, attn: Any, query: Tensor, running: Running | None, context: Tensor | None
    ) -> ConceptTokens:
        """The tokens of this layer for the rows at hand, of concepts [1, T, C] that came with the text or
        else of those that the denoiser call has."""
        engine = self.engine
        if engine is None:
            assert self._own is not None
            if not torch.compiler.is_compiling():
                by_hand.called(attn, self)
            own = self._projected(attn, self._own.context(attn, query))
            return self._own.tokens(attn, *own, by_hand.conditional_rows(self, attn, query.shape[0]))
        if running is None:
            fixed = engine.fixed
            assert fixed.context is not None
            projected = self._projected(attn, fixed.context if context is None else context)
            return fixed.tokens(*projected, self.layer)
        running.negated = True
        call, slots = running.call, running.slots
        assert slots is not None
        kept = self._kept
        if call.keep and kept is not None and kept.fits(attn, query, call.of, slots):
            key, value = kept.key, kept.value
        else:
            key, value = self._projected(attn, running.context if context is None else context)
            parts = self._kind.parts(attn)
            self._kept = Kept.made(attn, parts, call.of, slots, key, value) if call.keep else None
        tokens = self._tokens
        same = tokens is not None and tokens.index is running.index and tokens.numbers is running.numbers
        if tokens is None or not same or tokens.key is not key:
            tokens = self._tokens = running.tokens(key, value, self.layer)
        return tokens

    def _projected(self, attn: Any, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [T, H, D] of embeddings [1, T, C]."""
        key, value = self._kind.project(attn, context)
        return key[0].transpose(0, 1), value[0].transpose(0, 1)

    def _attend(
        self,
        attn: Any,
        running: Running | None,
        context: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """The softmax over the text, negated: query [B, H, N, D], key and value [B, H, M, D]."""
        tokens = self._concepts(attn, query, running, context)
        scale = attn.scale if self._kind.scaled else None
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
        engine = self.engine
        watched = running is not None and (running.sampled or running.observed)
        watched &= not self.layer.endswith(SOUND)  # statistics are of pictures
        if running is None or engine is None or not watched or _capturing(query):
            return negated_attention(
                query, key, value, tokens, self.rule, scale=scale, key_bias=mask, backend=self.backend
            )
        output, statistics = negated_attention_with_statistics(
            query, key, value, tokens, self.rule, scale=scale, key_bias=mask, backend=self.backend
        )
        engine.observe(running, self.layer, statistics)
        return output

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy of an installed processor is not installed: it is what that wraps."""
        if self.engine is not None:
            return copy.copy, (self.inner,)
        return super().__reduce_ex__(protocol)

    def __repr__(self) -> str:
        if self.engine is not None:
            return f"NegationAttnProcessor({self.layer}, {self.engine!r})"
        return (
            f"NegationAttnProcessor({self.bank!r}, rule {self.rule.name})"
            if self.bank
            else "NegationAttnProcessor()"
        )


def _capturing(query: Tensor) -> bool:
    return query.is_cuda and torch.cuda.is_current_stream_capturing()


class IPAdapterNegationAttnProcessor2_0(Adapted, NegationAttnProcessor, IPAdapterAttnProcessor2_0):  # type: ignore[misc]
    """With image prompts."""


class IPAdapterNegationAttnProcessor(Adapted, NegationAttnProcessor, IPAdapterAttnProcessor):  # type: ignore[misc]
    """With image prompts, of the older processor."""


_ADAPTED: dict[type, Any] = {
    IPAdapterAttnProcessor2_0: IPAdapterNegationAttnProcessor2_0,
    IPAdapterAttnProcessor: IPAdapterNegationAttnProcessor,
}


def _register() -> None:
    """Make diffusers accept the class where it looks processors up by class, and tell us where it is set."""
    plain = AttentionProcessorRegistry.get(AttnProcessor2_0)
    AttentionProcessorRegistry.register(NegationAttnProcessor, plain)
    before = attention_processor.CROSS_ATTENTION_PROCESSORS
    after = (*before, NegationAttnProcessor, *_ADAPTED.values())
    attention_processor.CROSS_ATTENTION_PROCESSORS = after
    # Other modules hold the tuple under the same name.
    for name, module in list(sys.modules.items()):
        if name.startswith("diffusers.") and vars(module).get("CROSS_ATTENTION_PROCESSORS") is before:
            module.CROSS_ATTENTION_PROCESSORS = after  # type: ignore[attr-defined]
    by_hand.watch_processors()


_register()
