# SPDX-License-Identifier: Apache-2.0
"""The report of a GPU, up to where a GPU is needed: what it plans, checks, counts and writes."""

from __future__ import annotations

import contextlib
import json
import re
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastnegate.benchmarks import gpu_report
from fastnegate.benchmarks.gpu_report import Check, Timing
from fastnegate.benchmarks.operator import cases, machine
from fastnegate.benchmarks.operator.baselines import attentions, sdpa
from fastnegate.benchmarks.operator.cases import CONCEPTS, DTYPES, LAYERS, METHODS, Layer, make, moved
from fastnegate.benchmarks.operator.measure import compulsory_bytes, wall
from fastnegate.benchmarks.tables import table

import fastnegate as fn
from fastnegate.backends import cpu

TINY = Layer("tiny", heads=2, queries=64, dim=16, keys=24)

pytestmark = pytest.mark.usefixtures("one_thread")
needs_kernel = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"{cpu.unavailable()}")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cases.LAYERS, "tiny", TINY)


class Still:
    """Takes the place of a GPU: the same calls, on the processor, by its clock."""

    device = "cpu"

    def facts(self) -> dict:
        return {"gpu": "none", "driver": "1.2", "commit": "abc"}

    def state(self) -> dict[str, str]:
        return {"clocks.sm": "1410"}

    def timers(self, call: Callable[[], object], query: torch.Tensor) -> dict:
        call()
        return {state: partial(wall, call) for state in ("cold", "warm", "repeated")}


def options(out: Path, **changes: object) -> Namespace:
    chosen = {"layers": ["tiny"], "concepts": ["none", "1x8"], "methods": ["protore"], "dtypes": ["float32"]}
    return Namespace(**chosen, **changes, backend="cpu", rounds=3, out=out)


# ---- without a GPU ----------------------------------------------------------------------------


