# SPDX-License-Identifier: Apache-2.0
"""The CPU kernel with Intel's tile registers (AMX): with emulated ones it keeps the budget and the invariants
on machines that have none; compiled for them, it uses them and leaves nothing in them."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support import MASKS, RULES, fair, make_problem, pairwise, plain, run, run_with_statistics

from fastnegate.operator.backends import cpu
from fastnegate.operator.plan import plans

ROOT = Path(__file__).resolve().parents[3]
GXX = shutil.which("g++")
KERNEL = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mfma", "-mf16c"]
KERNEL += ["-mprefer-vector-width=512", "-ffp-contract=off", "-fno-math-errno", "-Wno-uninitialized"]
KERNEL += ["-DFASTNEGATE_LANES=16", "-DFASTNEGATE_PAIRS", "-DFASTNEGATE_TILES", "-DFASTNEGATE_TILES_EMULATED"]
# In the place of the level for every machine, the only one that run.cpp knows by itself.
KERNEL += ["-DFASTNEGATE_ISA=portable", '-DFASTNEGATE_ISA_NAME="amx"']
RUNS = cpu._C is not None and not {"avx512bf16", "amx"}.isdisjoint(cpu._C.usable_isas())  # on this machine

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(GXX is None, reason="there is no g++"),
]


def _load(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


invariants = _load("invariants", ROOT / "tests/operator/test_invariants.py")


def _compile(*arguments: str | Path) -> None:
    assert GXX is not None
    flags = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-Wall", "-Wextra"]
    flags += [f"-I{ROOT}/csrc", f"-I{ROOT}/csrc/include"]
    done = subprocess.run([GXX, *flags, *arguments], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr[-4000:]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The extension module with one level, whose tiles are emulated."""
    pybind11 = pytest.importorskip("pybind11")
    if not RUNS:
        pytest.skip("this machine has no AVX-512 with bfloat16")
    folder = tmp_path_factory.mktemp("amx")
    csrc = ROOT / "csrc"
    python = [f"-I{path}" for path in (sysconfig.get_path("include"), pybind11.get_include())]
    with ThreadPoolExecutor(2) as pool:
        bindings = pool.submit(_compile, *python, "-c", csrc / "bindings.cpp", "-o", folder / "bindings.o")
        _compile("-Og", *KERNEL, "-c", csrc / "cpu/kernel.cpp", "-o", folder / "kernel.o")
        bindings.result()
    _compile("-shared", csrc / "cpu/run.cpp", *folder.glob("*.o"), "-o", folder / "_C.so")
    return _load("amx._C", folder / "_C.so")


