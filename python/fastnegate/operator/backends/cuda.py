# SPDX-License-Identifier: Apache-2.0
"""The compiled CUDA kernel (csrc/cuda), on NVIDIA GPUs from compute capability 8.0 on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..plan import partial, planned, require, unknown_word
from ..problem import Partial, Problem, Slots, located
from ..statistics import Tables, Trace
from ..tokens import ConceptTokens
from . import native

NAME = "cuda"
WORDS = {**native.WORDS, "direction": ("raw", "difference", "orthogonal", "projection", "fixed")}
_cuda, _MISSING = native.extension("_cuda")

_DTYPES = (torch.bfloat16, torch.float16)


_Asked = TypeVar("_Asked", bound=Callable[..., Any])


def _constant(asked: _Asked) -> _Asked:
    """Compilers ask while they trace, and must not look into the extension. This is what
    torch.compiler.assume_constant_result does, which imports the compiler."""
    asked._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return asked


@_constant
def unavailable() -> str | None:
    return _unavailable()


@functools.cache
def _unavailable() -> str | None:
    if _MISSING is not None:
        return _MISSING
    if torch.version.hip is not None:
        return "PyTorch is built for ROCm"
    if reason := _cuda.unavailable():
        return str(reason)
    return None if torch.cuda.is_available() else "PyTorch sees no CUDA device"


def supports(problem: Problem) -> str | None:
    query, tokens = problem.query, problem.concepts
    if (reason := _refused_device(query)) is not None:
        return reason
    if query.dtype not in _DTYPES:
        return f"dtype {query.dtype} is not bfloat16 or float16"
    if query.shape[-1] not in head_dims():
        return f"head_dim={query.shape[-1]} is not one of {', '.join(map(str, head_dims()))}"
    if problem.bias_per_query:
        return "key_bias differs between queries"
    if problem.scale <= 0:
        return f"scale={problem.scale:g} is not positive"
    if (reason := unknown_word(WORDS, problem.rule) or partial(problem)) is not None:
        return reason
    rows = {"query": query, "key": problem.key, "value": problem.value}
    if tokens is not None:
        rows |= {"concept key": tokens.key, "concept value": tokens.value}
    for name, tensor in rows.items():
        if not _aligned(tensor):
            return f"rows of {name} are not {native.ALIGNMENT}-byte aligned (strides {tensor.stride()})"
    return None


def _refused_device(query: Tensor) -> str | None:
    if _MISSING is not None:
        return _MISSING
    if not query.is_cuda:  # before CUDA is asked for devices, which would start it in this process
        return f"query is on {query.device}, not on a CUDA device"
    if (reason := unavailable()) is not None:
        return reason
    return unsupported_gpu(torch.cuda.get_device_capability(query.device))


@_constant
def unsupported_gpu(capability: tuple[int, int]) -> str | None:
    """Why no kernel of this build runs on a GPU. Binaries are for later minor versions, PTX for all later."""
    for arch in _cuda.ARCHS.split(";"):
        number = int("".join(filter(str.isdigit, arch)))
        built = divmod(number, 10)
        ptx = not arch.endswith("-real")
        if (built[0] == capability[0] and built <= capability) or (ptx and built <= capability):
            return None
    major, minor = capability
    return f"compute capability {major}.{minor} is not among those of this build ({_cuda.ARCHS})"


@_constant
def head_dims() -> list[int]:
    return [dim for dim in range(8, 513, 8) if _cuda.supports_dim(dim)]


def _aligned(tensor: Tensor) -> bool:
    size = tensor.element_size()
    steps = [s for s, n in zip(tensor.stride()[:-1], tensor.shape) if n > 1]
    # Compilers know no offset; the launch refuses wrong addresses.
    offset = 0 if torch.compiler.is_compiling() else tensor.storage_offset()
    return all(step * size % native.ALIGNMENT == 0 for step in (offset, *steps))


class CudaPlan:
    """Calls of one signature on one device."""

    backend = NAME

    def __init__(self, problem: Problem, statistics: bool) -> None:
        self._layout = layout = native.layout(problem)
        self._out = layout.out_shape, layout.out_strides
        self._as_it_is, self._negates = layout.as_it_is, layout.negates
        self._device = _device(problem.query)
        self._call = _cuda.Call(self._layout.arguments, self._device)
        batch, heads, queries, _, _ = problem.sizes
        sums = problem.rule.sums_over_heads if self._layout.negates else ()
        self._launches = 1 + len(sums)
        self._moments = (5, problem.entries, heads, queries) if "moments" in sums else None
        self._norms = (2, batch, heads, queries) if "norms" in sums else None
        self._trace = (problem.entries, batch, heads, queries) if statistics else None

    def __repr__(self) -> str:
        return f"<plan of the CUDA backend: {self.describe()}>"

    def describe(self) -> str:
        _, warps, blocks, _, prompt, concepts, _, shared = _cuda.tiling(self._call)
        where = "in shared memory" if prompt else "read piece by piece"
        return (
            f"{blocks} blocks of {warps} warps, 16 queries each at a time, prompt {where}, room for "
            f"{concepts} concept tokens, {shared / 1024:.1f} KiB of shared memory, {self._launches} "
            f"launch{'es' * (self._launches > 1)}"
        )

    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_bias: Tensor | None,
        concepts: ConceptTokens | None,
        shared: Partial | None = None,
        prompt: Partial | None = None,
        slots: Slots | None = None,
    ) -> tuple[Tensor, Tables | None]:
        out = query.new_empty_strided(*self._out)  # no view, which autograd would have to know of
        text: tuple[int, ...] = ()
        if not self._as_it_is:
            key_bias, copies = self._layout.readable(key_bias, concepts)  # held until the call has ended
            text = native.addresses(copies)
        elif self._negates and concepts is not None:
            # Found just now, to look the plan up.
            text = (concepts.__dict__.get("found") or located(concepts)).addresses
        moments = None if self._moments is None else query.new_empty(self._moments, dtype=torch.float32)
        norms = None if self._norms is None else query.new_empty(self._norms, dtype=torch.float32)
        trace = None if self._trace is None else Trace.empty(self._trace, query.device)
        _cuda.run(
            self._call,
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            out.data_ptr(),
            0 if key_bias is None else key_bias.data_ptr(),
            text,
            0 if moments is None else moments.data_ptr(),
            0 if norms is None else norms.data_ptr(),
            *((0, 0) if trace is None else native.addresses(trace)),
            _stream(self._device),
        )
        return out, None if trace is None else trace.tables()


def _device(query: Tensor) -> int:
    return query.device.index


def _stream(device: int) -> int:
    """torch's current stream on the device."""
    stream: int = torch._C._cuda_getCurrentRawStream(device)
    return stream


def plan(problem: Problem, statistics: bool) -> CudaPlan:
    require(NAME, unknown_word(WORDS, problem.rule) or partial(problem))
    return CudaPlan(problem, statistics)


def run(problem: Problem) -> Tensor:
    return planned(NAME, problem, False, plan).run(*problem.operands)[0]


def run_with_statistics(problem: Problem) -> tuple[Tensor, Tables]:
    output, tables = planned(NAME, problem, True, plan).run(*problem.operands)
    assert tables is not None
    return output, tables
