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

Partials (docs/semantics.md, section 9) are read where they are needed: that of the prompt in the place of
its keys, that of shared keys whenever something is merged with it, which is in the cache after the first
time. Kept in registers it would be a fourth matrix beside Z, F and the accumulator, and there are none left.

A matrix of text length or head_dim is a tuple of pieces (rows.py): 77 keys are 64 + 16.

Modes are run-time branches on scalars. They are passed as floats because Triton compiles an integer
argument that happens to be 1 or a multiple of 16 into the kernel, once per value. Compile-time are sizes of
tiles, GOAL (a launch for sums writes no output) and which optional pointers are None.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.target_info import current_target

from .rows import View, inner, load_rows, offset, pieces, scaled, width, write
from .rule import (
    ACTIVE,
    INSIDE,
    MASS,
    OUTSIDE,
    STRIDE,
    Concepts,
    Entry,
    Mix,
    Moments,
    Place,
    Rule,
    concept_of,
    finish,
    measure,
    over_heads,
    reads_products,
    remove,
    trace_row,
    trace_share,
)
from .segment import (
    LOG2E,
    LOWEST,
    TINY,
    Attended,
    Partial,
    empty,
    finite_top,
    load_partial,
    merge,
    merged,
)


class Tokens(NamedTuple):
    """Keys and values of one tile of tokens: tuples over its pieces, and of these over head_dim's."""

    key: Any  # [tokens, channels]
    value: Any
    added: Any  # [tokens], to the logits before they are scaled; -inf where there is no token
    weight: Any  # [tokens], of the values


DEPTH = tl.constexpr(16)  # what a matrix instruction sums over
HOISTING_HELPS = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9))


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
    return attended(attend(q, tokens, empty(q[0].shape[0], FEATURES), factor, True), factor)


