# SPDX-License-Identifier: Apache-2.0
"""The run on a GPU, without one: what is planned, started, killed, resumed and written. By a clock that
is not real, except where processes are."""

from __future__ import annotations

import gzip
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastnegate.benchmarks import on_gpu
from fastnegate.benchmarks.gpu import child, report, step
from fastnegate.benchmarks.gpu.card import Rehearsal
from fastnegate.benchmarks.gpu.step import Item, Setting
from fastnegate.benchmarks.on_gpu import PLAN, PLANNED, Book, Run, Step

MACHINE = {"rehearsal": False, "commit": "abc", "gpu": {"name": "H100", "driver_version": "580"}}


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command is run in one; here it is imported from the installed package."""
    monkeypatch.setattr(on_gpu, "ROOT", ROOT)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += max(seconds, 0.25)


@dataclass
class Does:
    """What a step does: items, each after so many seconds, then the end after `seconds`, or never."""

    items: Sequence[dict[str, Any]] = ({"name": "it", "used": 0.5},)
    seconds: float = 3.0
    status: int | None = 0


@dataclass
class Fake:
    """Starts nothing."""

    clock: Clock
    does: dict[str, Does] = field(default_factory=dict)
    started: list[tuple[str, float, float]] = field(default_factory=list)  # name, when, limit
    asked: dict[str, tuple[list[str], list[str]]] = field(default_factory=dict)  # done, failed
    killed: list[str] = field(default_factory=list)

    def start(self, step: Step, seconds: float, done: Sequence[str], failed: Sequence[str]) -> Any:
        self.started.append((step.name, self.clock.now - 1000, seconds))
        self.asked[step.name] = ([*done], [*failed])
        does, begun, lines = self.does.get(step.name, Does()), self.clock.now, []
        for item in does.items if step.module else ():
            lines += [{"begin": item["name"]}, dict(item)]
        if does.status is None:
            lines.append({"begin": "the one that hangs"})

        def poll() -> int | None:
            return does.status if self.clock.now - begun >= does.seconds else None

        def taken() -> list[dict[str, Any]]:
            taken, lines[:] = lines[:], []
            return taken

        kill = lambda: self.killed.append(step.name)  # noqa: E731
        return SimpleNamespace(poll=poll, kill=kill, lines=taken, printed=lambda: f"printed by {step.name}")


class Checked(Book):
    """Both files are whole whenever they are written."""

    writes = 0

    def write(self) -> None:
        super().write()
        self.writes += 1
        report.check(json.loads((self.out / "report.json").read_text()))
        assert (self.out / "report.md").read_text().startswith("# ")
        assert len([*self.out.iterdir()]) <= 8


def run(
    out: Path, does: dict[str, Does] | None = None, minutes: float = 5, steps: Sequence[Step] = PLAN,
    old: dict[str, Any] | None = None,
) -> tuple[int, Fake, dict[str, Any]]:  # fmt: skip
    clock = Clock()
    fake = Fake(clock, does or {})
    out.mkdir(exist_ok=True)
    book = Checked(out, report.begun(MACHINE, old))
    status = Run(list(steps), 60 * minutes, fake, book, clock).to_the_end()
    return status, fake, json.loads((out / "report.json").read_text())


# ---- the plan ---------------------------------------------------------------------------------


def test_the_plan_takes_five_minutes_by_its_limits(tmp_path: Path) -> None:
    """Even if every step takes all that it may; and five more for what is behind it."""
    for steps, minutes in ((PLANNED, 5.0), (PLAN, 10.0)):
        slow = {s.name: Does(seconds=s.seconds - 0.3) for s in steps}
        status, _, found = run(tmp_path, slow, minutes, steps)
        assert status == 0
        assert {name: s["status"] for name, s in found["steps"].items()} == {s.name: "done" for s in steps}


def test_the_plan_is_in_order() -> None:
    names = [s.name for s in PLAN]
    assert len({*names}) == len(names)
    for number, planned in enumerate(PLAN):
        assert {*planned.after} <= {*names[:number]}
        if planned.module:
            assert importlib.import_module(f"fastnegate.benchmarks.gpu.steps.{planned.module}").items


def test_building_and_compiling_run_side_by_side(tmp_path: Path) -> None:
    _, fake, _ = run(tmp_path, {"build": Does(seconds=20), "triton": Does(seconds=30)})
    begun = {name: when for name, when, _ in fake.started}
    assert begun["build"] == begun["triton"] < 5
    assert begun["gate cuda"] < 30 < begun["gate triton"], "what can run does not wait for the other"
    ended = begun["doctor"] + 3
    assert begun["gate triton"] < ended <= begun["host"], "what is timed has the machine to itself"
    order = [name for name, *_ in fake.started if name in {"times", "models, batch 2", "tools", "tests"}]
    assert order == ["times", "models, batch 2", "tools", "tests"]


def test_time_that_is_left_goes_to_the_last_steps(tmp_path: Path) -> None:
    _, fake, _ = run(tmp_path)
    limits = {name: limit for name, _, limit in fake.started}
    planned = {s.name: s.seconds for s in PLAN}
    assert limits["times"] == planned["times"] and limits["tests"] > 4 * 60 > planned["tests"]


def test_what_no_time_is_left_for_is_not_reached(tmp_path: Path) -> None:
    status, fake, found = run(tmp_path, {s.name: Does(seconds=s.seconds - 0.3) for s in PLAN}, minutes=2.5)
    assert status == 1
    assert found["steps"]["doctor"]["status"] == "done"
    assert found["steps"]["tests"]["status"] == "not reached"
    assert fake.clock.now - 1000 <= 151


# ---- kills and failures -----------------------------------------------------------------------


@pytest.mark.parametrize("name", [s.name for s in PLAN])
def test_a_kill_in_every_step_leaves_a_report(name: str, tmp_path: Path) -> None:
    """With what the step had found; and the others run, unless nothing can."""
    status, fake, found = run(tmp_path, {name: Does(seconds=1e9, status=None)}, minutes=10)
    killed = found["steps"][name]
    assert status == 1 and name in fake.killed
    assert killed["status"].startswith("killed after ")
    module = next(s.module for s in PLAN if s.name == name)
    assert not module or (killed["items"] and killed["status"].endswith("in 'the one that hangs'"))
    others = {s["status"] for other, s in found["steps"].items() if other != name}
    assert others == ({"not reached"} if name == "site" else {"done"})
    assert f"- {name}: killed" in (tmp_path / "report.md").read_text()
    assert f"printed by {name}" in (tmp_path / "log.txt").read_text()


def test_a_lost_device_ends_the_run_and_is_named(tmp_path: Path) -> None:
    bad = {"name": "07 protore", "failed": "AcceleratorError: illegal memory access", "sticky": "the same"}
    status, fake, found = run(tmp_path, {"gate triton": Does([bad], status=3)})
    assert status == 3
    assert found["steps"]["gate triton"]["status"] == "lost the device"
    assert found["steps"]["times"]["status"] == "not reached" and "times" not in {n for n, *_ in fake.started}
    text = (tmp_path / "report.md").read_text()
    assert "- gate triton: 07 protore: AcceleratorError: illegal memory access" in text


@pytest.mark.parametrize(
    "status, said",
    ((4, "cut: its time was over"), (1, "died: exit status 1"), (-11, "died: exit status -11")),
)
def test_other_ends_are_named(status: int, said: str, tmp_path: Path) -> None:
    code, _, found = run(tmp_path, {"times": Does(status=status)})
    assert code == 1 and found["steps"]["times"]["status"] == said


def test_a_spoiled_process_is_followed_by_another(tmp_path: Path) -> None:
    """It does what is left; what spoiled the first is not tried again. Both have the step's time."""
    bad = {"name": "b", "failed": "CaptureError: no", "spoiled": True}
    second: list[Does] = []

    class Twice(Fake):
        def start(self, step: Step, seconds: float, done: Sequence[str], failed: Sequence[str]) -> Any:
            if step.name == "times":
                items = [{"name": "c", "us": 1}] if second else [{"name": "a", "us": 1}, bad]
                self.does["times"] = Does(items, status=0 if second else 5)
                second.append(self.does["times"])
            return super().start(step, seconds, done, failed)

    clock = Clock()
    fake = Twice(clock)
    book = Checked(tmp_path, report.begun(MACHINE, None))
    assert Run(list(PLAN), 300, fake, book, clock).to_the_end() == 1
    found = json.loads((tmp_path / "report.json").read_text())["steps"]["times"]
    assert found["status"] == "done" and {*found["items"]} == {*"abc"}
    assert fake.asked["times"] == (["a", "b"], [])
    assert [name for name, *_ in fake.started].count("times") == 2
    _, fake, _ = run(tmp_path, old=json.loads((tmp_path / "report.json").read_text()))
    assert fake.asked["times"] == (["a", "c"], ["b"]), "another call tries it again, last"


