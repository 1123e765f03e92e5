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
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..plan import planned, require, unknown_word
from ..problem import Partial, Problem, Slots
from ..rule import DIRECTIONS, GATES, NORMS, SHARED, SIMILARITIES, Rule
from ..statistics import Tables, Trace
from ..tokens import TENSORS, ConceptTokens

NAME = "triton"
WORDS = {
    "similarity": ("one", "cosine", "direction", "mass"),
    "gate": ("open", "step", "ramp", "sigmoid"),
    "direction": ("raw", "difference", "orthogonal", "projection", "fixed"),
    "combine": ("separate", "joint"),
    "select": ("all", "max"),
    "norm": ("none", "limit", "preserve"),
    "norm_order": (1, 2),
    "scope": ("head", "feature"),
    "shared": ("inside", "joint", "outside"),
}
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
    return unknown_word(WORDS, problem.rule)


def plan(problem: Problem, statistics: bool, tuned: Any = None) -> TritonPlan:
    """`tuned`: the tiles, if neither a table nor `tiles` shall choose them."""
    require(NAME, unknown_word(WORDS, problem.rule))
    return TritonPlan(problem, statistics, tuned)


def run(problem: Problem) -> Tensor:
    return planned(NAME, problem, False, plan).run(*problem.operands)[0]


def run_with_statistics(problem: Problem) -> tuple[Tensor, Tables]:
    output, tables = planned(NAME, problem, True, plan).run(*problem.operands)
    assert tables is not None
    return output, tables


def prepare(problem: Problem, with_statistics: bool = False) -> None:
    """Compile what calls like this one launch, and launch nothing: from then on it is in Triton's cache."""
    plan(problem, with_statistics).run(*problem.operands, start=_compile)


# ---- a launch without its tensors -------------------------------------------------------------------


class Launch(NamedTuple):
    """What stays while shapes, strides and rule stay."""

    tiles: Any
    table: str  # that has these tiles; empty: none has
    grid: tuple[int, int, int]
    goals: tuple[str, ...]  # one kernel each
    scalars: tuple[int | float | None, ...]
    constants: dict[str, Any]  # but GOAL
    text: tuple[bool, ...]  # which of `_tensors` are read
    compiled: dict[str, Any]  # by goal, from the first call on


