# SPDX-License-Identifier: Apache-2.0
"""Denoisers that several processes compute together (`enable_parallelism`, `parallelize_module`).

Context parallelism deals out queries, tensor parallelism heads. A rule is a function of one query, so
attention to a text that every process has whole stays exact; and where its scope is a head, so does attention
whose heads are dealt out. Everything else is refused. Each process has an engine, and all are told the same:
they compare it, since a picture that is negated in parts would look like one that is negated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import nn

from ....engine.errors import NegationNotAppliedError, UnsupportedModelError
from ....engine.session.call import PipelineCall, Running
from ....engine.session.rows import Rows
from ....operator.rule import Rule


class Dealt(NamedTuple):
    """What each process has a part of: queries, or heads; and who they are.

    Attributes:
        ring: whether keys go round instead of queries' heads (of context parallelism).
    """

    queries: bool
    ring: bool
    group: Any


def dealt(model: nn.Module, layers: Iterable[Any]) -> Dealt | None:
    """How a model is dealt out, by diffusers or by hand; None: each process has all of it.

    FSDP's weights come together before a layer runs, and its processes may well have other prompts.
    """
    if not dist.is_available() or not dist.is_initialized():
        return None
    config = getattr(model, "_parallel_config", None)
    context = None if config is None else config.context_parallel_config
    if context is not None:
        return Dealt(True, context.ring_degree > 1, context._flattened_mesh.get_group())
    if any(hasattr(module, "_get_fsdp_state") for module in model.modules()):
        return None
    for attn in layers:
        for weight in attn.parameters():
            for dimension, placement in enumerate(getattr(weight, "placements", ())):  # of a DTensor
                if placement.is_shard():
                    return Dealt(False, False, weight.device_mesh.get_group(dimension))
    return None


def refuse(model: nn.Module, layers: Iterable[Any], what: str) -> None:
    """Raise UnsupportedModelError for what knows nothing of other processes."""
    if dealt(model, layers) is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__}: several processes compute it together, which {what} cannot be combined "
            "with: use fastnegate.install"
        )


class Parallel:
    """One denoiser of an engine."""

    def __init__(self, rule: Rule, joint: bool) -> None:
        self._rule, self._joint = rule, joint
        self._of: PipelineCall | None = None
        self._dealt: Dealt | None = None

    def check(self, model: nn.Module, layers: Mapping[str, Any]) -> None:
        """Before anything is installed. Raises UnsupportedModelError: it could never be negated."""
        if (how := dealt(model, layers.values())) is not None:
            self._check(model, layers, how)

    def heed(self, model: nn.Module, layers: Mapping[str, Any], running: Running) -> None:
        """Before a call of the denoiser, whether or not it is to be negated.

        Raises:
            UnsupportedModelError: it is, and would not come out as in one process.
            NegationNotAppliedError: other processes were told something else.
        """
        if running.call.of is not self._of:
            self._of, self._dealt = running.call.of, dealt(model, layers.values())
            if self._dealt is not None:
                self._compare(running, self._dealt.group)
        if self._dealt is None or not running.asks:
            return
        self._check(model, layers, self._dealt)
        running.sampled = False  # of gates, a process sees those of its own queries or heads
        if running.observed:
            raise UnsupportedModelError(
                f"{type(model).__name__}: several processes compute it together, and an audit or observer "
                "would see what one of them does"
            )

    def _check(self, model: nn.Module, layers: Mapping[str, Any], how: Dealt) -> None:
        name, rule = type(model).__name__, self._rule
        if how.ring:
            raise UnsupportedModelError(
                f"{name}: ring_degree > 1 cannot be combined with negation: use ulysses_degree"
            )
        if how.queries and (self._joint or not all(_reads_whole_text(attn) for attn in layers.values())):
            raise UnsupportedModelError(
                f"{name}: context parallelism (enable_parallelism) cannot be combined with negation; it can "
                "in Wan, where each process has all of the text"
            )
        if not how.queries and (rule.scope == "feature" or rule.reads.direction):
            word = "scope='feature'" if rule.scope == "feature" else "directions"
            raise UnsupportedModelError(
                f"{name}: rule {rule.name!r} with {word} reads all heads, which tensor parallelism deals "
                "out: take a rule of scope 'head', for instance Rule.preset('nag', scope='head')"
            )

    def _compare(self, running: Running, group: Any) -> None:
        """All processes come by here at the same calls, so nobody waits for one that is not there."""
        mine = torch.frombuffer(bytearray(_told(self._rule, running)), dtype=torch.int64)
        mine = mine.to(running.call.device)
        everybody = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(everybody, mine, group=group)
        if not all(torch.equal(theirs, mine) for theirs in everybody):
            raise NegationNotAppliedError(
                "the processes that compute this denoiser together were told different things: give each the "
                "same policies, rule, and bank (made once, saved, and loaded by all)"
            )


def _reads_whole_text(attn: Any) -> bool:
    """Whether each process attends from its own queries to all of the text."""
    return isinstance(getattr(attn.processor, "inner", attn.processor), WanAttnProcessor)


def _told(rule: Rule, running: Running) -> bytes:
    """A digest of what a call negates, but for encodings of negative prompts: each process makes its own,
    and their bits may differ."""
    digest, rows = hashlib.sha256(), running.rows
    if running.asks and rows is not None:
        digest.update(repr((rule, rows.requests, *_entries(rows))).encode())
        ours = sum(slot.length for slot in rows.slots.slots if not slot.text)  # the bank's come first
        for tensor in (rows.slots.embeddings[:ours], *rows.slots.directions.values()):
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.digest()


def _entries(rows: Rows) -> list[tuple[Any, ...]]:
    return [(e.row, e.slot, e.concept, e.numbers, e.policy.start, e.policy.stop) for e in rows.entries]
