# SPDX-License-Identifier: Apache-2.0
"""Instructions that the lanes of a warp do together: votes, shuffles and matrix products."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..binding import Form, Read, Step, of_warp, opcode
from ..memory import WARP
from ..parse import Immediate, Pair, PtxError
from . import matrix
from .accesses import items

if TYPE_CHECKING:
    from ..machine import Cta, Lanes


def _members(form: Form, operand: int) -> Read | None:
    if form.operands[operand] in (Immediate(-1), Immediate(0xFFFFFFFF)):
        return None
    return form.read(operand, "u32")


@opcode("bar")
def _bar_warp(form: Form) -> Step:
    form.has("warp")
    form.one_of("sync")
    return of_warp(lambda cta, lanes: None, _members(form, 0))


@opcode("activemask")
def _activemask(form: Form) -> Step:
    kind = form.kind()
    write = form.write(0, kind)
    return lambda cta, lanes: write(cta, lanes, _ballot(lanes.mask))


def _ballot(mask: np.ndarray) -> np.ndarray:
    bits = mask.reshape(-1, WARP).astype(np.uint64) @ (np.uint64(1) << np.arange(WARP, dtype=np.uint64))
    return np.repeat(bits, WARP).astype(np.uint32)


@opcode("vote")
def _vote(form: Form) -> Step:
    form.one_of("sync")
    kind = form.kind()
    mode = form.one_of("ballot", "all", "any", "uni")
    condition, write, mask_of = form.read(1, "pred"), form.write(0, kind), form.read(2, "u32")

    def step(cta: Cta, lanes: Lanes) -> None:
        ballot, mask = _ballot(condition(cta) & lanes.mask), mask_of(cta)
        result = {
            "ballot": lambda: ballot,
            "all": lambda: ballot == mask,
            "any": lambda: ballot != 0,
            "uni": lambda: (ballot == mask) | (ballot == 0),
        }[mode]()
        write(cta, lanes, result)

    return of_warp(step, _members(form, 2))


@opcode("shfl")
def _shfl(form: Form) -> Step:
    form.one_of("sync")
    kind = form.kind()
    mode = form.one_of("bfly", "idx", "up", "down")
    target = form.operands[0]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    write, write_valid = form.write(first, kind), form.write(second, "pred")
    read, by, control = form.read(1, kind), form.read(2, "u32"), form.read(3, "u32")
    members = _members(form, 4)

    def step(cta: Cta, lanes: Lanes) -> None:
        lane = np.arange(cta.threads) % WARP
        distance, limits = by(cta).astype(np.int64) & 31, control(cta).astype(np.int64)
        segment, clamp = limits >> 8 & 31, limits & 31
        lowest, highest = lane & segment, (lane & segment) | (clamp & ~segment)
        if mode == "up":
            source = lane - distance
            valid = source >= highest
        else:
            source = {
                "down": lambda: lane + distance,
                "bfly": lambda: lane ^ distance,
                "idx": lambda: lowest | (distance & ~segment),
            }[mode]()
            valid = source <= highest
        source = np.where(valid, source, lane)
        if members and ((members(cta) >> source.astype(np.uint32)) & 1 == 0)[lanes.mask].any():
            raise PtxError("shfl from a lane that its mask does not name")
        write(cta, lanes, read(cta)[np.arange(cta.threads) - lane + source])
        write_valid(cta, lanes, valid)

    return of_warp(step, members)


@opcode("redux")
def _redux(form: Form) -> Step:
    form.one_of("sync")
    kind = form.kind()
    combine = {
        "add": np.add, "min": np.minimum, "max": np.maximum,
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    }[form.one_of("add", "min", "max", "and", "or", "xor")]  # fmt: skip
    read, write, mask_of = form.read(1, kind), form.write(0, kind), form.read(2, "u32")

    def step(cta: Cta, lanes: Lanes) -> None:
        given, result = read(cta), np.array(read(cta))
        for thread in lanes.index.tolist():
            base = thread - thread % WARP
            mask = int(mask_of(cta)[thread])
            result[thread] = combine.reduce([given[base + i] for i in range(WARP) if mask >> i & 1])
        write(cta, lanes, result)

    return of_warp(step, _members(form, 2))


@opcode("ldmatrix")
def _ldmatrix(form: Form) -> Step:
    form.one_of("sync")
    form.one_of("aligned")
    form.one_of("m8n8")
    count = int(form.one_of("x1", "x2", "x4")[1])
    transposed = form.has("trans")
    form.one_of("shared", "shared::cta")
    form.one_of("b16")
    address = form.address(1)
    puts = [form.write(item, "b32") for item in items(form.operands[0], count)]

    def step(cta: Cta, lanes: Lanes) -> None:
        index = lanes.index.reshape(-1, WARP)[:, : 8 * count].ravel()  # their lanes name the rows
        rows = cta.shared.read(index, address(cta)[index], 16)
        for put, fragment in zip(puts, matrix.fragments(rows, count, transposed)):
            put(cta, lanes, lanes.spread(fragment))

    return of_warp(step)


@opcode("mma")
def _mma(form: Form) -> Step:
    form.one_of("sync")
    form.one_of("aligned")
    shape = form.left.pop(0)
    form.one_of("row")
    form.one_of("col")
    result, a, b, c = form.left
    form.left.clear()
    layout = matrix.layout(shape, result, a, b, c)
    if layout is None:
        raise form.unknown()
    count_name = f"{shape}.{a}.{c}"
    operands = [
        [form.read(item, "b32") for item in items(form.operands[i], n)]
        for i, n in ((1, layout.a.registers), (2, layout.b.registers), (3, layout.c.registers))
    ]
    puts = [form.write(item, "b32") for item in items(form.operands[0], layout.c.registers)]

    def step(cta: Cta, lanes: Lanes) -> None:
        fragments = (np.stack([lanes.pick(read(cta)) for read in reads]) for reads in operands)
        for put, bits in zip(puts, layout.multiply(*fragments)):
            put(cta, lanes, lanes.spread(bits))
        cta.counts.mma[count_name] += lanes.count // WARP

    return of_warp(step)
