# SPDX-License-Identifier: Apache-2.0
"""The tests of tests/gpu where there is no GPU: they say so once, their bodies work, and a GPU that an error
has made unusable ends their run."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import CPU_BACKENDS

ROOT = Path(__file__).resolve().parents[2]


def pytest_gpu(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "FASTNEGATE_BUDGET_REPORT"}
    env |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "FASTNEGATE_GPU_TESTS": "", **environment}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:xdist", *(arguments or ["tests/gpu"])],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    (pytest.param((), id="all", marks=pytest.mark.full), pytest.param(("tests/gpu/test_bits.py",), id="few")),
)
def test_without_a_gpu_one_skip_says_so(arguments: tuple[str, ...]) -> None:
    done = pytest_gpu(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    (skip,) = (line for line in done.stdout.splitlines() if line.startswith("SKIPPED"))
    assert skip.endswith(": torch finds no GPU")
    assert re.search(r"^1 skipped, \d{2,} deselected", done.stdout, re.MULTILINE)


def test_a_wrong_word_is_not_taken_for_a_gpu() -> None:
    done = pytest_gpu(FASTNEGATE_GPU_TESTS="rehears")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "FASTNEGATE_GPU_TESTS='rehears': the only value is rehearse" in done.stderr


@pytest.mark.skipif(not CPU_BACKENDS, reason="the CPU kernel is not part of this install")
def test_rehearsal() -> None:
    """Some of each kind: the whole of it takes a minute."""
    some = (
        "test_presets and nag", "test_grid and vsf and float16", "test_whole_layers and sdxl and nag",
        "refusals", "test_auto", "protore and float16 and not hundred", "test_what_the",
        "threads and protore", "graph and feature", "autocast", "inference", "gradients", "nothing",
    )  # fmt: skip
    done = pytest_gpu(
        "tests/gpu", "-k", " or ".join(f"({words})" for words in some), FASTNEGATE_GPU_TESTS="rehearse"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"^(\d+) passed", done.stdout, re.MULTILINE)
    assert passed and int(passed[1]) >= 50, done.stdout


@pytest.mark.parametrize("processes", (0, pytest.param(2, marks=pytest.mark.full)))
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_an_unusable_gpu_ends_the_run(processes: int, tmp_path: Path) -> None:
    """The first test that fails is reported, named as the last, and none is run after it. The GPU is one that
    torch claims to have."""
    if processes and importlib.util.find_spec("xdist") is None:
        pytest.skip("pytest-xdist is not installed")
    (tmp_path / "claims_a_gpu.py").write_text("import torch\ntorch.cuda.is_available = lambda: True\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    split = ["-p", "xdist", "-n", str(processes)] if processes else []
    where = "tests/gpu" if processes else "tests/gpu/test_accuracy.py"
    done = pytest_gpu(*split, "-p", "claims_a_gpu", where, "-k", "triton", PYTHONPATH=path)
    assert done.returncode == (2 if processes else 3), done.stdout + done.stderr
    assert re.search(r"Exit|Interrupted", done.stdout)
    (named,) = set(re.findall(r"!.* tests/gpu/(\S+) left the GPU unusable: \w+: ", done.stdout))
    assert named.startswith("test_accuracy.py::test_presets[")
    failed = re.search(r"^(\d+) failed", done.stdout, re.MULTILINE)
    assert failed and int(failed[1]) <= max(processes, 1), done.stdout