def test_an_interrupted_run_kills_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sleep(clock: Clock, seconds: float) -> None:
        clock.now += 1
        if clock.now > 1050:
            raise KeyboardInterrupt

    monkeypatch.setattr(Clock, "sleep", sleep)
    clock = Clock()
    fake = Fake(clock, {"build": Does(seconds=1e9), "triton": Does(seconds=1e9)})
    with pytest.raises(KeyboardInterrupt):
        Run(PLAN, 300, fake, Checked(tmp_path, report.begun(MACHINE, None)), clock).to_the_end()
    found = json.loads((tmp_path / "report.json").read_text())
    assert {"build", "triton"} <= {*fake.killed}
    assert found["steps"]["build"]["status"] == "killed: the run ended"
    assert found["steps"]["times"]["status"] == "not reached"


def test_success_takes_more_than_no_failure(tmp_path: Path) -> None:
    """What was cut, and steps that checked nothing, are no success; and another call tries them again."""
    nothing = {
        "gate cuda": Does([{"name": "a", "refused": "no"}]),
        "tools": Does([{"name": "b", "skipped": "x"}]),
    }
    cut = {"times": Does([{"name": "c", "cut": "no time"}])}
    for does in (nothing, cut):
        status, _, found = run(tmp_path, does)
        assert status == 1
        text = (tmp_path / "report.md").read_text()
        assert all(f"- {name}: " in text.partition("## Steps")[0] for name in does)
        assert "times" in found["took"] or does is cut
    _, fake, _ = run(tmp_path, old=found)
    assert "times" in {name for name, *_ in fake.started}


