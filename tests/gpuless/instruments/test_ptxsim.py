# SPDX-License-Identifier: Apache-2.0
"""The PTX simulator against the PTX ISA and against numpy, with hand-written programs.

`pytest -m full tests/gpuless/instruments/test_ptxsim.py`: what is executed by default is in
test_ptxsim_compiled.py."""

from __future__ import annotations

import numpy as np
import ptxsim
import pytest
import torch
from ptxsim import GlobalMemory, PtxError, Result, parse
from ptxsim.instructions import matrix
from ptxsim.tensors import Tensors

pytestmark = pytest.mark.full

# ---- hand-written programs ------------------------------------------------------------------------


def ptx(body: str, parameters: str) -> str:
    return f"""
        .version 8.7
        .target sm_80
        .address_size 64
        .extern .shared .align 16 .b8 dynamic[];
        .visible .entry program({parameters})
        {{
        .reg .pred %p<9>;
        .reg .b16 %h<9>;
        .reg .b32 %r<40>;
        .reg .b64 %d<9>;
        mov.u32 %r0, %tid.x;
        {body}
        }}"""


def run(
    body: str, *inputs: np.ndarray, out: np.ndarray | None = None, threads: int = 32, grid: int = 1,
    shared: int = 0, limit: int = 10_000,
) -> Result:  # fmt: skip
    """A program with the addresses of its inputs in %d1, %d2 ..., that of `out` in %d0."""
    memory = GlobalMemory()
    arrays = [np.zeros(1, np.uint32) if out is None else out, *inputs]
    names = ["out", *(f"in{i}" for i in range(len(inputs)))]
    buffers = [memory.add(n, x, writable=n == "out", defined=n != "out") for n, x in zip(names, arrays)]
    loads = "".join(f"ld.param.b64 %d{i}, [{n}];" for i, n in enumerate(names))
    text = ptx(loads + body + "\nret;", ", ".join(f".param .b64 {n}" for n in names))
    return ptxsim.run(parse(text), (grid,), threads, buffers, memory, shared, limit)