@pytest.fixture
def amx(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The backend that runs it, for support.run."""
    monkeypatch.setattr(cpu, "_C", emulated)
    plans.clear()
    yield "cpu-amx"
    plans.clear()


CASES = list(
    pairwise(
        {
            "rule": tuple(RULES),
            "dim": (8, 24, 32, 40, 64, 72, 80, 128, 256),
            "queries": (1, 16, 17, 70),
            "keys": (0, 1, 15, 16, 17, 33, 77, 512),
            "mask": MASKS,
            "layout": ("bnhd", "odd"),
            "rows": ("same", "mixed"),
            "concept_lengths": ((8, 3, 12), (1, 33), (77, 16, 40)),
        }
    )
)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c.values())).replace(" ", ""))
def test_tiles_keep_the_budget(case: dict[str, Any], amx: str) -> None:
    case = {**case, "rule": RULES[case["rule"]], "dtype": torch.bfloat16}
    judge = fair(make_problem(**case, seed=seed) for seed in range(9))
    output, statistics = run_with_statistics(judge.problem, amx)
    judge.check(output, amx)
    judge.check_statistics(statistics, amx)
    assert torch.equal(run(judge.problem, amx), output)


@pytest.mark.parametrize("rule", ["protore", "protore_retrieve", "nag", "vsf"])
@pytest.mark.parametrize(
    "invariant",
    [
        invariants.test_01_no_existing_entry_is_plain_attention,
        invariants.test_01_a_row_without_entries_in_a_live_batch,
        invariants.test_05_bits_of_a_row_depend_on_that_row_alone,
        invariants.test_06_a_shared_bank_is_a_duplicated_bank,
        invariants.test_07_a_masked_concept_token_is_absent,
        invariants.test_07_a_masked_prompt_key_is_absent,
        invariants.test_12_extreme_inputs_never_give_nan,
    ],
)
def test_tiles_keep_the_invariants(invariant: Callable[..., None], rule: str, amx: str) -> None:
    invariant(amx, RULES[rule], torch.bfloat16)


@pytest.mark.parametrize("scope", ["head", "feature"])
@pytest.mark.parametrize("direction", ["raw", "orthogonal", "difference"])
def test_a_concept_equal_to_the_prompt(direction: str, scope: str, amx: str) -> None:
    invariants.test_08_concept_equal_to_the_prompt(amx, direction, scope, torch.bfloat16)


@pytest.mark.parametrize("dim", [40, 64])
def test_bits_of_a_query_do_not_depend_on_its_place_in_a_tile(dim: int, amx: str) -> None:
    problem = make_problem(queries=70, keys=77, dim=dim, dtype=torch.bfloat16, rule="protore")
    expected = run(problem, amx)
    for begin, end in ((5, 6), (17, 33), (3, 67)):
        part = dataclasses.replace(problem, query=problem.query[:, :, begin:end])
        assert torch.equal(run(part, amx), expected[:, :, begin:end])


def test_a_token_of_all_weight_gives_its_value_exactly(amx: str) -> None:
    problem = plain(make_problem(keys=1, dtype=torch.bfloat16))
    assert torch.equal(run(problem, amx), problem.value.expand_as(problem.query))
    key_bias = torch.full((3, 1, 1, 21), -300.0)
    key_bias[..., 20] = 0.0  # beyond a tile of keys; the weights of the others are nothing beside it
    problem = dataclasses.replace(plain(make_problem(dtype=torch.bfloat16)), key_bias=key_bias)
    assert torch.equal(run(problem, amx), problem.value[:, :, 20:].expand_as(problem.query))


def test_what_pads_the_last_tile_is_zero_not_a_copy(amx: str) -> None:
    problem = plain(make_problem(keys=21, dtype=torch.bfloat16))
    problem.value[:, :, 20, 5] = torch.inf  # of weight above 0 for every query; times 0 it would be NaN
    assert (run(problem, amx)[..., 5] == torch.inf).all()


def test_queries_of_nan_stay_alone(amx: str) -> None:
    problem = make_problem(dtype=torch.bfloat16, rule="protore")
    expected = run(problem, amx)
    problem.query[1, 0, 7, 3] = torch.nan
    actual = run(problem, amx)
    assert actual[1, 0, 7].isnan().all()
    actual[1, 0, 7] = expected[1, 0, 7]
    assert torch.equal(actual, expected)


def _functions(library: str) -> list[list[str]]:
    """The instructions of each function, in the order of memory; of a library without names, too."""

    def printed(*command: str) -> str:
        return subprocess.run([*command, library], capture_output=True, text=True, check=True).stdout

    frames, listing = printed("readelf", "--debug-dump=frames"), printed("objdump", "-d")
    begins = iter(sorted({int(begin, 16) for begin in re.findall(r" pc=([0-9a-f]+)\.\.", frames)}))
    functions: list[list[str]] = [[]]
    begin = next(begins)
    for address, mnemonic in re.findall(r"^ *([0-9a-f]+):\t[^\t]*\t(\S+)", listing, re.MULTILINE):
        while begin <= int(address, 16):
            functions.append([])
            begin = next(begins, 1 << 64)
        functions[-1].append(mnemonic)
    return functions


@pytest.mark.skipif(
    cpu._C is None or "amx" not in cpu._C.built_isas(), reason="this build has no level with tile registers"
)
@pytest.mark.skipif(shutil.which("objdump") is None, reason="there is no objdump")
def test_only_the_level_of_that_name_has_tile_registers_and_it_releases_them() -> None:
    functions = _functions(cpu._C.__file__)
    names = ("ldtilecfg", "tile", "tdp")
    tiles = [i for i, code in enumerate(functions) if any(m.startswith(names) for m in code)]
    assert any("tdpbf16ps" in functions[i] for i in tiles)
    # Levels lie in memory in their order: the tiles begin after the last that is not of this level.
    assert max(i for i, code in enumerate(functions) if "vdpbf16ps" in code) < min(tiles)
    users = [functions[i] for i in tiles if "ldtilecfg" in functions[i]]
    assert users
    for code in users:
        for at in (i for i, m in enumerate(code) if m == "ldtilecfg"):
            assert "tilerelease" in code[at:] and "ret" not in code[at : code.index("tilerelease", at)]