def test_only_what_was_asked_for_decides(tmp_path: Path) -> None:
    _, _, old = run(tmp_path, {"tests": Does(seconds=1e9, status=None)})
    status, _, _ = run(tmp_path, steps=on_gpu.chosen(["host"]), old=old)
    assert status == 0


def test_a_report_is_written_whatever_is_in_it(tmp_path: Path) -> None:
    """The parts that cannot be shown say so."""
    strange = [{"name": name, "us": {"cuda": 1}, "ms": None, "eager": {"ms": {"none": 1.0}}} for name in "ab"]
    for name in ("times", "models, batch 2", "host", "tools", "gate cuda"):
        _, _, found = run(tmp_path, {name: Does(strange)})
        assert found["steps"][name]["items"]["a"]["us"] == {"cuda": 1}
    assert "Not shown: " in report.markdown({**found, "steps": {"times": {"items": {"a": {"us": {}}}}}})


def test_a_killed_run_is_resumed_as_killed(tmp_path: Path) -> None:
    _, _, old = run(tmp_path)
    old["steps"]["times"]["status"] = "running"
    assert report.begun(MACHINE, old)["steps"]["times"]["status"] == "killed: the run ended"
    _, fake, _ = run(tmp_path, old=old)
    assert "times" in {name for name, *_ in fake.started}


