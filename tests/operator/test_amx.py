# SPDX-License-Identifier: Apache-2.0
"""The CPU kernel with Intel's tile registers: with tiles emulated it keeps the budget and the invariants on machines
that have none; compiled for them, it uses them and leaves nothing in them."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support import MASKS, RULES, fair, make_problem, pairwise, plain, run, run_with_statistics, with_concepts

from fastnegate.operator.backends import cpu
from fastnegate.operator.plan import plans

ROOT = Path(__file__).resolve().parents[2]
GXX = shutil.which("g++")
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mfma", "-mf16c"]
KERNEL = [*AVX512, "-mprefer-vector-width=512", "-DFASTNEGATE_LANES=16", "-DFASTNEGATE_PAIRS", "-DFASTNEGATE_TILES"]
KERNEL += ["-ffp-contract=off", "-fno-math-errno", '-DFASTNEGATE_ISA_NAME="amx"', "-Wno-maybe-uninitialized"]
RUNS = cpu._C is not None and not {"avx512bf16", "amx"}.isdisjoint(cpu._C.usable_isas())  # on this machine

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(GXX is None, reason="there is no g++"),
]


def _compile(*arguments: str | Path) -> None:
    assert GXX is not None
    flags = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-Wall", "-Wextra"]
    flags += [f"-I{ROOT}/csrc", f"-I{ROOT}/csrc/include"]
    done = subprocess.run([GXX, *flags, *arguments], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr[-4000:]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The extension module with one level, whose tiles are emulated."""
    pybind11 = pytest.importorskip("pybind11")
    if not RUNS:
        pytest.skip("this machine has no AVX-512 with bfloat16")
    folder = tmp_path_factory.mktemp("amx")
    csrc = ROOT / "csrc"
    # In the place of the level for every machine, the only one that run.cpp knows by itself.
    level = ["-O1", *KERNEL, "-DFASTNEGATE_ISA=portable", "-DFASTNEGATE_TILES_EMULATED"]
    python = [f"-I{path}" for path in (sysconfig.get_path("include"), pybind11.get_include())]
    with ThreadPoolExecutor(2) as pool:
        bindings = pool.submit(_compile, *python, "-c", csrc / "bindings.cpp", "-o", folder / "bindings.o")
        _compile(*level, "-c", csrc / "cpu/kernel.cpp", "-o", folder / "kernel.o")
        bindings.result()
    _compile("-O1", "-shared", csrc / "cpu/run.cpp", *folder.glob("*.o"), "-o", folder / "_C.so")
    spec = importlib.util.spec_from_file_location("amx._C", folder / "_C.so")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def amx(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The backend that runs it, for support.run."""
    monkeypatch.setattr(cpu, "_C", emulated)
    plans.clear()
    yield "cpu-amx"
    plans.clear()


CASES = list(
    pairwise(
        {
            "rule": tuple(RULES),
            "dim": (8, 24, 32, 40, 64, 72, 80, 128, 256),
            "queries": (1, 16, 17, 70),
            "keys": (0, 1, 15, 16, 17, 33, 77, 512),
            "mask": MASKS,
            "layout": ("bnhd", "odd"),
            "rows": ("same", "mixed"),
            "concept_lengths": ((8, 3, 12), (1, 33), (77, 16, 40)),
        }
    )
)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c.values())).replace(" ", ""))
def test_tiles_keep_the_budget(case: dict[str, Any], amx: str) -> None:
    case = {**case, "rule": RULES[case["rule"]], "dtype": torch.bfloat16}
    judge = fair(make_problem(**case, seed=seed) for seed in range(9))
    output, statistics = run_with_statistics(judge.problem, amx)
    judge.check(output, amx)
    judge.check_statistics(statistics, amx)
    assert torch.equal(run(judge.problem, amx), output)
