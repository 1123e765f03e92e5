# SPDX-License-Identifier: Apache-2.0
"""What nvcc makes of the CUDA kernel for GPUs that are not there: registers, and that nothing is spilled.

By default one kernel for each GPU, every one by
`pytest -m full tests/gpuless/cuda_kernel/test_cuda_compiled.py`. `pytest -rP` shows the numbers.
"""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from cuda_shim.backend import HEAD_DIMS
from cuda_shim.build import CSRC, NVCC_OPTIONS

NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="there is no nvcc")

ARCHS = (80, 86, 89, 90, 100, 120)
DTYPES = ("float16", "bfloat16")
# Most registers of a lane, on any GPU: with 255, 8 warps fill a multiprocessor.
REGISTERS = {32: 232, 40: 248, 64: 255, 72: 248, 80: 248, 88: 255, 96: 255, 112: 248, 128: 255, 160: 255}
KERNEL = """#include "cuda/kernel.cuh"
template __global__ void fastnegate::cuda::attention<fastnegate::{dtype}, {dim}>(
    const __grid_constant__ fastnegate::cuda::Launch);
"""


class Compiled(NamedTuple):
    registers: int
    stack: int  # bytes, with what is spilled there
    spilled: int  # bytes
    barriers: int
    instructions: Counter[str]  # of the PTX, as they stand there


def compiled(folder: Path, arch: int, dtype: str, dim: int) -> Compiled:
    source = folder / f"{arch}-{dtype}-{dim}.cu"
    source.write_text(KERNEL.format(dtype=dtype, dim=dim))
    command = [NVCC, "-std=c++17", "-O3", *NVCC_OPTIONS, f"-arch=sm_{arch}"]
    command += ["-Xptxas", "-v", "-keep", "-keep-dir", folder, "-cubin", source]
    command += [f"-I{CSRC}", f"-I{CSRC / 'include'}"]
    done = subprocess.run([*command, "-o", source.with_suffix(".cubin")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    number = lambda pattern: int(re.search(pattern, done.stderr)[1])  # noqa: E731
    ptx = source.with_suffix(".ptx").read_text()
    return Compiled(
        registers=number(r"Used (\d+) registers"),
        stack=number(r"(\d+) bytes stack frame"),
        spilled=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        barriers=number(r"used (\d+) barriers"),
        instructions=Counter(re.findall(r"(mma\.sync|ldmatrix|cp\.async\.cg|ex2\.approx|wgmma)", ptx)),
    )


def check(folder: Path, arch: int, dtype: str, dim: int) -> None:
    kernel = compiled(folder, arch, dtype, dim)
    print(f"sm_{arch} {dtype} {dim}: {kernel}")
    assert kernel.spilled == kernel.stack == 0
    assert kernel.registers <= REGISTERS[dim]
    assert kernel.barriers == 1  # __syncthreads and no other
    assert {"mma.sync", "ldmatrix", "cp.async.cg", "ex2.approx"} <= kernel.instructions.keys()
    assert not kernel.instructions["wgmma"]  # one code for all


# The dims that take the most registers for each way to hold Z and what is removed.
SOME = list(zip(ARCHS, itertools.cycle(DTYPES), itertools.cycle((64, 96, 160))))
ALL = [(arch, dtype, dim) for arch in ARCHS for dtype in DTYPES for dim in HEAD_DIMS]


def test_budgets_are_for_every_head_dim() -> None:
    assert REGISTERS.keys() == set(HEAD_DIMS)


@pytest.mark.parametrize("arch, dtype, dim", SOME)
def test_some(arch: int, dtype: str, dim: int, tmp_path: Path) -> None:
    check(tmp_path, arch, dtype, dim)


@pytest.mark.full
@pytest.mark.parametrize("arch, dtype, dim", ALL)
def test_all(arch: int, dtype: str, dim: int, tmp_path: Path) -> None:
    check(tmp_path, arch, dtype, dim)
