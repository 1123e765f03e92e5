# SPDX-License-Identifier: Apache-2.0
"""(problem, machine) -> how the Triton kernel cuts its work: pure functions, each choice with its reason.

Nothing here imports Triton or asks a device. "Registers" are those of one thread, of which NVIDIA has 255:
what ptxas of CUDA 12.9 says for sm_80, checked by tests/gpuless/triton_kernel/test_compiled.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints


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
    held: int = 0  # entries of a batch row whose tokens are loaded once, not once per tile of queries

    def describe(self) -> str:
        return (
            f"tiles of {self.rows} queries, {self.keys} keys{'' if self.kept else ' at a time'} and "
            f"{self.tokens} concept tokens"
        )


def split(size: int) -> tuple[int, ...]:
    """`size` as a sum of powers of two: what Triton can hold of it.

    Pieces of at most 64: with 128 + 32 for 160, statistics spill; float32 sums of 128 and more products in
    one chain miss the accuracy budget. The largest comes first, but from 96 on last: see `shared`.
    """
    powers = tuple(1 << i for i in range(6) if size >> i & 1)
    return powers + (64,) * (size // 64) if size >= 96 else (64,) * (size // 64) + powers[::-1]


def up(size: int, unit: int) -> int:
    """`size` rounded up to a multiple of `unit`, at least one."""
    return max(-(-size // unit), 1) * unit


def shared(dim: int, rows: int, warps: int) -> int:
    """`dim` padded for warps that share rows: 8 columns for each in every piece, and more columns than rows
    in the last. For NVIDIA, Triton lays out chained products by the last: with fewer columns, each warp would
    have 16 rows of its own, and where there are not as many, the same as others.
    """
    unit = 8 * warps
    return next(size for size in range(up(dim, unit), 2 * unit * dim, unit) if split(size)[-1] > rows)


def tiles(work: Work, shared_memory: int, columns: int, multiprocessors: int) -> Tiles:
    """Tiles of a problem, on a device with so many bytes of shared memory for a program, whose matrix
    instructions make `columns` columns: 8 on NVIDIA, 16 on AMD.

    They depend on M, D, dtype and capacities, not on B, H or N, so that a row's bits do not either.
    """
    if work.itemsize == 4:
        return _float32(work)
    dim = work.dim
    # Z, F and the sum of what is removed take dim / 2 registers each of a warp that owns 16 rows, Q dim / 4.
    # Up to 80 this fits: 8 warps of 16 rows, and K and V are read once for 128 rows. Beyond it, two warps
    # (four from 168 on) share 16 rows and take half of the channels each: with 128 rows, 96 spills 280
    # bytes on 10.0, 160 from 240 on 8.0 to 744 on 10.0.
    # A long prompt is read again for every tile: up to 128, 128 rows are worth some spilled registers, since
    # 32 rows, which spill nothing, read it 4 times as often.
    wide = dim <= 80 or (dim <= 128 and work.keys > 96)
    rows, warps = (128, 8) if wide else (16, 2 if dim <= 160 else 4)
    features = up(dim, columns) if wide else shared(dim, rows, warps)
    # Scores of one tile of keys take keys / 2 registers beside Z, when nothing else is alive.
    unit = columns if wide else 16
    keys = up(work.keys, unit)
    bytes_of_key = (up(dim, 16) + features) * work.itemsize
    queries = 2 * rows * up(dim, 16) * work.itemsize  # Q for the prompt, and again for the entries
    # Scores of a concept come on top of everything else: 80 at a time spill, even at head_dim 40.
    tokens = up(work.longest, unit)
    # Each held entry is another copy of the code that takes it, with addresses of its own. With one, four
    # concepts of 8 tokens move less than 1.35 of the bytes that must move. Beyond 64 it spills somewhere (80
    # bytes at 80 on 10.0), as on the architectures with little shared memory (8 at 64).
    large = columns == 8 and shared_memory >= 160 << 10
    held = 1 if large and dim <= 64 and tokens <= 16 else 0
    most = 128 if dim <= 80 else 96
    kept = keys <= most and (keys + 16 + 16 * held) * bytes_of_key + queries <= shared_memory
    # The layer of 80 is Stable Diffusion's of 32 x 32: with guidance 128 tiles of 128 queries. On the 108
    # multiprocessors of an A100 some would make two while most make one: there a tile has half of the rows.
    if dim == 80 and columns == 8 and 86 <= multiprocessors < 128:
        rows, warps = 64, 4
    return Tiles(
        rows=rows,
        keys=keys if kept else 64 if dim <= 80 else 32,
        kept=kept,
        tokens=min(tokens, 16),
        streamed=tokens > 16,
        channels=up(dim, 16),
        features=features,
        warps=warps,
        held=held,
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


class Combined(NamedTuple):
    """Sizes of a program of `combine`."""

    queries: int
    heads: int  # a power of two
    features: int  # as in Tiles
    warps: int

    def describe(self) -> str:
        return f"tiles of {self.queries} queries and {self.heads} heads"


def combined(heads: int, dim: int, feature: bool) -> Combined:
    """For a rule with scope `feature`, whose programs have all heads of a query, or `head`.

    32 rows at least, and 8 warps for them: each thread has an eighth of a row of every matrix, so that with
    the few that are alive two programs fit a multiprocessor; and no piece of 8 columns has fewer numbers than
    there are threads, which would read some twice.
    """
    together = 1 << (heads - 1).bit_length() if feature and heads > 1 else 1
    rows = max(together, 32)
    return Combined(rows // together, together, up(dim, 8), min(rows // 4, 16))


def resident(work: Work, tile: Tiles, shared_memory: int) -> int:
    """Programs that a multiprocessor runs at a time: 8 warps of 255 registers fill it."""
    queries = 2 * tile.rows * tile.channels  # for the prompt, and again for the entries
    tokens = tile.keys + tile.tokens * (1 + tile.held)
    used = (queries + tokens * (tile.channels + tile.features)) * work.itemsize
    return max(min(8 // tile.warps, shared_memory // used), 1)


def programs(work: Work, rows: int, multiprocessors: int, resident: int) -> int:
    """Programs of a launch on a device whose multiprocessors run `resident` of them at a time.

    Each takes an equal share of all tiles of `rows` queries and reads K and V of every head that it meets:
    so there are as few as take no longer than one for every place. But most places get one, since those
    without move no bytes, and better a whole number for each head, since then none meets two.
    """
    heads = work.batch * work.heads
    steps = heads * -(-work.queries // rows)
    places = resident * multiprocessors
    # Programs of two tiles could meet on one multiprocessor, while the device hands out single tiles evenly.
    if steps <= (places if resident == 1 else 3 * places // 2):
        return max(steps, 1)
    fewest = max(-(-steps // -(-steps // places)), -(-9 * places // 10))
    of_heads = up(fewest, heads)
    return of_heads if of_heads <= places else fewest


# ---- tiles that were measured -----------------------------------------------------------------------

VERSION = 3  # of a table: another one for another format, or when tiles mean something else to the kernel


class Key(NamedTuple):
    """All that tiles of a table depend on besides the device, and so all that a row's bits may."""

    itemsize: int
    dim: int
    keys: int  # of the prompt, rounded up to 8, the finest step of tiles
    longest: int  # concept, the same; 8 without concepts


