# SPDX-License-Identifier: Apache-2.0
"""Does centring help? A method without it and with neutral tokens of several kinds, over its numbers:

    python -m benchmarks.quality.centre --host easy --out centre.jsonl

Each setting is a line of the file as soon as it is measured; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastnegate.commands.options import whole
from fastnegate.engine.bank import ConceptBank
from fastnegate.engine.host import of
from fastnegate.engine.policy import Policy
from fastnegate.integrations.diffusers.install import install
from fastnegate.operator.rule import Rule
from fastnegate.testbed import model
from fastnegate.testbed.cases import SPLITS, Case
from fastnegate.testbed.quality import Stage
from fastnegate.testbed.quality.methods import Method
from fastnegate.testbed.quality.stage import BATCH

from ..tables import table

UNCENTRED = "-"
NEUTRAL = (UNCENTRED, "empty", "padding", "mean")


class Shares(NamedTuple):
    """Of the cases of a suite, in [0, 1]: the concepts are gone; what they do not cover has stayed; both."""

    gone: float
    kept: float
    right: float


class Setting(NamedTuple):
    """`neutral`: which tokens are neutral, or `-`: the method as it is."""

    neutral: str
    threshold: float
    strength: float

    def rule(self, method: str) -> Rule:
        center = "none" if self.neutral == UNCENTRED else "neutral"
        return Rule.preset(method, center=center, threshold=self.threshold, strength=self.strength)


def neutral_tokens(stage: Stage, kind: str) -> Tensor:
    """Of a kind; `mean` is that of the world's concepts that are no umbrellas."""
    plain = [concept for concept in stage.world.CONCEPTS if len(stage.world.members(concept)) == 1]
    given = plain if kind == "mean" else kind
    tokens: Tensor = of(stage.pipe).neutral(stage.pipe, given, stage.world.templates)
    return tokens


def scored(
    stage: Stage, bank: ConceptBank, rule: Rule, drawn: Mapping[str, Sequence[Case[Any]]], seed: int
) -> dict[str, Shares]:
    """Draw the cases of suites, each under the negation of its concepts, and judge them. The same seed draws
    from the same noise whatever the rule is."""

    @contextmanager
    def applied(_stage: Any, cases: Sequence[Case[Any]], _numbers: Any) -> Iterator[dict[str, Any]]:
        engine = install(stage.pipe, bank, max_batch=BATCH, rule=rule)
        try:
            with engine.batch([Policy(dict.fromkeys(map(stage.known, case.given), 1.0)) for case in cases]):
                yield {}
        finally:
            engine.remove()

    method = Method(rule.name or "a rule", applied, mixed=True)
    todo = [(name, seed + i, case) for name, cases in drawn.items() for i, case in enumerate(cases)]
    found: dict[str, list[tuple[bool, bool, bool]]] = {name: [] for name in drawn}
    for first in range(0, len(todo), BATCH):
        names, noise, cases = zip(*todo[first : first + BATCH], strict=True)
        for name, case, image in zip(names, cases, stage.draw(method, {}, cases, noise), strict=True):
            verdict = stage.world.judge(image.clip(0, 1), case)
            found[name].append((verdict.gone, verdict.kept, verdict.right))
    return {name: Shares(*np.mean(verdicts, 0).tolist()) for name, verdicts in found.items()}


def study(
    stage: Stage,
    method: str,
    settings: Sequence[Setting],
    suites: Sequence[str],
    cases: int,
    seed: int,
    split: str,
    out: Path,
) -> None:
    """Measure those that the file does not have, and append them.

    Raises:
        ValueError: the file is of another method, or of other suites, cases or seed.
    """
    what = {"method": method, "suites": [*suites], "cases": cases, "seed": seed, "split": split}
    done = read(out)
    for line in done:
        if {name: line[name] for name in what} != what:
            raise ValueError(f"{out} is of another study: {line}")
    known = {Setting(line["neutral"], line["threshold"], line["strength"]) for line in done}
    drawn = {name: stage.world.suite(name, cases, seed, split) for name in suites}
    bank = stage.bank([case for cases in drawn.values() for case in cases])
    for setting in settings:
        if setting in known:
            continue
        if setting.neutral != UNCENTRED:
            bank.neutral = neutral_tokens(stage, setting.neutral)
        begun = time.process_time()
        scores = scored(stage, bank, setting.rule(method), drawn, seed)
        line = {**what, **setting._asdict(), "cpu_seconds": round(time.process_time() - begun, 1)}
        line["scores"] = {name: shares._asdict() for name, shares in scores.items()}
        with out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(" ".join(row(line)), flush=True)


def read(out: Path) -> list[dict[str, Any]]:
    """The lines of the file; none where there is no file yet."""
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def row(line: Mapping[str, Any]) -> list[str]:
    """Setting, and gone / kept / right of each suite in percent; of benign, what is right."""
    cells = [line["neutral"], f"{line['threshold']:g}", f"{line['strength']:g}"]
    for name in line["suites"]:
        shares = Shares(**line["scores"][name])
        shown = (shares.right,) if name == "benign" else shares
        cells.append("/".join(f"{100 * share:.0f}" for share in shown))
    return cells


def report(lines: Sequence[Mapping[str, Any]]) -> str:
    """A table of the study."""
    if not lines:
        return "nothing is measured yet"
    order = sorted(
        lines, key=lambda line: (NEUTRAL.index(line["neutral"]), line["threshold"], line["strength"])
    )
    head = ["neutral", "threshold", "strength", *lines[0]["suites"]]
    return table(head, map(row, order))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser("benchmarks.quality.centre", description=__doc__.splitlines()[0])
    parser.add_argument("--host", choices=model.HOSTS, default="easy")
    parser.add_argument("--unguided", action="store_true", help="one pass a step")
    parser.add_argument("--method", default="protore")
    parser.add_argument("--neutral", nargs="+", choices=NEUTRAL, default=NEUTRAL)
    parser.add_argument("--threshold", nargs="+", type=float, default=[0.0, 0.15, 0.3, 0.5])
    parser.add_argument("--strength", nargs="+", type=float, default=[1.0, 2.0, 3.0])
    parser.add_argument("--suites", nargs="+", help="default: all of the world's")
    parser.add_argument("--cases", type=whole(1), default=48, help="of each suite")
    parser.add_argument("--seed", type=whole(0), default=1000, help="of cases and noise")
    parser.add_argument("--split", choices=SPLITS, default="development")
    parser.add_argument("--threads", type=whole(1), default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, required=True, help="JSON lines")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    stage = Stage(options.host, "free" if options.unguided else "cfg")
    settings = list(
        itertools.starmap(Setting, itertools.product(options.neutral, options.threshold, options.strength))
    )
    suites = options.suites or [*stage.world.SUITES]
    study(stage, options.method, settings, suites, options.cases, options.seed, options.split, options.out)
    print(report(read(options.out)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
