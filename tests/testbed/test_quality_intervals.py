# SPDX-License-Identifier: Apache-2.0
"""Intervals of shares against published examples, against exact sums, and where they must be exact."""

from __future__ import annotations

from itertools import product
from math import comb, sqrt

import numpy as np
import pytest

pytest.importorskip("diffusers")

from fastnegate.testbed.quality.intervals import Share, Z, difference, share


def pairs(both: int, only_after: int, only_before: int, neither: int) -> tuple[list[bool], list[bool]]:
    """Outcomes after and before, of so many cases each."""
    table = (
        (True, True, both),
        (True, False, only_after),
        (False, True, only_before),
        (False, False, neither),
    )
    rows = [(after, before) for after, before, count in table for _ in range(count)]
    return [after for after, _ in rows], [before for _, before in rows]


@pytest.mark.parametrize(
    ("true", "of", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998) 857, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_a_share_has_the_published_interval(true: int, of: int, low: float, high: float) -> None:
    found = share([True] * true + [False] * (of - true))
    assert found.value == true / of and found.cases == of
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)


def test_the_ends_of_a_share_are_where_its_score_test_turns() -> None:
    """|p - π| = z √(π (1 - π) / n) at both ends, which is what Wilson's formula solves."""
    for true, of in ((3, 17), (30, 32), (1, 2)):
        found = share([True] * true + [False] * (of - true))
        for end in (found.low, found.high):
            assert abs(found.value - end) == pytest.approx(Z * sqrt(end * (1 - end) / of), rel=1e-12)


def test_a_share_of_all_or_none_reaches_the_end_exactly() -> None:
    assert share([True] * 32).high == 1.0 and share([False] * 32).low == 0.0
    assert share([]) == Share(0.0, 0.0, 1.0, 0) and difference([], []) == Share(0.0, -1.0, 1.0, 0)


def test_a_difference_has_the_published_interval() -> None:
    """Newcombe, Statistics in Medicine 17 (1998) 2635, method 10: 36, 12, 2 and 0 of 50 pairs."""
    found = difference(*pairs(36, 12, 2, 0))
    assert found.value == 0.2
    assert (round(found.low, 4), round(found.high, 4)) == (0.0569, 0.3404)


@pytest.mark.parametrize("table", [(3, 9, 4, 1), (20, 5, 8, 1), (2, 30, 1, 4), (60, 3, 2, 40)])
def test_a_difference_is_what_the_formula_says(table: tuple[int, int, int, int]) -> None:
    """With Wilson's ends as roots of his quadratic equation, and the correlation as numpy has it."""
    after, before = pairs(*table)
    n, (a, b, c, d) = len(after), table
    ends = []
    for p in (np.mean(after), np.mean(before)):
        ends.append((p, *sorted(np.roots([1 + Z**2 / n, -2 * p - Z**2 / n, p**2]))))
    (p, low, high), (q, lowest, highest) = ends
    phi = np.corrcoef(after, before)[0, 1]
    if a * d > b * c:
        phi *= max(a * d - b * c - n / 2, 0) / (a * d - b * c)
    down = (p - low) ** 2 - 2 * phi * (p - low) * (highest - q) + (highest - q) ** 2
    up = (high - p) ** 2 - 2 * phi * (high - p) * (q - lowest) + (q - lowest) ** 2
    found = difference(after, before)
    assert (found.low, found.high) == pytest.approx((p - q - sqrt(down), p - q + sqrt(up)), rel=1e-9)


def test_a_difference_the_other_way_round_is_its_mirror_image() -> None:
    for table in product((0, 1, 5), repeat=4):
        if sum(table):
            after, before = pairs(*table)
            one, other = difference(after, before), difference(before, after)
            assert (one.value, one.low, one.high) == pytest.approx((-other.value, -other.high, -other.low))
            assert -1 <= one.low <= one.value <= one.high <= 1


def test_intervals_hold_what_they_promise() -> None:
    """Of all outcomes of 40 cases, by their exact probabilities: close to 95 %, by the mean over rates."""
    cases, rates = 40, np.linspace(0.05, 0.95, 19)
    found = [share([True] * k + [False] * (cases - k)) for k in range(cases + 1)]
    covered = [
        sum(
            comb(cases, k) * p**k * (1 - p) ** (cases - k)
            for k, s in enumerate(found)
            if s.low <= p <= s.high
        )
        for p in rates
    ]
    assert 0.94 < np.mean(covered) < 0.97 and min(covered) > 0.9


def test_differences_hold_what_they_promise() -> None:
    rng = np.random.default_rng(0)
    for before, more, less in ((0.05, 0.9, 0.02), (0.5, 0.3, 0.3), (0.95, 0.5, 0.1)):
        truth, hits = (1 - before) * more - before * less, 0
        for _ in range(200):
            plain = rng.random(48) < before
            after = np.where(plain, rng.random(48) >= less, rng.random(48) < more)
            found = difference(after.tolist(), plain.tolist())
            hits += found.low <= truth <= found.high
        assert 0.91 <= hits / 200 <= 0.995


def test_a_difference_needs_pairs() -> None:
    with pytest.raises(ValueError, match="after and before have 2 and 1 outcomes"):
        difference([True, False], [True])
