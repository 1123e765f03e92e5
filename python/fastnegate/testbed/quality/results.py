# SPDX-License-Identifier: Apache-2.0
"""Files: rows of a host as tables are made of them, and the numbers that methods were tuned to."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .intervals import Share
from .lines import Price
from .measure import Plan
from .methods import Numbers, method_of
from .scores import Row, Score

_PAIRS = ("gone", "kept", "right", "gain")  # of a score, by both detectors


@dataclass(frozen=True)
class Results:
    """Rows of a host, guided in one way, on the same cases."""

    host: str
    guidance: str
    plan: Plan
    rows: tuple[Row, ...]

    def write(self, file: Path) -> None:
        """Write them as JSON, which `read` reads."""
        file.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, file: Path) -> Results:
        """What was written.

        Raises:
            ValueError: a file of something else.
        """
        try:
            found = json.loads(file.read_text())
            plan = Plan(**{**found["plan"], "suites": tuple(found["plan"]["suites"])})
            return cls(found["host"], found["guidance"], plan, tuple(map(_row, found["rows"])))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} has no rows of methods: {error!r}") from error


def _row(found: dict[str, Any]) -> Row:
    price = None if found["price"] is None else Price(**found["price"])
    return Row(**{**found, "scores": tuple(map(_score, found["scores"])), "price": price})


def _score(found: dict[str, Any]) -> Score:
    pairs = {name: tuple(Share(*one) for one in found[name]) for name in _PAIRS}
    return Score(**{**found, **pairs, "malformed": Share(*found["malformed"])})


class Entry(NamedTuple):
    """A method to be measured, with numbers in place of its own, and whether they are tuned."""

    method: str
    numbers: Numbers
    tuned: bool


def entries(
    methods: Iterable[str], strength: float = 1.0, tuned: Mapping[str, Numbers] | None = None
) -> list[Entry]:
    """Each method with its published numbers, and once more with those that it was tuned to.

    Args:
        methods: names of `METHODS`.
        strength: a factor to the published strengths of those that have one.
        tuned: numbers by method.

    Raises:
        ValueError: another method or number.
    """
    found = []
    for name in methods:
        method = method_of(name)
        scaled = strength != 1.0 and method.strength is not None
        found.append(Entry(name, method.stronger(strength) if scaled else {}, tuned=False))
        if tuned is not None and name in tuned:
            method.check(tuned[name])
            found.append(Entry(name, tuned[name], tuned=True))
    return found


@dataclass(frozen=True)
class Study:
    """What a method was tuned to.

    Args:
        host, guidance, method: where, and what.
        numbers: the best that were tried; empty: the published ones.
        objective: theirs, on the development split.
        published: the published numbers' there.
        trials: how many were tried.
        cases: of each suite, in each trial.
    """

    host: str
    guidance: str
    method: str
    numbers: Numbers
    objective: float
    published: float
    trials: int
    cases: int


def write_studies(file: Path, studies: Sequence[Study]) -> None:
    """Write them as JSON."""
    file.write_text(json.dumps([asdict(study) for study in studies], indent=1) + "\n")


def read_studies(file: Path) -> list[Study]:
    """What was written.

    Raises:
        ValueError: a file of something else.
    """
    try:
        return [Study(**study) for study in json.loads(file.read_text())]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} has no tuned numbers: {error!r}") from error


def numbers_of(studies: Iterable[Study], host: str, guidance: str) -> dict[str, Numbers]:
    """By method, those of a host and its guidance."""
    return {s.method: s.numbers for s in studies if (s.host, s.guidance) == (host, guidance)}
