# SPDX-License-Identifier: Apache-2.0
"""The Triton backend without a GPU: the kernel compiles for NVIDIA and AMD, computes the definition under
the interpreter, and is not imported, or refused with a reason, where it cannot be used."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastnegate as fn
from fastnegate.backends import triton as backend
from support import make_problem

pytest.importorskip("triton")
HERE = Path(__file__).parent


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTNEGATE_BUDGET_REPORT")}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**env, **environment}, cwd=HERE.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_under_the_interpreter() -> None:
    child = python("-m", "pytest", "-q", str(HERE / "triton_interpreted.py"), TRITON_INTERPRET="1")
    assert child.returncode == 0, child.stdout[-8000:] + child.stderr[-2000:]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler")
@pytest.mark.parametrize("scope", ("head", "feature"))
@pytest.mark.parametrize("target", (("cuda", 80, 32), ("cuda", 90, 32), ("hip", "gfx942", 64)), ids=str)
def test_compiles(target: tuple, scope: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For half precision, head_dim 64 and 77 keys, with every optional pointer or with few."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = importlib.import_module("fastnegate.triton_kernels.attention")
    feature = scope == "feature"
    tiles = backend.tiles(dim=64, keys=77, longest=77, itemsize=2)
    table = "constexpr" if feature else "*fp32"  # a pointer that is None is a constant
    sums = "*fp32" if feature else "constexpr"
    view = kernel.View("*fp16", "i32", "i32", "i32")
    bias = "constexpr" if feature else kernel.View("*fp32", "i32", "i32", "i32")
    trace = "constexpr" if feature else kernel.Trace("*fp32", "*fp32")
    signature = {
        "query": view, "key": view, "value": view, "out": view, "key_bias": bias,
        "concepts": kernel.Concepts(view, view, "*i32", "*fp32", *[table] * 5),
        "rule": kernel.Rule(*["fp32"] * len(kernel.Rule._fields)),
        "moments": sums, "norms": sums, "trace": trace, "factor": "fp32",
    }  # fmt: skip
    for name in ("heads", "queries", "keys", "entries", "concept_count", "tokens", "longest"):
        signature[name] = "i32"
    constants = {
        "GOAL": "output", "HEAD_DIM": 64, "CHANNELS": tiles.channels,
        "ROWS": tiles.rows, "KEYS": tiles.keys, "TOKENS": tiles.tokens,
    }  # fmt: skip
    nothing = {(place,): None for place, kind in enumerate(signature.values()) if kind == "constexpr"}
    if table == "constexpr":  # the last five of `concepts`, by their path
        nothing |= {(list(signature).index("concepts"), field): None for field in range(4, 9)}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel.attention, signature=signature, constexprs={**constants, **nothing})
    options = {"num_warps": tiles.warps, "num_stages": 1, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget(*target), options=options)
    assert len(compiled.asm["cubin" if target[0] == "cuda" else "hsaco"]) > 1000
    assert compiled.metadata.shared <= 64 * 1024  # what a CDNA3 workgroup has; NVIDIA has more


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
