# SPDX-License-Identifier: Apache-2.0
"""What nvcc makes of the CUDA kernels for GPUs that are not there: registers, and what of them is spilled.

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

ARCHS = (80, 90, 100, 120)  # of a default build
DTYPES = ("float16", "bfloat16")
KINDS = ("plain", "one", "many")
# Most registers of a lane where 16, 12 or 8 warps fill a multiprocessor, which has 65536 for them.
REGISTERS = {16: 128, 12: 168, 8: 255}
KERNEL = """#include "cuda/kernel/kernel.cuh"
namespace fastnegate::cuda {{
template __global__ void attention<{dtype}, {dim}, CudaKind::{kind}>(const __grid_constant__ Launch);
}}
"""


def warps(kind: str, dim: int) -> int:
    """cuda_most_warps of csrc/cuda/tiling.h."""
    if kind == "plain":
        return 16 if dim <= 64 else 12 if dim <= 96 else 8
    return 12 if kind == "one" and dim <= 64 else 8


# Bytes that a lane stores and loads because registers do not suffice, by compute capability: the table of
# docs/performance.md. No other kernel does.
SPILLED: dict[tuple[str, int, str], dict[int, int]] = {
    ("one", 64, "float16"): {100: 64},
    ("one", 64, "bfloat16"): {100: 64},
    ("many", 112, "float16"): {80: 188, 90: 96, 100: 156, 120: 80},
    ("many", 112, "bfloat16"): {80: 88, 90: 72, 100: 116, 120: 72},
    ("many", 128, "float16"): {80: 748, 90: 676, 100: 648, 120: 680},
    ("many", 128, "bfloat16"): {80: 648, 90: 612, 100: 584, 120: 616},
    ("many", 160, "float16"): {80: 4248, 90: 3340, 100: 3312, 120: 3320},
    ("many", 160, "bfloat16"): {80: 4148, 90: 3244, 100: 3216, 120: 3224},
}


class Compiled(NamedTuple):
    registers: int
    stack: int  # bytes, with what is spilled there
    spilled: int  # bytes
    barriers: int
    instructions: Counter[str]  # of the PTX, as they stand there


def compiled(folder: Path, arch: int, dtype: str, dim: int, kind: str) -> Compiled:
    source = folder / f"{arch}-{dtype}-{dim}-{kind}.cu"
    source.write_text(KERNEL.format(dtype=dtype, dim=dim, kind=kind))
    # As CMakeLists.txt does it: every binary is made of the PTX of 8.0.
    command = [NVCC, "-std=c++17", "-O3", *NVCC_OPTIONS, "-arch=compute_80", f"-code=sm_{arch}"]
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


def check(folder: Path, arch: int, dtype: str, dim: int, kind: str) -> None:
    kernel = compiled(folder, arch, dtype, dim, kind)
    print(f"sm_{arch} {dtype} {dim} {kind}: {kernel}")
    allowed = SPILLED.get((kind, dim, dtype), {}).get(arch, 0)
    assert kernel.spilled <= allowed
    assert kernel.stack == 0 or allowed > 0
    assert kernel.registers <= REGISTERS[warps(kind, dim)]
    assert kernel.barriers == 1  # __syncthreads and no other
    assert {"mma.sync", "ldmatrix", "cp.async.cg", "ex2.approx"} <= kernel.instructions.keys()
    assert not kernel.instructions["wgmma"]  # one code for all


# head_dim 64 takes all registers of its numbers of warps.
SOME = list(zip(ARCHS, itertools.cycle(DTYPES), itertools.repeat(64), itertools.cycle(("plain", "one"))))
ALL = [(arch, dtype, dim, kind) for arch in ARCHS for dtype in DTYPES for dim in HEAD_DIMS for kind in KINDS]


@pytest.mark.parametrize("arch, dtype, dim, kind", SOME)
def test_some(arch: int, dtype: str, dim: int, kind: str, tmp_path: Path) -> None:
    check(tmp_path, arch, dtype, dim, kind)


@pytest.mark.full
@pytest.mark.parametrize("arch, dtype, dim, kind", ALL)
def test_all(arch: int, dtype: str, dim: int, kind: str, tmp_path: Path) -> None:
    check(tmp_path, arch, dtype, dim, kind)
