# SPDX-License-Identifier: Apache-2.0
"""(problem, machine) -> how the Triton kernel cuts its work: pure functions, each choice with its reason.

Nothing here imports Triton or asks a device. "Registers" are those of one thread, of which NVIDIA has 255:
what ptxas of CUDA 12.9 says for sm_80, checked by tests/gpuless/test_compiled.py.
"""

from __future__ import annotations

from typing import NamedTuple


class Work(NamedTuple):
    """Sizes of a problem: B, H, N, M, D, tokens of the longest concept, bytes per element."""

    batch: int
    heads: int
    queries: int
    keys: int
    dim: int
    longest: int
    itemsize: int


class Tiles(NamedTuple):
    """Sizes of a program. All but `rows` and `warps` are cut into powers of two by `split`."""

    rows: int  # queries of a tile
    keys: int  # of the prompt, of a tile
    kept: bool  # a tile holds all keys of the prompt: it is loaded once, not once per tile of queries
    tokens: int  # of a concept, of a tile
    streamed: bool  # a concept has more: they are taken tile by tile with a running top
    channels: int  # head_dim where it is summed over, in multiples of 16, the depth of a matrix instruction
    features: int  # head_dim of values and outputs, in multiples of 8, its columns
    warps: int


def split(size: int) -> tuple[int, ...]:
    """`size` as a sum of powers of two, largest first: what Triton can hold of it.

    Pieces of at most 64: with 128 + 32 for 160, statistics spill; float32 sums of 128 and more products in
    one chain miss the accuracy budget.
    """
    return (64,) * (size // 64) + tuple(1 << i for i in reversed(range(6)) if size >> i & 1)


def up(size: int, unit: int) -> int:
    """`size` rounded up to a multiple of `unit`, at least one."""
    return max(-(-size // unit), 1) * unit


def tiles(work: Work, shared_memory: int) -> Tiles:
    """Tiles of a problem, on a device with so many bytes of shared memory for a program.

    They depend on M, D, dtype and capacities, not on B, H or N, so that a row's bits do not either.
    """
    if work.itemsize == 4:
        return _float32(work)
    dim = work.dim
    # Z, F and the sum of what is removed take dim / 2 registers each of a warp that owns 16 rows, Q dim / 4.
    # Up to 80 this fits: 8 warps of 16 rows, and K and V are read once for 128 rows. Beyond it, two warps
    # (four from 168 on) share 16 rows and take half of the channels each, in pieces of at least 32.
    # A long prompt is read again for every tile: up to 128, 128 rows are worth some spilled registers, since
    # 32 rows, which spill nothing, read it 4 times as often.
    wide = dim <= 80 or (dim <= 128 and work.keys > 96)
    rows, warps, columns = (128, 8, 8) if wide else (16, 2 if dim <= 160 else 4, 32)
    features = up(dim, columns)
    # Scores of one tile of keys take keys / 2 registers beside Z, when nothing else is alive.
    keys = up(work.keys, 16)
    bytes_of_key = (up(dim, 16) + features) * work.itemsize
    queries = 2 * rows * up(dim, 16) * work.itemsize  # Q for the prompt, and again for the entries
    most = 128 if dim <= 80 else 96
    kept = keys <= most and keys * bytes_of_key + queries + 16 * bytes_of_key <= shared_memory
    # Scores of a concept come on top of everything else.
    tokens = up(work.longest, 16)
    most_tokens = 80 if dim <= 48 else 16
    return Tiles(
        rows=rows,
        keys=keys if kept else 64 if dim <= 80 else 32,
        kept=kept,
        tokens=min(tokens, most_tokens),
        streamed=tokens > most_tokens,
        channels=up(dim, 16),
        features=features,
        warps=warps,
    )


def _float32(work: Work) -> Tiles:
    """Without matrix instructions, which round to 10 bits. Operands lie in registers: tiles are small."""
    size = up(work.dim, 16 if work.dim <= 64 else 64)  # smaller pieces beside those of 64 spill
    keys, tokens = up(work.keys, 16), up(work.longest, 16)
    most = 64 if size <= 64 else 32 if size <= 128 else 16
    return Tiles(
        rows=16,
        keys=min(keys, most),
        kept=False,
        tokens=min(tokens, most),
        streamed=tokens > most,
        channels=size,
        features=size,
        warps=4 if size <= 64 else 8,
    )


def programs(work: Work, rows: int, multiprocessors: int) -> int:
    """Programs per batch row and head: as few as keep every multiprocessor busy, since each reads K and V.

    With one program per multiprocessor at a time the last round sets the time; of the counts that cost
    the fewest rounds x tiles, the smallest.
    """
    pairs, steps = max(work.batch * work.heads, 1), -(-work.queries // rows)

    def rounds(count: int) -> int:
        return -(-pairs * count // multiprocessors) * -(-steps // count)

    most = min(steps, max(-(-multiprocessors // pairs), 1))
    return min(range(1, most + 1), key=lambda count: (rounds(count), count), default=1)
