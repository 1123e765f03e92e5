# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernel moves and computes on layers of real models, counted, and how long GPUs would take
for it by a model. Nothing in this report is measured: the column for that is empty.

Counts are those of the kernel as it is compiled for compute capability 8.0, to the last byte and operation
(tests compare them with a simulation). A modelled time is the largest of three, or, as if nothing
overlapped, their sum: bytes over bandwidths, matrix instructions and exponentials over their rates; the
latter two on the busiest multiprocessor. Latencies, launches, all other instructions and sectors that are
used in part are left out, so real times are longer.

cold: queries, keys and values come from DRAM once, everything that is read again from the L2 cache.
warm: queries too come from the L2 cache, where the projection before the layer left them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

from fastnegate.triton_kernels.tiles import Tiles, Work, programs, resident, tiles, up

from fastnegate.operator.rule import Rule

from .operator.cases import CONCEPTS, LAYERS, METHODS, Concepts, Layer
from .tables import table

HALF = 2  # bytes of a bfloat16 or a float16
FILLED = 0.9  # share of the multiprocessors that a grid should cover
MOST_BYTES = 1.35  # of what must move, from N = 1024 on
MOST_TIME = {"cold": 1.10, "warm": 1.30}  # of the time without negation, for 4 concepts of 8 tokens
LARGE = 1024  # queries from which on these hold


# ---- counting ---------------------------------------------------------------------------------


class Counts(NamedTuple):
    """What one launch does. Bytes are those that programs ask for; operations include those on padding."""

    query: int
    key: int
    value: int
    concept_key: int
    concept_value: int
    sums_read: int  # tables over which heads are summed
    sums_written: int
    out: int
    multiplies: int  # floating-point operations of matrix instructions, a multiply-add counting as 2
    exponentials: int

    @property
    def asked(self) -> int:
        """All bytes."""
        return sum(self[:-2])


