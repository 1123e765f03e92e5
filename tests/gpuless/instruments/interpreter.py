# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter with bfloat16 and tf32 as GPUs compute them, and with every access to memory checked.

    with interpreter.checked("out") as memory:
        kernel[grid](x, out)
    print(memory.read["x"], memory.written["out"])

For a process with TRITON_INTERPRET=1. As it comes (triton 3.9.0) the interpreter computes with the bit
patterns of bfloat16 (issue 11584 of triton-lang/triton), truncates where it casts to it, multiplies
float32 exactly where tf32 is asked for, puts zeros where a masked load leaves lanes undefined, and reads
and writes any address of the process.

Not modelled: how matrix units round while they accumulate, subnormal numbers that fast functions flush,
and that accesses of one program may overtake each other.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as stock
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, ReduceOps, ScanOps, TensorHandle

# ---- replacing parts of the interpreter ---------------------------------------------------------

# Operations of the builder compute through these, which are corrected ...
FUNNELS = {"unary_op", "binary_op", "ternary_op", "cast_impl"}
# ... except for these: they move bits, are not defined for bfloat16, or call other operations.
HARMLESS = {
    f"create_{name}"
    for name in """
    get_program_id get_num_programs make_range addptr int_to_ptr ptr_to_int load store bitcast fabs reshape
    trans gather expand_dims broadcast cat join split splat unsplat sdiv udiv idiv umulhi histogram erf
    rsqrt print assert assume barrier extern_elementwise inline_asm atomic_load atomic_store atomic_poll
    make_tensor_descriptor descriptor_load descriptor_store descriptor_gather descriptor_scatter
    """.split()
}

Replacement = tuple[Any, Callable]  # of the function of the same name in a class or a module
CORRECTIONS: list[Replacement] = []


def corrects(owner: Any) -> Callable[[Callable], Callable]:
    """The decorated function replaces one of `owner`, which it gets as its first argument."""

    def register(function: Callable) -> Callable:
        CORRECTIONS.append((owner, function))
        return function

    return register


@contextlib.contextmanager
def replaced(replacements: list[Replacement]) -> Iterator[None]:
    """Replace private functions of Triton, which have to be there and to take what is taken now."""
    names = {function.__name__ for _, function in replacements}
    for name, operation in vars(InterpreterBuilder).items():
        if name.startswith("create_") and name not in HARMLESS | names:
            if not FUNNELS & set(operation.__code__.co_names):
                raise RuntimeError(f"Triton's interpreter has changed: what does {name} do to bfloat16?")
    with contextlib.ExitStack() as stack:
        for owner, function in replacements:
            name = function.__name__
            original = vars(owner).get(name)
            taken = list(inspect.signature(function).parameters)[1:]
            if original is None or list(inspect.signature(original).parameters) != taken:
                what = f"{owner.__name__}.{name}({', '.join(taken)})"
                raise RuntimeError(f"Triton's interpreter has changed: there is no {what}")
            stack.enter_context(mock.patch.object(owner, name, _with_original(function, original)))
        yield


def _with_original(function: Callable, original: Callable) -> Callable:
    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return function(original, *args, **kwargs)

    return replacement


# ---- bfloat16 and tf32 --------------------------------------------------------------------------


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: np.ndarray, truncate: bool = False) -> np.ndarray:
    """Bits of the nearest bfloat16, ties to even; integers become float32 first, as in compiled code."""
    wide = values.astype(np.float32)
    bits = wide.view(np.uint32)
    if values.dtype == np.float64:  # to odd numbers, or rounding twice would not be rounding once
        bits = bits - (abs(wide) > abs(values)) | (wide != values)
    rounded = bits if truncate else bits + (0x7FFF + (bits >> 16 & 1))
    return (np.where(np.isnan(wide), 0x7FC00000, rounded) >> 16).astype(np.uint16)


def truncated_to_tf32(values: np.ndarray) -> np.ndarray:
    """What matrix units see of float32, which compiled code hands to them as it is (triton 3.9.0 for sm_80
    and sm_90; issue 4574 of triton-lang/triton)."""
    bits = values.view(np.uint32)
    return np.where(np.isnan(values), bits, bits & 0xFFFFE000).view(np.float32)


def rounded_to_tf32(values: np.ndarray) -> np.ndarray:
    """cvt.rna.tf32.f32: to the nearest, ties away from zero."""
    nearest = values.view(np.uint32) + 0x1000 & 0xFFFFE000
    return np.where(np.isfinite(values), nearest.view(np.float32), values)


def is_bfloat16(x: Any) -> bool:
    return isinstance(x, TensorHandle) and x.dtype.scalar == tl.bfloat16


