# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels (triton_kernels/attention.py and combine.py), on NVIDIA and AMD GPUs.

With TRITON_INTERPRET=1 in the environment Triton's interpreter runs them, slowly, on CPU tensors.
FASTNEGATE_TRITON_TILES names a table of tiles, measured on this GPU by `python -m benchmarks.tune`.
Triton is imported on first use.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..plan import planned, require, unknown_word
from ..problem import Partial, Problem, Slots
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
    "center": ("none",),
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


def launch_of(problem: Problem, tuned: Any = None) -> Any:
    """The `Launch` of triton_kernels/launch.py; `tuned` as for `plan`."""
    made: Any = importlib.import_module(f"{_KERNELS}.launch")
    if problem.slots is not None and made.existing(problem) is not None:
        return made.of_combine(problem)
    sizing: Any = importlib.import_module(f"{_KERNELS}.tiles")
    tokens = made.existing(problem)
    longest = 0 if tokens is None else tokens.longest
    shared_memory, columns, multiprocessors = _device_facts(problem.query)
    work = sizing.Work(*problem.sizes, longest, problem.query.element_size())
    path, table = ("", {}) if tuned is not None else _table(_device(problem.query))
    tuned = tuned or table.get(sizing.key_of(work))
    t = tuned.tiles if tuned else sizing.tiles(work, shared_memory, columns, multiprocessors)
    resident = tuned.resident if tuned else sizing.resident(work, t, shared_memory)
    programs = sizing.programs(work, t.rows, multiprocessors, resident)
    return made.of_attention(problem, t, path if tuned else "", programs)


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
        launches = len(launch.goals)
        table = f", from the table {launch.table}" if launch.table else ""
        return (
            f"{launch.tiles.describe()}, {launch.tiles.warps} warps, {launch.grid[0]} programs, "
            f"{launches} launch{'es' * (launches > 1)}{table}"
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
            if text[0] is None:
                entries = None
            for goal in launch.goals if launch.kernel == "attention" else ():
                writes_output = goal == "output"
                start(launch, goal, (
                    query, key, value, out, key_bias, *text, *partials,
                    moments, norms if goal != "moments" else None,
                    entries if writes_output else None,
                    rows if writes_output else None,
                ))  # fmt: skip
            if launch.kernel == "combine":
                outs, lses = _parts(slots or (), launch.copied)
                start(launch, "output", (
                    *partials, outs, lses, out, *text[2:4], *text[6:], entries, rows,
                ))  # fmt: skip
        return out, None if trace is None else trace.tables(self._heat_of_shares)


def _parts(slots: Slots, copied: bool) -> tuple[tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
    """Outputs and log-sum-exps, or None without slots."""
    if not slots:
        return None, None
    parts = zip(*slots)
    outs, lses = (tuple(x.contiguous() for x in part) if copied else part for part in parts)
    return outs, lses


def _kernel(name: str = "attention") -> Any:
    return getattr(importlib.import_module(f"{_KERNELS}.{name}"), name)


def _start(launch: Any, goal: str, tensors: tuple[Any, ...]) -> None:
    with torch.cuda.device(launch.device) if launch.device.type == "cuda" else contextlib.nullcontext():
        compiled = launch.compiled.get(goal)
        if compiled is not None:
            # Triton need not look at the arguments again: what it specialises on is in the key of `launch`.
            compiled[launch.grid](*tensors, *launch.scalars, goal, *launch.constants.values())
            return
        launch.compiled[goal] = _kernel(launch.kernel)[launch.grid](
            *tensors, *launch.scalars, GOAL=goal, **launch.constants, num_warps=launch.tiles.warps, **OPTIONS
        )


def _compile(launch: Any, goal: str, tensors: tuple[Any, ...]) -> None:
    _kernel(launch.kernel).warmup(
        *tensors, *launch.scalars, GOAL=goal, **launch.constants, num_warps=launch.tiles.warps, **OPTIONS,
        grid=launch.grid,
    )  # fmt: skip
