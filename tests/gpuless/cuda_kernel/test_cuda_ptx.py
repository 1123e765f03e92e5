# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel as compiled for sm_80, executed: results, what each block reads, writes and multiplies, and
mutations of the kernel and of its inline assembly, which these checks find: `-m full -k some` tries some, in
minutes, `-m full` all, in hours.

The launch code is that of the backend and csrc/cuda/run.cu, with a recorder in place of the kernels."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from cuda_shim.backend import HEAD_DIMS, Shim, dims_flag
from cuda_shim.build import CSRC, NVCC_OPTIONS, build, missing
from executed import (
    BFLOAT16,
    FAR,
    FIRST,
    FLOAT16,
    SECOND,
    SMALL,
    STRONG,
    THIRD,
    THREE_SWEEPS,
    all_weigh,
    check_fates,
    entries_of,
    fate,
    kept_keys,
    largest,
    loud,
    masked,
    only,
    pointing_nowhere,
    ties,
)
from ptxsim import Counts, Instruction, Mutation, Program, Result, mutations, parse, run
from ptxsim.counts import SECTOR
from ptxsim.memory import WARP
from ptxsim.parse import Immediate, Register
from ptxsim.tensors import Tensors
from support import RULES, Judge, make_problem, plain
from torch import Tensor

from fastnegate.operator.backends import cuda as backend
from fastnegate.operator.backends import native
from fastnegate.operator.problem import Problem, Statistics
from fastnegate.operator.rule import Rule

pytestmark = pytest.mark.usefixtures("one_thread")

NVCC = shutil.which("nvcc")
RECORDER = Path(__file__).parent / "recorder.cpp"
TYPES = {FLOAT16: "float16", BFLOAT16: "bfloat16"}
# Order of the addresses that the bindings take.
ARGUMENTS = ("query", "key", "value", "out", "key_bias", "concept_key", "concept_value", "index", "numbers",
             "token_bias", "token_weight", "direction", "update", "offset", "moments", "norms",
             "trace_entries", "trace_rows")  # fmt: skip
CONCEPTS = ARGUMENTS[5:14]
UNDEFINED = ("out", "moments", "norms")  # until the kernel writes them
WRITTEN = (*UNDEFINED, "trace_entries", "trace_rows")


class Gpu(NamedTuple):
    """By default with the memory of an A100."""

    multiprocessors: int
    shared: int = 163 << 10  # bytes that a block may have


A100, ONE, TWO = Gpu(108), Gpu(1), Gpu(2)


KINDS = ("plain", "one", "many")  # of kernels: CudaKind of csrc/cuda/tiling.h


class Tiling(NamedTuple):
    """CudaTiling of csrc/cuda/tiling.h."""

    kind: int
    warps: int
    blocks: int
    stages: int
    prompt_slots: int
    concept_slots: int
    rosters: int
    shared: int


class Launched(NamedTuple):
    goal: str
    tiling: Tiling
    program: Program
    result: Result


class Simulated(NamedTuple):
    output: Tensor
    statistics: Statistics | None
    launches: list[Launched]


