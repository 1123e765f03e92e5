# SPDX-License-Identifier: Apache-2.0
"""What a CTA did, exactly; sums over CTAs with `+`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

SECTOR = 32  # bytes: what global memory is moved in


@dataclass
class Traffic:
    """Accesses to one buffer."""

    bytes: int = 0  # of all threads
    sectors: int = 0  # different ones, of each instruction of each warp

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.bytes + other.bytes, self.sectors + other.sectors)


@dataclass
class Counts:
    instructions: Counter = field(default_factory=Counter)  # per warp, by opcode
    mma: Counter = field(default_factory=Counter)  # per warp, by shape and types
    exponentials: int = 0  # per thread
    read: dict[str, Traffic] = field(default_factory=dict)  # global memory, by buffer
    written: dict[str, Traffic] = field(default_factory=dict)
    shared_read: int = 0  # bytes
    shared_written: int = 0
    barriers: int = 0  # of the CTA

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.instructions + other.instructions,
            self.mma + other.mma,
            self.exponentials + other.exponentials,
            _merged(self.read, other.read),
            _merged(self.written, other.written),
            self.shared_read + other.shared_read,
            self.shared_written + other.shared_written,
            self.barriers + other.barriers,
        )

    def __str__(self) -> str:
        lines = [
            f"{sum(self.instructions.values())} instructions of warps, {self.barriers} barriers",
            f"mma {dict(self.mma) or 0}, {self.exponentials} exponentials of threads",
            f"shared memory: {self.shared_read} bytes read, {self.shared_written} written",
        ]
        for title, traffic in (("read", self.read), ("written", self.written)):
            for name, t in sorted(traffic.items()):
                lines.append(f"{title} {name}: {t.bytes} bytes, {t.sectors} sectors")
        return "\n".join(lines)


def _merged(a: dict[str, Traffic], b: dict[str, Traffic]) -> dict[str, Traffic]:
    return {name: a.get(name, Traffic()) + b.get(name, Traffic()) for name in {**a, **b}}