class Tuned(NamedTuple):
    """An entry of a table."""

    key: Key
    tiles: Tiles
    resident: int  # programs that a multiprocessor is taken to run at a time


def key_of(work: Work) -> Key:
    return Key(work.itemsize, work.dim, up(work.keys, 8), up(work.longest, 8))


def flaw(entry: Tuned) -> str | None:
    """The field for which there is no kernel, a wrong one, or none that is ever looked up."""
    key, t, _ = entry
    least_keys, least_tokens = key.keys if t.kept else 8, 8 if t.streamed else key.longest
    bad = {
        "key.itemsize": key.itemsize not in (2, 4),
        "key.dim": key.dim < 16 or key.dim % 8,
        "key.keys": key.keys < 8 or key.keys % 8,
        "key.longest": key.longest < 8 or key.longest % 8,
        "tiles.rows": t.rows < 16 or t.rows & (t.rows - 1),
        "tiles.keys": t.keys < least_keys or t.keys % 8,
        "tiles.tokens": t.tokens < least_tokens or t.tokens % 8,
        "tiles.channels": t.channels < key.dim or t.channels % 16,
        "tiles.features": t.features < key.dim or t.features % 8,
        "tiles.warps": t.warps < 1 or t.warps & (t.warps - 1),
        "tiles.held": not 0 <= t.held <= 4 or (t.held > 0 and t.streamed),
        "resident": entry.resident < 1,
    }
    return next((field for field, is_bad in bad.items() if is_bad), None)


def load_table(path: str | Path, machine: Mapping[str, str]) -> dict[Key, Tuned]:
    """The table that `python -m benchmarks.tune` wrote on such a machine.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such table, names another machine, or has an entry that no kernel can have.
    """
    try:
        table = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(table, dict) or not isinstance(table.get("entries"), list):
        raise ValueError(f"{path}: entries is missing or no list: not a table of tiles")
    for field, here in {"version": VERSION, **machine}.items():
        if table.get(field) != here:
            raise ValueError(f"{path}: {field} is {table.get(field)!r}, here it is {here!r}: tune again")
    found: dict[Key, Tuned] = {}
    for number, values in enumerate(table["entries"]):
        where = f"{path}: entries[{number}]"
        entry: Tuned = _read(Tuned, values, where)
        if (field := flaw(entry)) is not None:
            raise ValueError(f"{where}.{field} is impossible: {entry}")
        if entry.key in found:
            raise ValueError(f"{where}.key is there twice: {entry.key}")
        found[entry.key] = entry
    return found


def _read(kind: Any, value: Any, where: str) -> Any:
    """A number, or a NamedTuple of JSON's object; what else is in it is for people."""
    if kind in (int, bool):
        if type(value) is not kind:
            raise ValueError(f"{where} is {value!r}, not of type {kind.__name__}")
        return value
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {value!r}, not an object")
    hints = get_type_hints(kind)
    return kind(*(_read(hints[field], value.get(field), f"{where}.{field}") for field in kind._fields))
