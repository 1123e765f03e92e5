# SPDX-License-Identifier: Apache-2.0
"""The backends of a GPU compute the definition: outputs and statistics against the float64 reference.

What matters most comes first, since the time on a GPU may be short.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import pytest
import torch
from card import (
    BACKENDS,
    DEVICE,
    DTYPES_OF,
    REHEARSED,
    SUPPORTED,
    call,
    call_with_statistics,
    every_backend,
    on_card,
    same,
)
from fastnegate.benchmarks.operator.cases import LAYERS
from support import LAYOUTS, PRESETS, ROWS, Judge, fair, make_problem, pairwise

import fastnegate as fn
from fastnegate.operator.backends import load

pytestmark = pytest.mark.usefixtures("one_thread")
HALVES = (torch.float16, torch.bfloat16)


@functools.lru_cache(maxsize=1)  # tests that differ in the backend follow one another
def judge_of(seed: int, **case: Any) -> Judge:
    """On the CPU."""
    return fair(make_problem(**case, seed=s) for s in range(seed, seed + 5000, 1000))


def check(judge: Judge, backend: str, only: str = "") -> None:
    """Output and statistics; `only` one of these words for what takes long to compile: each has a kernel."""
    problem = on_card(judge.problem)
    assert load(backend).supports(problem) is None
    outputs = []
    if only != "statistics":
        outputs.append(call(problem, backend))
    if only != "output":
        output, statistics = call_with_statistics(problem, backend)
        judge.check_statistics(statistics, backend)
        outputs.append(output)
    for output in outputs:
        assert output.device.type == DEVICE and output.transpose(1, 2).is_contiguous()
        assert same(output, outputs[0])
    judge.check(outputs[0].cpu(), backend)


def _name(case: Any) -> str:
    if isinstance(case, dict):
        return "-".join(map(_name, case.values()))
    return str(case).removeprefix("torch.").replace(" ", "")


# ---- what real models run ---------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("dtype", HALVES, ids=_name)
@pytest.mark.parametrize("dim, lengths", ((40, (8, 8)), (64, (8, 8)), (64, (77,))))
@pytest.mark.parametrize("preset", [name for name in PRESETS if name in SUPPORTED])
def test_presets(preset: str, dim: int, lengths: tuple, dtype: torch.dtype, backend: str) -> None:
    """Stable Diffusion 1.5 and SDXL: prototypes, and a whole prompt as the concept."""
    check(
        judge_of(
            0, batch=2, queries=256, keys=77, dim=dim, dtype=dtype, rule=preset, rows="same",
            concept_lengths=lengths, layout="bnhd",
        ),
        backend,
    )  # fmt: skip


def layer_judge(layer: str, rule: Any) -> Judge:
    size = LAYERS[layer]
    return judge_of(
        1, batch=size.batch, heads=size.heads, queries=size.queries, keys=size.keys, dim=size.dim,
        dtype=torch.bfloat16, rule=rule, rows="same", concept_lengths=(8, 8, 8, 8), layout="bnhd",
        mask="none" if size.keys == 77 else "padding",
    )  # fmt: skip


@every_backend
@pytest.mark.parametrize("rule", ("protore", "nag"))
@pytest.mark.parametrize("layer", ("sdxl-32", "sd15-64"))
def test_whole_layers(layer: str, rule: str, backend: str) -> None:
    """More queries than programs: each takes several tiles, one after the other."""
    check(layer_judge(layer, rule), backend)


# ---- pairs of everything ----------------------------------------------------------------------


def factors(backend: str) -> dict[str, tuple]:
    """What the backend supports."""
    aligned = tuple(layout for layout in LAYOUTS if layout != "odd")
    return {
        "rule": tuple(SUPPORTED),
        "dtype": DTYPES_OF[backend],
        "dim": (40, 64, 72, 80, 128, 160),
        "queries": (1, 37, 256, 1000),
        "keys": (1, 21, 77, 120, 300),
        "layout": aligned if backend == "cuda" else LAYOUTS,
        "mask": ("none", "padding", "additive"),
        "rows": ROWS,
        "concept_lengths": ((8, 3, 12), (77,), (8, 8, 8, 8), (77, 4, 20, 2), (16,)),
        "only": ("output", "statistics"),
    }


def cost(case: dict) -> tuple:
    return case["rule"] not in PRESETS, case["queries"] * case["keys"] * case["dim"]


GRID = [
    pytest.param("cpu" if REHEARSED else backend, case, id=f"{backend}-{_name(case)}")
    for backend in ("cuda", "triton")  # rehearsed are the problems of both
    for case in sorted(pairwise(factors(backend)), key=cost)
]


def check_case(case: dict, backend: str, seed: int = 2) -> None:
    changed = {"rule": SUPPORTED[case["rule"]], "batch": 3 if case["queries"] < 100 else 2, "heads": 2}
    made = {name: word for name, word in (case | changed).items() if name != "only"}
    check(judge_of(seed, **made), backend, case["only"])


@pytest.mark.parametrize("backend, case", GRID)
def test_grid(backend: str, case: dict) -> None:
    check_case(case, backend)


# ---- what is refused --------------------------------------------------------------------------

REFUSED_ON_GPU = {
    "direction='retrieve'": {"rule": "protore_retrieve"},
    "key_bias differs between queries": {"mask": "per_query"},
    "key_bias differs": {"mask": "per_head_and_query"},
    "scale=-1": {"scale": -1.0},
    "scale=0": {"scale": 0.0},
    "float64": {"dtype": torch.float64},
    "head_dim=20": {"dim": 20},
    "query is on cpu": {"device": "cpu"},
    "requires grad": {"requires_grad": True},
}
REFUSED = {
    "cuda": REFUSED_ON_GPU | {
        "float32": {"dtype": torch.float32},
        "head_dim=24": {"dim": 24},
        "head_dim=168": {"dim": 168},
        "rows of query are not 16-byte aligned": {"layout": "odd"},
    },
    "triton": REFUSED_ON_GPU | {"head_dim=8": {"dim": 8}, "head_dim=264": {"dim": 264}},
    "cpu": {
        "head_dim=20": {"dim": 20},
        "float64": {"dtype": torch.float64},
        "requires grad": {"requires_grad": True},
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "backend, reason", [(backend, reason) for backend in BACKENDS for reason in REFUSED[backend]]
)
def test_refusals_name_the_reason(backend: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is computed in its place."""
    case = {"dtype": torch.float16, **REFUSED[backend][reason]}
    changes = {"scale": case.pop("scale")} if "scale" in case else {}
    stays, grad = case.pop("device", DEVICE) != DEVICE, case.pop("requires_grad", False)
    problem = dataclasses.replace(make_problem(**case), **changes)
    problem = problem if stays else on_card(problem)
    if grad:
        problem.query.requires_grad_()
    for other in fn.backends():
        monkeypatch.setattr(load(other), "plan", lambda *call: pytest.fail("it was computed"))
    for operator in (call, call_with_statistics):
        named = f"backend='{backend}' cannot run this call: .*{re.escape(reason)}"
        with pytest.raises(fn.BackendError, match=named):
            operator(problem, backend)


