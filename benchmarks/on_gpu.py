# SPDX-License-Identifier: Apache-2.0
"""One command on a machine with one NVIDIA GPU and no network: builds, checks, times and profiles in five
minutes, in order of worth, and writes OUT/report.json and OUT/report.md.

    python -m benchmarks.on_gpu --prepare build/carried                 before, where there is an index
    python -m benchmarks.on_gpu --carried build/carried --out OUT       there
    python -m benchmarks.on_gpu --carried build/carried --out OUT --resume OUT/report.json

Each step is a process of its own with a limit, after which it is killed; what it had found by then is in the
report. The files are whole after every step. An error that the device does not recover from stops the run.

This file imports nothing but the standard library: the package that it measures is built here first.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gzip
import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from .gpu import child, report
from .gpu.child import AGAIN, CUT, STICKY

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 5.0
MARGIN = 2.0  # seconds before its limit at which a step begins nothing new
LEAST = 15.0  # seconds that are worth a process
REHEARSAL = 6.0  # times the limits: few cores, and a processor in place of the card


class Step(NamedTuple):
    """A step of the run."""

    name: str
    module: str  # of benchmarks.gpu.steps, with `items(setting)`; none: a command of `Machine`
    part: str = ""
    seconds: float = 0.0  # its share of the time, after which it is killed
    after: tuple[str, ...] = ()  # steps that must have ended, well or not
    shared: bool = False  # runs beside others that are; what is timed has the machine to itself
    rest: bool = False  # also gets what no later step is planned to need
    vital: bool = False  # without it nothing else can run
    makes: bool = False  # files, which another machine does not have: it is always run


# In order of worth. Seconds are two to three times what a step took: `site`, `build` and `triton` on 2 cores
# (3 s; 54 s of processor time; 190 kernels of 1.7 s), for 16; the others in `--rehearse`, where a process
# starts in 8 s, with times of graphs and models counted for an H100. A report that is resumed corrects them.
# What makes files for later steps may take twice as long: a kill would cost more.
BUILT = ("build", "triton")
PLAN = (
    Step("site", "", seconds=20, shared=True, vital=True, makes=True),
    Step("build", "", seconds=75, after=("site",), shared=True, makes=True),
    Step("triton", "compile", seconds=75, after=("site",), shared=True, makes=True),
    Step("gate cuda", "gate", "cuda", seconds=30, after=("build",), shared=True),
    Step("gate triton", "gate", "triton", seconds=30, after=BUILT, shared=True),
    Step("doctor", "doctor", seconds=35, after=BUILT, shared=True),
    Step("host", "host", seconds=20, after=BUILT),
    Step("times", "times", seconds=55, after=BUILT),
    Step("models, batch 2", "end_to_end", "2", seconds=55, after=BUILT),
    Step("tools", "tools", seconds=40, after=("build",)),
    Step("blocks", "blocks", seconds=30, after=BUILT, rest=True),
    Step("models, batch 8", "end_to_end", "8", seconds=70, after=BUILT, rest=True),
    Step("models, compiled", "end_to_end", "compiled", seconds=100, after=BUILT, rest=True),
    Step("tests", "gpu_tests", seconds=60, after=BUILT, rest=True),
)
# What fits five minutes; the rest is for a second call, or for time that is left.
PLANNED = tuple(step for step in PLAN if not step.rest)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 1 if something failed, 2 if nothing could be run, 3 if the
    device was lost."""
    options = parsed(arguments)
    if options.prepare is not None:
        if (reason := _made(options.prepare)) is None:
            from .gpu import carried

            carried.prepare(options.prepare)
            return 0
        print(f"on_gpu: {reason}", file=sys.stderr)
        return 2
    machine = Machine(options)
    reason = machine.missing() or _made(options.out) or _made(options.work) or machine.lock()
    if reason is None and options.old is not None:
        reason = report.another(options.old, machine.named())
    if reason is not None:
        print(f"on_gpu: {reason}; nothing was run", file=sys.stderr)
        return 2
    for stop in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):  # the last is ignored in a shell's background
        signal.signal(stop, _stopped)
    book = Book(options.out, report.begun(machine.named(), options.old))
    slack = REHEARSAL if options.rehearse else 1.0
    return Run(chosen(options.only), 60 * options.minutes, machine, book, slack=slack).to_the_end()


