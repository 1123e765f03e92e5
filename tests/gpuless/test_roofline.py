# SPDX-License-Identifier: Apache-2.0
"""Counted bytes and operations are those of the compiled kernel, to the last one; the model of times and the
report do what they say."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from fastnegate.benchmarks import roofline
from fastnegate.benchmarks.operator.cases import CONCEPTS, LAYERS, METHODS, Case, make
from fastnegate.benchmarks.operator.measure import compulsory_bytes
from fastnegate.benchmarks.roofline import GPUS, Bar, Counts, Gpu, Times, count, heads_met
from fastnegate.triton_kernels import tiles as sizing
from fastnegate.triton_kernels.tiles import Tiles, Work
from support import RULES, make_problem

from fastnegate.operator.backends import triton as backend
from fastnegate.operator.plan import plans
from fastnegate.operator.problem import Problem

A100 = GPUS["A100"]

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- counts against the simulator -------------------------------------------------------------------

compiled_by_triton = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler"
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def simulated(problem: Problem) -> list:
    """What the launches of a call did, by `ptxsim`."""
    from ptxsim.device import SimulatedDevice

    written = {"out", "moments", "norms"}
    with SimulatedDevice(outputs=written, undefined=written) as device:
        backend.run(problem)
    return device.launches


def work_of(problem: Problem) -> Work:
    longest = problem.concepts.longest if problem.concepts is not None else 0
    return Work(*problem.sizes, longest, problem.query.element_size())


def asked_by_threads(work: Work, tile: Tiles, size: int, tokens: int, keys: bool) -> Fraction:
    """Bytes that threads ask for over bytes of keys (or values) of `tokens` tokens, in tiles of `size`.

    Where a piece has fewer elements than there are threads, several load the same: as many as there are for
    each element of values, every warp for keys, in the layout of their product. The memory sees that once,
    and so does `count`.
    """
    threads, least = 32 * tile.warps, 8 if keys else roofline.DEPTH
    asked = needed = 0
    for start in range(0, tokens, size):
        first = 0
        for piece in sizing.split(size):
            here = min(max(tokens - start - first, 0), piece)
            first += piece
            columns = 0
            for width in sizing.split(tile.channels if keys else tile.features):
                inside = min(max(work.dim - columns, 0), width)
                columns += width
                copies = max(threads // (max(piece, least) * width), 1)
                asked += here * inside * (tile.warps if keys and copies > 1 else copies)
                needed += here * inside
    return Fraction(asked, needed) if needed else Fraction(1)


def assert_counted(problem: Problem, programs: int | None = None) -> list[Counts]:
    """Bytes of every tensor, operations and exponentials of every launch."""
    work = work_of(problem)
    tile = sizing.tiles(work, A100.shared_memory, A100.columns, A100.multiprocessors)
    resident = sizing.resident(work, tile, A100.shared_memory)
    number = programs or sizing.programs(work, tile.rows, A100.multiprocessors, resident)
    lengths = Case("", problem.query, problem.key, problem.value, problem.concepts, problem.rule).lengths
    counted = count(work, tile, heads_met(work, tile.rows, number), problem.rule, lengths)
    launches = simulated(problem)
    assert len(launches) == len(counted)
    of_prompt = [asked_by_threads(work, tile, tile.keys, work.keys, keys) for keys in (True, False)]
    of_concepts = [asked_by_threads(work, tile, tile.tokens, work.longest, keys) for keys in (True, False)]
    for expected, launch in zip(counted, launches):
        assert launch.grid == (number, 1, 1)
        total = launch.result.total
        read, written = ({name: t.bytes for name, t in x.items()} for x in (total.read, total.written))
        assert set(total.mma) <= {"m16n8k16.f16.f32", "m16n8k16.bf16.f32"}
        assert (
            Counts(
                query=read.get("query", 0),
                key=read.get("key", 0) / of_prompt[0],
                value=read.get("value", 0) / of_prompt[1],
                concept_key=read.get("concept_key", 0) / of_concepts[0],
                concept_value=read.get("concept_value", 0) / of_concepts[1],
                # Threads beyond one per row load a number again, which the memory sees once.
                sums_read=(read.get("moments", 0) + read.get("norms", 0)) * tile.rows // launch.threads,
                sums_written=written.get("moments", 0) + written.get("norms", 0),
                out=written.get("out", 0),
                multiplies=2 * 16 * 8 * 16 * sum(total.mma.values()),
                exponentials=total.exponentials,
            )
            == expected
        )
    return counted


def problem_of(dim: int = 80, rule: str = "protore", **changes: object) -> Problem:
    usual = {"batch": 2, "heads": 2, "queries": 33, "keys": 77, "layout": "bnhd", "rows": "same"}
    usual |= {"dtype": torch.float16, "concept_lengths": (8, 8), "extras": False}
    return make_problem(**{**usual, **changes}, dim=dim, rule=RULES[rule])


@compiled_by_triton
@pytest.mark.parametrize(
    "case",
    (
        {"rows": "none"},
        {"dim": 40, "queries": 140},
        {"dim": 64, "rows": "mixed", "concept_lengths": (8, 3, 5), "dtype": torch.bfloat16},
        {"dim": 40, "keys": 104},  # pieces of 8, 32 and 64
        {"dim": 72, "keys": 120},
        {"dim": 112, "queries": 20},
        {"dim": 160, "queries": 40},
        {"dim": 160, "queries": 20, "keys": 120, "rule": "eiup"},
        {"rule": "vsf", "keys": 150},
        {"rule": "nasa", "concept_lengths": (40, 24)},
        {"rule": "nag", "heads": 3},
        {"rule": "ong", "keys": 16},
        {"rule": "joint-max", "batch": 1, "queries": 1},
    ),
    ids=lambda case: "-".join(map(str, case.values())).replace("torch.", ""),
)
def test_counts_are_those_of_the_compiled_kernel(case: dict, cache: None) -> None:
    assert_counted(problem_of(**case))


@compiled_by_triton
def test_programs_with_several_tiles(cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of a prompt that fits and of the first entry are read once per program, those of other
    entries per tile."""
    monkeypatch.setattr(sizing, "programs", lambda *_: 3)
    plans.clear()  # what was planned before, for this shape too
    problem = problem_of(64, batch=1, heads=2, queries=3 * 128 + 1)
    (counted,) = assert_counted(problem, programs=3)
    row = 2 * 64
    # Eight tiles, 2 + 3 + 3: the second program sees both heads.
    assert counted.key == 4 * 77 * row and counted.concept_key == (4 + 8) * 8 * row