def test_auto_takes_the_first_that_can() -> None:
    """And `explain` says so."""
    problem = on_card(make_problem(dtype=torch.float16))
    first = next((backend for backend in BACKENDS if fn.backends()[backend] is None), "reference")
    said = fn.explain(problem.query, problem.key, problem.value, problem.concepts, problem.rule)
    assert f"  {first}: chosen" in said
    assert same(call(problem, "auto"), call(problem, first))


# ---- the whole grid ---------------------------------------------------------------------------


@pytest.mark.full
@every_backend
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("rule", ("protore", "nag", "vsf", "ong"))
def test_every_layer(rule: Any, layer: str, backend: str) -> None:
    check(layer_judge(layer, rule), backend)


WIDTHS = {
    "cuda": (32, 40, 64, 72, 80, 88, 96, 112, 128, 160),
    "triton": (16, 24, 32, 40, 48, 64, 72, 80, 88, 96, 112, 128, 160, 192, 256),
}
MORE = {
    "queries": (1, 15, 64, 65, 255, 1000, 3000),
    "keys": (0, 1, 7, 77, 78, 128, 300, 512),
    "concept_lengths": ((8, 3, 12), (1, 5), (77, 4, 20, 2), (16, 0, 7, 1, 9, 16, 2, 5), (200, 130)),
}


@pytest.mark.full
@pytest.mark.parametrize("rule", SUPPORTED)
@pytest.mark.parametrize(
    "backend, of", [("cpu" if REHEARSED else b, b) for b in ("cuda", "triton")], ids=("cuda", "triton")
)
def test_full_grid(backend: str, of: str, rule: str) -> None:
    failed, unfair = [], []
    cases = [*pairwise({**factors(of), **MORE, "dim": WIDTHS[of]}, repeats=4)]
    for i, case in enumerate(cases):
        if case["rule"] == rule:
            try:
                check_case(case, backend, seed=i)
            except AssertionError as error:
                failed.append(f"{_name(case)}: {error}")
            except ValueError as error:  # of `fair`: whatever the seed, too many rows are next to a jump
                assert "next to a jump" in str(error)
                unfair.append(_name(case))
    assert not failed, "\n".join(failed)
    assert 20 * len(unfair) <= len(cases) // len(SUPPORTED), "\n".join(unfair)
