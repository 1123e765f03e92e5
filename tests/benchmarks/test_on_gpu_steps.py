# SPDX-License-Identifier: Apache-2.0
"""The steps of the run on a GPU, with the processor in its place: each as far as the first call that needs a
device; and that the gate finds what it is there to find."""

from __future__ import annotations

import contextlib
import json
import math
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastnegate.benchmarks.gpu import card, carried, child, report, step
from fastnegate.benchmarks.gpu.card import CudaCard, Rehearsal
from fastnegate.benchmarks.gpu.step import Setting
from fastnegate.benchmarks.gpu.steps import end_to_end, gate, gpu_tests, host, times
from fastnegate.benchmarks.operator import cases
from fastnegate.benchmarks.operator.cases import CONCEPTS, METHODS, Layer, make, noise
from fastnegate.benchmarks.pipeline import models
from support import make_problem
from torch import Tensor

import fastnegate as fn
from fastnegate.operator.backends import cpu
from fastnegate.operator.problem import Problem
from fastnegate.testing import Judge

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(cpu.unavailable() is not None, reason=f"{cpu.unavailable()}"),
]


def setting(part: str = "cuda") -> Setting:
    return Setting(Rehearsal(), Path(), None, time.monotonic() + 600, part, small=True)


def found_by(items: Iterator[step.Item]) -> dict[str, dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    with torch.inference_mode():
        assert step.run(items, setting(), lines.append) == step.THROUGH
    return {line["name"]: line for line in lines if "name" in line}


# ---- the gate ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `--prepare` writes, from an index that has nothing but the names."""
    folder = tmp_path_factory.mktemp("carried")

    real = subprocess.run

    def download(command: list[str], **options: Any) -> Any:
        if "download" not in command:
            return real(command, **options)
        target = Path(command[command.index("-d") + 1])
        assert {*carried.WHEELS} <= {*command} and "--no-deps" in command
        target.mkdir(exist_ok=True)
        (target / "diffusers-1-py3-none-any.whl").write_text("a wheel")
        return SimpleNamespace(returncode=0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(carried.subprocess, "run", download)
        carried.prepare(folder)
    return folder


def test_what_is_carried(prepared: Path) -> None:
    """Some forty problems that both backends take, small enough beside the wheels, judged as if made here."""
    total = sum(path.stat().st_size for path in prepared.rglob("*") if path.is_file())
    assert total < 9 << 20
    problems = carried.load(prepared)
    assert 35 <= len(problems.gate) <= 50
    assert (prepared / "commit").read_text().strip() == problems.commit
    of_dims = {judge.problem.sizes[-1] for judge in problems.gate.values()}
    assert of_dims == {40, 64, 80, 128, 160}
    name, fresh = next(carried.gate_problems())
    judge = problems.gate[name]
    for field in ("query", "key", "value"):
        a, b = getattr(judge.problem, field), getattr(fresh.problem, field)
        assert torch.equal(a, b) and a.stride() == b.stride()
    assert judge.allowed == fresh.allowed and judge.problem.rule.codes == fresh.problem.rule.codes
    output = fn.negated_attention(
        *(getattr(fresh.problem, f) for f in ("query", "key", "value", "concepts", "rule")),
        scale=fresh.problem.scale, key_bias=fresh.problem.key_bias, backend="cpu",
    )  # fmt: skip
    assert judge.check(output) == pytest.approx(fresh.check(output), rel=1e-4)


def test_layouts_are_carried(prepared: Path) -> None:
    strides = [judge.problem.key.stride()[0] for judge in carried.load(prepared).gate.values()]
    assert 0 in strides and any(strides)


def test_nothing_carried_is_read_by_mistake(tmp_path: Path) -> None:
    for content in (None, b"no gzip", b"\x1f\x8b broken"):
        if content is not None:
            (tmp_path / carried.REFERENCES).write_bytes(content)
        carried.load.cache_clear()
        with pytest.raises(ValueError, match=r"references\.pt\.gz: .*make it anew with --prepare"):
            carried.load(tmp_path)


def test_too_much_to_carry_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carried, "gate_problems", lambda: iter(()))
    monkeypatch.setattr(carried, "_download", lambda folder: None)
    monkeypatch.setattr(carried, "MOST_BYTES", 10)
    with pytest.raises(RuntimeError, match="are more than 0 MiB"):
        carried.prepare(tmp_path)


def test_an_index_that_has_nothing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no = SimpleNamespace(returncode=1, stderr="ERROR: No matching distribution")
    monkeypatch.setattr(subprocess, "run", lambda *command, **options: no)
    with pytest.raises(RuntimeError, match=r"pip cannot download diffusers, .*: ERROR: No matching"):
        carried._download(tmp_path)


@pytest.fixture
def of(prepared: Path) -> Setting:
    return Setting(Rehearsal(), Path(), prepared, time.monotonic() + 600, "triton", small=True)


def test_the_gate(of: Setting) -> None:
    found = found_by(gate.items(of))
    judged = [item for item in found.values() if "used" in item]
    assert len(judged) >= 35 and all(0 <= item["used"] <= 1 for item in judged)
    assert sum("kept" in item for item in found.values()) == 12
    assert not any("failed" in item for item in found.values())


def few(of: Setting) -> Iterator[step.Item]:
    """A problem, and the promises."""
    items = [*gate.items(of)]
    return iter([items[0], *(item for item in items if "," in item.name)])


def spoiled(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Problem, Any], Any]) -> None:
    real = gate.operator

    def operator(problem: Problem, backend: str, function: Any = fn.negated_attention) -> Any:
        result = real(problem, backend, function)
        if isinstance(result, tuple):
            return spoil(problem, result[0]), result[1]
        return spoil(problem, result)

    monkeypatch.setattr(gate, "operator", operator)


