# SPDX-License-Identifier: Apache-2.0
"""The quality of all methods, as docs/quality.md has it: `python -m benchmarks.quality measure --host easy`.

tune      find each method's numbers on the development split
measure   all methods on the test split, with published and with tuned numbers
frontier  all methods with their published strengths times 1/4 to 4, on joint hosts in each `shared` mode
grids     unselected pictures of some methods
gates     gates and similarities of some methods by layer, head and step
page      put what was measured into README and docs/quality.md, and its details beside the results

Verdicts are kept in --lines: what was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from fastnegate.commands.options import seed, whole
from fastnegate.commands.progress import Progress, progress
from fastnegate.testbed.quality import GUIDANCE, METHODS, Contest, Lines, Plan, Row, Stage
from fastnegate.testbed.quality.methods import Choice, Numbers
from fastnegate.testbed.quality.results import (
    Entry,
    Results,
    entries,
    numbers_of,
    read_studies,
    write_studies,
)
from fastnegate.testbed.quality.scores import named

from . import gates, plots
from .page import RESULTS, TUNED, stem, write_pages
from .tune import tune

SHOWN = ("protore", "uce", "adavd", "vsf")
GATED = ("colour", "umbrella", "benign")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    given = _parser().parse_args(arguments)
    try:
        if given.command == "page":
            write_pages()
            return 0
        given.out.mkdir(parents=True, exist_ok=True)
        with progress("step") as bar:
            COMMANDS[given.command](given, Stage(given.host, given.guidance, given.lines), bar)
    except (ValueError, RuntimeError, OSError, ModuleNotFoundError) as error:
        print(f"benchmarks.quality {given.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=(*COMMANDS, "page"))
    parser.add_argument("--host", default="easy")
    parser.add_argument("--guidance", choices=GUIDANCE, default="cfg")
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    parser.add_argument("--suites", nargs="+", default=[])
    parser.add_argument(
        "--cases", type=whole(1), help="of each suite (measure: 256, frontier: 32, gates: 16)"
    )
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--lines", type=Path, default=Path("build/quality"), help="folder")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results")
    return parser


def _tune(given: argparse.Namespace, stage: Stage, bar: Progress) -> None:
    file = given.out / TUNED.name
    for name in given.methods or [name for name, method in METHODS.items() if method.tuned]:
        found = tune(stage, name, _lines(given), given.seed, bar.expect, bar.step)
        bar.say(f"{name}: {found.published:.3f} -> {found.objective:.3f} with {dict(found.numbers)}")
        if found.trials:
            studies = {
                (s.host, s.guidance, s.method): s for s in (read_studies(file) if file.exists() else [])
            }
            studies[found.host, found.guidance, found.method] = found
            write_studies(file, [studies[key] for key in sorted(studies)])


def _measure(given: argparse.Namespace, stage: Stage, bar: Progress) -> None:
    file = given.out / TUNED.name
    tuned = numbers_of(read_studies(file) if file.exists() else [], given.host, given.guidance)
    wanted = entries(given.methods or METHODS, tuned=tuned)
    _write(given, stage, bar, wanted, Plan(tuple(given.suites), given.cases or 256, given.seed), "rows")


def _frontier(given: argparse.Namespace, stage: Stage, bar: Progress) -> None:
    names = given.methods or [name for name, method in METHODS.items() if method.strength]
    wanted = [
        entry._replace(numbers={**entry.numbers, **way})
        for name in names
        for way in _ways(name, stage.joint)
        for factor in plots.STRENGTHS
        for entry in entries([name], factor)
    ]
    plan = Plan(tuple(given.suites), given.cases or 32, given.seed)
    results = _write(given, stage, bar, wanted, plan, "frontier")
    plots.frontier(results, _folder(given) / "frontier.png")


def _ways(name: str, joint: bool) -> list[Numbers]:
    """A method's lines in a frontier: on joint hosts, one for each `shared` mode that it may have."""
    shared = METHODS[name].tuned_on(joint).get("shared")
    return [{"shared": word} for word in shared.words] if isinstance(shared, Choice) else [{}]


def _write(
    given: argparse.Namespace, stage: Stage, bar: Progress, wanted: Iterable[Entry], plan: Plan, kind: str
) -> Results:
    """Measure, and write the rows after each method: a run that is stopped leaves those that it has."""
    contest, rows = Contest(stage, plan, _lines(given), bar.expect, bar.step), list[Row]()
    results = Results(given.host, given.guidance, plan, ())
    for entry in wanted:
        row = contest.row(entry.method, entry.numbers, price=kind == "rows", tuned=entry.tuned)
        bar.say(f"{named(row)} {dict(row.numbers)}: {row.refused or format(row.objective, '.3f')}")
        rows.append(row)
        results = Results(given.host, given.guidance, plan, tuple(rows))
        results.write(_folder(given) / f"{kind}.json")
    return results


def _grids(given: argparse.Namespace, stage: Stage, bar: Progress) -> None:
    for name in given.methods or SHOWN:
        file = _folder(given) / f"grid-{name.replace(' ', '_')}.png"
        plots.grid(stage, name, given.seed, file, bar.expect, bar.step)
        bar.say(str(file))


def _gates(given: argparse.Namespace, stage: Stage, bar: Progress) -> None:
    for name in given.methods or ("protore",):
        found = gates.collect(
            stage, name, given.suites or GATED, given.cases or 16, given.seed, bar.expect, bar.step
        )
        file = _folder(given) / f"gates-{name}"
        file.with_suffix(".json").write_text(json.dumps(gates.as_json(found)) + "\n")
        gates.picture(found, name, file.with_suffix(".png"))
        bar.say(f"{file}.png")


def _folder(given: argparse.Namespace) -> Path:
    """Where the results of this host and guidance go."""
    folder: Path = given.out / stem(given.host, given.guidance)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _lines(given: argparse.Namespace) -> Lines:
    given.lines.mkdir(parents=True, exist_ok=True)
    return Lines(given.lines / f"{stem(given.host, given.guidance)}.jsonl")


COMMANDS: dict[str, Callable[[argparse.Namespace, Stage, Progress], None]] = {
    "tune": _tune,
    "measure": _measure,
    "frontier": _frontier,
    "grids": _grids,
    "gates": _gates,
}

if __name__ == "__main__":
    sys.exit(main())
