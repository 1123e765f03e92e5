# SPDX-License-Identifier: Apache-2.0
"""The cases under pytest-benchmark, one test each: `pytest benchmarks/operator --benchmark-only`.

pytest-benchmark times the fused call; before each of its rounds every baseline runs once, so that the
rounds of all are interleaved. Ratios and shares are in `extra_info`. Select with -k: names are
layer-dtype-method-concepts, and those of `test_compiled` have compiled baselines too.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch

from .__main__ import fused
from .baselines import baselines
from .cases import CONCEPTS, DTYPES, LAYERS, METHODS, Case, make
from .machine import copy_bandwidth, facts, fma_peak
from .measure import ROUNDS, WARM, Rounds, interleave, row

CASES = [
    pytest.param(layer, dtype, method, concepts, id="-".join((layer, dtype, *name)))
    for layer, dtype in product(LAYERS, DTYPES)
    for method, concepts, *name in [
        ("protore", "none", "none"),
        *((m, c, m, c) for m, c in product(METHODS, CONCEPTS) if c != "none"),
    ]
]
every_case = pytest.mark.parametrize(("layer", "dtype", "method", "concepts"), CASES)


@pytest.fixture(scope="module")
def machine() -> dict[str, Any]:
    return {**facts(), "copy_gbytes": copy_bandwidth() / 1e9}


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@every_case
def test_fused(layer: str, dtype: str, method: str, concepts: str, benchmark: Any, machine: Any) -> None:
    case = make(LAYERS[layer], CONCEPTS[concepts], METHODS[method], DTYPES[dtype])
    _run(case, benchmark, machine, with_compile=False)


@every_case
def test_compiled(layer: str, dtype: str, method: str, concepts: str, benchmark: Any, machine: Any) -> None:
    case = make(LAYERS[layer], CONCEPTS[concepts], METHODS[method], DTYPES[dtype])
    _run(case, benchmark, machine, with_compile=True)


def _run(case: Case, benchmark: Any, machine: dict[str, Any], *, with_compile: bool) -> None:
    calls = baselines(case, with_compile=with_compile)
    interleave({"fused": fused(case), **calls}, WARM, warm=0)  # compiles, too
    others = Rounds(calls)
    before = fma_peak()
    # A round: the baselines in changing order, then this call (which `fastnegate bench` shuffles, too).
    benchmark.pedantic(fused(case), setup=others.run, rounds=ROUNDS, warmup_rounds=1)
    if benchmark.disabled:
        return
    times = {"fused": benchmark.stats.stats.data, **{n: t[1:] for n, t in others.times.items()}}
    found = row(case, times, (before, fma_peak()), machine["copy_gbytes"] * 1e9)
    benchmark.extra_info.update({**machine, **found})
