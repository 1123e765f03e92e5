# SPDX-License-Identifier: Apache-2.0
"""Global and shared memory that refuse what hardware would answer with garbage.

Addresses are int64 arrays, one per accessing thread, `threads` their thread numbers; data are uint8
[threads, size]. Warps are told apart, threads of one warp are not: what one lane wrote, another lane
of its warp may read without a barrier.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .counts import SECTOR, Counts, Traffic
from .parse import PtxError

WARP = 32
SLOT = 1 << 32  # buffers are so far apart that no overrun ends in another one
SHARED_WINDOW = 1 << 60  # where generic addresses of shared memory begin
POISON = 0xFF  # what nobody wrote, as far as numbers are concerned: NaN


def _byte_columns(addresses: np.ndarray, size: int) -> np.ndarray:
    return addresses[:, None] + np.arange(size)


def _check_alignment(addresses: np.ndarray, size: int, what: str) -> None:
    odd = addresses % size != 0
    if odd.any():
        raise PtxError(f"misaligned {what} of {size} bytes at {addresses[odd][0]:#x}")


def _contested(threads: np.ndarray, at: np.ndarray, found: np.ndarray, wanted: np.ndarray, what: str) -> None:
    """After a write: did two threads write different values to one byte?"""
    wrong = (found != wanted).any(1)
    if wrong.any():
        raise PtxError(f"two threads write different values to {what} at once, one is {threads[wrong][0]}")


# ---- global memory ------------------------------------------------------------------------------


@dataclass
class Buffer:
    """An array of the host under its address on the device."""

    name: str
    address: int
    bytes: np.ndarray  # uint8, the array's own memory
    writable: bool
    allowed: np.ndarray | None  # which bytes exist for the kernel; None: all
    defined: np.ndarray | None  # which bytes hold something; None: all
    writer: np.ndarray = field(default=None)  # the CTA of this launch that wrote a byte, or -1

    def __add__(self, offset: int) -> int:
        return self.address + offset


class GlobalMemory:
    """Arrays that a kernel may touch, each with a name.

    A CTA may not read or overwrite what another CTA of the same launch wrote: they have no order.
    """

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []

    def add(
        self,
        name: str,
        array: np.ndarray,
        *,
        writable: bool = False,
        defined: bool = True,
        allowed: np.ndarray | None = None,
    ) -> Buffer:
        """Let a kernel use a contiguous array, in place.

        Args:
            defined: False if reading an element before it was written is an error.
            allowed: bool per byte, False where the array has gaps that must not be touched.
        """
        if not array.flags.c_contiguous:
            raise ValueError(f"{name} is not contiguous")
        flat = array.reshape(-1).view(np.uint8)
        buffer = Buffer(name, (len(self.buffers) + 1) * SLOT, flat, writable, allowed, None)
        if writable:
            buffer.writer = np.full(flat.size, -1, np.int32)
        if not defined:
            flat[:] = POISON
            buffer.defined = np.zeros(flat.size, bool)
        self.buffers.append(buffer)
        return buffer

    def begin_launch(self) -> None:
        for buffer in self.buffers:
            if buffer.writer is not None:
                buffer.writer[:] = -1

    def read(self, threads, addresses, size: int, cta: int, counts: Counts) -> np.ndarray:
        data = np.empty((len(addresses), size), np.uint8)
        for buffer, chosen, at in self._resolve(addresses, size, "read"):
            if buffer.defined is not None and not buffer.defined[at].all():
                raise PtxError(f"read of {buffer.name} where nothing was written")
            if buffer.writer is not None:
                self._check_owner(buffer, at, cta, "read")
            data[chosen] = buffer.bytes[at]
            _count(counts.read, buffer.name, threads[chosen], addresses[chosen], size)
        return data

    def write(self, threads, addresses, data: np.ndarray, cta: int, counts: Counts) -> None:
        size = data.shape[1]
        for buffer, chosen, at in self._resolve(addresses, size, "write"):
            if not buffer.writable:
                raise PtxError(f"write to {buffer.name}, which is an input")
            self._check_owner(buffer, at, cta, "write")
            buffer.bytes[at] = data[chosen]
            _contested(threads[chosen], at, buffer.bytes[at], data[chosen], buffer.name)
            buffer.writer[at] = cta
            if buffer.defined is not None:
                buffer.defined[at] = True
            _count(counts.written, buffer.name, threads[chosen], addresses[chosen], size)

    def update(self, threads, addresses, size: int, change: Callable, counts: Counts) -> np.ndarray:
        """Atomically, one thread after the other: `change(old bytes, place in threads)`."""
        old = np.empty((len(addresses), size), np.uint8)
        for buffer, chosen, at in self._resolve(addresses, size, "atomic update"):
            if not buffer.writable:
                raise PtxError(f"atomic update of {buffer.name}, which is an input")
            if buffer.defined is not None and not buffer.defined[at].all():
                raise PtxError(f"atomic update of {buffer.name} where nothing was written")
            for place, row in zip(np.arange(len(addresses))[chosen], at):
                old[place] = buffer.bytes[row]
                buffer.bytes[row] = change(old[place], place)
            for table in (counts.read, counts.written):
                _count(table, buffer.name, threads[chosen], addresses[chosen], size)
        return old

    def _resolve(self, addresses: np.ndarray, size: int, what: str):
        """(buffer, which accesses, their bytes in it) per buffer, all in bounds."""
        _check_alignment(addresses, size, f"global {what}")
        slots = (addresses + SLOT // 2) // SLOT - 1  # an underrun is the next buffer's
        for slot in (slots[:1] if (slots == slots[0]).all() else np.unique(slots)).tolist():
            chosen = slice(None) if len(slots) == 1 or (slots == slot).all() else slots == slot
            if not 0 <= slot < len(self.buffers):
                raise PtxError(f"global {what} at {addresses[chosen][0]:#x}, which is in no buffer")
            buffer = self.buffers[slot]
            begin = addresses[chosen] - buffer.address
            if begin.min() < 0 or begin.max() + size > buffer.bytes.size:
                outside = begin[(begin < 0) | (begin + size > buffer.bytes.size)][0]
                raise PtxError(
                    f"global {what} out of bounds: {size} bytes at {outside} of {buffer.name}, "
                    f"which has {buffer.bytes.size}"
                )
            at = _byte_columns(begin, size)
            if buffer.allowed is not None and not buffer.allowed[at].all():
                outside = begin[~buffer.allowed[at].all(1)][0]
                raise PtxError(f"global {what} out of bounds: byte {outside} of {buffer.name} is in a gap")
            yield buffer, chosen, at

    @staticmethod
    def _check_owner(buffer: Buffer, at: np.ndarray, cta: int, what: str) -> None:
        others = (buffer.writer[at] != -1) & (buffer.writer[at] != cta)
        if others.any():
            raise PtxError(f"race between CTAs: {what} of {buffer.name} where another CTA wrote")


def _count(table: dict[str, Traffic], name: str, threads, addresses: np.ndarray, size: int) -> None:
    sectors = np.unique((threads // WARP).astype(np.int64) << 48 | addresses // SECTOR)
    table[name] = table.get(name, Traffic()) + Traffic(addresses.size * size, sectors.size)


# ---- shared memory ------------------------------------------------------------------------------

UNWRITTEN, READY, IN_FLIGHT = range(3)


class Copy(NamedTuple):
    """A cp.async whose data are on the way."""

    threads: np.ndarray
    addresses: np.ndarray
    data: np.ndarray
    group: np.ndarray  # of each thread: how many groups it had committed before
    instruction: str


class SharedMemory:
    """Shared memory of a CTA, which remembers for each byte who touched it since the last barrier.

    Two warps may touch a byte between two barriers if both only read it, or if both write the same
    value (layouts with copies do): then only they may read it before the next barrier. Atomic updates
    may meet each other.
    """

    def __init__(self, size: int, counts: Counts) -> None:
        self.data = np.full(size, POISON, np.uint8)
        self.state = np.full(size, UNWRITTEN, np.uint8)
        self.writers = np.zeros(size, np.uint32)  # a bit per warp
        self.readers = np.zeros(size, np.uint32)
        self.atomic = np.zeros(size, bool)
        self.counts = counts

    def barrier(self) -> None:
        self.writers[:] = 0
        self.readers[:] = 0
        self.atomic[:] = False

    def read(self, threads: np.ndarray, addresses: np.ndarray, size: int) -> np.ndarray:
        at = self._resolve(addresses, size, "read")
        self._check_state(at, "read")
        warps, writers = _bits(threads), self.writers[at]
        unsafe = ((writers & warps) == 0) | self.atomic[at]
        self._check_race(writers, warps, unsafe, "read of what", "wrote")
        self._mark(self.readers, at, threads)
        self.counts.shared_read += at.size
        return self.data[at]

    def write(self, threads: np.ndarray, addresses: np.ndarray, data: np.ndarray) -> None:
        at = self._resolve(addresses, data.shape[1], "write")
        if (self.state[at] == IN_FLIGHT).any():
            raise PtxError("write to shared memory that a cp.async still writes")
        self._store(threads, at, data)

    def begin_copy(self, threads: np.ndarray, addresses: np.ndarray, size: int) -> None:
        """From now on a cp.async may write these bytes."""
        at = self._resolve(addresses, size, "cp.async")
        if (self.state[at] == IN_FLIGHT).any():
            raise PtxError("cp.async to shared memory that another cp.async still writes")
        self._check_race(self.writers[at], _bits(threads), True, "cp.async over what", "wrote")
        self._check_race(self.readers[at], _bits(threads), True, "cp.async over what", "read")
        self.data[at] = POISON
        self.state[at] = IN_FLIGHT

    def end_copy(self, threads: np.ndarray, addresses: np.ndarray, data: np.ndarray) -> None:
        """The threads waited: they see the bytes, others do after the next barrier."""
        self._store(threads, self._resolve(addresses, data.shape[1], "cp.async"), data)

    def update(self, threads: np.ndarray, addresses: np.ndarray, size: int, change: Callable) -> np.ndarray:
        """Atomically, one thread after the other: `change(old bytes, place in threads)`."""
        at = self._resolve(addresses, size, "atomic update")
        self._check_state(at, "atomic update")
        warps, plain = _bits(threads), ~self.atomic[at]
        self._check_race(self.writers[at], warps, plain, "atomic update of what", "wrote")
        self._check_race(self.readers[at], warps, plain, "atomic update of what", "read")
        old = np.empty((len(at), size), np.uint8)
        for place, row in enumerate(at):
            old[place] = self.data[row]
            self.data[row] = change(old[place], place)
        self.atomic[at] = True
        self._mark(self.writers, at, threads)
        self.counts.shared_read += at.size
        self.counts.shared_written += at.size
        return old

    def _store(self, threads: np.ndarray, at: np.ndarray, data: np.ndarray) -> None:
        warps, writers = _bits(threads), self.writers[at]
        differs = (self.data[at] != data) | self.atomic[at]
        self._check_race(writers, warps, differs, "write over what", "wrote")
        self._check_race(self.readers[at], warps | writers, True, "write over what", "read")
        self.data[at] = data
        _contested(threads, at, self.data[at], data, "shared memory")
        self.state[at] = READY
        self._mark(self.writers, at, threads)
        self.counts.shared_written += at.size

    def _resolve(self, addresses: np.ndarray, size: int, what: str) -> np.ndarray:
        _check_alignment(addresses, size, f"shared {what}")
        if addresses.min() < 0 or addresses.max() + size > self.data.size:
            outside = addresses[(addresses < 0) | (addresses + size > self.data.size)][0]
            raise PtxError(f"shared {what} out of bounds: {size} bytes at {outside} of {self.data.size}")
        return _byte_columns(addresses, size)

    def _check_state(self, at: np.ndarray, what: str) -> None:
        state = self.state[at]
        if (state == READY).all():
            return
        if (state == IN_FLIGHT).any():
            raise PtxError(f"{what} of shared memory that a cp.async still writes: its wait is missing")
        raise PtxError(f"{what} of uninitialised shared memory at {at[state == UNWRITTEN][0]}")

    @staticmethod
    def _check_race(earlier: np.ndarray, warps: np.ndarray, also, what: str, did: str) -> None:
        """Bits of `earlier` outside of `warps`, where `also`, are a race."""
        others = np.where(also, earlier & ~warps, 0)
        if others.any():
            other = int(others[others != 0][0])
            raise PtxError(f"race: {what} warp {other.bit_length() - 1} {did} since the last barrier")

    @staticmethod
    def _mark(table: np.ndarray, at: np.ndarray, threads: np.ndarray) -> None:
        warps = threads // WARP
        if warps[0] == warps[-1]:
            table[at] |= np.uint32(1 << int(warps[0]))
            return
        for warp in np.unique(warps).tolist():
            table[at[warps == warp]] |= np.uint32(1 << warp)


def _bits(threads: np.ndarray) -> np.ndarray:
    return (np.uint32(1) << (threads // WARP).astype(np.uint32))[:, None]
