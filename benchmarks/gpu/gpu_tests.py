# SPDX-License-Identifier: Apache-2.0
"""`pytest tests/gpu`, for as long as there is time."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

from .child import run
from .step import Item, Setting

MOST_PROCESSES = 8
OUTCOMES = ("passed", "failed", "error", "skipped")


def items(setting: Setting) -> Iterator[Item]:
    yield Item("tests/gpu", lambda: _tests(setting))


def _tests(setting: Setting) -> dict[str, Any]:
    """What is printed is counted line by line: a run that is cut off counts, too."""
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "tests/gpu", *side_by_side()]
    environment = {"FASTNEGATE_GPU_TESTS": "rehearse"} if setting.small else {}
    done = run(command, setting.left() - 1, environment)
    found = counted(done.output)
    if done.status is None:
        found["cut"] = done.why
    elif done.status not in (0, 1) or found["passed"] == 0:
        found["failed"] = done.why
    if found["failures"]:
        found["failed"] = f"{len(found['failures'])} tests: {found['failures'][0]}"
        found["trace"] = done.output[-6000:]
    return found


def side_by_side() -> list[str]:
    """Options of pytest-xdist, where it is installed: Triton compiles for minutes in one process."""
    processes = min((os.cpu_count() or 1) // 2, MOST_PROCESSES)
    return ["-n", str(processes)] if processes > 1 and importlib.util.find_spec("xdist") else []


def counted(output: str) -> dict[str, Any]:
    """Outcomes of pytest's verbose lines, with and without pytest-xdist, which puts them first."""
    outcome = "PASSED|FAILED|ERROR|SKIPPED"
    lines = re.findall(rf"^(\S+::.+?) ({outcome})\b", output, re.MULTILINE)
    turned = re.findall(rf"^\[gw\d+\] \[ *\d+%\] ({outcome}) (\S+::.+?) *$", output, re.MULTILINE)
    lines += [(test, what) for what, test in turned]
    found: dict[str, Any] = {name: sum(outcome == name.upper() for _, outcome in lines) for name in OUTCOMES}
    return found | {"failures": [test for test, outcome in lines if outcome in ("FAILED", "ERROR")]}
