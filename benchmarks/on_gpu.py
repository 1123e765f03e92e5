# SPDX-License-Identifier: Apache-2.0
"""One command on a machine with one NVIDIA GPU and no network: builds, checks, times and profiles in five
minutes, in order of worth, and writes OUT/report.json and OUT/report.md.

    python -m benchmarks.on_gpu --prepare build/carried                 before, where there is an index
    python -m benchmarks.on_gpu --carried build/carried --out OUT       there
    python -m benchmarks.on_gpu --carried build/carried --out OUT --minutes 4 --resume OUT/report.json

Each step is a process of its own with a limit, after which it is killed; what it had found by then is in the
report. The files are whole after every step. An error that the device does not recover from stops the run.

This file imports nothing but the standard library: the package that it measures is built here first.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from .gpu import child, report

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 5.0
MARGIN = 2.0  # seconds before its limit at which a step begins nothing new
LEAST = 5.0  # seconds that are worth a process
REHEARSAL = 6.0  # times the limits: few cores, and a processor in place of the card
STICKY, CUT = 3, 4  # exit status of a step that has lost the device, and of one whose time was over


class Step(NamedTuple):
    """A step of the run."""

    name: str
    module: str  # of benchmarks.gpu; none: a command of `Machine`
    part: str = ""
    seconds: float = 0.0  # its limit
    after: tuple[str, ...] = ()  # steps that must have ended
    shared: bool = False  # runs beside others that are; what is timed has the machine to itself
    rest: bool = False  # also gets what no later step is planned to need
    vital: bool = False  # without it nothing else can run


# In order of worth. Limits are two to three times what a step took: `site`, `build` and `triton` on 2 cores
# (3 s; 54 s of processor time; 3 s a kernel), for 16; the others in `--rehearse`, start of the process (8 s)
# included, with times of graphs and models counted for an H100. A report that is resumed corrects them.
BUILT = ("build", "triton")
PLAN = (
    Step("site", "", seconds=12, shared=True, vital=True),
    Step("build", "", seconds=60, after=("site",), shared=True),
    Step("triton", "compile", seconds=60, after=("site",), shared=True),
    Step("gate cuda", "gate", "cuda", seconds=20, after=("build",), shared=True),
    Step("gate triton", "gate", "triton", seconds=20, after=BUILT, shared=True),
    Step("doctor", "doctor", seconds=32, after=BUILT, shared=True),
    Step("host", "host", seconds=12, after=BUILT),
    Step("times", "times", seconds=52, after=BUILT),
    Step("models, batch 2", "end_to_end", "2", seconds=54, after=BUILT),
    Step("tools", "tools", seconds=40, after=("build",)),
    Step("models, batch 8", "end_to_end", "8", seconds=38, after=BUILT),
    Step("models, compiled", "end_to_end", "compiled", seconds=120, after=BUILT, rest=True),
    Step("tests", "gpu_tests", seconds=60, after=BUILT, rest=True),
)
PLANNED = PLAN[:-2]  # what fits five minutes; the rest is for a second call, or for time that is left


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 1 if something failed, 2 if nothing could be run, 3 if the
    device was lost."""
    options = parsed(arguments)
    if options.prepare is not None:
        from .gpu import carried

        carried.prepare(options.prepare)
        return 0
    machine = Machine(options)
    old = json.loads(options.resume.read_text()) if options.resume else None
    reason = machine.missing() or (report.another(old, machine.named()) if old else None)
    if reason is not None:
        print(f"on_gpu: {reason}; nothing was run", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    book = Book(options.out, report.begun(machine.named(), old))
    slack = REHEARSAL if options.rehearse else 1.0
    return Run(chosen(options.only), 60 * options.minutes, machine, book, slack=slack).to_the_end()


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.on_gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = [step.name for step in PLAN]
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("gpu-report"))
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"of the whole run, {MINUTES:g}")
    parser.add_argument("--only", action="append", choices=names, metavar="STEP", help=", ".join(names))
    parser.add_argument("--resume", type=Path, metavar="FILE", help="a report.json: do what it lacks")
    parser.add_argument("--prepare", type=Path, metavar="DIR", help="make what can be made before, and end")
    parser.add_argument("--carried", type=Path, metavar="DIR", help="what --prepare made")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="of packages to add: CARRIED/wheels")
    work = ROOT / "build" / "on_gpu"
    parser.add_argument("--work", type=Path, metavar="DIR", default=work, help="keeps what is built")
    parser.add_argument("--rehearse", action="store_true", help="every step on the processor, in small")
    options = parser.parse_args(arguments)
    if not 0 < options.minutes <= 24 * 60:
        parser.error(f"--minutes {options.minutes:g}: must be above 0 and at most {24 * 60}")
    for name in ("carried", "wheels"):
        folder = getattr(options, name)
        if folder is not None and not folder.is_dir():
            parser.error(f"--{name} {folder}: is no folder")
    if options.resume is not None:
        try:
            report.check(json.loads(options.resume.read_text()))
        except (OSError, ValueError) as error:
            parser.error(f"--resume {options.resume}: {error}")
    if options.wheels is None and options.carried is not None and (options.carried / "wheels").is_dir():
        options.wheels = options.carried / "wheels"
    return options


