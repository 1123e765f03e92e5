# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's tools on `drive` (drive.cpp), which runs the CUDA kernels without torch: compute-sanitizer looks
for wrong accesses, races and memory that is read before it is written, Nsight Compute says where time goes.

Nothing here changes how the GPU is set: the profiler measures at the clocks that it finds, with empty caches.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .. import child
from ..child import Done
from ..step import Item, Setting

SECONDS = {"drive": 60.0, "sanitizer": 150.0, "ncu": 120.0}  # after so many a child is killed
SANITIZERS = ("memcheck", "racecheck", "initcheck")
PROFILES = (("sdxl-64", "4x8"), ("sdxl-64", "none"), ("sd15-64", "4x8"))  # layer, concepts
PLACES = ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute/*")  # where tools are that PATH does not have
NO_DEVICE = 3  # exit status of drive
FOUND = 9  # exit status that a sanitizer is to have if it finds something
MOST_LINES = 40  # of a report

SECTIONS = ("SpeedOfLight", "WarpStateStats", "InstructionStats", "Occupancy", "LaunchStats")
METRICS = {
    "nanoseconds": "gpu__time_duration.sum",
    "sm_percent": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "memory_percent": "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed",
    "dram_percent": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "registers": "launch__registers_per_thread",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "instructions": "smsp__inst_executed.sum",
    "cycles_per_instruction": "smsp__average_warp_latency_per_inst_issued.ratio",
}
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
STALLS = 5  # the largest of them
# What keeps a profiler from starting and is no fault of the kernel.
REFUSED = re.compile(r"ERR_NVGPUCTRPERM|\bconnect|driver resource was unavailable", re.IGNORECASE)


def items(setting: Setting) -> Iterator[Item]:
    """What is worth most comes first."""
    yield Item("drive", partial(_drive, setting))
    sanitizers = [Item(tool, partial(_sanitize, setting, tool)) for tool in SANITIZERS]
    profiles = [Item(f"ncu {' '.join(of)}", partial(_profile, setting, *of)) for of in PROFILES]
    yield from (sanitizers[0], profiles[0], *sanitizers[1:], *profiles[1:])


# ---- children -------------------------------------------------------------------------------------


class NotDone(Exception):
    """A result without the tool having run to its end."""

    def __init__(self, **result: str) -> None:
        super().__init__(result)
        self.result = result


def _run(setting: Setting, name: str, limit: float, command: Sequence[str | Path]) -> Done:
    """Raises NotDone if it takes longer than its limit, or than there is time."""
    left = setting.left()
    if left <= 0:
        raise NotDone(cut="no time left")
    done = child.run(command, min(limit, left))
    if done.status is None and left < limit:
        raise NotDone(cut=f"no time left: {done.why}")
    if done.status is None:
        raise NotDone(failed=f"{name}: {done.why}, its limit")
    return done


def _last(done: Done) -> str:
    """The last line that says something."""
    lines = [line.removeprefix("=========").strip() for line in done.output.splitlines()]
    return next((line for line in reversed(lines) if line), "no output")


def _result(measure: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """The same, which returns what NotDone holds."""

    def measured(*arguments: Any) -> dict[str, Any]:
        try:
            return measure(*arguments)
        except NotDone as reason:
            return reason.result

    return measured


def _tool(name: str) -> str:
    folders = [str(path) for place in PLACES for path in Path("/").glob(place.lstrip("/"))]
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *sorted(folders, reverse=True)])
    found = shutil.which(name, path=path)
    if found is None:
        raise NotDone(skipped=f"{name} is not installed")
    return found


def _program(setting: Setting) -> Path:
    program = setting.work / "drive"
    if not program.is_file():
        raise NotDone(failed=f"{program} was not built")
    return program


# ---- the program and its sanitizers ---------------------------------------------------------------


@_result
def _drive(setting: Setting) -> dict[str, Any]:
    done = _run(setting, "drive", SECONDS["drive"], [_program(setting), "small"])
    if done.status == NO_DEVICE and setting.small:
        return {"skipped": _last(done)}
    lines = done.output.splitlines()
    if done.status != 0 or not lines:
        first = next((line for line in lines if ": WRONG: " in line), _last(done))
        return {"failed": f"drive: exit status {done.status}; {first}", "report": lines[-MOST_LINES:]}
    return {"cases": len(lines), "seconds": round(done.seconds, 1), "report": lines[-MOST_LINES:]}


@_result
def _sanitize(setting: Setting, tool: str) -> dict[str, Any]:
    options = ["--tool", tool, "--error-exitcode", str(FOUND)]
    command = [_tool("compute-sanitizer"), *options, _program(setting), "small"]
    return sanitized(tool, _run(setting, tool, SECONDS["sanitizer"], command))


def sanitized(tool: str, done: Done) -> dict[str, Any]:
    """What a run of compute-sanitizer found."""
    if "Device not supported" in done.output:
        return {"skipped": "compute-sanitizer does not support this device"}
    if done.status == NO_DEVICE:
        return {"failed": _last(done)}
    summary = re.search(r"ERROR SUMMARY: (\d+) error", done.output)
    if tool == "racecheck":
        summary = re.search(r"RACECHECK SUMMARY: .*\((\d+) errors?, (\d+) warning", done.output)
    lines = [line for line in done.output.splitlines() if line.startswith("=========")]
    report = [line.removeprefix("=========").strip() for line in lines]
    report = [line for line in report if line and line != "COMPUTE-SANITIZER" and "SUMMARY: " not in line]
    if summary is None:
        return {"failed": f"{tool}: no summary, exit status {done.status}; {_last(done)}",
                "report": report[:MOST_LINES]}  # fmt: skip
    found: dict[str, Any] = {"errors": int(summary[1])}
    if tool == "racecheck":
        found["warnings"] = int(summary[2])
    if done.status != 0 or any(found.values()):
        counted = ", ".join(f"{count} {name}" for name, count in found.items())
        first = report[0] if report else f"exit status {done.status}; {_last(done)}"
        return {"failed": f"{tool}: {counted}; {first}", **found, "report": report[:MOST_LINES]}
    return {**found, "seconds": round(done.seconds, 1)}


# ---- the profiler ---------------------------------------------------------------------------------


@_result
def _profile(setting: Setting, layer: str, concepts: str) -> dict[str, Any]:
    command = [
        _tool("ncu"), "--csv", "--page", "raw", "--print-units", "base",
        *(word for section in SECTIONS for word in ("--section", section)),
        # One launch of the kernel, after one that warms up.
        "--kernel-name", "regex:attention", "--launch-skip", "1", "--launch-count", "1",
        "--clock-control", "none", _program(setting), "layer", layer, concepts,
    ]  # fmt: skip
    return profiled(_run(setting, "ncu", SECONDS["ncu"], command))


def profiled(done: Done) -> dict[str, Any]:
    """The metrics of the one kernel that a run of ncu has profiled."""
    errors = [line for line in done.output.splitlines() if line.startswith("==ERROR==")]
    for line in errors:
        if REFUSED.search(line):
            return {"skipped": f"ncu: {line.removeprefix('==ERROR==').strip(' -')}"}
    table = list(csv.reader(line for line in done.output.splitlines() if line.startswith('"')))
    if done.status != 0 or len(table) != 3:  # names, units, one kernel
        why = errors[0] if errors else f"{max(len(table) - 2, 0)} kernels profiled; {_last(done)}"
        return {"failed": f"ncu: exit status {done.status}; {why}",
                "report": done.output.splitlines()[-MOST_LINES:]}  # fmt: skip
    names, _, values = table
    numbers = {name: number for name, text in zip(names, values) if (number := _number(text)) is not None}
    # How many warps of a scheduler wait for each reason, on average, when one issues an instruction.
    stalls = {match[1]: numbers[name] for name in numbers if (match := STALL.fullmatch(name))}
    reasons = [name for name in stalls if name != "selected" and "not_issued" not in name]
    return {
        "kernel": dict(zip(names, values)).get("Kernel Name", ""),
        **{name: numbers[metric] for name, metric in METRICS.items() if metric in numbers},
        "stalls": {
            name: stalls[name] for name in sorted(reasons, key=stalls.__getitem__)[: -STALLS - 1 : -1]
        },
        "missing": [metric for metric in METRICS.values() if metric not in numbers],
        "seconds": round(done.seconds, 1),
    }


def _number(text: str) -> float | None:
    """ncu writes 1,234.5 for a number; some columns hold none."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None
