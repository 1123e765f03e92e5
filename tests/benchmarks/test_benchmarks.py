# SPDX-License-Identifier: Apache-2.0
"""The benchmarks measure what they say: baselines, counted operations, gates, intervals, commands."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastnegate.benchmarks.operator import __main__ as bench
from fastnegate.benchmarks.operator import callgrind, cases, embedded, machine, measure, test_operator
from fastnegate.benchmarks.operator.baselines import baselines
from fastnegate.benchmarks.operator.cases import CONCEPTS, METHODS, Case, Concepts, Layer, make
from fastnegate.benchmarks.operator.measure import largest_gates, open_share, skipped_blocks
from fastnegate.benchmarks.pipeline import __main__ as pipeline
from fastnegate.benchmarks.pipeline import models
from torch import Tensor

from fastnegate import ConceptTokens, negated_attention
from fastnegate.operator.backends import cpu

ROOT = Path(__file__).resolve().parents[2]
TINY = Layer("tiny", heads=2, queries=256, dim=16, keys=24)
PEAK = 1e11

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(cpu.unavailable() is not None, reason=f"{cpu.unavailable()}"),
]
every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny layer, and fixed speeds of the machine, which is busy with tests."""
    monkeypatch.setitem(cases.LAYERS, "tiny", TINY)
    monkeypatch.setattr(cpu._C, "fma_peak", lambda isa, threads, seconds: PEAK, raising=False)
    monkeypatch.setattr(bench, "copy_bandwidth", lambda: 1e10)


# ---- cases and baselines ----------------------------------------------------------------------


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal up to float32 roundings of sums over keys and channels."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@every_method
@pytest.mark.parametrize("concepts", [c for c in CONCEPTS if c != "none"])
def test_baselines_compute_what_the_operator_does(method: str, concepts: str) -> None:
    case = make(TINY, CONCEPTS[concepts], METHODS[method])
    expected = bench.fused(case)()
    found = baselines(case, with_compile=False)
    assert [*found] == ["sdpa", "eager", "sdpa concatenated" if method == "vsf" else "sdpa + tail"]
    for name, call in found.items():
        if name != "sdpa":
            assert_same(call(), expected)
    assert not torch.allclose(found["sdpa"](), expected)  # it negates nothing


def test_sparse_baselines_too() -> None:
    case = make(TINY, CONCEPTS["4x8"], METHODS["protore"], sparse=True)
    for name in ("eager", "sdpa + tail"):
        assert_same(baselines(case, with_compile=False)[name](), bench.fused(case)())


def test_without_concepts_the_baseline_is_attention() -> None:
    case = make(TINY, CONCEPTS["none"], METHODS["protore"])
    found = baselines(case, with_compile=True)
    assert [*found] == ["sdpa"]
    assert_same(found["sdpa"](), bench.fused(case)())


def test_compiled_baselines() -> None:
    case = make(TINY, CONCEPTS["1x8"], METHODS["protore"])
    found = baselines(case, with_compile=True)
    with torch.inference_mode():
        for name in ("eager, compiled", "sdpa + tail, compiled"):
            assert_same(found[name](), bench.fused(case)())


def test_nag_has_the_scope_of_the_paper() -> None:
    assert METHODS["nag"].scope == "feature"
    assert METHODS["nag-head"].scope == "head"


@pytest.mark.parametrize("dtype", cases.DTYPES.values(), ids=list(cases.DTYPES))
def test_production_layout(dtype: torch.dtype) -> None:
    case = make(TINY, CONCEPTS["1x8"], METHODS["protore"], dtype)
    for tensor in (case.query, case.key, case.value):
        assert tensor.dtype == dtype and tensor.transpose(1, 2).is_contiguous()
    assert case.sizes == (2, 2, 256, 24, 16)


# ---- gates ------------------------------------------------------------------------------------


@every_method
def test_gates_of_dense_cases_are_open(method: str) -> None:
    for concepts in ("1x8", "4x8", "8x16", "1x77"):
        gates = largest_gates(make(TINY, CONCEPTS[concepts], METHODS[method]))
        assert open_share(gates) >= 0.99
        assert skipped_blocks(gates) == 0.0


