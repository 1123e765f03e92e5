# SPDX-License-Identifier: Apache-2.0
"""The Triton backend without a GPU: the kernel computes the definition under the interpreter, and is not
imported, or refused with a reason, where it cannot be used. gpuless/ compiles it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import make_problem

import fastnegate as fn
from fastnegate.operator.backends import triton as backend

pytest.importorskip("triton")
TESTS = Path(__file__).parents[1]
INSTRUMENTS = TESTS / "gpuless" / "instruments"


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTNEGATE_BUDGET_REPORT")}
    env["PYTHONPATH"] = os.pathsep.join([str(INSTRUMENTS), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *arguments],
        env={**env, **environment}, cwd=TESTS.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("file", "which"),
    (
        ("gpuless/instruments/interpreted.py", "not full"),
        ("helpers/triton_interpreted.py", "not full"),
        pytest.param("helpers/triton_interpreted.py", "full", marks=pytest.mark.full),
    ),
)
def test_under_the_interpreter(file: str, which: str) -> None:
    child = python("-m", "pytest", "-q", "-m", which, str(TESTS / file), TRITON_INTERPRET="1")
    assert child.returncode == 0, child.stdout[-8000:] + child.stderr[-2000:]


def test_unavailable_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fn.backends()["triton"] == "no GPU that Triton can drive"
    assert backend.supports(make_problem()) == "no GPU that Triton can drive"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backend.supports(make_problem()) == "query is on cpu, not on cuda"


def test_triton_is_imported_on_first_use() -> None:
    code = "import sys, fastnegate; fastnegate.backends(); sys.exit('triton' in sys.modules)"
    child = python("-c", code)
    assert child.returncode == 0, child.stderr


def test_kernels_refuse_the_top_level_name() -> None:
    package = importlib.util.find_spec("fastnegate.triton_kernels")
    assert package is not None and package.origin is not None
    spec = importlib.util.spec_from_file_location("triton_kernels", package.origin)
    assert spec is not None and spec.loader is not None
    with pytest.raises(ImportError, match=r"import fastnegate\.triton_kernels"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