def test_without_a_gpu_it_says_so_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_report, "run", lambda *arguments: pytest.fail("it ran"))
    assert gpu_report.main(["--out", str(tmp_path / "report")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "gpu_report: torch finds no GPU on this machine; nothing was run\n"
    assert not any(tmp_path.iterdir())


def test_without_kernels_it_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu_report.main(["--backend", "cuda"]) == 2
    assert capsys.readouterr().err == (
        f"gpu_report: {fn.backends()['cuda']}; nothing was run\n"  # the reason of `fastnegate doctor`
    )


@pytest.mark.parametrize("wrong", (["--rounds", "0"], ["--layers", "sd9"], ["--dtypes", "int8"]))
def test_wrong_options(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu_report.main(wrong)
    assert wrong[0] in capsys.readouterr().err


# ---- the plan ---------------------------------------------------------------------------------


def test_plan(tmp_path: Path) -> None:
    wanted = options(tmp_path)
    wanted.methods, wanted.dtypes = ["protore", "nag"], ["float16", "bfloat16"]
    steps = list(gpu_report.plan(wanted))
    checks = [step for step in steps if isinstance(step, Check)]
    assert steps[: len(checks)] == checks, "a wrong kernel is known before its time"
    sizes = {(layer.dim, layer.keys) for layer in LAYERS.values()}
    assert {(c.preset, c.dtype, (c.dim, c.keys)) for c in checks} == {
        (preset, dtype, size) for preset in fn.presets() for dtype in DTYPES for size in sizes
    }
    assert [step[1:] for step in steps[len(checks) :]] == [
        (dtype, method, concepts)
        for dtype in ("float16", "bfloat16")
        for method, concepts in (("protore", "none"), ("protore", "1x8"), ("nag", "1x8"))
    ]
    assert len({str(step) for step in steps}) == len(steps)


# ---- accuracy ---------------------------------------------------------------------------------


@needs_kernel
@pytest.mark.parametrize("preset", fn.presets())
def test_check(preset: str, tmp_path: Path) -> None:
    found = Check(preset, "float16", 40, 120).run(Still(), options(tmp_path))
    assert 0 < found["used"] <= 1 and "failed" not in found
    assert (found["preset"], found["dtype"], found["dim"]) == (preset, "float16", 40)


def spoiled(monkeypatch: pytest.MonkeyPatch, spoil: Callable) -> None:
    original = gpu_report._call
    monkeypatch.setattr(
        gpu_report, "_call", lambda operator, *rest: spoil(operator, original(operator, *rest))
    )


@needs_kernel
def test_check_finds_wrong_outputs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And wrong statistics: a few thousandths."""
    check = Check("protore", "float32", 64, 77)

    def output(operator: Callable, result):
        return 1.001 * result if operator is fn.negated_attention else result

    def heat(operator: Callable, result):
        return result if operator is fn.negated_attention else (
            result[0], result[1]._replace(heat=result[1].heat + 0.002)
        )  # fmt: skip

    for spoil, error in ((output, r"AssertionError: .*errs by"), (heat, "AssertionError: .*heat is")):
        with monkeypatch.context() as patch:
            spoiled(patch, spoil)
            assert re.match(error, check.run(Still(), options(tmp_path))["failed"])


@needs_kernel
def test_check_that_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpu, "supports", lambda problem: "not today")
    assert Check("nag", "float32", 64, 77).run(Still(), options(tmp_path))["refused"] == "not today"


def test_moved() -> None:
    case = make(TINY, CONCEPTS["4x8"], METHODS["protore"], torch.float16)
    away = moved(case, "meta")
    for name in ("query", "key", "value"):
        old, new = getattr(case, name), getattr(away, name)
        assert new.is_meta and (new.dtype, new.shape, new.stride()) == (old.dtype, old.shape, old.stride())
    tensors = [x for x in vars(away.tokens).values() if isinstance(x, torch.Tensor)]
    assert len(tensors) >= 4 and all(x.is_meta for x in tensors)
    assert (away.rule, away.name, away.tokens.busiest) == (case.rule, case.name, case.tokens.busiest)
    assert not case.tokens.key.is_meta


# ---- time -------------------------------------------------------------------------------------


def test_attentions_are_attention() -> None:
    case = make(TINY, CONCEPTS["none"], METHODS["protore"])
    found = attentions(case)
    assert {"sdpa flash", "sdpa cuDNN", "sdpa efficient"} <= {*found}
    torch.testing.assert_close(found["sdpa flash"](), sdpa(case)())  # the one that exists on a CPU
    with pytest.raises(RuntimeError):
        found["sdpa cuDNN"]()


def test_what_is_timed() -> None:
    case = make(TINY, CONCEPTS["1x8"], METHODS["vsf"])
    names = [*gpu_report.calls(case, "cpu")]
    assert names[:2] == ["fused", "fused, no concepts"] and names[-1] == gpu_report.FLOOR
    assert {"sdpa", "eager", "eager, compiled", "sdpa concatenated, compiled", "sdpa flash"} <= {*names}
    none = make(TINY, CONCEPTS["none"], METHODS["vsf"])
    assert "fused, no concepts" not in gpu_report.calls(none, "cpu")


@needs_kernel
def test_fused_is_the_backend_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(TINY, CONCEPTS["1x8"], METHODS["protore"])
    monkeypatch.setattr(cpu, "supports", lambda problem: "not today")
    with pytest.raises(fn.BackendError, match="not today"):  # `auto` would take the reference
        gpu_report.calls(case, "cpu")["fused"]()


def test_row() -> None:
    seconds = {"fused": [2e-6, 4e-6, 3e-6], "sdpa": [4e-6, 8e-6, 6e-6], gpu_report.FLOOR: [1e-6] * 3}
    row = gpu_report.row(3000, {"cold": seconds})
    cold = row["states"]["cold"]
    assert cold["us"] == pytest.approx({"fused": 3.0, "sdpa": 6.0, gpu_report.FLOOR: 1.0})
    assert cold["gbytes"] == pytest.approx(1.0)
    assert cold["fused_over"] == {"sdpa": {"median": 0.5, "low": 0.5, "high": 0.5}}
    assert row["seconds"]["cold"] == seconds


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`torch.cuda` without a GPU: what is asked of it, in order. A captured graph repeats nothing."""
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("record")

        def synchronize(self) -> None:
            done.append("synchronize")

        def elapsed_time(self, end: Event) -> float:
            return 40.0  # milliseconds

    stream = SimpleNamespace(wait_stream=lambda other: done.append("wait"))
    fake = {
        "Event": Event,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": contextlib.nullcontext,
        "graph": contextlib.nullcontext,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: done.append("replay")),
        "current_device": lambda: 0,
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=4096),
    }
    for name, item in fake.items():
        monkeypatch.setattr(torch.cuda, name, item)
    monkeypatch.setattr(gpu_report, "FLUSH", 1 << 12)
    monkeypatch.setattr(gpu_report.CudaGpu, "device", "cpu")
    return done


def test_timers_of_a_gpu(cuda: list[str]) -> None:
    gpu = gpu_report.CudaGpu()
    assert gpu._flush.nbytes == 4 * 4096
    query = torch.ones(3)
    timers = gpu.timers(lambda: cuda.append("call"), query)
    # Each of two graphs: runs that compile, then what is captured.
    captures = [["wait", *["call"] * 3, "wait", *["call"] * times] for times in (1, gpu_report.REPEATED)]
    assert cuda == [*captures[0], *captures[1]]
    gpu._flush = SimpleNamespace(sum=lambda: cuda.append("flush"))
    for state, seconds in (("cold", 0.04), ("warm", 0.04), ("repeated", 0.04 / gpu_report.REPEATED)):
        cuda.clear()
        query.zero_()
        assert timers[state]() == pytest.approx(seconds)
        assert cuda == ["flush", "record", "replay", "record", "synchronize"]
        assert bool(query.any()) == (state == "warm"), "the query is written, with what it was, only there"


# ---- the files --------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some steps of the plan, without the minutes that compilers take."""
    plan, baselines = gpu_report.plan, gpu_report.baselines

    def some(wanted: Namespace):
        for step in plan(wanted):
            if isinstance(step, Timing) or (step.dim, step.dtype) == (40, "float16"):
                yield step

    monkeypatch.setattr(gpu_report, "plan", some)
    monkeypatch.setattr(
        gpu_report, "baselines", lambda case, with_compile: baselines(case, with_compile=False)
    )


@needs_kernel
def test_report(few: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_report.run(options(tmp_path / "new"), Still()) == 0
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    assert report["facts"]["driver"] == "1.2"
    assert [check["preset"] for check in report["checks"]] == [*fn.presets()]
    assert all(0 < check["used"] <= 1 for check in report["checks"])
    none, one = report["rows"]
    assert (none["concepts"], one["concepts"], one["gpu"]) == ("none", "1x8", {"clocks.sm": "1410"})
    assert {*one["states"]} == {"cold", "warm", "repeated"}
    cold = one["states"]["cold"]
    assert {"fused, no concepts", "sdpa", "eager", "sdpa + tail", "sdpa flash"} == {*cold["fused_over"]}
    assert len(one["seconds"]["warm"]["eager"]) == 3
    case = make(TINY, CONCEPTS["1x8"], METHODS["protore"])
    assert cold["gbytes"] == pytest.approx(compulsory_bytes(case) / (1e3 * cold["us"]["fused"]))
    assert {*one["left_out"]} == {"sdpa cuDNN", "sdpa efficient"}
    assert all("Error: " in why for why in one["left_out"].values())
    text = (tmp_path / "new" / "report.md").read_text()
    assert "- gpu: none" in text and "## Failed" not in text
    assert text.count("\n### ") == 3 and "tiny float32 protore 1x8, sdpa cuDNN: " in text
    assert f"{cold['us']['fused']:.1f}" in text
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1
    assert capsys.readouterr().out.count(": ok\n") == len(report["checks"]) + len(report["rows"])


@needs_kernel
def test_failures_are_at_the_top_and_in_the_status(
    few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled(monkeypatch, lambda operator, result: result * 2 if isinstance(result, torch.Tensor) else result)
    monkeypatch.setattr(Still, "timers", lambda self, call, query: 1 / 0)
    assert gpu_report.run(options(tmp_path), Still()) == 1
    text = (tmp_path / "report.md").read_text()
    failures = text.partition("## Failed\n\n")[2].partition("\n\n")[0].splitlines()
    assert len(failures) == len(fn.presets()) + 2
    assert "- tiny float32 protore 1x8: ZeroDivisionError: division by zero" in failures
    assert "## Time" not in text


def test_accuracy_table_shows_the_worst() -> None:
    checks = [
        {"preset": "nag", "dtype": "float16", "used": 0.25},
        {"preset": "nag", "dtype": "float16", "used": 0.5},
        {"preset": "nag", "dtype": "float32", "used": 0.5},
        {"preset": "nag", "dtype": "float32", "failed": "x"},
        {"preset": "casteer", "dtype": "float16", "refused": "no"},
    ]
    lines = gpu_report._accuracy(checks).splitlines()[-2:]
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines] == [
        ["nag", "0.50", "failed"], ["casteer", "no", "-"],
    ]  # fmt: skip


def test_table() -> None:
    assert table(["a", "long"], [["1.25", "x"]]) == "| a    | long |\n| ---- | ---- |\n| 1.25 | x    |"


# ---- facts ------------------------------------------------------------------------------------


def test_parse_smi() -> None:
    names = ("clocks.sm", "power.limit")
    assert machine.parse_smi(names, "1980, 700.00\n345, 350.00\n") == {
        "clocks.sm": "1980", "power.limit": "700.00",
    }  # fmt: skip
    assert machine.parse_smi(names, "") == {"clocks.sm": ""}


def test_facts_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(
        name="A100", major=8, minor=0, multi_processor_count=108, total_memory=80 << 30,
        L2_cache_size=40 << 20, uuid="1-2",
    )  # fmt: skip
    asked: list[list[str]] = []

    def smi(command: list[str], **options: object) -> SimpleNamespace:
        asked.append(command)
        return SimpleNamespace(returncode=0, stdout="580.1\n")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(machine, "commit", lambda: "abc")
    monkeypatch.setattr(machine.shutil, "which", lambda name: name)
    monkeypatch.setattr(machine.subprocess, "run", smi)
    facts = machine.gpu_facts()
    expected = {"gpu": "A100", "capability": "8.0", "multiprocessors": 108, "l2_mbytes": 40.0}
    expected |= {"driver": "580.1", "torch": torch.__version__, "commit": "abc"}
    assert expected.items() <= facts.items() and {"triton", "cuda", "fastnegate"} <= {*facts}
    assert asked[0][:3] == ["nvidia-smi", "--id=GPU-1-2", "--query-gpu=driver_version"]
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert machine.gpu_state() == {} and machine.gpu_facts()["driver"] == "unknown"


def test_commit() -> None:
    assert re.fullmatch(r"[0-9a-f]{40}\+?|unknown", machine.commit())