def count(
    work: Work, tile: Tiles, loads: Sequence[int], rule: Rule, lengths: Sequence[Sequence[int]]
) -> list[Counts]:
    """Counts of each launch of a call, for tensors of 16 bit.

    Args:
        loads: how often programs load the prompt of a head, if that fits one tile, and the entries they
            hold: of each batch row (`heads_met`).
        lengths: tokens of each entry of each batch row, all of which exist.
    """
    row = work.heads * work.dim * work.itemsize  # bytes of a query, key or value of all heads
    steps = -(-work.queries // tile.rows)
    query = row * work.batch * work.queries
    token = work.dim * work.itemsize  # bytes of a key or value of a head
    key = token * work.keys * (sum(loads) if tile.kept else work.batch * work.heads * steps)
    held = sum(sum(n[: tile.held]) * met for n, met in zip(lengths, loads))
    concept = token * (held + sum(sum(n[tile.held :]) for n in lengths) * work.heads * steps)
    entries = sum(map(len, lengths))
    floats = 4 * work.heads * work.queries  # bytes of a number per head and query
    found = []
    launches = [*(rule.sums_over_heads if entries else ()), "output"]
    for goal in launches:
        read = written = 0
        if "moments" in launches and goal != "moments":
            read += _moments(rule) * entries * floats * work.heads
        if "norms" in launches and goal == "output":
            read += NORMS * work.batch * floats * work.heads
        if goal == "moments":
            written = _moments(rule) * entries * floats
        if goal == "norms":
            written = NORMS * work.batch * floats
        # Of a tile of queries of a head:
        multiplies = exponentials = 0
        for of_row in lengths:
            parts = [_attention(tile, tile.keys, work.keys, not tile.kept)]
            parts += [_attention(tile, tile.tokens, tokens, tile.streamed) for tokens in of_row]
            multiplies += sum(m for m, _ in parts)
            exponentials += sum(e for _, e in parts)
            exponentials += _per_row(tile) * _scalars(rule, goal, launches, len(of_row))
        multiplies, exponentials = (steps * work.heads * x for x in (multiplies, exponentials))
        out = query if goal == "output" else 0
        found.append(Counts(query, key, key, concept, concept, read, written, out, multiplies, exponentials))
    return found


def heads_met(work: Work, rows: int, programs: int) -> list[int]:
    """Heads of each batch row that programs, with equal shares of all tiles, meet: summed over programs."""
    steps = -(-work.queries // rows)
    shares = [work.batch * work.heads * steps * i // programs for i in range(programs + 1)]
    met = [0] * work.batch
    for begin, end in pairwise(shares):
        for head in range(begin // steps, -(-end // steps) if end > begin else 0):
            met[head // work.heads] += 1
    return met


NORMS = 2  # numbers per head and query of a batch row, in the table of sums
DEPTH = 16  # what a matrix instruction sums over at least
COLUMNS = 8  # of its result
LANES = 4  # of a warp that hold a row of a matrix instruction's result; each computes what the row needs


def _attention(tile: Tiles, size: int, tokens: int, streamed: bool) -> tuple[int, int]:
    """Operations and exponentials of a tile of queries that attends to tokens, in tiles of some size."""
    steps = -(-tokens // size) if streamed else 1
    columns = up(size, COLUMNS * _sharing(tile))
    multiplies = 2 * steps * tile.rows * (columns * tile.channels + up(size, DEPTH) * tile.features)
    # A running top costs an exponential per row and step.
    return multiplies, steps * (tile.rows * columns + streamed * _per_row(tile))


def _sharing(tile: Tiles) -> int:
    """Warps that share queries: each computes the scores of as many tokens as an instruction has columns, if
    need be of the same."""
    return tile.warps if tile.rows < 16 * tile.warps else 1


def _per_row(tile: Tiles) -> int:
    """Threads that compute what a row of a tile of queries needs once; warps that share 16 rows all do."""
    return LANES * tile.rows * _sharing(tile)


def _moments(rule: Rule) -> int:
    """Numbers per head and query of an entry, in the table of sums."""
    products = rule.similarity == "cosine" or rule.direction in ("orthogonal", "projection")
    return 3 * products + rule.reads.direction + (rule.similarity == "mass")


def _scalars(rule: Rule, goal: str, launches: Sequence[str], entries: int) -> int:
    """Exponentials of a query that the rule takes."""
    summed = "moments" in launches and goal != "moments"
    each = 2 if rule.similarity == "mass" and not summed else 0
    if goal == "moments":
        return entries * each
    each += 2 * (rule.select == "all") + (rule.gate == "sigmoid")
    return entries * each + 2 * (rule.combine == "joint" and entries > 0)


def compulsory(work: Work, tokens: int) -> int:
    """Bytes that must move at least: queries, keys, values and the packed concept tokens read once, the
    output written once."""
    of_batch = work.batch * (2 * work.queries + 2 * work.keys)
    return work.heads * work.dim * work.itemsize * (of_batch + 2 * tokens)


# ---- machines ---------------------------------------------------------------------------------


class Gpu(NamedTuple):
    """Rates per second at boost clock, dense, 16-bit products with float32 sums."""

    name: str
    multiprocessors: int
    shared_memory: int  # bytes that a program may have
    dram: float  # bytes
    cache: float | None  # bytes from the L2 cache; None: no source
    multiplies: float  # floating-point operations of matrix instructions
    exponentials: float
    sources: str
    of_warps: float = 1.0  # share of `multiplies` with instructions of single warps
    columns: int = 8  # of a matrix instruction


def _rate(multiprocessors: int, gigahertz: float, per_clock: int = 16) -> float:
    """16 exponentials per clock: compute capability 8.0 to 10.0, and CDNA3 (a quarter of 64 lanes)."""
    return multiprocessors * gigahertz * 1e9 * per_clock


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 108, 163 << 10, 2039e9, 5.4e12, 312e12, _rate(108, 1.41),
            "SXM 80 GB, data sheet and https://images.nvidia.com/aem-dam/en-zz/Solutions/data-center/"
            "nvidia-ampere-architecture-whitepaper.pdf; L2: microbenchmark [1]"),
        Gpu("H100", 132, 227 << 10, 3350e9, 9.7e12, 989e12, _rate(132, 1.83),
            "SXM5, data sheet and white paper, https://resources.nvidia.com/en-us-tensor-core; clock: at "
            "which 132 x 4096 operations are its peak; L2: microbenchmark [1] on H200, the same chip; "
            "mma.sync: 62.9 % of the peak, microbenchmark [2]", of_warps=0.629),
        Gpu("B200", 148, 227 << 10, 8000e9, None, 2250e12, _rate(148, 1.856),
            "HGX data sheet, https://resources.nvidia.com/en-us-blackwell-architecture; clock: at which "
            "148 x 8192 operations are its peak; L2: no source, left out, so these times are too short"),
        Gpu("RTX 4090", 128, 99 << 10, 1008e9, 5.2e12, 165.2e12, _rate(128, 2.52),
            "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf; "
            "L2: microbenchmark [1] on L40, the same chip"),
        Gpu("MI300X", 304, 64 << 10, 5300e9, 17.2e12, 1307.4e12, _rate(304, 2.1),
            "data sheet and https://www.amd.com/content/dam/amd/en/documents/instinct-tech-docs/white-papers/"
            "amd-cdna-3-white-paper.pdf; L2: peak of the Infinity Cache, the first cache that all chiplets "
            "share; exponentials: a quarter of 64 lanes, https://reviews.llvm.org/D81011", columns=16),
    )
}  # fmt: skip
NOTES = (
    "[1] gpu-l2-cache of https://github.com/te42kyfo/gpu-benches: what others measured with 20 to 25 MB.",
    "[2] https://arxiv.org/abs/2402.13499; applies to tiles that do not fill a warpgroup.",
    "16 exponentials per clock and multiprocessor: arithmetic instructions, "
    "https://docs.nvidia.com/cuda/cuda-c-programming-guide/.",
)


# ---- the model --------------------------------------------------------------------------------


class Times(NamedTuple):
    """Modelled seconds, with everything overlapped and with nothing."""

    largest: float
    sum: float


class Modelled(NamedTuple):
    """A call on a GPU."""

    tile: Tiles
    programs: int
    filled: float  # share of the multiprocessors that have a program
    once: float  # bytes of queries and outputs over those that must move
    again: float  # bytes of keys, values and sums over heads, over all bytes that must move
    bytes: float  # all bytes over those that must move
    multiplies: int
    exponentials: int
    cold: Times
    warm: Times


def model(work: Work, concepts: int, rule: Rule, gpu: Gpu) -> Modelled:
    """A call in which every batch row has the same entries, of `work.longest` tokens each."""
    tile = tiles(work, gpu.shared_memory, gpu.columns, gpu.multiprocessors)
    number = programs(work, tile.rows, gpu.multiprocessors, resident(work, tile, gpu.shared_memory))
    loads = heads_met(work, tile.rows, number)
    found = count(work, tile, loads, rule, [[work.longest] * concepts] * work.batch)
    return _model(work, concepts, gpu, tile, number, found, _busiest(work, tile, number, gpu.multiprocessors))


def ideal(work: Work, concepts: int, rule: Rule, gpu: Gpu) -> Modelled:
    """The same if there were registers and shared memory for everything: every warp with 16 queries of its
    own, no padding but that of matrix instructions, all tokens of the concepts kept, the work divided evenly,
    no more programs than a filled GPU needs, each with one head."""
    tile = tiles(work, gpu.shared_memory, gpu.columns, gpu.multiprocessors)
    tile = tile._replace(
        rows=128, keys=work.keys if tile.kept else tile.keys, tokens=work.longest, streamed=False,
        channels=work.dim, features=work.dim, warps=8, held=concepts,
    )  # fmt: skip
    number = max(math.ceil(FILLED * gpu.multiprocessors), work.batch * work.heads)
    loads = [number // work.batch] * work.batch
    loads[0] += number % work.batch
    found = count(work, tile, loads, rule, [[work.longest] * concepts] * work.batch)
    return _model(work, concepts, gpu, tile, number, found, 1.0)


def _model(
    work: Work, concepts: int, gpu: Gpu, tile: Tiles, number: int, found: Sequence[Counts], busiest: float
) -> Modelled:
    must = compulsory(work, work.longest * concepts)
    queries, outputs = (sum(getattr(c, name) for c in found) for name in ("query", "out"))
    moved = sum(c.asked for c in found)
    return Modelled(
        tile,
        number,
        min(1.0, number / gpu.multiprocessors),
        (queries + outputs) / (2 * outputs),
        (moved - queries - outputs) / must,
        moved / must,
        sum(c.multiplies for c in found),
        sum(c.exponentials for c in found),
        *(_times(found, gpu, tile, busiest, must, warm) for warm in (False, True)),
    )


def _times(found: Sequence[Counts], gpu: Gpu, tile: Tiles, busiest: float, must: int, warm: bool) -> Times:
    warpgroups = tile.warps >= 4 and tile.rows >= 16 * tile.warps
    rate = gpu.multiplies * (1.0 if warpgroups else gpu.of_warps)
    largest = total = 0.0
    for launch in found:
        fetched = launch.out  # from or to DRAM
        if launch is found[0]:  # later launches find everything in the L2 cache
            fetched += must - 2 * launch.query + (0 if warm else launch.query)
        parts = (
            max(fetched / gpu.dram, launch.asked / gpu.cache if gpu.cache else 0.0),
            busiest * launch.multiplies / rate,
            busiest * launch.exponentials / gpu.exponentials,
        )
        largest += max(parts)
        total += sum(parts)
    return Times(largest, total)


def _busiest(work: Work, tile: Tiles, number: int, multiprocessors: int) -> float:
    """Tiles of queries on the busiest multiprocessor over their mean."""
    steps = work.batch * work.heads * -(-work.queries // tile.rows)
    most = -(-number // multiprocessors) * -(-steps // number)
    return most * multiprocessors / steps


def work_of(layer: Layer, concepts: Concepts) -> Work:
    return Work(layer.batch, layer.heads, layer.queries, layer.keys, layer.dim, concepts.tokens, HALF)


# ---- bars -------------------------------------------------------------------------------------


class Bar(NamedTuple):
    """A promise, what the kernel does by count or by model, and what the ideal of its design would."""

    promise: str
    of: str
    value: float
    most: float
    ideal: float
    filled: float | None = None  # which has to be FILLED; None: of no concern here
    why: str = ""

    @property
    def verdict(self) -> str:
        if self.value <= self.most + 1e-9 and (self.filled is None or self.filled >= FILLED):
            return "pass"
        return "impossible" if self.ideal > self.most else "FAIL"


def bars() -> Iterator[Bar]:
    """What must hold."""
    none, small = CONCEPTS["none"], CONCEPTS["4x8"]
    gpus = GPUS["A100"], GPUS["H100"]
    large = [layer for layer in LAYERS.values() if layer.queries >= LARGE]
    protore = METHODS["protore"]

    def made(how: Any, layer: Layer, concepts: Concepts, gpu: Gpu, rule: Rule = protore) -> Modelled:
        return how(work_of(layer, concepts), concepts.count, rule, gpu)

    for method, rule in METHODS.items():
        sweeps = 1 + len(rule.sums_over_heads)
        once = max(made(model, layer, small, gpus[0], rule).once for layer in LAYERS.values())
        promise = f"bytes of queries and outputs over must, {sweeps} sweep{'s' * (sweeps > 1)}"
        yield Bar(promise, f"{method}, all layers", once, (sweeps + 1) / 2, (sweeps + 1) / 2)
    for gpu, layer, concepts in product(gpus, large, (none, small)):
        found, best = (made(how, layer, concepts, gpu) for how in (model, ideal))
        subject = f"{gpu.name} {layer.name} {concepts.name}"
        queries = layer.batch * layer.heads * layer.queries / gpu.multiprocessors
        why = f"{queries:.0f} queries a multiprocessor, {layer.keys}"
        why += f" + {concepts.count} x {concepts.tokens} tokens" if concepts.count else " tokens"
        yield Bar("all bytes over must", subject, found.bytes, MOST_BYTES, best.bytes, found.filled, why)
    for state, gpu, layer in product(MOST_TIME, gpus, large):
        if layer.name.startswith(("sd15-", "sdxl-")):
            found, best = (
                [getattr(made(how, layer, concepts, gpu), state) for concepts in (small, none)]
                for how in (model, ideal)
            )
            used = made(model, layer, small, gpu)
            why = f"tiles of {used.tile.rows} queries, {used.tile.held} of 4 concepts kept, "
            why += f"{used.programs} programs"
            for name in Times._fields:
                value, least = (getattr(a, name) / getattr(b, name) for a, b in (found, best))
                promise = f"modelled time of 4x8 over none, {state}, {name}"
                yield Bar(promise, f"{gpu.name} {layer.name}", value, MOST_TIME[state], least, None, why)


# ---- the report -------------------------------------------------------------------------------

HEAD = (
    "layer", "method", "concepts", "queries x programs", "filled", "Q+O", "K+V", "all",
    "GFLOP", "Mexp", "model cold us", "(sum)", "model warm us", "(sum)", "measured us",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roofline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gpus", nargs="+", choices=GPUS, default=[*GPUS])
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=[*LAYERS])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["protore", "nag"])
    parser.add_argument("--concepts", nargs="+", choices=CONCEPTS, default=["none", "4x8"])
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.json:
        options.json.touch()  # fails now rather than after the run
    rows, promises = [*_rows(options)], [*bars()]
    print(report(rows, promises))
    if options.json:
        found = {
            "model": [row | row["modelled"]._asdict() for row in rows],
            "bars": [bar._asdict() | {"verdict": bar.verdict} for bar in promises],
        }
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def _rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for gpu, layer, method, concepts in product(
        options.gpus, options.layers, options.methods, options.concepts
    ):
        if concepts == "none" and method != options.methods[0]:
            continue  # without concepts all methods are the same
        work = work_of(LAYERS[layer], CONCEPTS[concepts])
        found = model(work, CONCEPTS[concepts].count, METHODS[method], GPUS[gpu])
        yield {
            "gpu": gpu,
            "layer": layer,
            "method": "-" if concepts == "none" else method,
            "concepts": concepts,
            "modelled": found,
        }


def report(rows: Sequence[dict[str, Any]], promises: Sequence[Bar]) -> str:
    """Markdown."""
    parts = [
        "# Counted bytes and operations, modelled times",
        str(__doc__).strip(),
        "Q+O: bytes of queries and outputs over those that must move. K+V: bytes of keys and values, which "
        "every program of a head reads, and of sums over heads, over all bytes that must move. All: all "
        "bytes over that. 16-bit tensors, batch 2.",
    ]
    for name in dict.fromkeys(row["gpu"] for row in rows):
        gpu = GPUS[name]
        cache = f"{gpu.cache / 1e12:.1f}" if gpu.cache else "?"
        parts += [
            f"## {name} (model)",
            f"{gpu.multiprocessors} multiprocessors, {gpu.dram / 1e12:.2f} TB/s DRAM, {cache} TB/s L2, "
            f"{gpu.multiplies / 1e12:.0f} TFLOP/s, {gpu.exponentials / 1e12:.2f} T exponentials/s. "
            f"Sources: {gpu.sources}.",
            table(HEAD, [_cells(row) for row in rows if row["gpu"] == name]),
        ]
    parts += ["\n".join(NOTES), "## Bars", _bars(promises)]
    return "\n\n".join(parts)


def _cells(row: dict[str, Any]) -> list[str]:
    m: Modelled = row["modelled"]
    return [
        row["layer"], row["method"], row["concepts"],
        f"{m.tile.rows} x {m.programs}", f"{100 * m.filled:.0f} %",
        f"{m.once:.2f}", f"{m.again:.2f}", f"{m.bytes:.2f}",
        f"{m.multiplies / 1e9:.2f}", f"{m.exponentials / 1e6:.1f}",
        *(f"{1e6 * seconds:.1f}" for seconds in (*m.cold, *m.warm)),
        "",
    ]  # fmt: skip


def _bars(promises: Sequence[Bar]) -> str:
    verdicts = [bar.verdict for bar in promises]
    total = ", ".join(f"{verdicts.count(v)} {v}" for v in ("pass", "FAIL", "impossible"))
    body = [
        [
            *(bar.promise, bar.of, f"{bar.value:.3f}", f"{bar.most:.2f}", f"{bar.ideal:.3f}"),
            *("" if bar.filled is None else f"{100 * bar.filled:.0f} %", bar.verdict, bar.why),
        ]
        for bar in promises
    ]
    head = ["promise", "of", "value", "at most", "ideal", "filled", "verdict", ""]
    note = (
        "Impossible: the ideal, with registers and shared memory for everything, misses it, too. A ratio of "
        "times that is below the ideal's has more time without negation than the ideal takes."
    )
    return f"{total}. {note}\n\n" + table(head, body)


if __name__ == "__main__":
    sys.exit(main())