def evaluate(code: str, *inputs: np.ndarray, out: str = "u4", **options) -> np.ndarray:
    """`code` makes %y from %x0, %x1 ..., an element of each input per thread."""
    threads = 32 * -(-max((len(x) for x in inputs), default=32) // 32)
    padded = [np.concatenate([x, np.zeros(threads - len(x), x.dtype)]) for x in inputs]
    result = np.zeros(threads, out)
    declared, loads = [f".reg .b{8 * result.itemsize} %y; .reg .b64 %to;"], ""
    for i, x in enumerate(inputs):
        declared.append(f".reg .b{8 * x.itemsize} %x{i}; .reg .b64 %at{i};")
        loads += f"mad.wide.u32 %at{i}, %r0, {x.itemsize}, %d{i + 1};"
        loads += f"ld.global.b{8 * x.itemsize} %x{i}, [%at{i}];"
    store = f"mad.wide.u32 %to, %r0, {result.itemsize}, %d0; st.global.b{8 * result.itemsize} [%to], %y;"
    run("".join(declared) + loads + code + store, *padded, out=result, threads=threads, **options)
    return result[: len(inputs[0])] if inputs else result


RANDOM = np.random.default_rng(0)
INTEGERS = np.concatenate(
    [RANDOM.integers(0, 1 << 32, 59, np.uint64), [0, 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]]
).astype(np.uint32)
OTHERS = np.concatenate([[0, (1 << 32) - 1, 1, 32, 31], INTEGERS[::-1][5:]]).astype(np.uint32)
SMALL = RANDOM.integers(0, 40, 64).astype(np.uint32)
WIDE = RANDOM.integers(0, 1 << 63, 64, np.uint64) * np.uint64(2) + np.uint64(1)
FLOATS = np.concatenate(
    [
        RANDOM.standard_normal(30) * np.exp2(RANDOM.integers(-130, 120, 30).astype(float)),
        [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-40, 65504, 65520, 65519.9, 3.4e38, 1.00390625,
         1.01171875, 0.5, 1.5, 2.5, -0.5, -1.5, 2.0**31, -(2.0**31), 2.0**32, -1.0, 1.0, 6e-8],
    ]
).astype(np.float32)  # fmt: skip
PLAIN = RANDOM.standard_normal(64).astype(np.float32)


def signed(x: np.ndarray) -> list[int]:
    return x.view(f"i{x.itemsize}").tolist()


def same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    """NaN of any bits are the same."""
    if expected.dtype.kind == "f":
        actual = actual.view(expected.dtype)
        both_nan = np.isnan(actual) & np.isnan(expected)
        actual, expected = np.where(both_nan, 0, actual), np.where(both_nan, 0, expected)
        assert (np.signbit(actual) == np.signbit(expected)).all()
    np.testing.assert_array_equal(actual, expected)


def modulo(values, bits: int = 32) -> np.ndarray:
    return np.array([v % (1 << bits) for v in values], f"u{bits // 8}")


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


I, O, S = INTEGERS.tolist(), OTHERS.tolist(), SMALL.tolist()  # noqa: E741
NONZERO = np.where(OTHERS == 0, 7, OTHERS).astype(np.uint32)
BINARY = {
    "add.s32": [a + b for a, b in zip(I, O)],
    "sub.u32": [a - b for a, b in zip(I, O)],
    "mul.lo.s32": [a * b for a, b in zip(I, O)],
    "mul.hi.u32": [a * b >> 32 for a, b in zip(I, O)],
    "mul.hi.s32": [a * b >> 32 for a, b in zip(signed(INTEGERS), signed(OTHERS))],
    "min.s32": [min(a, b) for a, b in zip(signed(INTEGERS), signed(OTHERS))],
    "max.u32": [max(a, b) for a, b in zip(I, O)],
    "and.b32": [a & b for a, b in zip(I, O)],
    "xor.b32": [a ^ b for a, b in zip(I, O)],
}


@pytest.mark.parametrize("name", BINARY)
def test_integers(name: str) -> None:
    same_bits(evaluate(f"{name} %y, %x0, %x1;", INTEGERS, OTHERS), modulo(BINARY[name]))


def test_integer_division() -> None:
    pairs = list(zip(signed(INTEGERS), signed(NONZERO)))
    for name, expected in (
        ("div.u32", [x // y for x, y in zip(I, NONZERO.tolist())]),
        ("div.s32", [truncated(x, y) for x, y in pairs]),
        ("rem.s32", [x - y * truncated(x, y) for x, y in pairs]),
    ):
        same_bits(evaluate(f"{name} %y, %x0, %x1;", INTEGERS, NONZERO), modulo(expected))


def test_wide_products() -> None:
    a, b = signed(INTEGERS), signed(OTHERS)
    product = [x * y for x, y in zip(a, b)]
    same_bits(evaluate("mul.wide.s32 %y, %x0, %x1;", INTEGERS, OTHERS, out="u8"), modulo(product, 64))
    total = [x + int(c) for x, c in zip(product, WIDE)]
    code = "mad.wide.s32 %y, %x0, %x1, %x2;"
    same_bits(evaluate(code, INTEGERS, OTHERS, WIDE, out="u8"), modulo(total, 64))
    high = [int(x) * int(y) >> 64 for x, y in zip(WIDE, WIDE[::-1])]
    same_bits(evaluate("mul.hi.u64 %y, %x0, %x1;", WIDE, WIDE[::-1].copy(), out="u8"), modulo(high, 64))


def test_shifts() -> None:
    """By the width and more: nothing is left, or the sign."""
    same_bits(evaluate("shl.b32 %y, %x0, %x1;", INTEGERS, SMALL), modulo(a << s for a, s in zip(I, S)))
    same_bits(evaluate("shr.u32 %y, %x0, %x1;", INTEGERS, SMALL), modulo(a >> s for a, s in zip(I, S)))
    expected = [a >> s for a, s in zip(signed(INTEGERS), S)]
    same_bits(evaluate("shr.s32 %y, %x0, %x1;", INTEGERS, SMALL), modulo(expected))
    both = [(b << 32 | a, s) for a, b, s in zip(I, O, S)]
    same_bits(
        evaluate("shf.l.wrap.b32 %y, %x0, %x1, %x2;", INTEGERS, OTHERS, SMALL),
        modulo((x << (s & 31)) >> 32 for x, s in both),
    )
    same_bits(
        evaluate("shf.r.clamp.b32 %y, %x0, %x1, %x2;", INTEGERS, OTHERS, SMALL),
        modulo(x >> min(s, 32) for x, s in both),
    )


def test_bit_fields() -> None:
    """Bit by bit as the ISA writes it."""
    begin, length = SMALL, SMALL[::-1].copy()

    def extract(a: int, at: int, n: int, is_signed: bool) -> int:
        sign = a >> min(at + n - 1, 31) & 1 if is_signed and n else 0
        return sum((a >> (at + i) & 1 if i < n and at + i < 32 else sign) << i for i in range(32))

    def insert(a: int, b: int, at: int, n: int) -> int:
        for i in range(n):
            if at + i < 32:
                b = b & ~(1 << (at + i)) | (a >> i & 1) << (at + i)
        return b

    fields = list(zip(I, begin.tolist(), length.tolist()))
    for kind in ("u32", "s32"):
        expected = [extract(*field, kind == "s32") for field in fields]
        same_bits(evaluate(f"bfe.{kind} %y, %x0, %x1, %x2;", INTEGERS, begin, length), modulo(expected))
    expected = [insert(a, b, at, n) for (a, at, n), b in zip(fields, O)]
    same_bits(evaluate("bfi.b32 %y, %x0, %x1, %x2, %x3;", INTEGERS, OTHERS, begin, length), modulo(expected))


def test_bits() -> None:
    same_bits(evaluate("popc.b32 %y, %x0;", INTEGERS), modulo(a.bit_count() for a in I))
    same_bits(evaluate("clz.b32 %y, %x0;", INTEGERS), modulo(32 - a.bit_length() for a in I))
    same_bits(evaluate("brev.b32 %y, %x0;", INTEGERS), modulo(int(f"{a:032b}"[::-1], 2) for a in I))
    same_bits(evaluate("not.b32 %y, %x0;", INTEGERS), modulo(~a for a in I))
    for table in (0xE8, 0x96, 0x1B):
        expected = [
            sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i for i in range(32))
            for a, b, c in zip(I, O, S)
        ]
        code = f"lop3.b32 %y, %x0, %x1, %x2, {table:#x};"
        same_bits(evaluate(code, INTEGERS, OTHERS, SMALL), modulo(expected))
    content = [a.to_bytes(4, "little") + b.to_bytes(4, "little") for a, b in zip(I, O)]
    code = "prmt.b32 %y, %x0, %x1, 0x5410; prmt.b32 %y, %y, %x1, 0xB732;"  # the sign of byte 3, twice
    half = [c[:2] + c[4:6] for c in content]
    expected = [bytes([h[2], h[3], c[7], 255 if h[3] & 128 else 0]) for h, c in zip(half, content)]
    same_bits(evaluate(code, INTEGERS, OTHERS), np.frombuffer(b"".join(expected), np.uint32))


def test_packing() -> None:
    """The first register is the low half."""
    code = "mov.b32 {%h0, %h1}, %x0; mov.b32 %y, {%h1, %h0};"
    same_bits(evaluate(code, INTEGERS), INTEGERS << 16 | INTEGERS >> 16)
    code = "mov.b64 %d3, {%x0, %x1}; mov.b64 {_, %y}, %d3;"
    same_bits(evaluate(code, INTEGERS, OTHERS), OTHERS)


@pytest.mark.parametrize("name, function", (
    ("add.f32", np.add), ("sub.rn.f32", np.subtract), ("mul.f32", np.multiply), ("div.rn.f32", np.divide),
))  # fmt: skip
def test_floats(name: str, function) -> None:
    others = FLOATS[::-1].copy()
    with np.errstate(all="ignore"):
        expected = function(FLOATS, others)
    same_bits(evaluate(f"{name} %y, %x0, %x1;", FLOATS, others), expected)


def test_fma_rounds_once() -> None:
    """1 + 2^-23 plus a little less than half a bit: rounding in float64 first would make it a tie."""
    a, b, c = (np.array([x], np.float32) for x in (2**-12 * (1 + 2**-23), 2**-12 * (1 - 2**-23), 1 + 2**-23))
    same_bits(evaluate("fma.rn.f32 %y, %x0, %x1, %x2;", a, b, c), c)
    assert np.float32(np.float64(a[0]) * np.float64(b[0]) + np.float64(c[0])) != c[0]


def test_flush_to_zero() -> None:
    tiny = np.array([1e-40, -1e-40, 2e-38], np.float32)
    same_bits(evaluate("mul.ftz.f32 %y, %x0, 0f3F800000;", tiny), np.array([0.0, -0.0, 2e-38], np.float32))
    same_bits(evaluate("mul.f32 %y, %x0, 0f3F800000;", tiny), tiny)


def test_minimum_and_maximum() -> None:
    """A number beats NaN, except with .NaN; -0 is less than +0."""
    nan = np.nan
    a = np.array([1, nan, nan, -0.0, 0.0, -1], np.float32)
    b = np.array([2, 3, nan, 0.0, -0.0, nan], np.float32)
    code = "{} %y, %x0, %x1;"
    same_bits(evaluate(code.format("max.f32"), a, b), np.array([2, 3, nan, 0.0, 0.0, -1], np.float32))
    same_bits(evaluate(code.format("min.f32"), a, b), np.array([1, 3, nan, -0.0, -0.0, -1], np.float32))
    same_bits(evaluate(code.format("max.NaN.f32"), a, b), np.array([2, nan, nan, 0.0, 0.0, nan], np.float32))


def test_comparisons() -> None:
    """Ordered ones are false for NaN, unordered ones true."""
    a, b = np.array([1, 2, 2, np.nan], np.float32), np.array([2, 2, 1, 0], np.float32)

    def holds(name: str) -> list[int]:
        code = f"setp.{name}.f32 %p1, %x0, %x1; selp.b32 %y, 1, 0, %p1;"
        return evaluate(code, a, b).tolist()

    assert holds("lt") == [1, 0, 0, 0] and holds("ltu") == [1, 0, 0, 1]
    assert holds("ge") == [0, 1, 1, 0] and holds("geu") == [0, 1, 1, 1]
    assert holds("eq") == [0, 1, 0, 0] and holds("equ") == [0, 1, 0, 1]
    assert holds("ne") == [1, 0, 1, 0] and holds("neu") == [1, 0, 1, 1]
    assert holds("nan") == [0, 0, 0, 1] and holds("num") == [1, 1, 1, 0]
    ints = np.array([0xFFFFFFFF, 1], np.uint32)
    code = "setp.lt.s32 %p1|%p2, %x0, 0; setp.lo.and.u32 %p3, %x0, 2, %p2; selp.b32 %y, 1, 0, %p3;"
    assert evaluate(code, ints).tolist() == [0, 1]


def test_conversions_of_floats() -> None:
    t = torch.from_numpy(FLOATS)
    with np.errstate(all="ignore"):
        half = FLOATS.astype(np.float16)
    bf16 = t.bfloat16().float().numpy()
    same_bits(evaluate("cvt.rn.f16.f32 %y, %x0;", FLOATS, out="u2"), half)
    y = evaluate("cvt.rn.bf16.f32 %y, %x0;", FLOATS, out="u2")
    same_bits((y.astype(np.uint32) << 16).view(np.float32), bf16)
    y = evaluate("cvt.rn.bf16x2.f32 %y, %x0, %x1;", FLOATS, PLAIN[: len(FLOATS)])  # the first is the upper
    same_bits((y & np.uint32(0xFFFF0000)).view(np.float32), bf16)
    y = evaluate("cvt.rn.f16x2.f32 %y, %x0, %x1;", PLAIN[: len(FLOATS)], FLOATS)
    same_bits((y & np.uint32(0xFFFF)).astype(np.uint16).view(np.float16), half)
    same_bits(evaluate("cvt.f32.f16 %y, %x0;", half.view(np.uint16)), half.astype(np.float32))
    # To nearest, ties away: 10 bits of mantissa.
    y = evaluate("cvt.rna.tf32.f32 %y, %x0;", np.array([1 + 2**-11, 1 + 2**-12, -1 - 2**-11], np.float32))
    same_bits(y, np.array([1 + 2**-10, 1, -1 - 2**-10], np.float32))


def test_conversions_to_integers() -> None:
    """Clamped to the range; NaN is 0."""
    t = np.nan_to_num(FLOATS.astype(np.float64), nan=0.0, posinf=1e30, neginf=-1e30)
    for mode, function in (("rzi", np.trunc), ("rni", np.rint), ("rmi", np.floor), ("rpi", np.ceil)):
        expected = np.clip(function(t), -(2.0**31), 2.0**31 - 1).astype(np.int64)
        same_bits(evaluate(f"cvt.{mode}.s32.f32 %y, %x0;", FLOATS), modulo(expected.tolist()))
    expected = np.clip(np.trunc(t), 0, 2.0**32 - 1).astype(np.int64)
    same_bits(evaluate("cvt.rzi.u32.f32 %y, %x0;", FLOATS), modulo(expected.tolist()))
    same_bits(evaluate("cvt.rn.f32.s32 %y, %x0;", INTEGERS), INTEGERS.view(np.int32).astype(np.float32))
    same_bits(evaluate("cvt.s64.s32 %y, %x0;", INTEGERS, out="u8"), modulo(signed(INTEGERS), 64))
    same_bits(evaluate("cvt.u32.u64 %y, %x0;", WIDE), modulo(WIDE.tolist()))
    same_bits(evaluate("cvt.s32.s8 %y, %x0;", INTEGERS), modulo((a + 128) % 256 - 128 for a in I))


def test_halves() -> None:
    a, b, c = (RANDOM.standard_normal(64).astype(np.float16) for _ in range(3))
    packed = [x.view(np.uint32) for x in (a, b, c)]
    same_bits(evaluate("mul.rn.f16x2 %y, %x0, %x1;", *packed[:2]).view(np.float16), a * b)
    exact = (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float16)
    same_bits(evaluate("fma.rn.f16x2 %y, %x0, %x1, %x2;", *packed).view(np.float16), exact)
    x, y = (torch.from_numpy(PLAIN[i::2].copy()).bfloat16() for i in (0, 1))
    code = "fma.rn.bf16 %y, %x0, %x1, 0x8000;"  # -0
    bits = [t.view(torch.int16).numpy().view(np.uint16) for t in (x, y, x * y)]
    same_bits(evaluate(code, *bits[:2], out="u2"), bits[2])


def test_approximations() -> None:
    positive = np.abs(PLAIN) + np.float32(0.1)
    for name, function in (
        ("ex2.approx.ftz.f32", np.exp2), ("lg2.approx.f32", np.log2), ("sqrt.rn.f32", np.sqrt),
        ("rsqrt.approx.f32", lambda x: 1 / np.sqrt(x)), ("rcp.approx.f32", lambda x: 1 / x),
    ):  # fmt: skip
        y = evaluate(f"{name} %y, %x0;", positive).view(np.float32)
        np.testing.assert_allclose(y, function(positive.astype(np.float64)), rtol=2e-7, atol=1e-7)
    same_bits(evaluate("ex2.approx.f32 %y, %x0;", np.array([-np.inf, np.inf, 3], np.float32)),
              np.array([0, np.inf, 8], np.float32))  # fmt: skip


def test_special_registers() -> None:
    out = np.zeros(128, np.uint32)
    code = """
        mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mov.u32 %r5, %nctaid.x; mov.u32 %r6, %laneid;
        mad.lo.s32 %r3, %r1, %r2, %r0; mul.wide.u32 %d3, %r3, 4; add.s64 %d3, %d0, %d3;
        mad.lo.s32 %r4, %r1, 1000, %r0; mad.lo.s32 %r4, %r5, 100000, %r4; mad.lo.s32 %r4, %r6, 1000000, %r4;
        st.global.b32 [%d3], %r4;"""
    run(code, out=out, threads=64, grid=2)
    thread, cta = np.arange(128) % 64, np.arange(128) // 64
    same_bits(out, (thread + 1000 * cta + 200000 + thread % 32 * 1000000).astype(np.uint32))


# ---- warps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode, by, clamp, segment", (
    ("bfly", 8, 31, 0), ("bfly", 3, 31, 0), ("up", 1, 0, 0), ("up", 3, 0, 24), ("down", 2, 31, 0),
    ("down", 2, 31, 16), ("down", 5, 20, 0), ("idx", 7, 31, 0), ("idx", 2, 31, 28), ("bfly", 4, 3, 0),
))  # fmt: skip
def test_shuffles(mode: str, by: int, clamp: int, segment: int) -> None:
    """Against the ISA's pseudocode, for a lane at a time."""
    expected = []
    for lane in range(32):
        high = (lane & segment) | (clamp & ~segment)
        low = lane & segment
        source, inside = {
            "up": (lane - by, lane - by >= high),
            "down": (lane + by, lane + by <= high),
            "bfly": (lane ^ by, lane ^ by <= high),
            "idx": (low | (by & ~segment), (low | (by & ~segment)) <= high),
        }[mode]
        inside = (lane ^ by) <= high if mode == "bfly" else inside
        expected.append((source if inside else lane) * 2 + inside)
    code = f"shfl.sync.{mode}.b32 %r1|%p1, %r0, {by}, {segment << 8 | clamp}, -1;"
    code += "selp.b32 %r2, 1, 0, %p1; mad.lo.s32 %y, %r1, 2, %r2;"
    assert evaluate(code)[:32].tolist() == expected