def launch_of(problem: Problem, tuned: Any = None) -> Launch:
    """`tuned` as for `plan`."""
    sizing: Any = importlib.import_module(f"{_KERNELS}.tiles")
    batch, heads, queries, keys, dim = problem.sizes
    tokens, rule, itemsize = problem.concepts, problem.rule, problem.query.element_size()
    if tokens is not None and (tokens.concepts == 0 or (rule.reads.direction and tokens.direction is None)):
        tokens = None  # no entry exists
    strides = [s for x in (problem.query, problem.key, problem.value) for s in x.stride()[:3]]
    strides += [queries * heads * dim, dim, heads * dim]  # of the output
    bias, sizes = [0, 0, 0], [0, 0, 0, 0]
    text: list[int | None] = [None, 0, 0] * 2
    shared, prompt = _strides(problem.shared), _strides(problem.prompt)
    if problem.key_bias is not None:
        bias = [problem.key_bias.expand(batch, heads, 1, keys).stride(i) for i in (0, 1, 3)]
    if tokens is not None:
        text = [
            step
            for x in (tokens.key, tokens.value)
            for step in (x.stride(0) if x.dim() == 4 else None, x.stride(-2), x.stride(-3))
        ]
        sizes = [tokens.entries, tokens.concepts, tokens.tokens, tokens.longest]
    # In units of 16 bytes the compiler knows where rows begin, and reads 16 bytes at a time.
    unit = 16 // itemsize
    of_rows = [*strides, *(s for s in text if s is not None), *shared[:3], *prompt[:3]]
    aligned = unit if all(s % unit == 0 for s in of_rows) else 1
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
            *(s // aligned for s in strides), *bias, *(s and s // aligned for s in text),
            *(s // aligned for s in shared[:3]), *shared[3:],
            *(s // aligned for s in prompt[:3]), *prompt[3:],
            batch, heads, queries, keys, *sizes, *_numbers(rule), problem.scale * math.log2(math.e),
        ),
        constants={
            "HEAD_DIM": dim, "CHANNELS": t.channels, "FEATURES": t.features, "ALIGNED": aligned,
            "ROWS": t.rows, "KEYS": t.keys, "KEPT": t.kept, "TOKENS": t.tokens, "STREAMED": t.streamed,
            "HELD": t.held if tokens is not None else 0,
        },
        text=tuple(tokens is not None and read for read in (
            *[True] * 6, rule.reads.direction, rule.direction == "fixed", rule.reads.direction,
        )),
        compiled={},
    )  # fmt: skip


def _strides(partial: Partial | None) -> tuple[int, ...]:
    """Of the rows of its output, then of its log-sum-exp."""
    return (0,) * 6 if partial is None else (*partial.out.stride()[:3], *partial.lse.stride())


def _numbers(rule: Rule) -> tuple[float, ...]:
    """`Rule` of the kernel, whose words are in `WORDS`. Floats: Triton would compile an integer 0, 1 or 16 in
    as a constant."""
    return (
        float(SIMILARITIES.index(rule.similarity)),
        float(GATES.index(rule.gate)),
        float(DIRECTIONS.index(rule.direction)),
        float(rule.combine == "joint"),
        float(rule.select == "max"),
        float(NORMS.index(rule.norm)),
        float(rule.norm_order),
        float(SHARED.index(rule.shared)),
        float(rule.reads.tokens),
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


def tensors_of(tokens: ConceptTokens | None) -> tuple[Tensor | None, ...]:
    """In the order of the kernel; without an `update` it is the direction."""
    if tokens is None:
        return (None,) * len(TENSORS)
    *others, direction, update, offset = tokens.tensors
    return (*others, direction, direction if update is None else update, offset)


class TritonPlan:
    """Calls of one signature."""

    backend = NAME

    def __init__(self, problem: Problem, statistics: bool, tuned: Any = None) -> None:
        self.launch = launch_of(problem, tuned)
        batch, heads, queries, _, dim = problem.sizes
        shape = batch, queries, heads, dim
        self._shape = batch, heads, queries, dim
        self._strides = torch.empty(shape, device="meta").transpose(1, 2).stride()
        goals, entries = self.launch.goals, problem.entries
        self._moments = (5, entries, heads, queries) if "moments" in goals else None
        self._norms = (2, batch, heads, queries) if "norms" in goals else None
        self._heat_of_shares = problem.shared is not None and problem.rule.similarity == "one"
        self._trace = (entries, batch, heads, queries) if statistics else None

    def __repr__(self) -> str:
        return f"<plan of the Triton backend: {self.describe()}>"

    def describe(self) -> str:
        launch = self.launch
        t, launches = launch.tiles, len(launch.goals)
        table = f", from the table {launch.table}" if launch.table else ""
        return (
            f"tiles of {t.rows} queries, {t.keys} keys{'' if t.kept else ' at a time'} and {t.tokens} "
            f"concept tokens, {t.warps} warps, {launch.grid[0]} programs, {launches} "
            f"launch{'es' * (launches > 1)}{table}"
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
        *,
        start: Callable[..., None] | None = None,
    ) -> tuple[Tensor, Tables | None]:
        """`start` each kernel of the launch."""
        launch, start = self.launch, start or _start
        out = query.new_empty_strided(self._shape, self._strides)
        trace = None if self._trace is None else Trace.empty(self._trace, query.device, shared is not None)
        if out.numel():
            text = [x if read else None for x, read in zip(tensors_of(concepts), launch.text)]
            text[2:] = [None if x is None else x.contiguous() for x in text[2:]]
            moments = None if self._moments is None else query.new_empty(self._moments, dtype=torch.float32)
            norms = None if self._norms is None else query.new_empty(self._norms, dtype=torch.float32)
            partials = (*(shared or (None, None)), *(prompt or (None, None)))
            entries, rows = trace if trace is not None else (None, None)
            for goal in launch.goals:
                writes_output = goal == "output"
                start(launch, goal, (
                    query, key, value, out, key_bias, *text, *partials,
                    moments, norms if goal != "moments" else None,
                    entries if writes_output and text[0] is not None else None,
                    rows if writes_output else None,
                ))  # fmt: skip
        return out, None if trace is None else trace.tables(self._heat_of_shares)


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
