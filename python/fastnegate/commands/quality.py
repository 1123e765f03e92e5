# SPDX-License-Identifier: Apache-2.0
"""`fastnegate quality`: methods on the testbed's hosts, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..testbed.quality import Contest, Lines, Plan, Row, Stage
from ..testbed.quality.results import Results, entries, numbers_of, read_studies
from ..testbed.quality.scores import details, named, overview
from .progress import progress

QUICK = ("none", "protore"), ("colour", "implicit", "benign"), 16
"""Methods, suites and cases of a first look, in minutes."""


def run(
    host: str,
    guidance: str,
    methods: Sequence[str],
    plan: Plan,
    *,
    strength: float = 1.0,
    tuned: Path | None = None,
    lines: Path | None = None,
    file: Path | None = None,
) -> None:
    """Print a line for each method as it is measured, then the tables; write the rows to `file`.

    Args:
        host, guidance: as `Stage` takes them.
        methods: names of `METHODS`.
        plan: the cases.
        strength: a factor to the published strengths.
        tuned: a file of tuned numbers; a method that has some there gets a second row.
        lines: verdicts that are known already, and where new ones are added.
        file: for the rows, as JSON.

    Raises:
        ValueError: a name or number that is not allowed, or a file of something else; before any drawing.
    """
    studies = [] if tuned is None else read_studies(tuned)
    wanted = entries(methods, strength, numbers_of(studies, host, guidance))
    known = Lines(lines)
    rows: list[Row] = []
    with progress("step") as bar:
        contest = Contest(Stage(host, guidance), plan, known, bar.expect, bar.step)
        for entry in wanted:
            rows.append(contest.row(entry.method, entry.numbers, price=True, tuned=entry.tuned))
            bar.say(_line(rows[-1]))
    print(f"\nright, in per cent\n\n{overview(rows)}")
    for suite in dict.fromkeys(score.suite for row in rows for score in row.scores):
        print(f"\n{suite}\n\n{details(rows, suite)}")
    if file is not None:
        Results(host, guidance, plan, tuple(rows)).write(file)


def _line(row: Row) -> str:
    if row.refused:
        return f"{named(row)}: does not fit: {row.refused}"
    right = ", ".join(f"{score.suite} {100 * score.right[0].value:.0f} %" for score in row.scores)
    return f"{named(row)}: right in {right}"
