# SPDX-License-Identifier: Apache-2.0
"""Registers hold bits, instructions compute numbers: how the ones become the others.

Bits are unsigned numpy arrays [threads]; the numbers of packed types (f16x2, bf16x2) are
[threads, 2]. numpy has no bfloat16: its numbers are float32.
"""

from __future__ import annotations

import numpy as np

UNSIGNED = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32), 8: np.dtype(np.uint64)}
NUMBERS = {
    **{f"{letter}{8 * size}": dtype for letter in "bu" for size, dtype in UNSIGNED.items()},
    **{f"s{8 * size}": np.dtype(f"i{size}") for size in UNSIGNED},
    "f16": np.dtype(np.float16), "f32": np.dtype(np.float32), "f64": np.dtype(np.float64),
    "pred": np.dtype(bool),
}  # fmt: skip
PACKED = {"f16x2": "f16", "bf16x2": "bf16"}
SMALLEST = np.finfo(np.float32).smallest_normal


def size_of(kind: str) -> int:
    return {"pred": 1, "bf16": 2, "f16x2": 4, "bf16x2": 4, "tf32": 4}.get(kind) or NUMBERS[kind].itemsize


def is_float(kind: str) -> bool:
    return kind.startswith(("f", "bf"))


def decode(bits: np.ndarray, kind: str) -> np.ndarray:
    if kind in PACKED:
        return decode(np.ascontiguousarray(bits).view(np.uint16), PACKED[kind]).reshape(-1, 2)
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if kind == "tf32":  # the unit does not look at the rest
        return (bits & np.uint32(0xFFFFE000)).view(np.float32)
    return bits.view(NUMBERS[kind])


def encode(numbers: np.ndarray, kind: str) -> np.ndarray:
    if kind in PACKED:
        return encode(np.ascontiguousarray(numbers), PACKED[kind]).view(np.uint32).reshape(-1)
    if kind == "bf16":
        return to_bf16(numbers)
    if kind == "pred":
        return np.asarray(numbers, bool)
    dtype = NUMBERS[kind]
    return np.ascontiguousarray(numbers, dtype).view(UNSIGNED[dtype.itemsize])


def to_bf16(x: np.ndarray) -> np.ndarray:
    """To nearest, ties to even."""
    x = _shortened(x, np.float32)
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def to_tf32(x: np.ndarray) -> np.ndarray:
    """To nearest, ties away from zero: the bits, of which 19 count."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return np.where(np.isfinite(x), (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), bits)


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal float32 become zeros of their sign (`.ftz`)."""
    return np.where(np.abs(x) < SMALLEST, np.copysign(np.float32(0), x), x)


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c of numbers with at most 24 bits, as a float64 that rounds further as the exact sum does."""
    product = a.astype(np.float64) * b.astype(np.float64)  # exact
    c = c.astype(np.float64)
    total = product + c
    back = total - product
    return _to_odd(total, (product - (total - back)) + (c - back))


def _to_odd(rounded: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """What was `rounded`, leaving `rest`, with an odd last bit unless it is exact."""
    bits = rounded.view(np.int64 if rounded.dtype == np.float64 else np.int32)
    inexact = (rest != 0) & np.isfinite(rest) & (rounded != 0) & (bits & 1 == 0)
    step = np.where((rest > 0) == (rounded > 0), 1, -1).astype(bits.dtype)
    return np.where(inexact, bits + step, bits).view(rounded.dtype)


def _shortened(x: np.ndarray, dtype: type) -> np.ndarray:
    """Float64 as float32 that rounds further as the original does."""
    if x.dtype != np.float64:
        return x.astype(dtype)
    short = x.astype(dtype)
    return _to_odd(short, x - short)
