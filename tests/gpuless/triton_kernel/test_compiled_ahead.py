# SPDX-License-Identifier: Apache-2.0
"""What a run on a GPU compiles ahead: the very kernels that its later steps launch, for a GPU that is not
there."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from compiler import Compiled
from fastnegate.benchmarks.gpu import carried
from fastnegate.benchmarks.gpu.card import Rehearsal
from fastnegate.benchmarks.gpu.step import Setting
from fastnegate.benchmarks.gpu.steps import compile
from fastnegate.benchmarks.gpu.steps.times import TIMED

from fastnegate.operator.backends import triton as backend
from fastnegate.operator.problem import Problem

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces Triton"),
]
EVERY = 24  # of the gate's and the doctor's problems one in so many is compiled here


@pytest.fixture(scope="module")
def everything() -> list[compile.Ahead]:
    carried.load.cache_clear()
    return [*compile.ahead(None)]


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiled]:
    """An H100 that computes nothing, and a backend that takes what lies on the processor for its own."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(backend, "supports", lambda problem: None if takes(problem) else "not this one")
    with Compiled("sm_90") as device:
        yield device


def takes(problem: Problem) -> bool:
    return problem.rule.direction != "retrieve"


def compiled() -> int:
    """Kernels that Triton has made for the device that is there."""
    caches = backend._kernel().device_caches
    return sum(len(cache[0]) for name, cache in caches.items() if "sm_90" in str(name) or "90" in str(name))


def test_every_step_is_provided_for(everything: list[compile.Ahead]) -> None:
    """What is timed comes first: of it nothing is compiled in the time of the step."""
    names = [item.name for item in everything]
    layers = [f"{layer} {concepts}" for layer in TIMED for concepts in ("4x8", "none")]
    assert names[: len(layers)] == layers and len({*names}) == len(names)
    gate = {*carried.load(None).gate}
    assert gate | {f"{name}, statistics" for name in gate} <= {*names}
    assert {"host 4x8", "host none", "promise: nag masked"} <= {*names}
    assert sum(name.startswith("doctor: ") for name in names) >= 60


@pytest.mark.full  # the default run has it of the oldest Triton (test_triton_versions)
def test_what_is_compiled_ahead_is_what_is_launched(
    everything: list[compile.Ahead], device: Compiled
) -> None:
    some = [item for item in everything if item.name.startswith(("host 4x8", "promise: nag masked"))]
    for item in [*some, *itertools.islice(everything, 20, None, EVERY)]:
        problem = item.make()
        if not takes(problem):
            continue
        backend.prepare(problem, item.with_statistics)
        assert not device.launches, "nothing is launched"
        known = compiled()
        (backend.run_with_statistics if item.with_statistics else backend.run)(problem)
        assert device.launches and compiled() == known, item.name
        device.launches.clear()


def test_a_problem_that_does_not_compile_is_named(
    everything: list[compile.Ahead], device: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(problem: Problem, with_statistics: bool) -> None:
        if problem.query.dtype == torch.float16:
            raise RuntimeError("PassManager\nmore")

    made = everything[14:70]
    monkeypatch.setattr(backend, "prepare", fails)
    monkeypatch.setattr(compile, "ahead", lambda folder: iter(made))
    count, failures = compile.compiled(Rehearsal(), None, 1, 2)
    half = [problem for item in made[1::2] if takes(problem := item.make())]
    assert count == sum(problem.query.dtype != torch.float16 for problem in half) > 10
    assert len(failures) == len(half) - count and {*failures.values()} == {"RuntimeError: PassManager"}


def test_parts_are_made_by_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, and the step says what failed in any."""

    class Pool:
        def __init__(self, parts: int, context: Any) -> None:
            self.parts = parts

        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *error: object) -> None: ...

        def submit(self, function: Any, folder: Path, part: int, parts: int) -> Any:
            assert function is compile._part and parts == self.parts
            return part

    class Done(int):
        def result(self) -> tuple[int, dict[str, str]]:
            return (10, {}) if self else (9, {"sdxl-64 4x8": "RuntimeError: no"})

    monkeypatch.setattr(compile, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(compile, "as_completed", lambda running: map(Done, running))
    monkeypatch.setattr(compile.os, "cpu_count", lambda: 16)
    (item,) = compile.items(Setting(Rehearsal(), Path(), None, time.monotonic() + 9))
    assert item.run() == {"problems": 119, "processes": 12, "failed": "1: RuntimeError: no"}
    (item,) = compile.items(Setting(Rehearsal(), Path(), None, time.monotonic() + 9, small=True))
    assert "skipped" in item.run()