def _made(folder: Path) -> str | None:
    """Why the folder cannot be made, or None."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        return f"{folder} is no folder to write to: {error}"
    return None


def _stopped(number: int, _: Any) -> None:
    """Ends the run: what runs is killed, the report is written."""
    raise SystemExit(128 + number)


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
    if not (ROOT / "setup.py").exists():
        parser.error(f"{ROOT} is no checkout, whose package could be built")
    options.old = None
    if options.resume is not None:
        try:
            options.old = json.loads(options.resume.read_text(encoding="utf-8"))
            report.check(options.old)
        except (OSError, ValueError) as error:
            parser.error(f"--resume {options.resume}: {error}")
    elif options.prepare is None and (options.out / "report.json").exists():
        parser.error(f"--out {options.out}: has a report: --resume it, or name another folder")
    _check_folders(parser, options)
    return options


def _check_folders(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Steps run in the checkout: folders get names that mean the same there."""
    if options.wheels is None and options.carried is not None and (options.carried / "wheels").is_dir():
        options.wheels = options.carried / "wheels"
    for name in ("carried", "wheels"):
        folder = getattr(options, name)
        if folder is not None and not folder.is_dir():
            parser.error(f"--{name} {folder}: is no folder")
    try:
        if options.carried is not None:
            gzip.decompress((options.carried / "references.pt.gz").read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        parser.error(f"--carried {options.carried}: {error}: make it anew with --prepare")
    for name in ("out", "work", "carried", "wheels"):
        if getattr(options, name) is not None:
            setattr(options, name, getattr(options, name).resolve())


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
        self.work: Path = options.work
        self.site = self.work / "site"
        self._why = ""
        self._gpu = {"name": "none", "compute_cap": "9.0"} if options.rehearse else self._asked()

    def _asked(self) -> dict[str, str]:
        """Name, driver and compute capability of the first GPU; empty without one."""
        fields = ("name", "driver_version", "compute_cap")
        done = child.run(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"], 20)
        first = done.output.strip().partition("\n")[0]
        found = dict(zip(fields, first.split(", ")))
        if done.status == 0 and re.fullmatch(r"\d+\.\d", found.get("compute_cap", "")):
            return found
        self._why = first or done.why
        return {}

    def missing(self) -> str | None:
        """Why nothing can be run here, or None."""
        if not self._gpu:
            return f"nvidia-smi finds no GPU here: {self._why} (--rehearse does every step without one)"
        return None

    def lock(self) -> str | None:
        """Why another run keeps this one from its work folder, or None. From here on the driver stays loaded:
        between steps, when nobody has the device open, it would start anew."""
        with contextlib.suppress(OSError):
            self._device = os.open("/dev/nvidia0", os.O_RDONLY | os.O_CLOEXEC)
        self._lock = (self.work / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return f"--work {self.work}: another run is at work there"
        return None

    def named(self) -> dict[str, Any]:
        """What the report says of the machine before any step has run."""
        named: dict[str, Any] = {"rehearsal": self.options.rehearse, "gpu": self._gpu}
        written = self.options.carried / "commit" if self.options.carried else None
        carried = written.read_text(encoding="utf-8").strip() if written and written.exists() else ""
        if carried:
            named["carried"] = f"references of commit {carried}"
        return {**named, "commit": _commit() or carried or "unknown"}

    def start(self, step: Step, seconds: float, done: Sequence[str], failed: Sequence[str]) -> Process:
        name = step.name.replace(" ", "-").replace(",", "")
        log, results = self.work / f"{name}.log", self.work / f"{name}.jsonl"
        results.write_text("")
        if step.module:
            carried = self.options.carried
            until = time.monotonic() + max(seconds - MARGIN, 1.0)
            job = {
                "step": step.module, "part": step.part, "work": str(self.work),
                "carried": str(carried) if carried else None,
                "until": until, "rehearse": self.options.rehearse,
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
        package = [sys.executable, "setup.py", "-q", "build_py", "--force", "--build-lib", str(self.site)]
        return "\n".join([*([shlex.join(pip)] if wheels else []), shlex.join(package)])

    def _build(self) -> str:
        capability = self._gpu["compute_cap"].replace(".", "")
        settings = {
            # The processor's kernels take time and are not asked for, but in a rehearsal.
            "FASTNEGATE_BUILD_CPU": "1" if self.options.rehearse else "0",
            "FASTNEGATE_BUILD_CUDA": "auto" if self.options.rehearse else "1",
            "FASTNEGATE_CUDA_ARCHS": f"{capability}-real",
            "CMAKE_ARGS": shlex.join(
                ["-DFASTNEGATE_DRIVE=ON", f"-DCMAKE_RUNTIME_OUTPUT_DIRECTORY={self.work}"]
            ),
        }
        command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(self.site),
                   "--build-temp", str(self.work / "build")]  # fmt: skip
        assigned = " ".join(f"{name}={shlex.quote(value)}" for name, value in settings.items())
        return f"{assigned} {shlex.join(command)}"


class _Started:
    """A process of this machine."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path, results: Path):
        self._log, self._results, self._read = log, results, 0
        with log.open("w", encoding="utf-8") as output:
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
        return self._log.read_text(encoding="utf-8", errors="replace")


def _commit() -> str:
    """Of this checkout, with "+" if it has changes; empty where it has no history."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return ""
    head, changes = (
        child.run(["git", "-C", str(ROOT), *words], 20)
        for words in (("rev-parse", "--verify", "HEAD"), ("status", "--porcelain", "-uno"))
    )
    return head.output.strip() + "+" * bool(changes.output.strip()) if head.status == 0 else ""


# ---- the run ----------------------------------------------------------------------------------


class Clock(Protocol):
    def time(self) -> float: ...

    def sleep(self, seconds: float) -> None: ...


class RealClock:
    """Of this machine, whatever is done to its date."""

    def time(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class Starter(Protocol):
    def start(self, step: Step, seconds: float, done: Sequence[str], failed: Sequence[str]) -> Process: ...


class Book:
    """The report as it grows: both files are whole after every change."""

    def __init__(self, out: Path, content: dict[str, Any]) -> None:
        self.out, self.content = out, content
        old = out / "log.txt"
        self.log = old.read_text(encoding="utf-8") if old.exists() else ""  # of the report that is resumed

    @property
    def steps(self) -> dict[str, Any]:
        steps: dict[str, Any] = self.content["steps"]
        return steps

    def write(self) -> None:
        self._replace("report.json", json.dumps(self.content, indent=1) + "\n")
        self._replace("log.txt", self.log)
        self._replace("report.md", report.markdown(self.content))

    def _replace(self, name: str, text: str) -> None:
        new = self.out / f".{name}"
        new.write_text(text, encoding="utf-8")
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
        clock: Clock | None = None,
        slack: float = 1.0,
    ) -> None:
        self.starter, self.book, self.slack = starter, book, slack
        self.clock: Clock = clock or RealClock()
        self.asked = [step.name for step in steps]
        complete = {name for name in self.asked if report.complete(book.steps, name)}
        self.pending = [step for step in steps if step.makes or step.name not in complete]
        self.ended = {step.name for step in steps} - {step.name for step in self.pending}
        self.running: list[_Running] = []
        self.end = self.clock.time() + seconds
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
                self._close(running, "killed: the run ended")
            for step in self.pending:
                self._entry(step).setdefault("status", "not reached")
            self.book.write()
        return self.status or int(any(report.troubles(self.book.content, self.asked)))

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
            known = {} if step.makes else self.book.steps.get(step.name, {}).get("items", {})
            done = [n for n, found in known.items() if not report.is_open(found) or "spoiled" in found]
            failed = [n for n, found in known.items() if "failed" in found and n not in done]
            print(f"{step.name}: at most {seconds:.0f} s", flush=True)
            process = self.starter.start(step, seconds, done, failed)
            self.running.append(_Running(step, process, self.clock.time(), seconds))
            self._entry(step)["status"] = "running"
            self.pending.remove(step)
            started = True
        if started:
            self.book.write()
        return started

    def _limit(self, step: Step) -> float:
        """Seconds that the step may take."""
        left = self.end - self.clock.time()
        limit = step.seconds * self.slack * (2 if step.makes else 1)
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
            self._close(running, self._status(running, status))
            if status == AGAIN and running.step.module:
                self._again(running)
            if status == STICKY and running.step.module:
                self.status = STICKY
                for other in self.running:
                    self._close(other, f"killed: {running.step.name} lost the device")
                self.running.clear()
            self.over |= self.status == STICKY or (running.step.vital and status != 0)
            self.book.write()
            if self.over:
                return

    def _again(self, running: _Running) -> None:
        """Run what is left of the step in another process; what spoiled this one is not tried again."""
        self.ended.discard(running.step.name)
        self.pending.insert(0, running.step)

    def _status(self, running: _Running, status: int | None) -> str:
        if status is None:
            return f"killed after {running.limit:.0f} s"
        if status == 0:
            return "done"
        if running.step.module:
            known = {CUT: "cut: its time was over", STICKY: "lost the device", AGAIN: "spoiled its process"}
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
        running.process.kill()  # also what it left running
        self._read(running)
        entry = self._entry(running.step)
        inside = entry.pop("in", None)
        entry["status"] = status if inside is None or status == "done" else f"{status}, in {inside!r}"
        entry["seconds"] = round(self.clock.time() - running.begun, 1)
        entry["limit"] = round(running.limit, 1)
        entry["commit"] = self.book.content["commit"]
        if report.complete(self.book.steps, running.step.name):
            self.book.content["took"][running.step.name] = entry["seconds"]
        printed = running.process.printed()
        entry.pop("printed", None)
        if status.startswith(("died", "failed", "killed")):
            entry["printed"] = printed[-4000:]
        self.book.log += f"===== {running.step.name}: {entry['status']}\n{printed[-60_000:]}\n"
        self.ended.add(running.step.name)
        print(f"{running.step.name}: {entry['status']} ({entry['seconds']:.0f} s)", flush=True)


if __name__ == "__main__":
    sys.exit(main())
