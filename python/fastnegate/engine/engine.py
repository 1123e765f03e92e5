# SPDX-License-Identifier: Apache-2.0
"""`Engine`: policies -> rows of small static tensors that one fused operator reads.

The engine holds state only and knows no pipeline. An integration tells it the batch (`prepare`), the
progress, and what a layer makes of the concept embeddings (`fill`). Tensors keep their addresses
while the bank keeps its shape, so compiled and captured graphs stay valid.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..operator.problem import Statistics
from ..operator.rule import Rule
from ..operator.tokens import COLUMNS, NUMBERS, ConceptTokens, entry_numbers
from .bank import ConceptBank
from .errors import NegationNotAppliedError, RowMapError
from .policy import Policy


@dataclass(frozen=True)
class Slot:
    """One entry's worth of concept tokens: a prototype, or a whole negative prompt."""

    concept: str
    begin: int
    length: int


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


class Slots:
    """The bank as one token axis: embeddings [T, C] and the slots in it."""

    def __init__(self, bank: ConceptBank, rule: Rule) -> None:
        self.slots: list[Slot] = []
        parts: list[Tensor] = []
        weights: list[Tensor] = []
        for name in bank:
            for group in bank[name].groups(rule):
                begin = sum(len(p) for p in parts)
                self.slots.append(Slot(name, begin, len(group.embeddings)))
                parts.append(group.embeddings)
                weights.append(torch.ones(len(group.embeddings)) if group.weight is None else group.weight)
        # A bank may be empty for a while (remove, then update): no slots, no entries.
        self.embeddings = torch.cat(parts) if parts else torch.zeros(0, bank.width)
        self.weight = torch.cat(weights) if parts and rule.tokens == "weighted" else None
        self.longest = max((s.length for s in self.slots), default=0)

    @property
    def shape(self) -> tuple[tuple[int, int], ...]:
        return tuple((s.begin, s.length) for s in self.slots)


