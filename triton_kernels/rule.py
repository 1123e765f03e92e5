# SPDX-License-Identifier: Apache-2.0
"""The rule in Triton: what an entry removes, given its attention, and what becomes of it. For every kernel:
nothing here knows where attention comes from.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..operator.rule import DIRECTIONS, GATES, NORMS, SHARED, SIMILARITIES
from ..operator.tokens import COLUMNS, NUMBERS
from .rows import View, chosen, inner, load_vector, over_tile, sum_of
from .segment import LOG2E, TINY, divide, finite_top, load_mass, mass_share, merged


class Concepts(NamedTuple):
    """The pointers of `fastnegate.ConceptTokens` and its sizes; all but key and value are contiguous."""

    key: View  # [T, H, D] with a batch stride of 0, or [B, T, H, D]
    value: View
    index: Any
    numbers: Any
    token_bias: Any
    token_weight: Any
    direction: Any
    update: Any
    offset: Any
    entries: Any
    concepts: Any
    tokens: Any
    longest: Any


class Rule(NamedTuple):
    """`fastnegate.Rule` as floats: words by their place in `fastnegate.operator.rule`, flags as 0 or 1."""

    similarity: Any
    gate: Any
    direction: Any
    joint: Any
    largest: Any
    norm: Any
    norm_order: Any
    shared: Any
    reads_tokens: Any
    norm_limit: Any
    blend: Any
    strength: Any
    logit_bias: Any
    threshold: Any
    width: Any  # 0: 1 - threshold of the entry
    cap: Any


class Entry(NamedTuple):
    """An entry of the batch row."""

    number: Any
    concept: Any
    begin: Any  # of its tokens
    length: Any
    exists: Any


class Moments(NamedTuple):
    """Inner products over the scope of a query with one entry, [ROWS] each."""

    zz: Any
    zf: Any
    ff: Any
    along: Any  # <Z, u>
    mass: Any  # exp(L_e - beta) / (exp L + exp(L_e - beta)), summed over the heads


class Mix(NamedTuple):
    """Y = (1 + moved) Z + removed; for `joint`, removed and weight are relative to 2^level."""

    removed: Any  # tuple [ROWS, channels]
    moved: Any
    weight: Any
    level: Any
    best_g: Any  # of the entries so far, for `max`
    best_r: Any
    best: Any
    found: Any  # whether there was an entry


class Place(NamedTuple):
    """A tile's queries, and where their numbers are in tables of sums [plane, E or B, H, N]."""

    b: Any
    h: Any
    first: Any  # query of the tile
    row: Any  # of each row, after the first
    n: Any  # first + row
    inside: Any
    own: Any  # offset of the head in [H, N]
    size: Any  # of [H, N]
    batch: Any
    heads: Any
    queries: Any


def _word(words: tuple[str, ...], word: str) -> tl.constexpr:
    return tl.constexpr(float(words.index(word)))


COSINE = _word(SIMILARITIES, "cosine")
DIRECTION = _word(SIMILARITIES, "direction")
MASS = _word(SIMILARITIES, "mass")
STEP = _word(GATES, "step")
RAMP = _word(GATES, "ramp")
SIGMOID = _word(GATES, "sigmoid")
DIFFERENCE = _word(DIRECTIONS, "difference")
ORTHOGONAL = _word(DIRECTIONS, "orthogonal")
PROJECTION = _word(DIRECTIONS, "projection")
FIXED = _word(DIRECTIONS, "fixed")
INSIDE = _word(SHARED, "inside")
OUTSIDE = _word(SHARED, "outside")
LIMIT = _word(NORMS, "limit")
PRESERVE = _word(NORMS, "preserve")
STRENGTH, LOGIT_BIAS, THRESHOLD, WIDTH, CAP, ACTIVE = (tl.constexpr(i) for i in range(len(NUMBERS)))
STRIDE = tl.constexpr(COLUMNS)


