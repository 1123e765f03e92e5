# SPDX-License-Identifier: Apache-2.0
"""Scores: what became of a suite under a method, beside what becomes of it without, as numbers and tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..verdict import Verdict
from .intervals import Share, difference, share
from .lines import Price
from .methods import Value


@dataclass(frozen=True)
class Score:
    """A method on a suite, paired with the same prompts and noise without negation.

    All but `malformed` is judged by both detectors: the first of a pair is hard on the method, the second
    lenient (see `testbed.Verdict`).

    Args:
        suite: its name.
        benign: nothing should go in its cases; then `gone` says nothing.
        gone: none of the concepts is seen.
        kept: all that should stay is seen, of the cases in which the host draws that without negation.
        right: both, of all cases.
        gain: `right` less `right` without negation; where nothing should go, its negative is the benign loss.
        malformed: pictures with an object that the loose detector has no name for, less those without
            negation.
    """

    suite: str
    benign: bool
    gone: tuple[Share, Share]
    kept: tuple[Share, Share]
    right: tuple[Share, Share]
    gain: tuple[Share, Share]
    malformed: Share


@dataclass(frozen=True)
class Row:
    """A method on all suites, or the reason why there is none.

    Args:
        method: its name.
        numbers: in place of its own.
        tuned: whether they were found on the development split.
        scores: of each suite; empty where it does not fit the host.
        price: what it costs.
        refused: why it does not fit.
    """

    method: str
    numbers: Mapping[str, Value]
    tuned: bool = False
    scores: tuple[Score, ...] = ()
    price: Price | None = None
    refused: str = ""

    @property
    def objective(self) -> float:
        """What methods are tuned for: the mean of `right` over suites in which something should go, less the
        mean benign loss over the others."""
        right = [score.right[0].value for score in self.scores if not score.benign]
        gain = [score.gain[0].value for score in self.scores if score.benign]
        return _mean(right) + _mean(gain)


def score(suite: str, benign: bool, after: Sequence[Verdict], before: Sequence[Verdict]) -> Score:
    """Of verdicts on the same cases with and without negation."""
    return Score(
        suite,
        benign,
        (share([v.gone for v in after]), share([v.lenient_gone for v in after])),
        (
            share([v.kept for v, plain in zip(after, before) if plain.kept]),
            share([v.lenient_kept for v, plain in zip(after, before) if plain.lenient_kept]),
        ),
        (share([v.right for v in after]), share([v.lenient_right for v in after])),
        (
            difference([v.right for v in after], [v.right for v in before]),
            difference([v.lenient_right for v in after], [v.lenient_right for v in before]),
        ),
        difference([v.malformed > 0 for v in after], [v.malformed > 0 for v in before]),
    )


def overview(rows: Iterable[Row]) -> str:
    """A Markdown table of methods and suites: `right` in per cent, strict."""
    rows = list(rows)
    suites = list(dict.fromkeys(score.suite for row in rows for score in row.scores))
    head = ["method", *suites, "objective", "passes", "CPU ms a step"]
    body = []
    for row in rows:
        found = {score.suite: score for score in row.scores}
        cells = [_percent(found[s].right[0].value) if s in found else "" for s in suites]
        price = ["", ""] if row.price is None else [f"{row.price.passes:g}", f"{row.price.ms:.0f}"]
        body.append([named(row), *cells, f"{100 * row.objective:.0f}" if found else "", *price])
    return table(head, body)


def details(rows: Iterable[Row], suite: str) -> str:
    """A Markdown table of methods on a suite: strict, the interval, and in brackets what the lenient pair of
    detectors says, in per cent."""
    head = ["method", "cases", "gone", "kept", "right", "more right than without", "more malformed"]
    body = []
    for row in rows:
        if row.refused:
            body.append([named(row), f"does not fit: {row.refused}", *[""] * 5])
        for found in row.scores:
            if found.suite == suite:
                gone = "" if found.benign else _pair(*found.gone)
                cells = [gone, _pair(*found.kept), _pair(*found.right), _pair(*found.gain)]
                body.append([named(row), str(found.right[0].cases), *cells, _interval(found.malformed)])
    return table(head, body)


def named(row: Row) -> str:
    """The method, and whether it is tuned."""
    return f"{row.method}, tuned" if row.tuned else row.method


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table, padded so that it reads as plain text too."""
    lines = [[*head], *map(list, body)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def _pair(strict: Share, lenient: Share) -> str:
    return f"{_interval(strict)} ({_percent(lenient.value)})"


def _interval(found: Share) -> str:
    return f"{_percent(found.value)} [{_percent(found.low)}, {_percent(found.high)}]"


def _percent(value: float) -> str:
    return f"{100 * value:.0f}".replace("-0", "0") if abs(value) < 0.005 else f"{100 * value:.0f}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
