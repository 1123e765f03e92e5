# SPDX-License-Identifier: Apache-2.0
"""What compilers make of the fused kernel for GPUs that are not there: registers, shared memory, spills and
matrix instructions, against budget.json.

By default one layer for each GPU; test_triton_versions.py compiles the layers that are used most.
`FASTNEGATE_COMPILED_REPORT=found.json pytest -m full tests/gpuless/triton_kernel/test_compiled.py` compiles
everything and writes what budget.json would be by it. `pytest -rP` shows every kernel.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from support import make_problem, plain

from fastnegate.operator.backends import triton as backend

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from compiler import GPUS, KEYS, NEGATIONS, Compiled, Launch, Layer, products  # noqa: E402
from ptxsim.device import SimulatedDevice  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread", "compiled"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler"
    ),
]

# By dtype and GPU, a number for each of `head_dim`: the most that a kernel may take (with 256 registers, 8
# warps fill a multiprocessor of NVIDIA's). Then the kinds of matrix instructions, and `reasons` for what
# spills on NVIDIA, by "sm_120 16 bit 256".
BUDGET = json.loads((Path(__file__).parent / "budget.json").read_text())
DIMS = BUDGET["head_dim"]
TAKEN = {
    "registers": lambda kernel: -(-kernel.registers // 8) * 8,  # handed out by eights
    "shared KiB": lambda kernel: -(-kernel.shared // 1024),
    "spilled bytes": lambda kernel: kernel.stack,
}
KINDS = "matrix instructions"
EVERYTHING = {
    "target": tuple(GPUS),
    "dim": tuple(DIMS),
    "dtype": (torch.float16, torch.bfloat16, torch.float32),
    "negation": tuple(NEGATIONS),
}
# A compilation takes seconds: by default each GPU has one, and NVIDIA's have every head_dim of real layers.
SOME = [
    Layer(target, dim, dtype, "protore")
    for target, dim, dtype in zip(
        GPUS, (160, 40, 72, 128, 64, 80, 64, 40, 128), itertools.cycle((torch.float16, torch.bfloat16))
    )
]
ALL = [Layer(*values) for values in itertools.product(*EVERYTHING.values())]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Triton's, for this run alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture(scope="module")
def compiled(cache: None, request: pytest.FixtureRequest) -> Iterator[dict[Layer, Future[list[Launch]]]]:
    """The layers of the tests that were selected; a layer takes seconds, so two processes compile them."""
    parameters = (getattr(item, "callspec", None) for item in request.session.items)
    layers = [x for p in parameters if p for x in p.params.values() if isinstance(x, Layer)]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        yield {layer: pool.submit(Layer.compiled, layer) for layer in layers}
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def found() -> Iterator[dict[Layer, list[Launch]]]:
    launches: dict[Layer, list[Launch]] = {}
    yield launches
    if "FASTNEGATE_COMPILED_REPORT" in os.environ:
        Path(os.environ["FASTNEGATE_COMPILED_REPORT"]).write_text(as_budget(launches))


def as_budget(found: dict[Layer, list[Launch]]) -> str:
    """With 0 where nothing was compiled."""
    budget: dict = {"head_dim": DIMS}
    for (target, dim, dtype, _), launches in found.items():
        place = DIMS.index(dim)
        tables = budget.setdefault(kind(dtype), {name: {} for name in (*TAKEN, KINDS)})
        for _, _, kernel in launches:
            for name, taken in TAKEN.items():
                row = tables[name].setdefault(target, [0] * len(DIMS))
                row[place] = max(row[place], taken(kernel))
            row = tables[KINDS].setdefault(target, [""] * len(DIMS))
            row[place] = " ".join(sorted({*row[place].split(), *kernel.matrix}))
    text = json.dumps({**budget, "reasons": BUDGET["reasons"]}, indent=2)
    return re.sub(r"\[\s+([^]]*?)\s+\]", lambda row: f"[{' '.join(row[1].split())}]", text) + "\n"


def kind(dtype: torch.dtype) -> str:
    return "float32" if dtype == torch.float32 else "16 bit"


def spills_nothing(layer: Layer) -> bool:
    """Scope `head`, concepts of 8 tokens, no statistics."""
    return layer.negation in ("none", "protore", "vsf") and layer.dtype != torch.float32 and layer.dim <= 160


def needed(tokens: int, dim: int, sharing: int = 1) -> int:
    """Multiplications in the matrix instructions that attention of a query to so many tokens needs.

    They are m16n8k16 for 16 queries, and other instructions are cut no finer. Q K^T is a product of 16 x dim
    and dim x tokens: `tokens` comes in steps of 8, `dim` in steps of 16. P V is one of 16 x tokens and
    tokens x dim: `dim` comes in steps of 8, `tokens` in steps of 16. Where several warps share 16 queries,
    what comes in steps of 8 is 8 for each of them.
    """
    columns = 8 * sharing
    of_scores = sharing * -(-tokens // columns) * -(-dim // 16)
    of_sums = -(-tokens // 16) * sharing * -(-dim // columns)
    return (of_scores + of_sums) * products("m16n8k16") // 16


def sharing(dim: int) -> int:
    """Warps that share 16 queries, as `tiles` has it."""
    return 1 if dim <= 80 else 2 if dim <= 160 else 4


# Matrix instructions may be 1.10 of what the arithmetic needs. For concepts of 8 tokens they are more where
# warps share queries: two compute the scores of 16 tokens, four those of 32. Z, F and what is removed are
# 3 dim / 2 registers of a warp with 16 queries to itself, of 255: at 160, 240. At 96 that spills 280 bytes
# on 10.0.
NEEDLESS = {88: 1.19, 96: 1.125, 112: 1.125, 128: 1.125, 160: 1.125, 256: 1.44}


# ---- the instrument ---------------------------------------------------------------------------------


@triton.jit
def product(a, b, out, ROWS: tl.constexpr):
    i, j, k = tl.arange(0, ROWS), tl.arange(0, 64), tl.arange(0, 32)
    x, y = tl.load(a + i[:, None] * 32 + k), tl.load(b + k[:, None] * 64 + j)
    tl.store(out + i[:, None] * 64 + j, tl.exp2(tl.dot(x, y)))


@pytest.mark.parametrize("target", tuple(GPUS))
def test_what_is_counted(target: str) -> None:
    rows = 128
    a, b, out = torch.empty(rows, 32).half(), torch.empty(32, 64).half(), torch.empty(rows, 64)
    with Compiled(target) as device:
        product[(1,)](a, b, out, ROWS=rows, num_warps=4, enable_fp_fusion=False)
        if target.startswith("sm_"):
            product[(2, 3)](a, b, out, ROWS=rows, num_warps=4, maxnreg=64, enable_fp_fusion=False)
    first, *squeezed = device.launches
    assert first.grid == (1, 1, 1) and first.constants == {"ROWS": rows}
    kernel = first.kernel
    assert kernel.products == rows * 64 * 32 and kernel.warps == 4
    (family,) = kernel.matrix
    others = {"sm_90": "HGMMA", "sm_100": "tcgen05", "gfx942": "MFMA", "gfx950": "MFMA", "gfx1100": "WMMA"}
    assert family == others.get(target, "HMMA")
    assert kernel.exponentials * 4 * GPUS[target].target.warp_size == rows * 64
    assert kernel.stack == kernel.spills == 0 < kernel.registers and 0 < kernel.seconds < 60
    assert (kernel.tensor_memory > 0) == (family == "tcgen05")
    for launch in squeezed:
        assert launch.grid == (2, 3, 1) and launch.kernel.registers <= 64
        assert launch.kernel.stack > 0 and launch.kernel.spills > 0


# ---- as executed ------------------------------------------------------------------------------------

EXECUTED = [("sm_80", dim, "protore") for dim in EVERYTHING["dim"]]
EXECUTED += [("sm_80", 64, "none"), ("sm_80", 80, "nag"), ("sm_89", 256, "none")]


@pytest.mark.parametrize("target, dim, negation", EXECUTED)
def test_executed(target: str, dim: int, negation: str) -> None:
    """The simulator counts what loops make of it."""
    rule, lengths, _ = NEGATIONS[negation]
    queries = 128
    problem = make_problem(
        1, 1, queries, KEYS, dim, torch.float16,
        rule=rule, rows="same", concept_lengths=lengths or (1,), extras=False,
    )  # fmt: skip
    with SimulatedDevice(gpu=GPUS[target]) as device:
        backend.run(problem if lengths else plain(problem))
    for launch in device.launches:
        mma = launch.result.total.mma
        executed = sum(count * products(name.partition(".")[0]) for name, count in mma.items())
        needless = executed / sum(queries * needed(n, dim) for n in (KEYS, *lengths))
        assert 1 <= needless <= NEEDLESS.get(dim, 1.10)
        as_shared = sum(queries * needed(n, dim, sharing(dim)) for n in (KEYS, *lengths))
        assert executed == as_shared or dim == 256  # where the prompt is taken by tiles
        print(f"{needless:.3f} of what the arithmetic needs")


# ---- as compiled ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", SOME, ids=str)
def test_compiled(layer: Layer, compiled: dict, found: dict) -> None:
    check(layer, compiled[layer].result(), found)


@pytest.mark.full
@pytest.mark.parametrize("layer", ALL, ids=str)
def test_everything_compiled(layer: Layer, compiled: dict, found: dict) -> None:
    check(layer, compiled[layer].result(), found)


def check(layer: Layer, launches: list[Launch], found: dict) -> None:
    found[layer] = launches
    target, dim, dtype, negation = layer
    allowed = {name: table[target][DIMS.index(dim)] for name, table in BUDGET[kind(dtype)].items()}
    lengths = NEGATIONS[negation].lengths
    assert len(launches) == NEGATIONS[negation].launches
    for _, constants, kernel in launches:
        print(kernel)
        for name, taken in TAKEN.items():
            assert taken(kernel) <= allowed[name], name
        assert {*kernel.matrix} <= {*allowed[KINDS].split()} and bool(kernel.matrix) == bool(allowed[KINDS])
        if target.startswith("sm_"):
            named = f"{target} {kind(dtype)} {dim}" in BUDGET["reasons"] and not spills_nothing(layer)
            assert kernel.stack == kernel.spills == 0 or named
            if kernel.matrix:
                # As written: the loop of entries once, and entries that are held; `test_executed` sees what
                # loops do.
                each = kernel.products / constants["ROWS"]
                of_concepts = sum(needed(n, dim, sharing(dim)) for n in {*lengths})
                least = needed(KEYS, dim, sharing(dim)) + (1 + constants["HELD"]) * of_concepts
                assert each <= 1.10 * least