def test_gates_of_sparse_cases_are_open_in_a_band() -> None:
    wide = Layer("wide", heads=2, queries=256, dim=64, keys=77)
    gates = largest_gates(make(wide, CONCEPTS["8x16"], METHODS["protore"], sparse=True))
    assert gates.shape == (2, 2, 256)
    band = gates[0, :, -32:]  # of the row whose prompt the concepts resemble
    assert open_share(band) > 0.9
    assert open_share(gates[0, :, :-32]) < 0.1
    assert 0.5 < skipped_blocks(gates) < 1.0


def test_largest_gates_are_those_of_each_row_and_head() -> None:
    """Against the mean over heads that the statistics give; rows without entries do not count."""
    one = make(TINY, CONCEPTS["4x8"], METHODS["protore"], sparse=True)
    keys, values = ([t[8 * c : 8 * c + 8] for c in range(4)] for t in (one.tokens.key, one.tokens.value))
    tokens = ConceptTokens.pack(keys, values, [[], [2]], threshold=0.1)
    case = Case("one entry", one.query, one.key, one.value, tokens, one.rule)
    gates = largest_gates(case)
    assert gates.shape == (1, 2, 256)
    _, stats = bench.negated_attention_with_statistics(case.query, case.key, case.value, tokens, case.rule)
    torch.testing.assert_close(gates.mean(1), stats.heat)


def test_skipped_blocks_by_hand() -> None:
    gates = torch.zeros(1, 2, 70)
    gates[0, 0, 5] = gates[0, 1, 69] = 0.1  # blocks of 32, 32 and 6 queries; 2 of 6 are open
    assert skipped_blocks(gates) == pytest.approx(4 / 6)
    assert open_share(gates) == pytest.approx(2 / 140)


# ---- operations, bytes, intervals -------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "per_channel"),
    [
        # prompt 4 M; entries 4 T + 2 each; <Z,F>, <F,F> and <Z,Z>; norms and scaling; blend
        ("protore", 4 * 7 + 2 * (4 * 3 + 2) + 2 * 4 + 2 + 3),
        ("nag", 4 * 7 + 2 * (4 * 3 + 2) + 5 + 2),
        ("nag-head", 4 * 7 + 2 * (4 * 3 + 2) + 5 + 2),
        ("eiup", 4 * 7 + 2 * (4 * 3 + 2)),
        ("vsf", 4 * 7 + 2 * (4 * 3 + 2)),
    ],
)
def test_useful_operations(method: str, per_channel: int) -> None:
    layer = Layer("t", heads=3, queries=5, dim=8, keys=7, batch=2)
    case = make(layer, Concepts("2x3", 2, 3), METHODS[method])
    assert measure.useful_operations(case) == 2 * 3 * 5 * 8 * per_channel
    none = make(layer, CONCEPTS["none"], METHODS[method])
    assert measure.useful_operations(none) == 2 * 3 * 5 * 8 * 4 * 7


def test_useful_operations_count_each_row_with_its_own_entries() -> None:
    case = make(TINY, CONCEPTS["none"], METHODS["eiup"])
    concepts = [torch.randn(t, TINY.heads, TINY.dim) for t in (3, 9)]
    tokens = ConceptTokens.pack(concepts, concepts, [[], [1]])
    mixed = Case("mixed", case.query, case.key, case.value, tokens, case.rule)
    assert mixed.lengths == [[], [9]]
    extra = measure.useful_operations(mixed) - measure.useful_operations(case)
    assert extra == TINY.heads * TINY.queries * TINY.dim * (4 * 9 + 2)


def test_compulsory_bytes() -> None:
    layer = Layer("t", heads=3, queries=5, dim=8, keys=7, batch=2)
    case = make(layer, Concepts("2x3", 2, 3), METHODS["protore"], torch.bfloat16)
    assert measure.compulsory_bytes(case) == 2 * 3 * 8 * (2 * (2 * 5 + 2 * 7) + 2 * 6)