@pytest.mark.parametrize("stop", (signal.SIGTERM, signal.SIGHUP, signal.SIGINT))
def test_a_signal_ends_what_runs(stop: signal.Signals, tmp_path: Path) -> None:
    """A real run, whose steps are real processes."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks.on_gpu", "--rehearse", "--only", "doctor", "--out", out]
    environment = {**os.environ, "MAX_JOBS": "1"}
    running = subprocess.Popen(
        [*command, "--work", tmp_path / "work"], cwd=ROOT, env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for _ in range(600):
            path = out / "report.json"
            steps = json.loads(path.read_text())["steps"] if path.exists() else {}
            if steps.get("build", {}).get("status") == "running":
                break
            time.sleep(0.1)
        else:
            pytest.fail("the build does not begin")
        time.sleep(1)
        running.send_signal(stop)
        assert running.wait(30) != 0
    finally:
        child.kill(running)
    found = json.loads(path.read_text())["steps"]
    assert found["build"]["status"] == "killed: the run ended" and found["doctor"]["status"] == "not reached"
    mine = str(tmp_path)
    for _ in range(100):
        left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if mine in _read(p)]
        if not left:
            break
        time.sleep(0.1)
    assert not left, [_read(p) for p in left]


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # it has ended
        return ""


# ---- resuming ---------------------------------------------------------------------------------


def test_a_second_call_does_what_is_missing(tmp_path: Path) -> None:
    """Builds anew, since the machine is another one; skips what is whole; of the rest, items that failed are
    tried again, after those that were never tried."""
    wrong = {"name": "b", "failed": "AssertionError: row 3"}
    first = {"gate cuda": Does([{"name": "a", "used": 0.1}, wrong]), "times": Does(seconds=1e9, status=None)}
    _, _, old = run(tmp_path, first)
    status, fake, found = run(tmp_path, {"gate cuda": Does([{"name": "b", "used": 0.2}])}, old=old)
    started = {name for name, *_ in fake.started}
    assert status == 0 and {"site", "build", "gate cuda", "times"} <= started
    assert not started & {"doctor", "gate triton", "host", "tools"}
    assert fake.asked["gate cuda"] == (["a"], ["b"]) and fake.asked["times"] == (["it"], [])
    items = found["steps"]["gate cuda"]["items"]
    assert items == {"a": {"used": 0.1, "commit": "abc"}, "b": {"used": 0.2}}
    assert fake.asked["triton"] == ([], []), "another machine has no compiled kernels either"


def test_limits_follow_the_last_report(tmp_path: Path) -> None:
    _, _, old = run(tmp_path, {"build": Does(seconds=140)})
    _, fake, _ = run(tmp_path, old=old, minutes=9)
    limits = {name: limit for name, _, limit in fake.started}
    assert limits["build"] == pytest.approx(1.5 * 140, abs=1)


def test_another_card_is_refused(tmp_path: Path) -> None:
    _, _, old = run(tmp_path)
    assert report.another(old, MACHINE) is None
    other = {**MACHINE, "gpu": {"name": "H200"}}
    assert "'H100'" in (report.another(old, other) or "") and "'H200'" in (report.another(old, other) or "")
    rehearsal = {**MACHINE, "rehearsal": True}
    assert "rehearsal" in (report.another(old, rehearsal) or "")


# ---- the command ------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for output, said in (
        ("Failed to initialize NVML: Driver/library version mismatch", "Failed to initialize NVML"),
        ("A100, 580.1, [N/A]", "A100"),
        ("", "No such file"),
    ):
        done = child.Done(0 if output else 127, output or "No such file or directory: 'nvidia-smi'", 0.0)
        monkeypatch.setattr(on_gpu.child, "run", lambda *command, done=done: done)
        assert on_gpu.main(["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.startswith(f"on_gpu: nvidia-smi finds no GPU here: {said}")
    assert not any(tmp_path.iterdir())


def test_an_installed_package_is_no_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(on_gpu, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="2"):
        on_gpu.main([])
    assert "is no checkout" in capsys.readouterr().err


WRONG = (
    ("--minutes", "0"), ("--minutes", "-3"), ("--only", "dreams"), ("--resume", "none.json"),
    ("--carried", "nowhere"), ("--wheels", "nowhere"), ("--carried", "benchmarks"),
)  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_options(wrong: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        on_gpu.main([*wrong])
    assert wrong[0] in capsys.readouterr().err


def test_a_report_of_another_kind_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    whole = {**report.begun(MACHINE, None), "steps": {"times": {"status": "done", "items": {}}}}
    report.check(whole)
    wrong = [
        "", [], {**whole, "version": 0}, {**whole, "steps": {"times": {}}}, {**whole, "took": {"times": "1"}},
        {**whole, "steps": {"times": {"status": "done", "items": {"a": 1}}}},
    ]  # fmt: skip
    wrong += [{name: field for name, field in whole.items() if name != missing} for missing in whole]
    for content in wrong:
        path.write_text(json.dumps(content) if content != "" else "{")
        with pytest.raises(SystemExit, match="2"):
            on_gpu.main(["--resume", str(path)])
        assert f"--resume {path}: " in capsys.readouterr().err


def test_only_brings_what_comes_before() -> None:
    assert [s.name for s in on_gpu.chosen(["tools"])] == ["site", "build", "tools"]
    assert on_gpu.chosen(None) == [*PLAN]


def test_commands_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The build is for this card; wheels are added; a job says what is done and by when it must end."""
    smi = "#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 580.1, 9.0'\n"
    (tmp_path / "nvidia-smi").write_text(smi)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    wheels = tmp_path / "carried" / "wheels"
    wheels.mkdir(parents=True)
    (wheels / "a-1-py3-none-any.whl").touch()
    work = tmp_path / "work with a space"
    (wheels.parent / "references.pt.gz").write_bytes(gzip.compress(b"anything"))
    (wheels.parent / "commit").write_text("fed\n")
    options = on_gpu.parsed(["--carried", str(wheels.parent), "--work", str(work)])
    work.mkdir()
    machine = on_gpu.Machine(options)
    assert machine.named()["carried"] == "references of commit fed"
    assert machine.missing() is None
    assert machine.named()["gpu"] == {
        "name": "NVIDIA H100 80GB HBM3", "driver_version": "580.1", "compute_cap": "9.0",
    }  # fmt: skip
    assert (
        "FASTNEGATE_CUDA_ARCHS=90-real" in machine._build() and "FASTNEGATE_BUILD_CUDA=1" in machine._build()
    )
    assert "--no-index" in machine._make_site() and "a-1-py3-none-any.whl" in machine._make_site()
    settings = shlex.split(machine._build())
    (cmake,) = [word.removeprefix("CMAKE_ARGS=") for word in settings if word.startswith("CMAKE_ARGS=")]
    assert shlex.split(cmake)[1] == f"-DCMAKE_RUNTIME_OUTPUT_DIRECTORY={work}"
    assert machine.lock() is None and "another run" in (on_gpu.Machine(options).lock() or "")
    started: list[list[str]] = []
    monkeypatch.setattr(on_gpu, "_Started", lambda command, *rest: started.append(command))
    machine.start(next(s for s in PLAN if s.name == "gate cuda"), 20.0, ["a"], ["b"])
    job = step.Job(**json.loads(Path(started[0][-1]).read_text()))
    assert (job.step, job.part, job.done, job.failed, job.rehearse) == ("gate", "cuda", ["a"], ["b"], False)
    assert job.until == pytest.approx(time.monotonic() + 20 - on_gpu.MARGIN, abs=5)


