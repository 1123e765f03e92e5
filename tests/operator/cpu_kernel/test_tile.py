# SPDX-License-Identifier: Apache-2.0
"""How the CPU kernel cuts its work: csrc/include/fastnegate/tile.h."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastnegate.operator.backends import cpu

pytestmark = pytest.mark.skipif(cpu._C is None, reason="built without CPU kernels")
ISA = cpu._C.usable_isas()[-1] if cpu._C is not None else ""  # the narrowest: 4 lanes
LANES = {"portable": 4, "neon": 4, "avx2": 8, "avx512": 16, "avx512bf16": 16, "amx": 16}


@given(
    batch=st.integers(0, 8),
    heads=st.integers(1, 64),
    queries=st.integers(0, 5000),
    keys=st.integers(0, 1024),
    tokens=st.integers(0, 1024),
    dim=st.sampled_from(range(8, 257, 8)),
    threads=st.integers(1, 64),
)
def test_units_cover_the_heads_fit_the_cache_and_feed_the_threads(
    batch: int, heads: int, queries: int, keys: int, tokens: int, dim: int, threads: int
) -> None:
    tile, together = cpu._C.tiling(ISA, [batch, heads, queries, keys, tokens, dim], threads)
    assert tile == 2 * LANES[ISA]
    assert 1 <= together <= heads
    chunks = -(-heads // together)
    assert chunks * together - heads < chunks  # equal but for one head
    assert together == 1 or together * 2 * (keys + tokens) * dim * 4 <= 512 << 10
    units = batch * -(-queries // tile) * chunks
    assert together == 1 or units >= 4 * threads


@pytest.mark.parametrize("isa", cpu._C.usable_isas() if cpu._C is not None else [])
def test_a_tile_is_two_vectors(isa: str) -> None:
    assert cpu._C.tiling(isa, [2, 8, 4096, 77, 32, 40], 2)[0] == 2 * LANES[isa]


def test_layers_of_real_models() -> None:
    sizes = {"sd15-64": (8, 4096, 40), "sdxl-32": (20, 1024, 64), "sd15-8": (8, 64, 160)}
    together = {n: cpu._C.tiling(ISA, [2, h, q, 77, 32, d], 2)[1] for n, (h, q, d) in sizes.items()}
    assert together == {"sd15-64": 8, "sdxl-32": 7, "sd15-8": 3}


def test_an_unusable_instruction_set_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'sve' is not usable"):
        cpu._C.tiling("sve", [1, 1, 1, 1, 1, 8], 1)
