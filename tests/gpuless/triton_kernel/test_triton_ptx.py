# SPDX-License-Identifier: Apache-2.0
"""The fused kernel as compiled for sm_80, executed: results, what each program reads, writes and multiplies,
and mutations of the kernel, which these checks find: `-m full -k some` tries some, in minutes, `-m full`
all, in hours."""

from __future__ import annotations

import dataclasses
import itertools
import linecache
import os
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from support import RULES, Judge, make_problem, plain
from torch import Tensor

from fastnegate.operator.backends import triton as backend
from fastnegate.operator.problem import Problem, Statistics
from fastnegate.operator.rule import Rule
from fastnegate.testing.problems import with_partials

triton = pytest.importorskip("triton")
from executed import (  # noqa: E402
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
    kept_keys,
    largest,
    loud,
    masked,
    only,
    pointing_nowhere,
    ties,
)
from fastnegate.triton_kernels import attention, rows, rule, segment, tiles  # noqa: E402
from fastnegate.triton_kernels.tiles import split  # noqa: E402
from ptxsim.device import A100, Launched, SimulatedDevice  # noqa: E402
from ptxsim.mutations import Mutation, mutations  # noqa: E402
from ptxsim.parse import Instruction  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread", "cache"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler"
    ),
]

FLOAT32 = torch.float32
CASES = {
    "protore": {**SMALL, "batch": 4, "queries": 65, "keys": 77},
    "nag": {**SMALL, "rule": "nag", "heads": 2, "queries": 33, "keys": 77, "dim": 64, "dtype": BFLOAT16,
            "layout": "bnhd"},
    "vsf": {**SMALL, "rule": "vsf", "heads": 2, "queries": 33, "keys": 77, "dim": 160, "dtype": BFLOAT16},
    "zero-tokens": {**SMALL, "heads": 2, "keys": 77, "dim": 64, "rows": "zero_tokens"},
    "three-sweeps": {**SMALL, "rule": THREE_SWEEPS, "heads": 2},
    "fixed": {**SMALL, "rule": RULES["fixed-head"], "heads": 2},
    "streamed-prompt": {**SMALL, "batch": 1, "keys": 150, "dim": 64},
    "streamed-concept": {**SMALL, "keys": 77, "dim": 64, "concept_lengths": (77, 3, 20), "dtype": BFLOAT16},
    "eight-keys-first": {**SMALL, "keys": 99, "mask": "additive"},
    "half-tiles": {**SMALL, "keys": 77, "dim": 80},
    "float32": {**SMALL, "dtype": FLOAT32},
    "masked-keys": {**SMALL, "batch": 3, "keys": 77, "mask": "padding", "dtype": BFLOAT16},
    "odd-strides": {**SMALL, "layout": "odd"},
    "four-warps": {**SMALL, "batch": 1, "dim": 176},
}  # fmt: skip
WITHOUT_STATISTICS = ("streamed-concept", "masked-keys", "odd-strides")
# Of the other tensors, which are numbers of entries and tokens, every thread reads what it wants to know.
TENSORS = ("query", "key", "value", "concept_key", "concept_value")
INSTRUCTIONS = {FLOAT16: "m16n8k16.f16.f32", BFLOAT16: "m16n8k16.bf16.f32"}
COLUMNS, DEPTH = 8, 16  # of a matrix instruction


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Triton's, for this run alone: the tests below find what one of them compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


class Simulated(NamedTuple):
    output: Tensor
    statistics: Statistics | None
    launches: list[Launched]


def simulate(problem: Problem, statistics: bool = False, multiprocessors: int = 108, **options) -> Simulated:
    written = {"out", "moments", "norms"}
    with SimulatedDevice(
        outputs=written | {"trace_entries", "trace_rows"}, undefined=written,
        gpu=A100._replace(multiprocessors=multiprocessors), **options,
    ) as device:  # fmt: skip
        if not statistics:
            return Simulated(backend.run(problem), None, device.launches)
        output, tables = backend.run_with_statistics(problem)
        return Simulated(output, tables.named, device.launches)