def test_a_process_ends_with_its_children(tmp_path: Path) -> None:
    """And a line that it had only begun does no harm."""
    results = tmp_path / "results"
    code = (
        "import os, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '600'], preexec_fn=os.setpgrp)\n"  # as child.run starts it
        f"f = open({str(results)!r}, 'a')\n"
        'f.write(\'{"name": "a"}\\n{"name": "\'); f.flush()\n'
        "print(child.pid, flush=True); time.sleep(600)\n"
    )
    results.write_text("")
    started = on_gpu._Started([sys.executable, "-c", code], {}, tmp_path / "log", results)
    lines = []
    for _ in range(200):
        lines += started.lines()
        if lines and started.printed().strip():
            break
        time.sleep(0.05)
    assert lines == [{"name": "a"}] and started.poll() is None
    started.kill()
    assert started.poll() is not None
    pid = int(started.printed())
    for _ in range(100):  # a zombie until somebody reaps it
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split(") ")[1].startswith("Z"):
            break
        time.sleep(0.05)
    else:
        pytest.fail("its child runs on")
    assert started.lines() == []


def test_a_child_is_stopped_at_its_limit() -> None:
    done = child.run(["sh", "-c", "echo begun; sleep 600"], 0.5)
    assert done.status is None and done.output == "begun\n" and done.why.startswith("killed after ")
    assert child.run(["sh", "-c", "echo no >&2; exit 3"], 9).why == "exit status 3: no"
    assert child.run(["sh", "-c", "kill -SEGV $$"], 9).why == "died of SIGSEGV"


