# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel (triton_kernels/attention.py), on NVIDIA and AMD GPUs.

With TRITON_INTERPRET=1 in the environment Triton's interpreter runs it, slowly, on CPU tensors.
FASTNEGATE_TRITON_TILES names a table of tiles, measured on this GPU by `python -m benchmarks.tune`.
Triton is imported on first use.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..problem import Problem, Tables, Trace
from ..rule import DIRECTIONS, GATES, NORMS, SIMILARITIES, Rule
from ..tokens import ConceptTokens

_KERNELS = "fastnegate.triton_kernels"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of Triton's compiler, for every kernel: whoever compiles one, in tests or ahead of time, takes these.
OPTIONS = {
    "num_stages": 1,  # nothing to pipeline: text is short, its loops run once or twice
    "enable_fp_fusion": False,  # else rounding depends on what the compiler finds around
}


def unavailable() -> str | None:
    if _MISSING is not None:
        return _MISSING
    if not _interpreted() and not torch.cuda.is_available():
        return "no GPU that Triton can drive"
    return None


def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if importlib.util.find_spec(_KERNELS) is None:
        return "the Triton kernels are not part of this install"
    return None


_MISSING = _missing()  # not asked at the first call, which may be inside a traced graph


def _interpreted() -> bool:
    """Whether the kernel is one for Triton's interpreter, which it decides when it is imported."""
    kernels = sys.modules.get(f"{_KERNELS}.attention")
    if kernels is not None:
        return type(kernels.attention).__name__ == "InterpretedFunction"
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")


def supports(problem: Problem) -> str | None:
    dim, query = problem.sizes[-1], problem.query
    if (reason := unavailable()) is not None:
        return reason
    device = "cpu" if _interpreted() else "cuda"
    if query.device.type != device:
        why = " (TRITON_INTERPRET is set)" if _interpreted() else ""
        return f"query is on {query.device}, not on {device}{why}"
    if query.dtype not in _DTYPES:
        return f"dtype {query.dtype} is not float32, bfloat16 or float16"
    if _interpreted() and query.dtype == torch.bfloat16:
        return "the Triton interpreter computes bfloat16 dot products wrongly"
    if device == "cuda" and torch.version.hip is None:
        if torch.cuda.get_device_capability(query.device) < (8, 0):
            return "Triton needs compute capability 8.0"
    if dim % 8 or not 16 <= dim <= 256:
        return f"head_dim={dim} is not a multiple of 8 from 16 to 256"
    if problem.bias_per_query:
        return "key_bias differs between queries"
    if problem.scale <= 0:
        return f"scale={problem.scale:g} is not positive"
    if problem.rule.direction == "retrieve":
        return "direction='retrieve' is not implemented"
    return None


def describe(problem: Problem) -> str:
    """One line for `explain`."""
    launch = _new_launch(problem)
    t, launches = launch.tiles, len(launch.goals)
    table = f", from the table {launch.table}" if launch.table else ""
    return (
        f"tiles of {t.rows} queries, {t.keys} keys{'' if t.kept else ' at a time'} and {t.tokens} concept "
        f"tokens, {t.warps} warps, {launch.grid[0]} programs, {launches} launch{'es' * (launches > 1)}{table}"
    )


def run(problem: Problem) -> Tensor:
    return _run(problem, None, _launch(problem, False))


def run_with_statistics(problem: Problem) -> tuple[Tensor, Tables]:
    trace = Trace.empty(problem)
    return _run(problem, trace, _launch(problem, True)), trace.tables()


def prepare(problem: Problem, with_statistics: bool = False) -> None:
    """Compile what calls like this one launch, and launch nothing: from then on it is in Triton's cache."""
    trace = Trace.empty(problem) if with_statistics else None
    _run(problem, trace, _new_launch(problem), _compile)


# ---- a launch without its tensors -------------------------------------------------------------------


class Launch(NamedTuple):
    """What stays while shapes, strides and rule stay."""

    tiles: Any
    table: str  # that has these tiles; empty: none has
    grid: tuple[int, int, int]
    goals: tuple[str, ...]  # one kernel each
    scalars: tuple[int | float, ...]
    constants: dict[str, Any]  # but GOAL
    text: tuple[bool, ...]  # which of `_tensors` are read
    compiled: dict[str, Any]  # by goal, from the first call on


_launches: dict[Any, Launch] = {}
_adding = threading.Lock()
_MOST_LAUNCHES = 4096  # a server sees some hundred; of callers with ever new shapes the oldest are forgotten


