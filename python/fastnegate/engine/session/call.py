# SPDX-License-Identifier: Apache-2.0
"""One call of the denoiser: what an integration knows of it (`Call`), and what attention layers read while it
runs (`Running`). It travels with the call: another thread's or coroutine's is never seen."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ...operator.statistics import Statistics
from ...operator.tokens import ConceptTokens
from ..concepts import Snapshot
from ..errors import NegationNotAppliedError
from .ledger import Ledger
from .rows import Read, Rows, Step
from .slots import Slots

State = Literal["idle", "dormant", "live"]  # nobody asks; no entry acts at this step; some entry acts


class PipelineCall:
    """One call of a pipeline, known by identity: its denoiser calls share it.

    `pin` fixes its policies and concepts: what is set for everybody, or changed in the bank, while it runs
    acts at the next one.
    """

    def __init__(self) -> None:
        self.number: int | None = None  # of those that asked for negation, counted by the engine
        self.sampled = 0  # denoiser calls whose gates were looked at
        self._noted: set[tuple[object, int]] = set()
        self.pinned = False
        self.ledger: Ledger | None = None
        self.slots: Slots | None = None

    def sample(self, step: Step | None) -> bool:
        """Whether to look at the gates of this denoiser call: of two that act, the first and one halfway."""
        run = None if step is None else step.run
        halfway = run is None or (step is not None and step.index in run[len(run) // 2 :])
        wanted = self.sampled == 0 or (self.sampled == 1 and halfway)
        self.sampled += wanted
        return wanted

    def notes(self, thing: object, step: Step | None) -> bool:
        """Whether a thing is noted for the first time at this step; each call is one where none is known."""
        if step is None:
            return True
        new = (thing, step.index) not in self._noted
        self._noted.add((thing, step.index))
        return new

    def pin(self, ledger: Ledger | None) -> None:
        self.pinned, self.ledger = True, ledger


_LOOPS: ContextVar[tuple[PipelineCall, ...]] = ContextVar("fastnegate_loops", default=())


class Loop(PipelineCall):
    """A server's own denoising loop, as a context that may be entered for each of its steps."""

    def __enter__(self) -> Loop:
        _LOOPS.set((*_LOOPS.get(), self))
        return self

    def __exit__(self, *error: object) -> None:
        loops = list(_LOOPS.get())
        if self in loops:  # else it is left in another context than it was entered in
            del loops[len(loops) - 1 - loops[::-1].index(self)]
            _LOOPS.set(tuple(loops))


def current_loop() -> PipelineCall | None:
    """The innermost loop that this denoiser call is part of."""
    loops = _LOOPS.get()
    return loops[-1] if loops else None


@dataclass(frozen=True)
class Call:
    """What an integration says about a denoiser call.

    Attributes:
        batch, device, dtype: rows, and where and how text embeddings arrive.
        guided: whether the rows are [unconditional, conditional] halves; asked only when needed.
        conditional_first: whether these halves are the other way round.
        unconditional: whether no row is conditional; asked only when needed.
        of: the pipeline call it belongs to.
        step: None if unknown.
        prompts: of the pipeline call; None where there is none.
        keep: whether what layers make of embeddings may be kept for the rest of the pipeline call.
        fixed: whether rows must lie at fixed addresses: for captured graphs, and for compiled code.
        compiled: whether some of the layers are compiled, so that `project` has to run before them.
        project: from the text encoder's embeddings [1, T, C] to what the layers receive.
    """

    batch: int
    device: torch.device
    guided: Callable[[], bool]
    dtype: torch.dtype = torch.float32
    of: PipelineCall = field(default_factory=PipelineCall)
    step: Step | None = None
    prompts: int | None = None
    unconditional: Callable[[], bool] = lambda: False
    conditional_first: bool = False
    keep: bool = False
    fixed: bool = False
    compiled: bool = False
    project: Callable[[Tensor], Tensor] = lambda embeddings: embeddings


@dataclass(frozen=True)
class Record:
    """What an observer receives after each negated attention call."""

    layer: str
    statistics: Statistics
    entries: tuple[tuple[int, int, str], ...]  # (entry, batch row, concept) that act at this step
    asked: tuple[tuple[int, str], ...]  # (batch row, concept) that act at some step
    requests: tuple[int | None, ...]  # request of each batch row
    call: int  # pipeline call
    step: int | None


