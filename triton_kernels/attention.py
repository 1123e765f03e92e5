# SPDX-License-Identifier: Apache-2.0
"""`negated_attention` in Triton: a program makes a tile of output rows of one head.

It attends to the prompt (Z), then takes the entries of its batch row one at a time: attention to the
concept's tokens (F), inner products, gate, coefficients, one update of an accumulator. So one
softmax is alive at a time, any number of entries fits, and Q is read and O is written once.

Scope `feature` needs sums over heads before an output exists. The same kernel is then launched once
per sum: to write the inner products of each head ("moments"), to write the norms of Y and Z of each
head ("norms"), and for the output, which adds up over the heads what it needs. Q, K and V are read
again, Z and F are never stored.

Modes are run-time branches on scalars. They are passed as floats because Triton compiles an integer
argument that happens to be 1 or a multiple of 16 into the kernel, once per value.

Compile-time are the shape of a tile (HEAD_DIM, CHANNELS, ROWS, KEYS, TOKENS: Triton needs them to be), GOAL
(a launch for sums writes no output) and which optional pointers are None.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..rule import DIRECTIONS, GATES, NORMS, SIMILARITIES
from ..tokens import COLUMNS, NUMBERS


class View(NamedTuple):
    """A tensor whose last dimension is contiguous; strides in elements, 0 is legal."""

    data: Any
    batch: Any
    head: Any
    row: Any


class Concepts(NamedTuple):
    """The pointers of `fastnegate.ConceptTokens`; all but key and value are contiguous."""

    key: View  # [T, H, D]: `batch` is unused
    value: View
    index: Any
    numbers: Any
    token_bias: Any
    token_weight: Any
    direction: Any
    update: Any
    offset: Any


class Rule(NamedTuple):
    """`fastnegate.Rule` as floats: words by their place in `fastnegate.rule`, flags as 0 or 1."""

    similarity: Any
    gate: Any
    direction: Any
    joint: Any
    largest: Any
    norm: Any
    norm_order: Any
    reads_tokens: Any
    norm_limit: Any
    blend: Any
    strength: Any
    logit_bias: Any
    threshold: Any
    width: Any  # 0: 1 - threshold of the entry
    cap: Any


class Trace(NamedTuple):
    """What statistics are made of, float32, cleared before the launch."""

    entries: Any  # [3, E, H, N]: gate, similarity, mass
    rows: Any  # [4, B, H, N]: |O - Z|^2, |Z|^2, whether limited, values of O that are not finite


class Moments(NamedTuple):
    """Inner products over the scope of a query with one entry, [ROWS] each."""

    zz: Any
    zf: Any
    ff: Any
    along: Any  # <Z, u>
    mass: Any  # exp(L_e - beta) / (exp L + exp(L_e - beta)), summed over the heads


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
LIMIT = _word(NORMS, "limit")
PRESERVE = _word(NORMS, "preserve")
STRENGTH, LOGIT_BIAS, THRESHOLD, WIDTH, CAP, ACTIVE = (tl.constexpr(i) for i in range(len(NUMBERS)))
STRIDE = tl.constexpr(COLUMNS)
LOG2E = tl.constexpr(1.4426950408889634)
TINY = tl.constexpr(1e-30)
LOWEST = tl.constexpr(-3e38)


@triton.jit
def divide(x, y):
    """x / y, and 0 where y < 1e-30: the operator's only epsilon."""
    small = y < TINY
    return tl.where(small, 0.0, tl.div_rn(x, tl.where(small, 1.0, y)))


