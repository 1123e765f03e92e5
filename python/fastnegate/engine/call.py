# SPDX-License-Identifier: Apache-2.0
"""One call of the denoiser: what an integration knows of it (`Call`), and what attention layers read while it
runs (`Running`). It travels with the call: another thread's or coroutine's is never seen."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..operator.tokens import ConceptTokens
from .rows import Rows
from .slots import Slots

if TYPE_CHECKING:
    from .engine import Engine
    from .ledger import Ledger

State = Literal["idle", "dormant", "live"]  # nobody asks; no entry acts at this step; some entry acts


class PipelineCall:
    """One call of a pipeline, known by identity: its denoiser calls share it."""

    def __init__(self) -> None:
        self.number: int | None = None  # of those that asked for negation, counted by the engine
        self.sampled = 0  # denoiser calls whose gates were looked at


@dataclass(frozen=True)
class Step:
    """Step `index` of `count` that the schedule has; `run` are those that this pipeline call runs, if known."""

    index: int
    count: int
    run: range | None = None

    @property
    def progress(self) -> float:
        return self.index / self.count


@dataclass(frozen=True)
class Call:
    """What an integration says about a denoiser call.

    Attributes:
        batch, device, dtype: rows, and where and how text embeddings arrive.
        guided: whether the rows are [unconditional, conditional] halves; asked only when needed.
        of: the pipeline call it belongs to.
        step: None if unknown.
        prompts: of the pipeline call; None where there is none.
        keep: whether what layers make of embeddings may be kept for the rest of the pipeline call.
        fixed: whether rows must lie at fixed addresses, for compiled code or captured graphs.
        project: from the text encoder's embeddings [1, T, C] to what the layers receive.
    """

    batch: int
    device: torch.device
    guided: Callable[[], bool]
    dtype: torch.dtype = torch.float32
    of: PipelineCall = field(default_factory=PipelineCall)
    step: Step | None = None
    prompts: int | None = None
    keep: bool = False
    fixed: bool = False
    project: Callable[[Tensor], Tensor] = lambda embeddings: embeddings


@dataclass(eq=False)
class Running:
    """What layers read during a denoiser call. Nobody changes it once the call has begun."""

    engine: Engine
    call: Call
    state: State = "idle"
    rows: Rows | None = None
    slots: Slots | None = None
    index: Tensor | None = None
    numbers: Tensor | None = None
    weight: Tensor | None = None
    busiest: int = 0
    ledger: Ledger | None = None
    active: tuple[float, ...] = ()
    sampled: bool = False  # gates are looked at: statistics are wanted
    _context: Tensor | None = None

    @property
    def live(self) -> bool:
        return self.state == "live"

    @property
    def watched(self) -> bool:
        """Whether statistics are wanted."""
        return self.sampled or self.engine.observer is not None

    @property
    def context(self) -> Tensor:
        """Concept embeddings [1, T, C] as the layers receive text; made when the first of them asks, inside the
        denoiser's forward, where offloaded weights have been brought in."""
        if self._context is None:
            assert self.slots is not None
            self._context = self.call.project(self.slots.context(self.call.device, self.call.dtype))
        return self._context

    def tokens(self, key: Tensor, value: Tensor) -> ConceptTokens:
        """Tokens of a layer from its concept keys and values [T, H, D]."""
        assert self.slots is not None and self.index is not None and self.numbers is not None
        return ConceptTokens(
            key=key,
            value=value,
            index=self.index,
            numbers=self.numbers,
            entries=len(self.numbers),
            concepts=len(self.slots.slots),
            longest=self.slots.longest,
            busiest=self.busiest,
            token_weight=self.weight,
        )

    def belongs(self, tokens: ConceptTokens, key: Tensor) -> bool:
        """Whether `tokens`, made earlier, are what `tokens(key, ...)` would be."""
        return tokens.key is key and tokens.index is self.index and tokens.numbers is self.numbers


RUNNING: ContextVar[Running | None] = ContextVar("fastnegate_running", default=None)


class Fixed:
    """Rows at fixed addresses, for compiled code and captured graphs, while sizes stay.

    Whoever writes them holds the engine's turn over the denoiser's forward, and waits, on the device, for the
    last reader, which may have been on another stream.
    """

    def __init__(self) -> None:
        self.ready = False  # a denoiser call that was prepared is running
        self.context: Tensor | None = None
        self.index: Tensor | None = None  # of the rows at hand: a view
        self.numbers: Tensor | None = None
        self.weight: Tensor | None = None
        self.concepts = self.longest = self.busiest = 0
        self._all: Tensor | None = None  # the index with room for all rows
        self._read: Any = None  # event of the last reader

    def fill(self, running: Running, most: int) -> None:
        """Copy what `running` has; `most` rows fit."""
        slots, rows = running.slots, running.rows
        assert slots is not None and rows is not None
        device = running.call.device
        if self._read is not None and device.type == "cuda":
            torch.cuda.current_stream(device).wait_event(self._read)
        entries = most * len(slots.slots)
        index = rows.index(slots, entries, most)
        with torch.no_grad():
            self._all = _copied(self._all, index, device)
            self.numbers = _copied(self.numbers, rows.numbers(running.active, entries), device)
            self.weight = None if slots.weight is None else _copied(self.weight, slots.weight, device)
            context = running.call.project(slots.context(device, running.call.dtype))
            self.context = _copied(self.context, context, device)
        self.index = self._all[: len(index) - most + running.call.batch]
        self.concepts, self.longest, self.busiest = len(slots.slots), slots.longest, len(slots.slots)
        running.index, running.numbers, running.weight = self.index, self.numbers, self.weight
        running.busiest, running._context = self.busiest, self.context
        self.ready = True

    def release(self, device: torch.device) -> None:
        """The call is over: an unprepared one must not read the rows of another."""
        self.ready = False
        if device.type == "cuda":
            self._read = torch.cuda.Event()
            self._read.record(torch.cuda.current_stream(device))

    def tokens(self, key: Tensor, value: Tensor) -> ConceptTokens:
        """As `Running.tokens`, for compiled code."""
        assert self.index is not None and self.numbers is not None
        return ConceptTokens(
            key=key,
            value=value,
            index=self.index,
            numbers=self.numbers,
            entries=self.numbers.shape[0],
            concepts=self.concepts,
            longest=self.longest,
            busiest=self.busiest,
            token_weight=self.weight,
        )


def _copied(old: Tensor | None, new: Tensor, device: torch.device) -> Tensor:
    """`new` in the place of `old` where it fits, else in a place of its own."""
    if old is not None and (old.shape, old.dtype, old.device) == (new.shape, new.dtype, device):
        return old.copy_(new)
    with torch.inference_mode(False):  # later calls may be outside of it
        return new.detach().to(device, copy=True)
