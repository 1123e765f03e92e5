# SPDX-License-Identifier: Apache-2.0
"""Programs with one mistake each, of the kinds that kernels are written with.

A test that accepts a mutated kernel does not see that kind of mistake at that place, unless the
mutation changes nothing that is promised; such survivors are to be named with the reason.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace

from .parse import Address, Immediate, Instruction, Program, Register, Vector
from .values import size_of

NOTHING = Instruction("fence")


@dataclass(frozen=True)
class Mutation:
    kind: str
    place: int  # in the code
    description: str
    program: Program


def mutations(
    program: Program,
    per_kind: int | None = None,
    seed: int = 0,
    among: Container[int] | None = None,
    kinds: Container[str] | None = None,
) -> Iterator[Mutation]:
    """All mutations, or at most `per_kind` of each kind, from as many lines of the source as there are.

    Args:
        among: places that may be mutated, such as `Result.executed`: what never runs cannot be missed.
        kinds: some of KINDS, by default all.
    """
    for kind, mutate in KINDS.items():
        if kinds is not None and kind not in kinds:
            continue
        found = [
            (place, changed)
            for place, instruction in enumerate(program.code)
            if among is None or place in among
            for changed in mutate(instruction)
            if changed != instruction
        ]
        if per_kind is not None:
            random.Random(f"{seed} {kind}").shuffle(found)
            seen: Counter[str] = Counter()
            turns = []
            for place, changed in found:
                source = program.code[place].source
                turns.append((seen[source], place, changed))
                seen[source] += 1
            found = [each[1:] for each in sorted(turns, key=lambda turn: turn[0])[:per_kind]]
        for place, changed in sorted(found, key=lambda each: each[0]):
            yield _mutation(program, kind, place, changed)


def _mutation(program: Program, kind: str, place: int, changed: Instruction) -> Mutation:
    before = program.code[place]
    now = "nothing" if changed is NOTHING else str(changed)
    code = (*program.code[:place], changed, *program.code[place + 1 :])
    return Mutation(kind, place, f"{kind}, {before.place}: {before} -> {now}", replace(program, code=code))


# ---- the kinds: from an instruction to its mutants ------------------------------------------------


def _drop_barrier(i: Instruction) -> list[Instruction]:
    return [NOTHING] if i.opcode in ("bar", "barrier") and "warp" not in i.modifiers else []


def _drop_wait(i: Instruction) -> list[Instruction]:
    return [NOTHING] if {"wait_group", "wait_all"} & {*i.modifiers} else []


def _wait_too_short(i: Instruction) -> list[Instruction]:
    return [_with_operand(i, 0, Immediate(i.operands[0].value + 1))] if "wait_group" in i.modifiers else []


def _drop_commit(i: Instruction) -> list[Instruction]:
    return [NOTHING] if "commit_group" in i.modifiers else []


def _drop_copy(i: Instruction) -> list[Instruction]:
    return [NOTHING] if i.name.startswith(("cp.async.ca", "cp.async.cg")) else []


def _drop_store(i: Instruction) -> list[Instruction]:
    return [NOTHING] if i.opcode == "st" else []


def _swap_a(i: Instruction) -> list[Instruction]:
    """The registers of A that hold row g + 8 and column k + 8."""
    return _swapped_in_vector(i, 1, 1, 2) if i.opcode == "mma" else []


def _swap_b(i: Instruction) -> list[Instruction]:
    return _swapped_in_vector(i, 2, 0, 1) if i.opcode == "mma" else []


def _swap_sums(i: Instruction) -> list[Instruction]:
    return _swapped_in_vector(i, 0, 1, 2) if i.opcode == "mma" else []


def _transpose(i: Instruction) -> list[Instruction]:
    """ldmatrix with and without .trans."""
    if i.opcode != "ldmatrix":
        return []
    if "trans" in i.modifiers:
        return [replace(i, modifiers=tuple(m for m in i.modifiers if m != "trans"))]
    at = next(n for n, m in enumerate(i.modifiers) if m in ("x1", "x2", "x4")) + 1
    return [replace(i, modifiers=(*i.modifiers[:at], "trans", *i.modifiers[at:]))]


def _swap_loaded(i: Instruction) -> list[Instruction]:
    return _swapped_in_vector(i, 0, 0, 1) if i.opcode == "ldmatrix" else []


_BESIDE = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt", "lo": "ls", "ls": "lo", "hi": "hs", "hs": "hi"}


def _bound(i: Instruction) -> list[Instruction]:
    """< for <= and so on, of integers: a bound is off by one."""
    return _comparison(i, _BESIDE)


def _bound_constant(i: Instruction) -> list[Instruction]:
    if i.opcode != "setp" or _is_float(i) or not isinstance(i.operands[2], Immediate):
        return []
    value = i.operands[2].value
    return [_with_operand(i, 2, Immediate(value + by)) for by in (-1, 1)]


_PAIRS = (("lt", "ge"), ("le", "gt"), ("eq", "ne"), ("equ", "neu"))
_OPPOSITE = {**dict(_PAIRS), **{b: a for a, b in _PAIRS}}


def _condition(i: Instruction) -> list[Instruction]:
    return _comparison(i, _OPPOSITE)


def _stride(i: Instruction) -> list[Instruction]:
    """A constant that an integer is multiplied with."""
    if i.opcode not in ("mul", "mad") or _is_float(i):
        return []
    return [
        _with_operand(i, n, Immediate(i.operands[n].value + by))
        for n in (1, 2)
        if isinstance(i.operands[n], Immediate)
        for by in (-1, 1)
    ]


def _addend(i: Instruction) -> list[Instruction]:
    """A constant that is added to an integer: a step of a loop, the place of a part of an array."""
    if i.opcode not in ("add", "sub") or _is_float(i) or not isinstance(i.operands[2], Immediate):
        return []
    return [_with_operand(i, 2, Immediate(i.operands[2].value + by)) for by in (-1, 1)]


def _number(i: Instruction) -> list[Instruction]:
    """A float constant of arithmetic, halved or doubled; not the infinity that a maximum begins with."""
    if i.opcode not in ("add", "sub", "mul", "fma", "min", "max", "div") or i.modifiers[-1] != "f32":
        return []
    return [
        _with_operand(i, n, Immediate(operand.value ^ 1 << 23))
        for n, operand in enumerate(i.operands)
        if isinstance(operand, Immediate) and isinstance(operand.value, int)
        if operand.value & 0x7FFFFFFF not in (0, 0x7F800000)
    ]


def _shift(i: Instruction) -> list[Instruction]:
    if i.opcode not in ("shl", "shr") or not isinstance(i.operands[2], Immediate):
        return []
    return [_with_operand(i, 2, Immediate(i.operands[2].value + by)) for by in (-1, 1)]


def _offset(i: Instruction) -> list[Instruction]:
    """An access, shifted by as much as it is aligned to."""
    if i.opcode in ("ld", "st") and "param" not in i.modifiers:
        size = size_of(i.modifiers[-1])
        for width in (2, 4):
            size *= width if f"v{width}" in i.modifiers else 1
    elif i.opcode == "ldmatrix" or i.name.startswith(("cp.async.ca", "cp.async.cg")):
        size = 16
    else:
        return []
    return [
        _with_operand(i, n, replace(operand, offset=operand.offset + by))
        for n, operand in enumerate(i.operands)
        if isinstance(operand, Address)
        for by in (-size, size)
    ]


def _drop_guard(i: Instruction) -> list[Instruction]:
    return [replace(i, guard=None)] if i.guard and i.opcode != "bra" else []


def _invert_guard(i: Instruction) -> list[Instruction]:
    return [replace(i, guard=replace(i.guard, negated=not i.guard.negated))] if i.guard else []


def _swap_selection(i: Instruction) -> list[Instruction]:
    return [_swapped(i, 1, 2)] if i.opcode == "selp" else []


def _exchange(**names: str) -> Callable[[Instruction], list[Instruction]]:
    def mutate(i: Instruction) -> list[Instruction]:
        if i.opcode not in names or not _is_float(i) or Immediate(0) in i.operands:
            return []  # x - 0 is x + 0
        return [replace(i, opcode=names[i.opcode])]

    return mutate


def _subtract_backwards(i: Instruction) -> list[Instruction]:
    return [_swapped(i, 1, 2)] if i.opcode == "sub" else []


def _neighbour(i: Instruction) -> list[Instruction]:
    """shfl with another distance."""
    if i.opcode != "shfl" or not isinstance(i.operands[2], Immediate):
        return []
    return [_with_operand(i, 2, Immediate(i.operands[2].value ^ 3))]


def _address_bits(i: Instruction) -> list[Instruction]:
    """A constant in the bit arithmetic of addresses: swizzles and layouts."""
    if i.opcode not in ("and", "or", "xor", "bfe") or "pred" in i.modifiers:
        return []
    last = len(i.operands) - 1
    if not isinstance(i.operands[last], Immediate) or not i.operands[last].value:
        return []
    value = i.operands[last].value
    return [_with_operand(i, last, Immediate(value ^ (value & -value)))]


KINDS: dict[str, Callable[[Instruction], list[Instruction]]] = {
    "barrier dropped": _drop_barrier,
    "wait dropped": _drop_wait,
    "wait for one group less": _wait_too_short,
    "commit dropped": _drop_commit,
    "copy dropped": _drop_copy,
    "store dropped": _drop_store,
    "registers of A swapped": _swap_a,
    "registers of B swapped": _swap_b,
    "sums swapped": _swap_sums,
    "ldmatrix transposed": _transpose,
    "registers of ldmatrix swapped": _swap_loaded,
    "bound off by one": _bound,
    "constant of a bound off by one": _bound_constant,
    "condition inverted": _condition,
    "stride off by one": _stride,
    "addend off by one": _addend,
    "number changed": _number,
    "shift off by one": _shift,
    "offset off by one": _offset,
    "guard dropped": _drop_guard,
    "guard inverted": _invert_guard,
    "selection swapped": _swap_selection,
    "max for min": _exchange(max="min", min="max"),
    "sub for add": _exchange(add="sub", sub="add"),
    "subtraction backwards": _subtract_backwards,
    "wrong neighbour": _neighbour,
    "bit of an address": _address_bits,
}


# ---- rewriting --------------------------------------------------------------------------------------


def _is_float(i: Instruction) -> bool:
    return bool(i.modifiers) and i.modifiers[-1].startswith(("f", "bf"))


def _comparison(i: Instruction, names: dict[str, str]) -> list[Instruction]:
    if i.opcode != "setp" or i.modifiers[0] not in names:
        return []
    if names is _BESIDE and _is_float(i):
        return []
    return [replace(i, modifiers=(names[i.modifiers[0]], *i.modifiers[1:]))]


def _with_operand(i: Instruction, place: int, operand) -> Instruction:
    return replace(i, operands=(*i.operands[:place], operand, *i.operands[place + 1 :]))


def _swapped(i: Instruction, a: int, b: int) -> Instruction:
    operands = list(i.operands)
    operands[a], operands[b] = operands[b], operands[a]
    return replace(i, operands=tuple(operands))


def _swapped_in_vector(i: Instruction, operand: int, a: int, b: int) -> list[Instruction]:
    vector = i.operands[operand]
    if not isinstance(vector, Vector) or len(vector.items) <= max(a, b):
        return []
    items: list[Register] = list(vector.items)
    items[a], items[b] = items[b], items[a]
    return [_with_operand(i, operand, Vector(tuple(items)))]
