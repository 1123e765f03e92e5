# SPDX-License-Identifier: Apache-2.0
"""Instructions that make one value per thread from others, but for conversions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .. import values
from ..binding import TABLE, Form, Read, Step, opcode
from ..parse import Pair
from ..values import is_float, size_of

if TYPE_CHECKING:
    from ..machine import Cta, Lanes


def elementwise(form: Form, kind: str, function: Callable, sources: list[Read]) -> Step:
    """`function` of the numbers of all threads, written to the first operand."""
    write = form.write(0, kind)
    if len(sources) == 1:
        (a,) = sources
        return lambda cta, lanes: write(cta, lanes, function(a(cta)))
    if len(sources) == 2:
        a, b = sources
        return lambda cta, lanes: write(cta, lanes, function(a(cta), b(cta)))
    return lambda cta, lanes: write(cta, lanes, function(*(source(cta) for source in sources)))


def float_options(form: Form, kind: str, function: Callable) -> Callable:
    """`.ftz` and `.sat` around a function."""
    if not is_float(kind):
        return function
    flush, saturate = form.has("ftz"), form.has("sat")
    if flush and kind != "f32":
        raise form.unknown()

    def with_options(*arguments: np.ndarray) -> np.ndarray:
        result = values.flush(function(*map(values.flush, arguments))) if flush else function(*arguments)
        return np.nan_to_num(np.clip(result, 0, 1)) if saturate else result

    return with_options if flush or saturate else function


def _arithmetic(function: Callable, *modifiers: str) -> Callable[[Form], Step]:
    """`function` of all sources, where the result has their type."""

    def binder(form: Form) -> Step:
        kind = form.kind()
        form.has(*modifiers)
        if is_float(kind):
            form.has("rn")
        sources = [form.read(i, kind) for i in range(1, len(form.operands))]
        return elementwise(form, kind, float_options(form, kind, function), sources)

    return binder


def _each(function: Callable[..., int], bits: int) -> Callable:
    """A function of Python integers, thread after thread, modulo 2^bits."""

    def over_threads(*arrays: np.ndarray) -> np.ndarray:
        results = [function(*row) % (1 << bits) for row in zip(*(array.tolist() for array in arrays))]
        return np.array(results, f"u{bits // 8}")

    return over_threads


def _reciprocal(x: np.ndarray) -> np.ndarray:
    return (1 / x).astype(x.dtype)


def _reciprocal_root(x: np.ndarray) -> np.ndarray:
    return (1 / np.sqrt(x.astype(np.float64))).astype(x.dtype)


TABLE["add"] = _arithmetic(np.add)
TABLE["sub"] = _arithmetic(np.subtract)
TABLE["and"] = _arithmetic(np.bitwise_and)
TABLE["or"] = _arithmetic(np.bitwise_or)
TABLE["xor"] = _arithmetic(np.bitwise_xor)
TABLE["not"] = _arithmetic(np.invert)
TABLE["neg"] = _arithmetic(np.negative)
TABLE["abs"] = _arithmetic(np.abs)
TABLE["sqrt"] = _arithmetic(np.sqrt, "approx")
TABLE["rsqrt"] = _arithmetic(_reciprocal_root, "approx")
TABLE["rcp"] = _arithmetic(_reciprocal, "approx")
TABLE["lg2"] = _arithmetic(np.log2, "approx")
TABLE["tanh"] = _arithmetic(np.tanh, "approx")
TABLE["sin"] = _arithmetic(np.sin, "approx")
TABLE["cos"] = _arithmetic(np.cos, "approx")
TABLE["copysign"] = _arithmetic(lambda a, b: np.copysign(b, a))


@opcode("mov")
def _mov(form: Form) -> Step:
    kind = form.kind()
    return elementwise(form, kind, lambda x: x, [form.read(1, kind)])


@opcode("ex2")
def _ex2(form: Form) -> Step:
    kind = form.kind()
    form.has("approx")
    function = float_options(form, kind, np.exp2)
    read, write, width = form.read(1, kind), form.write(0, kind), 2 if kind in values.PACKED else 1

    def step(cta: Cta, lanes: Lanes) -> None:
        cta.counts.exponentials += lanes.count * width
        write(cta, lanes, function(read(cta)))

    return step


@opcode("mul")
def _mul(form: Form) -> Step:
    kind = form.kind()
    if is_float(kind):
        form.has("rn")
        sources = [form.read(1, kind), form.read(2, kind)]
        return elementwise(form, kind, float_options(form, kind, np.multiply), sources)
    result, product = _integer_product(form, kind)
    return elementwise(form, result, product, [form.read(1, kind), form.read(2, kind)])


@opcode("mad", "fma")
def _mad(form: Form) -> Step:
    kind = form.kind()
    if kind == "f64":
        raise form.unknown()  # nothing here holds the exact product
    if is_float(kind):
        form.has("rn")
        relu = form.has("relu")

        def function(a, b, c):
            total = values.fused(a, b, c)
            total = np.maximum(total, 0) if relu else total
            return total.astype(np.float32) if kind == "f32" else total

        sources = [form.read(i, kind) for i in (1, 2, 3)]
        return elementwise(form, kind, float_options(form, kind, function), sources)
    result, product = _integer_product(form, kind)
    sources = [form.read(1, kind), form.read(2, kind), form.read(3, result)]
    return elementwise(form, result, lambda a, b, c: product(a, b) + c, sources)


def _integer_product(form: Form, kind: str) -> tuple[str, Callable]:
    """The type of .lo, .hi or .wide, and the function."""
    part = form.one_of("lo", "hi", "wide")
    if part == "lo":
        return kind, np.multiply
    bits = 8 * size_of(kind)
    wide = f"{kind[0]}{2 * bits}"
    if bits == 64:
        return kind, lambda a, b: _each(lambda x, y: x * y >> 64, 64)(a, b).view(a.dtype)
    dtype = values.NUMBERS[wide]
    if part == "wide":
        return wide, lambda a, b: a.astype(dtype) * b.astype(dtype)
    return kind, lambda a, b: (a.astype(dtype) * b.astype(dtype) >> dtype.type(bits)).astype(a.dtype)


@opcode("div")
def _div(form: Form) -> Step:
    kind = form.kind()
    sources = [form.read(1, kind), form.read(2, kind)]
    if is_float(kind):
        form.has("rn", "approx", "full")
        return elementwise(form, kind, float_options(form, kind, np.divide), sources)
    return elementwise(form, kind, _truncated_quotient, sources)


@opcode("rem")
def _rem(form: Form) -> Step:
    kind = form.kind()
    sources = [form.read(1, kind), form.read(2, kind)]
    return elementwise(form, kind, lambda a, b: a - b * _truncated_quotient(a, b), sources)


def _truncated_quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Integers, toward zero; by zero all bits are set, as GPUs do."""
    safe = np.where(b == 0, 1, b).astype(b.dtype)
    quotient = a // safe
    quotient += ((a % safe != 0) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return np.where(b == 0, np.array(-1).astype(a.dtype), quotient)


@opcode("min", "max")
def _extremum(form: Form) -> Step:
    kind = form.kind()
    largest = form.instruction.opcode == "max"
    sources = [form.read(i, kind) for i in range(1, len(form.operands))]
    if not is_float(kind):
        return elementwise(form, kind, np.maximum if largest else np.minimum, sources)
    keep_nan = form.has("NaN")

    def function(a, b):
        """A number beats NaN unless .NaN; +0 is more than -0."""
        first = (a > b) | ((a == b) & ~np.signbit(a)) if largest else (a < b) | ((a == b) & np.signbit(a))
        chosen = np.where(first | np.isnan(b), a, b)
        return np.where(np.isnan(a) | np.isnan(b), np.nan, chosen).astype(a.dtype) if keep_nan else chosen

    return elementwise(form, kind, float_options(form, kind, function), sources)


_COMPARE = {
    "eq": np.equal, "ne": lambda a, b: (a < b) | (a > b), "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal,
    "num": lambda a, b: (a == a) & (b == b), "nan": lambda a, b: (a != a) | (b != b),
    "equ": lambda a, b: ~((a < b) | (a > b)), "neu": np.not_equal, "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b),
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


@opcode("setp")
def _setp(form: Form) -> Step:
    kind = form.kind()
    compare = _COMPARE[form.one_of(*_COMPARE)]
    combine = next((f for name, f in _LOGIC.items() if form.has(name)), None)
    flush = form.has("ftz")
    a, b = form.read(1, kind), form.read(2, kind)
    also = form.read(3, "pred") if combine else None
    target = form.operands[0]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    put, put_inverse = form.write(first, "pred"), form.write(second, "pred")

    def step(cta: Cta, lanes: Lanes) -> None:
        x, y = a(cta), b(cta)
        if flush:
            x, y = values.flush(x), values.flush(y)
        result = compare(x, y)
        put_inverse(cta, lanes, combine(~result, also(cta)) if combine else ~result)
        put(cta, lanes, combine(result, also(cta)) if combine else result)

    return step


_LOGIC = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@opcode("selp")
def _selp(form: Form) -> Step:
    kind = form.kind()
    sources = [form.read(3, "pred"), form.read(1, kind), form.read(2, kind)]
    return elementwise(form, kind, np.where, sources)


# ---- bits -------------------------------------------------------------------------------------------


@opcode("shl", "shr")
def _shift(form: Form) -> Step:
    kind = form.kind()
    bits = 8 * size_of(kind)
    left = form.instruction.opcode == "shl"

    def function(x, by):
        within = np.minimum(by, bits - 1).astype(x.dtype)
        if left:
            return np.where(by >= bits, x.dtype.type(0), x << within)
        if kind[0] == "s":
            return x >> within
        return np.where(by >= bits, x.dtype.type(0), x >> within)

    return elementwise(form, kind, function, [form.read(1, kind), form.read(2, "u32")])


@opcode("shf")
def _funnel_shift(form: Form) -> Step:
    """Both words as one number, of which shf.l keeps the high, shf.r the low half."""
    kind = form.kind()
    left, wrap = form.one_of("l", "r") == "l", form.one_of("wrap", "clamp") == "wrap"

    def function(low, high, by):
        by = (by & np.uint32(31) if wrap else np.minimum(by, 32)).astype(np.uint64)
        both = high.astype(np.uint64) << np.uint64(32) | low.astype(np.uint64)
        shifted = (both << by) >> np.uint64(32) if left else both >> by
        return shifted.astype(np.uint32)

    return elementwise(form, kind, function, [form.read(i, "u32") for i in (1, 2, 3)])


@opcode("bfe")
def _bfe(form: Form) -> Step:
    kind = form.kind()
    bits = 8 * size_of(kind)

    def extract(x: int, begin: int, length: int) -> int:
        begin, length = begin & 255, min(length & 255, bits)
        field = x >> begin & (1 << length) - 1
        if kind[0] == "s" and length and x >> min(begin + length - 1, bits - 1) & 1:
            field |= -1 << min(max(bits - begin, 0), length)
        return field

    sources = [form.read(1, f"u{bits}"), form.read(2, "u32"), form.read(3, "u32")]
    return elementwise(form, f"u{bits}", _each(extract, bits), sources)


@opcode("bfi")
def _bfi(form: Form) -> Step:
    kind = form.kind()
    bits = 8 * size_of(kind)

    def insert(part: int, x: int, begin: int, length: int) -> int:
        mask = (1 << (length & 255)) - 1 << (begin & 255)
        return x & ~mask | part << (begin & 255) & mask

    sources = [form.read(1, kind), form.read(2, kind), form.read(3, "u32"), form.read(4, "u32")]
    return elementwise(form, kind, _each(insert, bits), sources)


@opcode("prmt")
def _prmt(form: Form) -> Step:
    kind = form.kind()

    def function(a, b, selector):
        source = np.stack([a, b], -1).view(np.uint8)
        nibble = (selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)) & 15
        chosen = np.take_along_axis(source, (nibble & 7).astype(np.int64), 1)
        sign = np.where(chosen & 128, 255, 0).astype(np.uint8)
        return np.where(nibble & 8, sign, chosen).view(np.uint32)[:, 0]

    return elementwise(form, kind, function, [form.read(i, "u32") for i in (1, 2, 3)])


@opcode("lop3")
def _lop3(form: Form) -> Step:
    kind = form.kind()
    table = form.operands[4].value

    def function(a, b, c):
        result = np.zeros_like(a)
        for row in range(8):
            if table >> row & 1:
                result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        return result

    return elementwise(form, kind, function, [form.read(i, kind) for i in (1, 2, 3)])


@opcode("popc", "clz", "brev")
def _count(form: Form) -> Step:
    kind = form.kind()
    bits = 8 * size_of(kind)
    function = {
        "popc": lambda x: x.bit_count(),
        "clz": lambda x: bits - x.bit_length(),
        "brev": lambda x: int(f"{x:0{bits}b}"[::-1], 2),
    }[form.instruction.opcode]
    result = kind if form.instruction.opcode == "brev" else "u32"
    return elementwise(form, result, _each(function, bits), [form.read(1, kind)])
