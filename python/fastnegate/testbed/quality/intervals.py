# SPDX-License-Identifier: Apache-2.0
"""Intervals of 95 % for shares of cases, and for differences of shares of the same cases."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import NamedTuple

Z = 1.959963984540054
"""The 97.5 % point of the normal distribution."""


class Share(NamedTuple):
    """A share in [0, 1], or a difference of two in [-1, 1], and its interval.

    Attributes:
        value: what was found.
        low, high: the interval.
        cases: how many it is of; of none, the value is 0 and the interval is everything.
    """

    value: float
    low: float
    high: float
    cases: int


def share(outcomes: Sequence[bool]) -> Share:
    """The share of outcomes that are true, with Wilson's score interval (1927): with p = k / n,

    (p + z² / 2n ± z √(p (1 - p) / n + z² / 4n²)) / (1 + z² / n)
    """
    n = len(outcomes)
    if not n:
        return Share(0.0, 0.0, 1.0, 0)
    p = sum(outcomes) / n
    middle, stretch = p + Z * Z / (2 * n), 1 + Z * Z / n
    reach = Z * sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    # Exact where rounding would leave 0 or 1 just outside.
    low = 0.0 if p == 0 else (middle - reach) / stretch
    high = 1.0 if p == 1 else (middle + reach) / stretch
    return Share(p, low, high, n)


def difference(after: Sequence[bool], before: Sequence[bool]) -> Share:
    """Share of `after` minus share of `before`, of the same cases, with Newcombe's square-and-add interval
    for paired data (Statistics in Medicine 17, 1998, method 10): with Wilson's (l, u) of each share p, q,

        d - √((p - l_p)² - 2 φ (p - l_p) (u_q - q) + (u_q - q)²)   to
        d + √((u_p - p)² - 2 φ (u_p - p) (q - l_q) + (q - l_q)²)

    φ is the correlation of both outcomes, with n / 2 taken off its numerator where that is positive, but not
    below 0; and 0 where one of the outcomes is always the same. Unlike a bootstrap's, it has a width where no
    case has changed.

    Raises:
        ValueError: they are not of the same number of cases.
    """
    if len(after) != len(before):
        raise ValueError(f"after and before have {len(after)} and {len(before)} outcomes: must be as many")
    n = len(after)
    if not n:
        return Share(0.0, -1.0, 1.0, 0)
    p, q = share(after), share(before)
    both = sum(a and b for a, b in zip(after, before))
    only_after, only_before = sum(after) - both, sum(before) - both
    neither = n - both - only_after - only_before
    spread = sum(after) * (n - sum(after)) * sum(before) * (n - sum(before))
    numerator: float = both * neither - only_after * only_before
    if numerator > 0:
        numerator = max(numerator - n / 2, 0.0)
    phi = numerator / sqrt(spread) if spread else 0.0

    def reach(one: float, other: float) -> float:
        return sqrt(max(one * one - 2 * phi * one * other + other * other, 0.0))

    d = (only_after - only_before) / n
    low = d - reach(p.value - p.low, q.high - q.value)
    high = d + reach(p.high - p.value, q.value - q.low)
    return Share(d, max(low, -1.0), min(high, 1.0), n)
