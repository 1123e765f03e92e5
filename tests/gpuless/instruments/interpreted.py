# SPDX-License-Identifier: Apache-2.0
"""The corrected interpreter against torch, and the mistakes that it is there to find: run by
../../operator/test_triton.py with TRITON_INTERPRET=1."""

import itertools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import interpreter
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

# ---- arithmetic ---------------------------------------------------------------------------------


@triton.jit
def elementwise(x, y, out, n: tl.constexpr, function: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(out + i, function(tl.load(x + i), tl.load(y + i)))


@triton.jit
def matrices(x, y, out, n: tl.constexpr, function: tl.constexpr):
    at = tl.arange(0, n)[:, None] * n + tl.arange(0, n)[None, :]
    tl.store(out + at, function(tl.load(x + at), tl.load(y + at)))


def run(
    kernel: Any, function: Callable, x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=dtype)
    with interpreter.checked("out"):
        kernel[(1,)](x, y, out, n=len(x), function=function)
    return out


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal numbers, and NaN in the same places."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def bfloat16(*bits: int) -> torch.Tensor:
    return torch.from_numpy(np.array(bits, np.uint16)).view(torch.bfloat16)


# Zeros, subnormal numbers, what surrounds one, the largest number, infinities, NaN; anything.
SPECIAL = [0x0000, 0x0001, 0x007F, 0x0080, 0x3F7F, 0x3F80, 0x3F81, 0x4049, 0x7F7F, 0x7F80, 0x7FC0]
BITS = SPECIAL + [0x8000 | bits for bits in SPECIAL]
BITS += np.random.default_rng(0).integers(0, 1 << 16, 64 - len(BITS)).tolist()
X, Y = (bfloat16(*bits) for bits in zip(*itertools.product(BITS, BITS)))
# float32 between, on and next to the middles of neighbouring bfloat16.
WIDE = np.array([b << 16 | rest for b in BITS for rest in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)], np.uint32)
WIDE = torch.from_numpy(np.resize(WIDE, 512)).view(torch.float32)


@pytest.mark.parametrize("name", ("add", "sub", "mul", "truediv"))
def test_bfloat16_arithmetic(name: str) -> None:
    function = getattr(operator, name)
    same(run(elementwise, function, X, Y, torch.bfloat16), function(X, Y))


@pytest.mark.parametrize("name", ("lt", "le", "gt", "ge", "eq", "ne"))
def test_bfloat16_comparisons(name: str) -> None:
    function = getattr(operator, name)
    same(run(elementwise, function, X, Y, torch.uint8), function(X, Y).to(torch.uint8))


