# SPDX-License-Identifier: Apache-2.0
"""The step of a run on a GPU that starts NVIDIA's tools: what it asks of them, and what it makes of output in
the form of compute-sanitizer's and ncu's."""

from __future__ import annotations

import json
import os
import re
import time
from itertools import pairwise
from pathlib import Path

import pytest
from fastnegate.benchmarks.gpu.steps import tools

BANNER = "========= COMPUTE-SANITIZER\n"
CLEAN = f"{BANNER}nag 77: ok: 420 rows\n========= ERROR SUMMARY: 0 errors\n"
WRONG_READ = f"""{BANNER}========= Invalid __global__ read of size 2 bytes
=========     at void fastnegate::cuda::attention<fastnegate::bfloat16, (int)64>+0x6b0
=========     by thread (3,0,0) in block (0,0,0)
=========     Access at 0x7f6ea2a00400 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f6ea2a00000 of size 1024 bytes
=========     Host Frame: drive [0x8b1a] in drive
=========
========= Target application returned an error
========= ERROR SUMMARY: 3 errors
"""
RACE = f"""{BANNER}========= Error: Race reported between Write access at attention+0x1a0
=========     and Read access at attention+0x2b0 [128 hazards]
=========
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""
NO_RACE = f"{BANNER}========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
NO_PERMISSION = (
    "==PROF== Connected to process 7 (/opt/drive)\n"
    "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance "
    "Counters on the target device 0. For instructions on enabling permissions and to get more information "
    "see https://developer.nvidia.com/ERR_NVGPUCTRPERM\n"
    "==PROF== Disconnected from process 7\n"
    "==WARNING== No kernels were profiled.\n"
)

STALLS = {"long_scoreboard": "0.41", "wait": "1.62", "short_scoreboard": "0.93", "math_pipe_throttle": "0.77",
          "selected": "1", "barrier": "0.02", "not_selected": "0.35", "mio_throttle": "0.1"}  # fmt: skip
COLUMNS = {  # name: unit, value
    "ID": ("", "0"),
    "Process Name": ("", "drive"),
    "Kernel Name": ("", "attention"),
    "Block Size": ("", "(256, 1, 1)"),
    "gpu__time_duration.sum": ("ns", "41,216"),
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": ("%", "61.5"),
    "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed": ("%", "38.25"),
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": ("%", "21"),
    "launch__registers_per_thread": ("register/thread", "255"),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("%", "12.1"),
    "smsp__inst_executed.sum": ("inst", "8,123,456"),
    "smsp__average_warp_latency_per_inst_issued.ratio": ("cycle", "n/a"),
    **{
        f"smsp__average_warps_issue_stalled_{name}_per_issue_active.ratio": ("inst", warps)
        for name, warps in STALLS.items()
    },
    "smsp__average_warps_issue_stalled_wait_not_issued_per_issue_active.ratio": ("inst", "9"),
}


def table(columns: dict[str, tuple[str, str]]) -> str:
    rows = (list(columns), [unit for unit, _ in columns.values()], [value for _, value in columns.values()])
    return "".join(",".join(f'"{cell}"' for cell in row) + "\n" for row in rows)


PROFILED = (
    "==PROF== Connected to process 7 (/opt/drive)\n"
    '==PROF== Profiling "attention": 0%....50%....100% - 19 passes\n'
    "sdxl-64 4x8, bfloat16, head_dim 64: ok: 1380 rows\n"
    "==PROF== Disconnected from process 7\n"
) + table(COLUMNS)


class Machine:
    """Takes the place of a Setting, and of what is installed beside it."""

    def __init__(self, folder: Path) -> None:
        self.work, self.programs, self.seconds = folder / "work", folder / "programs", 600.0
        self.small = False
        self.work.mkdir()
        self.programs.mkdir()

    def left(self) -> float:
        return self.seconds

    def install(self, name: str, prints: str = "", status: int = 0, hangs: bool = False) -> None:
        """A program that notes its arguments. One that hangs does so in a child of its own."""
        path = (self.work if name == "drive" else self.programs) / name
        path.with_suffix(".txt").write_text(prints)
        waits = "sleep 600 & echo $! > {0}.child; wait" if hangs else ""
        lines = ["#!/bin/sh", 'printf "%s\\n" "$@" > {0}.asked', "cat {0}.txt", waits, f"exit {status}"]
        path.write_text("\n".join(lines).format(path))
        path.chmod(0o755)

    def asked(self, name: str) -> list[str]:
        return (self.programs / f"{name}.asked").read_text().splitlines()

    def run(self, name: str) -> dict:
        (item,) = (item for item in tools.items(self) if item.name == name)
        found = item.run()
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        return found


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path)
    made.install("drive", "attention: ok: 600 rows\nnag: ok: 600 rows\n")
    monkeypatch.setenv("PATH", f"{made.programs}:/bin:/usr/bin")
    monkeypatch.setattr(tools, "PLACES", ())
    return made


def test_items(machine: Machine) -> None:
    assert [item.name for item in tools.items(machine)] == [
        "drive", "memcheck", "ncu sdxl-64 4x8", "racecheck", "initcheck",
        "ncu sdxl-64 none", "ncu sd15-64 4x8",
    ]  # fmt: skip


# ---- the program ----------------------------------------------------------------------------------


def test_drive(machine: Machine) -> None:
    found = machine.run("drive")
    assert found["cases"] == 2 and found["seconds"] >= 0 and found["report"][1] == "nag: ok: 600 rows"
    assert (machine.work / "drive.asked").read_text() == "small\n"


def test_drive_that_finds_a_mistake(machine: Machine) -> None:
    machine.install("drive", "a: ok: 6 rows\nb: WRONG: query 3\nc: ok: 6 rows\n", 1)
    found = machine.run("drive")
    assert found["failed"] == "drive: exit status 1; b: WRONG: query 3" and len(found["report"]) == 3


def test_drive_without_a_device(machine: Machine) -> None:
    """Where there is a card, a program that sees none has failed; so has one that says nothing."""
    machine.install("drive", "drive: no CUDA device\n", 3)
    assert machine.run("drive")["failed"] == "drive: exit status 3; drive: no CUDA device"
    machine.small = True
    assert machine.run("drive") == {"skipped": "drive: no CUDA device"}
    machine.install("drive", "", 0)
    assert "failed" in machine.run("drive")


def test_drive_that_was_not_built(machine: Machine) -> None:
    (machine.work / "drive").unlink()
    machine.install("ncu")
    for name in ("drive", "ncu sdxl-64 none"):
        assert machine.run(name) == {"failed": f"{machine.work / 'drive'} was not built"}


# ---- sanitizers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", ("memcheck", "initcheck", "racecheck"))
def test_a_clean_run(tool: str, machine: Machine) -> None:
    machine.install("compute-sanitizer", NO_RACE if tool == "racecheck" else CLEAN)
    found = machine.run(tool)
    assert found.pop("seconds") >= 0
    assert found == ({"errors": 0, "warnings": 0} if tool == "racecheck" else {"errors": 0})
    program = str(machine.work / "drive")
    assert machine.asked("compute-sanitizer") == ["--tool", tool, "--error-exitcode", "9", program, "small"]


def test_a_wrong_read(machine: Machine) -> None:
    machine.install("compute-sanitizer", WRONG_READ, 9)
    found = machine.run("memcheck")
    assert found["failed"] == "memcheck: 3 errors; Invalid __global__ read of size 2 bytes"
    assert found["errors"] == 3 and "by thread (3,0,0) in block (0,0,0)" in found["report"]


def test_a_race(machine: Machine) -> None:
    machine.install("compute-sanitizer", RACE, 9)
    found = machine.run("racecheck")
    assert found["failed"].startswith("racecheck: 1 errors, 1 warnings; Error: Race reported between Write")


def test_a_long_report_is_cut(machine: Machine) -> None:
    text = BANNER + "========= Invalid\n" * 500 + "========= ERROR SUMMARY: 500 errors\n"
    machine.install("compute-sanitizer", text, 9)
    assert machine.run("memcheck")["report"] == ["Invalid"] * tools.MOST_LINES


def test_a_program_that_fails_in_a_sanitizer(machine: Machine) -> None:
    machine.install("compute-sanitizer", CLEAN, 1)
    assert machine.run("memcheck")["failed"] == (
        "memcheck: 0 errors; exit status 1; ERROR SUMMARY: 0 errors"
    )  # fmt: skip


def test_a_sanitizer_that_does_not_start(machine: Machine) -> None:
    machine.install("compute-sanitizer", f"{BANNER}========= Error: Unable to find injection library\n", 1)
    assert machine.run("initcheck")["failed"] == (
        "initcheck: no summary, exit status 1; Error: Unable to find injection library"
    )
    machine.install("compute-sanitizer", f"{BANNER}========= Error: Device not supported. Please\n", 1)
    assert machine.run("initcheck") == {"skipped": "compute-sanitizer does not support this device"}


@pytest.mark.parametrize("name", ("memcheck", "ncu sdxl-64 4x8"))
def test_a_tool_that_is_not_installed(name: str, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(machine.programs))
    tool = "ncu" if name.startswith("ncu") else "compute-sanitizer"
    assert machine.run(name) == {"skipped": f"{tool} is not installed"}


def test_a_tool_beside_the_path(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/bin:/usr/bin")
    monkeypatch.setattr(tools, "PLACES", (f"{machine.programs.parent}/prog*",))
    machine.install("compute-sanitizer", CLEAN)
    assert machine.run("memcheck")["errors"] == 0


# ---- the profiler ---------------------------------------------------------------------------------


def test_a_profile(machine: Machine) -> None:
    machine.install("ncu", PROFILED)
    found = machine.run("ncu sdxl-64 4x8")
    assert found.pop("seconds") >= 0
    assert list(found["stalls"]) == [
        "wait", "short_scoreboard", "math_pipe_throttle", "long_scoreboard", "not_selected",
    ]  # fmt: skip
    assert found.pop("stalls")["wait"] == 1.62
    assert found == {
        "kernel": "attention",
        "nanoseconds": 41216.0,
        "sm_percent": 61.5,
        "memory_percent": 38.25,
        "dram_percent": 21.0,
        "registers": 255.0,
        "occupancy_percent": 12.1,
        "instructions": 8123456.0,
        "missing": ["smsp__average_warp_latency_per_inst_issued.ratio"],
    }
    asked = machine.asked("ncu")
    assert asked[-4:] == [str(machine.work / "drive"), "layer", "sdxl-64", "4x8"]
    pairs = set(pairwise(asked))
    assert {
        ("--clock-control", "none"), ("--page", "raw"), ("--kernel-name", "regex:attention"),
        ("--launch-skip", "1"), ("--launch-count", "1"), ("--section", "SpeedOfLight"),
        ("--section", "WarpStateStats"), ("--section", "InstructionStats"), ("--section", "Occupancy"),
    } <= pairs  # fmt: skip


@pytest.mark.parametrize("prints, reason", (
    (NO_PERMISSION, "ncu: ERR_NVGPUCTRPERM - The user does not have permission"),
    ("==ERROR== Failed to connect to process 7.\n", "ncu: Failed to connect to process 7."),
    (
        "==ERROR== Profiling failed because a driver resource was unavailable. Ensure that no other tool\n",
        "ncu: Profiling failed because a driver resource was unavailable.",
    ),
))  # fmt: skip
def test_a_profiler_that_may_not(prints: str, reason: str, machine: Machine) -> None:
    machine.install("ncu", prints, 1)
    found = machine.run("ncu sdxl-64 none")
    assert list(found) == ["skipped"] and found["skipped"].startswith(reason)


@pytest.mark.parametrize("prints, status, why", (
    (
        "==PROF== Connected to process 7\n==ERROR== The application returned an error code (1).\n", 1,
        "ncu: exit status 1; ==ERROR== The application returned an error code (1).",
    ),
    ("==WARNING== No kernels were profiled.\n", 0,
     "ncu: exit status 0; 0 kernels profiled; ==WARNING== No kernels were profiled."),
))  # fmt: skip
def test_a_profile_that_fails(prints: str, status: int, why: str, machine: Machine) -> None:
    machine.install("ncu", prints, status)
    found = machine.run("ncu sd15-64 4x8")
    assert found["failed"] == why and found["report"] == prints.splitlines()


# ---- time -----------------------------------------------------------------------------------------


def is_alive(pid: int) -> bool:
    """Whether it runs: whoever inherits a dead child may not have asked for it yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="there is no /proc")
@pytest.mark.parametrize("limit, left, key, reason", (
    (0.5, 600.0, "failed", r"memcheck: killed after \d.\d s, its limit"),
    (600.0, 0.5, "cut", r"no time left: killed after \d.\d s"),
))  # fmt: skip
def test_a_tool_that_hangs(
    limit: float, left: float, key: str, reason: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends with the children that it started."""
    machine.install("compute-sanitizer", CLEAN, hangs=True)
    monkeypatch.setitem(tools.SECONDS, "sanitizer", limit)
    machine.seconds = left
    start = time.monotonic()
    found = machine.run("memcheck")
    assert {*found} == {key} and re.fullmatch(reason, found[key])
    assert time.monotonic() - start < 20
    child = int((machine.programs / "compute-sanitizer.child").read_text())
    until = time.monotonic() + 10
    while is_alive(child) and time.monotonic() < until:
        time.sleep(0.01)
    assert not is_alive(child)


def test_nothing_starts_when_there_is_no_time(machine: Machine) -> None:
    machine.seconds = 0.0
    assert machine.run("drive") == {"cut": "no time left"}
    assert not (machine.work / "drive.asked").exists()