def test_ratio() -> None:
    assert vars(measure.ratio([3.0] * 21, [2.0] * 21)) == {"median": 1.5, "low": 1.5, "high": 1.5}
    a = [1 + i / 20 for i in range(21)]
    b = [1.0] * 21
    forward, backward = measure.ratio(a, b), measure.ratio(b, a)
    assert forward.median == 1.5 and forward.low < 1.5 < forward.high
    # For the median of 21 values the order statistics 6 and 16 are a 95 % interval (binomial).
    assert forward.low == pytest.approx(a[5], abs=0.11) and forward.high == pytest.approx(a[15], abs=0.11)
    assert backward.median == pytest.approx(1 / 1.5)
    outlier = measure.ratio([*b[:-1], 100.0], b)
    assert (outlier.median, outlier.high) == (1.0, 1.0)


def test_interleave() -> None:
    """Each round runs every call once, in changing order; warm rounds do not count."""
    ran: list[str] = []
    calls: dict[str, Callable[[], object]] = {n: (lambda n=n: ran.append(n)) for n in "abc"}
    times = measure.interleave(calls, 10, warm=2)
    rounds = ["".join(ran[i : i + 3]) for i in range(0, len(ran), 3)]
    assert len(rounds) == 12
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 2
    assert {name: len(t) for name, t in times.items()} == {"a": 10, "b": 10, "c": 10}


def test_interleave_times_each_call() -> None:
    times = measure.interleave({"slow": lambda: time.sleep(0.02), "fast": lambda: None}, 3, warm=0)
    assert min(times["slow"]) >= 0.02 > max(times["fast"])


def test_copy_bandwidth() -> None:
    assert machine.copy_bandwidth(mebibytes=1, repeats=2) > 1e6


# ---- the commands -----------------------------------------------------------------------------


def run(*options: str) -> None:
    assert bench.main(["--layers", "tiny", "--rounds", "2", *options]) == 0


def test_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.json"
    run("--methods", "protore", "nag", "--concepts", "none", "1x8", "--json", str(file))
    printed = capsys.readouterr().out
    assert "fused / sdpa + tail" in printed and "% of peak" in printed and "open gates 100.0 %" in printed
    report = json.loads(file.read_text())
    facts = {"processor", "caches", "threads", "torch", "fastnegate", "instruction_set", "copy_gbytes"}
    assert facts <= report["facts"].keys()
    assert report["facts"]["instruction_set"] == cpu.instruction_set()
    assert [(r["method"], r["concepts"]) for r in report["rows"]] == [
        ("protore", "none"), ("protore", "1x8"), ("nag", "1x8"),
    ]  # fmt: skip
    for row in report["rows"]:
        assert row["peak_gflops"] == [PEAK / 1e9] * 2
        assert row["share_of_peak"] == pytest.approx(1e9 * row["fused_gflops"] / PEAK)
        assert row["share_of_copy"] == pytest.approx(1e9 * row["fused_gbytes"] / 1e10)
        assert row["open_gates"] >= 0.99
        assert "cpu: chosen" in row["choice"]
        r = row["fused_over"]["sdpa"]
        assert 0 < r["low"] <= r["median"] <= r["high"]


@pytest.mark.parametrize("mode", [[], ["--sparse"]], ids=["dense", "sparse"])
def test_plot(mode: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "bench.png"
    run("--concepts", "1x8", "4x8", "--plot", str(file), *mode)
    assert file.read_bytes()[:4] == b"\x89PNG"


def test_own_ratios(tmp_path: Path) -> None:
    file = tmp_path / "own.json"
    run("--own", "--json", str(file))
    (row,) = json.loads(file.read_text())["rows"]
    assert [*row["own"]] == [
        "protore 1x8 / none",
        "protore 4x8 / none",
        "protore 8x16 / none",
        "nag 1x77 / none",
        "eiup 1x77 / none",
        "nag 4x8 / nag-head 4x8",
        "nag 1x77 / nag-head 1x77",
        "protore 4x8 with statistics / protore 4x8",
    ]
    assert row["open_gates"] >= 0.99
    assert {len(times) for times in row["seconds"].values()} == {2}


def test_sparse_rows(capsys: pytest.CaptureFixture[str]) -> None:
    run("--sparse", "--concepts", "none", "4x8")
    printed = capsys.readouterr().out
    assert "4x8 sparse protore" in printed and "blocks without one" in printed
    assert "none" not in printed


def test_embedded_rows() -> None:
    """Captured calls hold what acted: conditional rows change where a gate is open, others never."""
    found = list(embedded.captured("implicit", METHODS["protore"], requests=2))
    assert len(found) == 3 * 4  # steps, layers
    for case in found:
        assert [len(row) > 0 for row in case.rows] == [False, False, True, True]  # conditional rows
        gates = largest_gates(case)
        assert gates.shape[0] == 2 and 0 <= skipped_blocks(gates) <= 1
        output = negated_attention(case.query, case.key, case.value, case.tokens, case.rule)
        plain = negated_attention(case.query, case.key, case.value)
        assert torch.equal(output[:2], plain[:2])
        assert torch.equal(output[2:], plain[2:]) == (open_share(gates) == 0)
    assert len({case.name for case in found}) == len(found)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--sparse", "--methods", "nag"], "method nag has no gate"),
        (["--sparse", "--concepts", "none"], "needs concepts"),
        (["--own", "--plot", "x.png"], "--plot shows layers"),
    ],
)
def test_what_cannot_work_is_refused_before_the_run(options: list[str], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        bench.main(options)


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"fastnegate\[bench\]"):
        bench.main(["--plot", str(tmp_path / "x.png")])
    assert not (tmp_path / "x.png").exists()


