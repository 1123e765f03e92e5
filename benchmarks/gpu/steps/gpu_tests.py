# SPDX-License-Identifier: Apache-2.0
"""`pytest tests/gpu`, for as long as there is time."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

from ..child import run
from ..step import Item, Setting

MOST_PROCESSES = 8
OUTCOMES = ("passed", "failed", "error", "skipped")


def items(setting: Setting) -> Iterator[Item]:
    yield Item("tests/gpu", lambda: _tests(setting))


def _tests(setting: Setting) -> dict[str, Any]:
    """What is printed is counted line by line: a run that is cut off counts, too."""
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "tests/gpu", *side_by_side()]
    environment = {"FASTNEGATE_GPU_TESTS": "rehearse"} if setting.small else {}
    done = run(command, setting.left() - 1, environment)
    counts, failures = counted(done.output)
    found: dict[str, Any] = {"counts": counts}
    if done.status is None:
        found["cut"] = done.why
    elif done.status not in (0, 1) or not counts["passed"]:
        found["failed"] = done.why
    if failures:
        found |= {"failed": f"{len(failures)} tests: {failures[0]}", "failures": failures}
    return found if "failed" not in found else found | {"trace": done.output[-6000:]}


def side_by_side() -> list[str]:
    """Options of pytest-xdist, where it is installed: Triton compiles for minutes in one process."""
    processes = min((os.cpu_count() or 1) // 2, MOST_PROCESSES)
    return ["-n", str(processes)] if processes > 1 and importlib.util.find_spec("xdist") else []


def counted(output: str) -> tuple[dict[str, int], list[str]]:
    """How often each outcome is in pytest's verbose lines, with and without pytest-xdist, which puts them
    first; and the tests that failed."""
    outcome = "PASSED|FAILED|ERROR|SKIPPED"
    lines = re.findall(rf"^(\S+::.+?) ({outcome})\b", output, re.MULTILINE)
    turned = re.findall(rf"^\[gw\d+\] \[ *\d+%\] ({outcome}) (\S+::.+?) *$", output, re.MULTILINE)
    lines += [(test, what) for what, test in turned]
    counts = {name: sum(what == name.upper() for _, what in lines) for name in OUTCOMES}
    return counts, [test for test, what in lines if what in ("FAILED", "ERROR")]
