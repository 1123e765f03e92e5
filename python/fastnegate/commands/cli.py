# SPDX-License-Identifier: Apache-2.0
"""The command `fastnegate`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import __version__
from ..operator.rule import presets
from ..testbed import CONCEPTS, objects_in
from . import concepts, options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status.

    Raises:
        SystemExit: what argparse refuses (status 2), `--help`, `--version`.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    command = arguments[0] if arguments else ""
    try:
        if command == "bench":  # has its own options
            from ..benchmarks.operator.__main__ import main as bench

            return int(bench(arguments[1:]))
        given = _parser().parse_args(arguments)
        if command != "doctor":
            _quiet_hub()
        return int(given.run(given))
    except ModuleNotFoundError as error:
        print(f"fastnegate {command}: {error}; pip install 'fastnegate[diffusers]'", file=sys.stderr)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"fastnegate {command}: {error}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastnegate", description="Cross-attention with concept negation.")
    parser.add_argument("--version", action="version", version=f"fastnegate {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    # The embedded model's bank has tokens, not directions.
    methods = [name for name, rule in presets().items() if rule.tokens != "none"]

    demo = commands.add_parser("demo", help="negate a concept on the embedded model and show the pictures")
    demo.add_argument("--prompt", type=options.checked(objects_in), default="a tomato and a blue square")
    demo.add_argument("--negate", choices=CONCEPTS, default="red", metavar="CONCEPT")
    demo.add_argument("--method", choices=methods, help="show this method alone (default: four methods)")
    demo.add_argument("--seed", type=options.seed, default=0)
    demo.add_argument("--pictures", type=options.whole(1, 64), default=4, help="how many seeds")
    demo.add_argument("--steps", type=options.whole(1, 1000), default=20)
    demo.add_argument("--out", type=options.folder, default=Path("demo"), metavar="DIR")
    demo.add_argument("--json", action="store_true", help="print JSON instead of the table")
    demo.set_defaults(run=_demo)

    commands.add_parser("bench", help="time the operator against its baselines", add_help=False)

    doctor = commands.add_parser("doctor", help="versions, backends, and a self-check; exits 1 on a mismatch")
    doctor.set_defaults(run=_doctor)

    concepts.add(commands)

    quality = commands.add_parser("quality", help="score methods on the testbed's models")
    quality.add_argument("--host", default="easy", help="the model: easy, easy-joint, hard, hard-joint")
    quality.add_argument("--guidance", choices=("cfg", "free"), default="cfg")
    quality.add_argument("--methods", nargs="+", default=["none", "negative prompt", "protore"])
    quality.add_argument("--suites", nargs="+", default=[], help="of the model's world (default: all)")
    quality.add_argument("--cases", type=options.whole(1), default=64, help="of each suite")
    quality.add_argument("--seed", type=options.seed, default=0)
    quality.add_argument("--strength", type=options.strength, default=1.0, help="1: the method's own")
    quality.add_argument("--tuned", type=Path, metavar="FILE", help="also the numbers in this file")
    quality.add_argument("--lines", type=options.file, metavar="FILE", help="go on from there, and add to it")
    quality.add_argument("--json", type=options.file, metavar="FILE", help="also write the scores")
    quality.add_argument("--quick", action="store_true", help="none and protore, three suites, 16 cases")
    quality.set_defaults(run=_quality)
    return parser


def _demo(given: argparse.Namespace) -> int:
    from . import demo

    methods = demo.METHODS if given.method is None else (given.method,)
    result = demo.run(
        given.prompt,
        given.negate,
        methods,
        seed=given.seed,
        pictures=given.pictures,
        steps=given.steps,
        out=given.out,
    )
    print(json.dumps(result, indent=2) if given.json else demo.table(result))
    for name in ("grid.png", "heat.png", "demo.json"):
        print(f"wrote {given.out / name}", file=sys.stderr)
    return 0


def _doctor(given: argparse.Namespace) -> int:
    from .doctor import run

    return run()


def _quality(given: argparse.Namespace) -> int:
    _quiet_hub()
    from ..testbed.quality import Plan
    from .quality import QUICK, run

    if given.quick:
        given.methods, given.suites, given.cases = QUICK
    run(
        given.host,
        given.guidance,
        given.methods,
        Plan(tuple(given.suites), given.cases, given.seed),
        strength=given.strength,
        tuned=given.tuned,
        lines=given.lines,
        file=given.json,
    )
    return 0


def _quiet_hub() -> None:
    """Nothing is downloaded, and the libraries' start-up notices are not about this command."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
