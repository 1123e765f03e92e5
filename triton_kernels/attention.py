# SPDX-License-Identifier: Apache-2.0
"""`negated_attention` in Triton: a program makes some tiles of output rows, one after the other.

It loads the prompt's keys and values once for the tiles of a head, and the tokens of the first entry if they
are few (HELD). For each tile of queries it attends to the prompt (Z), then takes the entries of its batch
row one by one: attention to the concept's tokens (F), inner products, gate, coefficients, one update of an
accumulator. So one softmax is alive at a time, any number of entries fits, and Q is read and O is written
once.

Scope `feature` needs sums over heads before an output exists. The same kernel is then launched once
per sum: to write the inner products of each head ("moments"), to write the norms of Y and Z of each
head ("norms"), and for the output, which adds up over the heads what it needs. Q, K and V are read
again, Z and F are never stored.

A matrix of text length or head_dim is a tuple of pieces whose sizes are powers of two, as Triton wants
them: 77 keys are 64 + 16, head_dim 40 is 32 + 8. Padded to 128 and 64 they would cost twice the products.

Modes are run-time branches on scalars. They are passed as floats because Triton compiles an integer
argument that happens to be 1 or a multiple of 16 into the kernel, once per value. Compile-time are sizes of
tiles, GOAL (a launch for sums writes no output) and which optional pointers are None.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.target_info import current_target

from ..operator.rule import DIRECTIONS, GATES, NORMS, SIMILARITIES
from ..operator.tokens import COLUMNS, NUMBERS
from . import tiles as _tiles


class View(NamedTuple):
    """A tensor whose last dimension is contiguous; strides in elements, 0 is legal."""

    data: Any
    batch: Any
    head: Any
    row: Any


class Concepts(NamedTuple):
    """The pointers of `fastnegate.ConceptTokens` and its sizes; all but key and value are contiguous."""

    key: View  # [T, H, D]: `batch` is unused
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
    reads_tokens: Any
    norm_limit: Any
    blend: Any
    strength: Any
    logit_bias: Any
    threshold: Any
    width: Any  # 0: 1 - threshold of the entry
    cap: Any


class Tokens(NamedTuple):
    """Keys and values of one tile of tokens: tuples over its pieces, and of these over head_dim's."""

    key: Any  # [tokens, channels]
    value: Any
    added: Any  # [tokens], to the logits before they are scaled; -inf where there is no token
    weight: Any  # [tokens], of the values


class Attended(NamedTuple):
    """A softmax and what it selected: tuple [ROWS, channels], top and mass of the logits [ROWS]."""

    out: Any
    top: Any
    mass: Any


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
    n: Any
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
LIMIT = _word(NORMS, "limit")
PRESERVE = _word(NORMS, "preserve")
STRENGTH, LOGIT_BIAS, THRESHOLD, WIDTH, CAP, ACTIVE = (tl.constexpr(i) for i in range(len(NUMBERS)))
STRIDE = tl.constexpr(COLUMNS)
LOG2E = tl.constexpr(1.4426950408889634)
TINY = tl.constexpr(1e-30)
LOWEST = tl.constexpr(-3e38)
DEPTH = tl.constexpr(16)  # what a matrix instruction sums over
HOISTING_HELPS = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9))


# ---- pieces -------------------------------------------------------------------------------------


split = triton.constexpr_function(_tiles.split)


@triton.constexpr_function
def pieces(size):
    return len(split(size))


@triton.constexpr_function
def width(size, i):
    return split(size)[i]


@triton.constexpr_function
def offset(size, i):
    return sum(split(size)[:i])


@triton.jit
def inner(x, y):
    """<x, y> of each row."""
    last: tl.constexpr = len(x) - 1  # from 96 columns on the widest, maybe of several
    products = x[last] * y[last]
    total = tl.zeros([products.shape[0]], tl.float32)
    for i in tl.static_range(last):
        if x[i].shape[1] == products.shape[1]:
            products += x[i] * y[i]  # one sum across the threads, not one each
        else:
            total += tl.sum(x[i] * y[i], 1)
    return total + tl.sum(products, 1)