@compiled_by_triton
def test_masked_and_absent_tokens_are_not_read(cache: None) -> None:
    problem = problem_of(
        64, mask="padding", extras=True, batch=3, rows=[[0], [], [1, 0]], concept_lengths=(5, 2)
    )
    keys = int((problem.key_bias > -torch.inf).sum())
    assert 0 < keys < 3 * 77 and problem.concepts.token_bias.isinf().tolist() == [False, True, *[False] * 5]
    total = simulated(problem)[0].result.total
    row = 2 * 64 * problem.sizes[1]
    assert total.read["key"].bytes == total.read["value"].bytes == keys * row
    assert total.read["concept_key"].bytes == total.read["concept_value"].bytes == (4 + 2 + 4) * row


# ---- counting ---------------------------------------------------------------------------------------


def test_counts_by_hand() -> None:
    """One batch row of two heads, 40 queries in tiles of 16, 10 keys in a tile of 16, loaded four times."""
    work = Work(batch=1, heads=2, queries=40, keys=10, dim=24, longest=5, itemsize=2)
    tile = Tiles(rows=16, keys=16, kept=True, tokens=8, streamed=False, channels=32, features=24, warps=1)
    row = 2 * 24 * 2
    products = 2 * 16 * (32 + 24)  # of a tile of queries with a token
    (plain,) = count(work, tile, [4], METHODS["protore"], [[]])
    assert plain == Counts(
        40 * row, 2 * 10 * row, 2 * 10 * row, 0, 0, 0, 0, 40 * row, 6 * 16 * products, 6 * 16 * 16
    )
    (negated,) = count(work, tile, [4], METHODS["protore"], [[5, 3]])
    assert negated.concept_key == negated.concept_value == 3 * (5 + 3) * row
    # The values of a tile of 8 tokens are summed as 16.
    assert negated.multiplies == plain.multiplies + 6 * 2 * 2 * 16 * (8 * 32 + 16 * 24)
    assert negated.exponentials == plain.exponentials + 6 * 2 * 16 * 8
    (weighed,) = count(work, tile, [4], RULES["mass-limit"], [[5, 3]])
    # Per row and entry, in four lanes: two for the share of mass, two for levels, since all entries count.
    assert weighed.exponentials - negated.exponentials == 6 * 2 * (2 + 2) * 4 * 16
    assert negated.asked == sum(negated[:8]) == plain.asked + 2 * 3 * 8 * row
    (held,) = count(work, tile._replace(held=1), [4], METHODS["protore"], [[5, 3]])
    assert held.concept_key == (2 * 5 + 3 * 3) * row
    streamed = tile._replace(keys=8, kept=False)
    (found,) = count(work, streamed, [4], METHODS["protore"], [[]])
    assert found.key == 3 * 10 * row
    assert found.multiplies == 6 * 2 * 2 * 16 * (8 * 32 + 16 * 24)
    assert found.exponentials == plain.exponentials + 6 * 2 * 4 * 16  # the running top
    norms, output = count(work, tile, [4], METHODS["nag"], [[5, 3]])
    assert (norms.out, norms.sums_written, norms.sums_read) == (0, 2 * 4 * 2 * 40, 0)
    assert (output.out, output.sums_written, output.sums_read) == (40 * row, 0, 2 * 2 * 4 * 2 * 40)


