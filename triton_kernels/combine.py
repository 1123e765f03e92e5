# SPDX-License-Identifier: Apache-2.0
"""`combine` in Triton: the rule where all attention is done already and every segment is a partial.

No matrices are multiplied here: what counts is bytes, and every row of every partial is read once, into
registers. So a program has whole queries: the rows of a tile are the heads of some queries, side by side as
in [B, N, H, D] memory. Scope `feature` then sums over rows of its own tile, in the one pass that scope `head`
takes too, whose tiles have rows of one head. Alive at a time are Z, the shared keys, one F and the
accumulator.

Which slot an entry has is data, and tensors cannot be numbered on a device: they are a tuple of arguments, of
which an entry chooses. A table of addresses in memory would have to be copied to the device at every call.
Their number is compiled in; their strides are alike.
"""

import triton
import triton.language as tl

from .rows import View, chosen, inner, over_tile, write
from .rule import (
    ACTIVE,
    INSIDE,
    OUTSIDE,
    Concepts,
    Entry,
    Mix,
    Place,
    Rule,
    concept_of,
    entry_number,
    finish,
    measure,
    remove,
    trace_row,
)
from .segment import (
    Attended,
    Partial,
    empty,
    kept_if,
    load_mass,
    load_output,
    load_partial,
    mass_share,
    merge,
    merged,
)


@triton.jit
def of_slot(tensors, c):
    """The c-th of a tuple."""
    tensor = tensors[0]
    for i in tl.static_range(1, len(tensors)):
        tensor = tl.where(c == i, tensors[i], tensor)
    return tensor


# As in attention.py: sizes change from call to call, and do not compile.
RUN_TIME = (
    "shared_batch", "shared_head", "shared_row", "shared_lse_batch", "shared_lse_head", "shared_lse_row",
    "prompt_batch", "prompt_head", "prompt_row", "prompt_lse_batch", "prompt_lse_head", "prompt_lse_row",
    "slot_batch", "slot_head", "slot_row", "slot_lse_batch", "slot_lse_head", "slot_lse_row",
    "out_batch", "out_head", "out_row", "batch", "heads", "queries", "entries", "concepts",
)  # fmt: skip