@triton.jit
def scaled(x, factor):
    """factor[row] x"""
    out = ()
    for i in tl.static_range(len(x)):
        out = out + (factor[:, None] * x[i],)
    return out


@triton.jit
def sum_of(a, x, b, y):
    """a[row] x + b[row] y"""
    out = ()
    for i in tl.static_range(len(x)):
        out = out + (a[:, None] * x[i] + b[:, None] * y[i],)
    return out


@triton.jit
def rows_at(view, b, h, first, row, ALIGNED: tl.constexpr):
    """Pointers to rows first + row."""
    head = tl.cast(b, tl.int64) * view.batch + tl.cast(h, tl.int64) * view.head
    return view.data + (head + (first + row).to(tl.int64) * view.row) * ALIGNED


@triton.jit
def load_rows(view, b, h, first, row, keep, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr,
              ALIGNED: tl.constexpr):  # fmt: skip
    """Rows first + row of a [B, H, N, D] tensor in pieces, 0 where `keep` is false and in the padding."""
    out = ()
    at = rows_at(view, b, h, first, row, ALIGNED)
    for i in tl.static_range(pieces(PADDED)):
        channel = offset(PADDED, i) + tl.arange(0, width(PADDED, i))
        mask = keep[:, None]
        if offset(PADDED, i) + width(PADDED, i) > HEAD_DIM:
            mask = mask & (channel < HEAD_DIM)[None, :]
        out = out + (tl.load(at[:, None] + channel[None, :], mask=mask, other=0.0),)
    return out


@triton.jit
def load_vector(vectors, c, h, heads, HEAD_DIM: tl.constexpr, FEATURES: tl.constexpr):
    """Vector of one head of concept c from [C, H, D], in pieces [1, channels]."""
    out = ()
    at = vectors + (c.to(tl.int64) * heads + h) * HEAD_DIM
    for i in tl.static_range(pieces(FEATURES)):
        channel = offset(FEATURES, i) + tl.arange(0, width(FEATURES, i))
        mask = channel < HEAD_DIM
        out = out + (tl.load(at + channel, mask=mask, other=0.0).to(tl.float32)[None, :],)
    return out


@triton.constexpr_function
def kept_inside(rows):
    """Whether nothing is hoisted out of the loop of tiles.

    Hoisting is how mma.sync finds keys and values of the prompt in shared memory, but only from Triton 3.9
    on: before, it takes registers alone (head_dim 64 on 8.0 spills 24 bytes). Where matrix instructions read
    shared memory themselves (wgmma, tcgen05), there is nothing to hoist.
    """
    target = None if triton.knobs.runtime.interpret else current_target()
    if target is None or not HOISTING_HELPS.value:
        return True
    return target.backend == "cuda" and 90 <= target.arch < 120 and rows >= 64


# ---- attention ----------------------------------------------------------------------------------


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
def unmasked(bias, bias_stride, first, token, keep, factor):
    """Which of the tokens there are, and what is added to their logits before these are scaled."""
    added = tl.where(keep, 0.0, float("-inf"))
    if bias is not None:
        at = bias + (first + token).to(tl.int64) * bias_stride
        added = tl.load(at, mask=keep, other=float("-inf")).to(tl.float32)
        # A masked token is absent: its key and value are not even read, they may hold NaN.
        keep = keep & (added != float("-inf"))
        # Some callers mask with the lowest number, which must not become -inf. A NaN is no mask: it shows.
        added = tl.maximum(added * (LOG2E / factor), LOWEST, propagate_nan=tl.PropagateNan.ALL)
        added = tl.where(keep, added, float("-inf"))
    return keep, added


