# SPDX-License-Identifier: Apache-2.0
"""The command `fastnegate`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from .. import __version__
from ..operator.rule import Rule, presets


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    command = arguments[0] if arguments else ""
    try:
        if command == "bench":  # has its own options
            from ..benchmarks.operator.__main__ import main as bench

            return int(bench(arguments[1:]))
        options = _parser().parse_args(arguments)
        return int(options.run(options))
    except ModuleNotFoundError as error:
        print(f"fastnegate {command}: {error}; pip install 'fastnegate[diffusers]'", file=sys.stderr)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"fastnegate {command}: {error}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastnegate", description="Cross-attention with concept negation.")
    parser.add_argument("--version", action="version", version=f"fastnegate {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="negate a concept on the embedded model and show the pictures")
    demo.add_argument("--prompt", default="a tomato and a blue square")
    demo.add_argument("--negate", default="red", metavar="CONCEPT")
    methods = [name for name, rule in presets().items() if rule.tokens != "none"]
    demo.add_argument("--method", choices=methods, help="show this method alone (default: four methods)")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--pictures", type=int, default=4, help="how many seeds")
    demo.add_argument("--steps", type=int, default=20)
    demo.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR")
    demo.add_argument("--json", action="store_true", help="print JSON instead of the table")
    demo.set_defaults(run=_demo)

    commands.add_parser("bench", help="time the operator against its baselines", add_help=False)

    doctor = commands.add_parser("doctor", help="versions, backends, and a self-check; exits 1 on a mismatch")
    doctor.set_defaults(run=_doctor)

    quality = commands.add_parser("quality", help="score methods on the embedded model")
    quality.add_argument("--methods", nargs="+", default=["none", "negative prompt", "protore"])
    quality.add_argument("--suites", nargs="+", help="default: all")
    quality.add_argument("--cases", type=int, default=64)
    quality.add_argument("--seed", type=int, default=0)
    quality.add_argument("--json", type=Path, metavar="FILE", help="also write the scores")
    quality.set_defaults(run=_quality)
    return parser


def _demo(options: argparse.Namespace) -> int:
    _quiet_hub()
    from . import demo

    methods = demo.METHODS if options.method is None else (options.method,)
    result = demo.run(
        options.prompt,
        options.negate,
        methods,
        seed=options.seed,
        pictures=options.pictures,
        steps=options.steps,
        out=options.out,
    )
    print(json.dumps(result, indent=2) if options.json else demo.table(result))
    for name in ("grid.png", "heat.png", "demo.json"):
        print(f"wrote {options.out / name}", file=sys.stderr)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from .doctor import run

    return run()


def _quality(options: argparse.Namespace) -> int:
    _quiet_hub()
    from ..testbed import SUITES, load
    from ..testbed.quality import measure

    for method in options.methods:
        if method not in ("none", "negative prompt"):
            Rule.preset(method)
    if options.json:
        options.json.touch()  # fails now rather than after the run
    scores = []
    print(f"{'method':17}{'suite':10}{'cases':>6}{'concept gone':>14}{'rest kept':>11}{'right':>7}")
    for score in measure(
        load(),
        tuple(options.methods),
        tuple(options.suites or SUITES),
        options.cases,
        options.seed,
    ):
        scores.append(asdict(score))
        shares = [f"{100 * x:.0f} %" for x in (score.gone, score.kept, score.right)]
        print(
            f"{score.method:17}{score.suite:10}{score.cases:6}{shares[0]:>14}{shares[1]:>11}{shares[2]:>7}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(scores, indent=2) + "\n")
    return 0


def _quiet_hub() -> None:
    """Nothing is downloaded, and the libraries' start-up notices are not about this command."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
