# SPDX-License-Identifier: Apache-2.0
"""Softmax segments in Triton: what attention to some tokens leaves behind, and how two become one."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .rows import View, chosen, load_rows, pieces, rows_at, sum_of, width

LOG2E = tl.constexpr(1.4426950408889634)
HIGH = tl.constexpr(2955 / 2048)  # the first 12 bits of it
LOW = tl.constexpr(1.4426950408889634 - 2955 / 2048)
LN2 = tl.constexpr(0.6931471805599453)
TINY = tl.constexpr(1e-30)
LOWEST = tl.constexpr(-3e38)
LOWEST_LSE = tl.constexpr(-2e38)  # times log2(e) still a number


class Partial(NamedTuple):
    """`fastnegate.Partial`."""

    out: View
    lse: View


class Attended(NamedTuple):
    """A softmax and what it selected: tuple [ROWS, channels], top and mass of the logits [ROWS]."""

    out: Any
    top: Any
    mass: Any


@triton.jit
def empty(ROWS: tl.constexpr, FEATURES: tl.constexpr):
    """A segment without tokens."""
    out = ()
    for i in tl.static_range(pieces(FEATURES)):
        out = out + (tl.zeros([ROWS, width(FEATURES, i)], tl.float32),)
    return Attended(out, tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32))


@triton.jit
def divide(x, y):
    """x / y to 2 ulp, and 0 where y < 1e-30: the operator's only epsilon."""
    small = y < TINY
    return tl.where(small, 0.0, x / tl.where(small, 1.0, y))


@triton.jit
def finite_top(top):
    """`top`, or 0 for an empty softmax, whose -inf may not be subtracted from itself."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def mass_share(top, mass, entry_top, entry_mass):
    """Mass of the entry's segment relative to both segments."""
    base = finite_top(tl.maximum(top, entry_top))
    ours = entry_mass * tl.exp2(entry_top - base)
    return divide(ours, ours + mass * tl.exp2(top - base))


# ---- segments that are there already ------------------------------------------------------------


@triton.jit
def load_mass(partial, at, keep):
    """Top and mass of a partial's rows: its log-sum-exp to the base of 2, and what its conversion has rounded
    away, which is close to 1; -inf and 0 where it has no keys or `keep` is false. NaN shows."""
    lse = tl.load(rows_at(partial.lse, at.b, at.h, at.first, at.row, 1), mask=keep, other=float("-inf"))
    there = lse != float("-inf")
    lse = tl.maximum(lse, LOWEST_LSE, propagate_nan=tl.PropagateNan.ALL)
    top = lse * LOG2E
    # The rest of the product, by halves of 12 bits: without it, segments of like mass would be merged less
    # exactly than by natural logarithms.
    high = (lse.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    rest = (high * HIGH - top) + (high * LOW + (lse - high) * HIGH + (lse - high) * LOW)
    return tl.where(there, top, float("-inf")), tl.where(there, 1 + rest * LN2, 0.0)


@triton.jit
def load_output(partial, at, keep, HEAD_DIM: tl.constexpr, FEATURES: tl.constexpr, ALIGNED: tl.constexpr):
    """The output of a partial's rows, 0 where `keep` is false."""
    stored = load_rows(partial.out, at.b, at.h, at.first, at.row, keep, HEAD_DIM, FEATURES, ALIGNED)
    out = ()
    for i in tl.static_range(len(stored)):
        out = out + (stored[i].to(tl.float32),)
    return out


@triton.jit
def load_partial(partial, at, keep, HEAD_DIM: tl.constexpr, FEATURES: tl.constexpr, ALIGNED: tl.constexpr):
    """A partial's rows, as if without keys where `keep` is false. There its output is not even read: it may
    hold NaN."""
    top, mass = load_mass(partial, at, keep)
    return Attended(load_output(partial, at, mass != 0, HEAD_DIM, FEATURES, ALIGNED), top, mass)


@triton.jit
def kept_if(segment, keep):
    """The segment, without tokens where `keep` is false."""
    top = tl.where(keep, segment.top, float("-inf"))
    return Attended(segment.out, top, tl.where(keep, segment.mass, 0.0))


@triton.jit
def merged(first, second, x):
    """x, the output of `second` or what has been made of it, as a part of one softmax over the tokens of
    both. Where one of them is empty the other stays, to the last bit."""
    # Both shares as they are: 1 - share would have no more than absolute accuracy, beside large values.
    share = mass_share(first.top, first.mass, second.top, second.mass)
    rest = mass_share(second.top, second.mass, first.top, first.mass)
    both = sum_of(share, x, rest, first.out)
    return chosen(first.mass == 0, x, chosen(second.mass == 0, first.out, both))


@triton.jit
def merge(first, second):
    """One softmax over the tokens of both."""
    top = tl.maximum(first.top, second.top)
    base = finite_top(top)
    mass = first.mass * tl.exp2(first.top - base) + second.mass * tl.exp2(second.top - base)
    return Attended(merged(first, second, second.out), top, mass)
