# SPDX-License-Identifier: Apache-2.0
"""A GPU that runs one CTA after the other, all threads of a CTA at once in numpy.

A register is an array over the threads. Threads that are at the same instruction are one `Lanes`;
where a branch divides them, those that are furthest behind go first, until they meet the others. At
a barrier and at an instruction of whole warps they wait for whom it names; when nobody can go on, the
program has diverged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .binding import Bound, bind
from .counts import Counts
from .memory import WARP, Buffer, Copy, GlobalMemory, SharedMemory
from .parse import Program, PtxError
from .values import UNSIGNED, size_of

Size = tuple[int, int, int]
PARAMETER_SLOT = 1 << 16  # parameters are so far apart that no overrun ends in another one


class Lanes:
    """Some threads of a CTA."""

    def __init__(self, mask: np.ndarray) -> None:
        self.mask = mask
        self.count = int(np.count_nonzero(mask))
        self.all = self.count == mask.size
        self._index: np.ndarray | None = None
        self._warps: int | None = None

    @property
    def index(self) -> np.ndarray:
        """Their thread numbers."""
        if self._index is None:
            self._index = np.flatnonzero(self.mask)
        return self._index

    @property
    def warps(self) -> int:
        """In how many warps they are."""
        if self._warps is None:
            self._warps = int(self.mask.reshape(-1, WARP).any(1).sum())
        return self._warps

    def where(self, condition: np.ndarray) -> Lanes:
        mask = self.mask & condition
        kept = int(np.count_nonzero(mask))
        return self if kept == self.count else Lanes(mask)

    def __or__(self, other: Lanes) -> Lanes:
        return Lanes(self.mask | other.mask)

    def __sub__(self, other: Lanes) -> Lanes:
        return Lanes(self.mask & ~other.mask)

    def __str__(self) -> str:
        return f"{self.count} threads from {self.index[0]} on" if self.count else "no thread"

    def pick(self, values: np.ndarray) -> np.ndarray:
        """Of one value per thread, theirs."""
        return values if self.all else values[self.index]

    def spread(self, values: np.ndarray) -> np.ndarray:
        """One value for each of them to one per thread."""
        if self.all:
            return values
        full = np.zeros(self.mask.size, values.dtype)
        full[self.index] = values
        return full


@dataclass
class Result:
    """What a launch did."""

    per_cta: dict[Size, Counts]
    executed: set[int]  # places in the program that a thread came to with its guard true

    @property
    def total(self) -> Counts:
        return sum(self.per_cta.values(), Counts())


class Cta:
    """A thread block at work."""

    def __init__(self, launch: Launch, place: Size, number: int) -> None:
        self.launch = launch
        self.place = place
        self.number = number
        self.threads = launch.threads
        self.memory = launch.memory
        self.counts = Counts()
        self.shared = SharedMemory(launch.shared_size, self.counts)
        self.registers = list(launch.poison)
        self.copies: list[Copy] = []
        self.committed = np.zeros(self.threads, np.int64)
        self.fronts: dict[int, Lanes] = {}  # where threads are that can go on
        self.waiting: dict[int, Lanes] = {}  # at an instruction of their warp
        self.at_barrier: dict[int, Lanes] = {}
        self.steps = 0
        self.issued: dict[int, int] = {}  # place in the program: how many warps ran it

    def run(self) -> Counts:
        self.fronts = {0: Lanes(np.ones(self.threads, bool))}
        while self.fronts:
            place = min(self.fronts)
            self._advance(place, self.fronts.pop(place))
            if not self.fronts:
                self._release_barrier()
        if self.copies:
            copy = self.copies[0]
            raise PtxError(f"the program ends while a cp.async is on the way: {copy.instruction}")
        self._count_instructions()
        return self.counts

    def _join(self, place: int, lanes: Lanes) -> None:
        if lanes.count:
            there = self.fronts.get(place)
            self.fronts[place] = lanes if there is None else there | lanes

    def _advance(self, place: int, lanes: Lanes) -> None:
        """Run until the threads divide, wait, end, or meet others."""
        code, issued = self.launch.code, self.issued
        meeting = min(self.fronts, default=-1)
        while True:
            if place >= len(code):
                raise PtxError("the program ends without ret")
            bound = code[place]
            active = lanes
            if bound.guard is not None:
                condition = self.registers[bound.guard]
                active = lanes.where(~condition if bound.negated else condition)
            self.steps += 1
            if self.steps > self.launch.limit:
                raise self._error(bound, PtxError(f"still running after {self.steps} steps"))
            if active.count:
                issued[place] = issued.get(place, 0) + active.warps
                if bound.kind == "plain" or (active.all and bound.kind == "warp" and bound.members is None):
                    self._execute(bound, active)
                elif bound.kind == "branch":
                    if active.count < lanes.count or self.fronts:
                        self._join(bound.target, active)
                        self._join(place + 1, lanes - active)
                        return
                    place = bound.target
                    continue
                else:
                    self._join(place + 1, lanes - active)
                    self._stop(place, bound, active)
                    return
            place += 1
            if place == meeting:
                self._join(place, lanes)
                return

    def _stop(self, place: int, bound: Bound, lanes: Lanes) -> None:
        """At a point where threads end or wait for each other."""
        if bound.kind == "barrier":
            there = self.at_barrier.get(place)
            self.at_barrier[place] = lanes if there is None else there | lanes
        elif bound.kind == "warp":
            if place in self.waiting:
                lanes |= self.waiting.pop(place)
            complete = self._complete_warps(bound, lanes)
            if complete.count:
                self._execute(bound, complete)
                self._join(place + 1, complete)
            if complete.count < lanes.count:
                self.waiting[place] = lanes - complete

    def _complete_warps(self, bound: Bound, lanes: Lanes) -> Lanes:
        """Those of `lanes` for whom all that the instruction names are there."""
        bit = np.arange(self.threads) % WARP
        members = np.full(self.threads, 0xFFFFFFFF, np.uint32)  # a bit per lane
        if bound.members is not None:
            members = bound.members(self)
        if (lanes.mask & ((members >> bit.astype(np.uint32)) & 1 == 0)).any():
            raise self._error(bound, PtxError("a thread runs it that its mask does not name"))
        there = np.where(lanes.mask, 1 << bit, 0).reshape(-1, WARP).sum(1)
        return lanes.where((members & ~np.repeat(there, WARP)) == 0)

    def _release_barrier(self) -> None:
        if self.waiting:
            place, lanes = next(iter(self.waiting.items()))
            raise self._error(
                self.launch.code[place], PtxError(f"divergence: {lanes} wait for the rest of their warp")
            )
        if not self.at_barrier:
            return
        place, lanes = self.at_barrier.popitem()
        if self.at_barrier:
            other, _ = self.at_barrier.popitem()
            where = self.launch.code[other].instruction.place
            raise self._error(
                self.launch.code[place], PtxError(f"divergence: {lanes} wait here, others at {where}")
            )
        if not lanes.all:
            raise self._error(
                self.launch.code[place], PtxError(f"divergence: {lanes} wait, the others have ended")
            )
        self.shared.barrier()
        self.counts.barriers += 1
        self.fronts[place + 1] = lanes

    def _execute(self, bound: Bound, lanes: Lanes) -> None:
        try:
            bound.step(self, lanes)
        except PtxError as error:
            raise self._error(bound, error) from None

    def _error(self, bound: Bound, error: PtxError) -> PtxError:
        return PtxError(f"{error}, at {bound.instruction.place}: {bound.instruction}, CTA {self.place}")

    def _count_instructions(self) -> None:
        for place, warps in self.issued.items():
            self.counts.instructions[self.launch.code[place].instruction.opcode] += warps

    # What instructions do to their CTA.

    def put(self, lanes: Lanes, slot: int, bits: np.ndarray) -> None:
        """Write a register; arrays are never changed in place, so registers may share them."""
        self.registers[slot] = bits if lanes.all else np.where(lanes.mask, bits, self.registers[slot])

    def finish_copies(self, lanes: Lanes, pending: int | None) -> None:
        """Wait until only the last `pending` committed groups are on the way; None: wait for all."""
        left = []
        for copy in self.copies:
            done = lanes.mask[copy.threads]
            if pending is not None:
                done &= copy.group < self.committed[copy.threads] - pending
            if done.any():
                self.shared.end_copy(copy.threads[done], copy.addresses[done], copy.data[done])
            if not done.all():
                kept = ~done
                left.append(Copy(*(part[kept] for part in copy[:4]), copy.instruction))
        self.copies = left


class Launch:
    """A program bound to a grid and its arguments."""

    def __init__(
        self,
        program: Program,
        grid: Size,
        block: Size,
        arguments: Sequence[int | float | bytes | Buffer],
        memory: GlobalMemory,
        shared: int = 0,
        limit: int = 1_000_000,
    ) -> None:
        """
        Args:
            arguments: the parameters in order; a buffer stands for its address, bytes for a struct.
            shared: bytes of dynamic shared memory.
            limit: most instructions of a CTA, each counted once for all threads that run it together.
        """
        self.program = program
        self.grid = grid
        self.block = block
        self.memory = memory
        self.limit = limit
        self.threads = block[0] * block[1] * block[2]
        self.shared_size = program.shared_size + shared
        if self.threads % WARP or self.threads > 1024:
            raise ValueError(f"{self.threads} threads are not up to 32 full warps")
        if program.threads not in (None, self.threads):
            raise ValueError(f"{program.name} wants {program.threads} threads")
        packed = _pack(program, arguments)
        self.parameters = {name: i * PARAMETER_SLOT for i, name in enumerate(packed)}  # addresses
        self._contents = [*packed.values()]
        self.poison = [
            np.full(self.threads, False if kind == "pred" else np.array(-1).astype(UNSIGNED[size_of(kind)]))
            for kind in program.registers
        ]
        self.code = [bind(instruction, self) for instruction in program.code]

    def read_parameters(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """uint8 [addresses, size]"""
        data = np.empty((len(addresses), size), np.uint8)
        for address in np.unique(addresses).tolist():
            parameter, begin = divmod(address, PARAMETER_SLOT)
            content = self._contents[parameter] if 0 <= parameter < len(self._contents) else b""
            if begin + size > len(content) or begin % size:
                raise PtxError(f"read of {size} bytes at {begin} of a parameter that has {len(content)}")
            data[addresses == address] = np.frombuffer(content[begin : begin + size], np.uint8)
        return data

    def run(self) -> Result:
        self.memory.begin_launch()
        per_cta: dict[Size, Counts] = {}
        executed: set[int] = set()
        with np.errstate(all="ignore"):
            for z in range(self.grid[2]):
                for y in range(self.grid[1]):
                    for x in range(self.grid[0]):
                        cta = Cta(self, (x, y, z), len(per_cta))
                        per_cta[x, y, z] = cta.run()
                        executed |= cta.issued.keys()
        return Result(per_cta, executed)


def run(
    program: Program,
    grid: Sequence[int],
    block: Sequence[int] | int,
    arguments: Sequence[int | float | bytes | Buffer],
    memory: GlobalMemory,
    shared: int = 0,
    limit: int = 1_000_000,
) -> Result:
    """Launch a program, as a driver would; arguments as of `Launch`."""
    block = (block,) if isinstance(block, int) else block
    sizes = ((*size, 1, 1)[:3] for size in (grid, block))
    return Launch(program, *sizes, arguments, memory, shared, limit).run()


def _pack(program: Program, arguments: Sequence) -> dict[str, bytes]:
    if len(arguments) != len(program.parameters):
        raise ValueError(f"{program.name} takes {len(program.parameters)} arguments, not {len(arguments)}")
    packed = {}
    for parameter, value in zip(program.parameters, arguments):
        if isinstance(value, Buffer):
            value = value.address
        if isinstance(value, float):
            value = np.array(value, np.float32 if parameter.size == 4 else np.float64).tobytes()
        if isinstance(value, int):
            value = (value % (1 << 8 * parameter.size)).to_bytes(parameter.size, "little")
        if len(value) != parameter.size:
            raise ValueError(f"{parameter.name} has {parameter.size} bytes, not {len(value)}")
        packed[parameter.name] = value
    return packed