class Simulator:
    """The backend with kernels that are compiled by nvcc and executed by ptxsim."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        flags = ["-O0", dims_flag(HEAD_DIMS), '-DFASTNEGATE_CUDA_ARCHS="80"']
        sources = [CSRC / "cuda" / "run.cu", CSRC / "cuda" / "bindings.cpp", RECORDER]
        library = build(sources, folder / "_cuda.so", flags=flags, python=True)
        self.shim = Shim(library)
        spec = importlib.util.spec_from_file_location(f"{folder.name}.recorder", library)
        self.recorder = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.recorder)
        self.programs: dict[tuple[torch.dtype, int, int], Program] = {}

    def program(self, dtype: torch.dtype, dim: int, kind: int) -> Program:
        if (dtype, dim, kind) not in self.programs:
            self.programs[dtype, dim, kind] = self.compile(dtype, dim, kind)
        return self.programs[dtype, dim, kind]

    def compile(self, dtype: torch.dtype, dim: int, kind: int, instructions: str | None = None) -> Program:
        """The kernel, with `instructions` in place of ptx.cuh."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        if instructions is not None:
            (folder / "cuda").mkdir()
            (folder / "cuda" / "ptx.cuh").write_text(instructions)
        source, target = folder / "kernel.cu", folder / "kernel.ptx"
        source.write_text(f"""
            #include "cuda/kernel/kernel.cuh"
            namespace fastnegate::cuda {{
            template __global__ void attention<{TYPES[dtype]}, {dim}, CudaKind::{KINDS[kind]}>(
                const __grid_constant__ Launch);
            }}
        """)
        includes = [f"-I{path}" for path in (folder, CSRC, CSRC / "include")]
        options = ["-std=c++17", "-O3", *NVCC_OPTIONS, "-lineinfo", "-arch=sm_80", "-ptx"]
        subprocess.run([NVCC, *options, *includes, "-o", target, source], check=True)
        return parse(target.read_text())

    def tiling(self, problem: Problem, gpu: Gpu) -> Tiling:
        self.shim.reset(**gpu._asdict())
        return Tiling(*self.shim.module.tiling(self.shim.module.Call(native.layout(problem).arguments, 0)))

    def smaller(self, problem: Problem, gpu: Gpu, accepted: Callable[[Tiling], bool]) -> Gpu:
        """With as much shared memory as there is where the tiling is accepted."""
        sizes = (gpu._replace(shared=kib << 10) for kib in range(gpu.shared >> 10, 0, -1))
        return next(size for size in sizes if accepted(self.tiling(problem, size)))

    def __call__(
        self, problem: Problem, statistics: bool = False, gpu: Gpu = A100,
        change: Callable[[Program], Program] = lambda program: program, limit: int = 1_000_000,
    ) -> Simulated:  # fmt: skip
        """What the backend makes of a problem.

        Args:
            change: makes of the compiled program that which runs.
            limit: as of `ptxsim.run`.
        """
        of_kinds: dict[int, Program] = {}
        sums = problem.rule.sums_over_heads if problem.concepts is not None else ()
        memory, launches = Tensors(), []

        def made(arguments: tuple, device: int) -> tuple:
            return self.shim.module.Call(arguments, device), arguments

        def start(made: tuple, *addresses: Any) -> None:
            call, arguments = made
            *prompt, concepts, moments, norms, entries, rows, stream = addresses
            passed = dict(zip(ARGUMENTS, (*prompt, *(concepts or [0] * 9), moments, norms, entries, rows)))
            there = {
                name: memory.address(
                    name, tensor, writable=name in WRITTEN, defined=name not in UNDEFINED
                ) if (tensor := host_tensor(passed[name], *shape)) is not None else 0
                for name, shape in host_shapes(arguments).items()
            }  # fmt: skip
            *prompt, moments, norms, entries, rows = (there[n] for n in ARGUMENTS if n not in CONCEPTS)
            concepts = tuple(there[name] for name in CONCEPTS) if concepts else ()
            self.shim.module.run(call, *prompt, concepts, moments, norms, entries, rows, stream)
            tiling = Tiling(*self.shim.module.tiling(call))
            kind = tiling.kind
            if kind not in of_kinds:
                of_kinds[kind] = change(self.program(problem.query.dtype, problem.sizes[-1], kind))
            program = of_kinds[kind]
            for goal, (blocks, threads, shared, parameter) in zip((*sums, "output"), self.recorder.take()):
                assert (blocks, threads, shared) == (tiling.blocks, WARP * tiling.warps, tiling.shared)
                result = run(program, (blocks,), threads, [parameter], memory, shared, limit)
                launches.append(Launched(goal, tiling, program, result))

        self.shim.reset(**gpu._asdict())
        with self.shim.installed(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend, "_cuda", SimpleNamespace(Call=made, run=start))
            if not statistics:
                return Simulated(backend.run(problem), None, launches)
            output, tables = backend.run_with_statistics(problem)
            return Simulated(output, tables.named, launches)


def host_shapes(arguments: tuple) -> dict[str, tuple]:
    """Shape, strides and dtype of each tensor of a call."""
    sizes, strides, bias_strides, dtype, *_ = arguments
    batch, heads, queries, keys, dim, entries, count, _, _, tokens = sizes
    stored = next(of for of, code in native.DTYPES.items() if code == dtype)
    shapes: dict[str, tuple] = {
        name: ((batch, heads, n, dim), (*of, 1), stored)
        for name, n, of in zip(ARGUMENTS, (queries, keys, keys, queries), strides)
    }
    shapes["key_bias"] = (batch, heads, queries, keys), bias_strides, torch.float32
    for name, (_, head, row) in zip(CONCEPTS, strides[4:]):
        shapes[name] = (tokens, heads, dim), (row, head, 1), stored
    vectors, planes = (count, heads, dim), (heads, queries)
    contiguous = {
        "index": (entries + 2 * count + batch + 1,), "numbers": (entries, 8), "token_bias": (tokens,),
        "token_weight": (tokens,), "direction": vectors, "update": vectors, "offset": (count,),
        "moments": (5, entries, *planes), "norms": (2, batch, *planes),
        "trace_entries": (3, entries, *planes), "trace_rows": (4, batch, *planes),
    }  # fmt: skip
    for name, shape in contiguous.items():
        like = torch.empty(shape, device="meta")
        shapes[name] = shape, like.stride(), torch.int32 if name == "index" else torch.float32
    return shapes