@pytest.mark.parametrize("concepts", CONCEPTS)
def test_compulsory_bytes(concepts: str) -> None:
    case = make(LAYERS["sd15-8"], CONCEPTS[concepts], METHODS["protore"], torch.bfloat16)
    tokens = CONCEPTS[concepts].count * CONCEPTS[concepts].tokens
    work = roofline.work_of(LAYERS["sd15-8"], CONCEPTS[concepts])
    assert roofline.compulsory(work, tokens) == compulsory_bytes(case)


# ---- the model --------------------------------------------------------------------------------------

# Ten multiprocessors; in a second 1000 bytes of DRAM, 4000 of L2, 10^6 operations, 10^4 exponentials.
TOY = Gpu("toy", 10, 1 << 16, 1e3, 4e3, 1e6, 1e4, "")
TILE = Tiles(rows=64, keys=64, kept=True, tokens=16, streamed=False, channels=64, features=64, warps=4)
LAUNCH = Counts(
    query=400, key=100, value=100, concept_key=0, concept_value=0, sums_read=0, sums_written=0, out=400,
    multiplies=500_000, exponentials=1000,
)  # fmt: skip


def test_times_by_hand() -> None:
    def times(found: list[Counts], gpu: Gpu = TOY, busiest: float = 1.0, warm: bool = False) -> Times:
        return roofline._times(found, gpu, TILE, busiest, 900, warm)

    assert times([LAUNCH]) == pytest.approx((0.9, 0.9 + 0.5 + 0.1))
    assert times([LAUNCH], warm=True) == pytest.approx((0.5, 0.5 + 0.5 + 0.1))
    assert times([LAUNCH], busiest=2.0) == pytest.approx((1.0, 0.9 + 1.0 + 0.2))
    assert times([LAUNCH._replace(key=4000)]) == pytest.approx((4900 / 4000, 4900 / 4000 + 0.6))
    assert times([LAUNCH._replace(key=4000)], TOY._replace(cache=None)) == times([LAUNCH])
    # The first of two launches fetches all but the output, the second finds it in the L2 cache.
    first = LAUNCH._replace(out=0, multiplies=0)
    assert times([first, LAUNCH]) == pytest.approx((0.5 + 0.5, 0.6 + 0.4 + 0.6))
    slow = TOY._replace(of_warps=0.5)
    assert times([LAUNCH], slow) == times([LAUNCH])
    narrow = TILE._replace(rows=16, warps=2)
    assert roofline._times([LAUNCH], slow, narrow, 1.0, 900, True).largest == pytest.approx(1.0)


def test_busiest() -> None:
    """Three tiles of each of 8 heads."""
    work = Work(batch=2, heads=4, queries=130, keys=9, dim=64, longest=0, itemsize=2)
    assert roofline._busiest(work, TILE, 24, 24) == 1.0
    assert roofline._busiest(work, TILE, 8, 8) == 1.0
    assert roofline._busiest(work, TILE, 8, 24) == 3.0
    assert roofline._busiest(work, TILE, 24, 20) == pytest.approx(2 * 20 / 24)
    assert roofline._busiest(work, TILE, 12, 20) == pytest.approx(2 * 20 / 24)


def test_heads_met() -> None:
    """Three tiles of each of 8 heads: programs of whole heads, of parts, and of 4, 5, 5, 5 and 5 tiles, which
    meet 2, 2, 2, 3 and 2 heads."""
    work = Work(batch=2, heads=4, queries=130, keys=9, dim=64, longest=0, itemsize=2)
    found = {programs: heads_met(work, 64, programs) for programs in (1, 8, 24, 5)}
    assert found == {1: [4, 4], 8: [4, 4], 24: [12, 12], 5: [5, 6]}


@pytest.mark.parametrize("gpu", GPUS.values(), ids=list(GPUS))
def test_gpus(gpu: Gpu) -> None:
    """Rates are what so many multiprocessors do at the clock of the exponentials, by the makers' tables."""
    operations = {"A100": 2048, "H100": 4096, "B200": 8192, "RTX 4090": 512, "MI300X": 2048}[gpu.name]
    clock = gpu.exponentials / (16 * gpu.multiprocessors)
    assert gpu.multiplies == pytest.approx(gpu.multiprocessors * operations * clock, rel=0.002)
    assert "https://" in gpu.sources and (gpu.cache is None or gpu.cache > 2 * gpu.dram)
    assert ("no source" in gpu.sources) == (gpu.cache is None)