def test_votes() -> None:
    code = "setp.lt.u32 %p1, %r0, 5; {}"
    assert set(evaluate(code.format("vote.sync.ballot.b32 %y, %p1, -1;")).tolist()) == {31}
    some = code.format("vote.sync.{}.pred %p2, %p1, -1; selp.b32 %y, 1, 0, %p2;")
    assert [evaluate(some.format(mode))[0] for mode in ("any", "all", "uni")] == [1, 0, 0]
    code = code.format("mov.b32 %y, 0; @%p1 activemask.b32 %y;")
    assert evaluate(code).tolist() == [31] * 5 + [0] * 27
    assert set(evaluate("redux.sync.add.s32 %y, %r0, -1;").tolist()) == {496}


def isa_fragments(shape: str, pack: int) -> tuple[list, list, list]:
    """(row, column) of the elements of A, B and C for each lane, in the words of the ISA."""
    depth = int(shape.rpartition("k")[2])
    a, b, c = [], [], []
    for lane in range(32):
        group, member = lane >> 2, lane % 4
        if pack == 2:
            count = depth // 2
            rows = [group if i < 2 or 4 <= i < 6 else group + 8 for i in range(count)]
            a.append([(rows[i], member * 2 + (i & 1) + (0 if i < 4 else 8)) for i in range(count)])
            b.append([(member * 2 + (i & 1) + (0 if i < 2 else 8), group) for i in range(count // 2)])
        else:
            count = depth // 2
            a.append([(group + 8 * (i % 2), member + (0 if i < 2 else 4)) for i in range(count)])
            b.append([(member + 4 * i, group) for i in range(count // 2)])
        c.append([(group if i < 2 else group + 8, member * 2 + (i & 1)) for i in range(4)])
    return a, b, c


@pytest.mark.parametrize("kind, shape, accumulator", (
    ("f16", "m16n8k16", "f32"), ("bf16", "m16n8k16", "f32"), ("f16", "m16n8k8", "f32"),
    ("tf32", "m16n8k8", "f32"), ("tf32", "m16n8k4", "f32"), ("f16", "m16n8k16", "f16"),
))  # fmt: skip
def test_matrix_products(kind: str, shape: str, accumulator: str) -> None:
    """Of small integers, which are exact."""
    depth, warps = int(shape.rpartition("k")[2]), 2
    a = RANDOM.integers(-8, 8, (warps, 16, depth)).astype(np.float32)
    b = RANDOM.integers(-8, 8, (warps, depth, 8)).astype(np.float32)
    c = RANDOM.integers(-8, 8, (warps, 16, 8)).astype(np.float32)
    places = isa_fragments(shape, 1 if kind == "tf32" else 2)

    def registers(matrices: np.ndarray, places: list, kind: str) -> np.ndarray:
        elements = np.array([[m[place] for place in lane] for m in matrices for lane in places], np.float32)
        if kind == "bf16":
            return (elements.view(np.uint32) >> 16).astype(np.uint16).view(np.uint32)
        return elements.astype(np.float16 if kind == "f16" else np.float32).view(np.uint32)

    kinds = (kind, kind, accumulator)
    given = [registers(*each) for each in zip((a, b, c), places, kinds)]
    counts = [x.shape[1] for x in given]
    load, names = "", []
    for i, n in enumerate(counts):
        first = 10 * (i + 1)
        names.append("{" + ", ".join(f"%r{first + k}" for k in range(n)) + "}")
        load += f"mad.wide.u32 %d5, %r0, {4 * n}, %d{i + 1};"
        load += "".join(f"ld.global.b32 %r{first + k}, [%d5+{4 * k}];" for k in range(n))
    results = counts[2]
    code = f"mma.sync.aligned.{shape}.row.col.{accumulator}.{kind}.{kind}.{accumulator} "
    code += f"{{{', '.join(f'%r{k + 1}' for k in range(results))}}}, {', '.join(names)};"
    code += f"mad.wide.u32 %d5, %r0, {4 * results}, %d0;"
    code += "".join(f"st.global.b32 [%d5+{4 * k}], %r{k + 1};" for k in range(results))
    out = np.zeros((64, results), np.uint32)
    counted = run(load + code, *given, out=out, threads=32 * warps).total
    same_bits(out, registers(a @ b + c, places[2], accumulator))
    assert counted.mma == {f"{shape}.{kind}.{accumulator}": warps}


def test_sums_of_products_are_rounded_once() -> None:
    layout = matrix.layout("m16n8k16", "f32", "f16", "f16", "f32")
    ones, big = np.full((4, 32), 0x3C003C00, np.uint32), np.full((4, 32), 2.0**24, np.float32).view(np.uint32)
    assert (layout.multiply(ones, ones[:2], big).view(np.float32) == 2.0**24 + 16).all()


@pytest.mark.parametrize("trans", ("", ".trans"))
@pytest.mark.parametrize("count", (1, 2, 4))
def test_ldmatrix(count: int, trans: str) -> None:
    """Matrix k has its rows at the addresses of lanes 8 k to 8 k + 7."""
    stored = RANDOM.integers(0, 1 << 16, (4, 8, 8)).astype(np.uint16)
    registers = ", ".join(f"%r{k + 1}" for k in range(count))
    code = f"""
        mul.lo.s32 %r10, %r0, 16; cvt.u64.u32 %d3, %r10; add.s64 %d3, %d1, %d3;
        ld.global.v4.b32 {{%r20, %r21, %r22, %r23}}, [%d3];
        mov.u32 %r11, dynamic; add.s32 %r11, %r11, %r10;
        st.shared.v4.b32 [%r11], {{%r20, %r21, %r22, %r23}};
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%r11];
        mad.wide.u32 %d4, %r0, {4 * count}, %d0;
    """ + "".join(f"st.global.b32 [%d4+{4 * k}], %r{k + 1};" for k in range(count))
    out = np.zeros((32, count, 2), np.uint16)
    counted = run(code, stored, out=out, shared=512).total
    assert (counted.shared_written, counted.shared_read) == (512, 128 * count)
    for lane in range(32):
        for k in range(count):
            m = stored[k].T if trans else stored[k]
            assert out[lane, k].tolist() == m[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2].tolist()


# ---- control flow -----------------------------------------------------------------------------------


def test_branches_and_loops() -> None:
    """Threads take turns where they differ: the number of steps of Collatz's sequence."""

    def steps(n: int) -> int:
        return 0 if n == 1 else 1 + steps(3 * n + 1 if n % 2 else n // 2)

    code = """
        add.s32 %r1, %r0, 1; mov.b32 %y, 0;
        loop:
        setp.eq.s32 %p1, %r1, 1; @%p1 bra done;
        add.s32 %y, %y, 1;
        and.b32 %r2, %r1, 1; setp.eq.s32 %p2, %r2, 1; @!%p2 bra even;
        mad.lo.s32 %r1, %r1, 3, 1; bra.uni loop;
        even: shr.u32 %r1, %r1, 1; bra loop;
        done: bar.warp.sync -1;"""
    assert evaluate(code, np.zeros(64, np.uint32), limit=10**5).tolist() == [steps(n) for n in range(1, 65)]


def test_scopes_of_registers() -> None:
    code = """{ .reg .b32 t; add.s32 t, %r0, 1; mov.b32 %y, t; }
        { .reg .b64 t; cvt.u64.u32 t, %y; cvt.u32.u64 %y, t; }"""
    assert evaluate(code).tolist() == list(range(1, 33))


DIVERGENT = {
    "barrier in one branch": "setp.lt.u32 %p1, %r0, 32; @%p1 bra skip; bar.sync 0; skip:",
    "barrier in half a warp": "setp.lt.u32 %p1, %r0, 16; @%p1 bra skip; bar.sync 0; skip:",
    "barrier of others": "setp.lt.u32 %p1, %r0, 32; @%p1 bra a; bar.sync 0; bra b; a: bar.sync 0; b:",
    "barrier after an exit": "setp.lt.u32 %p1, %r0, 32; @%p1 exit; bar.sync 0;",
    "predicated barrier": "setp.lt.u32 %p1, %r0, 32; @%p1 bar.sync 0;",
    "shuffle": "setp.lt.u32 %p1, %r0, 7; @%p1 bra skip; shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1; skip:",
    "shuffle after an exit": "setp.lt.u32 %p1, %r0, 7; @%p1 exit; shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;",
}  # fmt: skip


@pytest.mark.parametrize("name", DIVERGENT)
def test_divergence(name: str) -> None:
    with pytest.raises(PtxError, match="divergence"):
        run(DIVERGENT[name], threads=64)


def test_shuffle_of_the_lanes_in_its_mask() -> None:
    code = """mov.b32 %y, %r0; setp.lt.u32 %p1, %r0, 16; @!%p1 bra skip;
        shfl.sync.bfly.b32 %y, %r0, {}, 31, 0xffff; skip:"""
    assert evaluate(code.format(1))[:16].tolist() == [lane ^ 1 for lane in range(16)]
    with pytest.raises(PtxError, match="lane that its mask does not name"):
        evaluate(code.format(16))


def test_endless_loop() -> None:
    with pytest.raises(PtxError, match="still running"):
        run("loop: bra loop;")


# ---- mistakes with memory ---------------------------------------------------------------------------

ADDRESS = "mul.lo.s32 %r1, %r0, 4; mov.u32 %r9, dynamic; add.s32 %r1, %r1, %r9; xor.b32 %r3, %r1, 128;"
SHARED_MISTAKES = {
    "uninitialised": (f"{ADDRESS} ld.shared.b32 %r2, [%r1];", "uninitialised shared"),
    "partly initialised": (
        f"{ADDRESS} st.shared.b16 [%r1], %h0; ld.shared.b32 %r2, [%r1];", "uninitialised shared"),
    "beyond the end": (f"{ADDRESS} st.shared.b32 [%r1+4], %r0;", "out of bounds"),
    "misaligned": (f"{ADDRESS} st.shared.b32 [%r1+2], %r0;", "misaligned"),
    "read of what another warp writes": (
        f"{ADDRESS} st.shared.b32 [%r1], %r0; ld.shared.b32 %r2, [%r3];", "race: read"),
    "write of what another warp reads": (
        f"{ADDRESS} st.shared.b32 [%r1], %r0; bar.sync 0; ld.shared.b32 %r2, [%r3];"
        "st.shared.b32 [%r1], %r2;", "race: write .* read"),
    "two writers": (
        f"{ADDRESS} setp.lt.u32 %p1, %r0, 32; @%p1 st.shared.b32 [%r1], %r0;"
        "@!%p1 st.shared.b32 [%r3], %r0;", "race: write .* wrote"),
    "two writers at once": ("mov.u32 %r1, dynamic; st.shared.b32 [%r1], %r0;", "different values"),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARED_MISTAKES)
def test_mistakes_in_shared_memory(name: str) -> None:
    code, message = SHARED_MISTAKES[name]
    with pytest.raises(PtxError, match=message):
        run(code, threads=64, shared=256)


def test_shared_memory_used_well() -> None:
    """Neighbours' values after a barrier; copies of one value; another write after a second barrier."""
    code = f"""{ADDRESS} st.shared.b32 [%r1], %r0; bar.sync 0;
        ld.shared.b32 %y, [%r3]; bar.sync 0;
        st.shared.b32 [dynamic], 7; ld.shared.b32 %r4, [dynamic]; st.shared.b32 [dynamic], 7;
        add.s32 %y, %y, %r4;"""
    y = evaluate(code, np.zeros(64, np.uint32), shared=256)
    assert y.tolist() == [(t ^ 32) + 7 for t in range(64)]


def test_atomics_in_shared_memory() -> None:
    start = "setp.eq.u32 %p1, %r0, 0; @%p1 st.shared.b32 [dynamic], 0; bar.sync 0;"
    add = "atom.shared.add.u32 %r2, [dynamic], %r0; "
    code = start + add + "bar.sync 0; ld.shared.b32 %y, [dynamic];"
    assert set(evaluate(code, np.zeros(64, np.uint32), shared=4).tolist()) == {64 * 63 // 2}
    for wrong in (start.replace("bar.sync 0;", "") + add, start + add + "ld.shared.b32 %y, [dynamic];"):
        with pytest.raises(PtxError, match="race"):
            evaluate(wrong, np.zeros(64, np.uint32), shared=4)


COPY = "cp.async.cg.shared.global [%r1], [%d3], 16;"
WAIT = "cp.async.wait_group 0;"


def copying(after: str, copy: str = COPY + "cp.async.commit_group;") -> str:
    """Each thread copies 16 bytes, then reads 4 bytes of what the thread half a CTA away copied."""
    return f"""mul.lo.s32 %r2, %r0, 16; mov.u32 %r1, dynamic; add.s32 %r1, %r1, %r2;
        cvt.u64.u32 %d3, %r2; add.s64 %d3, %d1, %d3; {copy} {after}
        xor.b32 %r3, %r1, 512; ld.shared.b32 %r4, [%r3];
        mad.wide.u32 %d4, %r0, 4, %d0; st.global.b32 [%d4], %r4;"""


def copied(code: str) -> tuple[np.ndarray, np.ndarray, Result]:
    source, out = np.arange(1, 257, dtype=np.uint32), np.zeros(64, np.uint32)
    result = run(code, source, out=out, threads=64, shared=1024)
    return source.reshape(64, 4)[np.arange(64) ^ 32, 0], out, result


def test_cp_async() -> None:
    expected, out, result = copied(copying(WAIT + "bar.sync 0;"))
    assert out.tolist() == expected.tolist()
    assert result.total.read["in0"] == ptxsim.Traffic(1024, 32)
    assert result.total.written["out"] == ptxsim.Traffic(256, 8)
    _, out, _ = copied(copying("cp.async.wait_all; bar.sync 0;", COPY))
    assert out.tolist() == expected.tolist()


def test_cp_async_fills_with_zeros() -> None:
    copy = """setp.lt.u32 %p1, %r0, 40; selp.b32 %r7, 16, 0, %p1;
        cp.async.cg.shared.global [%r1], [%d3], 16, %r7; cp.async.commit_group;"""
    expected, out, result = copied(copying(WAIT + "bar.sync 0;", copy))
    assert out.tolist() == np.where((np.arange(64) ^ 32) < 40, expected, 0).tolist()
    assert result.total.read["in0"].bytes == 640


@pytest.mark.parametrize("after, message", (
    ("bar.sync 0;", "its wait is missing"),
    ("cp.async.wait_group 1; bar.sync 0;", "its wait is missing"),
    (WAIT, "race: read"),
    (f"bar.sync 0; {WAIT}", "race: read"),
    (f"st.shared.b32 [%r1], 0; {WAIT} bar.sync 0;", "still writes"),
))  # fmt: skip
def test_mistakes_with_cp_async(after: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        copied(copying(after))


def test_more_mistakes_with_cp_async() -> None:
    with pytest.raises(PtxError, match="its wait is missing"):  # never committed
        copied(copying(WAIT + "bar.sync 0;", COPY))
    with pytest.raises(PtxError, match=r"ends while a cp\.async is on the way"):
        copied(copying(WAIT + "bar.sync 0;") + "bar.sync 0;" + COPY)
    again = copying(WAIT + "bar.sync 0;") + COPY + "cp.async.wait_all;"  # others may still read
    with pytest.raises(PtxError, match=r"race: cp\.async over what warp \d read"):
        copied(again)
    with pytest.raises(PtxError, match="global read out of bounds"):
        copied(copying(WAIT + "bar.sync 0;", "add.s64 %d3, %d3, 16;" + COPY))


def test_groups_of_copies() -> None:
    """Two groups: the first has arrived when one may be pending, the second has not."""
    code = """mul.lo.s32 %r2, %r0, 16; mov.u32 %r1, dynamic; add.s32 %r1, %r1, %r2;
        cvt.u64.u32 %d3, %r2; add.s64 %d3, %d1, %d3;
        cp.async.cg.shared.global [%r1], [%d3], 16; cp.async.commit_group;
        cp.async.ca.shared.global [%r1+512], [%d3], 8; cp.async.commit_group;
        cp.async.wait_group 1; ld.shared.b32 %r4, [%r1{}]; cp.async.wait_group 0;
        mad.wide.u32 %d4, %r0, 4, %d0; st.global.b32 [%d4], %r4;"""
    source, out = np.arange(128, dtype=np.uint32), np.zeros(32, np.uint32)
    run(code.format(""), source, out=out, shared=1024)
    assert out.tolist() == source[::4].tolist()
    with pytest.raises(PtxError, match="its wait is missing"):
        run(code.format("+512"), source, out=out, shared=1024)


GLOBAL_MISTAKES = {
    "beyond the end": (
        "mad.wide.u32 %d3, %r0, 4, %d1; ld.global.b32 %r2, [%d3+4];", "out of bounds: 4 bytes at 128 of in0"),
    "before the beginning": (
        "mad.wide.u32 %d3, %r0, 4, %d1; ld.global.b32 %r2, [%d3+-4];", "out of bounds: 4 bytes at -4 of in0"),
    "nowhere": ("mov.b64 %d3, 64; ld.global.b32 %r2, [%d3];", "in no buffer"),
    "misaligned": ("ld.global.v2.b32 {%r2, %r3}, [%d1+4];", "misaligned"),
    "to an input": ("st.global.b32 [%d1], 0;", "is an input"),
    "before it was written": ("ld.global.b32 %r2, [%d0];", "where nothing was written"),
    "different values": ("st.global.b32 [%d0], %r0;", "different values"),
    "what another CTA wrote": ("st.global.b32 [%d0], 1;", "race between CTAs"),
}  # fmt: skip


@pytest.mark.parametrize("name", GLOBAL_MISTAKES)
def test_mistakes_in_global_memory(name: str) -> None:
    code, message = GLOBAL_MISTAKES[name]
    grid = 2 if "CTA" in name else 1
    with pytest.raises(PtxError, match=message):
        run(code, np.zeros(32, np.uint32), out=np.zeros(32, np.uint32), grid=grid)


def test_gaps_are_out_of_bounds() -> None:
    memory = GlobalMemory()
    array = np.zeros(8, np.float32)
    allowed = np.repeat(np.arange(8) != 5, 4)
    buffer = memory.add("strided", array, allowed=allowed)
    code = "ld.param.b64 %d0, [a]; ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d0+16]; ret;"
    with pytest.raises(PtxError, match="in a gap"):
        ptxsim.run(parse(ptx(code, ".param .b64 a")), (1,), 32, [buffer], memory)


def test_sectors_are_counted_per_warp() -> None:
    """128 consecutive bytes are 4 sectors, every 8th word is a sector of its own."""
    words = np.zeros(256, np.uint32)
    for stride, sectors in ((4, 4), (32, 32), (0, 1)):
        code = f"mad.wide.u32 %d3, %r0, {stride}, %d1; ld.global.b32 %r2, [%d3];"
        assert run(code, words).total.read["in0"] == ptxsim.Traffic(128, sectors)


# ---- parameters -------------------------------------------------------------------------------------


def struct_read(code: str) -> np.ndarray:
    """Words that `code` loads into %r1 and %r2, with the address of the second struct in %d1."""
    memory, out = GlobalMemory(), np.zeros(2, np.uint32)
    words = np.arange(10, 14, dtype=np.uint32).tobytes()
    parameters = ".param .align 8 .b8 a[16], .param .align 8 .b8 b[16], .param .b64 out"
    body = f"mov.b64 %d1, b; {code} ld.param.b64 %d0, [out]; st.global.v2.b32 [%d0], {{%r1, %r2}}; ret;"
    arguments = [words, words[::-1], memory.add("out", out, writable=True, defined=False)]
    ptxsim.run(parse(ptx(body, parameters)), (1,), 32, arguments, memory)
    return out


@pytest.mark.parametrize("code", (
    "ld.param.v2.b32 {%r1, %r2}, [a+8];",
    "ld.param.b32 %r1, [a+8]; ld.param.b32 %r2, [a+12];",
    "mov.b64 %d2, a; add.s64 %d3, %d2, 4; ld.param.b32 %r1, [%d3+4]; ld.param.b32 %r2, [%d2+12];",
))  # fmt: skip
def test_structs_are_read_at_offsets_and_addresses(code: str) -> None:
    assert struct_read(code).tolist() == [12, 13]


def test_threads_may_read_different_parts_of_a_struct() -> None:
    out = np.zeros(32, np.uint32)
    words = np.arange(32, dtype=np.uint32)
    memory = GlobalMemory()
    code = """mov.b64 %d1, a; mul.wide.u32 %d2, %r0, 4; add.s64 %d1, %d1, %d2; ld.param.b32 %r1, [%d1];
        ld.param.b64 %d0, [out]; add.s64 %d0, %d0, %d2; st.global.b32 [%d0], %r1; ret;"""
    arguments = [words[::-1].tobytes(), memory.add("out", out, writable=True, defined=False)]
    ptxsim.run(parse(ptx(code, ".param .b8 a[128], .param .b64 out")), (1,), 32, arguments, memory)
    assert out.tolist() == words[::-1].tolist()


@pytest.mark.parametrize("code", (
    "ld.param.v2.b32 {%r1, %r2}, [b+12];", "ld.param.v2.b32 {%r1, %r2}, [b+16];",
    "ld.param.v2.b32 {%r1, %r2}, [%d1+-8];", "ld.param.v2.b32 {%r1, %r2}, [b+4];",
))  # fmt: skip
def test_reads_beside_a_struct(code: str) -> None:
    with pytest.raises(PtxError, match="of a parameter that has"):
        struct_read(code)


# ---- tensors ----------------------------------------------------------------------------------------


def test_tensors_have_elements() -> None:
    """Gaps are none, views of one tensor are one buffer."""
    memory = Tensors()
    whole = torch.arange(12.0)
    view = whole.view(3, 4)[1:, 1:3]  # elements 5, 6, 9, 10
    address = memory.address("view", view)
    assert memory.address("part", view[1]) == address + 16

    def read(element: int) -> float:
        at, counts = np.array([address + 4 * (element - 5)]), ptxsim.Counts()
        return memory.read(np.zeros(1, int), at, 4, 0, counts).view(np.float32).item()

    assert [read(i) for i in (5, 6, 9, 10)] == [5, 6, 9, 10]
    for gap in (4, 7, 11):
        with pytest.raises(PtxError, match="of view is in a gap"):
            read(gap)
    memory.address("whole", whole)
    assert read(7) == 7


# ---- what is not known ------------------------------------------------------------------------------


@pytest.mark.parametrize("code", (
    "frobnicate.b32 %r1, %r0;", "add.rz.f32 %r1, %r0, %r0;", "add.sat.s32 %r1, %r0, %r0;", "bar.sync 1;",
    "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r1,%r1}, {%r1,%r1}, {%r1,%r1}, {%r1,%r1};",
    "ld.acquire.gpu.global.b32 %r1, [%d0];", "bar.sync 0, 64;", "mov.u32 %r1, %clock;",
))  # fmt: skip
def test_unknown_instructions_are_named(code: str) -> None:
    name = code.split()[0]
    with pytest.raises(PtxError, match=name.replace(".", r"\.")):
        run(code)


def test_errors_name_the_line_and_the_source() -> None:
    body = "ld.param.b64 %d0, [a];\n.loc 1 123 4 // kernel.py\nst.global.b32 [%d0], 1;\nret;"
    text = ptx(body, ".param .b64 a") + '\n.file 1 "/somewhere/kernel.py"\n'
    memory = GlobalMemory()
    buffer = memory.add("constants", np.zeros(1, np.uint32))
    with pytest.raises(PtxError, match=r"is an input, at line 15 \(kernel.py:123\): st.global.b32 "):
        ptxsim.run(parse(text), (1,), 32, [buffer], memory)
    inlined = body.replace("123 4", "123 4, function_name $L__info_string7, inlined_at 1 77 5")
    program = parse(ptx(inlined, ".param .b64 a") + '\n.file 1 "/somewhere/kernel.py"\n')
    assert [(i.source, i.caller) for i in program.code[-2:]] == 2 * [("kernel.py:123", "kernel.py:77")]
    with pytest.raises(PtxError, match=r"line 13: \.local is not supported"):
        parse(ptx(".local .b8 depot[16];", ""))