def widened(x: TensorHandle) -> TensorHandle:
    """bfloat16 as float32, everything else as it is."""
    return TensorHandle(from_bfloat16(x.data), tl.float32) if is_bfloat16(x) else x


def in_float32(compute: Callable, *operands: TensorHandle) -> TensorHandle:
    """One operation, on bfloat16 as GPUs make it. Rounded to float32 and then to bfloat16, a sum, product or
    quotient is rounded correctly: 24 bits are more than twice 8 and 2 (Figueroa, 1995)."""
    result = compute(*map(widened, operands))
    if result.data.dtype == np.bool_:
        result.dtype = tl.int1  # the stock interpreter leaves the type of what was compared
    elif any(map(is_bfloat16, operands)):
        result = TensorHandle(to_bfloat16(result.data), tl.bfloat16)
    return result


@corrects(InterpreterBuilder)
def unary_op(original, self, arg, op):
    return in_float32(lambda x: original(self, x, op), arg)


@corrects(InterpreterBuilder)
def binary_op(original, self, lhs, rhs, op):
    return in_float32(lambda x, y: original(self, x, y, op), lhs, rhs)


@corrects(InterpreterBuilder)
def ternary_op(original, self, lhs, rhs, other, op):
    return in_float32(lambda x, y, z: original(self, x, y, z, op), lhs, rhs, other)


@corrects(InterpreterBuilder)
def cast_impl(original, self, src, dst_type):
    src = widened(src)
    if dst_type.scalar == tl.bfloat16:
        return TensorHandle(to_bfloat16(src.data), tl.bfloat16)
    return original(self, src, dst_type)


@corrects(InterpreterBuilder)
def create_fp_to_fp(original, self, src, dst_type, rounding_mode):
    """Casts of a named rounding mode, between bfloat16 and float16, and of float8."""
    kinds = {src.dtype.scalar, dst_type.scalar}
    if tl.bfloat16 not in kinds:
        return original(self, src, dst_type, rounding_mode)
    if any(kind.is_fp8() for kind in kinds):
        raise NotImplementedError(f"a cast from {src.dtype.scalar} to {dst_type.scalar}")
    if rounding_mode == stock._ir.ROUNDING_MODE.RTZ:
        return TensorHandle(to_bfloat16(src.data, truncate=True), tl.bfloat16)
    return self.cast_impl(src, dst_type)


@corrects(InterpreterBuilder)
def create_dot(original, self, a, b, d, input_precision, max_num_imprecise_acc):
    precision = stock._ir.INPUT_PRECISION
    if a.dtype.scalar != tl.float32 or input_precision == precision.IEEE:
        return original(self, widened(a), widened(b), d, input_precision, max_num_imprecise_acc)
    if input_precision == precision.TF32:
        return TensorHandle(truncated_to_tf32(a.data) @ truncated_to_tf32(b.data) + d.data, tl.float32)
    if input_precision != precision.TF32x3:
        raise NotImplementedError(f"a dot of {input_precision}")
    # As in Triton's pass F32DotTC: the small products first, without NaN.
    x, y = rounded_to_tf32(a.data), rounded_to_tf32(b.data)
    small = truncated_to_tf32(a.data - x) @ y + x @ truncated_to_tf32(b.data - y)
    return TensorHandle(np.where(np.isnan(small), np.float32(0), small) + x @ y + d.data, tl.float32)


# Reductions as the kernel's own function makes them, step by step: the fast ways compute with bits.
@corrects(ReduceOps)
def apply_impl(original, self, input):
    slow = any(x.dtype == tl.bfloat16 for x in input)
    return self.generic_reduce(input) if slow else original(self, input)


@corrects(ScanOps)
def cumsum(original, self, input):
    return self.generic_scan((input,)) if input.dtype == tl.bfloat16 else original(self, input)


@corrects(ScanOps)
def cumprod(original, self, input):
    return self.generic_scan((input,)) if input.dtype == tl.bfloat16 else original(self, input)


@corrects(InterpreterBuilder)
def create_fma(original, self, x, y, z):
    if is_bfloat16(z):  # not rounded correctly by way of float32
        raise NotImplementedError("fma of bfloat16")
    return original(self, x, y, z)


@corrects(InterpreterBuilder)
def create_dot_scaled(
    original, self, lhs, lhs_scale_handle, lhs_format_enum, rhs, rhs_scale_handle, rhs_format_enum,
    fast_math, lhs_k_pack, rhs_k_pack, acc_handle,
):  # fmt: skip
    raise NotImplementedError("dot_scaled")


# ---- memory -------------------------------------------------------------------------------------

SLOT_BITS = 40  # a kernel sees its tensors so far apart that no overrun ends in another one
NOBODY, SEVERAL = -1, -2


class AccessError(Exception):
    """A kernel touched memory that it must not touch."""