def test_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_MISSING", "not part of this install")
    with pytest.raises(RuntimeError, match="no CPU kernel to measure: not part of this install"):
        bench.main([])


# ---- the suite for pytest-benchmark -----------------------------------------------------------


def test_suite_interleaves_and_reports() -> None:
    """With a stand-in for the fixture, since the real one adds a table to the output of these tests."""
    ran: list[float] = []

    def pedantic(target, setup, rounds, warmup_rounds):
        for i in range(warmup_rounds + rounds):
            setup()
            start = time.perf_counter()
            target()
            ran[:0] = [] if i < warmup_rounds else [time.perf_counter() - start]

    fixture = SimpleNamespace(
        pedantic=pedantic,
        disabled=False,
        extra_info={},
        stats=SimpleNamespace(stats=SimpleNamespace(data=ran)),
    )
    case = make(TINY, CONCEPTS["1x8"], METHODS["protore"])
    test_operator._run(case, fixture, {"copy_gbytes": 10.0, "processor": "x"}, with_compile=False)
    found = fixture.extra_info
    assert [*found["seconds"]] == ["fused", "sdpa", "eager", "sdpa + tail"]
    assert {len(times) for times in found["seconds"].values()} == {measure.ROUNDS}
    assert found["fused_over"].keys() == {"sdpa", "eager", "sdpa + tail"}
    assert found["processor"] == "x" and found["open_gates"] >= 0.99


def test_suite_has_a_named_test_for_every_case() -> None:
    if not (ROOT / "benchmarks").is_dir():
        pytest.skip("not a source checkout")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks/operator", "--collect-only", "-q"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    names = [line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line]
    kinds = len(METHODS) * (len(CONCEPTS) - 1) + 1
    layers = len(cases.LAYERS) - 1  # the tiny one is of this module alone
    assert len(set(names)) == len(names) == 2 * layers * len(cases.DTYPES) * kinds
    assert "test_fused[sd15-64-float32-none]" in names
    assert "test_compiled[sdxl-32-bfloat16-nag-head-8x16]" in names