@triton.jit
def finite_top(top):
    """`top`, or 0 for an empty softmax, whose -inf may not be subtracted from itself."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def load_rows(view, b, h, row, keep, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr):
    """[rows, CHANNELS] of a [B, H, N, D] tensor, 0 where `keep` is false and in the padding."""
    channel = tl.arange(0, CHANNELS)
    at = view.data + b * view.batch + h * view.head + row[:, None] * view.row + channel[None, :]
    return tl.load(at, mask=keep[:, None] & (channel < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def load_vector(vectors, c, h, heads, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr):
    """Vector of one head of concept c from [C, H, D], [1, CHANNELS]."""
    channel = tl.arange(0, CHANNELS)
    at = vectors + (c.to(tl.int64) * heads + h) * HEAD_DIM + channel
    return tl.load(at, mask=channel < HEAD_DIM, other=0.0).to(tl.float32)[None, :]


@triton.jit
def attend(q, key, value, bias, bias_stride, weight, b, h, begin, count, factor,
           HEAD_DIM: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Softmax attention of the tile q to `count` tokens from `begin` on.

    Returns the output, the top and the mass of the base-2 logits (-inf and 0 if there is no token)
    and the number of tokens that are not masked. Tokens are taken TILE at a time with a running
    top: text is short, so there are few steps.
    """
    top = tl.full([q.shape[0]], float("-inf"), tl.float32)
    mass = tl.zeros([q.shape[0]], tl.float32)
    out = tl.zeros([q.shape[0], q.shape[1]], tl.float32)
    present = 0
    for start in range(0, count, TILE):
        place = start + tl.arange(0, TILE)
        token = begin + place.to(tl.int64)
        keep = place < count
        added = tl.zeros([TILE], tl.float32)
        if bias is not None:
            added = tl.load(bias + token * bias_stride, mask=keep, other=float("-inf")).to(tl.float32)
            # A masked token is absent: its key and value are not even read, they may hold NaN.
            keep = keep & (added > float("-inf"))
            # Some callers mask with the lowest number, which must not become -inf.
            added = tl.maximum(added * (LOG2E / factor), LOWEST)
        k = load_rows(key, b, h, token, keep, HEAD_DIM, q.shape[1])
        logits = tl.dot(q, k.T, input_precision="ieee") + added[None, :]
        logits = tl.where(keep[None, :], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        base = finite_top(higher)
        # Scaled after the subtraction, the weights of the tokens that matter are the most exact.
        p = tl.exp2((logits - base[:, None]) * factor)
        shrink = tl.exp2((top - base) * factor)
        mass = mass * shrink + tl.sum(p, 1)
        if weight is not None:
            p *= tl.load(weight + token, mask=keep, other=0.0).to(tl.float32)[None, :]
        v = load_rows(value, b, h, token, keep, HEAD_DIM, q.shape[1])
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
        top = higher
        present += tl.sum(keep.to(tl.int32))
    return out * divide(1.0, mass)[:, None], top * factor, mass, present


@triton.jit
def over_heads(at, inside, heads, queries):
    """Sum of [H, N] over heads, in order; `at` points to the tile's queries of the first head."""
    total = tl.zeros(inside.shape, tl.float32)
    for _ in range(heads):
        total += tl.load(at, mask=inside, other=0.0)
        at += queries
    return total


@triton.jit
def mass_share(top, mass, entry_top, entry_mass):
    """Mass of the entry's segment relative to both segments."""
    base = finite_top(tl.maximum(top, entry_top))
    ours = entry_mass * tl.exp2(entry_top - base)
    return divide(ours, ours + mass * tl.exp2(top - base))


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
        psi = 1 / (1 + tl.exp2(tl.minimum(above * (-LOG2E * width), 126.0)))
    return tl.load(numbers + e * STRIDE + ACTIVE) * tl.minimum(psi, entry_number(numbers, e, CAP, rule.cap))


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
def norm_sum(rule, x):
    """What adds up over heads to ||x||_1 or ||x||_2^2."""
    terms = tl.abs(x)
    if rule.norm_order == 2:
        terms = x * x
    return tl.sum(terms, 1)


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


# Sizes change from call to call, capacities when concepts are swapped: neither may recompile.
@triton.jit(do_not_specialize=["heads", "queries", "keys", "entries", "concept_count", "tokens", "longest"])
def attention(query, key, value, out, key_bias, concepts, rule, moments, norms, trace, factor,
              heads, queries, keys, entries, concept_count, tokens, longest, GOAL: tl.constexpr,
              HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr,
              ROWS: tl.constexpr, KEYS: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    """The kernel; grid (ceil(N / ROWS), H, B).

    query, key, value, out, key_bias: `View`s, key_bias (or None) with `row` the stride of its keys.
    concepts: `Concepts` or None; entries, concept_count, tokens, longest belong to it.
    moments [5, E, H, N], norms [2, B, H, N]: float32, for scope `feature`, else None.
    trace: `Trace` or None. factor: scale * log2(e). GOAL: "moments", "norms" or "output".
    """
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    inside = n < queries
    # Tables of sums are [plane, E or B, H, N]: size of [H, N], offset in it, size of a plane, offset of b.
    size = queries.to(tl.int64) * heads
    own = h * queries + n
    plane = tl.num_programs(2) * size
    row = b * size

    q = load_rows(query, b, h, n, inside, HEAD_DIM, CHANNELS)
    bias = None
    bias_stride = 0
    if key_bias is not None:
        bias = key_bias.data + b * key_bias.batch + h * key_bias.head
        bias_stride = key_bias.row
    z, top, mass, _ = attend(q, key, value, bias, bias_stride, None, b, h, 0, keys, factor, HEAD_DIM, KEYS)
    o = z
    limited = tl.zeros([ROWS], tl.int1)

    if concepts is not None:
        rows = concepts.index + entries + 2 * concept_count
        first = tl.maximum(tl.load(rows + b), 0)
        last = tl.minimum(tl.load(rows + b + 1), entries)
        entry_plane = entries * size
        joint = rule.joint == 1

        # Y = (1 + moved) Z + removed, where for `joint` removed and weight are relative to 2^level.
        removed = tl.zeros([ROWS, CHANNELS], tl.float32)
        moved = tl.zeros([ROWS], tl.float32)
        weight = tl.zeros([ROWS], tl.float32)
        level = tl.zeros([ROWS], tl.float32)
        if joint:
            level += float("-inf")
        best_g = tl.full([ROWS], float("-inf"), tl.float32)
        best_r = best_g
        best_concept = tl.zeros([ROWS], tl.int32)
        best = tl.zeros([ROWS], tl.int64)
        existing = 0

        for e in range(first, last):
            # The index is data: whatever it holds, nothing outside the arrays is read.
            c = tl.minimum(tl.maximum(tl.load(concepts.index + e), 0), concept_count - 1)
            begin = tl.minimum(tl.maximum(tl.load(concepts.index + entries + c), 0), tokens)
            length = tl.load(concepts.index + entries + concept_count + c)
            length = tl.minimum(length, tl.minimum(longest, tokens - begin))
            active = tl.load(concepts.numbers + e * STRIDE + ACTIVE) > 0
            length = tl.where(active & (rule.reads_tokens == 1), length, 0)
            f, entry_top, entry_mass, present = attend(
                q, concepts.key, concepts.value, concepts.token_bias, 1, concepts.token_weight,
                0, h, begin, length, factor, HEAD_DIM, TOKENS,
            )  # fmt: skip
            if active & ((present > 0) | (rule.reads_tokens == 0)):
                existing += 1
                entry_row = e * size
                entry_top -= LOG2E * entry_number(concepts.numbers, e, LOGIT_BIAS, rule.logit_bias)
                share = mass_share(top, mass, entry_top, entry_mass)
                along = tl.zeros([ROWS], tl.float32)
                if concepts.direction is not None:
                    along = tl.sum(z * load_vector(concepts.direction, c, h, heads, HEAD_DIM, CHANNELS), 1)
                m = Moments(tl.sum(z * z, 1), tl.sum(z * f, 1), tl.sum(f * f, 1), along, share)
                if GOAL == "moments":
                    at = moments + entry_row + own
                    tl.store(at, m.zz, mask=inside)
                    tl.store(at + entry_plane, m.zf, mask=inside)
                    tl.store(at + 2 * entry_plane, m.ff, mask=inside)
                    tl.store(at + 3 * entry_plane, m.along, mask=inside)
                    tl.store(at + 4 * entry_plane, m.mass, mask=inside)
                else:
                    in_scope = 1
                    if moments is not None:
                        at = moments + entry_row + n
                        m = Moments(
                            over_heads(at, inside, heads, queries),
                            over_heads(at + entry_plane, inside, heads, queries),
                            over_heads(at + 2 * entry_plane, inside, heads, queries),
                            over_heads(at + 3 * entry_plane, inside, heads, queries),
                            over_heads(at + 4 * entry_plane, inside, heads, queries),
                        )
                        in_scope = heads
                    if concepts.offset is not None:
                        offset = tl.load(concepts.offset + c).to(tl.float32)
                        m = Moments(m.zz, m.zf, m.ff, m.along + offset, m.mass)
                    r = similarity(rule, m, in_scope)
                    g = gate(rule, concepts.numbers, e, r)
                    strength = entry_number(concepts.numbers, e, STRENGTH, rule.strength)

                    # This entry's part of (removed, moved, weight, level).
                    feature = f
                    if concepts.update is not None:
                        vector = load_vector(concepts.update, c, h, heads, HEAD_DIM, CHANNELS)
                        feature = tl.broadcast_to(vector, [ROWS, CHANNELS])
                    x, step = pull(rule, m)
                    amount = g
                    entry_level = tl.zeros([ROWS], tl.float32)
                    if joint:
                        amount = entry_mass * g
                        entry_level = tl.where(amount > 0, entry_top, float("-inf"))

                    # It is added, or with `max` replaces the part of an entry it beats.
                    if rule.largest == 1:
                        tie = (r > best_r) | ((r == best_r) & (c < best_concept))
                        wins = (g > best_g) | ((g == best_g) & tie)
                        best_g = tl.where(wins, g, best_g)
                        best_r = tl.where(wins, r, best_r)
                        best_concept = tl.where(wins, c, best_concept)
                        best = tl.where(wins, e, best)
                        old = tl.where(wins, 0.0, 1.0)
                        new = 1 - old
                        level = tl.where(wins, entry_level, level)
                    else:
                        higher = tl.maximum(level, entry_level)
                        old = tl.exp2(level - finite_top(higher))
                        new = tl.exp2(entry_level - finite_top(higher))
                        level = higher
                    removed = removed * old[:, None] - (strength * amount * x * new)[:, None] * feature
                    moved = moved * old - strength * amount * step * new
                    weight = weight * old + amount * new

                    if trace is not None:
                        at = trace.entries + entry_row + own
                        tl.store(at, g, mask=inside & (rule.largest == 0))
                        tl.store(at + entry_plane, r, mask=inside)
                        tl.store(at + 2 * entry_plane, share, mask=inside)

        if existing > 0:  # else O = Z to the last bit
            keep = 1 + moved
            taken = tl.full([ROWS], 1.0, tl.float32)
            if joint:
                base = finite_top(tl.maximum(top, level))
                prompt = mass * tl.exp2(top - base)
                taken = tl.exp2(level - base)
                total = prompt + weight * taken
                keep = divide(prompt, total)
                taken = divide(taken, total)
            y = keep[:, None] * z + taken[:, None] * removed

            sum_y = norm_sum(rule, y)
            sum_z = norm_sum(rule, z)
            if GOAL == "norms":
                tl.store(norms + row + own, sum_y, mask=inside)
                tl.store(norms + plane + row + own, sum_z, mask=inside)
            elif norms is not None:
                sum_y = over_heads(norms + row + n, inside, heads, queries)
                sum_z = over_heads(norms + plane + row + n, inside, heads, queries)
            scaling, limited = norm_factor(rule, sum_y, sum_z)
            o = (rule.blend * scaling)[:, None] * y + (1 - rule.blend) * z
            if trace is not None:
                # With `max` only the winner has a gate, and only now is it known.
                at = trace.entries + best * size + own
                tl.store(at, best_g, mask=inside & (rule.largest == 1))

    if GOAL == "output":
        channel = tl.arange(0, CHANNELS)
        stored = o.to(out.data.dtype.element_ty)
        at = out.data + b * out.batch + h * out.head + n[:, None] * out.row + channel[None, :]
        tl.store(at, stored, mask=inside[:, None] & (channel < HEAD_DIM)[None, :])
        if trace is not None:
            at = trace.rows + row + own
            nonfinite = ~(tl.abs(stored.to(tl.float32)) < float("inf"))
            tl.store(at, tl.sum((o - z) * (o - z), 1), mask=inside)
            tl.store(at + plane, tl.sum(z * z, 1), mask=inside)
            tl.store(at + 2 * plane, limited.to(tl.float32), mask=inside)
            tl.store(at + 3 * plane, tl.sum(nonfinite.to(tl.float32), 1), mask=inside)
