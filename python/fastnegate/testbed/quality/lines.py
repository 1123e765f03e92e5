# SPDX-License-Identifier: Apache-2.0
"""Verdicts in a file, a line for each suite of a batch, so that nothing is drawn twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..verdict import Verdict
from .methods import Numbers


@dataclass(frozen=True)
class Price:
    """What a method costs on a machine.

    Args:
        passes: rows of the denoiser per picture and step.
        ms: of all cores for a step of `pictures` pictures, the median.
        pictures: that were drawn together.
        machine: its processor.
    """

    passes: float
    ms: float
    pictures: int
    machine: str


class Run(NamedTuple):
    """A method with its numbers, on a host that is guided in one way."""

    host: str
    guidance: str
    method: str
    numbers: str

    @classmethod
    def of(cls, host: str, guidance: str, method: str, numbers: Numbers) -> Run:
        return cls(host, guidance, method, json.dumps(dict(numbers), sort_keys=True))


class Cases(NamedTuple):
    """Where cases are from; their numbers are their places in the suite of this seed."""

    suite: str
    split: str
    seed: int


class _Line(NamedTuple):
    numbers: tuple[int, ...]
    fingerprint: str
    verdicts: tuple[Verdict, ...]


class Lines:
    """A file of JSON lines; None keeps them in memory.

    What is added is in the file at once. A last line that was cut off is dropped.

    Raises:
        OSError: the file cannot be read or written.
        ValueError: it has a line of something else.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._found: dict[tuple[Run, Cases], list[_Line]] = {}
        self._prices: dict[Run, Price] = {}
        if file is None or not file.exists():
            return
        text = file.read_text()
        whole = text[: text.rfind("\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self._take(json.loads(line))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{file}, line {number}: not a line of verdicts: {error!r}") from error
        if whole != text:
            file.write_text(whole)

    def verdicts(
        self, run: Run, cases: Cases, fingerprint: Callable[[Sequence[int]], str]
    ) -> dict[int, Verdict]:
        """What is known, by the numbers of the cases.

        Args:
            fingerprint: of cases by their numbers, as it is now; lines with another one do not count.
        """
        return {
            number: verdict
            for line in self._found.get((run, cases), ())
            if line.fingerprint == fingerprint(line.numbers)
            for number, verdict in zip(line.numbers, line.verdicts)
        }

    def price(self, run: Run) -> Price | None:
        """What it costs, if that is known."""
        return self._prices.get(run)

    def add(self, run: Run, cases: Cases, verdicts: Mapping[int, Verdict], fingerprint: str) -> None:
        """Keep verdicts, by the numbers of their cases; all of the same fingerprint."""
        rows = [[int(value) for value in astuple(verdict)] for verdict in verdicts.values()]
        self._put(
            {
                **run._asdict(), **cases._asdict(), "cases": [*verdicts], "fingerprint": fingerprint,
                "verdicts": rows,
            }
        )  # fmt: skip

    def add_price(self, run: Run, price: Price) -> None:
        """Keep what it costs."""
        self._put({**run._asdict(), "price": asdict(price)})

    def _put(self, line: dict[str, Any]) -> None:
        self._take(line)
        if self._file is not None:
            with self._file.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def _take(self, line: dict[str, Any]) -> None:
        run = Run(*(line[name] for name in Run._fields))
        if "price" in line:
            self._prices[run] = Price(**line["price"])
            return
        found = self._found.setdefault((run, Cases(*(line[name] for name in Cases._fields))), [])
        verdicts = tuple(_verdict(row) for row in line["verdicts"])
        found.append(_Line(tuple(line["cases"]), line["fingerprint"], verdicts))


def _verdict(row: Sequence[int]) -> Verdict:
    gone, kept, right, malformed, *lenient = row
    return Verdict(bool(gone), bool(kept), bool(right), malformed, *map(bool, lenient))