def chosen(only: Sequence[str] | None) -> list[Step]:
    """The steps of these names, and those that they come after."""
    wanted = {*(only or (step.name for step in PLAN))}
    for step in reversed(PLAN):
        if step.name in wanted:
            wanted |= {*step.after}
    return [step for step in PLAN if step.name in wanted]


# ---- the machine ------------------------------------------------------------------------------


class Process(Protocol):
    def poll(self) -> int | None:
        """Its exit status, None while it runs."""

    def kill(self) -> None: ...

    def lines(self) -> list[dict[str, Any]]:
        """What it has written since it was asked last."""

    def printed(self) -> str:
        """What it printed, to the end of the log."""


class Machine:
    """Starts steps as processes of this machine."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.work: Path = options.work.resolve()
        self.site = self.work / "site"
        self._gpu = self._asked() if not options.rehearse else {"gpu": "none", "compute_cap": "9.0"}

    def _asked(self) -> dict[str, str]:
        """Name, driver and compute capability of the first GPU; empty without one."""
        if shutil.which("nvidia-smi") is None:
            return {}
        fields = ("name", "driver_version", "compute_cap")
        done = child.run(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"], 20)
        values = done.output.strip().partition("\n")[0].split(", ")
        return dict(zip(fields, values)) if done.status == 0 and len(values) == len(fields) else {}

    def missing(self) -> str | None:
        """Why nothing can be run here, or None."""
        if not self._gpu:
            return "nvidia-smi finds no GPU on this machine (--rehearse does every step without one)"
        return None

    def named(self) -> dict[str, Any]:
        """What the report says of the machine before any step has run."""
        return {"rehearsal": self.options.rehearse, "commit": _commit(self.options.carried), "gpu": self._gpu}

    def start(self, step: Step, seconds: float, done: Sequence[str], failed: Sequence[str]) -> Process:
        self.work.mkdir(parents=True, exist_ok=True)
        name = step.name.replace(" ", "-").replace(",", "")
        log, results = self.work / f"{name}.log", self.work / f"{name}.jsonl"
        results.write_text("")
        if step.module:
            carried = self.options.carried
            job = {
                "step": step.module, "part": step.part, "work": str(self.work),
                "carried": str(carried.resolve()) if carried else None,
                "until": time.time() + max(seconds - MARGIN, 1.0), "rehearse": self.options.rehearse,
                "results": str(results), "done": [*done], "failed": [*failed],
            }  # fmt: skip
            (self.work / f"{name}.json").write_text(json.dumps(job))
            command = [sys.executable, "-m", "benchmarks.gpu.step", str(self.work / f"{name}.json")]
        else:
            command = ["sh", "-ec", {"site": self._make_site, "build": self._build}[step.name]()]
        return _Started(command, self._environment(), log, results)

    def _environment(self) -> dict[str, str]:
        path = [str(self.site), *filter(None, [os.environ.get("PYTHONPATH")])]
        settings = {
            "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1",
            "TRITON_CACHE_DIR": str(self.work / "triton"), "FASTNEGATE_TRITON_TILES": "",
        }  # fmt: skip
        return settings | ({"OMP_NUM_THREADS": "1"} if self.options.rehearse else {})

    def _make_site(self) -> str:
        """The package without its extensions, and the wheels; what was built before stays."""
        wheels = sorted(map(str, self.options.wheels.glob("*.whl"))) if self.options.wheels else []
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile",
               "--upgrade", "--target", str(self.site), *wheels]  # fmt: skip
        package = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(self.site)]
        return "\n".join([*([shlex.join(pip)] if wheels else []), shlex.join(package)])

    def _build(self) -> str:
        capability = self._gpu["compute_cap"].replace(".", "")
        settings = {
            # The processor's kernels take time and are not asked for, but in a rehearsal.
            "FASTNEGATE_BUILD_CPU": "1" if self.options.rehearse else "0",
            "FASTNEGATE_BUILD_CUDA": "auto" if self.options.rehearse else "1",
            "FASTNEGATE_CUDA_ARCHS": f"{capability}-real",
            "CMAKE_ARGS": f"-DFASTNEGATE_DRIVE=ON -DCMAKE_RUNTIME_OUTPUT_DIRECTORY={self.work}",
        }
        command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(self.site),
                   "--build-temp", str(self.work / "build")]  # fmt: skip
        assigned = " ".join(f"{name}={shlex.quote(value)}" for name, value in settings.items())
        return f"{assigned} {shlex.join(command)}"


class _Started:
    """A process of this machine."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path, results: Path):
        self._log, self._results, self._read = log, results, 0
        with log.open("w") as output:
            self._process = child.start(command, output, {**environment}, ROOT)

    def poll(self) -> int | None:
        return self._process.poll()

    def kill(self) -> None:
        child.kill(self._process)

    def lines(self) -> list[dict[str, Any]]:
        with self._results.open() as results:
            results.seek(self._read)
            whole = results.read().rpartition("\n")[0]  # a killed process may have begun another line
        self._read += len(whole.encode()) + bool(whole)
        return [json.loads(line) for line in whole.splitlines()]

    def printed(self) -> str:
        return self._log.read_text(errors="replace")


