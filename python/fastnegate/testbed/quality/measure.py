# SPDX-License-Identifier: Apache-2.0
"""Methods on the suites of a host's world, drawn where that is not done yet, judged and scored."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from ...engine.errors import UnsupportedModelError
from ...integrations.diffusers.contract import denoisers
from ..cases import Case
from ..model import DEFAULT_STEPS
from ..verdict import Verdict
from .lines import Cases, Lines, Price, Run
from .methods import METHODS, Method, Numbers, Value, method_of
from .scores import Row, score
from .stage import BATCH, Stage, noise_of

PICTURES = 8
"""That are drawn together when a method's price is measured."""


@dataclass(frozen=True)
class Plan:
    """What is to be measured.

    Args:
        suites: of the host's world; empty: all.
        cases: of each suite, at least 1.
        seed: of the cases and of the noise, 0 to 2**32 - 1.
        split: "test", or "development", which methods are tuned on.
    """

    suites: tuple[str, ...] = ()
    cases: int = 64
    seed: int = 0
    split: str = "test"


class _Job(NamedTuple):
    suite: str
    number: int
    case: Case[Any]


class Contest:
    """Methods on the same cases of a stage.

    Args:
        stage: the host.
        plan: the cases.
        lines: what is known already, and where verdicts are kept.
        expect, on_step: told how many denoising steps come, and of each one, with what is going on.

    Raises:
        ValueError: a suite that the world has not, or a number out of its range.
    """

    def __init__(
        self,
        stage: Stage,
        plan: Plan,
        lines: Lines,
        expect: Callable[[int], None] = lambda _: None,
        on_step: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._stage, self._plan, self._lines = stage, plan, lines
        self._expect, self._on_step = expect, on_step
        suites = plan.suites or stage.world.SUITES
        self._drawn: Mapping[str, list[Case[Any]]] = {
            name: stage.world.suite(name, plan.cases, plan.seed, split=plan.split) for name in suites
        }

    def row(
        self, name: str, numbers: Numbers | None = None, *, price: bool = False, tuned: bool = False
    ) -> Row:
        """A method, with numbers in place of its own, against none.

        Args:
            name: of one of `METHODS`.
            numbers: some of those that it is tuned in.
            price: also measure what it costs.
            tuned: what the row says of the numbers.

        Raises:
            ValueError: another method or number.
        """
        method, numbers = method_of(name), dict(numbers or {})
        method.check(numbers)
        try:
            after = self._verdicts(method, numbers)
            cost = self._price(method, numbers) if price else None
        except UnsupportedModelError as error:
            return Row(name, numbers, tuned, refused=str(error))
        before = self._verdicts(METHODS["none"], {})
        scores = (
            score(suite, not any(case.goes for case in cases), after[suite], before[suite])
            for suite, cases in self._drawn.items()
        )
        return Row(name, numbers, tuned, tuple(scores), cost)

    def _run(self, method: Method, numbers: Numbers) -> Run:
        return Run.of(self._stage.host, self._stage.guidance, method.name, numbers)

    def _verdicts(self, method: Method, numbers: dict[str, Value]) -> dict[str, list[Verdict]]:
        """Of all cases of each suite; those that are missing are drawn."""
        run, found, jobs = self._run(method, numbers), {}, []
        for suite, cases in self._drawn.items():
            found[suite] = self._lines.verdicts(
                run, self._cases(suite), partial(self._fingerprint, method, suite)
            )
            jobs += [_Job(suite, i, case) for i, case in enumerate(cases) if i not in found[suite]]
        batches = list(_batches(method, jobs))
        self._expect(len(batches) * DEFAULT_STEPS)
        for batch in batches:
            label = f"{method.name} on {', '.join(dict.fromkeys(job.suite for job in batch))}"
            images = self._stage.draw(
                method,
                numbers,
                [job.case for job in batch],
                [noise_of(self._plan.seed, job.number, self._plan.split) for job in batch],
                partial(self._on_step, label),
            )
            new: dict[str, dict[int, Verdict]] = {}
            for job, image in zip(batch, images):
                new.setdefault(job.suite, {})[job.number] = self._stage.world.judge(image, job.case)
            for suite, verdicts in new.items():
                self._lines.add(
                    run, self._cases(suite), verdicts, self._fingerprint(method, suite, list(verdicts))
                )
                found[suite].update(verdicts)
        return {suite: [found[suite][i] for i in range(len(cases))] for suite, cases in self._drawn.items()}

    def _cases(self, suite: str) -> Cases:
        return Cases(suite, self._plan.split, self._plan.seed)

    def _fingerprint(self, method: Method, suite: str, numbers: Sequence[int]) -> str:
        return self._stage.fingerprint([self._case(suite, number) for number in numbers], method.learns)

    def _case(self, suite: str, number: int) -> Case[Any]:
        """A suite's cases do not depend on how many are asked for; lines may have more than this plan."""
        cases = self._drawn[suite]
        if number >= len(cases):
            cases = self._stage.world.suite(suite, number + 1, self._plan.seed, split=self._plan.split)
        return cases[number]

    def _price(self, method: Method, numbers: dict[str, Value]) -> Price:
        """Measured on one case, so that methods that take a concept at a time are not at a disadvantage."""
        known = self._lines.price(run := self._run(method, numbers))
        if known is not None:
            return known
        case = next(iter(self._drawn.values()))[0]
        ends: list[float] = []
        self._expect(DEFAULT_STEPS)

        def on_step() -> None:
            ends.append(time.process_time())  # other programs do not count
            self._on_step(f"{method.name}: price")

        with _rows(self._stage) as rows:
            self._stage.draw(method, numbers, [case] * PICTURES, range(PICTURES), on_step)
        steps = [after - before for before, after in pairwise(ends)]
        passes = sum(rows) / (PICTURES * DEFAULT_STEPS)
        price = Price(passes, round(1e3 * statistics.median(steps), 2), PICTURES, processor())
        self._lines.add_price(run, price)
        return price


def _batches(method: Method, jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
    """At most BATCH together; of one concept, where the method cannot tell the rows of a batch apart."""
    groups: dict[Any, list[_Job]] = {}
    for job in jobs:
        groups.setdefault(None if method.mixed else (job.case.concepts, job.case.given), []).append(job)
    for group in groups.values():
        for first in range(0, len(group), BATCH):
            yield group[first : first + BATCH]


@contextmanager
def _rows(stage: Stage) -> Iterator[list[int]]:
    """How many rows each call of the denoiser had."""
    rows: list[int] = []

    def count(_model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample = args[0] if args else kwargs["sample" if "sample" in kwargs else "hidden_states"]
        rows.append(len(sample))

    (model,) = denoisers(stage.pipe).values()
    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


@lru_cache(maxsize=1)
def processor() -> str:
    """What this machine calculates with."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