@triton.jit
def entry_number(numbers, e, column, default):
    """A number of entry e; NaN stands for the rule's default."""
    x = tl.load(numbers + e * STRIDE + column)
    return tl.where(x == x, x, default)


@triton.jit
def similarity(rule, m, heads):
    r = tl.full(m.zz.shape, 1.0, tl.float32)
    if rule.similarity == COSINE:
        r = divide(m.zf, tl.sqrt(m.zz) * tl.sqrt(m.ff))
    if rule.similarity == DIRECTION:
        r = m.along
    if rule.similarity == MASS:
        r = m.mass / heads
    return r


@triton.jit
def gate(rule, numbers, e, r):
    """g = active * min(psi(r), cap): the schedule enters through g alone."""
    threshold = entry_number(numbers, e, THRESHOLD, rule.threshold)
    width = entry_number(numbers, e, WIDTH, tl.where(rule.width > 0, rule.width, 1 - threshold))
    above = r - threshold
    psi = tl.full(r.shape, 1.0, tl.float32)
    if rule.gate == STEP:
        psi = tl.where(above > 0, 1.0, 0.0)
    if rule.gate == RAMP:
        psi = tl.minimum(tl.maximum(divide(above, width), 0.0), 1.0)
    if rule.gate == SIGMOID:
        psi = 1 / (1 + tl.exp2(tl.minimum(above * width * -LOG2E, 126.0)))
    active = entry_number(numbers, e, ACTIVE, 1.0)
    return active * tl.minimum(psi, entry_number(numbers, e, CAP, rule.cap))


@triton.jit
def pull(rule, m):
    """x and z of the direction D = x X + z Z."""
    x = tl.full(m.zz.shape, 1.0, tl.float32)
    z = tl.zeros(m.zz.shape, tl.float32)
    if rule.direction == DIFFERENCE:
        z = -x
    if rule.direction == ORTHOGONAL:
        z = -divide(m.zf, m.zz)
    if rule.direction == PROJECTION:
        x = divide(m.zf, m.ff)
    if rule.direction == FIXED:
        x = m.along
    return x, z


@triton.jit
def concept_of(concepts, e, there):
    """Of entry e. The index is data: whatever it holds, nothing outside the arrays is read."""
    c = tl.load(concepts.index + e, mask=there, other=0)
    return tl.minimum(tl.maximum(c, 0), concepts.concepts - 1)


@triton.jit
def over_heads(at, inside, heads, queries):
    """Sum of [H, N] over `heads` heads, in order; `at` points to the tile's queries of the first head."""
    total = tl.zeros(inside.shape, tl.float32)
    for _ in range(heads):
        total += tl.load(at, mask=inside, other=0.0)
        at += queries
    return total


@triton.jit
def reads_products(rule):
    """Whether <Z, F> and <F, F> are."""
    reads = (rule.similarity == COSINE) | (rule.direction == ORTHOGONAL)
    return reads | (rule.direction == PROJECTION)


@triton.jit
def measure(entry, f, z, zz, concepts, rule, trace, at,
            HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, FEATURES: tl.constexpr):  # fmt: skip
    """Moments of the entry, whose attention is f, over the HEADS heads of the tile; zz is <Z, Z> over them.
    And for each head the top of f with the bias of its logits, and the entry's share of mass."""
    entry_top = f.top - LOG2E * entry_number(concepts.numbers, entry.number, LOGIT_BIAS, rule.logit_bias)
    share = tl.zeros(zz.shape, tl.float32)
    if (rule.similarity == MASS) | (trace is not None):
        share = mass_share(z.top, z.mass, entry_top, f.mass)
    zf = tl.zeros(zz.shape, tl.float32)
    ff = tl.zeros(zz.shape, tl.float32)
    if reads_products(rule):
        zf = over_tile(inner(z.out, f.out), HEADS)
        ff = over_tile(inner(f.out, f.out), HEADS)
    along = tl.zeros(zz.shape, tl.float32)
    if concepts.direction is not None:
        u = load_vector(concepts.direction, entry.concept, at, HEAD_DIM, FEATURES)
        along = over_tile(inner(z.out, u), HEADS)
    return Moments(zz, zf, ff, along, over_tile(share, HEADS)), entry_top, share


