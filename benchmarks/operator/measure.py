# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing, ratios with bootstrap intervals, what a call needs at least, and its gates."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastnegate import explain, negated_attention_with_statistics

from .cases import Case

ROUNDS, WARM = 21, 3  # measured ones, and ones before that do not count


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios with a 95 % bootstrap interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


Clock = Callable[[Callable[[], object]], float]  # runs a call, returns its seconds


def wall(call: Callable[[], object]) -> float:
    """Seconds that a call takes on this thread."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Rounds:
    """Calls that are timed in turn: in each round every call runs once, in changing order, so that noise
    and clock changes meet all of them. `times` holds the seconds of each call in each round."""

    def __init__(self, calls: Mapping[str, Callable[[], object]], clock: Clock = wall) -> None:
        self.times: dict[str, list[float]] = {name: [] for name in calls}
        self._calls = dict(calls)
        self._clock = clock
        self._order = random.Random(0)

    def run(self) -> None:
        """One more round."""
        names = list(self._calls)
        self._order.shuffle(names)
        for name in names:
            self.times[name].append(self._clock(self._calls[name]))


def interleave(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    warm: int = WARM,
    clock: Clock = wall,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each call in each of `rounds` rounds, after some that do not count."""
    timed = Rounds(calls, clock)
    for _ in range(warm + rounds):
        timed.run()
        on_round()
    return {name: times[warm:] for name, times in timed.times.items()}


def ratio(numerator: Sequence[float], denominator: Sequence[float], draws: int = 2000) -> Ratio:
    """Ratio of paired times: median and bootstrap interval over the pairs."""
    pairs = [a / b for a, b in zip(numerator, denominator)]
    pick = random.Random(0)
    medians = sorted(statistics.median(pick.choices(pairs, k=len(pairs))) for _ in range(draws))
    return Ratio(statistics.median(pairs), medians[int(0.025 * draws)], medians[int(0.975 * draws)])


def useful_operations(case: Case) -> int:
    """Floating-point operations of the products and sums that the result needs, a multiply-add counting
    as 2. Per query and head, with M prompt tokens and D channels:

    - the prompt's attention, Q K^T and P V: 4 M D;
    - each entry of T tokens: 4 T D for its attention F, and 2 D to add it to the output;
    - where the rule measures or projects: 4 D per entry for <Z,F> and <F,F>, and 2 D for <Z,Z>;
    - where it has a norm: 2 D for that of Y, 2 D for that of Z unless it is <Z,Z>, D to scale;
    - a blend: 2 D.

    This is the shortest way for concepts of three and more tokens: through Gram matrices an entry takes
    6 T D + 2 T^2 instead of 4 T D + 6 D, and a kernel that finds them faster all the same is credited
    with no more. Exponentials, maxima, softmax sums, scalars per query and packing are not counted, nor
    is what a kernel does twice.
    """
    _, heads, queries, keys, dim = case.sizes
    rule = case.rule
    moments = rule.similarity == "cosine" or rule.direction in ("projection", "orthogonal")
    total = 0
    for lengths in case.lengths:
        channels = 4 * keys  # operations per channel
        if lengths:
            channels += sum(4 * tokens + 2 + 4 * moments for tokens in lengths) + 2 * moments
            if rule.norm != "none":
                channels += 3 if moments and rule.norm_order == 2 else 5
            channels += 2 * (rule.blend != 1.0)
        total += heads * queries * channels * dim
    return total


def compulsory_bytes(case: Case) -> int:
    """Bytes that must move at least: queries, keys and values read once, the output written once."""
    tensors = [case.query, case.query, case.key, case.value]
    if case.tokens is not None:
        tensors += [case.tokens.key, case.tokens.value]
    return sum(t.numel() * t.element_size() for t in tensors)


def row(
    case: Case, times: Mapping[str, Sequence[float]], peaks: Sequence[float], copy: float
) -> dict[str, Any]:
    """One row of a report. Operations are counted as if no block could be skipped.

    Args:
        times: seconds of `fused` and of its baselines, in interleaved rounds.
        peaks: FMA peaks measured before and after, operations per second.
        copy: bytes per second of a copy.
    """
    gates = largest_gates(case)
    fused = times["fused"]
    seconds = statistics.median(fused)
    flops, bytes_ = useful_operations(case) / seconds, compulsory_bytes(case) / seconds
    others = {name: t for name, t in times.items() if name != "fused"}
    return {
        "case": case.name,
        "choice": explain(case.query, case.key, case.value, case.tokens, case.rule),
        "open_gates": open_share(gates),
        "skipped_blocks": skipped_blocks(gates),
        "fused_ms": 1e3 * seconds,
        "fused_gflops": flops / 1e9,
        "peak_gflops": [peak / 1e9 for peak in peaks],
        "share_of_peak": flops / statistics.mean(peaks),
        "fused_gbytes": bytes_ / 1e9,
        "share_of_copy": bytes_ / copy,
        "baseline_ms": {name: 1e3 * statistics.median(t) for name, t in others.items()},
        "fused_over": {name: vars(ratio(fused, t)) for name, t in others.items()},
        "seconds": dict(times),
    }


# ---- gates ------------------------------------------------------------------------------------


def largest_gates(case: Case) -> Tensor:
    """The largest gate of each negated row, head and query, [rows, heads, N]; without concepts, one that
    is open. For scope `feature`, whose gates are for all heads, heads is 1."""
    if not any(case.rows):
        return torch.ones(1, 1, case.query.shape[2])
    assert case.tokens is not None
    heads = [slice(h, h + 1) for h in range(case.query.shape[1])]  # `heat` is the mean over heads
    found = []
    for head in heads if case.rule.scope == "head" else [slice(None)]:
        tokens = replace(case.tokens, key=case.tokens.key[:, head], value=case.tokens.value[:, head])
        prompt = (t[:, head] for t in (case.query, case.key, case.value))
        _, stats = negated_attention_with_statistics(*prompt, tokens, case.rule)
        found.append(torch.stack([stats.heat[r.start : r.stop].amax(0) for r in case.rows if r]))
    return torch.stack(found, 1)


def open_share(gates: Tensor) -> float:
    """Share of queries with an open gate, whose work cannot be skipped."""
    return float((gates > 0).float().mean())


def skipped_blocks(gates: Tensor, block: int = 32) -> float:
    """Share of blocks of adjacent queries of one head in which no gate is open."""
    blocks = [(part > 0).any(-1) for part in gates.split(block, -1)]
    return 1 - float(torch.stack(blocks, -1).float().mean())