class Layer:
    """Concept keys and values of one attention layer, and the tokens for the batch at hand."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.key: Tensor | None = None
        self.value: Tensor | None = None
        self.tokens: ConceptTokens | None = None  # for the denoiser call in progress, else None
        self.last: ConceptTokens | None = None

    def fill(self, key: Tensor, value: Tensor) -> None:
        """Take over projected keys and values [T, H, D], in place where shape and dtype allow."""
        if (
            self.key is None
            or self.value is None
            or self.key.shape != key.shape
            or ((self.key.dtype, self.key.device) != (key.dtype, key.device))
        ):
            with torch.inference_mode(False):  # later calls may be outside of it
                self.key, self.value = key.detach().clone(), value.detach().clone()
        else:
            self.key.copy_(key)
            self.value.copy_(value)


class Engine:
    """Per-request negation for every attention layer of one denoiser.

    Args:
        bank: the concepts.
        rule: `Rule` for all requests.
        layers: names of the cross-attention layers.
        max_batch: the most images in one call; the denoiser may see twice as many rows
            (classifier-free guidance).

    Raises:
        ValueError: an empty bank, or a concept without the tokens that the rule reads.
    """

    def __init__(self, bank: ConceptBank, rule: Rule, layers: Sequence[str], *, max_batch: int = 8) -> None:
        if isinstance(max_batch, bool) or not isinstance(max_batch, int) or max_batch < 1:
            raise ValueError(f"max_batch={max_batch!r}: must be an int >= 1")
        if not len(bank):
            raise ValueError("bank is empty: there is nothing to negate")
        self.bank, self.rule, self.max_batch = bank, rule, max_batch
        self.layers = {name: Layer(name) for name in layers}
        self.observer: Callable[[Record], None] | None = None
        self.armed = False  # whether some policy asks for negation
        self.live = False  # whether any entry acts in the denoiser call in progress
        self.call = 0  # pipeline calls so far
        self.step: int | None = None
        self._policies: tuple[Policy | None, ...] | None = None  # one per request
        self._explicit: tuple[tuple[int | None, ...], tuple[bool, ...]] | None = None
        self._requests: tuple[int | None, ...] = ()  # of each row, None: not negated
        self._entries: tuple[tuple[int, int, str], ...] = ()
        self._entry_policies: list[Policy] = []
        self._rows_of: object = None
        self._index: Tensor | None = None
        self._numbers: Tensor | None = None
        self._weight: Tensor | None = None
        self._remove: Callable[[], None] | None = None
        self._removed = False
        self._thread: int | None = None  # that has a batch open
        self._calls = 0  # of the denoiser that were prepared
        self._rebuild()

    # ---- what callers use -------------------------------------------------------------------

    @contextlib.contextmanager
    def batch(self, policies: Sequence[Policy | None]) -> Iterator[Engine]:
        """Within the context, pipeline calls are for these requests; see `set_requests`. What was set
        before is set again afterwards.

        Raises:
            NegationNotAppliedError: another thread has a batch open; or, at the end, negation was
                asked for and no denoiser call came by.
        """
        before = (self._policies, self._explicit, self.armed, self._thread)
        self.set_requests(policies)
        self._thread = threading.get_ident()
        calls = self._calls
        try:
            yield self
            if self.armed and self._calls == calls:
                raise NegationNotAppliedError(
                    "no denoiser call came by within the batch: is this the pipeline, with the denoiser, "
                    "that the engine was installed in?"
                )
        finally:
            self._policies, self._explicit, self.armed, self._thread = before
            self.live = False

    def set_requests(self, policies: Sequence[Policy | None]) -> None:
        """One policy, or None, per prompt of the pipeline calls to come. Images of one prompt share
        its policy, so a single policy serves any number of images.

        Raises:
            RowMapError: more policies than `max_batch`.
            ValueError: a concept that the bank does not have, or a window or threshold with which
                the rule could not act.
            NegationNotAppliedError: the engine was removed, or another thread has a batch open.
        """
        if self._removed:
            raise NegationNotAppliedError("this engine was removed from its pipeline")
        if self._thread not in (None, threading.get_ident()):
            raise NegationNotAppliedError("another thread has a batch open: one pipeline runs one at a time")
        if isinstance(policies, Policy):
            raise TypeError("policies is a Policy: must be a list with one per prompt")
        if len(policies) > self.max_batch:
            raise RowMapError(
                f"{len(policies)} policies: this engine was installed with max_batch={self.max_batch}"
            )
        for i, policy in enumerate(policies):
            if policy is not None and not isinstance(policy, Policy):
                raise TypeError(f"policies[{i}] is a {type(policy).__name__}: must be a Policy or None")
            for name in policy.concepts if policy is not None else ():
                self.bank[name]  # unknown names raise, naming what there is
            if policy is not None:
                policy.check(self.rule)
        self._policies, self._explicit = tuple(policies), None
        self.armed = any(p is not None and sum(p.concepts.values()) > 0 for p in policies)

    def set_rows(
        self,
        policies: Sequence[Policy | None],
        row_map: Sequence[int | None] | None = None,
        conditional: Sequence[bool] | None = None,
    ) -> None:
        """For servers that build the batch themselves: state until the next `set_rows` or `clear`.

        Args:
            policies: one policy, or None, per request.
            row_map: the request of each batch row of the denoiser (None: a padding row); default:
                row b is request b.
            conditional: which rows are conditional; only those are negated. Default: all.

        Raises:
            RowMapError: sizes disagree, or a row names a request that does not exist.
        """
        rows = tuple(range(len(policies))) if row_map is None else tuple(row_map)
        mask = (True,) * len(rows) if conditional is None else tuple(bool(c) for c in conditional)
        if len(mask) != len(rows):
            raise RowMapError(f"conditional has {len(mask)} rows, row_map has {len(rows)}")
        for b, request in enumerate(rows):
            whole = isinstance(request, int) and not isinstance(request, bool)
            if request is not None and not (whole and 0 <= request < len(policies)):
                raise RowMapError(f"row_map[{b}]={request!r}: must be None or 0 to {len(policies) - 1}")
        for request, policy in enumerate(policies):
            if policy is not None and request not in rows:
                raise RowMapError(f"policies[{request}] has no row")
        self.set_requests(policies)
        self._explicit = (rows, mask)

    def clear(self) -> None:
        """Forget all policies: the pipeline runs as if nothing were installed."""
        self._policies = self._explicit = None
        self.armed = self.live = False

    def remove(self) -> None:
        """Take the engine out of its pipeline, restoring exactly what was there."""
        self.clear()
        self._removed = True
        if self._remove is not None:
            remove, self._remove = self._remove, None
            remove()

    @property
    def removed(self) -> bool:
        """Whether `remove` was called."""
        return self._removed

    # ---- what integrations use --------------------------------------------------------------

    def on_remove(self, remove: Callable[[], None]) -> None:
        self._remove = remove

    @property
    def embeddings(self) -> Tensor:
        """Concept token embeddings [T, C], to be projected by each layer."""
        return self._slots.embeddings

    def expect(self, prompts: int) -> None:
        """Raise RowMapError unless the policies fit a pipeline call of that many prompts."""
        if self._policies is not None and self._explicit is None and len(self._policies) not in (1, prompts):
            raise RowMapError(f"{prompts} prompts, but {len(self._policies)} policies: must be 1 or as many")

    def prepare(
        self, batch: int, device: torch.device, guided: Callable[[], bool], progress: float | None
    ) -> bool:
        """Set rows and schedule values for a denoiser call of `batch` rows.

        Args:
            guided: whether the rows are [unconditional, conditional] halves; asked only when needed.
            progress: i / n of this step, or None if unknown.

        Returns:
            Whether concept keys and values are wanted (some entry exists, whatever the window).

        Raises:
            RowMapError: the batch contradicts the policies.
            NegationNotAppliedError: a window needs progress, which is unknown, or a policy names a
                concept that has been removed.
        """
        self._calls += 1
        if self._slots_version != self.bank.version:
            self._rebuild()
        self._allocate(batch, device)
        for policy in self._policies or ():
            for name in policy.concepts if policy is not None else ():
                if name not in self.bank:
                    raise NegationNotAppliedError(f"concept {name!r} was removed from the bank")
        requests = self._row_requests(batch, guided)
        key = (batch, requests, self._policies, self._slots_version, device)
        if key != self._rows_of:
            self._write_rows(requests)
            self._rows_of = key
        self._write_schedule(progress)
        return bool(self._entries)

    def begin_call(self, batch: int) -> None:
        """Give every layer its tokens for `batch` rows."""
        for layer in self.layers.values():
            layer.tokens = layer.last = self._tokens(layer, batch)

    def end_call(self) -> None:
        """Take them away: a denoiser call that nobody prepared must not use the rows of another."""
        self.live = False
        for layer in self.layers.values():
            layer.tokens = None

    def _tokens(self, layer: Layer, batch: int) -> ConceptTokens:
        """Tokens of `layer`; the same object while nothing changes place or shape."""
        assert layer.key is not None and layer.value is not None
        assert self._index is not None and self._numbers is not None
        slots = self._slots
        index = self._index[: self._index.shape[0] - 2 * self.max_batch + batch]
        old = layer.last
        if (
            old is not None
            and old.key is layer.key
            and old.numbers is self._numbers
            and old.index.data_ptr() == index.data_ptr()
            and old.index.shape == index.shape
        ):
            return old
        return ConceptTokens(
            key=layer.key,
            value=layer.value,
            index=index,
            numbers=self._numbers,
            entries=self._numbers.shape[0],
            concepts=len(slots.slots),
            longest=slots.longest,
            busiest=len(slots.slots),
            token_weight=self._weight,
        )

    def observe(self, layer: str, statistics: Statistics) -> None:
        """Hand the statistics of one call to the observer."""
        assert self.observer is not None
        acting = tuple(entry for entry in self._entries if self._active[entry[0]])
        asked = tuple(dict.fromkeys((row, concept) for _, row, concept in self._entries))
        self.observer(Record(layer, statistics, acting, asked, self._requests, self.call, self.step))

    # ---- rows -------------------------------------------------------------------------------

    def _row_requests(self, batch: int, guided: Callable[[], bool]) -> tuple[int | None, ...]:
        """The request of each row, None where the row is not negated."""
        if self._policies is None or not self.armed:
            return (None,) * batch
        if self._explicit is not None:
            rows, conditional = self._explicit
            if len(rows) != batch:
                raise RowMapError(f"the denoiser got {batch} rows, set_rows described {len(rows)}")
            return tuple(r if c else None for r, c in zip(rows, conditional))
        halves = 2 if guided() else 1
        images, rest = divmod(batch, halves)
        per_request, uneven = divmod(images, len(self._policies))
        if rest or uneven or not per_request:
            raise RowMapError(
                f"the denoiser got {batch} rows ({'with' if halves == 2 else 'without'} classifier-free "
                f"guidance), which {len(self._policies)} requests cannot fill evenly"
            )
        # Unconditional rows come first; images of one prompt are adjacent.
        conditional_rows = [i // per_request for i in range(images)]
        return (None,) * (images * (halves - 1)) + tuple(conditional_rows)

    def _rebuild(self) -> None:
        old = getattr(self, "_slots", None)
        self._slots = Slots(self.bank, self.rule)
        self._slots_version = self.bank.version
        if old is None or old.shape != self._slots.shape:
            self._index = self._numbers = self._weight = None
        elif self._weight is not None and self._slots.weight is not None:
            self._weight.copy_(self._slots.weight)

    def _allocate(self, batch: int, device: torch.device) -> None:
        if batch > 2 * self.max_batch:
            raise RowMapError(
                f"the denoiser got {batch} rows: this engine was installed with max_batch={self.max_batch}, "
                f"which allows {2 * self.max_batch}"
            )
        if self._index is not None and self._index.device == device:
            return
        slots = len(self._slots.slots)
        entries = self.max_batch * 2 * slots
        sizes = entries + 2 * slots + 2 * self.max_batch + 1
        with torch.inference_mode(False):
            self._numbers = torch.zeros(entries, COLUMNS, device=device)
            self._weight = None if self._slots.weight is None else self._slots.weight.clone().to(device)
            self._index = torch.zeros(sizes, dtype=torch.int32, device=device)
        self._rows_of = None

    def _write_rows(self, requests: tuple[int | None, ...]) -> None:
        assert self._index is not None and self._numbers is not None
        slots = self._slots.slots
        concepts: list[int] = []
        numbers: list[list[float]] = []
        offsets = [0]
        entries: list[tuple[int, int, str]] = []
        entry_policies: list[Policy] = []
        for b, request in enumerate(requests):
            policy = self._policies[request] if request is not None and self._policies is not None else None
            for s, slot in enumerate(slots):
                strength = policy.concepts.get(slot.concept, 0.0) if policy is not None else 0.0
                if policy is None or strength == 0.0:
                    continue
                given = {"strength": strength * self.rule.strength, "active": 0.0}
                if policy.threshold is not None:
                    given["threshold"] = policy.threshold
                entries.append((len(concepts), b, slot.concept))
                entry_policies.append(policy)
                concepts.append(s)
                numbers.append(entry_numbers(f"policy of request {request}", given))
            offsets.append(len(concepts))
        capacity = self._numbers.shape[0]
        offsets += [len(concepts)] * (2 * self.max_batch + 1 - len(offsets))
        index = concepts + [0] * (capacity - len(concepts))
        index += [s.begin for s in slots] + [s.length for s in slots] + offsets
        table = torch.zeros(capacity, COLUMNS)
        if numbers:
            table[: len(numbers)] = torch.tensor(numbers)
        self._index.copy_(torch.tensor(index, dtype=torch.int32))
        self._numbers.copy_(table)
        self._requests, self._entries, self._entry_policies = requests, tuple(entries), entry_policies
        self._active: list[float] = [0.0] * len(entries)

    def _write_schedule(self, progress: float | None) -> None:
        assert self._numbers is not None
        stop = self.rule.stop
        if progress is None and not all(p.always(stop) for p in self._entry_policies):
            raise NegationNotAppliedError(
                "a policy has a start/stop window, but the progress of the denoising is unknown: the "
                "timestep is not one of the scheduler's"
            )
        active = [p.active(progress or 0.0, stop) for p in self._entry_policies]
        if active != self._active:
            column = torch.tensor(active, device=self._numbers.device)
            self._numbers[: len(active), NUMBERS.index("active")] = column
            self._active = active
        self.live = any(active)

    def __getstate__(self) -> dict[str, object]:  # a copy is not installed and not observed
        return {**self.__dict__, "observer": None, "_remove": None, "_thread": None}