# ---- a step -----------------------------------------------------------------------------------


def setting(seconds: float = 60.0) -> Setting:
    return Setting(Rehearsal(), Path(), None, time.monotonic() + seconds, "cuda", small=True)


def items(*does: Callable[[], dict[str, Any]]) -> Iterator[Item]:
    return (Item("abcdef"[i], run) for i, run in enumerate(does))


def test_items_are_written_one_by_one() -> None:
    lines: list[dict[str, Any]] = []
    status = step.run(items(lambda: {"x": 1}, lambda: 1 / 0, lambda: {"x": 3}), setting(), lines.append)
    assert status == step.THROUGH
    assert [line.get("begin") or line["name"] for line in lines] == [*"aabbcc"]
    assert lines[1]["x"] == 1 and lines[3]["failed"] == "ZeroDivisionError: division by zero"
    assert "1 / 0" in lines[3]["trace"] and "sticky" not in lines[3]


def test_what_failed_before_comes_last() -> None:
    lines: list[dict[str, Any]] = []
    step.run(items(*[dict] * 4), setting(), lines.append, done=["b"], failed=["a"])
    assert [line["name"] for line in lines if "name" in line] == ["c", "d", "a"]


def test_a_step_whose_time_is_over_begins_nothing() -> None:
    lines: list[dict[str, Any]] = []
    assert step.run(items(dict), setting(-1.0), lines.append) == step.CUT and lines == []


def test_an_error_that_stays_ends_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lost(Rehearsal):
        lost = False

        def synchronize(self) -> None:
            if self.lost:
                raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    card = Lost()
    lines: list[dict[str, Any]] = []

    def lose() -> dict[str, Any]:
        card.lost = True
        return {"used": 0.1}

    of = Setting(card, Path(), None, time.monotonic() + 60)
    assert step.run(items(lose, dict), of, lines.append) == step.STICKY
    assert len(lines) == 2 and "used" not in lines[1], "what was asynchronous is this item's fault"
    for key in ("failed", "sticky"):
        assert lines[1][key] == "RuntimeError: CUDA error: an illegal memory access was encountered"


def test_a_step_is_a_process(tmp_path: Path) -> None:
    """The doctor's, whole: a job in a file, lines in another."""
    job = step.Job(
        "doctor",
        "",
        str(tmp_path),
        None,
        time.monotonic() + 120,
        True,
        str(tmp_path / "lines"),
        ["doctor"],
        [],
    )
    (tmp_path / "job.json").write_text(json.dumps(job._asdict()))
    command = [sys.executable, "-m", "fastnegate.benchmarks.gpu.step", str(tmp_path / "job.json")]
    assert child.run(command, 120).status == 0
    begun, machine = map(json.loads, (tmp_path / "lines").read_text().splitlines())
    assert begun == {"begin": "machine"} and machine["gpu"].startswith("none")


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_the_whole_run(tmp_path: Path) -> None:
    """Every step as a process, with the processor in the card's place."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks.on_gpu", "--rehearse", "--minutes", "50"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        done = child.run([*command, "--out", out, "--work", tmp_path / "work"], 3600)
    found = json.loads((out / "report.json").read_text())
    assert done.status == 0, done.output
    assert {name: s["status"] for name, s in found["steps"].items()} == {s.name: "done" for s in PLAN}
    skipped = [name for name, s in found["steps"].items() for i in s["items"].values() if "skipped" in i]
    assert {*skipped} == {"triton", "tools"}
    assert found["steps"]["tests"]["items"]["tests/gpu"]["counts"]["passed"] > 200
    assert len([*out.iterdir()]) <= 8
