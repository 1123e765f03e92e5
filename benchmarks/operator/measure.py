# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing, ratios with bootstrap intervals, and the useful operations of a call."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from .cases import Case


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios with a 95 % bootstrap interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def interleave(
    calls: Mapping[str, Callable[[], Tensor]], rounds: int, warm: int = 3
) -> dict[str, list[float]]:
    """Seconds of each call in each round; within a round every call runs once, in changing order, so
    that noise and clock changes meet all of them."""
    order = random.Random(0)
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(-warm, rounds):
        order.shuffle(names)
        for name in names:
            start = time.perf_counter()
            calls[name]()
            elapsed = time.perf_counter() - start
            if i >= 0:
                times[name].append(elapsed)
    return times


def ratio(numerator: Sequence[float], denominator: Sequence[float], draws: int = 2000) -> Ratio:
    """Ratio of paired times: median and bootstrap interval over the pairs."""
    pairs = [a / b for a, b in zip(numerator, denominator)]
    pick = random.Random(0)
    medians = sorted(statistics.median(pick.choices(pairs, k=len(pairs))) for _ in range(draws))
    return Ratio(statistics.median(pairs), medians[int(0.025 * draws)], medians[int(0.975 * draws)])


def useful_operations(case: Case) -> int:
    """Floating-point operations that the arithmetic needs, a multiply-add counting as 2.

    Plain attention: Q K^T and P V, 4 M D per query and head. A concept of T tokens: 4 T D for its
    attention, and per entry 2 D for each of <Z,F>, <F,F> and the mixing; per query <Z,Z> and, with a
    norm, two norms at 2 D each. Exponentials, maxima and scalars are not counted.
    """
    batch, heads, queries, keys, dim = case.sizes
    per_query = 4 * keys * dim
    if case.tokens is not None:
        per_row = case.tokens.entries // batch
        per_query += 4 * (case.tokens.tokens // case.tokens.concepts) * dim * per_row
        per_query += 3 * 2 * dim * per_row + 2 * dim
        per_query += 0 if case.rule.norm == "none" else 4 * dim
    return batch * heads * queries * per_query


def compulsory_bytes(case: Case) -> int:
    """Bytes that must move at least: queries, keys and values read once, the output written once."""
    tensors = [case.query, case.query, case.key, case.value]
    if case.tokens is not None:
        tensors += [case.tokens.key, case.tokens.value]
    return sum(t.numel() * t.element_size() for t in tensors)