def test_order_of_modelled_times() -> None:
    """Overlap is faster than none, no concepts faster than some, a warm cache no slower than a cold one."""
    for gpu in GPUS.values():
        for layer in LAYERS.values():
            none, small = (
                roofline.model(roofline.work_of(layer, c), c.count, METHODS["protore"], gpu)
                for c in (CONCEPTS["none"], CONCEPTS["4x8"])
            )
            for a, b in ((none.cold, small.cold), (none.warm, small.warm)):
                assert a.largest <= a.sum and b.largest <= b.sum
                assert a.largest <= b.largest and a.sum < b.sum
            assert none.warm.largest <= none.cold.largest
            assert none.once == small.once == 1.0 and none.bytes < small.bytes


# ---- bars and the report ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "ideal", "filled", "verdict"),
    (
        (1.35, 1.0, 0.9, "pass"),
        (1.36, 1.0, 0.9, "FAIL"),
        (1.35, 1.0, 0.89, "FAIL"),
        (1.36, 1.36, 1.0, "impossible"),
        (1.30, 1.36, 0.5, "impossible"),
        (1.35, 1.0, None, "pass"),
        (1.36, 1.0, None, "FAIL"),
    ),
)
def test_verdicts(value: float, ideal: float, filled: float | None, verdict: str) -> None:
    assert Bar("", "", value, 1.35, ideal, filled).verdict == verdict


def test_what_a_filled_gpu_must_read() -> None:
    """SD1.5 at N = 1024 on 132 multiprocessors: 119 programs of 16 heads, each with all 77 keys."""
    layer, none = LAYERS["sd15-32"], CONCEPTS["none"]
    best = roofline.ideal(roofline.work_of(layer, none), 0, METHODS["protore"], GPUS["H100"])
    assert best.programs == 119
    assert best.bytes == pytest.approx((16 * 1024 + 119 * 77) / (16 * 1024 + 16 * 77))
    found = {bar.of: bar for bar in roofline.bars() if bar.promise == "all bytes over must"}
    assert found["H100 sd15-32 none"].ideal == best.bytes > roofline.MOST_BYTES
    assert "124 queries a multiprocessor" in found["H100 sd15-32 none"].why


def test_bars_are_complete() -> None:
    """Queries and outputs by sweeps; bytes of every large layer; times of SD1.5 and SDXL, both ways."""
    promises = list(roofline.bars())
    once = {bar.of.partition(",")[0]: bar for bar in promises if "queries and outputs" in bar.promise}
    assert {method: bar.value for method, bar in once.items()} == {
        method: 1.5 if method == "nag" else 1.0 for method in METHODS
    }
    assert all(bar.verdict == "pass" for bar in once.values())
    assert {bar.of.partition(" ")[2] for bar in promises if bar.verdict == "FAIL"} == {"sd15-1k-32"}
    of = [bar.of for bar in promises]
    large = [layer.name for layer in LAYERS.values() if layer.queries >= 1024]
    for gpu in ("A100", "H100"):
        for name in large:
            assert {f"{gpu} {name} none", f"{gpu} {name} 4x8"} <= {*of}
            assert of.count(f"{gpu} {name}") == (4 if name.startswith(("sd15", "sdxl")) else 0)


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Predictions are called a model, and nothing stands in the column of what was measured."""
    file = tmp_path / "roofline.json"
    layers = ["sd15-64", "wan-480p"]
    assert roofline.main(["--gpus", "A100", "B200", "--layers", *layers, "--json", str(file)]) == 0
    text = capsys.readouterr().out
    assert "Nothing in this report is measured" in text
    assert "## A100 (model)" in text and "## B200 (model)" in text and "## H100" not in text
    rows = [line.split("|") for line in text.splitlines() if line.startswith(("| sd15-64", "| wan-480p"))]
    assert len(rows) == 2 * len(layers) * 3  # none, protore, nag
    heads = [line.split("|") for line in text.splitlines() if line.startswith("| layer")]
    place = [cell.strip() for cell in heads[0]].index("measured us")
    assert all(row[place].strip() == "" and row[place - 1].strip() != "" for row in rows)
    assert all("model" in heads[0][i] for i in (place - 4, place - 2))
    for gpu in ("A100", "B200"):
        assert GPUS[gpu].sources in text
    verdicts = [bar.verdict for bar in roofline.bars()]
    assert f"{verdicts.count('pass')} pass, {verdicts.count('FAIL')} FAIL" in text
    report = json.loads(file.read_text())
    assert len(report["model"]) == len(rows) and len(report["bars"]) == len(verdicts)
    first = report["model"][0]
    assert (first["gpu"], first["layer"], first["concepts"], first["once"]) == ("A100", "sd15-64", "none", 1)
    assert "measured" not in first
