# SPDX-License-Identifier: Apache-2.0
"""Matrix fragments: which register of which lane holds which element (PTX ISA, "Warp-level matrix
instructions").

With g = lane / 4 and q = lane % 4, a register of A holds row g or g + 8, one of B column g, and both
hold neighbouring elements of k from q on: two 16-bit ones or one of tf32. C and D hold the columns
2 q and 2 q + 1 of row g, then of row g + 8.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from ..memory import WARP
from ..values import decode, encode

_LANE = np.arange(WARP)
_G, _Q = _LANE // 4, _LANE % 4


@dataclass(frozen=True)
class Fragment:
    """Rows and columns of the elements, [registers, lanes, elements per register] each."""

    rows: np.ndarray
    columns: np.ndarray
    shape: tuple[int, int]
    kind: str  # of a register: "f16x2", "bf16x2", "f32" or "tf32"

    @property
    def registers(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def _places(self) -> np.ndarray:
        """Where in the registers of a warp each element of the matrix is."""
        flat = (self.rows * self.shape[1] + self.columns).ravel()
        return np.argsort(flat)

    def gather(self, bits: np.ndarray) -> np.ndarray:
        """Registers [registers, threads] to matrices [warps, rows, columns]."""
        per_register = self.rows.shape[2]
        numbers = decode(bits.reshape(-1), self.kind).astype(np.float64)
        numbers = numbers.reshape(self.registers, -1, WARP * per_register).transpose(1, 0, 2)
        return numbers.reshape(len(numbers), -1)[:, self._places].reshape(-1, *self.shape)

    def scatter(self, matrices: np.ndarray) -> np.ndarray:
        """The inverse, rounding."""
        numbers = matrices[:, self.rows, self.columns].transpose(1, 0, 2, 3)
        if self.rows.shape[2] == 1:
            return encode(numbers.reshape(-1), self.kind).reshape(self.registers, -1)
        return encode(numbers.reshape(-1, 2), self.kind).reshape(self.registers, -1)


def _operand(kind: str, depth: int, rows: bool) -> Fragment:
    """A [16, depth] if `rows`, else B [depth, 8]."""
    pack = 1 if kind == "tf32" else 2
    halves = 2 if rows else 1  # registers per step of 4 * pack along k
    register = np.arange(halves * depth // (4 * pack))[:, None, None]
    element = np.arange(pack)[None, None]
    along = _Q[:, None] * pack + element + register // halves * (4 * pack)
    across = _G[:, None] + register % halves * 8 + 0 * element
    if rows:
        return Fragment(across, along, (16, depth), kind)
    return Fragment(along, across, (depth, 8), kind)


def _accumulator(kind: str) -> Fragment:
    if kind == "f32":
        register, element = np.arange(4)[:, None, None], np.arange(1)[None, None]
        return Fragment(
            _G[:, None] + register // 2 * 8 + element, _Q[:, None] * 2 + register % 2 + element, (16, 8), kind
        )
    register, element = np.arange(2)[:, None, None], np.arange(2)[None, None]
    return Fragment(
        _G[:, None] + register * 8 + 0 * element, _Q[:, None] * 2 + element + 0 * register, (16, 8), kind
    )


@dataclass(frozen=True)
class Layout:
    """An mma: D = A B + C."""

    a: Fragment
    b: Fragment
    c: Fragment

    def multiply(self, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        """Registers of D. Products are exact, and so, but for float64, is their sum, which is rounded
        once; a tensor core keeps fewer bits between additions and truncates."""
        return self.c.scatter(np.matmul(self.a.gather(a), self.b.gather(b)) + self.c.gather(c))


@functools.cache
def layout(shape: str, result: str, a: str, b: str, c: str) -> Layout | None:
    depths = {"f16": {"m16n8k8": 8, "m16n8k16": 16}, "bf16": {"m16n8k8": 8, "m16n8k16": 16},
              "tf32": {"m16n8k4": 4, "m16n8k8": 8}}  # fmt: skip
    depth = depths.get(a, {}).get(shape)
    if depth is None or a != b or c != result or c not in (("f32", "f16") if a == "f16" else ("f32",)):
        return None
    kind = a if a == "tf32" else f"{a}x2"
    accumulator = _accumulator("f32" if c == "f32" else "f16x2")
    return Layout(_operand(kind, depth, True), _operand(kind, depth, False), accumulator)


def fragments(rows: np.ndarray, count: int, transposed: bool) -> np.ndarray:
    """ldmatrix: rows of 16 bytes, 8 for each of `count` matrices of each warp, to [count, threads].

    A lane gets elements 2 q and 2 q + 1 of row g of each matrix, or of its transpose.
    """
    matrices = np.ascontiguousarray(rows).view(np.uint16).reshape(-1, count, 8, 8)
    if transposed:
        matrices = matrices.transpose(0, 1, 3, 2)
    pairs = np.ascontiguousarray(matrices).view(np.uint32)  # [warps, count, 8, 4]
    return pairs.transpose(1, 0, 2, 3).reshape(count, -1)