def test_modules_are_found_from_a_checkout() -> None:
    """There they are `benchmarks`, not `fastnegate.benchmarks`."""
    if not (ROOT / "benchmarks").is_dir():
        pytest.skip("not a source checkout")
    files = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "benchmarks").rglob("*.py")]
    modules = [".".join(file.parts) for file in files]
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    done = subprocess.run(
        [sys.executable, "-c", code, *modules], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert len(modules) > 20 and done.returncode == 0, done.stderr


# ---- counting instructions --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mnemonic", "arguments", "operations"),
    [
        ("vfmadd231ps", "%ymm0,%ymm1,%ymm2", 16),
        ("vfnmadd213ps", "(%rax),%xmm1,%xmm2", 8),
        ("vfmsub132ss", "%xmm0,%xmm1,%xmm2", 2),
        ("vmulps", "%zmm0,%zmm1,%zmm2", 16),
        ("vaddps", "(%rax),%ymm1,%ymm2", 8),
        ("vsubps", "%xmm0,%xmm1,%xmm2", 4),
        ("mulss", "%xmm0,%xmm1", 1),
        ("vmaxps", "%ymm0,%ymm1,%ymm2", None),
        ("vdivps", "%ymm0,%ymm1,%ymm2", None),
        ("vpaddd", "%ymm0,%ymm1,%ymm2", None),
        ("vmovaps", "%ymm0,%ymm1", None),
    ],
)
def test_operations_of_an_instruction(
    mnemonic: str, arguments: str, operations: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = f"lib:     file format elf64-x86-64\n\n0000 <f>:\n    1a2b:\t{mnemonic} {arguments}\n"
    monkeypatch.setattr(callgrind, "_call", lambda *command: listing)
    assert callgrind._operations(Path("lib")).get(0x1A2B) == operations


def test_counts_of_callgrind(tmp_path: Path) -> None:
    """Own cost of instructions in the library; the cost of what they call is not theirs."""
    (tmp_path / "counts.1").write_text(
        "version: 1\ndesc: Trigger: Client Request: D=40 none\npositions: instr line\nevents: Ir\n"
        "ob=/tmp/x/_C.so\nfn=f\n0x10 5 7\n0x14 5 3\ncfn=g\ncalls=1 0x40\n0x14 5 1000\n0x18 6 2\n"
        "ob=/usr/lib/libc.so\nfn=g\n0x10 5 99\n"
    )
    (tmp_path / "counts.2").write_text("desc: Trigger: Program termination\nob=/tmp/x/_C.so\n0x10 5 7\n")
    assert callgrind._executed(tmp_path, Path("_C.so")) == {"D=40 none": {0x10: 7, 0x14: 3, 0x18: 2}}


@pytest.mark.parametrize(
    ("place", "left_out"),
    [
        ("fma\n/r/csrc/cpu/vec.h:9\nfastnegate::avx2::exp2(float)\n/r/csrc/cpu/vec.h:80\n", True),
        ("void fastnegate::avx2::softmax<2>(float*)\n/r/csrc/cpu/kernel.cpp:1\n", True),
        ("min\n/r/csrc/cpu/vec.h:9\ngate\n/r/csrc/include/fastnegate/rule.h:60\n", True),
        ("fma\n/usr/share/csrc/cpu/vec.h:9\nmultiply_step<4, 2>\n/r/csrc/cpu/kernel.cpp:1\n", False),
    ],
)
def test_what_the_count_leaves_out(place: str, left_out: bool) -> None:
    assert bool(callgrind.LEFT_OUT.search(place)) == left_out


# ---- a denoising step -------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, model in models.MODELS.items():
        monkeypatch.setitem(models.MODELS, name, models.small(model))


def test_pipeline(small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "step.json"
    for rows in ("all", "conditional"):
        assert pipeline.main(["--pairs", "2", "--rows", rows, "--json", str(file)]) == 0
        result = json.loads(file.read_text())
        assert result["open_gates"] >= 0.99 and 0.01 < result["change"] < 2
        assert {len(times) for times in result["seconds"].values()} == {2}
    assert "over 2 pairs" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--pairs 0"):
        pipeline.main(["--pairs", "0"])


@pytest.mark.parametrize("name", models.MODELS)
def test_pipeline_twin_is_the_same_model(name: str, small: None) -> None:
    model = models.MODELS[name]
    pipe = models.pipeline(model, models.random_unet(model))
    twin = models.twin(pipe.unet)
    shared = {p.data_ptr() for p in pipe.unet.parameters()}
    assert {p.data_ptr() for p in twin.parameters()} == shared
    with torch.inference_mode():
        outputs = [models.step(pipe, unet, 2)() for unet in (pipe.unet, twin)]
    assert torch.equal(*outputs)
    assert outputs[0].std() > 0.1  # the random weights neither lose nor blow up the signal


def test_pipeline_is_full_size() -> None:
    import diffusers

    for name, parameters in (("sd15", 859_520_964), ("sdxl", 2_567_463_684)):  # of the published models
        with torch.device("meta"):
            unet = diffusers.UNet2DConditionModel(**models.MODELS[name].unet)
        assert sum(p.numel() for p in unet.parameters()) == parameters