@triton.jit
def load_tokens(key, value, bias, bias_stride, weight, b, h, first, count, factor,
                HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr, FEATURES: tl.constexpr,
                ALIGNED: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """`count` tokens from `first` on, at most TILE."""
    keys = ()
    values = ()
    biases = ()
    weights = ()
    for i in tl.static_range(pieces(TILE)):
        token = offset(TILE, i) + tl.arange(0, width(TILE, i))
        keep, added = unmasked(bias, bias_stride, first, token, token < count, factor)
        keys = keys + (load_rows(key, b, h, first, token, keep, HEAD_DIM, CHANNELS, ALIGNED),)
        biases = biases + (added,)
        if weight is not None:
            weights = weights + (tl.load(weight + first + token, mask=keep, other=0.0).to(tl.float32),)
        if width(TILE, i) < DEPTH:
            token = offset(TILE, i) + tl.arange(0, DEPTH)
            keep = (token < count) & (token < offset(TILE, i) + width(TILE, i))
            keep, _ = unmasked(bias, bias_stride, first, token, keep, factor)
        values = values + (load_rows(value, b, h, first, token, keep, HEAD_DIM, FEATURES, ALIGNED),)
    return Tokens(keys, values, biases, weights)


@triton.jit
def deep(p):
    """p [rows, 8] with eight columns of zeros: products sum over 16 at least."""
    joined = tl.join(p, tl.zeros_like(p))
    return tl.reshape(tl.permute(joined, (0, 2, 1)), (p.shape[0], 2 * p.shape[1]))


@triton.jit
def no_tokens(ROWS: tl.constexpr, FEATURES: tl.constexpr):
    out = ()
    for i in tl.static_range(pieces(FEATURES)):
        out = out + (tl.zeros([ROWS, width(FEATURES, i)], tl.float32),)
    return Attended(out, tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32))


@triton.jit
def product(x, y):
    # In float32 sums of more than 64 products in one chain miss the accuracy budget (head_dim 256: 1.43 of
    # it). A number here, which means something for float8 only, keeps the compiler from chaining them.
    separate: tl.constexpr = 64 if x.dtype == tl.float32 else 0
    return tl.dot(x, y, input_precision="ieee", max_num_imprecise_acc=separate)


@triton.jit
def attend(q, tokens, before, factor, FIRST: tl.constexpr):
    """`before`, which is empty if FIRST, and the tile of tokens: sums, not yet divided by the mass."""
    top = before.top
    logits = ()
    for j in tl.static_range(len(tokens.key)):
        s = product(q[0], tokens.key[j][0].T)
        for i in tl.static_range(1, len(q)):
            s += product(q[i], tokens.key[j][i].T)
        s += tokens.added[j][None, :]
        logits = logits + (s,)
        top = tl.maximum(top, tl.max(s, 1))
    base = finite_top(top)
    mass = before.mass
    out = before.out
    if not FIRST:
        shrink = tl.exp2((before.top - base) * factor)
        mass = mass * shrink
        out = scaled(out, shrink)
    for j in tl.static_range(len(tokens.key)):
        # Scaled after the subtraction, the weights of the tokens that matter are the most exact.
        p = tl.exp2((logits[j] - base[:, None]) * factor)
        mass += tl.sum(p, 1)
        if len(tokens.weight) > 0:
            p *= tokens.weight[j][None, :]
        p = p.to(tokens.value[j][0].dtype)
        if p.shape[1] < DEPTH:
            p = deep(p)
        sums = ()
        for i in tl.static_range(len(out)):
            sums = sums + (tl.dot(p, tokens.value[j][i], out[i], input_precision="ieee"),)
        out = sums
    return Attended(out, top, mass)


