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
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from ...engine.bank import ConceptBank
from ...engine.engine import Engine
from ...engine.errors import NegationNotAppliedError, UnsupportedModelError
from ...engine.session.call import RUNNING, Running
from ...engine.session.slots import Slots
from ...operator.attention import negated_attention, negated_attention_with_statistics
from ...operator.choice import check_backend
from ...operator.rule import Rule, check_number
from ...operator.tokens import ConceptTokens
from . import by_hand, recompute
from .contract import family, in_progress, project_for
from .layers.classic import CLASSIC
from .layers.kept import Kept
from .layers.known import kind_of


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
        self.inner = AttnProcessor2_0() if inner is None else inner
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
        if bank is not None:
            self._slots, self._version = _slots(bank, self.rule)
            self._strengths = None if strengths is None else dict(strengths)
            for name, strength in (self._strengths or {}).items():
                bank[name]
                check_number(f"strength of {name!r}", strength, low=0.0)

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
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        engine, compiling = self.engine, torch.compiler.is_compiling()
        if engine is None and not isinstance(attn, Attention):
            raise UnsupportedModelError(
                f"{type(attn).__name__} has processors of its own, so a NegationAttnProcessor cannot be set "
                "by hand: use fastnegate.install or fastnegate.negate"
            )
        running = None if engine is None or compiling else RUNNING.get()
        if engine is not None and (running is None or running.engine is not engine):
            running = self._unprepared(encoder_hidden_states)
        elif running is not None and running.gradients and encoder_hidden_states is not None:
            recompute.remember(encoder_hidden_states, running)
        # Compiled code always takes the negated path: one graph, whatever the schedule.
        acts = running.live if running is not None else compiling if engine is not None else self.by_hand
        if engine is not None and running is not None and running.call.fixed and _capturing(hidden_states):
            acts = engine.fixed.captured = True  # so does a graph that is captured
        rest = () if temb is None and not args else (temb, *args)  # not every processor takes that
        if encoder_hidden_states is None or not acts:
            result: Tensor = self.inner(
                attn, hidden_states, encoder_hidden_states, attention_mask, *rest, **kwargs
            )
            if running is not None and running.gradients:
                recompute.hold(result, running)
            return result
        attend = functools.partial(self._attend, attn, running)
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

    def _concepts(self, attn: Any, query: Tensor, running: Running | None) -> ConceptTokens:
        """The tokens of this layer for the rows at hand."""
        engine = self.engine
        if engine is None:
            return self._own_tokens(attn, query)
        if running is None:
            fixed = engine.fixed
            assert fixed.context is not None
            key, value = self._kind.project(attn, fixed.context)
            return fixed.tokens(key[0].transpose(0, 1), value[0].transpose(0, 1))
        running.negated = True
        call, slots = running.call, running.slots
        assert slots is not None
        kept = self._kept
        if call.keep and kept is not None and kept.fits(attn, query, call.of, slots):
            key, value = kept.key, kept.value
        else:
            key, value = (t[0].transpose(0, 1) for t in self._kind.project(attn, running.context))
            parts = self._kind.parts(attn)
            self._kept = Kept.made(attn, parts, call.of, slots, key, value) if call.keep else None
        tokens = self._tokens
        same = tokens is not None and tokens.index is running.index and tokens.numbers is running.numbers
        if tokens is None or not same or tokens.key is not key:
            tokens = self._tokens = running.tokens(key, value)
        return tokens

    def _attend(
        self,
        attn: Any,
        running: Running | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """The softmax over the text, negated: query [B, H, N, D], key and value [B, H, M, D]."""
        tokens = self._concepts(attn, query, running)
        scale = attn.scale if self._kind.scaled else None
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
        engine = self.engine
        watched = running is not None and (running.sampled or running.observed)
        if running is None or engine is None or not watched or _capturing(query):
            return negated_attention(
                query, key, value, tokens, self.rule, scale=scale, key_bias=mask, backend=self.backend
            )
        output, statistics = negated_attention_with_statistics(
            query, key, value, tokens, self.rule, scale=scale, key_bias=mask, backend=self.backend
        )
        engine.observe(running, self.layer, statistics)
        return output

    # ---- made by hand -----------------------------------------------------------------------

    def _own_tokens(self, attn: Any, query: Tensor) -> ConceptTokens:
        """Concept tokens of a processor made by hand: projected here, the same for all rows."""
        bank = self.bank
        assert bank is not None
        if self._version != bank.version:
            self._slots, self._version = _slots(bank, self.rule)
        slots = self._slots
        if not torch.compiler.is_compiling():
            by_hand.called(attn, self)
        context = slots.embeddings.to(device=query.device, dtype=query.dtype).unsqueeze(0)
        context = project_for(by_hand.model_of(attn, bank.pipe), context)
        key, value = (t[0].transpose(0, 1) for t in self._kind.project(attn, context))
        spans = [(s.begin, s.begin + s.length) for s in slots.slots]
        given = self._strengths
        for name in given or ():
            if name not in bank:
                raise NegationNotAppliedError(f"concept {name!r} was removed from the bank")
        strengths = [1.0 if given is None else given.get(s.concept, 0.0) for s in slots.slots]
        entries = [
            {"concept": i, "strength": relative * self.rule.strength}
            for i, relative in enumerate(strengths)
            if relative
        ]
        return ConceptTokens.pack(
            [key[a:b] for a, b in spans],
            [value[a:b] for a, b in spans],
            [entries if negated else [] for negated in self._conditional_rows(attn, query.shape[0])],
            token_weight=slots.weight,
        )

    def _conditional_rows(self, attn: Any, batch: int) -> list[bool]:
        if self.conditional == "all":
            return [True] * batch
        if self.conditional is not None:
            rows = [bool(c) for c in self.conditional]
            if len(rows) != batch:
                raise ValueError(f"conditional has {len(rows)} rows, the batch has {batch}")
            return rows
        pipe = self.bank.pipe if self.bank is not None else None
        progress = by_hand.PROGRESS.get()
        if progress is None and (around := in_progress(by_hand.model_of(attn, pipe), sys._getframe(1))):
            progress = around._replace(own=True)  # who calls a model that is not watched is not known
        if progress is None:
            raise NegationNotAppliedError(
                "cannot tell which batch rows are conditional outside a pipeline call: pass conditional="
            )
        if progress.unconditional or not (progress.own and progress.guided):
            return [not progress.unconditional] * batch
        if batch % 2:
            raise NegationNotAppliedError(f"{batch} rows are not [unconditional, conditional] halves")
        return [False] * (batch // 2) + [True] * (batch // 2)

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


def _slots(bank: ConceptBank, rule: Rule) -> tuple[Slots, int]:
    version, concepts = bank.snapshot()
    return Slots(concepts, rule, bank.width), version


def _capturing(query: Tensor) -> bool:
    return query.is_cuda and torch.cuda.is_current_stream_capturing()


def _register() -> None:
    """Make diffusers accept the class where it looks processors up by class, and tell us where it is set."""
    plain = AttentionProcessorRegistry.get(AttnProcessor2_0)
    AttentionProcessorRegistry.register(NegationAttnProcessor, plain)
    before = attention_processor.CROSS_ATTENTION_PROCESSORS
    after = (*before, NegationAttnProcessor)
    attention_processor.CROSS_ATTENTION_PROCESSORS = after
    # Other modules hold the tuple under the same name.
    for name, module in list(sys.modules.items()):
        if name.startswith("diffusers.") and vars(module).get("CROSS_ATTENTION_PROCESSORS") is before:
            module.CROSS_ATTENTION_PROCESSORS = after  # type: ignore[attr-defined]
    by_hand.watch_processors()


_register()