LOW, HIGH = torch.tensor([-2.0, 0.5], dtype=torch.bfloat16)
ALL = tl.PropagateNan.ALL
FUNCTIONS = {
    "maximum": (lambda x, y: tl.maximum(x, y), torch.fmax),
    "minimum": (lambda x, y: tl.minimum(x, y), torch.fmin),
    "maximum of NaN": (lambda x, y: tl.maximum(x, y, propagate_nan=ALL), torch.maximum),
    "minimum of NaN": (lambda x, y: tl.minimum(x, y, propagate_nan=ALL), torch.minimum),
    "clamp": (lambda x, y: tl.clamp(x, -2.0, 0.5), lambda x, y: x.fmax(LOW).fmin(HIGH)),
    "clamp of NaN": (lambda x, y: tl.clamp(x, -2.0, 0.5, propagate_nan=ALL), lambda x, y: x.clamp(-2, 0.5)),
    "negative": (lambda x, y: -x, lambda x, y: -x),
    "absolute": (lambda x, y: tl.abs(x), lambda x, y: x.abs()),
    "where": (lambda x, y: tl.where(x < y, x, y), lambda x, y: torch.where(x < y, x, y)),
    "numbers": (lambda x, y: 3 * x - 0.5, lambda x, y: 3 * x - 0.5),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_bfloat16_functions(name: str) -> None:
    function, expected = FUNCTIONS[name]
    same(run(elementwise, function, X, Y, torch.bfloat16), expected(X, Y))


@pytest.mark.parametrize(
    "dtype", (torch.float16, torch.float32, torch.float64, torch.int32, torch.int8), ids=str
)
def test_bfloat16_casts(dtype: torch.dtype) -> None:
    def copy(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return run(elementwise, lambda x, y: x, x, x, dtype)

    if dtype.is_floating_point:
        wide = WIDE.to(dtype)
        same(copy(X, dtype), X.to(dtype))
    else:
        wide = (torch.arange(-256, 256) * 0x10_101).to(dtype)
        small = X[X.abs() < 100]
        same(copy(small[:1024], dtype), small[:1024].to(dtype))
    same(copy(wide, torch.bfloat16), wide.to(torch.bfloat16))


def truncated(x, y):
    return x.to(tl.bfloat16, fp_downcast_rounding="rtz")


def test_bfloat16_truncation() -> None:
    """Only where it is asked for."""
    actual = run(elementwise, truncated, WIDE, WIDE, torch.bfloat16)
    expected = (WIDE.view(torch.int32) >> 16 << 16).view(torch.float32)
    same(actual.float(), torch.where(WIDE.isnan(), torch.nan, expected))


def test_bfloat16_of_float64() -> None:
    """Rounded once: by way of float32 the first three would be halfway, the others what they are next to."""
    ulp, little = 2.0**-7, 1e-12
    half = 1 + ulp / 2
    x = torch.tensor([half, half + little, -half - little, 1 + ulp - little], dtype=torch.float64)
    nearest = torch.tensor([1, 1 + ulp, -1 - ulp, 1 + ulp], dtype=torch.bfloat16)
    same(run(elementwise, lambda x, y: x, x, x, torch.bfloat16), nearest)
    same(run(elementwise, truncated, x, x, torch.bfloat16), torch.tensor([1, 1, -1, 1]).bfloat16())


INTEGERS = torch.randint(-8, 9, (2, 16, 16), generator=torch.Generator().manual_seed(0)).float()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
def test_dot(dtype: torch.dtype) -> None:
    """Sums of small integers are exact."""
    x, y = INTEGERS
    same(run(matrices, lambda x, y: tl.dot(x, y), x.to(dtype), y.to(dtype), torch.float32), x @ y)


def test_dot_of_tf32() -> None:
    """A product with the identity shows what becomes of an operand."""
    half = 2.0**-11  # of the distance between neighbouring tf32 from 1 on
    exact = torch.tensor([1 + half, 1 + half - 2.0**-22, -1 - 3 * half, 2.0**-126])
    x = torch.diag(torch.nn.functional.pad(exact, (0, 12)))

    def through(precision: str) -> torch.Tensor:
        def product(x, y):
            return tl.dot(x, y, input_precision=precision)

        return run(matrices, product, torch.eye(16), x, torch.float32).diag()[:4]

    same(through("ieee"), exact)
    same(through("tf32"), torch.tensor([1, 1, -1 - 2 * half, 2.0**-126]))
    same(through("tf32x3"), exact)
    same(rounded(exact), torch.tensor([1 + 2 * half, 1, -1 - 4 * half, 2.0**-126]))
    ends = torch.tensor([torch.finfo(torch.float32).max, torch.inf, -torch.inf, torch.nan])
    same(rounded(ends), torch.tensor([torch.inf, torch.inf, -torch.inf, torch.nan]))


def rounded(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(interpreter.rounded_to_tf32(x.numpy()))


@triton.jit
def larger(x, y):
    return tl.where(x > y, x, y)


def in_rows(reduced: Callable) -> Callable:
    return lambda x, y: tl.broadcast_to(reduced(x)[:, None], x.shape)


REDUCTIONS = {
    "sum": (lambda x: tl.sum(x, 1), lambda x: x.sum(1)),
    "max": (lambda x: tl.max(x, 1), lambda x: x.amax(1)),
    "reduce": (lambda x: tl.reduce(x, 1, larger), lambda x: x.amax(1)),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_bfloat16_reductions(name: str) -> None:
    x = INTEGERS[0].bfloat16()
    function, expected = REDUCTIONS[name]
    same(run(matrices, in_rows(function), x, x, torch.bfloat16)[:, 0], expected(x))


def test_bfloat16_scans() -> None:
    x = INTEGERS[0].bfloat16()
    same(run(matrices, lambda x, y: tl.cumsum(x, 1), x, x, torch.bfloat16), x.cumsum(1))
    x = x.sign()
    same(run(matrices, lambda x, y: tl.cumprod(x, 1), x, x, torch.bfloat16), x.cumprod(1))


def test_what_is_not_corrected_is_refused() -> None:
    with pytest.raises(InterpreterError, match="fma of bfloat16"):
        run(elementwise, lambda x, y: tl.fma(x, y, x), X, Y, torch.bfloat16)
    with pytest.raises(InterpreterError, match="cast from bf16 to fp8e5"):
        run(elementwise, lambda x, y: x.to(tl.float8e5).to(tl.float32), X, Y, torch.bfloat16)


def test_the_interpreter_needs_it() -> None:
    """When this fails, Triton has learnt bfloat16 and the corrections can go."""
    out = torch.empty_like(X)
    elementwise[(1,)](X, Y, out, n=len(X), function=operator.add)
    assert not out.isclose(X + Y, equal_nan=True).all()


# ---- accesses -----------------------------------------------------------------------------------


class Matrix(NamedTuple):
    data: Any
    stride: Any


@triton.jit
def copy(x, out, rows, columns, N: tl.constexpr):
    """Program i copies row i."""
    i, j = tl.program_id(0), tl.arange(0, N)
    values = tl.load(x.data + i * x.stride + j, mask=j < columns, other=0.0)
    tl.store(out.data + i * out.stride + j, values, mask=(j < columns) & (i < rows))


@triton.jit
def move(x, out, source, target, step, N: tl.constexpr):
    """Program i copies N elements to i * target."""
    i, j = tl.program_id(0), tl.arange(0, N)
    tl.store(out + i * target + j * step, tl.load(x + source + j))


@triton.jit
def shift(out, begin, step):
    i = tl.program_id(0)
    tl.store(out + 1 + i, tl.load(out + begin + i * step))


@triton.jit
def reinterpreted(x, out):
    tl.store(out, tl.load(x.to(tl.pointer_type(tl.int16))))


@triton.jit
def half_masked(x, out):
    j = tl.arange(0, 4)
    tl.store(out + j, tl.load(x + j, mask=j < 2))


@triton.jit
def counted(out):
    tl.atomic_add(out, 1.0)


def copied(x: torch.Tensor, out: torch.Tensor, rows: int, columns: int) -> interpreter.Memory:
    with interpreter.checked("out") as memory:
        copy[(rows,)](Matrix(x, x.stride(0)), Matrix(out, out.stride(0)), rows, columns, N=16)
    return memory


def moved(x: torch.Tensor, out: torch.Tensor, source=0, target=0, step=1, programs=1, outputs="out") -> None:
    with interpreter.checked(outputs):
        move[(programs,)](x, out, source, target, step, N=4)


def strided() -> torch.Tensor:
    """[3, 5] with gaps before, between and behind the rows."""
    return torch.arange(40.0).view(5, 8)[1:-1, 1:6]


def found(message: str) -> Any:
    return pytest.raises(InterpreterError, match=f"AccessError.*{message}")


def test_accesses_are_counted() -> None:
    x, out = strided(), torch.zeros(3, 5)
    memory = copied(x, out, 3, 5)
    same(out, x)
    assert memory.read == {"x.data": 60} and memory.written == {"out.data": 60}


def test_elements_may_be_shared() -> None:
    """By rows of a tensor, and by tensors."""
    x, out = strided()[:1].expand(3, 5), torch.zeros(3, 5)
    copied(x, out, 3, 5)
    same(out, x)
    buffer = torch.arange(12.0).view(2, 6)
    moved(buffer[0], buffer[1])
    assert buffer[1, :4].tolist() == [0, 1, 2, 3]


def test_outputs_by_field() -> None:
    x, out = strided(), torch.zeros(3, 5)
    with interpreter.checked("out.data"):
        copy[(3,)](Matrix(x, x.stride(0)), Matrix(out, 5), 3, 5, N=16)
    same(out, x)


def test_load_behind_the_end() -> None:
    with found(r"load of x\[4\], which is no element, by program \(0, 0, 0\)"):
        moved(torch.zeros(4), torch.zeros(8), source=1)


def test_load_before_the_begin() -> None:
    with found(r"load of x\[-1\], which is no element"):
        moved(torch.zeros(8)[4:], torch.zeros(8), source=-1)
    with found(r"load of x\[-2\], which is no element"):
        moved(torch.zeros(4), torch.zeros(8), source=-2)


def test_load_from_a_gap() -> None:
    with found(r"load of x.data\[5\], which is no element"):
        copied(strided(), torch.zeros(3, 8), 3, 6)


def test_load_from_a_neighbour() -> None:
    """An element, but of another tensor in the same memory."""
    buffer = torch.zeros(8)
    with found(r"load of x\[4\], which is no element"):
        moved(buffer[:4], buffer[4:], source=2)


def test_load_from_nowhere() -> None:
    with found("which is in no tensor"):
        moved(torch.zeros(4), torch.zeros(4), source=1 << 42)


def test_load_of_another_size() -> None:
    with found("load of 2 bytes of x, whose elements have 4"), interpreter.checked("out"):
        reinterpreted[(1,)](torch.zeros(1), torch.zeros(1))


def test_store_behind_the_end() -> None:
    with found(r"store of out\[5\], which is no element, by program \(1, 0, 0\)"):
        moved(torch.zeros(4), torch.zeros(5), target=4, programs=2)


def test_store_into_a_gap() -> None:
    with found(r"store of out.data\[5\], which is no element"):
        copied(torch.zeros(3, 8), strided(), 3, 6)


def test_store_to_an_input() -> None:
    with found(r"store to out\[0\], an input"):
        moved(torch.zeros(4), torch.zeros(4), outputs="")


def test_stores_of_two_programs() -> None:
    with found(r"store of out\[3\] by program \(1, 0, 0\), which program \(0, 0, 0\) stores"):
        moved(torch.zeros(4), torch.zeros(8), target=3, programs=2)


def test_two_values_in_one_store() -> None:
    with found(r"one store puts two values into out\[0\]"):
        moved(torch.zeros(4), torch.zeros(4), step=0)


def test_load_of_what_nobody_wrote() -> None:
    with found(r"load of out\[1\], which nobody wrote"), interpreter.checked("out"):
        shift[(1,)](torch.zeros(4), 1, 1)


@pytest.mark.parametrize(
    "begin, step, message",
    (
        (0, 1, r"load of out\[1\] by program \(1, 0, 0\), which program \(0, 0, 0\) stores"),
        (2, 1, r"store of out\[2\] by program \(1, 0, 0\), which program \(0, 0, 0\) loads"),
        (3, 0, r"store of out\[3\] by program \(2, 0, 0\), which another one loads"),
    ),
)
def test_programs_have_no_order(begin: int, step: int, message: str) -> None:
    """But launches have."""
    out = torch.zeros(4)
    with interpreter.checked("out"):
        move[(1,)](torch.ones(4), out, 0, 0, 1, N=4)
        shift[(3,)](out, 1, 1)
        assert out.tolist() == [1] * 4
        with found(message):
            shift[(3,)](out, begin, step)


def test_order_of_tensors_that_share_elements() -> None:
    buffer = torch.zeros(8)
    with found(r"load of x\[4\] by program \(1, 0, 0\), which program \(0, 0, 0\) stores"):
        with interpreter.checked("out"):
            move[(2,)](out=buffer[4:], x=buffer, source=4, target=0, step=1, N=4)


def test_masked_lanes_are_undefined() -> None:
    out = torch.zeros(4)
    with interpreter.checked("out"):
        half_masked[(1,)](torch.ones(4), out)
    same(out, torch.tensor([1.0, 1.0, torch.nan, torch.nan]))


def test_atomic_accesses_are_refused() -> None:
    with pytest.raises(InterpreterError, match="atomic access"), interpreter.checked("out"):
        counted[(1,)](torch.zeros(1))


# ---- the private functions of Triton ------------------------------------------------------------


def test_changes_of_the_interpreter_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions that are gone or take something else, and operations that nobody has looked at."""

    def refused(message: str) -> Any:
        return pytest.raises(RuntimeError, match=f"interpreter has changed: .*{message}")

    for owner, name in ((InterpreterBuilder, "create_dot"), (GridExecutor, "_init_args_hst")):
        with monkeypatch.context() as change, refused(f"there is no {owner.__name__}.{name}"):
            change.delattr(owner, name)
            moved(torch.zeros(4), torch.zeros(4))
        with monkeypatch.context() as change, refused(f"there is no {owner.__name__}.{name}"):
            change.setattr(owner, name, lambda self, everything: None)
            moved(torch.zeros(4), torch.zeros(4))
    for name in ("create_tanh", "create_fadd"):
        with monkeypatch.context() as change, refused(f"what does {name} do"):
            change.setattr(InterpreterBuilder, name, lambda self, x: x, raising=False)
            moved(torch.zeros(4), torch.zeros(4))


def test_the_interpreter_is_left_as_it_was() -> None:
    before = dict(vars(InterpreterBuilder))
    with pytest.raises(ZeroDivisionError), interpreter.checked():
        assert dict(vars(InterpreterBuilder)) != before
        raise ZeroDivisionError
    assert dict(vars(InterpreterBuilder)) == before
