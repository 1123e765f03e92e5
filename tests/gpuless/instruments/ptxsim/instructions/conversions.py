# SPDX-License-Identifier: Apache-2.0
"""cvt and cvta."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .. import values
from ..binding import Form, Step, opcode
from ..memory import SHARED_WINDOW
from ..values import is_float
from .arithmetic import elementwise, float_options

if TYPE_CHECKING:
    from ..machine import Cta, Lanes

_TO_INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@opcode("cvt")
def _cvt(form: Form) -> Step:
    source = form.kind()
    target = form.kind()
    integral = next((f for name, f in _TO_INTEGRAL.items() if form.has(name)), None)
    relu = form.has("relu")
    if target in values.PACKED:  # two float32, the first is the upper half
        form.has("rn")
        high, low = form.read(1, source), form.read(2, source)
        write = form.write(0, target)

        def step(cta: Cta, lanes: Lanes) -> None:
            pair = np.stack([low(cta), high(cta)], -1)
            write(cta, lanes, np.maximum(pair, 0) if relu else pair)

        return step
    if target == "tf32":
        form.one_of("rna")
        return elementwise(form, "b32", values.to_tf32, [form.read(1, source)])
    if is_float(source) and is_float(target):
        form.has("rn")
        function = _float_to_float(integral, relu, values.NUMBERS.get(target))
        if "ftz" in form.left or "sat" in form.left:
            function = float_options(form, "f32" if "f32" in (source, target) else target, function)
    elif is_float(source):
        if integral is None:
            raise form.unknown()
        flush = form.has("ftz")
        function = _float_to_integer(integral, values.NUMBERS[target], flush)
    elif target == "bf16":
        raise form.unknown()  # two roundings, as it is done here
    else:
        if is_float(target):
            form.has("rn")
        dtype = values.NUMBERS[target]

        def function(x):
            return x.astype(dtype)

    return elementwise(form, target, function, [form.read(1, source)])


def _float_to_float(integral: Callable | None, relu: bool, dtype) -> Callable:
    def function(x):
        if integral is not None:
            x = integral(x)
        if relu:
            x = np.maximum(x, 0)
        return x if dtype is None else x.astype(dtype)

    return function


def _float_to_integer(integral: Callable, dtype: np.dtype, flush: bool) -> Callable:
    """Clamped to the range, NaN is 0."""
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max

    def function(x):
        x = integral((values.flush(x) if flush else x).astype(np.float64))
        below, above = x < low, x >= float(high) + 1
        inside = np.where(below | above | np.isnan(x), 0, x).astype(dtype)
        return np.where(below, dtype.type(low), np.where(above, dtype.type(high), inside))

    return function


@opcode("cvta")
def _cvta(form: Form) -> Step:
    """Generic addresses are those of global memory, and a window for shared memory."""
    kind = form.kind()
    to, space = form.has("to"), form.one_of("global", "shared", "shared::cta")
    shift = np.uint64(0 if space == "global" else SHARED_WINDOW)
    return elementwise(form, kind, lambda x: x - shift if to else x + shift, [form.read(1, kind)])
