# SPDX-License-Identifier: Apache-2.0
"""`Engine`: whose policies a denoiser call gets, and the rows that its layers read.

It knows no pipeline. An integration runs each denoiser call within `running`, telling it what it knows of the
call; layers read what that yields. Whose policies: the batch of the calling context, else what was set for
everybody, else none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

from ..operator.rule import Rule
from ..operator.statistics import Statistics
from .bank import ConceptBank
from .concepts import Concept
from .errors import NegationNotAppliedError, RowMapError
from .policy import Policy
from .session.batch import Batch, current
from .session.call import RUNNING, Call, Loop, Record, Running
from .session.fixed import Fixed
from .session.ledger import Ledger
from .session.proof import Proof
from .session.requests import Unasked, checked
from .session.rows import Assignment, Rows
from .session.slots import Shelf


class Engine:
    """Per-request negation for every attention layer of one denoiser.

    Args:
        bank: the concepts.
        rule: `Rule` for all requests.
        layers: names of the cross-attention layers.
        max_batch: the most images in one call; the denoiser may see twice as many rows
            (classifier-free guidance).
        unasked: what becomes of a call that nobody spoke for, with a batch or for everybody: `plain`
            (it runs without negation, which is logged once) or `raise`.
        encode: makes the concept of a negative prompt (`Policy.negative_prompt`).
        check_text: raises ValueError for one that `encode` would refuse.
        encoder_state: what `encode` depends on besides the text; while it stays, a text is encoded once.

    Raises:
        ValueError: an empty bank without `encode`, a concept without the tokens that the rule reads, or
            another argument that is not as above.
    """

    def __init__(
        self,
        bank: ConceptBank,
        rule: Rule,
        layers: Sequence[str],
        *,
        max_batch: int = 8,
        unasked: str = "plain",
        encode: Callable[[str], Concept] | None = None,
        check_text: Callable[[str], None] = lambda text: None,
        encoder_state: Callable[[], Hashable] = lambda: None,
    ) -> None:
        if isinstance(max_batch, bool) or not isinstance(max_batch, int) or max_batch < 1:
            raise ValueError(f"max_batch={max_batch!r}: must be an int >= 1")
        if not len(bank) and encode is None:
            raise ValueError("bank is empty: there is nothing to negate")
        self.bank, self.rule, self.max_batch = bank, rule, max_batch
        self._unasked = Unasked(unasked)
        self.name_layers(layers)
        self.observer: Callable[[Record], None] | None = None
        self._audits: tuple[Callable[[Record], None], ...] = ()
        self.call = 0  # pipeline calls that asked for negation
        self.step: int | None = None  # of the last of them
        self.fixed = Fixed()
        self.taught = False  # a call that asked for negation had gradients
        self.riding = 0  # denoiser calls at work in whose text concepts ride
        self._shelf = Shelf(bank, rule, encode, check_text, encoder_state, max_batch)
        self._rows: Rows | None = None  # of the last call
        self._everybody: Ledger | None = None
        self._last: Ledger | None = None
        self._removed = False
        self._remove: Callable[[], None] | None = None
        self._state = threading.Lock()  # over what is counted here
        self._shelf.slots((), False)  # refuses concepts without the tokens that the rule reads

    # ---- what callers use -------------------------------------------------------------------

    def batch(self, policies: Sequence[Policy | None]) -> Batch:
        """A context in which pipeline calls are for these requests: one policy, or None, per prompt. Images
        of one prompt share its policy, so a single policy serves any number of images. None asks for nothing.

        Batches nest, may be open in many threads and coroutines at once, and go before what is set for
        everybody. `Batch.run` and `Batch.bind` carry one into other threads.

        Raises:
            RowMapError: more policies than `max_batch`.
            ValueError: a concept that the bank does not have, or a window or threshold with which
                the rule could not act.
            TypeError: something else than policies.
            NegationNotAppliedError: the engine was removed; or, when the context is left without an error, a
                request asked for negation and no denoiser call came by, or none within its window.
        """
        batch = Batch(self, self.rule, self._assignment(policies))
        if batch.ledger.assignment.asks:
            batch.ledger.ask_at_the_end(
                lambda: "the engine was removed within the batch" * self._removed or None
            )
        return batch

    def check(self, policy: Policy | None, steps: int | None = None) -> None:
        """Raise what would stop a batch with this request, before it is in one: nothing is encoded, and
        nothing changes. How many tokens `max_tokens` of `install` leaves for concepts is not looked at.

        Args:
            policy: of the request.
            steps: of the schedule that it will run, if known: refuses a window that holds none of them.

        Raises:
            ValueError: a concept that the bank does not have now, a window, threshold or strength with which
                the rule could not act, or a negative prompt that cannot be encoded.
            TypeError: something else than a policy.
            NegationNotAppliedError: the engine was removed.
        """
        self._policies([policy])
        if policy is not None:
            self._shelf.check_text(policy)
            policy.check(self.rule, steps)

    def replace_bank(self, bank: ConceptBank) -> None:
        """`ConceptBank.replace` of the engine's bank, after a look at whether its rule reads the new one.

        Raises:
            ValueError, BankMismatchError: it does not, or it is of another model. The engine's bank is as it
                was.
        """
        self._shelf.check_bank(bank)
        self.bank.replace(bank)

    def set_requests(self, policies: Sequence[Policy | None]) -> None:
        """Policies for everybody: calls of any thread that is in no `batch`, until set anew or `clear`.
        Arguments and errors are those of `batch`."""
        self._everybody = Ledger(self._assignment(policies))

    def set_rows(
        self,
        policies: Sequence[Policy | None],
        row_map: Sequence[int | None] | None = None,
        conditional: Sequence[bool] | None = None,
    ) -> None:
        """As `set_requests`, for servers that build the batch of rows themselves.

        Args:
            policies: one policy, or None, per request.
            row_map: the request of each batch row of the denoiser (None: a padding row); default:
                row b is request b.
            conditional: which rows are conditional; only those are negated. Default: all.

        Raises:
            RowMapError: sizes disagree, or a row names a request that does not exist.
        """
        asked = self._policies(policies)
        assignment = Assignment.of_rows(asked, row_map, conditional)
        self._everybody = Ledger(dataclasses.replace(assignment, texts=self._shelf.encode(asked)))

    def loop(self) -> Loop:
        """For servers with a denoising loop of their own: denoiser calls within `with loop:` count as one
        pipeline call. Layers may keep what they make of concepts: weights must not change before it ends."""
        return Loop()

    def clear(self) -> None:
        """Forget what was set for everybody. Batches, and calls that run, keep theirs."""
        self._everybody = None

    def remove(self) -> None:
        """Take the engine out of its pipeline, restoring what was there. Calls that asked for negation and
        still run raise at their end."""
        everybody, self._everybody, self._removed = self._everybody, None, True
        remove, self._remove = self._remove, None
        if remove is not None:
            remove()
        if everybody is not None:
            everybody.log_closed_gates(self.rule)

    @property
    def last(self) -> tuple[Proof, ...]:
        """What negation did for each request of the batch whose denoiser call ended last, in whatever thread:
        servers ask the batch (`Batch.proofs`). For what is set for everybody it counts from then on."""
        return () if self._last is None else self._last.proofs(self.rule)

    @property
    def removed(self) -> bool:
        """Whether `remove` was called."""
        return self._removed

    @property
    def armed(self) -> bool:
        """Whether a call made here and now would ask for negation."""
        try:
            ledger = self.ledger()
        except NegationNotAppliedError:
            return True
        return ledger is not None and ledger.assignment.asks

    @property
    def live(self) -> bool:
        """Whether an entry acts in the denoiser call that runs in this context."""
        running = RUNNING.get()
        return running is not None and running.engine is self and running.live

    def __repr__(self) -> str:
        state = "removed" if self._removed else f"{len(self.layers)} layers"
        return f"Engine({state}, rule {self.rule.name}, {self.bank!r}, max_batch={self.max_batch})"

    def __reduce__(self) -> Any:
        raise TypeError("an Engine belongs to its pipeline: install one in the copy")

    # ---- what integrations use --------------------------------------------------------------

    def name_layers(self, *models: Sequence[str]) -> None:
        """The cross-attention layers, by the model that they are of: models may share the steps of a call."""
        self.models = tuple(tuple(layers) for layers in models)
        self.layers = tuple(layer for layers in self.models for layer in layers)

    def on_remove(self, remove: Callable[[], None]) -> None:
        self._remove = remove

    @contextlib.contextmanager
    def running(self, call: Call) -> Iterator[Running]:
        """The denoiser call `call` runs within this context.

        Raises:
            RowMapError: the batch contradicts the policies.
            NegationNotAppliedError: nobody spoke for the call and `unasked` is `raise`; a window needs
                progress, which is unknown, or holds none of the steps that will run; a policy names a concept
                that has been removed; or the call is made within one that reads the same rows.
        """
        with self.fixed.turn() if call.fixed else contextlib.nullcontext():
            before = RUNNING.get()
            try:
                running = self._prepare(call)
                RUNNING.set(running)
                yield running
                running.note(self.fixed.captured, self.bank.snapshot())
                self._last = running.ledger
            finally:
                RUNNING.set(before)
                if call.fixed:
                    self.fixed.release(call.device)

    def observe(self, running: Running, layer: str, statistics: Statistics) -> None:
        """Take note of what one call of a layer did."""
        if running.sampled:
            assert running.rows is not None and running.ledger is not None
            running.ledger.note_gates(running.rows, running.active, statistics)
        observers = (*self._audits, self.observer)
        if not any(observers):
            return
        record = running.record(layer, statistics)
        for observer in filter(None, observers):
            observer(record)

    def watch(self, audit: Callable[[Record], None]) -> Callable[[], None]:
        """Have `audit` see every record, besides `observer`; returns what ends that."""
        with self._state:
            self._audits = (*self._audits, audit)

        def end() -> None:
            with self._state:
                self._audits = tuple(a for a in self._audits if a is not audit)

        return end

    # ---- whose policies ---------------------------------------------------------------------

    def ledger(self) -> Ledger | None:
        """What a call made here and now would be for; None if nobody spoke for it."""
        batch = current(self)
        return self._everybody if batch is None else batch.ledger

    def _policies(self, policies: Sequence[Policy | None]) -> tuple[Policy | None, ...]:
        """Checked one by one."""
        if self._removed:
            raise NegationNotAppliedError("this engine was removed from its pipeline")
        return checked(policies, self.bank, self.rule, self.max_batch)

    def _assignment(self, policies: Sequence[Policy | None]) -> Assignment:
        """Of pipeline calls, with its negative prompts encoded."""
        asked = self._policies(policies)
        return Assignment(asked, texts=self._shelf.encode(asked))

    # ---- a denoiser call --------------------------------------------------------------------

    def _prepare(self, call: Call) -> Running:
        of = call.of
        ledger = of.ledger if of.pinned else self.ledger()
        self.check_spoken(ledger)
        asks = ledger is not None and ledger.assignment.asks
        if not asks and not call.fixed:
            return Running(self, call, ledger=ledger)
        if call.batch > 2 * self.max_batch:
            raise RowMapError(
                f"the denoiser got {call.batch} rows: this engine was installed with max_batch="
                f"{self.max_batch}, which allows {2 * self.max_batch}"
            )
        assignment = ledger.assignment if ledger is not None and asks else None
        if assignment is not None and call.prompts is not None:
            assignment.expect(call.prompts)
        slots = of.slots
        if slots is None:
            slots = self._shelf.slots(() if assignment is None else assignment.texts, call.fixed)
        if of.pinned:
            of.slots = slots
        requests: tuple[int | None, ...] = (None,) * call.batch
        if assignment is not None and not call.unconditional():
            requests = assignment.requests(call.batch, call.guided, call.conditional_first)
        rows = self._rows = Rows.of(self._rows, assignment, requests, slots, self.rule)
        running = Running(self, call, asks, rows=rows, slots=slots, ledger=ledger)
        self.taught |= asks and running.gradients
        if assignment is not None and ledger is not None:
            if call.step is not None and (of.number is None or call.step.first):
                assignment.check_windows(call.step, self.rule)
            running.active = rows.active(call.step, self.rule.stop)
            running.live = any(running.active)
            running.observed = self.observer is not None or bool(self._audits)
            self._count(running)
        if call.fixed:
            self.fixed.fill(running, 2 * self.max_batch)
        elif running.live:
            running.read(rows.tensors(running.active, call.device))
            running.directions = slots.directions_on(call.device)
        if running.live and running.gradients:
            _ = running.context  # outside of what checkpointing computes again
        return running

    def check_spoken(self, ledger: Ledger | None) -> None:
        """Decide about a call that nobody spoke for: NegationNotAppliedError if `unasked` is `raise`."""
        if ledger is None and not self._removed:
            self._unasked.decide()

    def _count(self, running: Running) -> None:
        """Number the pipeline call, and choose the two of its denoiser calls whose gates are looked at."""
        of, step = running.call.of, running.call.step
        with self._state:
            if of.number is None:
                self.call = of.number = self.call + 1
            self.step = None if step is None else step.index
            running.sampled = self.rule.gate != "open" and running.live and of.sample(step)