def host_tensor(address: int, shape: tuple, strides: tuple, dtype: torch.dtype) -> Tensor | None:
    """A tensor from its address: what the bindings see of it."""
    if not address or 0 in shape:
        return None
    size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides))
    memory = (ctypes.c_byte * (size * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)


@pytest.fixture(scope="session")
def simulate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    if missing() or NVCC is None:
        pytest.skip(missing() or "there is no nvcc")
    simulator = Simulator(tmp_path_factory.mktemp("cuda"))
    # Binding a program makes so many objects that Python looks for garbage among all of torch's, too: half of
    # the time.
    gc.collect()
    gc.freeze()
    yield simulator
    gc.unfreeze()


# ---- what a block has to do -------------------------------------------------------------------------

ROWS = 16  # of a matrix instruction: a tile of queries
PAIR, MOST_TILES = 16, 4  # tokens of two tiles; tiles of a block
# Of the other tensors, which are numbers of entries and tokens, every thread reads what it wants to know.
READ = ("query", "key", "value", "concept_key", "concept_value", "moments", "norms")


class Work(NamedTuple):
    read: Counter[str]  # bytes of READ
    written: Counter[str]  # bytes
    mma: Counter[str]  # by shape
    exponentials: int  # of threads

    @classmethod
    def of(cls, counts: Counts) -> Work:
        mma: Counter[str] = Counter()
        for name, number in counts.mma.items():
            mma[name.partition(".")[0]] += number
        read = Counter({name: counts.read[name].bytes for name in READ if name in counts.read})
        written = Counter({name: traffic.bytes for name, traffic in counts.written.items()})
        return cls(+read, +written, mma, counts.exponentials)


class Expected:
    """What blocks of a launch have to do, from sizes alone."""

    def __init__(self, simulate: Simulator, problem: Problem, simulated: Simulated, launch: Launched) -> None:
        self.problem, self.rule, self.goal = problem, problem.rule, launch.goal
        self.tiling = launch.tiling
        self.statistics = simulated.statistics is not None
        self.size = problem.query.element_size()
        self.prompts, self.entries = kept_keys(problem), entries_of(problem)
        self.prompt_step, self.concept_step = simulate.recorder.tokens_at_a_time(problem.sizes[-1])

    def shares(self, block: int) -> Iterator[tuple[int, int, int, int]]:
        """Of each head that the block meets: row, head, first and last tile."""
        batch, heads, queries, _, _ = self.problem.sizes
        tiles = -(-queries // ROWS)
        share, more = divmod(batch * heads * tiles, self.tiling.blocks)
        begin = share * block + min(block, more)
        end = begin + share + (block < more)
        for head in range(begin // tiles, -(-end // tiles)):
            yield *divmod(head, heads), max(begin - head * tiles, 0), min(end - head * tiles, tiles)

    def work(self, block: int) -> Work:
        work = Work(Counter(), Counter(), Counter(), 0)
        for share in self.shares(block):
            work = Work._make(a + b for a, b in zip(work, self.work_on_head(*share)))
        return work

    def work_on_head(self, row: int, head: int, first: int, last: int) -> Work:
        _, heads, queries, keys, dim = self.problem.sizes
        prompt, entries = self.prompts[row, head], [e for e in self.entries[row] if e.exists]
        blocks = Block.gathered([len(entry.kept) for entry in entries])
        tiles, lines = last - first, min(last * ROWS, queries) - first * ROWS
        # Text that does not stay in shared memory is read in each turn of the block's warps, by all of them:
        # then those without a tile compute, too.
        prompt_stays = self.tiling.prompt_slots > 0 or keys == 0
        concepts_stay = len(blocks) <= self.tiling.rosters
        concepts_stay &= sum(block.slots for block in blocks) <= self.tiling.concept_slots
        turns = -(-tiles // self.tiling.warps)
        softmaxes = tiles if prompt_stays and concepts_stay else turns * self.tiling.warps
        passes = 1 if self.goal == "moments" else 2
        if self.goal == "norms" and not blocks:
            passes = 0
        measured = passes if len(blocks) > 1 or not concepts_stay else min(passes, 1)

        token = dim * self.size
        read = Counter(query=lines * token)
        read["key"] = int(prompt.sum()) * token * (1 if prompt_stays else turns)
        for block in blocks:
            present = sum(int(entries[i].kept.sum()) for i in block.entries) * self.rule.reads.tokens
            # One longer than a block is brought again whenever it is looked at.
            looked = measured * (1 + self.wants_products) + (passes > 1) * (self.rule.direction != "fixed")
            times = 1 if concepts_stay else turns * (looked if block.long else passes)
            read["concept_key"] += present * token * times
        read |= {"value": read["key"], "concept_value": read["concept_key"]}
        if self.goal != "moments" and "moments" in self.rule.sums_over_heads:
            lanes = sum(sum(block.sizes) for block in blocks)  # each lane of an entry
            read["moments"] = self.planes * 4 * heads * lines * lanes * measured
        if self.goal == "output" and "norms" in self.rule.sums_over_heads:
            read["norms"] = 4 * 2 * 4 * heads * lines * (len(blocks) > 0)

        pairs = -(-keys // PAIR)
        mma = self.scores(pairs) + self.values(pairs)
        pieces = max(-(-keys // self.prompt_step), 1)
        exponentials = pieces * self.prompt_step * ROWS + (pieces - 1) * 2 * WARP
        once: Counter[str] = Counter()
        for block in blocks if self.rule.reads.tokens else ():
            for _ in range(measured):
                mma += self.measured(block)
                exponentials += self.concept_step * ROWS * block.pieces
                exponentials += block.long * (2 * WARP * block.pieces)
                exponentials += block.long * self.wants_products * self.concept_step * ROWS * block.pieces
            if passes > 1 and self.rule.direction != "fixed":
                mma += self.values(block.pairs) + (self.scores(block.pairs) if block.long else Counter())
                exponentials += block.long * self.concept_step * ROWS * block.pieces
            if self.wants_products and not block.long:
                products = block.pairs + (block.pairs**2 if block.four else block.pairs)
                times = 1 if concepts_stay else turns * passes
                once += Counter({shape: n * products * times for shape, n in self.scores(1).items()})
        total = Counter({shape: softmaxes * count for shape, count in mma.items()}) + once
        return Work(+read, +self.written(lines, len(entries)), total, softmaxes * exponentials)

    @property
    def wants_products(self) -> bool:
        """Whether inner products of Z and F are made: not where their sums over heads are known."""
        known = self.goal != "moments" and "moments" in self.rule.sums_over_heads
        return self.rule.reads.products and not known

    @property
    def planes(self) -> int:
        """Tables of numbers to be summed up over heads: inner products, those with a direction, masses."""
        rule = self.rule
        inner = rule.similarity == "cosine" or rule.direction in ("orthogonal", "projection")
        return 3 * inner + rule.reads.direction + (rule.similarity == "mass")

    def measured(self, block: Block) -> Counter[str]:
        """Matrix instructions from the tokens of a block to the moments of its entries."""
        mma = self.scores(block.pairs)
        if self.wants_products and block.long:
            mma += self.scores(block.pairs) + self.values(block.pairs)
        elif self.wants_products:  # Z Vc', and p G in two halves
            mma += self.scores(block.pairs)
            mma += Counter(m16n8k16=2 * block.pairs * (4 if block.four else 2))
        return mma

    def scores(self, pairs: int) -> Counter[str]:
        """Matrix instructions of the inner products of 16 rows with pairs of tiles of 8 tokens."""
        dim = self.problem.sizes[-1]
        return +Counter(m16n8k16=2 * pairs * (dim // 16), m16n8k8=2 * pairs * (dim // 8 % 2))

    def values(self, pairs: int) -> Counter[str]:
        """And of their values, so weighted."""
        return Counter(m16n8k16=pairs * (self.problem.sizes[-1] // 8))

    def written(self, lines: int, entries: int) -> Counter[str]:
        if self.goal == "moments":
            return Counter(moments=self.planes * 4 * lines * entries)
        if self.goal == "norms":
            return Counter(norms=2 * 4 * lines * (entries > 0))
        written = Counter(out=lines * self.problem.sizes[4] * self.size)
        if self.statistics:
            written |= {"trace_entries": 3 * 4 * lines * entries, "trace_rows": 4 * 4 * lines}
        return written


class Block(NamedTuple):
    """Concept tokens side by side, in tiles of 8."""

    entries: list[int]  # places among those that exist
    sizes: list[int]  # tiles that each takes
    pairs: int  # of tiles
    long: bool  # of one entry, longer than a block, in pieces
    four: bool  # whether all tiles are of one entry

    @property
    def pieces(self) -> int:
        return -(-self.pairs // 2)

    @property
    def slots(self) -> int:
        return self.pairs * PAIR

    @classmethod
    def gathered(cls, lengths: Sequence[int]) -> list[Block]:
        """Those of entries with so many tokens: 1, 2 or 4 tiles that begin at a multiple."""
        blocks: list[Block] = []
        tiles = MOST_TILES
        for i, length in enumerate(lengths):
            needed = max(-(-length // 8), 1)
            if needed > MOST_TILES:
                blocks.append(cls([i], [MOST_TILES], -(-needed // 2), True, False))
                tiles = MOST_TILES
                continue
            size = MOST_TILES if needed == 3 else needed
            begin = -(-tiles // size) * size
            if begin + size > MOST_TILES:
                blocks.append(cls([], [], 0, False, False))
                begin = 0
            last = blocks.pop()
            tiles = begin + needed
            blocks.append(cls([*last.entries, i], [*last.sizes, size], -(-tiles // 2), False,
                              last.four or size == MOST_TILES))  # fmt: skip
        return blocks


def check_work(simulate: Simulator, problem: Problem, simulated: Simulated) -> None:
    """Each block does what it has to, and no byte more."""
    moved = 0
    for launch in simulated.launches:
        expected = Expected(simulate, problem, simulated, launch)
        for (block, _, _), counts in launch.result.per_cta.items():
            done, least = Work.of(counts), expected.work(block)
            assert done._replace(exponentials=least.exponentials) == least, f"block {block} of {launch.goal}"
            # Besides those of softmaxes a few numbers of each query.
            assert least.exponentials <= done.exponentials <= 1.25 * least.exponentials + 4096
        total = launch.result.total
        moved += total.read["query"].bytes
        moved += total.written["out"].bytes if launch.goal == "output" else 0
    # Queries once per sweep and outputs once, of what no kernel can avoid.
    size = problem.query.numel() * problem.query.element_size()
    assert moved / (2 * size) == (len(simulated.launches) + 1) / 2


# ---- results ----------------------------------------------------------------------------------------


def same(problem: Problem) -> Problem:
    return problem


def strided(problem: Problem) -> Problem:
    """Rows of whole 16 bytes with gaps between them, of every tensor, and other rows between those."""

    def spread(t: Tensor) -> Tensor:
        *sizes, rows, dim = t.shape
        return t.new_full((*sizes, 2 * rows + 1, dim + 24), torch.nan)[..., 1::2, 8 : 8 + dim].copy_(t)

    concepts = problem.concepts
    concepts = dataclasses.replace(concepts, key=spread(concepts.key), value=spread(concepts.value))
    tensors = {name: spread(getattr(problem, name)) for name in ("query", "key", "value")}
    return dataclasses.replace(problem, concepts=concepts, **tensors)


# Where text does not fit in shared memory, and where only the queries of one turn do.
STREAMED: dict[str, Callable[[Tiling], bool]] = {
    "streamed-prompt": lambda tiling: tiling.prompt_slots == 0,
    "streamed-concepts": lambda tiling: tiling.prompt_slots > 0 and tiling.rosters == 1,
    "streamed-text": lambda tiling: tiling.prompt_slots == 0 and tiling.rosters == 1,
    "one-stage": lambda tiling: tiling.prompt_slots > 0 and tiling.stages == 1,
}
WIDE = {"queries": 50, "dim": 160, "dtype": BFLOAT16}
LONG = {"concept_lengths": (77, 3, 50)}
CASES: dict[str, dict] = {
    "protore": {"batch": 4, "queries": 65, "keys": 77},
    "nag": {"rule": "nag", "heads": 2, "queries": 33, "keys": 77, "dim": 64, "dtype": BFLOAT16},
    "vsf": {"rule": "vsf", "heads": 2, "queries": 33, "keys": 77, "dim": 160, "dtype": BFLOAT16},
    "zero-tokens": {"heads": 2, "keys": 77, "dim": 64, "rows": "zero_tokens"},
    "inactive": {"rows": "inactive", "dtype": BFLOAT16},
    "three-sweeps": {"rule": THREE_SWEEPS, "heads": 5},
    "mass": {"rule": RULES["mass-preserve"], "heads": 2},
    "joint-max": {"rule": RULES["joint-max"]},
    "fixed": {"rule": RULES["fixed-head"], "heads": 2},
    "streamed-prompt": {**WIDE, "keys": 150, "rule": "vsf"},
    "streamed-concepts": {**WIDE, **LONG, "keys": 77},
    "streamed-text": {**WIDE, **LONG, "keys": 150},
    "one-stage": {**WIDE, "keys": 77, "queries": 100},
    "masked-keys": {"batch": 3, "keys": 77, "mask": "padding", "dtype": BFLOAT16},
    "biased-keys": {"heads": 2, "keys": 77, "mask": "additive"},
    "no-keys": {"keys": 0},
    "bnhd": {"heads": 3, "layout": "bnhd", "dtype": BFLOAT16},
    "broadcast": {"batch": 4, "layout": "broadcast"},
    "strided": {"heads": 2, "change": strided},
    "without-extras": {"extras": False},
    "one-query": {"queries": 1, "keys": 1, "concept_lengths": (1, 2, 3)},
}
WITHOUT_STATISTICS = ("streamed-concepts", "masked-keys", "strided")


def case(name: str) -> Problem:
    options = {**SMALL, **CASES[name]}
    change = options.pop("change", same)
    return change(make_problem(**options))


@pytest.mark.parametrize("name", CASES)
def test_results_and_work(name: str, simulate: Simulator) -> None:
    problem = case(name)
    gpu = TWO if name not in STREAMED else simulate.smaller(problem, TWO, STREAMED[name])
    simulated = simulate(problem, name not in WITHOUT_STATISTICS, gpu)
    judge = Judge(problem)
    judge.check(simulated.output, "cuda-ptx")
    if simulated.statistics is not None:
        judge.check_statistics(simulated.statistics, "cuda-ptx")
    check_work(simulate, problem, simulated)


# Instructions that a warp executes for 16 queries of a head, at most: 77 keys, concepts of 8 tokens.
NAG = Rule.preset("nag", scope="head")
# head_dim, keys, rule, concepts of 8 tokens, instructions.
INSTRUCTIONS_AT_MOST = {
    "none": (64, 77, "protore", 0, 800),
    "protore": (64, 77, "protore", 4, 1900),
    "nag": (64, 77, NAG, 4, 1900),
    "vsf": (64, 77, "vsf", 4, 1900),
    "eiup": (64, 77, "eiup", 4, 1900),
    "none-40": (40, 77, "protore", 0, 760),
    "protore-40": (40, 77, "protore", 4, 1850),
    "none-80": (80, 77, "protore", 0, 900),
    "protore-80": (80, 77, "protore", 4, 2100),
    "none-128": (128, 512, "protore", 0, 4200),
    "protore-128": (128, 512, "protore", 4, 5430),  # 1300 more than counted without
}
LONG = ("none-128", "protore-128")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] * (name in LONG)) for name in INSTRUCTIONS_AT_MOST]
)
def test_instructions(name: str, simulate: Simulator) -> None:
    """The whole kernel, counted in two sizes: what more queries cost."""
    dim, keys, rule, concepts, most = INSTRUCTIONS_AT_MOST[name]

    def executed(queries: int) -> int:
        options = {"dim": dim, "keys": keys, "rule": rule, "rows": "same", "extras": False, "dtype": BFLOAT16}
        problem = make_problem(1, 1, queries, **options, concept_lengths=(8,) * max(concepts, 1))
        (launch,) = simulate(problem if concepts else plain(problem), gpu=Gpu(1, 227 << 10)).launches
        return launch.result.total.instructions.total()

    less, more = 192, 384  # tiles of 16 queries for 12 warps and for 24
    counted = (executed(more) - executed(less)) / ((more - less) / ROWS)
    print(f"{name}: {counted:.0f} instructions, at most {most}")
    assert counted <= most


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_head_dims(dim: int, simulate: Simulator) -> None:
    """What is left of 16 channels has instructions of its own."""
    problem = make_problem(**{**SMALL, "dim": dim, "keys": 77, "heads": 2})
    simulated = simulate(problem, gpu=Gpu(4))
    Judge(problem).check(simulated.output, "cuda-ptx")
    check_work(simulate, problem, simulated)


@pytest.mark.parametrize("layout", ("contiguous", "bnhd"))
def test_accesses_are_whole_sectors(layout: str, simulate: Simulator) -> None:
    """Where rows are."""
    problem = make_problem(**{**SMALL, "dim": 64, "keys": 77, "heads": 2, "layout": layout})
    total = simulate(problem, gpu=TWO).launches[0].result.total
    for traffic in (*(total.read[name] for name in READ if name in total.read), total.written["out"]):
        assert traffic.sectors * SECTOR == traffic.bytes > 0


@pytest.mark.parametrize("name", ("protore", "nag", "vsf"))
def test_row_without_entries_is_plain_attention(name: str, simulate: Simulator) -> None:
    problem = case(name)
    output, z = simulate(problem, True, TWO).output, simulate(plain(problem), gpu=TWO).output
    assert torch.equal(output[1], z[1]) and not torch.equal(output[0], z[0])


@pytest.mark.parametrize("name", ("protore", "nag", "vsf"))
def test_row_does_not_depend_on_other_rows(name: str, simulate: Simulator) -> None:
    problem = make_problem(**{**SMALL, **CASES[name], "batch": 2, "rows": [[0, 2], [1]]})
    output = simulate(problem, True, TWO).output
    for row in (0, 1):
        assert torch.equal(simulate(only(problem, row), True, TWO).output[0], output[row])


@pytest.mark.parametrize("name", ("protore", "three-sweeps", "streamed-text"))
def test_tilings(name: str, simulate: Simulator) -> None:
    """Bits do not depend on how many blocks there are, nor on what fits in shared memory."""
    options = {**SMALL, **CASES[name], "batch": 1, "heads": 2, "queries": 70, "keys": 100, "dim": 40}
    problem = make_problem(**options)
    small = [simulate.smaller(problem, TWO, STREAMED[name]) for name in ("streamed-text", "one-stage")]
    outputs = []
    for gpu in (A100, ONE, *small):
        simulated = simulate(problem, True, gpu)
        check_work(simulate, problem, simulated)
        outputs.append(simulated)
    assert len({simulated.launches[0].tiling for simulated in outputs}) == len(outputs)
    for other in outputs[1:]:
        assert torch.equal(other.output, outputs[0].output)
        assert all(map(torch.equal, other.statistics, outputs[0].statistics))


# ---- what finds mistakes ----------------------------------------------------------------------------

# A head_dim for which operands are in registers and in shared memory, channels steps of 16 and of 8.
MUTATED: dict = {**SMALL, "batch": 1, "keys": 77, "dim": 72, "rows": [[FIRST, SECOND, THIRD]]}


class Check:
    """A problem and what is promised of its result."""

    def __init__(
        self, simulate: Simulator, gpu: Gpu = ONE, change=same, least="", statistics=True, **options
    ) -> None:
        self.simulate, self.gpu, self.statistics = simulate, gpu, statistics
        self.problem = change(make_problem(**{**MUTATED, **options}))
        if least:
            self.gpu = simulate.smaller(self.problem, gpu, STREAMED[least])
        self.judge = Judge(self.problem)
        rows = enumerate(entries_of(self.problem))
        self.without = [row for row, entries in rows if not any(entry.exists for entry in entries)]
        self.z = simulate(plain(self.problem), gpu=self.gpu).output if self.without else self.problem.query

    def __call__(self, **options) -> list[Launched]:
        """The launches of the simulation.

        Raises:
            PtxError: the program does what it must not.
            AssertionError: it does not do what it has to.
        """
        simulated = self.simulate(self.problem, self.statistics, self.gpu, **options)
        self.judge.check(simulated.output, "cuda-ptx")
        assert torch.equal(simulated.output[self.without], self.z[self.without])
        if self.statistics:
            self.judge.check_statistics(simulated.statistics, "cuda-ptx")
        check_work(self.simulate, self.problem, simulated)
        return simulated.launches


class Ties:
    def __init__(self, simulate: Simulator) -> None:
        self.simulate = simulate
        self.problem, self.winners = ties(**MUTATED)

    def __call__(self, **options) -> list[Launched]:
        simulated, same = (self.simulate(p, True, ONE, **options) for p in (self.problem, self.winners))
        assert torch.equal(simulated.output, same.output)
        return simulated.launches


class Clamped:
    """An index that points nowhere reads nothing outside of the arrays."""

    def __init__(self, simulate: Simulator) -> None:
        self.simulate = simulate
        self.problem = pointing_nowhere(**MUTATED)
        self.judge = Judge(self.problem)

    def __call__(self, **options) -> list[Launched]:
        simulated = self.simulate(self.problem, True, ONE, **options)
        self.judge.check(simulated.output, "cuda-ptx")
        return simulated.launches


def quiet(problem: Problem) -> Problem:
    """All logits are far below 0."""
    return dataclasses.replace(problem, key_bias=torch.full((1, 1, 1, problem.sizes[3]), -300.0))


def checks(simulate: Simulator) -> Iterator[Check | Ties | Clamped]:
    """The first reveals most; each of the others what no other one does."""
    without_norm = dataclasses.replace(Rule.preset("protore"), norm="none")
    sigmoid = Rule("cosine", "sigmoid", "difference", norm="preserve", width=5.0)
    step = Rule("cosine", "step", "projection", select="max", threshold=0.4)
    check = partial(Check, simulate)
    yield check()
    yield check(batch=2, rows=[[FIRST, SECOND, THIRD], []])
    yield check(heads=2, queries=140)  # two turns of all warps of a block on each of two heads
    yield check(Gpu(4), heads=2, queries=100)  # blocks that begin and end within a head
    yield check(least="one-stage", heads=2, queries=140)
    # Blocks whose warps outnumber their last tiles, which others follow.
    yield check(
        Gpu(4), least="streamed-text", heads=2, queries=70, keys=100, concept_lengths=(8, 3, 41),
        mask="additive",
    )  # fmt: skip
    yield check(least="streamed-text", keys=81)  # the last piece is one token
    yield check(least="streamed-concepts", queries=70, concept_lengths=(8, 3, 41), rule="vsf")
    yield check(
        rule="vsf", batch=2, heads=2, queries=50, concept_lengths=(8, 0, 15), extras=False,
        rows=[[FIRST, THIRD], [1]],
    )  # fmt: skip
    yield check(change=masked, batch=2, rows=[[FIRST, SECOND, THIRD], [1]], keys=15)
    yield check(rule="vsf", change=all_weigh, sharpness=30.0, queries=85, keys=75, rows=[FAR])
    yield check(rule="vsf", change=quiet, rows=[[{"concept": i, "logit_bias": 300.0} for i in range(3)]])
    yield check(change=loud, queries=117, rule=without_norm, rows=[STRONG])
    yield check(change=largest, rows=[[]], keys=79)
    yield check(mask="additive", heads=2)
    yield check(mask="padding", batch=2, rows=[[0], [1]], layout="bnhd")
    # The kernel is unrolled for pairs of tiles of 8: prompts that end in the first and in the second of each.
    yield check(rule=RULES["mass-limit"], queries=17, keys=5, concept_lengths=(1, 2, 15))
    yield check(change=strided, heads=2, keys=20)
    yield check(rule=RULES["mass-preserve"], heads=2, keys=36)
    yield check(rule=RULES["joint-max"], keys=52)
    yield check(rule=RULES["fixed-head"], heads=2, keys=68)
    # Queries that end in the first eight rows of a tile and in the last.
    for queries, heads in ((4, 2), (10, 6)):
        yield check(rule=THREE_SWEEPS, heads=heads, queries=queries)
        yield check(rule=Rule("mass", "ramp", "fixed", scope="feature"), heads=heads, queries=queries)
    yield check(rule=sigmoid, keys=31)
    yield check(rule=step, queries=1, keys=1)
    yield check(rule=step, keys=47, statistics=False)
    yield check(rule=step, keys=63)
    yield check(TWO, rule=sigmoid, queries=37, keys=0)
    yield Ties(simulate)
    yield Clamped(simulate)


def most_steps(launches: list[Launched]) -> int:
    """More than any block takes: instructions of all its warps, which run many of them together."""
    counts = (counts for launch in launches for counts in launch.result.per_cta.values())
    return max((c.instructions.total() for c in counts), default=0)


# ---- mistakes in the compiled kernel ----------------------------------------------------------------

LINES = {file.name: file.read_text().splitlines() for file in CSRC.rglob("*.*h") if file.name != "ptx.cuh"}
SYNCHRONISATION = ("barrier dropped", "wait dropped", "wait for one group less", "commit dropped",
                   "copy dropped")  # fmt: skip
# By kind and line of the source, why a mutation changes nothing that is promised.
HARMLESS: dict[tuple[str, str], str] = {
    (
        "constant of a bound off by one",
        "setp.eq.s32 0",
    ): "lane % 4: all four lanes have the sum that one of them writes",
    (
        "constant of a bound off by one",
        "setp.eq.s64 0",
    ): "whether there are weights: those that are missing are 1",
    (
        "commit dropped",
        "ptx::commit();",
    ): "of the first queries: that of the text is for both",
    (
        "selection swapped",
        "return y < kTiny ? 0.f : better == better ? better : q;  // of infinite operands q is right",
    ): "q is right but for its last bits",
}


def without_effect(program: Program) -> set[tuple[str, int]]:
    """Kinds and places of mutations that are no mistakes: of shifts that correct divisions of negative
    numbers, of which there are none, and of differences that are squared."""
    uses: dict[Register, list[tuple[int, Instruction]]] = defaultdict(list)
    for place, instruction in enumerate(program.code):
        for operand in {x for x in instruction.operands[1:] if isinstance(x, Register)}:
            uses[operand].append((place, instruction))
    found = set()
    for place, instruction in enumerate(program.code):
        result, *operands = instruction.operands or (None,)
        if instruction.opcode == "shr" and operands[1] in (Immediate(31), Immediate(63)):
            found |= {("shift off by one", n) for n, user in uses[result] if user.opcode == "shr"}
            found.add(("shift off by one", place))
        if instruction.opcode == "sub" and all(i.operands.count(result) == 2 for _, i in uses[result]):
            found.add(("subtraction backwards", place))
    return found


def line_of(instruction: Instruction) -> str:
    """The line that it was compiled from, or that calls a function of ptx.cuh; if none is ours, its name and
    constants."""
    for place in (instruction.source, instruction.caller):
        name, _, number = place.partition(":")
        if name in LINES and int(number):
            return LINES[name][int(number) - 1].strip()
    constants = (str(operand) for operand in instruction.operands if isinstance(operand, Immediate))
    return " ".join((instruction.name, *constants))


@pytest.mark.full
@pytest.mark.parametrize("kernel", range(len(KINDS)), ids=KINDS)
@pytest.mark.parametrize("per_kind", (2, None), ids=("some", "all"))
def test_mutations(per_kind: int | None, kernel: int, simulate: Simulator) -> None:
    """Of mistakes at places that a check comes to, all that matter are found. Those known to be harmless are
    left to `all`."""
    program = simulate.program(FLOAT16, MUTATED["dim"], kernel)
    executed: list[tuple[Check | Ties | Clamped, set[int]]] = []
    steps = 0
    for check in checks(simulate):
        launches = [launch for launch in check() if launch.program is program]
        executed.append((check, set().union(*(launch.result.executed for launch in launches))))
        steps = max(steps, most_steps(launches))
    places = set().union(*(places for _, places in executed))
    assert len(places) > 0.95 * len(program.code)
    equal = without_effect(program)
    every = [*mutations(program, among=places, kinds=SYNCHRONISATION)]
    some = [m for m in mutations(program, per_kind, among=places) if (m.kind, m.place) not in equal]
    if per_kind is not None:
        some = [m for m in some if (m.kind, line_of(program.code[m.place])) not in HARMLESS]
    tried = {mutation.description: mutation for mutation in (*every, *some)}.values()

    def coming(mutation: Mutation) -> Iterator[Callable]:
        """Whoever comes to a branch and does not take it has not executed it."""
        guarded = program.code[mutation.place].guard is not None
        return (of_this(check) for check, places in executed if guarded or mutation.place in places)

    def of_this(check: Callable) -> Callable:
        """The other kernels of the check stay as they are."""
        return lambda change, limit: check(change=lambda p: change(p) if p is program else p, limit=limit)

    def why_harmless(mutation: Mutation, line: str) -> str:
        return HARMLESS.get((mutation.kind, line), "")

    check_fates(program, tried, coming, steps, line_of, why_harmless, 0.1 if per_kind is None else 0.05)


# ---- mistakes in the inline assembly ----------------------------------------------------------------

INSTRUCTIONS = (CSRC / "cuda" / "ptx.cuh").read_text()
LDMATRIX = "ldmatrix.sync.aligned.m8n8"


def changed_strings(dtype: torch.dtype, all_swaps: bool) -> Iterator[tuple[str, str]]:
    """What is in ptx.cuh, and what could stand there by mistake. Of registers in braces two neighbours are
    swapped, those in the middle or all in turn."""

    def swapped(start: str, *operands: Sequence[int]) -> Iterator[tuple[str, str]]:
        for place, registers in enumerate(operands):
            middle = len(registers) // 2 - 1
            for i in range(len(registers) - 1):
                if all_swaps or i == middle:
                    now = [*registers[:i], registers[i + 1], registers[i], *registers[i + 2 :]]
                    changed = [*operands[:place], now, *operands[place + 1 :]]
                    yield listed(start, *operands), listed(start, *changed)

    kind, other = ("f16", "bf16") if dtype == FLOAT16 else ("bf16", "f16")
    yield f"cvt.rn.{kind}x2.f32 %0, %1, %2", f"cvt.rn.{kind}x2.f32 %0, %2, %1"
    for shape, a, b in (("m16n8k16", (4, 5, 6, 7), (8, 9)), ("m16n8k8", (4, 5), (6,))):
        start = f"{shape}.row.col.f32.{kind}.{kind}.f32 "
        yield start, start.replace(kind, other)
        yield from swapped(start, range(4), a, b)
    if dtype == BFLOAT16:
        return  # what follows has no type
    yield "{%10, %11, %12, %13};", "{%10, %12, %11, %13};"  # sums to add to
    for count in (2, 4):
        plain, transposed = (f"{LDMATRIX}.x{count}.{word}shared.b16 " for word in ("", "trans."))
        yield plain, transposed
        yield transposed, plain
        yield from swapped(plain, range(count))
        yield from swapped(transposed, range(count))
    yield "present ? 16 : 0", "16"
    yield "present ? 16 : 0", "present ? 0 : 16"
    yield "present ? 16 : 0", "present ? 16 : 8"
    yield "cp.async.commit_group;", ""
    yield "cp.async.wait_group %0;", "// %0"
    yield '"n"(N)', '"n"(N + 1)'
    for function in ("ex2", "rcp", "sqrt"):
        yield re.search(rf"\b{function}\.[\w.]+\.f32", INSTRUCTIONS)[0], "mov.f32"


def listed(start: str, *operands: Sequence[int]) -> str:
    return start + ", ".join("{" + ", ".join(f"%{i}" for i in registers) + "}" for registers in operands)


@pytest.mark.full
@pytest.mark.parametrize("all_swaps", (False, True), ids=("some", "all"))
@pytest.mark.parametrize("dtype", TYPES, ids=TYPES.values())
def test_mutations_of_instructions(dtype: torch.dtype, all_swaps: bool, simulate: Simulator) -> None:
    """Mistakes in ptx.cuh, which those who execute the kernel with another ptx.cuh do not see."""
    dim = 40  # uses every instruction
    check = Check(simulate, dtype=dtype, dim=dim)
    steps = most_steps(check())
    survivors = []
    for before, after in changed_strings(dtype, all_swaps):
        assert before in INSTRUCTIONS
        changed = INSTRUCTIONS.replace(before, after)
        program = simulate.compile(dtype, dim, KINDS.index("many"), changed)
        found = fate([check], lambda _, program=program: program, steps)
        print(f"{found:10} {before} -> {after}")
        survivors += [after] * (found == "nothing")
    assert not survivors