def _neighbours(problem: Problem, output: Tensor) -> Tensor:
    return output + 0 * problem.query.sum()


def _masked_too(problem: Problem, output: Tensor) -> Tensor:
    return output + 0 * problem.key.sum()


counter = iter(range(10**9))


@pytest.mark.parametrize(
    "spoil, finds",
    (
        (lambda p, output: 1.05 * output, "00 "),
        (lambda p, output: output + (next(counter) % 7 == 3) * 1e-2, "repeated"),
        (_neighbours, "other rows"),
        (_masked_too, "masked"),
        (lambda p, output: output + (0.01 if p.concepts is not None else 0.0), "without entries"),
    ),
    ids=("values", "repeats", "rows", "masks", "plain"),
)
def test_the_gate_finds(spoil: Any, finds: str, of: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    spoiled(monkeypatch, spoil)
    failed = [name for name, item in found_by(few(of)).items() if "failed" in item]
    assert any(name.startswith(finds) for name in failed), failed


def test_the_gate_finds_streams_and_graphs(of: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call on another stream that does not wait for it; a graph that keeps what it read at its capture."""
    stale: dict[int, Tensor] = {}

    def once(problem: Problem, backend: str) -> Tensor:
        key = problem.query.data_ptr()
        return stale.setdefault(key, fn.negated_attention(
            problem.query, problem.key, problem.value, problem.concepts, problem.rule, backend=backend
        ))  # fmt: skip

    monkeypatch.setattr(gate, "operator", once)
    failed = {n: i["failed"] for n, i in found_by(few(of)).items() if "failed" in i and "," in n}
    assert any(name.startswith("graph") for name in failed)

    problem = make_problem(1, 1, 3, 5, 16, rows="same", concept_lengths=(2,))
    outputs = iter([problem.query, problem.query, problem.query + 1])
    with pytest.raises(AssertionError, match="on a side stream: 48 of 48 numbers differ"):
        gate.busy_stream(problem, lambda p: next(outputs), Rehearsal())


def test_a_backend_that_is_not_there_fails_the_gate(of: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """It must not look as if it had refused each problem by right."""
    monkeypatch.setattr(Rehearsal, "backends", {"triton": "triton"})
    (item,) = [*found_by(iter([next(gate.items(of))])).values()]
    assert "failed" in item and "refused" not in item


# ---- host and times ---------------------------------------------------------------------------


def test_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "CALLS", 2)
    monkeypatch.setattr(Rehearsal, "backends", {"cuda": "cuda", "triton": "cpu"})
    (found,) = found_by(host.items(setting())).values()
    assert {"sdpa", "triton none", "triton 4x8"} <= {*found["us"]} and min(found["us"].values()) > 0
    assert {*found["left_out"]} == {"cuda none", "cuda 4x8"}
    assert "BackendError" in found["left_out"]["cuda none"] and found["failed"].startswith("cuda none: ")
    assert {"median", "low", "high"} == {*found["over_sdpa"]["triton 4x8"]}


def test_noise_is_noise() -> None:
    """Of mean 0 and variance 1, without a pattern; and the very same numbers for ever, which references that
    were made elsewhere rely on."""
    a, b = noise(1, 300, 200), noise(2, 300, 200)
    room = 4 / math.sqrt(a.numel())
    for x in (a, b):
        assert abs(x.mean()) < room and abs(x.var() - 1) < room and x.abs().max() < 3.5
    for product in (a * b, a[:, 1:] * a[:, :-1], a[1:] * a[:-1]):
        assert abs(product.mean()) < room
    assert noise(7, 4).tolist() == pytest.approx(EXACT, abs=0) and torch.equal(
        noise(7, 2, 2).flatten(), noise(7, 4)
    )


EXACT = [0.31120145320892334, 0.7675773501396179, 0.667992889881134, -0.8311919569969177]


def test_inputs_rotate_through_more_than_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer("tiny", 2, 64, 16, keys=24)
    one = times.compulsory_bytes(make(layer, CONCEPTS["4x8"], METHODS["protore"], torch.bfloat16))
    monkeypatch.setattr(Rehearsal, "cache", 5 * one)
    found = times.inputs(layer, "4x8", Rehearsal())
    assert len(found) == 10 and len({float(case.query.sum()) for case in found}) == 10
    monkeypatch.setattr(Rehearsal, "cache", 10**12)
    assert len(times.inputs(layer, "4x8", Rehearsal())) == times.MOST_SETS
    monkeypatch.setattr(Rehearsal, "cache", 0)
    assert len(times.inputs(layer, "4x8", Rehearsal())) == 2


def test_times_of_a_layer() -> None:
    found = times.timed("sd15-16", "4x8", setting(), rounds=3)
    assert {"cuda", "triton", "sdpa", "sdpa + tail", "sdpa flash", "floor"} == {*found["us"]}
    assert all(0 <= used <= 1 for used in found["judged"].values()) and len(found["judged"]) == 2
    assert "floor" not in found["over"]["cuda"] and 0 < found["over"]["cuda"]["sdpa"]["median"]
    assert {*found["left_out"]} == {"sdpa cuDNN", "sdpa efficient"} and "failed" not in found
    none = times.timed("sd15-16", "none", setting(), rounds=3)
    assert "sdpa + tail" not in none["us"]


def test_a_wrong_layer_is_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a backend that is missing is a failure, not a baseline that is left out."""
    real = times.negated_attention

    def wrong(*prompt: Any, backend: str) -> Tensor:
        return real(*prompt, backend=backend) * (1.05 if backend == "cpu" else 1)

    monkeypatch.setattr(times, "negated_attention", wrong)
    monkeypatch.setattr(Rehearsal, "backends", {"cuda": "cuda", "triton": "cpu"})
    found = times.timed("sd15-16", "4x8", setting(), rounds=3)
    assert "errs by" in found["left_out"]["triton"] and "BackendError" in found["left_out"]["cuda"]
    assert "cuda: " in found["failed"] and "triton: " in found["failed"] and not found["over"]


def test_rows_next_to_a_jump_are_left() -> None:
    case = make(Layer("tiny", 2, 64, 16, keys=24), CONCEPTS["4x8"], METHODS["protore"], torch.bfloat16)
    judge = times.judge_of(case)
    assert judge.near.any() and not judge.near.all()
    right = judge.truth.to(torch.bfloat16)
    wrong = torch.where(judge.near[..., None], 9.0, right)
    judge.check(wrong)
    assert judge.near.sum() > 0.05 * judge.near.numel(), "there are so many that a fair problem has fewer"
    with pytest.raises(AssertionError):
        judge.check(torch.where(judge.near[..., None], right, 9.0))
    with pytest.raises(AssertionError, match="next to a jump"):
        Judge(judge.problem).check(right)


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

    class Graph:
        def capture_begin(self) -> None:
            done.append("begin")

        def capture_end(self) -> None:
            done.append("end")

        def replay(self) -> None:
            done.append("replay")

    stream = SimpleNamespace(wait_stream=lambda other: done.append("wait"))
    fake = {
        "Event": Event,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": contextlib.nullcontext,
        "CUDAGraph": Graph,
        "current_device": lambda: 0,
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=4096),
        "synchronize": lambda: done.append("wait for all"),
        "reset_peak_memory_stats": lambda: done.append("reset"),
        "memory_allocated": lambda: 7,
        "max_memory_allocated": lambda: 77,
        "_sleep": lambda cycles: done.append("spin"),
    }
    for name, item in fake.items():
        monkeypatch.setattr(torch.cuda, name, item)
    monkeypatch.setattr(CudaCard, "device", "cpu")
    return done


def test_timers_of_a_gpu(cuda: list[str]) -> None:
    gpu = CudaCard()
    assert gpu.cache == 4096
    calls = [lambda: cuda.append("a"), lambda: cuda.append("b")]
    timer = gpu.timer(calls)
    warm = ["wait", "a", "b", "wait for all"]
    assert cuda == [*warm, "begin", "a", "b", "end", "wait"], "what compiles and allocates, then the capture"
    cuda.clear()
    assert timer() == pytest.approx(0.02)
    assert cuda == ["spin", "record", "replay", "record", "synchronize"], "the host is ahead of the device"
    cuda.clear()
    assert gpu.memory(calls[0]) == 70 and cuda == ["wait for all", "reset", "a", "wait for all"]


def test_outputs_of_a_graph_are_kept_apart(cuda: list[str]) -> None:
    """Else each call of it would write the same memory, which then stays in the cache."""
    import weakref

    outputs: list[Any] = []

    def call() -> Tensor:
        output = torch.zeros(3)
        outputs.append(weakref.ref(output))
        return output

    replay = CudaCard().captured([call, call])
    assert [output() is not None for output in outputs] == [False, False, True, True]
    del replay
    assert not any(output() is not None for output in outputs)


def test_a_capture_that_fails_says_why(cuda: list[str]) -> None:
    """What happened, not what torch makes of it; and nothing is captured any longer."""
    calls = iter([None, ValueError("a copy to the host")])

    def call() -> None:
        if (error := next(calls)) is not None:
            raise error

    gpu = CudaCard()
    with pytest.raises(card.CaptureError, match=r"^ValueError: a copy to the host$"):
        gpu.captured([call])
    assert cuda[-2:] == ["begin", "end"] and gpu.can_capture()


@pytest.mark.parametrize("still", (True, False))
def test_a_process_that_can_capture_no_more_ends(still: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rehearsal, "can_capture", lambda self: still)

    def fails() -> dict[str, Any]:
        raise card.CaptureError("no")

    lines: list[dict[str, Any]] = []
    items = iter([step.Item("a", fails), step.Item("b", dict)])
    assert step.run(items, setting(), lines.append) == (step.THROUGH if still else step.AGAIN)
    assert ("spoiled" in lines[1]) is not still and len(lines) == (4 if still else 2)


def test_a_baseline_that_cannot_be_captured_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Rehearsal.captured

    def captured(self: Rehearsal, calls: Any) -> Any:
        if "sdpa" in str(calls[0]):
            raise card.CaptureError("no")
        return real(self, calls)

    monkeypatch.setattr(Rehearsal, "captured", captured)
    found = times.timed("sd15-16", "none", setting(), rounds=3)
    assert found["left_out"]["sdpa"] == "CaptureError: no" and "failed" not in found and "cuda" in found["us"]
    monkeypatch.setattr(Rehearsal, "can_capture", lambda self: False)
    assert times.timed("sd15-16", "none", setting(), rounds=3)["spoiled"]


def test_rates_of_a_gpu(cuda: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "COPY", 4096)
    monkeypatch.setattr(card, "MATMUL", 16)
    assert CudaCard().rates() == {"copy": 2 * 4096 / 0.04, "matmul": 2 * 16**3 / 0.04}


def test_a_busy_stream_is_warm_before(cuda: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "MATMUL", 16)
    CudaCard().on_a_busy_stream(lambda: cuda.append("call"), lambda: cuda.append("warm"))
    assert cuda == ["wait", "warm", "wait for all", "call", "wait"]


def test_clocks_are_those_under_load(cuda: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> dict[str, str]:
        time.sleep(0.05)
        return {"clocks.sm": str("call" in cuda)}

    monkeypatch.setattr(card, "gpu_state", asked)
    assert CudaCard().state(lambda: cuda.append("call")) == {"clocks.sm": "True"}


# ---- whole models -----------------------------------------------------------------------------


def test_models() -> None:
    """Every variant, eager and captured, of the smaller model; negations change the output, and ours as
    torch operators do."""
    bench = end_to_end.Bench("sd15", 2, setting("2"))
    with torch.inference_mode():
        eager, graph = bench.eager(), bench.graph()
    variants = {"none", "cuda", "triton", "torch operators", "doubled batch"}
    for found in (eager, graph):
        assert "failed" not in found and {*found["ms"]} == variants
        assert found["over_none"]["none"]["median"] == 1
    assert {*eager["peak_mbytes"]} == variants
    assert eager["changed"]["cuda from torch operators"] < eager["changed"]["cuda"] / 4


def test_models_are_items_that_share_what_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill keeps the eager half; a step that is resumed builds for the graph alone."""
    made: list[str] = []
    monkeypatch.setattr(end_to_end, "MODELS", dict.fromkeys(("sdxl", "sd15"), models.MODELS["sd15"]))
    monkeypatch.setattr(end_to_end.Bench, "timed", lambda self, calls: {"ms": {n: 1.0 for n in calls}})
    real = end_to_end.variants
    monkeypatch.setattr(end_to_end, "variants", lambda *of: made.append("") or real(*of))
    lines: list[dict[str, Any]] = []
    with torch.inference_mode():
        items = end_to_end.items(setting("2"))
        step.run(items, setting(), lines.append, done=["sd15, batch 2, eager"])
    names = [line["name"] for line in lines if "name" in line]
    assert names == ["sdxl, batch 2, eager", "sdxl, batch 2, graph", "sd15, batch 2, graph"]
    assert not any("failed" in line for line in lines) and len(made) == 2


def test_a_graph_that_computes_something_else_is_no_time() -> None:
    bench = end_to_end.Bench("sd15", 2, setting("2"))
    with torch.inference_mode():
        bench.make()
        bench.outputs["cuda"] = bench.outputs["cuda"] + bench.outputs["none"]
        found = bench.graph()
    assert (
        found["failed"].startswith("cuda: AssertionError: a graph's output is") and "cuda" not in found["ms"]
    )


def test_a_negation_that_does_nothing_is_found() -> None:
    plain = torch.ones(4)
    for outputs, message in (
        ({"none": plain, "cuda": plain}, "cuda changed the output by"),
        ({"none": plain, "cuda": 2 * plain, "torch operators": 3 * plain}, "cuda is .* from torch operators"),
    ):
        _, wrong = end_to_end.changed(outputs)
        assert re.match(message, wrong[0])


def test_a_captured_forward_keeps_its_arguments() -> None:
    x, seen = torch.ones(2), []
    forward = end_to_end.Captured(lambda x, *, y: seen.append(1) or x + y, Rehearsal())
    assert forward(x, y=1).tolist() == [2, 2]
    x.fill_(5)
    assert forward(x, y=1).tolist() == [6, 6] and len(seen) == 3


def test_small_models_have_every_layer() -> None:
    import diffusers

    for name, model in models.MODELS.items():
        with torch.device("meta"):
            full, small = (diffusers.UNet2DConditionModel(**m.unet) for m in (model, models.small(model)))
        kinds = [{type(m).__name__ for m in unet.modules()} for unet in (full, small)]
        assert kinds[0] == kinds[1], name


# ---- tests and report -------------------------------------------------------------------------


def test_tests_are_counted_line_by_line() -> None:
    output = (
        "tests/gpu/test_a.py::test_x[cuda] PASSED [ 10%]\ntests/gpu/test_a.py::test_y[a b] FAILED [ 20%]\n"
        "tests/gpu/test_a.py::test_z SKIPPED (why) [ 30%]\ntests/gpu/test_a.py::test_q ERROR\n"
        "[gw1] [ 40%] PASSED tests/gpu/test_a.py::test_x[triton-a b] \n"
        "[gw0] [100%] FAILED tests/gpu/test_b.py::test_y\n"
        "tests/gpu/test_a.py::test_hangs "
    )
    counts, failures = gpu_tests.counted(output)
    assert counts == {"passed": 2, "failed": 2, "error": 1, "skipped": 1}
    assert failures == [
        f"tests/gpu/{test}" for test in ("test_a.py::test_y[a b]", "test_a.py::test_q", "test_b.py::test_y")
    ]


ALL = {"counts", "failed", "failures", "trace"}


@pytest.mark.parametrize(
    "status, output, expected",
    (
        (0, "tests/gpu/a.py::b PASSED\n", {"counts"}),
        (
            1,
            "tests/gpu/a.py::b FAILED\ntests/gpu/a.py::c PASSED\n",
            {"counts", "failed", "failures", "trace"},
        ),
        (None, "tests/gpu/a.py::b PASSED\n", {"counts", "cut"}),
        (5, "no tests ran\n", {"counts", "failed", "trace"}),
        (0, "tests/gpu/a.py::b SKIPPED\n", {"counts", "failed", "trace"}),
    ),
)
def test_a_run_of_tests(
    status: int | None, output: str, expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that passed is no success."""
    done = child.Done(status, output, 1.0)
    monkeypatch.setattr(gpu_tests, "run", lambda *arguments: done)
    (item,) = gpu_tests.items(setting())
    assert {*item.run()} == expected


def measured(over: float) -> dict[str, Any]:
    interval = {"median": over, "low": over - 0.1, "high": over + 0.1}
    us = {"cuda": {"median": 20.0}, "sdpa": {"median": 25.0}}
    return {
        "us": us, "over": {"cuda": {"sdpa": interval}}, "gbytes": {"cuda": 900.0}, "judged": {"cuda": 0.3},
        "left_out": {"sdpa cuDNN": "no"},
    }  # fmt: skip


def content(**steps: Any) -> dict[str, Any]:
    machine = {"rehearsal": False, "commit": "abc", "gpu": {"name": "NVIDIA H100", "driver_version": "580"}}
    return {**report.begun(machine, None), "steps": steps}


def test_report() -> None:
    text = report.markdown(content(
        doctor={"status": "done", "items": {"machine": {"torch": "2.11"}, "doctor": {"printed": "fine"}}},
        times={"status": "cut", "items": {"sdxl-64 4x8": measured(0.8), "sdxl-64 none": {"failed": "row 3"}}},
    ))  # fmt: skip
    assert text.index("## Failed or missing") < text.index("## Steps") < text.index("## Times of layers")
    for line in ("- gpu: NVIDIA H100", "- torch: 2.11", "- times: sdxl-64 none: row 3", "- times: cut"):
        assert f"{line}\n" in text
    assert "0.80 [0.70, 0.90]" in text and "- sdpa cuDNN: no (sdxl-64 4x8)" in text
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1


def test_the_table_of_the_page_is_that_of_the_reports(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    text = (root / "docs" / "performance.md").read_text()
    assert report.filled(text, root / "benchmarks" / "results") == text, "benchmarks.gpu.report"
    assert len(report.PLACE.findall(text)) == 1
    folder = tmp_path / "h100"
    folder.mkdir()
    empty = report.summary(tmp_path)
    none = {**measured(0.7), "us": {"cuda": {"median": 16.0}}}
    found = content(times={"status": "done", "items": {"sdxl-64 4x8": measured(0.8), "sdxl-64 none": none}})
    (folder / "report.json").write_text(json.dumps(found))
    row = report.summary(tmp_path).splitlines()[-1]
    assert len(empty.splitlines()) == 2
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        "NVIDIA H100", "sdxl-64", "cuda", "20.0", "1.25", "0.80 [0.70, 0.90]",
    ]  # fmt: skip
    (folder / "report.json").write_text(json.dumps({**found, "rehearsal": True}))
    with pytest.raises(ValueError, match="is a rehearsal"):
        report.summary(tmp_path)


def test_timed_layers_exist() -> None:
    assert {*times.TIMED} | {*times.COMPILED} <= {*cases.LAYERS} and len(times.TIMED) == 7
