# SPDX-License-Identifier: Apache-2.0
"""`Ledger`: what became of the policies that were set, and the words about it at the end."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from ...operator.rule import Rule
from ...operator.statistics import Statistics
from ..concepts import Snapshot
from ..errors import NegationNotAppliedError
from .proof import Proof
from .rows import Assignment, Rows

log = logging.getLogger("fastnegate")


class Ledger:
    """An assignment, and which of its requests were served. It belongs to a batch, or to everybody."""

    def __init__(self, assignment: Assignment, ends: bool = False) -> None:
        self.assignment = assignment
        self.ends = ends  # with its batch, rather than when something else is set for everybody
        self.calls = 0  # of the denoiser
        self._steps = 0  # of pipeline calls
        self._bank: Snapshot | None = None  # that the last of them read
        self._acted: Counter[tuple[int, str, bool]] = Counter()  # (request, concept, whether a text) -> steps
        self._counting = threading.Lock()  # a batch may be carried into several threads
        self._lost: list[Callable[[], str | None]] = []
        self._gates: dict[tuple[int, str], Tensor] = {}  # the largest that sampled steps had

    def note(
        self,
        bank: Snapshot,
        rows: Rows | None,
        acting: tuple[float, ...],
        negated: bool,
        new: Callable[[object], bool],
    ) -> None:
        """A denoiser call has ended without an error.

        Args:
            bank: what it read.
            rows: of it; None: nobody asked for anything.
            acting: the schedule value of each of their entries.
            negated: whether some layer took the negated path.
            new: whether something is noted for the first time at this step, which may have several calls.
        """
        entries = () if rows is None or not negated else zip(rows.entries, acting)
        acted = {
            (entry.request, entry.concept, rows.slots.slots[entry.slot].text)
            for entry, active in entries
            if rows is not None and active
        }
        with self._counting:
            self.calls += 1
            self._bank = bank
            self._steps += new(self)
            self._acted.update(key for key in acted if new((self, key)))

    def proofs(self, rule: Rule) -> tuple[Proof, ...]:
        """What negation did for each request so far."""
        with self._counting:
            bank, steps, acted = self._bank, self._steps, dict(self._acted)
        digest = "" if bank is None else bank.digest
        return tuple(
            Proof(
                rule=rule.name,
                bank=digest,
                steps=steps,
                concepts={c: n for (r, c, text), n in acted.items() if r == request and not text},
                negative_prompt=sum(n for (r, _, text), n in acted.items() if r == request and text),
            )
            for request in range(len(self.assignment.policies))
        )

    def ask_at_the_end(self, lost: Callable[[], str | None]) -> None:
        """Whether a pipeline call lost its negation on the way is known at the end: a reason, or None."""
        self._lost.append(lost)

    def note_gates(self, rows: Rows, acting: tuple[float, ...], statistics: Statistics) -> None:
        """One layer's gates, of a call that is sampled; nothing waits for the device."""
        largest = statistics.gate_max
        for i, (entry, active) in enumerate(zip(rows.entries, acting)):
            if active:
                key, gate = (entry.request, entry.concept), largest[i]
                self._gates[key] = torch.maximum(self._gates[key], gate) if key in self._gates else gate

    def settle(self, rule: Rule) -> None:
        """At the end: raise for requests that asked and got nothing; log gates that never opened.

        Raises:
            NegationNotAppliedError: no denoiser call came by, or none within a policy's window.
        """
        if self.assignment.asks and not self.calls:
            raise NegationNotAppliedError(
                "no denoiser call came by within the batch: is this the pipeline, with the denoiser, that "
                "the engine was installed in? Threads and executors do not copy the context: use batch.bind"
            )
        acted = {request for request, _, _ in self._acted}
        for request, policy in enumerate(self.assignment.policies):
            if policy is not None and policy.asks and request not in acted:
                stop = rule.stop if policy.stop is None else policy.stop
                raise NegationNotAppliedError(
                    f"policies[{request}] never acted: no step that ran lies in its window, {policy.start:g} "
                    f"to {stop:g}, or no attention layer ran at one that does"
                )
        for reason in filter(None, (lost() for lost in self._lost)):
            raise NegationNotAppliedError(reason)
        self.log_closed_gates(rule)

    def log_closed_gates(self, rule: Rule) -> None:
        """A concept that no query resembled was not removed, which may be right: it may not be there."""
        for (request, concept), gate in sorted(self._gates.items(), key=lambda item: item[0]):
            if float(gate) <= 0:
                log.warning(
                    "concept %r of request %d: its gate opened for no query at the steps that were looked "
                    "at, so nothing was removed; if the concept is in the picture, lower the threshold of "
                    "rule %r or describe the concept by other members",
                    concept,
                    request,
                    rule.name,
                )
