# SPDX-License-Identifier: Apache-2.0
"""From an instruction to a function that runs it.

`TABLE` holds a binder for each opcode. A binder takes a `Form`, asks it for the modifiers it knows
and for operands, and returns the step that runs on a CTA. A modifier that nobody asked for is an
error, so that nothing is half understood.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from . import values
from .memory import WARP
from .parse import Address, Immediate, Instruction, PtxError, Register, Special, Symbol, Vector
from .values import UNSIGNED, decode, encode, size_of

if TYPE_CHECKING:
    from .machine import Cta, Lanes, Launch

Step = Callable[["Cta", "Lanes"], None]
Read = Callable[["Cta"], np.ndarray]
Write = Callable[["Cta", "Lanes", np.ndarray], None]
KINDS = {*values.NUMBERS, "bf16", "f16x2", "bf16x2", "tf32"}
TABLE: dict[str, Callable[[Form], Step]] = {}


def opcode(*names: str):
    """The decorated binder is that of these opcodes."""

    def register(binder):
        TABLE.update(dict.fromkeys(names, binder))
        return binder

    return register


class Bound(NamedTuple):
    """An instruction ready to run on a certain number of threads."""

    instruction: Instruction
    guard: int | None  # slot of a predicate
    negated: bool
    kind: str  # "plain", "branch", "exit", "barrier" or "warp"
    step: Step | None = None
    target: int = 0  # of a branch
    members: Read | None = None  # of "warp": the lanes it waits for, None: all


class Form:
    """An instruction while it is bound."""

    def __init__(self, instruction: Instruction, launch: Launch) -> None:
        self.instruction = instruction
        self.launch = launch
        self.left = list(instruction.modifiers)
        self.operands = instruction.operands

    def has(self, *names: str) -> bool:
        """Whether one of these modifiers is there; they are then understood."""
        found = [name for name in names if name in self.left]
        for name in found:
            self.left.remove(name)
        return bool(found)

    def one_of(self, *names: str) -> str:
        for name in names:
            if self.has(name):
                return name
        raise self.unknown()

    def kind(self) -> str:
        """The type, which is the last modifier."""
        if not self.left or self.left[-1] not in KINDS:
            raise self.unknown()
        return self.left.pop()

    def finish(self) -> None:
        if self.left:
            raise self.unknown()

    def unknown(self) -> PtxError:
        return PtxError(f"unknown instruction {self.instruction.name} at {self.instruction.place}")

    # Operands.

    def read(self, operand, kind: str) -> Read:
        """Numbers of an operand, or of the operand with this number."""
        operand = self.operands[operand] if isinstance(operand, int) else operand
        if isinstance(operand, Register):
            return self._read_register(operand, kind)
        if isinstance(operand, Special):
            return self._read_special(operand, kind)
        if isinstance(operand, Vector):
            return self._read_vector(operand, kind)
        if isinstance(operand, Immediate):
            value = operand.value
        elif isinstance(operand, Symbol) and operand.name in self.launch.program.shared:
            value = self.launch.program.shared[operand.name]
        elif isinstance(operand, Symbol) and operand.name in self.launch.parameters:
            value = self.launch.parameters[operand.name]
        else:
            raise PtxError(f"{operand} cannot be read: {self.instruction} at {self.instruction.place}")
        constant = np.full(self.launch.threads, _constant_bits(value, kind))
        constant = decode(constant, kind)
        return lambda cta: constant

    def _read_register(self, register: Register, kind: str) -> Read:
        slot, own, size = register.slot, size_of(register.type), size_of(kind)
        if (register.type == "pred") != (kind == "pred") or size > own:
            raise PtxError(f"{register} is a {register.type}: {self.instruction} at {self.instruction.place}")
        if kind == "pred" or (size == own and kind in (f"b{8 * size}", f"u{8 * size}")):
            return lambda cta: cta.registers[slot]
        if size < own:
            narrow = UNSIGNED[size]
            return lambda cta: decode(cta.registers[slot].astype(narrow), kind)
        if kind in values.NUMBERS:
            dtype = values.NUMBERS[kind]
            return lambda cta: cta.registers[slot].view(dtype)
        return lambda cta: decode(cta.registers[slot], kind)

    def _read_special(self, special: Special, kind: str) -> Read:
        size = size_of(kind)
        fixed = _special(special.name, self.launch)
        if fixed is not None:
            fixed = decode(np.broadcast_to(fixed, (self.launch.threads,)).astype(UNSIGNED[size]), kind)
            return lambda cta: fixed
        name, _, axis = special.name.partition(".")
        if name != "%ctaid" or axis not in ("x", "y", "z"):
            raise PtxError(f"unknown register {special}: {self.instruction} at {self.instruction.place}")
        place = "xyz".index(axis)
        return lambda cta: decode(np.full(cta.threads, cta.place[place], UNSIGNED[size]), kind)

    def _read_vector(self, vector: Vector, kind: str) -> Read:
        """mov.b32 %r, {%rs1, %rs2}: the first element is the lowest."""
        size = size_of(kind) // len(vector.items)
        parts = [self.read(item, f"b{8 * size}") for item in vector.items]

        def read(cta: Cta) -> np.ndarray:
            return np.stack([part(cta) for part in parts], -1).view(UNSIGNED[size * len(parts)])[:, 0]

        return lambda cta: decode(read(cta), kind)

    def write(self, operand, kind: str) -> Write:
        """Numbers to a register, or to the operand with this number; None is the sink."""
        operand = self.operands[operand] if isinstance(operand, int) else operand
        if operand is None:
            return lambda cta, lanes, numbers: None
        if isinstance(operand, Vector):
            return self._write_vector(operand, kind)
        if not isinstance(operand, Register):
            raise PtxError(f"{operand} cannot be written: {self.instruction} at {self.instruction.place}")
        slot, own, size = operand.slot, size_of(operand.type), size_of(kind)
        if (operand.type == "pred") != (kind == "pred") or size > own:
            raise PtxError(f"{operand} is a {operand.type}: {self.instruction} at {self.instruction.place}")
        if size == own:
            return lambda cta, lanes, numbers: cta.put(lanes, slot, encode(numbers, kind))
        wide = UNSIGNED[own] if not kind.startswith("s") else np.dtype(f"i{own}")
        narrow = UNSIGNED[size] if not kind.startswith("s") else np.dtype(f"i{size}")

        def write(cta: Cta, lanes: Lanes, numbers: np.ndarray) -> None:
            cta.put(lanes, slot, encode(numbers, kind).view(narrow).astype(wide).view(UNSIGNED[own]))

        return write

    def _write_vector(self, vector: Vector, kind: str) -> Write:
        size = size_of(kind) // len(vector.items)
        parts = [self.write(item, f"b{8 * size}") for item in vector.items]

        def write(cta: Cta, lanes: Lanes, numbers: np.ndarray) -> None:
            columns = encode(numbers, kind).view(UNSIGNED[size]).reshape(-1, len(parts))
            for part, column in zip(parts, columns.T):
                part(cta, lanes, np.ascontiguousarray(column))

        return write

    def address(self, operand: int) -> Read:
        """int64 addresses of an operand [base + offset]."""
        address = self.operands[operand]
        if not isinstance(address, Address):
            raise PtxError(f"{address} is no address: {self.instruction} at {self.instruction.place}")
        base = address.base
        wide = isinstance(base, Register) and base.type.endswith("64")
        read, offset = self.read(base, "u64" if wide else "u32"), address.offset
        return lambda cta: read(cta).astype(np.int64) + offset


def bind(instruction: Instruction, launch: Launch) -> Bound:
    form = Form(instruction, launch)
    guard = instruction.guard
    common = (instruction, guard.register.slot if guard else None, bool(guard and guard.negated))
    opcode = instruction.opcode
    if opcode == "bra":
        form.has("uni")
        form.finish()
        label = str(form.operands[0])
        if label not in launch.program.labels:
            raise PtxError(f"no label {label}: {instruction} at {instruction.place}")
        return Bound(*common, "branch", target=launch.program.labels[label])
    if opcode in ("ret", "exit"):
        form.finish()
        return Bound(*common, "exit")
    if opcode in ("bar", "barrier") and "warp" not in form.left:
        form.has("cta", "aligned")
        if not form.has("sync") or form.operands != (Immediate(0),):
            raise form.unknown()  # named barriers would need more than one clock
        form.finish()
        return Bound(*common, "barrier")
    if opcode not in TABLE:
        raise form.unknown()
    try:
        step = TABLE[opcode](form)
    except (KeyError, IndexError, AttributeError, ValueError) as error:
        raise form.unknown() from error
    form.finish()
    kind = "warp" if hasattr(step, "members") else "plain"
    return Bound(*common, kind, step, members=getattr(step, "members", None))


def of_warp(step: Step, members: Read | None = None) -> Step:
    """Mark a step that lanes of a warp do together: those in the mask `members`, by default all."""
    step.members = members
    return step


def _constant_bits(value: int | float, kind: str) -> np.generic:
    size = size_of(kind)
    if isinstance(value, float):
        return encode(np.array([value]), kind)[0]
    if kind == "pred":
        return np.bool_(value)
    return UNSIGNED[size].type(value % (1 << 8 * size))


def _special(name: str, launch: Launch) -> np.ndarray | int | None:
    threads = np.arange(launch.threads)
    x, y, _ = launch.block
    axes = {"x": 0, "y": 1, "z": 2}
    base, _, axis = name.partition(".")
    return {
        "%tid": lambda: (threads % x, threads // x % y, threads // (x * y))[axes[axis]],
        "%ntid": lambda: launch.block[axes[axis]],
        "%nctaid": lambda: launch.grid[axes[axis]],
        "%laneid": lambda: threads % WARP,
        "%warpid": lambda: threads // WARP,
        "%lanemask_lt": lambda: (1 << threads % WARP) - 1,
        "%dynamic_smem_size": lambda: launch.shared_size - launch.program.shared_size,
    }.get(base, lambda: None)()
