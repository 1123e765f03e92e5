# SPDX-License-Identifier: Apache-2.0
"""The compiled CUDA kernel (csrc/cuda), on NVIDIA GPUs from compute capability 8.0 on."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..arguments import addresses, arguments
from ..problem import Problem, Tables, Trace

_cuda: Any = None
_MISSING: str | None = None
try:
    _cuda = importlib.import_module("fastnegate._cuda")
except ImportError as error:
    built = importlib.util.find_spec("fastnegate._cuda") is not None
    _MISSING = f"the compiled extension does not load: {error}" if built else "not part of this install"

_DTYPES = (torch.bfloat16, torch.float16)
_ALIGNMENT = 16  # bytes that are copied at a time


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
    if problem.rule.direction == "retrieve":
        return "direction='retrieve' is not implemented"
    rows = {"query": query, "key": problem.key, "value": problem.value}
    if tokens is not None:
        rows |= {"concept key": tokens.key, "concept value": tokens.value}
    for name, tensor in rows.items():
        if not _aligned(tensor):
            return f"rows of {name} are not {_ALIGNMENT}-byte aligned (strides {tensor.stride()})"
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
    return all(step * size % _ALIGNMENT == 0 for step in (offset, *steps))


def describe(problem: Problem) -> str:
    """One line for `explain`."""
    device, _ = _place(problem.query)
    tiling = _cuda.tiling(arguments(problem, problem.query).values, device)
    warps, blocks, _, prompt, concepts, shared = tiling
    where = "in shared memory" if prompt else "read piece by piece"
    launches = 1 + len(problem.rule.sums_over_heads) * (problem.concepts is not None)
    return (
        f"{blocks} blocks of {warps} warps, 16 queries each at a time, prompt {where}, room for {concepts} "
        f"concept tokens, {shared / 1024:.1f} KiB of shared memory, {launches} launch{'es' * (launches > 1)}"
    )


def run(problem: Problem) -> Tensor:
    return _run(problem, None)


def run_with_statistics(problem: Problem) -> tuple[Tensor, Tables]:
    trace = Trace.empty(problem)
    return _run(problem, trace), trace.tables()


def _run(problem: Problem, trace: Trace | None) -> Tensor:
    query, tokens = problem.query, problem.concepts
    batch, heads, queries, _, dim = problem.sizes
    out = query.new_empty(batch, queries, heads, dim).transpose(1, 2)
    table = functools.partial(torch.empty, dtype=torch.float32, device=query.device)
    sums = problem.rule.sums_over_heads if tokens is not None else ()
    moments = table(5, tokens.entries, heads, queries) if tokens is not None and "moments" in sums else None
    norms = table(2, batch, heads, queries) if "norms" in sums else None
    call = arguments(problem, out)
    tables = (moments, norms, *(trace or (None, None)))
    _cuda.run(call.values, addresses(tables), *_place(query))
    return out


def _place(query: Tensor) -> tuple[int, int]:
    """Device, and torch's current stream on it."""
    return query.device.index, torch.cuda.current_stream(query.device).cuda_stream