class Storage:
    """The memory of a tensor. Tables have an entry per byte and use that of an element's first byte."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor  # or its memory might become another tensor's
        self.address, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        self.written = np.zeros(size, bool)  # in this or an earlier launch
        self.writer = np.empty(size, np.int32)  # program of this launch that stored there, or NOBODY
        self.reader = np.empty(size, np.int32)  # that loaded from there, NOBODY or SEVERAL
        self.begin_launch()

    def begin_launch(self) -> None:
        self.is_output = False
        self.writer.fill(NOBODY)
        self.reader.fill(NOBODY)


class Argument:
    """A tensor as a kernel sees it; offsets are bytes from the start of its storage."""

    def __init__(self, name: str, tensor: torch.Tensor, storage: Storage, is_output: bool) -> None:
        self.name, self.storage, self.is_output = name, storage, is_output
        self.itemsize = tensor.element_size()
        self.begin = tensor.storage_offset() * self.itemsize
        self.is_element = np.zeros(len(storage.written) + 1, bool)
        strides = [stride * self.itemsize for stride in tensor.stride()]
        np.lib.stride_tricks.as_strided(self.is_element[self.begin :], tensor.shape, strides)[...] = True

    def element(self, offset: int) -> str:
        return f"{self.name}[{(offset - self.begin) / self.itemsize:g}]"

    def require(self, right: np.ndarray, offsets: np.ndarray, message: str) -> None:
        if not right.all():
            raise AccessError(message.format(self.element(offsets[~right][0])))


class Memory:
    """The tensors of launches and what kernels did to them.

    Programs have no order: none may load or store what another one of its launch stores.
    """

    def __init__(self, outputs: tuple[str, ...]) -> None:
        self.read: Counter[str] = Counter()  # bytes of each tensor, by the name of the argument
        self.written: Counter[str] = Counter()
        self._outputs = outputs
        self._storages: dict[int, Storage] = {}
        self._arguments: list[Argument] = []
        self._slots: dict[int, int] = {}  # of a tensor's id
        self._programs: list[tuple[int, int, int]] = []  # so far in this launch

    def begin_launch(self, tensors: list[tuple[str, torch.Tensor]]) -> None:
        self._arguments, self._slots, self._programs = [], {}, []
        for storage in self._storages.values():
            storage.begin_launch()
        for name, wrapped in tensors:
            tensor = stock._unwrap_tensor(wrapped)
            address = tensor.untyped_storage().data_ptr()
            if address not in self._storages:
                self._storages[address] = Storage(tensor)
            storage = self._storages[address]
            is_output = name in self._outputs or name.partition(".")[0] in self._outputs
            storage.is_output |= is_output
            self._arguments.append(Argument(name, tensor, storage, is_output))
            self._slots[id(wrapped)] = len(self._arguments)

    def address(self, tensor: torch.Tensor) -> int:
        """What the kernel is told."""
        slot = self._slots[id(tensor)]
        return (slot << SLOT_BITS) + self._arguments[slot - 1].begin

    def access(
        self, what: str, addresses: np.ndarray, mask: np.ndarray, size: int, program: tuple[int, int, int]
    ) -> np.ndarray:
        """Check and count a "load" or a "store" of elements of `size` bytes; returns the real addresses."""
        if self._programs[-1:] != [program]:
            self._programs.append(program)
        lanes = addresses[mask]
        slots = (lanes + (1 << SLOT_BITS - 1)) >> SLOT_BITS
        real_lanes = np.empty_like(lanes)
        for slot in slots[:1].tolist() if (slots == slots[:1]).all() else np.unique(slots).tolist():
            chosen = slots == slot
            offsets = (lanes[chosen] - (slot << SLOT_BITS)).view(np.int64)
            if not 0 < slot <= len(self._arguments):
                raise AccessError(f"{what} at {lanes[chosen][0]:#x}, which is in no tensor, {self._by()}")
            argument = self._arguments[slot - 1]
            self._check(what, argument, offsets, size)
            counter = self.read if what == "load" else self.written
            counter[argument.name] += offsets.size * size
            real_lanes[chosen] = offsets + argument.storage.address
        real = np.zeros_like(addresses)
        real[mask] = real_lanes
        return real

    def _by(self) -> str:
        return f"by program {self._programs[-1]}"

    def _check(self, what: str, argument: Argument, offsets: np.ndarray, size: int) -> None:
        inside = (offsets >= 0) & (offsets < len(argument.is_element))
        elements = inside & argument.is_element.take(offsets, mode="clip")
        argument.require(elements, offsets, f"{what} of {{}}, which is no element, {self._by()}")
        if size != argument.itemsize:
            wrong = f"{what} of {size} bytes of {argument.name}, whose elements have {argument.itemsize}"
            raise AccessError(f"{wrong}, {self._by()}")
        if what == "store":
            if not argument.is_output:
                raise AccessError(f"store to {argument.element(offsets[0])}, an input, {self._by()}")
            first = np.isin(np.arange(offsets.size), np.unique(offsets, return_index=True)[1])
            argument.require(first, offsets, f"one store puts two values into {{}}, {self._by()}")
        elif argument.is_output:
            written = argument.storage.written[offsets]
            argument.require(written, offsets, f"load of {{}}, which nobody wrote, {self._by()}")
        if argument.storage.is_output:
            self._check_order(what, argument, offsets)

    def _check_order(self, what: str, argument: Argument, offsets: np.ndarray) -> None:
        storage, program = argument.storage, len(self._programs) - 1
        tables = {"stores": storage.writer}
        if what == "store":
            tables["loads"] = storage.reader
        for does, table in tables.items():
            before = table[offsets]
            free = (before == NOBODY) | (before == program)
            if not free.all():
                other = before[~free][0]
                other = "another one" if other == SEVERAL else f"program {self._programs[other]}"
                argument.require(free, offsets, f"{what} of {{}} {self._by()}, which {other} {does}")
        if what == "store":
            storage.writer[offsets] = program
            storage.written[offsets] = True
        else:
            before = storage.reader[offsets]
            storage.reader[offsets] = np.where((before == NOBODY) | (before == program), program, SEVERAL)


def tensors_of(name: str, argument: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if hasattr(argument, "data_ptr"):
        yield name, argument
    elif isinstance(argument, stock.TensorDescriptor):
        yield f"{name}.base", argument.base
    elif isinstance(argument, tuple):
        for field, x in zip(getattr(argument, "_fields", itertools.count()), argument):
            yield from tensors_of(f"{name}.{field}", x)


@contextlib.contextmanager
def checked(*outputs: str) -> Iterator[Memory]:
    """Correct the interpreter and check what is launched in it.

    Loads and stores may touch elements of the tensors of their launch, neither gaps of strided views nor,
    by way of one tensor, elements of another. Only outputs may be stored to, and they may be loaded from
    only where a launch inside of this context stored. Lanes that a load leaves undefined are NaN or -1.

    Args:
        outputs: names of arguments, or of fields of NamedTuples: "trace" or "trace.rows".
    """
    memory = Memory(outputs)
    prepared: set[int] = set()

    def _init_args_hst(original, self, args_dev, kwargs):
        args, named = original(self, args_dev, kwargs)
        arguments = [*zip(self.arg_names, args), *named.items()]
        memory.begin_launch([pair for name, x in arguments for pair in tensors_of(name, x)])
        prepared.clear()
        return args, named

    def _patch_lang(original, fn):
        # Once per module and launch. Called for each call of a device function it takes half of the time.
        if id(fn.__globals__) in prepared:
            return None
        prepared.add(id(fn.__globals__))
        return original(fn)

    def _implicit_cvt(original, arg):
        converted = original(arg)
        if hasattr(arg, "data_ptr"):
            converted.handle.data[:] = memory.address(arg)
        return converted

    def access(what, builder, ptrs, mask):
        size = max(ptrs.get_element_ty().primitive_bitwidth // 8, 1)
        lanes = np.broadcast_to(mask.data.astype(bool), ptrs.data.shape)
        return TensorHandle(memory.access(what, ptrs.data, lanes, size, builder.grid_idx), ptrs.dtype)

    def create_masked_load(original, self, ptrs, mask, other, cache_policy, is_volatile):
        if other is None and not mask.data.all():
            kind = ptrs.get_element_ty()
            undefined = np.full(ptrs.data.shape, -1, f"i{kind.primitive_bitwidth // 8}")
            other = TensorHandle(undefined.view(stock._get_np_dtype(kind)), kind)
        return original(self, access("load", self, ptrs, mask), mask, other, cache_policy, is_volatile)

    def create_masked_store(original, self, ptrs, value, mask, cache_policy):
        return original(self, access("store", self, ptrs, mask), value, mask, cache_policy)

    def create_atomic_cas(original, self, ptr, cmp, val, sem, scope):
        raise NotImplementedError("atomic access")

    def create_atomic_rmw(original, self, rmwOp, ptr, val, mask, sem, scope):
        raise NotImplementedError("atomic access")

    checks: list[Replacement] = [(GridExecutor, _init_args_hst), (stock, _implicit_cvt), (stock, _patch_lang)]
    for function in (create_masked_load, create_masked_store, create_atomic_cas, create_atomic_rmw):
        checks.append((InterpreterBuilder, function))
    with replaced(CORRECTIONS + checks), np.errstate(all="ignore"):  # a GPU does not warn either
        yield memory
