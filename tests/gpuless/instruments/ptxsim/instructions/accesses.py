# SPDX-License-Identifier: Apache-2.0
"""Instructions that read and write memory: ld, st, cp.async, atom, red."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..binding import Form, Step, opcode
from ..memory import SHARED_WINDOW, Copy
from ..parse import Immediate, PtxError, Vector
from ..values import UNSIGNED, decode, encode, size_of
from .arithmetic import elementwise

if TYPE_CHECKING:
    from ..machine import Cta, Lanes

_CACHING = ("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "volatile", "weak", "noftz")


def _forget_caching(form: Form) -> bool:
    """Drop what only concerns speed; whether a cache policy is the last operand."""
    form.has(*_CACHING)
    policy = form.has("L2::cache_hint")
    form.left = [m for m in form.left if not m.startswith(("L1::", "L2::", "level::"))]
    return policy


def _space(form: Form) -> str:
    for space in ("global", "shared", "shared::cta"):
        if form.has(space):
            return space.partition("::")[0]
    return "generic"


def _load(space: str, cta: Cta, threads: np.ndarray, addresses: np.ndarray, size: int) -> np.ndarray:
    if space == "generic":
        space = _generic_space(addresses)
        addresses = addresses - (SHARED_WINDOW if space == "shared" else 0)
    if space == "shared":
        return cta.shared.read(threads, addresses, size)
    return cta.memory.read(threads, addresses, size, cta.number, cta.counts)


def _store(space: str, cta: Cta, threads: np.ndarray, addresses: np.ndarray, data: np.ndarray) -> None:
    if space == "generic":
        space = _generic_space(addresses)
        addresses = addresses - (SHARED_WINDOW if space == "shared" else 0)
    if space == "shared":
        cta.shared.write(threads, addresses, data)
    else:
        cta.memory.write(threads, addresses, data, cta.number, cta.counts)


def _generic_space(addresses: np.ndarray) -> str:
    shared = addresses >= SHARED_WINDOW // 2
    if shared.any() != shared.all():
        raise PtxError("generic addresses of different spaces in one instruction")
    return "shared" if shared[0] else "global"


def _width(form: Form) -> int:
    return next((n for n in (2, 4, 8) if form.has(f"v{n}")), 1)


def items(operand, width: int) -> tuple:
    items = operand.items if isinstance(operand, Vector) else (operand,)
    if len(items) != width:
        raise IndexError
    return items


@opcode("ld")
def _ld(form: Form) -> Step:
    kind = form.kind()
    _forget_caching(form)
    if form.has("param"):
        return _ld_param(form, kind)
    space, width, size = _space(form), _width(form), size_of(kind)
    address = form.address(1)
    puts = [form.write(item, kind) for item in items(form.operands[0], width)]

    def step(cta: Cta, lanes: Lanes) -> None:
        data = _load(space, cta, lanes.index, lanes.pick(address(cta)), size * width)
        columns = data.view(UNSIGNED[size])
        for i, put in enumerate(puts):
            put(cta, lanes, decode(lanes.spread(np.ascontiguousarray(columns[:, i])), kind))

    return step


def _ld_param(form: Form, kind: str) -> Step:
    width, size = _width(form), size_of(kind)
    address = form.address(1)
    puts = [form.write(item, kind) for item in items(form.operands[0], width)]

    def step(cta: Cta, lanes: Lanes) -> None:
        columns = form.launch.read_parameters(lanes.pick(address(cta)), size * width).view(UNSIGNED[size])
        for i, put in enumerate(puts):
            put(cta, lanes, decode(lanes.spread(np.ascontiguousarray(columns[:, i])), kind))

    return step


@opcode("st")
def _st(form: Form) -> Step:
    kind = form.kind()
    _forget_caching(form)
    space, width, size = _space(form), _width(form), size_of(kind)
    address = form.address(0)
    reads = [form.read(item, f"b{8 * size}") for item in items(form.operands[1], width)]

    def step(cta: Cta, lanes: Lanes) -> None:
        columns = np.stack([lanes.pick(read(cta)) for read in reads], -1)
        _store(space, cta, lanes.index, lanes.pick(address(cta)), columns.view(np.uint8))

    return step


@opcode("cp")
def _cp(form: Form) -> Step:
    if not form.has("async"):
        raise form.unknown()
    if form.has("commit_group"):

        def commit(cta: Cta, lanes: Lanes) -> None:
            cta.committed[lanes.mask] += 1

        return commit
    if form.has("wait_all"):
        return lambda cta, lanes: cta.finish_copies(lanes, None)
    if form.has("wait_group"):
        pending = form.operands[0].value
        return lambda cta, lanes: cta.finish_copies(lanes, pending)
    return _cp_async(form)


def _cp_async(form: Form) -> Step:
    """Bounds are checked now, data arrive at the wait: the latest moment that is allowed."""
    form.one_of("ca", "cg")
    policy = _forget_caching(form)
    if not form.has("shared", "shared::cta") or not form.has("global"):
        raise form.unknown()
    to, origin, size = form.address(0), form.address(1), form.operands[2].value
    given = len(form.operands) - policy > 3
    available = form.read(3, "u32") if given else None

    def step(cta: Cta, lanes: Lanes) -> None:
        threads, target = lanes.index, lanes.pick(to(cta))
        sources = lanes.pick(origin(cta))
        lengths = lanes.pick(available(cta)) if given else np.full(lanes.count, size)
        if (lengths > size).any():
            raise PtxError(f"cp.async reads {lengths.max()} of {size} bytes")
        data = np.zeros((lanes.count, size), np.uint8)
        for length in np.unique(lengths[lengths > 0]).tolist():
            some = lengths == length
            # The address of a full copy is as aligned as the copy, that of a shorter one too.
            if (sources[some] % size).any():
                raise PtxError(f"misaligned global address of a cp.async of {size} bytes")
            data[some, :length] = cta.memory.read(
                threads[some], sources[some], length, cta.number, cta.counts
            )
        cta.shared.begin_copy(threads, target, size)
        cta.copies.append(Copy(threads, target, data, cta.committed[threads], str(form.instruction)))

    return step


@opcode("atom", "red")
def _atom(form: Form) -> Step:
    kind = form.kind()
    form.has("relaxed", "acquire", "release", "acq_rel")
    form.has("cta", "gpu", "sys")
    _forget_caching(form)
    space = _space(form)
    operation = form.one_of("add", "min", "max", "and", "or", "xor", "exch", "cas")
    first = 1 if form.instruction.opcode == "atom" else 0
    address, size = form.address(first), size_of(kind)
    operands = [form.read(i, kind) for i in range(first + 1, len(form.operands))]
    write = form.write(0, kind) if first else None
    combine = {
        "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
        "xor": np.bitwise_xor, "exch": lambda old, new: new,
        "cas": lambda old, expected, new: np.where(old == expected, new, old),
    }[operation]  # fmt: skip

    def step(cta: Cta, lanes: Lanes) -> None:
        given = [lanes.pick(operand(cta)) for operand in operands]

        def change(old: np.ndarray, place: int) -> np.ndarray:
            new = combine(decode(old.view(UNSIGNED[size]), kind), *(x[place : place + 1] for x in given))
            return encode(new, kind).view(np.uint8)

        where = lanes.pick(address(cta))
        home = _generic_space(where) if space == "generic" else space
        if home == "shared":
            where = where - (SHARED_WINDOW if space == "generic" else 0)
            old = cta.shared.update(lanes.index, where, size, change)
        else:
            old = cta.memory.update(lanes.index, where, size, change, cta.counts)
        if write:
            write(cta, lanes, decode(lanes.spread(old.view(UNSIGNED[size])[:, 0]), kind))

    return step


@opcode("createpolicy")
def _createpolicy(form: Form) -> Step:
    form.left.clear()  # about the cache, whatever it is
    return elementwise(form, "b64", lambda x: x, [form.read(Immediate(0), "b64")])


@opcode("prefetch", "membar", "fence", "nanosleep")
def _nothing(form: Form) -> Step:
    form.left.clear()
    return lambda cta, lanes: None


@opcode("trap")
def _trap(form: Form) -> Step:
    def step(cta: Cta, lanes: Lanes) -> None:
        raise PtxError("the program stops itself")

    return step