@triton.jit
def attended(sums, factor):
    """Means instead of sums, the top in base-2 logits, where what is not empty stays finite."""
    top = tl.maximum(sums.top * factor, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    top = tl.where(sums.top == float("-inf"), sums.top, top)
    # Rounded to nearest for the registers alone: with `divide` 56 bytes are spilled at head_dim 64 on 8.0.
    small = sums.mass < TINY
    inverse = tl.where(small, 0.0, tl.div_rn(1.0, tl.where(small, 1.0, sums.mass)))
    return Attended(scaled(sums.out, inverse), top, sums.mass)


@triton.jit
def attend_once(q, tokens, factor, FEATURES: tl.constexpr):
    """Attention to tokens that fit one tile."""
    return attended(attend(q, tokens, no_tokens(q[0].shape[0], FEATURES), factor, True), factor)


@triton.jit
def attend_by_tiles(q, key, value, bias, bias_stride, weight, b, h, begin, count, factor,
                    HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr, FEATURES: tl.constexpr,
                    ALIGNED: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Attention to any number of tokens, with a running top."""
    sums = no_tokens(q[0].shape[0], FEATURES)
    for done in tl.range(0, count, TILE, disable_licm=True):
        tokens = load_tokens(
            key, value, bias, bias_stride, weight, b, h, begin + done, count - done, factor,
            HEAD_DIM, CHANNELS, FEATURES, ALIGNED, TILE,
        )  # fmt: skip
        sums = attend(q, tokens, sums, factor, False)
    return attended(sums, factor)


# ---- one entry ----------------------------------------------------------------------------------


@triton.jit
def over_heads(at, inside, heads, queries):
    """Sum of [H, N] over `heads` heads, in order; `at` points to the tile's queries of the first head."""
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
        psi = 1 / (1 + tl.exp2(tl.minimum(above * width * -LOG2E, 126.0)))
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
def concept_of(concepts, e, there):
    """Of entry e. The index is data: whatever it holds, nothing outside the arrays is read."""
    c = tl.load(concepts.index + e, mask=there, other=0)
    return tl.minimum(tl.maximum(c, 0), concepts.concepts - 1)


@triton.jit
def unmasked_tokens(concepts, first, count, WIDTH: tl.constexpr):
    """How many of `count` tokens there are, of at most WIDTH."""
    token = tl.arange(0, WIDTH)
    bias = tl.load(concepts.token_bias + first + token, mask=token < count, other=float("-inf"))
    return tl.sum((bias != float("-inf")).to(tl.int32))


@triton.jit
def find_entry(concepts, rule, e, there, TOKENS: tl.constexpr, STREAMED: tl.constexpr):
    """Entry e of the batch row, if it is there."""
    c = concept_of(concepts, e, there)
    begin = tl.load(concepts.index + concepts.entries + c)
    begin = tl.minimum(tl.maximum(begin, 0), concepts.tokens)
    length = tl.load(concepts.index + concepts.entries + concepts.concepts + c)
    length = tl.minimum(length, tl.minimum(concepts.longest, concepts.tokens - begin))
    active = tl.load(concepts.numbers + e * STRIDE + ACTIVE, mask=there, other=0.0) > 0
    length = tl.where(active & (rule.reads_tokens == 1), length, 0)
    present = length
    if concepts.token_bias is not None:
        present = 0
        if STREAMED:
            for first in range(0, length, 128):
                present += unmasked_tokens(concepts, begin + first, length - first, 128)
        else:
            present = unmasked_tokens(concepts, begin, length, triton.next_power_of_2(TOKENS))
    return Entry(e, c, begin, length, active & ((present > 0) | (rule.reads_tokens == 0)))


@triton.jit
def load_entry(concepts, entry, h, factor, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr,
               FEATURES: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """The tokens of an entry, which fit a tile."""
    return load_tokens(
        concepts.key, concepts.value, concepts.token_bias, 1, concepts.token_weight,
        0, h, entry.begin, entry.length, factor, HEAD_DIM, CHANNELS, FEATURES, ALIGNED, TILE,
    )  # fmt: skip


@triton.jit
def attend_entry(q, concepts, entry, h, factor, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr,
                 FEATURES: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr,
                 STREAMED: tl.constexpr):  # fmt: skip
    """Attention to the concept of an entry."""
    if STREAMED:
        return attend_by_tiles(
            q, concepts.key, concepts.value, concepts.token_bias, 1, concepts.token_weight,
            0, h, entry.begin, entry.length, factor, HEAD_DIM, CHANNELS, FEATURES, ALIGNED, TILE,
        )  # fmt: skip
    else:
        tokens = load_entry(concepts, entry, h, factor, HEAD_DIM, CHANNELS, FEATURES, ALIGNED, TILE)
        return attend_once(q, tokens, factor, FEATURES)


@triton.jit
def consider(mix, entry, f, z, zz, concepts, rule, moments, trace, at,
             GOAL: tl.constexpr, HEAD_DIM: tl.constexpr, FEATURES: tl.constexpr):  # fmt: skip
    """`mix` with the entry, whose attention is f."""
    e = entry.number
    row = e.to(tl.int64) * at.size
    plane = concepts.entries.to(tl.int64) * at.size
    entry_top = f.top - LOG2E * entry_number(concepts.numbers, e, LOGIT_BIAS, rule.logit_bias)
    reads_mass = rule.similarity == MASS
    share = tl.zeros(zz.shape, tl.float32)
    if reads_mass | (trace is not None):
        share = mass_share(z.top, z.mass, entry_top, f.mass)
    reads_products = (rule.similarity == COSINE) | (rule.direction == ORTHOGONAL)
    reads_products = reads_products | (rule.direction == PROJECTION)
    zf = tl.zeros(zz.shape, tl.float32)
    ff = tl.zeros(zz.shape, tl.float32)
    if reads_products:
        zf = inner(z.out, f.out)
        ff = inner(f.out, f.out)
    along = tl.zeros(zz.shape, tl.float32)
    if concepts.direction is not None:
        along = inner(
            z.out, load_vector(concepts.direction, entry.concept, at.h, at.heads, HEAD_DIM, FEATURES)
        )
    m = Moments(zz, zf, ff, along, share)
    if GOAL == "moments":
        to = moments + row + at.own + at.n
        tl.store(to, m.zz, mask=at.inside & reads_products)
        tl.store(to + plane, m.zf, mask=at.inside & reads_products)
        tl.store(to + 2 * plane, m.ff, mask=at.inside & reads_products)
        if concepts.direction is not None:
            tl.store(to + 3 * plane, m.along, mask=at.inside)
        tl.store(to + 4 * plane, m.mass, mask=at.inside & reads_mass)
        return mix
    else:
        in_scope = 1
        if moments is not None:
            of = moments + row + at.n
            in_scope = at.heads
            of_products = tl.where(reads_products, in_scope, 0)
            if concepts.direction is not None:
                along = over_heads(of + 3 * plane, at.inside, in_scope, at.queries)
            m = Moments(
                over_heads(of, at.inside, of_products, at.queries),
                over_heads(of + plane, at.inside, of_products, at.queries),
                over_heads(of + 2 * plane, at.inside, of_products, at.queries),
                along,
                over_heads(of + 4 * plane, at.inside, tl.where(reads_mass, in_scope, 0), at.queries),
            )
        if concepts.offset is not None:
            added = tl.load(concepts.offset + entry.concept).to(tl.float32)
            m = Moments(m.zz, m.zf, m.ff, m.along + added, m.mass)
        r = similarity(rule, m, in_scope)
        g = gate(rule, concepts.numbers, e, r)
        g = tl.where(r == r, g, r)  # minimum and maximum lose a NaN, which has to show in the output
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
            feature = load_vector(concepts.update, entry.concept, at.h, at.heads, HEAD_DIM, FEATURES)
        if trace is not None:
            to = trace + row + at.own + at.n
            tl.store(to, g, mask=at.inside & (rule.largest == 0))
            tl.store(to + plane, r, mask=at.inside)
            tl.store(to + 2 * plane, share, mask=at.inside)
        return Mix(
            sum_of(old, mix.removed, -(strength * amount * x * new), feature),
            mix.moved * old - strength * amount * step * new,
            mix.weight * old + amount * new,
            level, best_g, best_r, best, True,
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


# ---- the output ---------------------------------------------------------------------------------


@triton.jit
def finish(mix, z, zz, rule, norms, at, GOAL: tl.constexpr):
    """O, and where `limit` acted."""
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
    sum_y = norm_sum(rule, y, inner(y, y))
    sum_z = norm_sum(rule, z.out, zz)
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
    return sum_of(rule.blend * scaling, y, rest, z.out), limited


@triton.jit
def write(out, o, first, row, at, HEAD_DIM: tl.constexpr, FEATURES: tl.constexpr, ALIGNED: tl.constexpr):
    to = rows_at(out, at.b, at.h, first, row, ALIGNED)
    for i in tl.static_range(len(o)):
        channel = offset(FEATURES, i) + tl.arange(0, width(FEATURES, i))
        mask = at.inside[:, None] & (channel < HEAD_DIM)[None, :]
        tl.store(to[:, None] + channel[None, :], o[i].to(out.data.dtype.element_ty), mask=mask)


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


# ---- the kernel ---------------------------------------------------------------------------------


@triton.jit
def share(count, i, n):
    """count * i // n, for n^2 < 2^31 without 64 bits: to divide those takes a hundred instructions."""
    return count // n * i + count % n * i // n


# Sizes change from call to call, capacities when concepts are swapped: neither may recompile.
RUN_TIME = (
    "query_batch", "query_head", "query_row", "key_batch", "key_head", "key_row", "value_batch", "value_head",
    "value_row", "out_batch", "out_head", "out_row", "bias_batch", "bias_head", "bias_key",
    "concept_key_head", "concept_key_row", "concept_value_head", "concept_value_row",
    "batch", "heads", "queries", "keys", "entries", "concepts", "tokens", "longest",
)  # fmt: skip


@triton.jit(do_not_specialize=RUN_TIME)
def attention(
    query, key, value, out, key_bias, concept_key, concept_value, index, numbers, token_bias, token_weight,
    direction, update, offsets, moments, norms, trace_entries, trace_rows,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    out_batch, out_head, out_row, bias_batch, bias_head, bias_key,
    concept_key_head, concept_key_row, concept_value_head, concept_value_row,
    batch, heads, queries, keys, entries, concepts, tokens, longest,
    similarity_of, gate_of, direction_of, joint, largest, norm, norm_order, reads_tokens, norm_limit, blend,
    strength, logit_bias, threshold, width_of, cap, factor,
    GOAL: tl.constexpr, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr, FEATURES: tl.constexpr,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, KEPT: tl.constexpr, TOKENS: tl.constexpr,
    STREAMED: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """The kernel; a grid of any number of programs.

    query, key, value, out [B, H, N or M, D] and concept_key, concept_value [T, H, D], with strides in units
    of ALIGNED elements; key_bias [B, H, M] with strides in elements; index ... offsets: contiguous, as in
    `fastnegate.ConceptTokens`. Without concepts, concept_key is None and nothing of them is read.
    moments [5, E, H, N], norms [2, B, H, N]: float32, for scope `feature`, else None.
    trace_entries [3, E, H, N] (gate, similarity, mass), cleared, and trace_rows [4, B, H, N] (|O - Z|^2,
    |Z|^2, whether limited, values of O that are not finite): float32 for statistics, or None.
    The rule as in `Rule`; factor: scale * log2(e). GOAL: "moments", "norms" or "output". The sizes of tiles
    as in `tiles.Tiles`.
    """
    queries_of = View(query, query_batch, query_head, query_row)
    keys_of = View(key, key_batch, key_head, key_row)
    values_of = View(value, value_batch, value_head, value_row)
    out_of = View(out, out_batch, out_head, out_row)
    rule = Rule(
        similarity_of, gate_of, direction_of, joint, largest, norm, norm_order, reads_tokens, norm_limit,
        blend, strength, logit_bias, threshold, width_of, cap,
    )  # fmt: skip
    text = None
    if concept_key is not None:
        text = Concepts(
            View(concept_key, 0, concept_key_head, concept_key_row),
            View(concept_value, 0, concept_value_head, concept_value_row),
            index, numbers, token_bias, token_weight, direction, update, offsets,
            entries, concepts, tokens, longest,
        )  # fmt: skip
    size = queries * heads
    # The tiles of all heads, one head after the other, in equal shares: few programs see two heads.
    tiles = tl.cdiv(queries, ROWS)
    begin = share(batch * heads * tiles, tl.program_id(0), tl.num_programs(0))
    end = share(batch * heads * tiles, tl.program_id(0) + 1, tl.num_programs(0))
    # Nothing is hoisted out of this loop and that of the entries: what is computed from constants and takes
    # one instruction, such as addresses in shared memory, would take more registers than there are. The
    # loop of tiles is another matter: see `kept_inside`.
    for head in tl.range(begin // tiles, tl.cdiv(end, tiles), disable_licm=True):
        b = head // heads
        h = head % heads
        bias = None
        if key_bias is not None:
            bias = key_bias + b.to(tl.int64) * bias_batch + h.to(tl.int64) * bias_head
        prompt = None
        if KEPT:
            prompt = load_tokens(
                keys_of, values_of, bias, bias_key, None, b, h, 0, keys, factor,
                HEAD_DIM, CHANNELS, FEATURES, ALIGNED, KEYS,
            )  # fmt: skip
        first = 0
        last = 0
        if concept_key is not None:
            of_row = index + entries + 2 * concepts + b
            first = tl.minimum(tl.maximum(tl.load(of_row), 0), entries)
            last = tl.minimum(tl.load(of_row + 1), entries)
        held = ()
        for i in tl.static_range(HELD):
            entry = find_entry(text, rule, first + i, first + i < last, TOKENS, STREAMED)
            of_entry = load_entry(text, entry, h, factor, HEAD_DIM, CHANNELS, FEATURES, ALIGNED, TOKENS)
            held = held + ((entry, of_entry),)
        first_tile = tl.maximum(begin - head * tiles, 0)
        last_tile = tl.minimum(end - head * tiles, tiles)
        for tile_number in tl.range(first_tile, last_tile, disable_licm=kept_inside(ROWS)):
            line = tl.arange(0, ROWS)
            top_line = tile_number * ROWS
            n = top_line + line
            inside = n < queries
            at = Place(b, h, n, inside, h * queries, size, batch, heads, queries)
            q = load_rows(queries_of, b, h, top_line, line, inside, HEAD_DIM, CHANNELS, ALIGNED)
            if KEPT:
                z = attend_once(q, prompt, factor, FEATURES)
            else:
                z = attend_by_tiles(
                    q, keys_of, values_of, bias, bias_key, None, b, h, 0, keys, factor,
                    HEAD_DIM, CHANNELS, FEATURES, ALIGNED, KEYS,
                )  # fmt: skip
            o = z.out
            limited = tl.zeros([ROWS], tl.int1)
            zz = inner(z.out, z.out)

            if concept_key is not None:
                nothing = tl.zeros([ROWS], tl.float32)
                lowest = tl.full([ROWS], float("-inf"), tl.float32)
                mix = Mix(
                    no_tokens(ROWS, FEATURES).out, nothing, nothing, tl.where(joint == 1, lowest, nothing),
                    lowest, lowest, tl.zeros([ROWS], tl.int32), False,
                )  # fmt: skip
                # As another value q lies in shared memory until an entry wants it, not in registers: without
                # this, head_dim 80 and more spill.
                again = ()
                for i in tl.static_range(len(q)):
                    again = again + ((q[i] + 0.0).to(q[i].dtype),)
                for i in tl.static_range(HELD):
                    entry = Entry(*held[i][0])
                    of_entry = Tokens(*held[i][1])
                    if entry.exists:
                        f = attend_once(again, of_entry, factor, FEATURES)
                        mix = consider(
                            mix, entry, f, z, zz, text, rule, moments, trace_entries, at,
                            GOAL, HEAD_DIM, FEATURES,
                        )  # fmt: skip
                for e in tl.range(first + HELD, last, disable_licm=True):
                    entry = find_entry(text, rule, e, True, TOKENS, STREAMED)
                    if entry.exists:
                        f = attend_entry(
                            again, text, entry, h, factor,
                            HEAD_DIM, CHANNELS, FEATURES, ALIGNED, TOKENS, STREAMED,
                        )  # fmt: skip
                        mix = consider(
                            mix, entry, f, z, zz, text, rule, moments, trace_entries, at,
                            GOAL, HEAD_DIM, FEATURES,
                        )  # fmt: skip

                if GOAL != "moments":
                    if mix.found:  # else O = Z to the last bit
                        o, limited = finish(mix, z, zz, rule, norms, at, GOAL)
                        if trace_entries is not None:
                            # With `max` only the winner has a gate, and only now is it known.
                            to = trace_entries + mix.best.to(tl.int64) * size + at.own + n
                            tl.store(to, mix.best_g, mask=inside & (largest == 1))

            if GOAL == "output":
                if trace_rows is not None:
                    trace_row(trace_rows, o, z.out, zz, limited, out.dtype.element_ty, at)
                write(out_of, o, top_line, line, at, HEAD_DIM, FEATURES, ALIGNED)
