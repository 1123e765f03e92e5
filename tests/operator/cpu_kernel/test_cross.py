# SPDX-License-Identifier: Apache-2.0
"""The CPU kernel for AArch64: it compiles to NEON, and what it computes, in qemu, keeps the budget."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from support import DTYPES, MASKS, RULES, Judge, make_problem, pairwise, run, run_with_statistics

from fastnegate.operator.backends import cpu
from fastnegate.operator.plan import plans

ROOT = Path(__file__).resolve().parents[3]
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra"]
FLAGS += [
    "-DFASTNEGATE_NEON",
    "-DFASTNEGATE_ISA=neon",
    '-DFASTNEGATE_ISA_NAME="neon"',
    "-DFASTNEGATE_LANES=4",
]
FLAGS += [f"-I{ROOT}/csrc", f"-I{ROOT}/csrc/include"]
GCC = shutil.which("aarch64-linux-gnu-g++")
QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")

pytestmark = pytest.mark.usefixtures("one_thread")


def _compile(command: Sequence[str | Path], **environment: str) -> None:
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="ziglang is not installed")
def test_inner_products_are_vector_multiply_adds(tmp_path: Path) -> None:
    assembly = tmp_path / "kernel.s"
    zig = [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-musl", "-g0"]
    strict = ["-Werror", "-Wno-unused-command-line-argument"]  # zig passes -c beside -S
    caches = {f"ZIG_{kind}_CACHE_DIR": str(tmp_path) for kind in ("GLOBAL", "LOCAL")}
    _compile([*zig, *FLAGS, *strict, "-S", ROOT / "csrc/cpu/kernel.cpp", "-o", assembly], **caches)
    code = assembly.read_text()
    assert not re.search(r"\bbl?\s+fmaf?\b", code)
    # What two instruction sets both define, the linker would merge: then any machine may run the widest.
    assert not re.search(r"\.weak\s", code)
    # A step of `multiply` is one block that jumps back to itself: 8 keys times 2 vectors of queries.
    blocks = re.findall(r"^(\.LBB\w+):(.*?\n\tb\.\w+\t(\.LBB\w+)\n)", code, re.MULTILINE | re.DOTALL)
    loops = [body for label, body, target in blocks if label == target]
    steps = [body for body in loops if len(re.findall(r"\tfmla\tv\d+\.4s, v\d+\.4s, v\d+\.s\[", body)) >= 14]
    assert steps and not any("[sp" in body or "fmadd" in body for body in steps), steps


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that runs the kernel for AArch64 on a file."""
    if QEMU is None or GCC is None:
        pytest.skip("running AArch64 code needs qemu-aarch64 (or -static) and aarch64-linux-gnu-g++ on PATH")
    program = tmp_path_factory.mktemp("cross") / "cross_main"
    sources = [
        ROOT / "tests/operator/cpu_kernel/cross_main.cpp",
        ROOT / "csrc/cpu/run.cpp",
        ROOT / "csrc/cpu/kernel.cpp",
    ]
    _compile([GCC, "-fopenmp", *FLAGS, "-static", *sources, "-o", program])
    return [QEMU, "-cpu", "cortex-a53", str(program), "neon"]  # ARMv8.0, the baseline


class Emulator:
    """Takes the place of the extension module: calls run in qemu and write to the same memory."""

    def __init__(self, command: list[str], file: Path) -> None:
        self.command, self.file = command, file

    def Call(self, arguments: tuple, report_level: float) -> tuple:
        return arguments, report_level

    def run_cpu(self, call, query, key, value, out, key_bias, concepts, partials, *rest) -> None:
        (sizes, strides, bias_strides, dtype, scale, codes, numbers, reads, _), report_level = call
        assert not partials  # the file has no place for them
        *tables, isa, _ = rest
        addresses = [query, key, value, out, key_bias, *(concepts or [0] * 9), *tables]
        batch, heads, queries, keys, dim, entries, count, _, _, tokens = sizes
        element = 4 if dtype == 0 else 2
        shapes = [(batch, heads, n, dim) for n in (queries, keys, keys, queries)]
        shapes += [(1, heads, tokens, dim)] * 2
        rows = [element * _extent(shape, (*s, 1)) for shape, s in zip(shapes, strides)]
        bias = 4 * _extent((batch, heads, queries, keys), bias_strides)
        words = [entries + 2 * count + batch + 1, 8 * entries, tokens, tokens]
        words += [count * heads * dim] * 2 + [count, 6 * entries, entries * queries, 4 * batch]
        extents = [*rows[:4], bias, *rows[4:], *(4 * n for n in words)]
        extents = [n if address else 0 for n, address in zip(extents, addresses)]
        flat = [*sizes, *(s for three in strides for s in three), *bias_strides, dtype, *codes, *reads]
        header = struct.pack("<63q10d", *extents, *flat, scale, report_level, *numbers)
        arrays = [ctypes.string_at(address, n) if n else b"" for address, n in zip(addresses, extents)]
        self.file.write_bytes(b"".join((header, *arrays)))
        assert isa == self.command[-1]
        done = subprocess.run([*self.command, self.file], capture_output=True, text=True)
        assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr}"
        result = self.file.read_bytes()
        for i in (3, 14, 15, 16):
            begin = len(header) + sum(extents[:i])
            ctypes.memmove(addresses[i], result[begin : begin + extents[i]], extents[i])


def _extent(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last of a tensor."""
    return 1 + sum((n - 1) * stride for n, stride in zip(sizes, strides)) if 0 not in sizes else 0


@pytest.fixture
def neon(emulated: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backend "cpu-neon" of support.run."""
    monkeypatch.setattr(cpu, "_C", Emulator(emulated, tmp_path / "problem"))
    monkeypatch.setattr(cpu, "_MISSING", None)
    monkeypatch.setattr(cpu, "MOST_KEYS", 1024)
    plans.clear()
    yield
    plans.clear()  # those that run in qemu


CASES = list(
    pairwise(
        {
            "rule": tuple(RULES),
            "dtype": DTYPES,
            "dim": (40, 64, 160),
            "queries": (1, 7, 65),
            "keys": (1, 7, 77),
            "mask": MASKS,
            "layout": ("bnhd", "odd"),
            "rows": ("same", "mixed"),
        }
    )
)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c.values())).replace("torch.", ""))
def test_neon_keeps_the_budget(case: dict, neon: None) -> None:
    case = {**case, "rule": RULES[case["rule"]]}
    judges = (Judge(make_problem(**case, seed=seed)) for seed in range(9))
    judge = next(j for j in judges if j.near_share <= j.near_limit)  # few rows next to a jump
    output, statistics = run_with_statistics(judge.problem, "cpu-neon")
    judge.check(output, "cpu-neon")
    judge.check_statistics(statistics, "cpu-neon")
    assert torch.equal(run(judge.problem, "cpu-neon"), output)


def test_neon_keeps_a_nan_in_its_row(neon: None) -> None:
    problem = make_problem(rule="protore")
    expected = run(problem, "cpu-neon")
    problem.query[1, 0, 7, 3] = torch.nan
    actual = run(problem, "cpu-neon")
    assert actual[1, 0, 7].isnan().all()
    actual[1, 0, 7] = expected[1, 0, 7]
    assert torch.equal(actual, expected)