@triton.jit(do_not_specialize=RUN_TIME)
def combine(
    shared_out, shared_lse, prompt_out, prompt_lse, slot_outs, slot_lses, out, index, numbers,
    direction, update, offsets, trace_entries, trace_rows,
    shared_batch, shared_head, shared_row, shared_lse_batch, shared_lse_head, shared_lse_row,
    prompt_batch, prompt_head, prompt_row, prompt_lse_batch, prompt_lse_head, prompt_lse_row,
    slot_batch, slot_head, slot_row, slot_lse_batch, slot_lse_head, slot_lse_row,
    out_batch, out_head, out_row, batch, heads, queries, entries, concepts,
    similarity_of, gate_of, direction_of, joint, largest, norm, norm_order, shared_of, reads_tokens,
    norm_limit, blend, strength, logit_bias, threshold, width_of, cap,
    GOAL: tl.constexpr, HEAD_DIM: tl.constexpr, FEATURES: tl.constexpr, ALIGNED: tl.constexpr,
    QUERIES: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """The kernel; a program for QUERIES queries of HEADS heads, which are 1, or all for scope `feature`.

    shared_out, prompt_out, out and each of slot_outs [B, H, N, D], with strides in units of ALIGNED elements;
    shared_lse, prompt_lse and each of slot_lses [B, H, N]. shared_out may be None, and slot_outs for a rule
    that reads no tokens. The others, the rule and the tables as in attention.py. GOAL is "output".
    """
    rule = Rule(
        similarity_of, gate_of, direction_of, joint, largest, norm, norm_order, shared_of, reads_tokens,
        norm_limit, blend, strength, logit_bias, threshold, width_of, cap,
    )  # fmt: skip
    none = View(None, 0, 0, 0)
    table = Concepts(
        none, none, index, numbers, None, None, direction, update, offsets, entries, concepts, 0, 0
    )  # fmt: skip
    groups = tl.cdiv(heads, HEADS)
    tiles = tl.cdiv(queries, QUERIES)
    program = tl.program_id(0)
    b = program // groups // tiles
    line = tl.arange(0, QUERIES * HEADS)
    row = line // HEADS
    h = program % groups * HEADS + line % HEADS
    first = program // groups % tiles * QUERIES
    n = first + row
    inside = (n < queries) & (h < heads)
    at = Place(b, h, first, row, n, inside, h * queries, queries * heads, batch, heads, queries)

    text = Partial(
        View(prompt_out, prompt_batch, prompt_head, prompt_row),
        View(prompt_lse, prompt_lse_batch, prompt_lse_head, prompt_lse_row),
    )
    z = load_partial(text, at, inside, HEAD_DIM, FEATURES, ALIGNED)
    if shared_out is not None:
        shared = Partial(
            View(shared_out, shared_batch, shared_head, shared_row),
            View(shared_lse, shared_lse_batch, shared_lse_head, shared_lse_row),
        )
        common = load_partial(shared, at, inside, HEAD_DIM, FEATURES, ALIGNED)
        if trace_rows is not None:
            of_row = trace_rows + (4 * batch + b).to(tl.int64) * at.size + at.own + n
            tl.store(of_row, mass_share(common.top, common.mass, z.top, z.mass), mask=inside)
        if rule.shared != OUTSIDE:
            z = merge(common, z)
    zz = over_tile(inner(z.out, z.out), HEADS)

    nothing = tl.zeros([QUERIES * HEADS], tl.float32)
    lowest = tl.full([QUERIES * HEADS], float("-inf"), tl.float32)
    no_entry = tl.zeros([QUERIES * HEADS], tl.int1)
    mix = Mix(
        empty(QUERIES * HEADS, FEATURES).out, nothing, nothing, tl.where(joint == 1, lowest, nothing),
        lowest, lowest, tl.zeros([QUERIES * HEADS], tl.int32), no_entry,
    )  # fmt: skip
    of_row = index + entries + 2 * concepts + b
    last = tl.minimum(tl.load(of_row + 1), entries)
    for e in tl.range(tl.minimum(tl.maximum(tl.load(of_row), 0), entries), last, disable_licm=True):
        if entry_number(numbers, e, ACTIVE, 1.0) > 0:
            c = concept_of(table, e, True)
            there = inside
            f = empty(QUERIES * HEADS, FEATURES)
            if slot_outs is not None:
                slot = Partial(
                    View(of_slot(slot_outs, c), slot_batch, slot_head, slot_row),
                    View(of_slot(slot_lses, c), slot_lse_batch, slot_lse_head, slot_lse_row),
                )
                top, mass = load_mass(slot, at, inside)
                there = over_tile(mass, HEADS) != 0
                f = kept_if(Attended(f.out, top, mass), reads_tokens == 1)
                features = load_output(slot, at, f.mass != 0, HEAD_DIM, FEATURES, ALIGNED)
                f = Attended(features, f.top, f.mass)
            if shared_out is not None:
                if trace_entries is not None:
                    of_entry = trace_entries + (3 * entries + e).to(tl.int64) * at.size + at.own + n
                    tl.store(of_entry, mass_share(common.top, common.mass, f.top, f.mass), mask=inside)
                if (rule.shared == INSIDE) & (reads_tokens == 1):
                    f = Attended(merged(common, f, f.out), f.top, f.mass)
            entry = Entry(e, c, 0, 0, True)
            m, entry_top, share = measure(
                entry, f, z, zz, table, rule, trace_entries, at, HEADS, HEAD_DIM, FEATURES
            )  # fmt: skip
            in_scope = heads if HEADS > 1 else 1
            mix = remove(
                mix, entry, f, there, m, entry_top, share, in_scope, table, rule, trace_entries, at,
                HEAD_DIM, FEATURES,
            )  # fmt: skip

    # What is left if nothing is removed.
    bare = z.out
    around = None
    if shared_out is not None:
        around = common
        if rule.shared == OUTSIDE:
            bare = merged(common, z, bare)
    zz = inner(bare, bare)
    o, limited = finish(mix, z, bare, zz, around, rule, None, at, HEADS, GOAL)
    o = chosen(mix.found, o, bare)  # without an entry O = Z to the last bit
    if trace_entries is not None:
        # With `max` only the winner has a gate, and only now is it known.
        to = trace_entries + mix.best.to(tl.int64) * at.size + at.own + n
        tl.store(to, mix.best_g, mask=inside & mix.found & (largest == 1))
    if trace_rows is not None:
        trace_row(trace_rows, o, bare, zz, limited & mix.found, out.dtype.element_ty, at)
    write(View(out, out_batch, out_head, out_row), o, at, HEAD_DIM, FEATURES, ALIGNED)
