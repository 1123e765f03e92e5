# SPDX-License-Identifier: Apache-2.0
"""Tiles that were measured: which tilings are tried, how one is chosen, what a table may hold, and that the
backend does as it says. On the devices that are not there."""

from __future__ import annotations

import copy
import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "gpuless" / "instruments"))

pytest.importorskip("triton")
import triton
from compiler import GPUS, Compiled
from fastnegate.benchmarks import tune
from fastnegate.benchmarks.operator import cases
from fastnegate.benchmarks.operator.cases import CONCEPTS, DTYPES, LAYERS, METHODS, Layer
from fastnegate.benchmarks.tune import Timing
from fastnegate.triton_kernels import tiles as sizing
from fastnegate.triton_kernels.tiles import Key, Tiles, Tuned, Work, key_of, load_table, split
from ptxsim.device import SimulatedDevice
from support import Judge, make_problem

from fastnegate.operator import reference
from fastnegate.operator.backends import triton as backend
from fastnegate.operator.plan import plans
from fastnegate.operator.problem import Problem

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces Triton"),
]
TINY = Layer("tiny", heads=1, queries=20, dim=16, keys=20, batch=1)
MACHINE = {"gpu": "A100", "capability": "8.0", "triton": triton.__version__}
KEYS = [
    Key(itemsize, dim, keys, longest)
    for (dim, keys), itemsize, longest in product(
        sorted({(layer.dim, sizing.up(layer.keys, 8)) for layer in LAYERS.values()}), (2, 4), (8, 80)
    )
]


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No table, no launch, nothing compiled; torch's GPU is MACHINE."""
    gpu = SimpleNamespace(name="A100", major=8, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTNEGATE_TRITON_TILES", raising=False)
    plans.clear()
    monkeypatch.setitem(cases.LAYERS, "tiny", TINY)
    backend._table.cache_clear()
    yield
    backend._table.cache_clear()


# ---- tilings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", GPUS)
def test_candidates(gpu: str) -> None:
    columns = 8 if gpu.startswith("sm_") else 16
    for key in KEYS:
        found = tune.candidates(key, GPUS[gpu].shared, columns, 108)
        work = Work(2, 8, 4096, key.keys, key.dim, key.longest, key.itemsize)
        default = sizing.tiles(work, GPUS[gpu].shared, columns, 108)
        assert found[0] == Tuned(key, default, sizing.resident(work, default, GPUS[gpu].shared))
        assert len({*found}) == len(found) >= 6
        assert len({tune.named(c) for c in found}) == len(found)
        for _, t, resident in found:
            assert sizing.flaw(Tuned(key, t, resident)) is None
            assert (t.rows, t.warps) in {(16 * warps, warps) for warps in (2, 4, 8)} | {
                *product((16, 32), (2, 4, 8))
            }
            for size in (t.keys, t.tokens, t.channels, t.features):
                assert sum(split(size)) == size and all(p & (p - 1) == 0 for p in split(size))
            assert not t.kept or key.itemsize == 2
            assert t == default or tune.shared_bytes(t, key.itemsize) <= GPUS[gpu].shared


def test_candidates_vary_everything() -> None:
    """On a GPU where everything fits: each choice next to the default's others."""
    found = {c.tiles for c in tune.candidates(Key(2, 64, 80, 80), 227 << 10, 8, 132)}
    default = tune.candidates(Key(2, 64, 80, 80), 227 << 10, 8, 132)[0].tiles
    assert {(t.rows, t.warps) for t in found} == {*tune.SHAPES}
    for rows, warps in tune.SHAPES:
        of = [t for t in found if (t.rows, t.warps) == (rows, warps)]
        of_shape = {(t.keys, t.kept, t.tokens, t.streamed) for t in of}
        texts = {(16, True), (32, True), (64, True), (80, False)}
        prompts = {(80, True), (32, False), (64, False)}
        assert of_shape == {(80, True, *t) for t in texts} | {(*p, 16, True) for p in prompts}
    assert (default.keys, default.kept, default.tokens, default.streamed) == (80, True, 16, True)
    short = [c.tiles for c in tune.candidates(Key(2, 64, 80, 8), 227 << 10, 8, 132)]
    assert {t.held for t in short if t._replace(held=1) == short[0]} == {0, 1, 2}
    few = {c.tiles for c in tune.candidates(Key(2, 160, 512, 8), 99 << 10, 8, 128)}
    assert few and not any(t.kept for t in few), "512 keys do not fit"
    usual, twice, half = (c.resident for c in tune.candidates(Key(2, 160, 80, 8), 227 << 10, 8, 132)[:3])
    assert (twice, half) == (2 * usual, -(-usual // 2)) and usual > 1


def test_estimated_shared_memory_is_enough() -> None:
    """Of what the compiler takes; so what is left out for it are tilings that may not fit."""
    problem = make_problem(1, 1, 20, 77, 64, torch.float16, concept_lengths=(77,), rows="same", extras=False)
    for choice in (
        Tiles(64, 80, True, 80, False, 64, 64, 4), Tiles(16, 32, False, 64, True, 64, 64, 2),
        Tiles(64, 80, True, 80, False, 64, 64, 4, 1),
    ):  # fmt: skip
        with Compiled("sm_80") as device:
            launched(problem, Tuned(key_of_problem(problem), choice, 1))
        used = device.launches[0].kernel.shared
        assert 0.5 * tune.shared_bytes(choice, 2) <= used <= tune.shared_bytes(choice, 2)


def key_of_problem(problem: Problem) -> Key:
    longest = problem.concepts.longest if problem.concepts is not None else 0
    return key_of(Work(*problem.sizes, longest, problem.query.element_size()))


def launched(problem: Problem, choice: Tuned | None = None) -> torch.Tensor:
    return backend.plan(problem, False, choice).run(*problem.operands)[0]


@pytest.mark.parametrize("itemsize", (2, 4))
@pytest.mark.parametrize("columns", (8, 16))
@pytest.mark.parametrize("multiprocessors", (84, 108, 132))
def test_a_key_is_all_that_tiles_depend_on(itemsize: int, columns: int, multiprocessors: int) -> None:
    for dim, keys, longest in product((40, 80, 128, 256), (*range(1, 130), 512), (0, 7, 8, 9, 77, 80, 320)):
        work = Work(3, 5, 77, keys, dim, longest, itemsize)
        key = key_of(work)
        same = Work(1, 1, 1, key.keys, key.dim, key.longest, key.itemsize)
        found, wanted = (sizing.tiles(w, 163 << 10, columns, multiprocessors) for w in (work, same))
        assert found == wanted
        halves = (itemsize, columns, multiprocessors, dim) == (2, 8, 108, 80)
        assert (found.rows == 64) == halves


def test_few_tiles_are_handed_out_one_by_one() -> None:
    """128 tiles of 128 queries, or 256 of 64, on the 108 multiprocessors of an A100."""
    work = Work(2, 8, 1024, 77, 80, 8, 2)
    assert sizing.programs(work, 64, 108, 2) == 256
    assert sizing.programs(work, 128, 108, 1) < 108
    assert sizing.programs(work, 128, 132, 1) == 128
    many = work._replace(queries=4096)
    assert sizing.programs(many, 64, 108, 2) <= 216


def test_warps_that_share_rows() -> None:
    """Have 8 columns each of every piece, and Triton lets them share: the last has more columns than rows."""
    for dim, rows, warps in product(range(8, 257, 8), (16, 32), (2, 4, 8)):
        padded = sizing.shared(dim, rows, warps)
        assert dim <= padded and padded % (8 * warps) == 0
        assert min(split(padded)) >= 8 * warps and split(padded)[-1] > rows
        if padded > 8 * warps:
            smaller = range(sizing.up(dim, 8 * warps), padded, 8 * warps)
            assert all(split(size)[-1] <= rows for size in smaller)
    assert [sizing.shared(dim, 16, 2) for dim in (40, 72, 80, 88, 112, 160)] == [64, 96, 96, 96, 112, 160]


def test_calls_by_key() -> None:
    """Of a key are layers that differ in B, H and N, both 16-bit dtypes, and no concepts with short ones."""
    wanted = Namespace(
        layers=["sd15-16", "sd15-8", "sdxl-64"], dtypes=["float16", "bfloat16", "float32"],
        methods=["protore", "nag"], concepts=["none", "4x8", "1x77"],
    )  # fmt: skip
    found = tune.by_key(wanted)
    assert {*found} == {Key(b, d, 80, n) for b, d, n in product((2, 4), (160, 64), (8, 80))}
    short = [t for t in found[Key(2, 160, 80, 8)]]
    assert {*short} == {
        Timing(layer, dtype, method, concepts)
        for layer in ("sd15-16", "sd15-8")
        for dtype in ("float16", "bfloat16")
        for method, concepts in (("protore", "none"), ("protore", "4x8"), ("nag", "4x8"))
    }
    assert len(short) == 12
    assert {t.concepts for t in found[Key(4, 64, 80, 80)]} == {"1x77"}


# ---- the choice -------------------------------------------------------------------------------


def test_ranked() -> None:
    """By the geometric mean over the calls of the medians of paired ratios."""
    times = {
        "one": {
            "default": [1.0, 2.0, 4.0],
            "a": [0.5, 1.0, 40.0],
            "b": [0.9, 1.8, 3.6],
            "c": [1.0, 2.0, 4.0],
        },
        "two": {"default": [1.0] * 3, "a": [1.8] * 3, "b": [0.8] * 3, "c": [1.0] * 3},
    }
    found = tune.ranked(times)
    assert [*found] == ["b", "a", "default", "c"]
    assert found == pytest.approx({"b": 0.72**0.5, "a": 0.9**0.5, "default": 1.0, "c": 1.0})


class Still:
    """Takes the place of a GPU. Times are those of `seconds`, by tiles and how often those were asked for."""

    device, cache, backends = "cpu", 0, {}

    def __init__(self, seconds: Callable[[Tiles, int], float]) -> None:
        self.seconds = seconds
        self.asked: dict[Tiles, int] = {}

    def facts(self) -> dict[str, Any]:
        return {"gpu": "?", "capability": "?", "triton": "?", "torch": "2", "commit": "abc"}

    def synchronize(self) -> None:
        pass

    def timer(self, calls: list[partial[torch.Tensor]]) -> Callable[[], float]:
        problems = [call.args[0] for call in calls]
        assert len({id(p.query) for p in problems}) == len(problems) == 2, "inputs rotate"
        assert all(call.func is tune.output_of for call in calls)
        tiles = calls[0].args[1].launch.tiles
        self.asked[tiles] = time = self.asked.get(tiles, -1) + 1
        return lambda: self.seconds(tiles, time)


ROWS = {128: Tiles(128, 24, True, 8, False, 16, 16, 8), 64: Tiles(64, 24, True, 8, False, 16, 16, 4)}
ROWS |= {32: Tiles(32, 16, False, 8, False, 16, 16, 2)}
TINY_KEY = Key(2, 16, 24, 8)


def options(out: Path, **changes: Any) -> Namespace:
    chosen = {"layers": ["tiny"], "dtypes": ["float16"], "methods": ["protore"], "concepts": ["none", "4x8"]}
    return Namespace(**{**chosen, "rounds": 3, "minutes": 60.0, "out": out, **changes})


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[Tuned]:
    """Some candidates, and problems that a simulator runs in a second."""
    choices = [Tuned(TINY_KEY, t, 1) for t in ROWS.values()]
    monkeypatch.setattr(tune, "candidates", lambda *_: choices)
    monkeypatch.setattr(tune, "QUERIES", 20)
    return choices


def test_a_table_is_made_and_used(
    few: list[Tuned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command's first step to what the backend then launches."""
    too_large = Tiles(128, 256, True, 8, False, 16, 16, 8)
    no_kernel = Tiles(24, 24, True, 8, False, 16, 16, 8)
    few += [Tuned(TINY_KEY, t, 1) for t in (too_large, no_kernel)]
    seconds = {128: 4e-6, 64: 3e-6, 32: 5e-6}
    gpu = Still(lambda tiles, time: seconds[tiles.rows])
    out = tmp_path / "tiles.json"
    monkeypatch.setattr(triton.compiler.compiler, "max_shared_mem", lambda device: 16 << 10)
    with SimulatedDevice():
        assert tune.run(options(out), gpu) == 0
    assert load_table(out, MACHINE) == {TINY_KEY: Tuned(TINY_KEY, ROWS[64], 1)}
    written = json.loads(out.read_text())
    assert {**MACHINE, "torch": "2", "commit": "abc"}.items() <= written.items()
    (entry,) = written["entries"]
    assert entry["ratio"] == pytest.approx(0.75) and entry["default"] == tune.named(few[0])
    assert {*entry["ratios"]} == {"tiny float16 protore none", "tiny float16 protore 4x8"}
    assert entry["ratios"]["tiny float16 protore none"] == pytest.approx(dict.fromkeys(
        ("median", "low", "high"), 0.75
    ))  # fmt: skip
    assert [*entry["timed"].values()] == pytest.approx([0.75, 1.0, 1.25])
    reasons = entry["dropped"]
    assert len(reasons) == 2 and "shared memory" in reasons[tune.named(few[3])]
    assert reasons[tune.named(few[4])].partition(":")[0].endswith("Error")
    assert "0.750 of the default's time" in capsys.readouterr().out

    monkeypatch.setenv("FASTNEGATE_TRITON_TILES", str(out))
    problem = make_problem(1, 1, 20, 24, 16, torch.float16, concept_lengths=(8,), rows="same")
    with SimulatedDevice():
        Judge(problem).check(backend.run(problem))
        (plan,) = plans
    assert plan.launch.tiles == ROWS[64]


def test_what_was_fastest_by_chance_is_not_chosen(few: list[Tuned], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is timed anew beside the default, on each call."""
    monkeypatch.setattr(tune, "screen", lambda *arguments: {})
    luck = {128: (4.0, 4.0), 64: (1.0, 5.0), 32: (2.0, 2.0)}
    gpu = Still(lambda tiles, time: luck[tiles.rows][time // 2])
    timings = tune.by_key(options(Path()))[TINY_KEY]
    with SimulatedDevice():
        entry = tune.tune(TINY_KEY, timings, gpu, 3, 1e12)
    assert entry["tiles"] == ROWS[128]._asdict() and entry["ratio"] == 1
    assert gpu.asked == {ROWS[128]: 3, ROWS[64]: 3, ROWS[32]: 1}


def test_a_wrong_tiling_is_left_out(
    few: list[Tuned], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here one that forgets some keys of the prompt. The others are timed, the status says it."""
    few.append(Tuned(TINY_KEY, Tiles(64, 16, True, 8, False, 16, 16, 4), 1))
    with SimulatedDevice():
        assert tune.run(options(tmp_path / "tiles.json"), Still(lambda *_: 1.0)) == 1
    (entry,) = json.loads((tmp_path / "tiles.json").read_text())["entries"]
    reason = entry["dropped"][tune.named(few[-1])]
    assert reason.startswith("wrong: AssertionError: ") and "errs by" in reason
    assert {*entry["timed"]} == {tune.named(c) for c in few[:-1]} and reason in capsys.readouterr().out


def test_a_second_call_does_what_is_missing(few: list[Tuned], tmp_path: Path) -> None:
    out, asked = tmp_path / "tiles.json", Still(lambda *_: 1.0)
    with SimulatedDevice():
        assert tune.run(options(out), Still(lambda *_: 1.0)) == 0
        before = out.read_text()
        assert tune.run(options(out), asked) == 0
        assert not asked.asked and out.read_text() == before
        out.write_text(json.dumps({**json.loads(before), "gpu": "H100"}))
        with pytest.raises(ValueError, match="gpu is 'H100'"):
            tune.run(options(out), asked)
    assert "H100" in out.read_text(), "another machine's table is not overwritten"


def test_where_time_ends(few: list[Tuned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default is judged and timed, with the fewest rounds; what is late is left out by that reason; keys
    that are not reached are for another call."""
    monkeypatch.setattr(tune.time, "monotonic", iter(range(0, 10**9, 100)).__next__)
    gpu = Still(lambda *_: 1.0)
    with SimulatedDevice():
        entry = tune.tune(TINY_KEY, tune.by_key(options(Path()))[TINY_KEY], gpu, 50, 100.0)
    assert entry["dropped"] == {tune.named(c): tune.LATE for c in few[1:]}
    assert [*entry["timed"]] == [tune.named(few[0])] and {*gpu.asked} == {ROWS[128]}
    out = tmp_path / "tiles.json"
    assert tune.run(options(out, minutes=1.0), gpu) == 0 and not out.exists()


def test_a_default_that_fails_leaves_other_keys(
    few: list[Tuned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {TINY_KEY: [Timing("tiny", "float16", "protore", "4x8")]}
    other = TINY_KEY._replace(longest=16)
    monkeypatch.setattr(tune, "by_key", lambda options: {other: keys[TINY_KEY], **keys})
    real = tune.tune
    monkeypatch.setattr(tune, "tune", lambda key, *rest: 1 / 0 if key == other else real(key, *rest))
    with SimulatedDevice():
        assert tune.run(options(tmp_path / "tiles.json"), Still(lambda *_: 1.0)) == 1
    assert len(json.loads((tmp_path / "tiles.json").read_text())["entries"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_tilings_that_cannot_be_timed_are_left_out(few: list[Tuned]) -> None:
    def seconds(tiles: Tiles, time: int) -> float:
        return 1.0

    class Refusing(Still):
        def timer(self, calls: list[partial[torch.Tensor]]) -> Callable[[], float]:
            if calls[0].args[1].launch.tiles == ROWS[64]:
                raise RuntimeError("capture failed\nmore")
            return super().timer(calls)

    with SimulatedDevice():
        entry = tune.tune(TINY_KEY, tune.by_key(options(Path()))[TINY_KEY], Refusing(seconds), 3, 1e12)
    assert entry["dropped"] == {tune.named(few[1]): "RuntimeError: capture failed"}
    assert len(entry["timed"]) == 2


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> dict[Tiles, Any]:
    """What each tiling does, instead of kernels: spills so many registers, or raises."""
    does: dict[Tiles, Any] = {}

    def run(self: backend.TritonPlan, *operands: Any) -> tuple[torch.Tensor, None]:
        launch = self.launch
        done = does[launch.tiles]
        if isinstance(done, Exception):
            raise done
        launch.compiled["moments"] = SimpleNamespace(n_spills=0)
        launch.compiled["output"] = SimpleNamespace(n_spills=done)
        return reference.run(Problem(*operands[:5], METHODS["protore"], 0.25)), None

    monkeypatch.setattr(backend.TritonPlan, "run", run)
    return does


def test_screen(few: list[Tuned], fake: dict[Tiles, Any]) -> None:
    judges = [tune.judge(16, 20, "float16", "protore", concepts) for concepts in ("none", "4x8")]
    card = Still(lambda *_: 1.0)
    with SimulatedDevice():
        fake |= {ROWS[128]: 2, ROWS[64]: 2, ROWS[32]: 3}
        assert tune.screen(few, judges, card, 1e12) == {ROWS[32]: "spills 3 registers, the default 2"}
        fake |= {ROWS[64]: RuntimeError("PassManager\nmore"), ROWS[32]: 0}
        assert tune.screen(few, judges, card, 1e12) == {ROWS[64]: "RuntimeError: PassManager"}
        fake[ROWS[128]] = RuntimeError("the default must work")
        with pytest.raises(RuntimeError, match="the default must work"):
            tune.screen(few, judges, card, 1e12)


def test_judged_problems_run_the_kernels_that_are_timed() -> None:
    """The same pointers are None, and the same alignment is known."""
    for method, concepts in (("protore", "none"), ("protore", "4x8"), ("nag", "1x77")):
        judged = tune.judge(16, 20, "float16", method, concepts).problem
        case = cases.make(TINY, CONCEPTS[concepts], METHODS[method], DTYPES["float16"])
        timed = Problem(case.query, case.key, case.value, None, case.tokens, case.rule, 0.25)
        with SimulatedDevice():
            a, b = (backend.launch_of(p) for p in (judged, timed))
        assert (a.constants, a.goals, a.text, a.tiles) == (b.constants, b.goals, b.text, b.tiles)
        assert key_of_problem(judged) == key_of_problem(timed)
        for x, y, read in zip(
            backend.tensors_of(judged.concepts), backend.tensors_of(timed.concepts), a.text
        ):
            assert not read or (x is None) == (y is None)
        assert judged.sizes[2] % 16, "the last tile is not full"


# ---- the command ------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(tune, "run", lambda *arguments: pytest.fail("it ran"))
    assert tune.main(["--out", str(tmp_path / "tiles.json")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "tune: torch finds no GPU on this machine; nothing was run\n"
    assert not (tmp_path / "tiles.json").exists()


@pytest.mark.parametrize(
    "wrong", (["--rounds", "0"], ["--layers", "sd9"], ["--dtypes", "int8"], ["--minutes", "0"])
)
def test_wrong_options(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        tune.main(["--out", "tiles.json", *wrong])
    assert wrong[0] in capsys.readouterr().err


# ---- tables -----------------------------------------------------------------------------------

TABLE = {
    "version": sizing.VERSION,
    **MACHINE,
    "entries": [
        {"key": {"itemsize": 2, "dim": 40, "keys": 80, "longest": 8},
         "tiles": {"rows": 64, "keys": 80, "kept": True, "tokens": 8, "streamed": False, "channels": 48,
                   "features": 40, "warps": 4, "held": 1},
         "resident": 2, "ratio": 0.9},
    ],
}  # fmt: skip


def test_load_table(tmp_path: Path) -> None:
    file = tmp_path / "tiles.json"
    file.write_text(json.dumps(TABLE))
    key = Key(2, 40, 80, 8)
    assert load_table(file, MACHINE) == {key: Tuned(key, Tiles(64, 80, True, 8, False, 48, 40, 4, 1), 2)}
    file.write_text(json.dumps(TABLE | {"entries": []}))
    assert load_table(str(file), MACHINE) == {}
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        load_table(tmp_path / "none.json", MACHINE)


@pytest.mark.parametrize("text, message", (
    ("{", "not JSON"),
    ("\udcff", "not JSON"),
    ("[]", "entries is missing or no list"),
    ("{}", "entries is missing or no list"),
    ('{"entries": {}}', "entries is missing or no list"),
))  # fmt: skip
def test_other_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "tiles.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"tiles\.json: {message}"):
        load_table(file, MACHINE)


MISSING = object()
REFUSED = {
    "version": (0, "0", MISSING),
    "gpu": ("H100", MISSING),
    "capability": ("9.0", 8.0),
    "triton": ("1.0",),
    "entries[0]": (7, []),
    "entries[0].key": (MISSING, 7),
    "entries[0].key.itemsize": (8, "2", MISSING),
    "entries[0].key.dim": (44, 8),
    "entries[0].key.keys": (77, 0),  # no problem's key: it would never be found
    "entries[0].key.longest": (9, 0),
    "entries[0].tiles": (MISSING, [64, 80]),
    "entries[0].tiles.rows": (24, 8, 64.0, True, None, MISSING),
    "entries[0].tiles.keys": (72, 84, "80"),  # kept: all 80 must be there
    "entries[0].tiles.kept": (1, MISSING),
    "entries[0].tiles.tokens": (0, 4),
    "entries[0].tiles.streamed": (0,),
    "entries[0].tiles.channels": (40, 32),
    "entries[0].tiles.features": (32, 44),
    "entries[0].tiles.warps": (3, 0),
    "entries[0].tiles.held": (-1, 5, True, MISSING),
    "entries[0].resident": (0, True, 1.5, MISSING),
}


@pytest.mark.parametrize("field, value", [(f, v) for f, values in REFUSED.items() for v in values])
def test_refused(field: str, value: Any, tmp_path: Path) -> None:
    """Each message names the file and the field."""
    table: Any = copy.deepcopy(TABLE)
    *way, last = field.replace("[0]", ".0").split(".")
    inner = table
    for name in way:
        inner = inner[int(name) if name.isdigit() else name]
    last = int(last) if last.isdigit() else last
    if value is MISSING:
        del inner[last]
    else:
        inner[last] = value
    file = tmp_path / "tiles.json"
    file.write_text(json.dumps(table))
    with pytest.raises(ValueError) as error:
        load_table(file, MACHINE)
    assert str(error.value).startswith((f"{file}: {field} is ", f"{file}: {field} there"))


def test_tiles_of_less_than_a_text_must_be_streamed(tmp_path: Path) -> None:
    table: Any = copy.deepcopy(TABLE)
    file = tmp_path / "tiles.json"
    (entry,) = table["entries"]
    entry["key"]["longest"] = 80
    file.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=r"entries\[0\]\.tiles\.tokens is impossible"):
        load_table(file, MACHINE)
    entry["tiles"] |= {"streamed": True, "held": 0, "kept": False, "keys": 32}
    file.write_text(json.dumps(table))
    assert len(load_table(file, MACHINE)) == 1


def test_a_key_may_be_there_once(tmp_path: Path) -> None:
    file = tmp_path / "tiles.json"
    file.write_text(json.dumps(TABLE | {"entries": TABLE["entries"] * 2}))
    with pytest.raises(ValueError, match=r"tiles\.json: entries\[1\]\.key is there twice"):
        load_table(file, MACHINE)


# ---- the backend ------------------------------------------------------------------------------


def small(**changes: Any) -> Problem:
    return make_problem(
        **{"batch": 1, "heads": 2, "queries": 50, "keys": 77, "dim": 40, "dtype": torch.float16,
           "concept_lengths": (8, 3), "rows": "same", **changes}
    )  # fmt: skip


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "tiles.json"
    file.write_text(json.dumps(TABLE))
    monkeypatch.setenv("FASTNEGATE_TRITON_TILES", str(file))
    return file


def test_a_table_changes_what_is_compiled(table: Path) -> None:
    with Compiled("sm_80") as device:
        backend.run(small())
        backend.run(small(keys=96))  # not in the table
    of_table, other = device.launches
    assert (of_table.constants["ROWS"], of_table.kernel.warps) == (64, 4)
    assert (other.constants["ROWS"], other.kernel.warps) == (128, 8)


def described(problem: Problem) -> str:
    return backend.plan(problem, False).describe()


def test_tables_are_used_only_when_named(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", None):
        monkeypatch.setenv("FASTNEGATE_TRITON_TILES", value or "")
        if value is None:
            monkeypatch.delenv("FASTNEGATE_TRITON_TILES")
        backend._table.cache_clear()
        with SimulatedDevice():
            assert backend.launch_of(small()).tiles.rows == 128
            assert "table" not in described(small())


def test_it_is_said_where_tiles_come_from(table: Path) -> None:
    with SimulatedDevice():
        assert described(small()).endswith(f", from the table {table}")
        assert "table" not in described(small(keys=96))


def test_results_with_a_table(table: Path) -> None:
    """Within the budget; the number of programs changes no bit."""
    problem = small()
    with SimulatedDevice() as device:
        output = backend.run(problem)
        (entry,) = load_table(table, MACHINE).values()
        again = launched(problem, entry._replace(resident=1))
    assert [launch.threads for launch in device.launches] == [128, 128]
    Judge(problem).check(output)
    assert torch.equal(output, again)


def test_resident_programs_are_launched(table: Path) -> None:
    (entry,) = load_table(table, MACHINE).values()
    many = small(heads=8, queries=4096)
    with SimulatedDevice():
        one, two = (backend.launch_of(many, entry._replace(resident=n)) for n in (1, 2))
        assert backend.launch_of(many).grid == two.grid
    assert torch.tensor(two.grid).prod() > torch.tensor(one.grid).prod()


def test_a_table_is_read_once(table: Path) -> None:
    with SimulatedDevice():
        assert backend.launch_of(small()).tiles.rows == 64
        table.unlink()
        assert backend.launch_of(small(queries=51)).tiles.rows == 64


def test_a_refused_table_stops_every_call(table: Path) -> None:
    table.write_text(json.dumps(TABLE | {"gpu": "H100"}))
    with SimulatedDevice():
        for _ in range(2):
            with pytest.raises(ValueError, match=r"tiles\.json: gpu is 'H100', here it is 'A100'"):
                backend.run(small())


def test_a_table_is_for_no_interpreter(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_interpreted", lambda: True)
    with pytest.raises(ValueError, match='here it is "Triton\'s interpreter"'):
        backend.launch_of(small())