@triton.jit
def remove(mix, entry, f, there, m, entry_top, share, in_scope, concepts, rule, trace, at,
           HEAD_DIM: tl.constexpr, FEATURES: tl.constexpr):  # fmt: skip
    """`mix` with the entry, whose moments over the scope, of `in_scope` heads, are m. `there`: for which
    queries it exists, or None for all."""
    e = entry.number
    row = e.to(tl.int64) * at.size
    plane = concepts.entries.to(tl.int64) * at.size
    if concepts.offset is not None:
        added = tl.load(concepts.offset + entry.concept).to(tl.float32)
        m = Moments(m.zz, m.zf, m.ff, m.along + added, m.mass)
    r = similarity(rule, m, in_scope)
    g = gate(rule, concepts.numbers, e, r)
    g = tl.where(r == r, g, r)  # minimum and maximum lose a NaN, which has to show in the output
    if there is not None:
        g = tl.where(there, g, 0.0)
        r = tl.where(there, r, 0.0)
    strength = entry_number(concepts.numbers, e, STRENGTH, rule.strength)

    # This entry's part of (removed, moved, weight, level).
    x, step = pull(rule, m)
    amount = g
    level = tl.zeros(g.shape, tl.float32)
    if rule.joint == 1:
        # amount 2^level, with an amount of 1 to 2, however small mass and gate are.
        amount = f.mass * g
        exponent = (amount.to(tl.int32, bitcast=True) >> 23) - 127
        level = tl.where(amount <= 0, float("-inf"), entry_top + exponent)
        inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
        amount = tl.where(amount <= 0, 0.0, amount * inverse)

    # It is added, or with `max` replaces the part of an entry it beats.
    best_g = mix.best_g
    best_r = mix.best_r
    best = mix.best
    if rule.largest == 1:
        best_concept = concept_of(concepts, best, True)
        tie = (r > best_r) | ((r == best_r) & (entry.concept < best_concept))
        wins = (g > best_g) | ((g == best_g) & tie) | (g != g)
        best_g = tl.where(wins, g, best_g)
        best_r = tl.where(wins, r, best_r)
        best = tl.where(wins, e, best)
        old = tl.where(wins, 0.0, 1.0)
        new = 1 - old
        level = tl.where(wins, level, mix.level)
    else:
        higher = tl.maximum(mix.level, level)
        old = tl.exp2(mix.level - finite_top(higher))
        new = tl.exp2(level - finite_top(higher))
        level = higher
    feature = f.out
    if concepts.update is not None:
        feature = load_vector(concepts.update, entry.concept, at, HEAD_DIM, FEATURES)
    found = True
    if there is not None:
        found = mix.found | there
    if trace is not None:
        to = trace + row + at.own + at.n
        tl.store(to, g, mask=at.inside & (rule.largest == 0))
        tl.store(to + plane, r, mask=at.inside)
        tl.store(to + 2 * plane, share, mask=at.inside)
    return Mix(
        sum_of(old, mix.removed, -(strength * amount * x * new), feature),
        mix.moved * old - strength * amount * step * new,
        mix.weight * old + amount * new,
        level, best_g, best_r, best, found,
    )  # fmt: skip


@triton.jit
def norm_sum(rule, x, square):
    """What adds up over heads to ||x||_1 or ||x||_2^2, which is `square`."""
    total = square
    if rule.norm_order == 1:
        total = tl.sum(tl.abs(x[0]), 1)
        for i in tl.static_range(1, len(x)):
            total += tl.sum(tl.abs(x[i]), 1)
    return total


