# SPDX-License-Identifier: Apache-2.0
"""`fastnegate quality`: methods scored on the embedded model, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..testbed.model import load
from ..testbed.quality import Score, measure, steps
from .progress import progress


def run(
    methods: Sequence[str], suites: Sequence[str], cases: int, seed: int, strength: float, file: Path | None
) -> None:
    """Print a line per method and suite as it is found; write all of them to `file`."""
    scores = []
    with progress("step") as bar:
        bar.expect(steps(methods, suites, cases))
        bar.say(f"{'method':17}{'suite':10}{'cases':>6}{'concept gone':>14}{'rest kept':>11}{'right':>7}")
        for score in measure(load(), methods, suites, cases, seed, strength, bar.step):
            scores.append(asdict(score))
            bar.say(_line(score))
    if file is not None:
        file.write_text(json.dumps(scores, indent=2) + "\n")


def _line(score: Score) -> str:
    gone, kept, right = (f"{100 * share:.0f} %" for share in (score.gone, score.kept, score.right))
    return f"{score.method:17}{score.suite:10}{score.cases:6}{gone:>14}{kept:>11}{right:>7}"
