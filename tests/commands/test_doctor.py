# SPDX-License-Identifier: Apache-2.0
"""`fastnegate doctor` says what is there, and names each dtype and preset in which a backend is wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import CPU_BACKENDS
from torch import Tensor

import fastnegate as fn
from fastnegate.commands import cli, doctor
from fastnegate.operator import reference
from fastnegate.operator.backends import load
from fastnegate.operator.plan import plans
from fastnegate.operator.problem import Problem

pytestmark = pytest.mark.usefixtures("one_thread")
needs_cpu = pytest.mark.skipif(not CPU_BACKENDS, reason="the CPU kernel is not part of this install")
PRESETS = tuple(fn.presets())


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a backend is on the machine that runs the tests is not asked; `stand_in` is one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "triton"):
        monkeypatch.setattr(load(name), "unavailable", lambda: "left out")


class Computed:
    """The plan of a backend that computes with a function."""

    backend = "triton"

    def __init__(self, run: Callable[[Problem], Tensor], problem: Problem) -> None:
        self.of, self.rule, self.scale = run, problem.rule, problem.scale

    def run(self, *operands) -> tuple[Tensor, None]:
        return self.of(Problem(*operands[:5], self.rule, self.scale)), None


@pytest.fixture
def stand_in(
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[[Callable[[Problem], Tensor]], None]]:
    """Puts a Triton backend there that computes with a function."""

    def put(run: Callable[[Problem], Tensor]) -> None:
        triton = load("triton")
        monkeypatch.setattr(triton, "unavailable", lambda: None)
        monkeypatch.setattr(triton, "supports", lambda problem: None)
        monkeypatch.setattr(triton, "plan", lambda problem, statistics: Computed(run, problem))
        plans.clear()

    yield put
    plans.clear()


def preset_of(problem: Problem) -> str:
    """By what it says: its name does not go through the registered operator."""
    (name,) = (
        name
        for name, rule in fn.presets().items()
        if (rule.codes, rule.numbers) == (problem.rule.codes, problem.rule.numbers)
    )
    return name


def lines_of(capsys: pytest.CaptureFixture[str], status: int) -> list[str]:
    capsys.readouterr()
    assert cli.main(["doctor"]) == status
    return [line.strip() for line in capsys.readouterr().out.splitlines()]


# ---- the self-check ---------------------------------------------------------------------------


@needs_cpu
def test_ok_says_what_was_compared(capsys: pytest.CaptureFixture[str]) -> None:
    lines = lines_of(capsys, 0)
    (line,) = (line for line in lines if line.startswith("cpu: "))
    found = re.fullmatch(r"cpu: ok: (.*); at most (\d+) % of the budget was used", line)
    assert found[1] == f"{len(PRESETS)} presets in bfloat16, float16, float32" and 0 < int(found[2]) <= 100
    assert "triton: not available: left out" in lines
    (compared,) = (line for line in lines if line.startswith("compared: "))
    for said in ("37 queries, 77 keys", "head_dim 40, concepts of 8 and 8 tokens", "concepts of 77 tokens"):
        assert said in compared
    assert (
        "ok: each output is within the accuracy budget of the float64 reference (docs/semantics.md)" in lines
    )


def test_every_size_of_the_check_reaches_the_backend(
    stand_in: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = set()

    def run(problem: Problem) -> Tensor:
        tokens = problem.concepts
        seen.add((preset_of(problem), problem.query.dtype, problem.sizes[4], tokens.longest))
        return reference.run(problem)

    stand_in(run)
    lines_of(capsys, 0)
    assert seen == {
        (preset, dtype, dim, tokens)
        for preset in PRESETS
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for dim, tokens in ((40, 8), (64, 8), (64, 77))
    }


def test_a_backend_that_does_not_compile_in_float16(
    stand_in: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is named, with what was raised, and the rest is checked all the same."""

    def run(problem: Problem) -> Tensor:
        if problem.query.dtype == torch.float16:
            raise RuntimeError("no such layout\nand a page more")
        return reference.run(problem)

    stand_in(run)
    lines = lines_of(capsys, 1)
    count = f"{len(PRESETS)} presets"
    assert f"triton: WRONG in {count} in float16; right in {count} in bfloat16, float32" in lines
    wrong = [line for line in lines if line.endswith(": RuntimeError: no such layout")]
    assert len(wrong) == 3 * len(PRESETS)
    assert "nag in float16, head_dim 64, concepts of 77 tokens: RuntimeError: no such layout" in wrong