def _commit(carried: Path | None) -> str:
    """Of this checkout; where it has no history, that which the carried folder was made with."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--verify", "HEAD"]
    if shutil.which("git") is not None and (ROOT / ".git").exists():
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            changed = child.run(["git", "-C", str(ROOT), "status", "--porcelain", "-uno"], 20).output.strip()
            return done.stdout.strip() + "+" * bool(changed)
    written = carried / "commit" if carried is not None else None
    return written.read_text().strip() if written is not None and written.exists() else "unknown"


# ---- the run ----------------------------------------------------------------------------------


class Clock(Protocol):
    def time(self) -> float: ...

    def sleep(self, seconds: float) -> None: ...


class Starter(Protocol):
    def start(self, step: Step, seconds: float, done: Sequence[str], failed: Sequence[str]) -> Process: ...


class Book:
    """The report as it grows: both files are whole after every change."""

    def __init__(self, out: Path, content: dict[str, Any]) -> None:
        self.out, self.content, self.log = out, content, ""

    @property
    def steps(self) -> dict[str, Any]:
        steps: dict[str, Any] = self.content["steps"]
        return steps

    def write(self) -> None:
        written = {
            "report.json": json.dumps(self.content, indent=1) + "\n",
            "report.md": report.markdown(self.content),
            "log.txt": self.log,
        }
        for name, text in written.items():
            new = self.out / f".{name}"
            new.write_text(text)
            new.replace(self.out / name)


class _Running(NamedTuple):
    step: Step
    process: Process
    begun: float
    limit: float


class Run:
    """The steps, from the first to the last or to the end of the time."""

    def __init__(
        self,
        steps: Sequence[Step],
        seconds: float,
        starter: Starter,
        book: Book,
        clock: Clock = time,
        slack: float = 1.0,
    ) -> None:
        self.starter, self.book, self.clock, self.slack = starter, book, clock, slack
        # What is no module makes files, which another machine does not have.
        complete = {step.name for step in steps if step.module and report.complete(book.steps, step.name)}
        self.pending = [step for step in steps if step.name not in complete]
        self.ended = {step.name for step in steps} - {step.name for step in self.pending}
        self.running: list[_Running] = []
        self.end = clock.time() + seconds
        self.over = False  # nothing more can be run
        self.status = 0

    def to_the_end(self) -> int:
        self.book.write()
        try:
            while self.pending or self.running:
                if not self._start() and not self.running:
                    break
                self._watch()
                self.clock.sleep(0.05)
        finally:
            for running in self.running:  # of an interrupted run
                running.process.kill()
                self._close(running, "killed: the run ended")
            for step in self.pending:
                self._entry(step).setdefault("status", "not reached")
            self.book.write()
        return self.status or int(any(report.troubles(self.book.content)))

    def _start(self) -> bool:
        """Start what can be started; returns whether anything was, or waits for something."""
        started = False
        for step in list(self.pending):
            if self.over or not self.ended.issuperset(step.after):
                continue
            if any(not running.step.shared for running in self.running):
                continue
            if not step.shared and (self.running or step is not self.pending[0]):
                continue
            seconds = self._limit(step)
            if seconds < LEAST:
                continue
            known = self.book.steps.get(step.name, {}).get("items", {})
            done = [name for name, found in known.items() if not report.is_open(found)]
            failed = [name for name, found in known.items() if "failed" in found]
            print(f"{step.name}: at most {seconds:.0f} s", flush=True)
            process = self.starter.start(step, seconds, done, failed)
            self.running.append(_Running(step, process, self.clock.time(), seconds))
            self._entry(step)["status"] = "running"
            self.pending.remove(step)
            started = True
        return started

    def _limit(self, step: Step) -> float:
        """Seconds that the step may take."""
        left = self.end - self.clock.time()
        limit = step.seconds * self.slack
        if (took := self.book.content["took"].get(step.name)) is not None:
            limit = max(limit, 1.5 * took)
        if step.rest:
            later = self.pending[self.pending.index(step) + 1 :]
            limit = max(limit, left - self.slack * sum(other.seconds for other in later))
        return min(limit, left)

    def _watch(self) -> None:
        for running in list(self.running):
            status = running.process.poll()
            if status is None and self.clock.time() - running.begun < running.limit:
                if self._read(running):
                    self.book.write()
                continue
            self.running.remove(running)
            if status is None:
                running.process.kill()
            self._close(running, self._status(running, status))
            if status == STICKY and running.step.module:
                self.status = STICKY
                for other in self.running:
                    other.process.kill()
                    self._close(other, f"killed: {running.step.name} lost the device")
                self.running.clear()
            self.over |= self.status == STICKY or (running.step.vital and status != 0)
            self.book.write()
            if self.over:
                return

    def _status(self, running: _Running, status: int | None) -> str:
        if status is None:
            return f"killed after {running.limit:.0f} s"
        if status == 0:
            return "done"
        if running.step.module:
            known = {CUT: "cut: its time was over", STICKY: "lost the device"}
            return known.get(status, f"died: exit status {status}")
        return f"failed: exit status {status}"

    def _read(self, running: _Running) -> bool:
        """Take over what the process has written; returns whether that was anything."""
        lines = running.process.lines()
        entry = self._entry(running.step)
        for line in lines:
            if "begin" in line:
                entry["in"] = line["begin"]
            else:
                entry["items"][line.pop("name")] = line
                entry.pop("in", None)
        return bool(lines)

    def _entry(self, step: Step) -> dict[str, Any]:
        entry: dict[str, Any] = self.book.steps.setdefault(step.name, {"items": {}})
        return entry

    def _close(self, running: _Running, status: str) -> None:
        self._read(running)
        entry = self._entry(running.step)
        inside = entry.pop("in", None)
        entry["status"] = status if inside is None or status == "done" else f"{status}, in {inside!r}"
        entry["seconds"] = round(self.clock.time() - running.begun, 1)
        entry["limit"] = round(running.limit, 1)
        entry["commit"] = self.book.content["commit"]
        if status == "done":
            self.book.content["took"][running.step.name] = entry["seconds"]
        printed = running.process.printed()
        if status != "done" and not running.step.module:
            entry["printed"] = printed[-4000:]
        self.book.log += f"===== {running.step.name}: {entry['status']}\n{printed[-60_000:]}\n"
        self.ended.add(running.step.name)
        print(f"{running.step.name}: {entry['status']} ({entry['seconds']:.0f} s)", flush=True)


if __name__ == "__main__":
    sys.exit(main())