def _launch(problem: Problem, with_statistics: bool) -> Launch:
    """Made once for calls like this one: it costs more than the launch itself."""
    tokens = problem.concepts
    tensors = (problem.query, problem.key, problem.value, problem.key_bias, *_tensors(tokens))
    key = (
        tuple(None if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() % 16) for t in tensors),
        (tokens.entries, tokens.concepts, tokens.longest) if tokens is not None else None,
        problem.rule, problem.scale, with_statistics, _device(problem.query),
    )  # fmt: skip
    launch = _launches.get(key)
    if launch is None:
        launch = _new_launch(problem)
        with _adding:
            if len(_launches) >= _MOST_LAUNCHES:
                del _launches[next(iter(_launches))]
            _launches[key] = launch
    return launch


def _new_launch(problem: Problem, tuned: Any = None) -> Launch:
    """`tuned`: the tiles, if neither a table nor `tiles` shall choose them."""
    sizing: Any = importlib.import_module(f"{_KERNELS}.tiles")
    batch, heads, queries, keys, dim = problem.sizes
    tokens, rule, itemsize = problem.concepts, problem.rule, problem.query.element_size()
    if tokens is not None and (tokens.concepts == 0 or (rule.reads_direction and tokens.direction is None)):
        tokens = None  # no entry exists
    strides = [s for x in (problem.query, problem.key, problem.value) for s in x.stride()[:3]]
    strides += [queries * heads * dim, dim, heads * dim]  # of the output
    bias, text, sizes = [0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]
    if problem.key_bias is not None:
        bias = [problem.key_bias.expand(batch, heads, 1, keys).stride(i) for i in (0, 1, 3)]
    if tokens is not None:
        text = [x.stride(i) for x in (tokens.key, tokens.value) for i in (1, 0)]
        sizes = [tokens.entries, tokens.concepts, tokens.tokens, tokens.longest]
    # In units of 16 bytes the compiler knows where rows begin, and reads 16 bytes at a time.
    unit = 16 // itemsize
    aligned = unit if all(s % unit == 0 for s in strides + text) else 1
    shared_memory, columns, multiprocessors = _device_facts(problem.query)
    work = sizing.Work(batch, heads, queries, keys, dim, sizes[3], itemsize)
    path, table = ("", {}) if tuned is not None else _table(_device(problem.query))
    tuned = tuned or table.get(sizing.key_of(work))
    t = tuned.tiles if tuned else sizing.tiles(work, shared_memory, columns, multiprocessors)
    resident = tuned.resident if tuned else sizing.resident(work, t, shared_memory)
    return Launch(
        tiles=t,
        table=path if tuned else "",
        grid=(sizing.programs(work, t.rows, multiprocessors, resident), 1, 1),
        goals=(*(rule.sums_over_heads if tokens is not None else ()), "output"),
        scalars=(
            *(s // aligned for s in strides), *bias, *(s // aligned for s in text),
            batch, heads, queries, keys, *sizes, *_numbers(rule), problem.scale * math.log2(math.e),
        ),
        constants={
            "HEAD_DIM": dim, "CHANNELS": t.channels, "FEATURES": t.features, "ALIGNED": aligned,
            "ROWS": t.rows, "KEYS": t.keys, "KEPT": t.kept, "TOKENS": t.tokens, "STREAMED": t.streamed,
            "HELD": t.held if tokens is not None else 0,
        },
        text=tuple(tokens is not None and read for read in (
            *[True] * 6, rule.reads_direction, rule.direction == "fixed", rule.reads_direction,
        )),
        compiled={},
    )  # fmt: skip


def _numbers(rule: Rule) -> tuple[float, ...]:
    """`Rule` of the kernel: floats, since Triton would compile an integer 0, 1 or 16 in as a constant."""
    return (
        float(SIMILARITIES.index(rule.similarity)),
        float(GATES.index(rule.gate)),
        float(DIRECTIONS.index(rule.direction)),
        float(rule.combine == "joint"),
        float(rule.select == "max"),
        float(NORMS.index(rule.norm)),
        float(rule.norm_order),
        float(rule.reads_tokens),
        rule.norm_limit,
        rule.blend,
        rule.strength,
        rule.logit_bias,
        rule.threshold,
        rule.width or 0.0,
        rule.cap,
    )


def _device(query: Tensor) -> Any:
    if query.is_cuda:
        return query.device.index
    return None if _interpreted() else _driver().get_current_device()


def _driver() -> Any:
    return importlib.import_module("triton").runtime.driver.active


def _device_facts(query: Tensor) -> tuple[int, int, int]:
    """Bytes of shared memory for a program, columns of a matrix instruction, multiprocessors."""
    if _interpreted():
        return 163 * 1024, 8, 4
    driver = _driver()
    properties = driver.utils.get_device_properties(_device(query))
    columns = 8 if driver.get_current_target().backend == "cuda" else 16
    return properties["max_shared_mem"], columns, properties["multiprocessor_count"]


@functools.cache
def _table(device: Any) -> tuple[str, dict[Any, Any]]:
    """The table that the user wants, with its path; read once, even if the environment changes."""
    path = os.environ.get("FASTNEGATE_TRITON_TILES", "")
    sizing: Any = importlib.import_module(f"{_KERNELS}.tiles")
    try:
        return path, sizing.load_table(path, machine(device)) if path else {}
    except (OSError, ValueError) as error:
        raise ValueError(f"FASTNEGATE_TRITON_TILES={path!r}: {error}; without it tiles are chosen") from error


def machine(device: Any) -> dict[str, str]:
    """What tiles were measured with: they are for nothing else."""
    version: str = importlib.import_module("triton").__version__
    if _interpreted():
        return {"gpu": "Triton's interpreter", "capability": "none", "triton": version}
    gpu = torch.cuda.get_device_properties(device)
    capability = gpu.gcnArchName if torch.version.hip else f"{gpu.major}.{gpu.minor}"
    return {"gpu": gpu.name, "capability": capability, "triton": version}


# ---- a launch with its tensors ----------------------------------------------------------------------


def _tensors(tokens: ConceptTokens | None) -> tuple[Tensor | None, ...]:
    if tokens is None:
        return (None,) * 9
    return (
        tokens.key, tokens.value, tokens.index, tokens.numbers, tokens.token_bias, tokens.token_weight,
        tokens.direction, tokens.direction if tokens.update is None else tokens.update, tokens.offset,
    )  # fmt: skip


def _run(
    problem: Problem, trace: Trace | None, launch: Launch, start: Callable[..., None] | None = None
) -> Tensor:
    """`start` each kernel of the launch."""
    query = problem.query
    batch, heads, queries, _, dim = problem.sizes
    out = query.new_empty(batch, queries, heads, dim).transpose(1, 2)
    if not out.numel():
        return out
    text = [x if read else None for x, read in zip(_tensors(problem.concepts), launch.text)]
    text[2:] = [None if x is None else x.contiguous() for x in text[2:]]
    count = problem.concepts.entries if problem.concepts is not None else 0
    table = functools.partial(torch.empty, dtype=torch.float32, device=query.device)
    moments = table(5, count, heads, queries) if "moments" in launch.goals else None
    norms = table(2, batch, heads, queries) if "norms" in launch.goals else None
    entries, rows = trace if trace is not None else (None, None)
    for goal in launch.goals:
        writes_output = goal == "output"
        (start or _start)(launch, goal, (
            query, problem.key, problem.value, out, problem.key_bias, *text,
            moments, norms if goal != "moments" else None,
            entries if writes_output and text[0] is not None else None, rows if writes_output else None,
        ))  # fmt: skip
    return out


def _kernel() -> Any:
    return importlib.import_module(f"{_KERNELS}.attention").attention


def _start(launch: Launch, goal: str, tensors: tuple[Tensor | None, ...]) -> None:
    query = tensors[0]
    assert query is not None
    with torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext():
        compiled = launch.compiled.get(goal)
        if compiled is not None:
            # Triton need not look at the arguments again: what it specialises on is in the key of `launch`.
            compiled[launch.grid](*tensors, *launch.scalars, goal, *launch.constants.values())
            return
        launch.compiled[goal] = _kernel()[launch.grid](
            *tensors, *launch.scalars, GOAL=goal, **launch.constants, num_warps=launch.tiles.warps, **OPTIONS
        )


def _compile(launch: Launch, goal: str, tensors: tuple[Tensor | None, ...]) -> None:
    _kernel().warmup(
        *tensors, *launch.scalars, GOAL=goal, **launch.constants, num_warps=launch.tiles.warps, **OPTIONS,
        grid=launch.grid,
    )  # fmt: skip