@triton.jit
def attend_by_tiles(q, key, value, bias, bias_stride, weight, b, h, begin, count, factor,
                    HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr, FEATURES: tl.constexpr,
                    ALIGNED: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Attention to any number of tokens, with a running top."""
    sums = empty(q[0].shape[0], FEATURES)
    for done in tl.range(0, count, TILE, disable_licm=True):
        tokens = load_tokens(
            key, value, bias, bias_stride, weight, b, h, begin + done, count - done, factor,
            HEAD_DIM, CHANNELS, FEATURES, ALIGNED, TILE,
        )  # fmt: skip
        sums = attend(q, tokens, sums, factor, False)
    return attended(sums, factor)


# ---- one entry ----------------------------------------------------------------------------------


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
    schedule = tl.load(concepts.numbers + e * STRIDE + ACTIVE, mask=there, other=0.0)
    active = there & ((schedule > 0) | (schedule != schedule))  # NaN stands for 1
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
def load_entry(concepts, entry, b, h, factor, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr,
               FEATURES: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """The tokens of an entry, which fit a tile."""
    return load_tokens(
        concepts.key, concepts.value, concepts.token_bias, 1, concepts.token_weight,
        b, h, entry.begin, entry.length, factor, HEAD_DIM, CHANNELS, FEATURES, ALIGNED, TILE,
    )  # fmt: skip


@triton.jit
def attend_entry(q, concepts, entry, b, h, factor, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr,
                 FEATURES: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr,
                 STREAMED: tl.constexpr):  # fmt: skip
    """Attention to the concept of an entry."""
    if STREAMED:
        return attend_by_tiles(
            q, concepts.key, concepts.value, concepts.token_bias, 1, concepts.token_weight,
            b, h, entry.begin, entry.length, factor, HEAD_DIM, CHANNELS, FEATURES, ALIGNED, TILE,
        )  # fmt: skip
    else:
        tokens = load_entry(concepts, entry, b, h, factor, HEAD_DIM, CHANNELS, FEATURES, ALIGNED, TILE)
        return attend_once(q, tokens, factor, FEATURES)


@triton.jit
def consider(mix, entry, f, z, zz, concepts, shared, rule, moments, trace, at,
             GOAL: tl.constexpr, HEAD_DIM: tl.constexpr, FEATURES: tl.constexpr,
             ALIGNED: tl.constexpr):  # fmt: skip
    """`mix` with the entry, whose attention is f."""
    e = entry.number
    row = e.to(tl.int64) * at.size
    plane = concepts.entries.to(tl.int64) * at.size
    if shared is not None:
        if trace is not None:
            trace_share(trace + 3 * plane + row, shared, f, at)
        if (rule.shared == INSIDE) & (rule.reads_tokens == 1):
            p = load_partial(shared, at, at.inside, HEAD_DIM, FEATURES, ALIGNED)
            f = Attended(merged(p, f, f.out), f.top, f.mass)
    m, entry_top, share = measure(entry, f, z, zz, concepts, rule, trace, at, 1, HEAD_DIM, FEATURES)
    products = reads_products(rule)
    reads_mass = rule.similarity == MASS
    if GOAL == "moments":
        to = moments + row + at.own + at.n
        tl.store(to, m.zz, mask=at.inside & products)
        tl.store(to + plane, m.zf, mask=at.inside & products)
        tl.store(to + 2 * plane, m.ff, mask=at.inside & products)
        if concepts.direction is not None:
            tl.store(to + 3 * plane, m.along, mask=at.inside)
        tl.store(to + 4 * plane, m.mass, mask=at.inside & reads_mass)
        return mix
    else:
        in_scope = 1
        if moments is not None:
            of = moments + row + at.n
            in_scope = at.heads
            of_products = tl.where(products, in_scope, 0)
            along = m.along
            if concepts.direction is not None:
                along = over_heads(of + 3 * plane, at.inside, in_scope, at.queries)
            m = Moments(
                over_heads(of, at.inside, of_products, at.queries),
                over_heads(of + plane, at.inside, of_products, at.queries),
                over_heads(of + 2 * plane, at.inside, of_products, at.queries),
                along,
                over_heads(of + 4 * plane, at.inside, tl.where(reads_mass, in_scope, 0), at.queries),
            )
        return remove(
            mix, entry, f, None, m, entry_top, share, in_scope, concepts, rule, trace, at,
            HEAD_DIM, FEATURES,
        )  # fmt: skip


# ---- the kernel ---------------------------------------------------------------------------------


@triton.jit
def share(count, i, n):
    """count * i // n, for n^2 < 2^31 without 64 bits: to divide those takes a hundred instructions."""
    return count // n * i + count % n * i // n


# Sizes change from call to call, capacities when concepts are swapped: neither may recompile.
RUN_TIME = (
    "query_batch", "query_head", "query_row", "key_batch", "key_head", "key_row", "value_batch", "value_head",
    "value_row", "out_batch", "out_head", "out_row", "bias_batch", "bias_head", "bias_key",
    "concept_key_batch", "concept_key_head", "concept_key_row",
    "concept_value_batch", "concept_value_head", "concept_value_row",
    "shared_batch", "shared_head", "shared_row", "shared_lse_batch", "shared_lse_head", "shared_lse_row",
    "prompt_batch", "prompt_head", "prompt_row", "prompt_lse_batch", "prompt_lse_head", "prompt_lse_row",
    "batch", "heads", "queries", "keys", "entries", "concepts", "tokens", "longest",
)  # fmt: skip


@triton.jit(do_not_specialize=RUN_TIME)
def attention(
    query, key, value, out, key_bias, concept_key, concept_value, index, numbers, token_bias, token_weight,
    direction, update, offsets, shared_out, shared_lse, prompt_out, prompt_lse,
    moments, norms, trace_entries, trace_rows,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    out_batch, out_head, out_row, bias_batch, bias_head, bias_key,
    concept_key_batch, concept_key_head, concept_key_row,
    concept_value_batch, concept_value_head, concept_value_row,
    shared_batch, shared_head, shared_row, shared_lse_batch, shared_lse_head, shared_lse_row,
    prompt_batch, prompt_head, prompt_row, prompt_lse_batch, prompt_lse_head, prompt_lse_row,
    batch, heads, queries, keys, entries, concepts, tokens, longest,
    similarity_of, gate_of, direction_of, joint, largest, norm, norm_order, shared_of, reads_tokens,
    norm_limit, blend, strength, logit_bias, threshold, width_of, cap, factor,
    GOAL: tl.constexpr, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr, FEATURES: tl.constexpr,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, KEPT: tl.constexpr, TOKENS: tl.constexpr,
    STREAMED: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """The kernel; a grid of any number of programs.

    query, key, value, out [B, H, N or M, D] and concept_key, concept_value [B, T, H, D], or [T, H, D] with
    batch strides of None; strides in units of ALIGNED elements; key_bias [B, H, M] with strides in elements;
    index ... offsets: contiguous, as in `fastnegate.ConceptTokens`. Without concepts, concept_key is None and
    nothing of them is read.
    shared_out, prompt_out [B, H, N, D], with strides in units of ALIGNED elements, and shared_lse, prompt_lse
    [B, H, N]: partials, or None. With one of the prompt, key and value are not read.
    moments [5, E, H, N], norms [2, B, H, N]: float32, for scope `feature`, else None.
    trace_entries and trace_rows, for statistics, as `fastnegate.operator.statistics.Trace`, or None.
    The rule as in `Rule`; factor: scale * log2(e). GOAL: "moments", "norms" or "output". The sizes of tiles
    as in `tiles.Tiles`.
    """
    queries_of = View(query, query_batch, query_head, query_row)
    keys_of = View(key, key_batch, key_head, key_row)
    values_of = View(value, value_batch, value_head, value_row)
    out_of = View(out, out_batch, out_head, out_row)
    rule = Rule(
        similarity_of, gate_of, direction_of, joint, largest, norm, norm_order, shared_of, reads_tokens,
        norm_limit, blend, strength, logit_bias, threshold, width_of, cap,
    )  # fmt: skip
    shared = None
    if shared_out is not None:
        shared = Partial(
            View(shared_out, shared_batch, shared_head, shared_row),
            View(shared_lse, shared_lse_batch, shared_lse_head, shared_lse_row),
        )
    text = None
    if concept_key is not None:
        own_keys = 0
        own_values = 0
        if concept_key_batch is not None:
            own_keys, own_values = concept_key_batch, concept_value_batch
        text = Concepts(
            View(concept_key, own_keys, concept_key_head, concept_key_row),
            View(concept_value, own_values, concept_value_head, concept_value_row),
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
        if KEPT and prompt_out is None:
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
            of_entry = load_entry(text, entry, b, h, factor, HEAD_DIM, CHANNELS, FEATURES, ALIGNED, TOKENS)
            held = held + ((entry, of_entry),)
        first_tile = tl.maximum(begin - head * tiles, 0)
        last_tile = tl.minimum(end - head * tiles, tiles)
        for tile_number in tl.range(first_tile, last_tile, disable_licm=kept_inside(ROWS)):
            line = tl.arange(0, ROWS)
            top_line = tile_number * ROWS
            n = top_line + line
            inside = n < queries
            at = Place(b, h, top_line, line, n, inside, h * queries, size, batch, heads, queries)
            q = load_rows(queries_of, b, h, top_line, line, inside, HEAD_DIM, CHANNELS, ALIGNED)
            if prompt_out is not None:
                reduced = Partial(
                    View(prompt_out, prompt_batch, prompt_head, prompt_row),
                    View(prompt_lse, prompt_lse_batch, prompt_lse_head, prompt_lse_row),
                )
                z = load_partial(reduced, at, inside, HEAD_DIM, FEATURES, ALIGNED)
            elif KEPT:
                z = attend_once(q, prompt, factor, FEATURES)
            else:
                z = attend_by_tiles(
                    q, keys_of, values_of, bias, bias_key, None, b, h, 0, keys, factor,
                    HEAD_DIM, CHANNELS, FEATURES, ALIGNED, KEYS,
                )  # fmt: skip
            if shared is not None:
                if trace_rows is not None:
                    plane = batch.to(tl.int64) * size
                    trace_share(trace_rows + 4 * plane + b.to(tl.int64) * size, shared, z, at)
                if rule.shared != OUTSIDE:
                    z = merge(load_partial(shared, at, inside, HEAD_DIM, FEATURES, ALIGNED), z)
            limited = tl.zeros([ROWS], tl.int1)
            zz = inner(z.out, z.out)

            if concept_key is not None:
                nothing = tl.zeros([ROWS], tl.float32)
                lowest = tl.full([ROWS], float("-inf"), tl.float32)
                mix = Mix(
                    empty(ROWS, FEATURES).out, nothing, nothing, tl.where(joint == 1, lowest, nothing),
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
                            mix, entry, f, z, zz, text, shared, rule, moments, trace_entries, at,
                            GOAL, HEAD_DIM, FEATURES, ALIGNED,
                        )  # fmt: skip
                for e in tl.range(first + HELD, last, disable_licm=True):
                    entry = find_entry(text, rule, e, True, TOKENS, STREAMED)
                    if entry.exists:
                        f = attend_entry(
                            again, text, entry, b, h, factor,
                            HEAD_DIM, CHANNELS, FEATURES, ALIGNED, TOKENS, STREAMED,
                        )  # fmt: skip
                        mix = consider(
                            mix, entry, f, z, zz, text, shared, rule, moments, trace_entries, at,
                            GOAL, HEAD_DIM, FEATURES, ALIGNED,
                        )  # fmt: skip

            # What is left if nothing is removed.
            bare = z.out
            around = None
            if shared is not None and GOAL != "moments":
                around = empty(ROWS, FEATURES)
                if rule.shared == OUTSIDE:
                    around = load_partial(shared, at, inside, HEAD_DIM, FEATURES, ALIGNED)
                    bare = merged(around, z, bare)
                    zz = inner(bare, bare)
            o = bare
            if concept_key is not None:
                if GOAL != "moments":
                    if mix.found:  # else O = Z to the last bit
                        o, limited = finish(mix, z, bare, zz, around, rule, norms, at, 1, GOAL)
                        if trace_entries is not None:
                            # With `max` only the winner has a gate, and only now is it known.
                            to = trace_entries + mix.best.to(tl.int64) * size + at.own + n
                            tl.store(to, mix.best_g, mask=inside & (largest == 1))

            if GOAL == "output":
                if trace_rows is not None:
                    trace_row(trace_rows, o, bare, zz, limited, out.dtype.element_ty, at)
                write(out_of, o, at, HEAD_DIM, FEATURES, ALIGNED)