def test_one_preset_that_is_wrong_in_float16(stand_in: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    """By one per cent, and with the tokens of a whole prompt alone."""

    def run(problem: Problem) -> Tensor:
        off = (preset_of(problem), problem.query.dtype, problem.concepts.longest) == (
            "ong",
            torch.float16,
            77,
        )
        return reference.run(problem) * (1.01 if off else 1.0)

    stand_in(run)
    lines = lines_of(capsys, 1)
    (wrong,) = (line for line in lines if "errs by" in line)
    assert wrong.startswith("ong in float16, head_dim 64, concepts of 77 tokens: row ")
    (head,) = (line for line in lines if line.startswith("triton: WRONG"))
    assert head.startswith("triton: WRONG in ong in float16; right in ")
    assert f"{len(PRESETS)} presets in bfloat16, float32" in head and "7 presets in float16" in head


def test_an_output_that_is_not_finite_is_wrong(
    stand_in: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(lambda problem: reference.run(problem) * torch.nan)
    assert any("errs by inf" in line for line in lines_of(capsys, 1))


def test_optimized_python_checks_as_much() -> None:
    """Which leaves assertions out."""
    code = (
        "from fastnegate.testing import Judge, make_problem; judge = Judge(make_problem());"
        "assert False; print(judge.verdict(judge.truth.float() * 1.01).wrong);"
        "judge.check(judge.truth.float() * 1.01)"
    )
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True)
    assert "errs by" in done.stdout and "AssertionError" in done.stderr


def test_an_output_of_another_dtype_or_shape_is_wrong(
    stand_in: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(lambda problem: reference.run(problem)[..., :-1])
    assert any("not of the problem's dtype and shape" in line for line in lines_of(capsys, 1))


@needs_cpu
def test_refusals_are_not_called_right(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cpu = load("cpu")
    monkeypatch.setattr(cpu, "supports", lambda p: "not today" if p.query.dtype == torch.float32 else None)
    lines = lines_of(capsys, 0)
    assert any(line.startswith(f"cpu: ok: {len(PRESETS)} presets in bfloat16, float16; at") for line in lines)
    assert f"refused: {len(PRESETS)} presets in float32: not today" in lines
    monkeypatch.setattr(cpu, "supports", lambda problem: "not today")
    lines = lines_of(capsys, 0)
    assert "cpu: not checked" in lines
    assert f"refused: {len(PRESETS)} presets in bfloat16, float16, float32: not today" in lines


# ---- the environment --------------------------------------------------------------------------

BAD_VARIABLES = {
    "FASTNEGATE_CPU_ISA": ("nonsense", "BAD: usable here are "),
    "FASTNEGATE_TRITON_TILES": ("/none/tiles.json", "BAD: must be a file that can be read: No such file"),
    "OMP_NUM_THREADS": ("two", "BAD: must be whole numbers >= 1, separated by commas"),
    "TRITON_INTERPRET": ("perhaps", "BAD: must be 1 or 0"),
}


@needs_cpu
def test_bad_variables_are_said_and_the_report_goes_on() -> None:
    """In a process of its own: some are read once, when a library is loaded."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **{v: x for v, (x, _) in BAD_VARIABLES.items()}}
    done = subprocess.run(
        [sys.executable, "-m", "fastnegate", "doctor"], env=environment, capture_output=True, text=True
    )
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert done.returncode == 1, done.stdout + done.stderr
    for variable, (value, said) in BAD_VARIABLES.items():
        assert len([line for line in lines if line.startswith(f"{variable}={value!r}: {said}")]) == 1
    assert "Traceback" not in done.stderr and lines[-1].startswith("triton: ")
    assert [line for line in lines if line.startswith("cpu: not checked: FASTNEGATE_CPU_ISA=")]


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("OMP_NUM_THREADS", "1", "as asked"),
        ("OMP_NUM_THREADS", "64,2", "torch has another number"),
        (
            "TRITON_INTERPRET",
            "1",
            "Triton's kernels are interpreted on the CPU, slowly, and no GPU runs them",
        ),
        ("TRITON_INTERPRET", "off", "off"),
    ],
)
def test_a_good_variable(
    variable: str, value: str, said: str, quick: None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv(variable, value)
    assert f"{variable}={value!r}: {said}" in lines_of(capsys, 0)


# ---- the driver -------------------------------------------------------------------------------

OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (x)\nGCC 12.2"
CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\nGCC 9"


def driver_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = (line for line in lines_of(capsys, 0) if line.startswith("NVIDIA driver: "))
    return line.removeprefix("NVIDIA driver: ")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No self-check."""
    monkeypatch.setattr(doctor, "backends", lambda: {"reference": None})


@pytest.mark.parametrize("text, version", ((OPEN, "580.65.06"), (CLOSED, "535.183.01")))
def test_driver_of_linux(
    text: str, version: str, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "version").write_text(text)
    monkeypatch.setattr(doctor, "_DRIVER", tmp_path / "version")
    monkeypatch.setattr(load("cuda"), "_cuda", SimpleNamespace(
        ARCHS="90", OLDEST_DRIVER=14020, OLDEST_DRIVER_BRANCH=612
    ))  # fmt: skip
    line = driver_line(capsys)
    assert line == f"{version}; needed: CUDA 14.2 (driver 612) or later for this build"


@pytest.mark.parametrize("done, said", (
    (SimpleNamespace(returncode=0, stdout="581.1\n581.1\n", stderr=""), "581.1"),
    (SimpleNamespace(returncode=9, stdout="None\n", stderr=""), "not known: nvidia-smi says 'None'"),
    (subprocess.TimeoutExpired("nvidia-smi", 60), "not known: nvidia-smi does not answer"),
    (None, "none found"),
))  # fmt: skip
def test_driver_of_nvidia_smi_and_an_old_build(
    done: object, said: str, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def smi(command: list[str], **options: object) -> object:
        assert command[:2] == ["nvidia-smi", "--query-gpu=driver_version"]
        if isinstance(done, Exception):
            raise done
        return done

    monkeypatch.setattr(doctor, "_DRIVER", tmp_path / "none")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None if done is None else name)
    monkeypatch.setattr(doctor.subprocess, "run", smi)
    monkeypatch.setattr(load("cuda"), "_cuda", SimpleNamespace(ARCHS="90"))
    assert driver_line(capsys) == said
    monkeypatch.setattr(load("cuda"), "_cuda", None)
    assert driver_line(capsys) == said


def test_the_build_says_what_it_needs() -> None:
    cuda = load("cuda")._cuda
    if cuda is None:
        pytest.skip("the CUDA kernels are not part of this install")
    assert (cuda.OLDEST_DRIVER, cuda.OLDEST_DRIVER_BRANCH) == (13000, 580)