@triton.jit
def norm_factor(rule, sum_y, sum_z):
    """Factor on Y, and whether `limit` acted."""
    norm_y, norm_z = sum_y, sum_z
    if rule.norm_order == 2:
        norm_y, norm_z = tl.sqrt(sum_y), tl.sqrt(sum_z)
    ratio = divide(norm_y, norm_z)
    limited = (ratio > rule.norm_limit) & (rule.norm == LIMIT)
    factor = tl.where(limited, divide(rule.norm_limit, ratio), 1.0)
    if rule.norm == PRESERVE:
        factor = tl.where(norm_z < TINY, 1.0, divide(1.0, ratio))
    return factor, limited


@triton.jit
def finish(mix, z, bare, zz, around, rule, norms, at, HEADS: tl.constexpr, GOAL: tl.constexpr):
    """O, and where `limit` acted. `bare` is what O would be without entries and zz <bare, bare>; `around` the
    shared keys, which may join Y only now, or None."""
    keep = 1 + mix.moved
    taken = tl.full(keep.shape, 1.0, tl.float32)
    if rule.joint == 1:
        base = finite_top(tl.maximum(z.top, mix.level))
        share = z.mass * tl.exp2(z.top - base)
        taken = tl.exp2(mix.level - base)
        total = share + mix.weight * taken
        keep = divide(share, total)
        taken = divide(taken, total)
    y = sum_of(keep, z.out, taken, mix.removed)
    if around is not None:
        if rule.shared == OUTSIDE:
            y = merged(around, z, y)
    sum_y = over_tile(norm_sum(rule, y, inner(y, y)), HEADS)
    sum_z = over_tile(norm_sum(rule, bare, zz), HEADS)
    if norms is not None:
        table = norms + at.b.to(tl.int64) * at.size
        plane = at.batch.to(tl.int64) * at.size
        if GOAL == "norms":
            tl.store(table + at.own + at.n, sum_y, mask=at.inside)
            tl.store(table + plane + at.own + at.n, sum_z, mask=at.inside)
        else:
            sum_y = over_heads(table + at.n, at.inside, at.heads, at.queries)
            sum_z = over_heads(table + plane + at.n, at.inside, at.heads, at.queries)
    scaling, limited = norm_factor(rule, sum_y, sum_z)
    rest = tl.full(keep.shape, 1.0, tl.float32) - rule.blend
    o = sum_of(rule.blend * scaling, y, rest, bare)
    if around is not None:
        if rule.shared == OUTSIDE:  # without a prompt nothing is removed
            o = chosen((z.mass == 0) & (around.mass != 0), bare, o)
    return o, limited


@triton.jit
def trace_row(rows, o, z, zz, limited, stored: tl.constexpr, at):
    """Write |O - Z|^2, |Z|^2, whether limited, values that are not finite once stored."""
    moved = tl.zeros([o[0].shape[0]], tl.float32)
    nonfinite = tl.zeros([o[0].shape[0]], tl.float32)
    for i in tl.static_range(len(o)):
        moved += tl.sum((o[i] - z[i]) * (o[i] - z[i]), 1)
        nothing = o[i].to(stored).to(tl.float32) * 0  # but NaN of what is not finite
        nonfinite += tl.sum((nothing != 0).to(tl.float32), 1)
    to = rows + at.b.to(tl.int64) * at.size + at.own + at.n
    plane = at.batch.to(tl.int64) * at.size
    tl.store(to, moved, mask=at.inside)
    tl.store(to + plane, zz, mask=at.inside)
    tl.store(to + 2 * plane, limited.to(tl.float32), mask=at.inside)
    tl.store(to + 3 * plane, nonfinite, mask=at.inside)


@triton.jit
def trace_share(to, shared, segment, at):
    """Write the segment's share of mass against the shared keys."""
    top, mass = load_mass(shared, at, at.inside)
    tl.store(to + at.own + at.n, mass_share(top, mass, segment.top, segment.mass), mask=at.inside)