@dataclass(eq=False)
class Running:
    """What layers read during a denoiser call; another call has one of its own."""

    engine: object
    call: Call
    asks: bool = False  # somebody asks for negation
    live: bool = False  # an entry acts at this step
    rows: Rows | None = None
    slots: Slots | None = None
    index: Tensor | None = None
    numbers: Tensor | None = None
    weight: Tensor | None = None
    directions: Mapping[str, Tensor] = field(default_factory=dict)  # by layer, of rules that read one
    neutral: Tensor | None = None
    ledger: Ledger | None = None
    active: tuple[float, ...] = ()
    sampled: bool = False  # its gates are looked at
    observed: bool = False  # somebody wants all statistics
    negated: bool = False  # a layer took the negated path
    gradients: bool = field(default_factory=torch.is_grad_enabled)  # layers may be recomputed afterwards
    embeddings: Tensor | None = None  # at a fixed address
    joint: Any = None  # what the layers of a joint model need to know besides
    layer: Any = None  # of a joint model: the one at work
    _context: Tensor | None = None

    @property
    def state(self) -> State:
        return "live" if self.live else "dormant" if self.asks else "idle"

    @property
    def context(self) -> Tensor:
        """Concept embeddings [1, T, C] as the layers receive text; made when the first of them asks, inside
        the denoiser's forward, where offloaded weights have been brought in."""
        if self._context is None or (self.call.fixed and _captures(self.call.device)):
            assert self.slots is not None
            embeddings = self.embeddings
            if embeddings is None:
                embeddings = self.slots.context(self.call.device, self.call.dtype)
            self._context = self.call.project(embeddings)
        return self._context

    def read(self, tensors: Read) -> None:
        """Have layers read these."""
        self.index, self.numbers, self.weight, self.neutral = tensors

    def note(self, captured: bool, bank: Snapshot) -> None:
        """The call has ended without an error. What compiled code and captured graphs run is not seen: their
        layers always negate. `bank`: as it is now, for a call that read none."""
        if self.ledger is not None:
            call, read = self.call, bank if self.slots is None else self.slots.bank
            negated = self.negated or call.compiled or captured
            new = functools.partial(call.of.notes, step=call.step)
            self.ledger.note(read, self.rows, self.active, negated, new)

    def record(self, layer: str, statistics: Statistics) -> Record:
        """For observers: what one call of a layer did."""
        rows, step, number = self.rows, self.call.step, self.call.of.number
        assert rows is not None and number is not None
        entries = [(i, e.row, e.concept) for i, e in enumerate(rows.entries)]
        acting = tuple(e for e, active in zip(entries, self.active) if active)
        asked = tuple(dict.fromkeys((row, concept) for _, row, concept in entries))
        index = None if step is None else step.index
        return Record(layer, statistics, acting, asked, rows.requests, number, index)

    def tokens(self, key: Tensor, value: Tensor, layer: str = "") -> ConceptTokens:
        """Tokens of a layer from its concept keys and values [T, H, D]. Raises NegationNotAppliedError: there
        are directions, and none for this layer."""
        assert self.slots is not None and self.index is not None and self.numbers is not None
        concepts, longest = len(self.slots.slots), self.slots.longest
        direction = direction_of(self.directions, layer)
        return concept_tokens(
            key, value, self.index, self.numbers, self.weight, direction, self.neutral, concepts, longest
        )


def concept_tokens(
    key: Tensor,
    value: Tensor,
    index: Tensor,
    numbers: Tensor,
    weight: Tensor | None,
    direction: Tensor | None,
    neutral: Tensor | None,
    concepts: int,
    longest: int,
) -> ConceptTokens:
    """Of one layer; a row may have an entry of each concept."""
    return ConceptTokens(
        key=key,
        value=value,
        index=index,
        numbers=numbers,
        entries=numbers.shape[0],
        concepts=concepts,
        longest=longest,
        busiest=concepts,
        token_weight=weight,
        direction=direction,
        neutral=neutral,
    )


def direction_of(directions: Mapping[str, Tensor], layer: str) -> Tensor | None:
    """The directions [slots, H, D] of a layer; None where the rule reads none."""
    if not directions:
        return None
    if layer not in directions:
        raise NegationNotAppliedError(f"layer {layer}: the bank has directions, and none for it")
    return directions[layer]


def _captures(device: torch.device) -> bool:
    """Whether a graph is captured: what was made before it is not part of it."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


RUNNING: ContextVar[Running | None] = ContextVar("fastnegate_running", default=None)
