# SPDX-License-Identifier: Apache-2.0
"""`Assignment` and `Rows`: policies of requests -> which batch row negates what. Pure functions of values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...operator.rule import Rule
from ...operator.tokens import COLUMNS, NUMBERS
from ..concepts import Concept
from ..errors import NegationNotAppliedError, RowMapError
from ..policy import Policy
from .slots import Slots

ACTIVE = NUMBERS.index("active")
# Of `ConceptTokens`: index, numbers, token weights and neutral concepts.
Read = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Step:
    """Step `index` of the schedule's `count`; `run` are those that this pipeline call runs, if known."""

    index: int
    count: int
    run: range | None = None

    @property
    def progress(self) -> float:
        return self.index / self.count

    @property
    def first(self) -> bool:
        return self.run is not None and self.index == self.run.start


@dataclass(frozen=True, eq=False)
class Assignment:
    """Policies, one per request, and, where a server builds the batch itself, whose each row is."""

    policies: tuple[Policy | None, ...]
    row_map: tuple[int | None, ...] | None = None  # None: the rows of a pipeline call
    conditional: tuple[bool, ...] = ()
    texts: tuple[tuple[str, Concept], ...] = ()  # negative prompts, each once, as they were encoded for it

    @classmethod
    def of_rows(
        cls,
        policies: Sequence[Policy | None],
        row_map: Sequence[int | None] | None,
        conditional: Sequence[bool] | None,
    ) -> Assignment:
        """See `Engine.set_rows`."""
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
        return cls(tuple(policies), rows, mask)

    @property
    def asks(self) -> bool:
        """Whether some policy asks for negation."""
        return any(policy is not None and policy.asks for policy in self.policies)

    def expect(self, prompts: int) -> None:
        """Raise RowMapError unless the policies fit a pipeline call of that many prompts."""
        if self.row_map is None and len(self.policies) not in (1, prompts):
            raise RowMapError(f"{prompts} prompts, but {len(self.policies)} policies: must be 1 or as many")

    def requests(
        self, batch: int, guided: Callable[[], bool], conditional_first: bool = False
    ) -> tuple[int | None, ...]:
        """The request of each of `batch` rows, None where the row is not negated.

        Args:
            guided: whether the rows are [unconditional, conditional] halves; asked only when needed.
            conditional_first: whether they are the other way round.

        Raises:
            RowMapError: the batch contradicts the policies.
        """
        if self.row_map is not None:
            if len(self.row_map) != batch:
                raise RowMapError(f"the denoiser got {batch} rows, set_rows described {len(self.row_map)}")
            return tuple(r if c else None for r, c in zip(self.row_map, self.conditional))
        if not self.asks:
            return (None,) * batch
        halves = 2 if guided() else 1
        images, rest = divmod(batch, halves)
        per_request, uneven = divmod(images, len(self.policies))
        if rest or uneven or not per_request:
            raise RowMapError(
                f"the denoiser got {batch} rows ({'with' if halves == 2 else 'without'} classifier-free "
                f"guidance), which {len(self.policies)} requests cannot fill evenly"
            )
        unconditional = (None,) * (images * (halves - 1))
        conditional = tuple(i // per_request for i in range(images))  # images of one prompt are adjacent
        return conditional + unconditional if conditional_first else unconditional + conditional

    def check_windows(self, step: Step, rule: Rule) -> None:
        """Raise NegationNotAppliedError if a policy cannot act at any of the steps that will run."""
        for request, policy in enumerate(self.policies):
            if policy is None or not policy.asks or step.run is None:
                continue
            if not any(policy.active(i / step.count, rule.stop) for i in step.run):
                stop = rule.stop if policy.stop is None else policy.stop
                raise NegationNotAppliedError(
                    f"policies[{request}] could never act: its window, {policy.start:g} to {stop:g}, holds "
                    f"none of the {len(step.run)} steps that run, {step.run[0] / step.count:g} to "
                    f"{step.run[-1] / step.count:g} of the denoising"
                )


class Entry(NamedTuple):
    """A batch row negates a slot, with these numbers."""

    row: int
    slot: int
    concept: str
    request: int
    policy: Policy
    numbers: list[float]  # `active` is written step by step


class Rows:
    """What the rows of one batch negate. Nobody changes it."""

    @classmethod
    def of(
        cls,
        last: Rows | None,
        assignment: Assignment | None,
        requests: tuple[int | None, ...],
        slots: Slots,
        rule: Rule,
    ) -> Rows:
        """New ones, or the last ones if they say the same."""
        same = last is not None and last.assignment is assignment and last.slots is slots
        if same and last is not None and last.requests == requests:
            return last
        return cls(assignment, requests, slots, rule)

    def __init__(
        self, assignment: Assignment | None, requests: tuple[int | None, ...], slots: Slots, rule: Rule
    ) -> None:
        self.assignment, self.requests, self.slots = assignment, requests, slots
        self.entries: list[Entry] = []
        self._made: dict[tuple[tuple[float, ...], torch.device], Read] = {}
        self.offsets = [0]
        for policy in assignment.policies if assignment is not None else ():
            for name in policy.concepts if policy is not None else ():
                if name not in slots.names:
                    raise NegationNotAppliedError(f"concept {name!r} was removed from the bank")
        for row, request in enumerate(requests):
            policy = assignment.policies[request] if assignment is not None and request is not None else None
            for i, slot in enumerate(slots.slots if policy is not None else ()):
                assert policy is not None and request is not None
                strength = policy.concepts.get(slot.concept, 0.0)
                if slot.text:
                    strength = policy.negative_strength if slot.concept == policy.text else 0.0
                if strength == 0.0 or slot.length == 0:
                    continue
                numbers = policy.numbers(f"policy of request {request}", strength, rule)
                self.entries.append(Entry(row, i, slot.concept, request, policy, numbers))
            self.offsets.append(len(self.entries))

    def active(self, step: Step | None, stop: float) -> tuple[float, ...]:
        """The schedule value of each entry at this step.

        Raises:
            NegationNotAppliedError: the step is not known, and some entry has a window.
        """
        if step is None and not all(entry.policy.always(stop) for entry in self.entries):
            raise NegationNotAppliedError(
                "a policy has a start/stop window, but the progress of the denoising is unknown: the "
                "timestep is not one of the scheduler's (as it is in float32)"
            )
        return tuple(e.policy.active(0.0 if step is None else step.progress, stop) for e in self.entries)

    def tensors(self, active: tuple[float, ...], device: torch.device) -> Read:
        """What `ConceptTokens` of these rows alone have; the same tensors each time. Nobody changes them:
        calls in other threads may be reading them."""
        made = self._made.get((active, device))
        if made is None:
            batch, weight = len(self.requests), self.slots.weight
            entries = batch * len(self.slots.slots)
            with torch.inference_mode(False):  # later calls may be outside of it
                index = self.index(entries, batch).to(device)
                numbers = self.numbers(active, entries).to(device)
                neutral = self.neutral(batch)
                weight, neutral = (None if t is None else t.to(device) for t in (weight, neutral))
                made = index, numbers, weight, neutral
            self._made[active, device] = made
        return made

    def index(self, entries: int, batch: int) -> Tensor:
        """`ConceptTokens.index` with room for so many entries and rows."""
        concepts = [e.slot for e in self.entries]
        offsets = self.offsets + [len(concepts)] * (batch + 1 - len(self.offsets))
        slots = self.slots.slots
        begins, lengths = [s.begin for s in slots], [s.length for s in slots]
        index = concepts + [0] * (entries - len(concepts)) + begins + lengths + offsets
        return torch.tensor(index, dtype=torch.int32)

    def neutral(self, batch: int) -> Tensor | None:
        """`ConceptTokens.neutral` for so many rows; rows without entries do not read it."""
        slot = self.slots.neutral
        return None if slot is None else torch.full((batch,), slot, dtype=torch.int32)

    def numbers(self, active: tuple[float, ...], entries: int) -> Tensor:
        """`ConceptTokens.numbers` with room for so many entries."""
        table = torch.zeros(entries, COLUMNS)
        if self.entries:
            table[: len(self.entries)] = torch.tensor([e.numbers for e in self.entries])
            table[: len(self.entries), ACTIVE] = torch.tensor(active)
        return table
