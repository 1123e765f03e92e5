# SPDX-License-Identifier: Apache-2.0
"""Times other tilings of the Triton kernel than those that it chooses, on layers of real models, and writes a
table of the best. It is used where FASTNEGATE_TRITON_TILES names it, and only on the same kind of GPU.

Each tiling is first judged by the accuracy budget; one that fails is left out, with its reason in the table.
Calls are timed in graphs whose inputs rotate through more memory than the last cache has. The table is whole
after every key, and a second call with the same file does those that it lacks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fastnegate.triton_kernels import tiles as sizing
from fastnegate.triton_kernels.tiles import (
    VERSION,
    Key,
    Tiles,
    Tuned,
    Work,
    key_of,
    load_table,
    resident,
    tiles,
    up,
)
from torch import Tensor

from fastnegate.operator.backends import triton as backend
from fastnegate.operator.backends import unavailable
from fastnegate.operator.plan import Plan
from fastnegate.operator.problem import Problem
from fastnegate.testing import Judge, fair, make_problem, moved

from .gpu.card import Call, Card, CudaCard
from .gpu.step import first_line
from .gpu.steps.times import asked, inputs, problem_of
from .operator.cases import CONCEPTS, DTYPES, LAYERS, METHODS
from .operator.measure import interleave, ratio

ROUNDS, WARM, FEWEST = (
    101,
    5,
    7,
)  # measured rounds, ones before that do not count, and fewest where time is short
SHAPES = (  # rows, warps
    *((32, 2), (64, 4), (128, 8)),  # a warp has 16 rows to itself
    *((16, 2), (16, 4), (16, 8), (32, 4), (32, 8)),  # warps share them
)
TILES = (32, 64)  # tokens of a text that is taken tile by tile
QUERIES = 250  # of a problem that is judged: the last tile is not full
TUNED_METHODS, TUNED_CONCEPTS = ("protore", "nag"), ("none", "4x8", "1x77")
LATE, WRONG = "no time left", "wrong"  # how reasons begin why a tiling is left out


class Timing(NamedTuple):
    """A call that is timed."""

    layer: str
    dtype: str
    method: str
    concepts: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 1 if a tiling is wrong or a default fails, 2 if nothing could
    be run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=[*LAYERS])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="most of a comparison")
    parser.add_argument("--minutes", type=float, default=60.0, help="of the whole command")
    parser.add_argument("--out", type=Path, metavar="FILE", required=True)
    parser.set_defaults(methods=TUNED_METHODS, concepts=TUNED_CONCEPTS)
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: must be >= 1")
    if not 0 < options.minutes <= 24 * 60:
        parser.error(f"--minutes {options.minutes:g}: must be above 0 and at most {24 * 60}")
    if options.out.is_dir() or not options.out.resolve().parent.is_dir():
        parser.error(f"--out {options.out}: must be a file in a folder that exists")
    reason = "torch finds no GPU on this machine" if not torch.cuda.is_available() else unavailable("triton")
    if reason is not None:
        print(f"tune: {reason}; nothing was run", file=sys.stderr)
        return 2
    try:
        with torch.inference_mode():
            return run(options, CudaCard())
    except ValueError as error:  # the file is no table of this machine
        print(f"tune: {error}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace, card: Card) -> int:
    """Tune for every key that the table lacks; returns the exit status.

    Raises:
        ValueError: the file exists and is no table of this machine.
    """
    machine = backend.machine(card.device)
    entries: list[dict[str, Any]] = []
    if options.out.exists():
        load_table(options.out, machine)
        entries = json.loads(options.out.read_text())["entries"]
    table = {"version": VERSION, **card.facts(), **machine, "entries": entries}
    missing = {
        key: of for key, of in by_key(options).items() if key._asdict() not in [e["key"] for e in entries]
    }
    end, failed = time.monotonic() + 60 * options.minutes, False
    for number, (key, timings) in enumerate(missing.items()):
        left = end - time.monotonic()
        if left <= 0:
            print(f"tune: {len(missing) - number} keys are left: run it again", flush=True)
            break
        try:
            entry = tune(
                key, timings, card, options.rounds, time.monotonic() + left / (len(missing) - number)
            )
        except Exception as error:  # of the default: the other keys are worth having
            print(f"{key}: {first_line(error)}", flush=True)
            failed = True
            card.synchronize()  # raises again if the device is lost
            continue
        entries.append(entry)
        _write(options.out, table)
        wrong = [reason for reason in entry["dropped"].values() if reason.startswith(WRONG)]
        failed |= bool(wrong)
        said = f"{entry['ratio']:.3f} of the default's time, {len(entry['dropped'])} tilings left out"
        print(f"{key}: {said}", *wrong, sep="\n  ", flush=True)
    return int(failed)


def _write(path: Path, table: Mapping[str, Any]) -> None:
    new = path.with_name(f".{path.name}")
    new.write_text(json.dumps(table, indent=1) + "\n")
    new.replace(path)


def by_key(options: argparse.Namespace) -> dict[Key, list[Timing]]:
    """The calls that are timed; calls of one key get the same tiles."""
    found: dict[Key, list[Timing]] = {}
    for timing in map(
        Timing._make, product(options.layers, options.dtypes, options.methods, options.concepts)
    ):
        if timing.concepts == "none" and timing.method != options.methods[0]:
            continue  # without concepts all methods are the same
        layer, dtype = LAYERS[timing.layer], DTYPES[timing.dtype]
        longest = CONCEPTS[timing.concepts].tokens
        work = Work(1, layer.heads, layer.queries, layer.keys, layer.dim, longest, dtype.itemsize)
        found.setdefault(key_of(work), []).append(timing)
    return found


def tune(key: Key, timings: Sequence[Timing], card: Card, rounds: int, until: float) -> dict[str, Any]:
    """An entry of the table, made until a time of time.monotonic(): then what is left is left out."""
    # Layers that differ in B, H and N alone run the same kernels: they are judged once.
    calls = dict.fromkeys((LAYERS[t.layer].keys, t.dtype, t.method, t.concepts) for t in timings)
    facts = backend._device_facts(torch.empty(0, device=card.device))
    choices = candidates(key, *facts)
    default = named(choices[0])
    begun = time.monotonic()
    judges = [judge(key.dim, *call) for call in calls]
    dropped = screen(choices, judges, card, begun + 0.5 * (until - begun))
    kept = {named(c): c for c in choices if c.tiles not in dropped}
    first, late = timed(timings, kept, card, rounds, begun + 0.8 * (until - begun))
    means = ranked(first)
    # Timed anew: of many that are as fast, the one that seemed to be the fastest was lucky.
    two = {name: kept[name] for name in (default, next(iter(means)))}
    times, _ = timed(timings, two, card, rounds, until)
    best, mean = next(iter(ranked(times).items()))
    return {
        "key": key._asdict(),
        "tiles": kept[best].tiles._asdict(),
        "resident": kept[best].resident,
        "default": default,
        "ratio": mean,
        "ratios": {call: vars(ratio(of[best], of[default])) for call, of in times.items()},
        "timed": means,
        "dropped": {named(Tuned(key, t, 1)): reason for t, reason in dropped.items()} | late,
    }


# ---- tilings ----------------------------------------------------------------------------------


def candidates(key: Key, shared_memory: int, columns: int, multiprocessors: int) -> list[Tuned]:
    """The default, then tilings of all shapes that cut the prompt or the concepts as it does."""
    work = Work(1, 1, 1, key.keys, key.dim, key.longest, key.itemsize)
    usual = tiles(work, shared_memory, columns, multiprocessors)
    found, half = [usual], key.itemsize == 2
    if usual.held:
        found += [usual._replace(held=held) for held in (0, 2)]
    for rows, warps in SHAPES:
        wide = half and rows == 16 * warps
        unit = columns if wide else 16
        keys, longest = up(key.keys, unit), up(key.longest, unit)
        features = usual.features
        if half:
            features = up(key.dim, columns) if wide else sizing.shared(key.dim, rows, warps)
        prompts = [(keys, True)] * half  # in float32 operands lie in registers: no room for a whole prompt
        sizes = {min(up(n, unit), keys) for n in (usual.keys, *TILES)}
        prompts += [(n, False) for n in sorted(sizes) if n < keys or not half]
        texts = {(min(up(n, unit), longest), up(n, unit) < longest) for n in (usual.tokens, *TILES, longest)}
        for (size, kept), (tokens, streamed) in product(prompts, sorted(texts)):
            same_prompt = kept == usual.kept and (kept or size == usual.keys)
            same_text = streamed == usual.streamed and (not streamed or tokens == usual.tokens)
            held = 0 if streamed else usual.held
            t = Tiles(rows, size, kept, tokens, streamed, usual.channels, features, warps, held)
            if (same_prompt or same_text) and shared_bytes(t, key.itemsize) <= shared_memory:
                found.append(t)
    at_a_time = {t: resident(work, t, shared_memory) for t in found}
    return [Tuned(key, t, k) for t, n in at_a_time.items() for k in dict.fromkeys((n, 2 * n, -(-n // 2)))]


def shared_bytes(t: Tiles, itemsize: int) -> int:
    """At most, of a program: Q for the prompt and again for the entries, K and V of both or of one tile."""
    tokens = t.keys + t.tokens if t.kept else max(t.keys, t.tokens)
    tokens += t.held * t.tokens
    return itemsize * (2 * t.rows * t.channels + tokens * (t.channels + t.features))


def named(tuned: Tuned) -> str:
    numbers = {**tuned.tiles._asdict(), "resident": tuned.resident}
    return ", ".join(f"{name} {int(number)}" for name, number in numbers.items())


# ---- accuracy ---------------------------------------------------------------------------------


def judge(dim: int, keys: int, dtype: str, method: str, concepts: str) -> Judge:
    """Of a problem that runs the same kernels as the calls that are timed."""
    count, tokens = CONCEPTS[concepts].count, CONCEPTS[concepts].tokens

    def problem(seed: int) -> Problem:
        made = make_problem(
            2, 2, QUERIES, keys, dim, DTYPES[dtype], rule=METHODS[method], rows="same", layout="bnhd",
            concept_lengths=(tokens,) * count or (1,), extras=False, seed=seed,
        )  # fmt: skip
        return made if count else replace(made, concepts=None)

    return fair(problem(seed) for seed in range(9))


def screen(choices: Sequence[Tuned], judges: Iterable[Judge], card: Card, until: float) -> dict[Tiles, str]:
    """Tiles that are wrong, not compiled or not loaded, or spill more than the first, the default's; and why.
    The default itself must be right: what it raises is raised."""
    default = choices[0]
    dropped: dict[Tiles, str] = {}
    for judged in judges:
        problem, most = moved(judged.problem, card.device), 0
        for choice in choices:
            if choice.tiles in dropped:
                continue
            if choice is not default and time.monotonic() > until:
                dropped[choice.tiles] = LATE
                continue
            plan = backend.plan(problem, False, choice)
            try:
                judged.check(output_of(problem, plan).cpu(), named(choice))
            except Exception as error:  # whatever a compiler may raise
                if choice is default:
                    raise
                wrong = f"{WRONG}: " if isinstance(error, AssertionError) else ""
                dropped[choice.tiles] = wrong + first_line(error)
                card.synchronize()  # raises again if the device is lost
                continue
            spills = max(kernel.n_spills for kernel in plan.launch.compiled.values())
            if choice is default:
                most = spills
            if spills > most:
                dropped[choice.tiles] = f"spills {spills} registers, the default {most}"
    return dropped


def output_of(problem: Problem, plan: Plan) -> Tensor:
    return plan.run(*problem.operands)[0]


# ---- time -------------------------------------------------------------------------------------

Times = Mapping[str, Mapping[str, Sequence[float]]]  # seconds by call and tiling


def timed(
    timings: Sequence[Timing], choices: Mapping[str, Tuned], card: Card, rounds: int, until: float
) -> tuple[Times, dict[str, str]]:
    """Of every call as many rounds, up to `rounds`, as there is time for; and tilings that could not be timed
    on each, with the reason. The first, the default, must be."""
    found: dict[str, dict[str, list[float]]] = {}
    dropped: dict[str, str] = {}
    for number, timing in enumerate(timings):
        share = (until - time.monotonic()) / (len(timings) - number)
        end = time.monotonic() + share
        cases = inputs(LAYERS[timing.layer], timing.concepts, card, timing.method, timing.dtype)
        problems = [problem_of(case) for case in cases]
        timers: dict[str, Call] = {}
        for name, choice in choices.items():
            if name in dropped:
                continue
            if timers and time.monotonic() > end - share / 2:
                dropped[name] = LATE
                continue
            plan = backend.plan(problems[0], False, choice)
            try:
                timers[name] = card.timer([partial(output_of, problem, plan) for problem in problems])
            except Exception as error:
                if not timers:
                    raise
                dropped[name] = first_line(error)
                card.synchronize()
        begun = time.monotonic()
        interleave(timers, 1, 0, asked)
        one = max(time.monotonic() - begun, 1e-9)
        many = min(max(int((end - time.monotonic()) / one) - WARM, FEWEST), rounds)
        found[" ".join(timing)] = interleave(timers, many, WARM, asked)
    whole = {
        call: {name: of for name, of in times.items() if name not in dropped} for call, times in found.items()
    }
    return whole, dropped


def ranked(times: Times) -> dict[str, float]:
    """Times of each tiling over those of the first, the default: the geometric mean over the calls, the
    least first; of equal ones the default."""
    means = {}
    for name in next(iter(times.values())):
        pairs = [zip(of[name], next(iter(of.values()))) for of in times.values()]
        means[name] = statistics.geometric_mean(statistics.median(a / b for a, b in p) for p in pairs)
    return dict(sorted(means.items(), key=lambda item: item[1]))


if __name__ == "__main__":
    sys.exit(main())
