# SPDX-License-Identifier: Apache-2.0
"""The PTX simulator on what Triton and nvcc compile. It also finds the mistakes it is there to find.

By default that it refuses accesses outside of tensors, and races: the simulated problems, in which there are
none, would not miss that. `pytest -m full tests/gpuless/instruments/test_ptxsim_compiled.py` is the rest."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import ptxsim
import pytest
import torch
from ptxsim import GlobalMemory, PtxError, Result, mutations, parse

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

compiled_by_triton = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler"
)
pytestmark = pytest.mark.usefixtures("one_thread")
RANDOM = np.random.default_rng(0)


@triton.jit
def added(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n), mask=i < n)


@triton.jit
def softmax(x, out, columns, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    row = tl.program_id(0) * columns
    values = tl.load(x + row + i, mask=i < columns, other=float("-inf"))
    weights = tl.exp(values - tl.max(values, 0))
    tl.store(out + row + i, weights / tl.sum(weights, 0), mask=i < columns)


@triton.jit
def product(a, b, out, m, n, k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    i, j = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, N)
    total = tl.zeros([M, N], tl.float32)
    for start in range(0, k, K):
        d = start + tl.arange(0, K)
        x = tl.load(a + i[:, None] * k + d[None, :], mask=(i < m)[:, None] & (d < k)[None, :], other=0.0)
        y = tl.load(b + d[:, None] * n + j[None, :], mask=(d < k)[:, None] & (j < n)[None, :], other=0.0)
        total = tl.dot(x, y, total)
    mask = (i < m)[:, None] & (j < n)[None, :]
    tl.store(out + i[:, None] * n + j[None, :], total.to(out.dtype.element_ty), mask=mask)


@pytest.fixture
def simulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from ptxsim.device import SimulatedDevice

    def make(**options):
        return SimulatedDevice(**{"outputs": {"out"}, "undefined": {"out"}, **options})

    return make


@pytest.mark.full
@compiled_by_triton
def test_vector_addition(simulated) -> None:
    x, y, out = torch.randn(1000), torch.randn(1000), torch.empty(1000)
    with simulated() as device:
        added[(4,)](x, y, out, 1000, BLOCK=256, enable_fp_fusion=False)
    assert torch.equal(out, x + y)
    total = device.launches[0].result.total
    assert total.read["x"].bytes == total.written["out"].bytes == 4000
    # A thread takes two neighbours, one instruction each (a mask of 1000 elements is no whole vector): each
    # of 125 sectors is touched twice.
    assert total.read["x"].sectors == total.written["out"].sectors == 250


@pytest.mark.full
@compiled_by_triton
def test_softmax_of_rows(simulated) -> None:
    x, out = torch.randn(3, 300), torch.empty(3, 300)
    with simulated() as device:
        softmax[(3,)](x, out, 300, BLOCK=512, enable_fp_fusion=False)
    torch.testing.assert_close(out, x.softmax(1), rtol=1e-6, atol=1e-7)
    for counts in device.launches[0].result.per_cta.values():
        assert counts.exponentials >= 300 and counts.barriers > 0
        assert counts.read["x"].bytes == counts.written["out"].bytes == 1200


@pytest.mark.full
@compiled_by_triton
@pytest.mark.parametrize("dtype, stages", (
    (torch.float16, 1), (torch.float16, 3), (torch.bfloat16, 3), (torch.float32, 1),
))  # fmt: skip
def test_matrix_product(dtype: torch.dtype, stages: int, simulated) -> None:
    m, n, k = 70, 64, 72
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    out = torch.empty(m, n, dtype=dtype)
    with simulated() as device:
        product[(2,)](a, b, out, m, n, k, M=64, N=64, K=32, num_stages=stages, enable_fp_fusion=False)
    truth = a.double() @ b.double()
    room = 2**-9 if dtype == torch.float32 else torch.finfo(dtype).eps  # float32 is multiplied as tf32
    assert ((out - truth).abs() <= room * truth.abs() + 0.02).all()
    launch = device.launches[0]
    total = launch.result.total
    kind = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "tf32"}[dtype]
    depth = 8 if dtype == torch.float32 else 16
    assert total.mma == {f"m16n8k{depth}.{kind}.f32": 2 * 4 * 8 * (96 // depth)}
    assert total.read["a"].bytes >= m * k * a.element_size()
    assert total.written["out"].bytes == m * n * a.element_size()
    assert ("cp" in total.instructions) == (stages == 3)


@compiled_by_triton
def test_kernels_may_not_leave_their_tensors(simulated) -> None:
    x, y, out = torch.randn(1000), torch.randn(1000), torch.empty(1000)
    with (
        simulated(),
        pytest.raises(PtxError, match=rf"read out of bounds: .* of x.*{Path(__file__).name}:\d+"),
    ):
        added[(4,)](x, y, out, 1001, BLOCK=256, enable_fp_fusion=False)
    gaps = torch.full((2000,), torch.nan)[::2].copy_(x)
    with simulated(), pytest.raises(PtxError, match="in a gap"):
        added[(4,)](gaps, y, out, 1000, BLOCK=256, enable_fp_fusion=False)
    with simulated(outputs={}), pytest.raises(PtxError, match="write to out, which is an input"):
        added[(4,)](x, y, out, 1000, BLOCK=256, enable_fp_fusion=False)


# ---- mutations --------------------------------------------------------------------------------------

OBVIOUS = ("barrier dropped", "wait dropped", "registers of A swapped", "registers of B swapped",
           "ldmatrix transposed", "copy dropped", "store dropped", "sums swapped")  # fmt: skip


@pytest.mark.full
@compiled_by_triton
def test_mutations_of_a_matrix_product(simulated) -> None:
    """The simulator with a look at the result finds those that must be found."""
    m, n, k = 40, 32, 72
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(s, generator=generator).half() for s in ((m, k), (k, n)))
    truth = a.double() @ b.double()

    def error(change, limit: int) -> float:
        out = torch.empty(m, n, dtype=torch.float16)
        with simulated(change=change, limit=limit) as device:
            product[(2,)](a, b, out, m, n, k, M=32, N=32, K=32, num_stages=3, enable_fp_fusion=False)
        programs.extend(launch.program for launch in device.launches)
        return (out - truth).abs().nan_to_num(torch.inf).max().item()

    programs: list = []
    assert error(lambda program: program, 20_000) < 0.02
    original = programs[0]
    tried = list(mutations(original, per_kind=3))
    assert len({mutation.description for mutation in tried}) == len(tried) >= 40
    assert {mutation.kind for mutation in tried} >= {*OBVIOUS}
    survivors = []
    for mutation in tried:
        changed = [i for i, (x, y) in enumerate(zip(original.code, mutation.program.code)) if x != y]
        assert changed == [mutation.place]
        try:
            if error(lambda program, mutation=mutation: mutation.program, 20_000) < 0.02:
                survivors.append(mutation)
        except PtxError:
            pass
    assert not [s.description for s in survivors if s.kind in OBVIOUS]
    assert len(survivors) <= 0.2 * len(tried), "\n".join(s.description for s in survivors)


# ---- compiled by nvcc -------------------------------------------------------------------------------

SAXPY = r"""
struct Scale { float a; int n; };
extern "C" __global__ void saxpy_sum(const float* x, const float* y, float* out, float* sums, Scale scale) {
  __shared__ float partial[128];
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  float z = 0.f;
  if (i < scale.n) { z = fmaf(scale.a, x[i], y[i]); out[i] = z; }
  partial[threadIdx.x] = z;
  __syncthreads();
  for (int half = 64; half > 0; half >>= 1) {
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
    BARRIER
  }
  if (threadIdx.x == 0) atomicAdd(sums, partial[0]);
}
"""
TILE = r"""
#include <cuda_fp16.h>
__device__ unsigned in_shared(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }
__device__ void copy16(__half* to, const __half* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" :: "r"(in_shared(to)), "l"(from));
}
// C = A B^T of 16x16 and 8x16 halves, through shared memory.
extern "C" __global__ void tile(const __half* a, const __half* b, float* c) {
  extern __shared__ __align__(16) __half room[];
  int lane = threadIdx.x;
  copy16(room + lane * 8, a + lane * 8);
  if (lane < 16) copy16(room + 256 + lane * 8, b + lane * 8);
  asm volatile("cp.async.commit_group; cp.async.wait_group 0;" ::: "memory");
  __syncwarp();
  unsigned A[4], B[2];
  float C[4] = {0.f, 0.f, 0.f, 0.f};
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(A[0]), "=r"(A[1]), "=r"(A[2]), "=r"(A[3])
               : "r"(in_shared(room + lane % 16 * 16 + lane / 16 * 8)));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(B[0]), "=r"(B[1]) : "r"(in_shared(room + 256 + lane % 8 * 16 + lane / 8 % 2 * 8)));
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(C[0]), "+f"(C[1]), "+f"(C[2]), "+f"(C[3])
               : "r"(A[0]), "r"(A[1]), "r"(A[2]), "r"(A[3]), "r"(B[0]), "r"(B[1]));
  for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = C[i];
}
"""


def by_nvcc(source: str, folder: Path) -> ptxsim.Program:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    (folder / "kernel.cu").write_text(source)
    command = [nvcc, "-arch=sm_80", "-ptx", "-O3", "-o", folder / "kernel.ptx", folder / "kernel.cu"]
    subprocess.run(command, check=True, capture_output=True)
    return parse((folder / "kernel.ptx").read_text())


def test_saxpy_by_nvcc(tmp_path: Path) -> None:
    n = 300
    x, y = RANDOM.standard_normal((2, n)).astype(np.float32)

    def launch(program: ptxsim.Program) -> tuple[np.ndarray, np.ndarray, Result]:
        memory = GlobalMemory()
        out, sums = np.zeros(n, np.float32), np.zeros(1, np.float32)
        scale = np.float32(2.5).tobytes() + np.int32(n).tobytes()
        arguments = [
            memory.add("x", x), memory.add("y", y), memory.add("out", out, writable=True, defined=False),
            memory.add("sums", sums, writable=True), scale,
        ]  # fmt: skip
        return out, sums, ptxsim.run(program, (3,), 128, arguments, memory)

    out, sums, result = launch(by_nvcc(SAXPY.replace("BARRIER", "__syncthreads();"), tmp_path))
    expected = np.float32(2.5) * x.astype(np.float64) + y
    np.testing.assert_array_equal(out, expected.astype(np.float32))
    np.testing.assert_allclose(sums[0], expected.sum(), rtol=1e-5)
    assert result.total.read["x"].bytes == 1200 and result.total.barriers == 3 * 8
    with pytest.raises(PtxError, match="race"):
        launch(by_nvcc(SAXPY.replace("BARRIER", ""), tmp_path))


@pytest.mark.full
def test_tile_by_nvcc(tmp_path: Path) -> None:
    """cp.async, ldmatrix and mma in inline assembly."""
    program = by_nvcc(TILE, tmp_path)
    a, b = (RANDOM.standard_normal((n, 16)).astype(np.float16) for n in (16, 8))

    def launch(program: ptxsim.Program) -> np.ndarray:
        memory = GlobalMemory()
        c = np.zeros((16, 8), np.float32)
        arguments = [memory.add("a", a), memory.add("b", b), memory.add("c", c, writable=True, defined=False)]
        ptxsim.run(program, (1,), 32, arguments, memory, shared=768)
        return c

    expected = a.astype(np.float64) @ b.astype(np.float64).T
    np.testing.assert_allclose(launch(program), expected, rtol=1e-6, atol=1e-6)
    without_wait = next(m for m in mutations(program) if m.kind == "wait dropped")
    with pytest.raises(PtxError, match="its wait is missing"):
        launch(without_wait.program)
    swapped = next(m for m in mutations(program) if m.kind == "registers of A swapped")
    assert np.abs(launch(swapped.program) - expected).max() > 0.1