# ---- what a program has to do -----------------------------------------------------------------------


class Work(NamedTuple):
    read: Counter[str]  # bytes of TENSORS
    written: Counter[str]  # bytes
    mma: int  # m16n8k16
    exponentials: int  # of threads


class Expected:
    """What programs of a launch have to do, from sizes alone."""

    def __init__(self, problem: Problem, launch: Launched) -> None:
        constants = launch.constants
        self.problem, self.rule, self.constants = problem, problem.rule, constants
        self.programs, self.threads, self.rows = launch.grid[0], launch.threads, constants["ROWS"]
        self.size = problem.query.element_size()
        self.goal = constants["GOAL"]
        self.statistics = "trace_rows" not in constants  # a tensor that is missing is a constant
        self.prompts = kept_keys(problem)
        self.entries = [[entry for entry in row if entry.exists] for row in entries_of(problem)]
        if "concept_key" in constants:
            self.entries = [[]] * problem.sizes[0]
        # 8 warps have 16 rows each; 16 rows are shared by all warps, each of which has some columns. Scores
        # of float32, without matrix instructions, are spread over all threads.
        self.beside = self.threads // 32 if self.rows == 16 and self.size == 2 else 1

    def shares(self, program: int) -> Iterator[tuple[int, int, int, int]]:
        """Of each head that the program meets: row, head, first and last tile."""
        batch, heads, queries, _, _ = self.problem.sizes
        tiles = -(-queries // self.rows)
        begin, end = (batch * heads * tiles * x // self.programs for x in (program, program + 1))
        for head in range(begin // tiles, -(-end // tiles)):
            yield *divmod(head, heads), max(begin - head * tiles, 0), min(end - head * tiles, tiles)

    def work(self, program: int) -> Work:
        read, written, mma, exponentials = Counter(), Counter(), 0, 0
        c, (_, _, queries, _, dim) = self.constants, self.problem.sizes
        for row, head, first, last in self.shares(program):
            tiles, lines = last - first, min(last * self.rows, queries) - first * self.rows
            prompt, entries = self.prompts[row, head], self.entries[row]
            read["query"] += lines * dim * self.size
            keys, values = self.loaded(prompt, c["KEYS"])
            times = 1 if c["KEPT"] else tiles
            read.update(key=times * keys, value=times * values)
            softmax = [self.attended(len(prompt), c["KEYS"], not c["KEPT"])]
            for entry in entries:
                keys, values = self.loaded(entry.kept, c["TOKENS"])
                times = 1 if entry.place < c["HELD"] else tiles
                read.update(concept_key=times * keys, concept_value=times * values)
                softmax.append(self.attended(len(entry.kept), c["TOKENS"], c["STREAMED"]))
            numbers = self.numbers_of_entry() * len(entries)
            if entries and self.goal != "moments" and self.rule.combine == "joint":
                numbers += 2  # both levels
            mma += tiles * sum(products for products, _ in softmax)
            exponentials += tiles * (sum(weights for _, weights in softmax) + numbers * self.vector)
            self.count_written(written, lines, len(entries))
        return Work(read, written, mma if self.size == 2 else 0, exponentials)

    @property
    def vector(self) -> int:
        """A number per row is computed by every thread for its two rows, g and g + 8 of an mma."""
        return 2 * self.threads

    def loaded(self, kept: Tensor, tile: int) -> tuple[int, int]:
        """Bytes of keys and values of the tokens that are not masked. A piece with fewer elements than there
        are threads is cheap to the compiler, which lets several read each: 8 channels of 16 values two
        threads, 16 channels of 8 keys every warp, in the layout of its product."""

        def bytes_of(depth: int, width: int, all_warps: bool) -> int:
            total = 0
            for first in range(0, len(kept), tile):
                for token, tokens in pieces(tile):
                    present = int(kept[first : first + tile][token : token + tokens].sum())
                    for channel, channels in pieces(width):
                        copies = max(self.threads // (max(tokens, depth) * channels), 1)
                        copies = self.threads // 32 if copies > 1 and all_warps else copies
                        inside = max(min(self.problem.sizes[4] - channel, channels), 0)
                        total += present * inside * self.size * copies
            return total

        keys = bytes_of(COLUMNS, self.constants["CHANNELS"], True)
        return keys, bytes_of(DEPTH, self.constants["FEATURES"], False)

    def attended(self, count: int, tile: int, streamed: bool) -> tuple[int, int]:
        """Products and exponentials of a tile of queries and `count` tokens. A warp computes the scores of 8
        tokens at least: those of 16 tokens are computed twice where four warps share rows."""
        times = -(-count // tile) if streamed else 1
        columns = sum(max(tokens // COLUMNS, self.beside) for _, tokens in pieces(tile))
        scores = columns * self.constants["CHANNELS"] // DEPTH
        depth = sum(max(tokens // DEPTH, 1) for _, tokens in pieces(tile))
        sums = depth * self.constants["FEATURES"] // COLUMNS
        weights = self.rows * columns * COLUMNS + self.vector * streamed
        return times * self.rows // 16 * (scores + sums), times * weights

    def numbers_of_entry(self) -> int:
        """Exponentials of a query besides its softmax."""
        sums_are_here = self.goal == "moments" or "moments" in self.constants
        share = (self.goal == "output" and self.statistics) or (
            self.rule.similarity == "mass" and sums_are_here
        )
        if self.goal == "moments":
            return 2 * share
        levels = self.rule.select == "all"  # of what was removed before, and of what is now
        return 2 * share + 2 * levels + (self.rule.gate == "sigmoid")

    def count_written(self, written: Counter[str], lines: int, entries: int) -> None:
        if self.goal == "moments":
            products = self.rule.similarity == "cosine" or self.rule.direction in ("orthogonal", "projection")
            numbers = 3 * products + ("direction" not in self.constants) + (self.rule.similarity == "mass")
            written["moments"] += numbers * 4 * lines * entries
        elif self.goal == "norms":
            written["norms"] += 2 * 4 * lines * (entries > 0)
        else:
            written["out"] += lines * self.problem.sizes[4] * self.size
            if self.statistics:
                gates = entries if self.rule.select == "all" else (entries > 0)
                written["trace_entries"] += 4 * lines * (2 * entries + gates)
                written["trace_rows"] += 4 * 4 * lines


def pieces(size: int) -> Iterator[tuple[int, int]]:
    """Where each begins, and its size."""
    begin = 0
    for piece in split(size):
        yield begin, piece
        begin += piece


def check_work(problem: Problem, simulated: Simulated) -> None:
    """Each program does what it has to, and no byte more."""
    moved = 0
    for launch in simulated.launches:
        expected = Expected(problem, launch)
        for (program, _, _), counts in launch.result.per_cta.items():
            done = Work(
                read=Counter({x: counts.read[x].bytes for x in TENSORS if x in counts.read}),
                written=Counter({x: traffic.bytes for x, traffic in counts.written.items()}),
                mma=counts.mma[INSTRUCTIONS.get(problem.query.dtype)],
                exponentials=counts.exponentials,
            )
            assert done == expected.work(program), f"program {program}"
            assert counts.mma.total() == done.mma
        total = launch.result.total
        moved += total.read["query"].bytes
        moved += total.written["out"].bytes if "out" in total.written else 0
    # Queries once per sweep and outputs once, of what no kernel can avoid.
    size = problem.query.numel() * problem.query.element_size()
    assert moved / (2 * size) == (len(simulated.launches) + 1) / 2


# ---- results ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_results_and_work(name: str) -> None:
    problem = make_problem(**CASES[name])
    simulated = simulate(problem, name not in WITHOUT_STATISTICS)
    judge = Judge(problem)
    judge.check(simulated.output, "ptx")
    if simulated.statistics is not None:
        judge.check_statistics(simulated.statistics, "ptx")
    check_work(problem, simulated)


@pytest.mark.parametrize("name", ("protore", "nag", "vsf"))
def test_row_without_entries_is_plain_attention(name: str) -> None:
    """As compiled without concepts, which is another kernel."""
    problem = make_problem(**CASES[name])
    output, z = simulate(problem, True).output, simulate(plain(problem)).output
    assert torch.equal(output[1], z[1]) and not torch.equal(output[0], z[0])


@pytest.mark.parametrize("name", ("protore", "nag", "vsf"))
def test_row_does_not_depend_on_other_rows(name: str) -> None:
    problem = make_problem(**CASES[name], rows=[[0, 2], [1], [], []][: CASES[name]["batch"]])
    output = simulate(problem, True).output
    for row in (0, 1):
        assert torch.equal(simulate(only(problem, row), True).output[0], output[row])


@pytest.mark.parametrize("options", (
    {**CASES["zero-tokens"], "batch": 1, "queries": 300},  # 3 tiles of a head
    {**CASES["vsf"], "batch": 1, "heads": 1, "queries": 150},  # 10 tiles
    {**CASES["streamed-prompt"], "queries": 300},
), ids=("kept", "narrow", "streamed"))  # fmt: skip
def test_tiles_of_a_program(options: dict) -> None:
    """A row's bits do not depend on how many tiles its program makes; that reads K and V once for all."""
    problem = make_problem(**options)
    many = simulate(problem, True, multiprocessors=108)
    for multiprocessors in (1, 2):
        few = simulate(problem, True, multiprocessors=multiprocessors)
        assert few.launches[0].grid < many.launches[0].grid
        assert torch.equal(few.output, many.output)
        assert all(map(torch.equal, few.statistics, many.statistics))
        check_work(problem, few)
    check_work(problem, many)


# ---- partials ---------------------------------------------------------------------------------------

PARTIALS = {
    "shared, inside": ("shared", {**SMALL, "rule": "nag", "heads": 2, "dim": 64, "dtype": BFLOAT16}),
    "shared, outside": ("shared", {**SMALL, "keys": 77}),
    "both, joint": ("both", {**SMALL, "rule": "vsf", "layout": "bnhd"}),
    "combine, feature": ("combine", {**SMALL, "rule": "nag", "heads": 5, "dim": 72, "layout": "bnhd"}),
    "combine, head": ("combine", {**SMALL, "dim": 128, "dtype": BFLOAT16}),
    "combine, float32": ("combine", {**SMALL, "rule": "ong", "heads": 3, "dtype": FLOAT32}),
}


@pytest.mark.parametrize("name", PARTIALS)
def test_partials(name: str) -> None:
    which, options = PARTIALS[name]
    judge = Judge(with_partials(make_problem(**options), which))
    simulated = simulate(judge.problem, True)
    judge.check(simulated.output, f"ptx {which}")
    judge.check_statistics(simulated.statistics, f"ptx {which}")
    for launch in simulated.launches:
        check_rows(judge.problem, launch)


def check_rows(problem: Problem, launch: Launched) -> None:
    """Every row of a partial that has keys is read once; of shared keys beside attention, once for each
    segment that holds them."""
    dim, size = problem.sizes[4], problem.query.element_size()
    goal, total = launch.constants["GOAL"], launch.result.total
    negating = torch.tensor([sum(entry.exists for entry in row) for row in entries_of(problem)])
    expected = {}
    if problem.prompt is not None:
        expected["prompt_out"] = problem.prompt, 1
    if problem.shared is not None:
        times = 1 + negating if problem.slots is None and problem.rule.shared == "inside" else 1
        expected["shared_out"] = problem.shared, times
    if problem.slots is not None:
        concepts = problem.concepts
        rows = concepts.index[-len(negating) - 1 :].tolist()
        for i, slot in enumerate(problem.slots):
            listed = [(concepts.index[a:b] == i).sum() for a, b in itertools.pairwise(rows)]
            expected[f"slot_outs.{i}"] = slot, torch.stack(listed)
    for name, (partial, times) in expected.items():
        count = ((partial.lse != -torch.inf).sum((1, 2)) * times).sum()
        assert (total.read[name].bytes if name in total.read else 0) == count * dim * size, name
    if goal == "output":
        assert total.written["out"].bytes == problem.query.numel() * size
    if problem.slots is not None:
        assert not {"query", "key", "value", "moments", "norms"} & {*total.read, *total.written}


# ---- mutations --------------------------------------------------------------------------------------

# All problems of one compiled kernel: prompts of 73 to 80 keys, concepts of 9 to 16 tokens, any rule.
MUTATED: dict = {**SMALL, "batch": 1, "keys": 77, "dim": 64}
tiles_of = tiles.tiles


def tiles_of_mutated(work: tiles.Work, *device: int) -> tiles.Tiles:
    """For any text: a measured table may have tiles that are larger than the text, too."""
    return tiles_of(work._replace(keys=MUTATED["keys"], longest=12), *device)


STEPS = 50_000  # of a program: three times what any of them takes


class Check:
    """A problem and what is promised of its result."""

    def __init__(self, multiprocessors: int = 108, change=lambda problem: problem, **options) -> None:
        self.problem = change(make_problem(**{**MUTATED, "rows": [[FIRST, SECOND, THIRD]], **options}))
        self.multiprocessors = multiprocessors
        self.judge = Judge(self.problem)
        rows = enumerate(entries_of(self.problem))
        self.without = [row for row, entries in rows if not any(entry.exists for entry in entries)]
        self.z = simulate(plain(self.problem)).output if self.without else self.problem.query

    def __call__(self, **options) -> Simulated:
        """The simulation.

        Raises:
            PtxError: the program does what it must not.
            AssertionError: it does not do what it has to.
        """
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiles, "tiles", tiles_of_mutated)
            simulated = simulate(self.problem, True, self.multiprocessors, **options)
        self.judge.check(simulated.output, "ptx")
        assert torch.equal(simulated.output[self.without], self.z[self.without])
        self.judge.check_statistics(simulated.statistics, "ptx")
        check_work(self.problem, simulated)
        return simulated


class Ties:
    def __init__(self) -> None:
        self.problem, self.winners = ties(**MUTATED)

    def __call__(self, **options) -> Simulated:
        simulated, same = (simulate(problem, True, **options) for problem in (self.problem, self.winners))
        assert torch.equal(simulated.output, same.output)
        return simulated


class Lengths:
    """As short a prompt as there is: each of the first keys is the last one once."""

    def __init__(self) -> None:
        options = {**MUTATED, "queries": 1, "rows": [[]]}
        self.problems = [make_problem(**{**options, "keys": keys}) for keys in range(1, 65)]
        self.outputs = [self.run(problem).output for problem in self.problems]

    def run(self, problem: Problem, **options) -> Simulated:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiles, "tiles", tiles_of_mutated)
            return simulate(problem, True, **options)

    def __call__(self, **options) -> Simulated:
        for problem, output in zip(self.problems, self.outputs):
            simulated = self.run(problem, **options)
            assert torch.equal(simulated.output, output)
        return simulated


class Clamped:
    """An index that points nowhere reads nothing outside of the arrays."""

    def __init__(self) -> None:
        self.problem = pointing_nowhere(**MUTATED)
        self.judge = Judge(self.problem)

    def __call__(self, **options) -> Simulated:
        simulated = simulate(self.problem, True, **options)
        self.judge.check(simulated.output, "ptx")
        return simulated


def checks() -> Iterator[Check | Ties | Clamped | Lengths]:
    """The first reveals most; each of the others what no other one does."""
    without_norm = dataclasses.replace(Rule.preset("protore"), norm="none")
    yield Check(batch=2, rows=[[FIRST, SECOND, THIRD], []])
    yield Check(1, heads=2, queries=140)  # four tiles of two heads by one program
    yield Check(4, heads=2, queries=300)  # programs that begin and end within a head
    yield Check(
        rule="vsf", batch=2, heads=2, queries=50, concept_lengths=(8, 0, 12), rows=[[FIRST, THIRD], [1]]
    )
    yield Check(change=masked, batch=2, rows=[[FIRST, SECOND, THIRD], [1]])
    yield Check(change=all_weigh, sharpness=30.0, queries=85, keys=75, rows=[FAR])
    yield Check(rule="vsf", sharpness=30.0, rows=[FAR])
    yield Check(change=loud, queries=117, rule=without_norm, rows=[STRONG])
    yield Check(change=largest, rows=[[]])
    yield Check(rule=RULES["mass-limit"], queries=1, keys=5, concept_lengths=(1, 2, 3))  # little text
    yield Check(rule=RULES["joint-max"])
    yield Check(rule=Rule("cosine", "sigmoid", "difference", norm="preserve", width=5.0))
    yield Check(rule=Rule("cosine", "step", "projection", select="max", threshold=0.4))
    yield Ties()
    yield Clamped()
    yield Lengths()


LENGTHS = (
    "with other lengths of text this kernel is another one: pieces that are always full are compared, too"
)
# Why a mutation of a line changes nothing that is promised; kinds are separated by commas, empty: all.
HARMLESS = {
    "return (x + (div - 1)) // div": ("", "another tile that has no query changes nothing"),
    "moved += tl.sum((o[i] - z[i]) * (o[i] - z[i]), 1)": ("subtraction backwards", "it is squared"),
    "again = again + ((q[i] + 0.0).to(q[i].dtype),)": (
        "sub for add, store dropped", "x - 0 is x + 0, and the same bits are in shared memory already",
    ),
    "": ("bound off by one, bit of an address, selection swapped, condition inverted", LENGTHS),
    "keep, added = unmasked(bias, bias_stride, first, token, token < count, factor)": (
        "bound off by one", LENGTHS,
    ),
    "out = out + (tl.load(at[:, None] + channel[None, :], mask=mask, other=0.0),)": (
        "barrier dropped, guard dropped",
        "nothing was in shared memory before; all of the first 64 keys exist when there are 73",
    ),
    "top = tl.maximum(top, tl.max(s, 1))": ("number changed", "no logit is below half of the lowest float"),
    "to = trace_entries + mix.best.to(tl.int64) * size + at.own + n": (
        "barrier dropped", "another one stands between the accesses",
    ),
    "for tile_number in tl.range(first_tile, last_tile, disable_licm=kept_inside(ROWS)):": (
        "bound off by one", "no program has a head without a tile",
    ),
    "tl.store(to + 2 * plane, limited.to(tl.float32), mask=at.inside)": (
        "offset off by one", "a share of queries may be wrong by one of them",
    ),
}  # fmt: skip


def why_harmless(mutation: Mutation, line: str) -> str:
    kinds, reason = HARMLESS.get(line, ("none", ""))
    return reason if not kinds or mutation.kind in kinds.split(", ") else ""


def line_of(instruction: Instruction) -> str:
    """The text of the kernel, or of Triton's library, that it was compiled from; some are from none."""
    name, _, number = instruction.source.partition(":")
    ours = {f"{module.__name__.rpartition('.')[2]}.py": module for module in (attention, rows, rule, segment)}
    module = {**ours, "standard.py": triton.language.standard}.get(name)
    return linecache.getline(module.__file__, int(number)).strip() if module else ""


@pytest.mark.full
@pytest.mark.parametrize("per_kind", (5, None), ids=("some", "all"))
def test_mutations(per_kind: int | None) -> None:
    """Of mistakes at places that the first problem comes to, all that matter are found."""
    every = list(checks())
    launches = [check().launches[0] for check in every]
    program, executed = launches[0].program, launches[0].result.executed
    assert all(launch.program == program for launch in launches)
    kinds = [*mutations(program, per_kind, among=executed)]
    barriers = [*mutations(program, among=executed, kinds=["barrier dropped"])]
    tried = {mutation.description: mutation for mutation in (*barriers, *kinds)}.values()
    # Of all mutations 9 % leave an equivalent program: they turn around a difference that is squared,
    # or compare whether the 7th of 73 keys exists.
    most = 0.1 if per_kind is None else 0.05
    check_fates(program, tried, lambda _: every, STEPS, line_of, why_harmless, most)
