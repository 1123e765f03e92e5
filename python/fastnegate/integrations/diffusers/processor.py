# SPDX-License-Identifier: Apache-2.0
"""`NegationAttnProcessor`: diffusers' attention contract around `negated_attention`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.models import attention_processor
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor

from ...engine.bank import ConceptBank
from ...engine.engine import Engine, Layer, Slots
from ...engine.errors import NegationNotAppliedError, UnsupportedModelError
from ...operator.attention import check_backend, negated_attention, negated_attention_with_statistics
from ...operator.rule import Rule, check_number
from ...operator.tokens import ConceptTokens
from .families import family, guided, project_context

# Processors whose arithmetic the negated path repeats; others (IP-Adapter, PAG, ...) add their own.
PLAIN = (AttnProcessor2_0, AttnProcessor)


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
            pipeline that the bank was made with, and raises where that cannot tell.
        inner: the processor to wrap, default `AttnProcessor2_0`.
        backend: as for `negated_attention`.

    Raises:
        UnsupportedModelError: `inner` does something besides plain attention.
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
        self.layer: Layer | None = None
        if isinstance(conditional, str) and conditional != "all":
            raise ValueError(f"conditional={conditional!r}: must be 'all', one bool per row, or None")
        if bank is not None:
            _check_plain(self.inner)
            self._slots, self._version = Slots(bank, self.rule), bank.version
            self._strengths = None if strengths is None else dict(strengths)
            for name, strength in (self._strengths or {}).items():
                bank[name]
                check_number(f"strength of {name!r}", strength, low=0.0)

    @classmethod
    def bound(cls, engine: Engine, layer: Layer, inner: Any, backend: str = "auto") -> NegationAttnProcessor:
        """The processor of one layer of an installed engine."""
        _check_plain(inner)
        processor = cls(rule=engine.rule, inner=inner, backend=backend)
        processor.engine, processor.layer = engine, layer
        return processor

    def project(self, attn: Any, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, T, D] of text [B, T, C]. Modules are called, weights never read, so
        LoRA, quantization and offload hooks act."""
        if attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        key, value = _heads(attn, attn.to_k(context)), _heads(attn, attn.to_v(context))
        return (attn.norm_k(key) if attn.norm_k is not None and self._normalizes else key), value

    @property
    def _normalizes(self) -> bool:
        """Whether norm_q and norm_k apply: the older `AttnProcessor` ignores them."""
        return not isinstance(self.inner, AttnProcessor)

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
        if not self._acts(encoder_hidden_states):
            result: Tensor = self.inner(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs
            )
            return result
        assert encoder_hidden_states is not None
        # From here on: AttnProcessor2_0, step by step, with negation in the middle.
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        shape = hidden_states.shape
        if hidden_states.ndim == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        batch, length, _ = encoder_hidden_states.shape
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, length, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        query = _heads(attn, attn.to_q(hidden_states))
        key, value = self.project(attn, encoder_hidden_states)
        if attn.norm_q is not None and self._normalizes:
            query = attn.norm_q(query)

        hidden_states = self._attend(attn, query, key, value, attention_mask)

        hidden_states = hidden_states.transpose(1, 2).flatten(2).to(query.dtype)
        hidden_states = attn.to_out[0](hidden_states)
        hidden_states = attn.to_out[1](hidden_states)
        if len(shape) == 4:
            hidden_states = hidden_states.transpose(-1, -2).reshape(shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        output: Tensor = hidden_states / attn.rescale_output_factor
        return output

    def _acts(self, encoder_hidden_states: Tensor | None) -> bool:
        if encoder_hidden_states is None:
            return False
        engine, layer = self.engine, self.layer
        if engine is None or layer is None:
            return self.bank is not None
        # A compiled graph always takes the negated path: one graph, whatever the schedule.
        compiling = torch.compiler.is_compiling()
        if layer.tokens is None and (engine.armed or compiling):
            raise NegationNotAppliedError(
                f"layer {layer.name}: the denoiser runs without the hook that prepares its rows"
            )
        return compiling or engine.live

    def _attend(self, attn: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        scale = None if isinstance(self.inner, AttnProcessor2_0) else attn.scale
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
        engine, layer = self.engine, self.layer
        if engine is None or layer is None:
            tokens = self._own_tokens(attn, query)
            return negated_attention(
                query, key, value, tokens, self.rule, scale=scale, key_bias=mask, backend=self.backend
            )
        assert layer.tokens is not None  # `_acts` has checked it
        if engine.observer is None:
            return negated_attention(
                query, key, value, layer.tokens, engine.rule, scale=scale, key_bias=mask, backend=self.backend
            )
        output, statistics = negated_attention_with_statistics(
            query, key, value, layer.tokens, engine.rule, scale=scale, key_bias=mask, backend=self.backend
        )
        engine.observe(layer.name, statistics)
        return output

    def _own_tokens(self, attn: Any, query: Tensor) -> ConceptTokens:
        """Concept tokens of a processor made by hand: projected here, the same for all rows."""
        assert self.bank is not None
        if self._version != self.bank.version:
            self._slots, self._version = Slots(self.bank, self.rule), self.bank.version
        batch = query.shape[0]
        context = self._slots.embeddings.to(device=query.device, dtype=query.dtype)
        if self.bank.pipe is not None:
            context = project_context(self.bank.pipe, context)
        key, value = (t[0].transpose(0, 1) for t in self.project(attn, context.unsqueeze(0)))
        spans = [(s.begin, s.begin + s.length) for s in self._slots.slots]
        given = self._strengths
        for name in given or ():
            if name not in self.bank:
                raise NegationNotAppliedError(f"concept {name!r} was removed from the bank")
        strengths = [1.0 if given is None else given.get(s.concept, 0.0) for s in self._slots.slots]
        entries = [
            {"concept": i, "strength": relative * self.rule.strength}
            for i, relative in enumerate(strengths)
            if relative
        ]
        return ConceptTokens.pack(
            [key[a:b] for a, b in spans],
            [value[a:b] for a, b in spans],
            [entries if negated else [] for negated in self._conditional_rows(batch)],
            token_weight=self._slots.weight,
        )

    def _conditional_rows(self, batch: int) -> list[bool]:
        if self.conditional == "all":
            return [True] * batch
        if self.conditional is not None:
            rows = [bool(c) for c in self.conditional]
            if len(rows) != batch:
                raise ValueError(f"conditional has {len(rows)} rows, the batch has {batch}")
            return rows
        pipe = self.bank.pipe if self.bank is not None else None
        if pipe is None:
            raise NegationNotAppliedError(
                "cannot tell which batch rows are conditional: pass conditional=, or a bank made with "
                "the pipeline"
            )
        if not guided(pipe):
            return [True] * batch
        if batch % 2:
            raise NegationNotAppliedError(f"{batch} rows are not [unconditional, conditional] halves")
        return [False] * (batch // 2) + [True] * (batch // 2)


def _heads(attn: Any, x: Tensor) -> Tensor:
    split: Tensor = x.unflatten(-1, (attn.heads, -1))
    return split.transpose(1, 2)


def _check_plain(inner: Any) -> None:
    if type(inner) not in PLAIN:
        raise UnsupportedModelError(
            f"processor {type(inner).__name__} cannot be wrapped: supported are "
            f"{', '.join(c.__name__ for c in PLAIN)}"
        )


def _register() -> None:
    """Make diffusers accept the class where it looks processors up by class."""
    plain = AttentionProcessorRegistry.get(AttnProcessor2_0)
    AttentionProcessorRegistry.register(NegationAttnProcessor, plain)
    before = attention_processor.CROSS_ATTENTION_PROCESSORS
    after = (*before, NegationAttnProcessor)
    attention_processor.CROSS_ATTENTION_PROCESSORS = after
    # Other modules hold the tuple under the same name.
    for name, module in list(sys.modules.items()):
        if name.startswith("diffusers.") and vars(module).get("CROSS_ATTENTION_PROCESSORS") is before:
            module.CROSS_ATTENTION_PROCESSORS = after  # type: ignore[attr-defined]


_register()
