# SPDX-License-Identifier: Apache-2.0
"""The compiled CPU kernel (csrc/cpu): one pass over the queries, no [N, M] tensor in memory."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from ..arguments import DTYPES, addresses, arguments
from ..problem import GATE_REPORT_LEVEL, Problem, Tables

# torch is imported above, so its OpenMP runtime is loaded before the extension asks for one.
_C: Any = None
_MISSING: str | None = None
try:
    _C = importlib.import_module("fastnegate._C")
except ImportError as error:
    built = importlib.util.find_spec("fastnegate._C") is not None
    _MISSING = f"the compiled extension does not load: {error}" if built else "not part of this install"

MOST_KEYS: int = getattr(_C, "MOST_KEYS", 0)  # prompt keys, and tokens of one concept


def unavailable() -> str | None:
    return _MISSING


@functools.cache
def instruction_set() -> str:
    """The instruction set in use: the best usable one, or what FASTNEGATE_CPU_ISA names.

    Raises:
        RuntimeError: FASTNEGATE_CPU_ISA names one that this build or machine does not have.
    """
    usable = _C.usable_isas()
    forced = os.environ.get("FASTNEGATE_CPU_ISA")
    if forced is not None and forced not in usable:
        built = "" if forced in _C.built_isas() else " (not part of this build)"
        raise RuntimeError(f"FASTNEGATE_CPU_ISA={forced!r}: usable here are {', '.join(usable)}{built}")
    return forced or usable[0]


def supports(problem: Problem) -> str | None:
    _, _, _, keys, dim = problem.sizes
    tokens = problem.concepts
    if (reason := unavailable()) is not None:
        return reason
    if problem.query.device.type != "cpu":
        return f"query is on {problem.query.device}, not on the CPU"
    if problem.query.dtype not in DTYPES:
        return f"dtype {problem.query.dtype} is not float32, bfloat16 or float16"
    if dim % 8 or not 8 <= dim <= 256:
        return f"head_dim={dim} is not a multiple of 8 up to 256"
    if keys > MOST_KEYS:
        return f"{keys} prompt keys are more than {MOST_KEYS}"
    if tokens is not None and tokens.longest > MOST_KEYS:
        return f"a concept of {tokens.longest} tokens is longer than {MOST_KEYS}"
    return None


def describe(problem: Problem) -> str:
    """One line for `explain`."""
    batch, heads, queries, keys, dim = problem.sizes
    tokens = problem.concepts.tokens if problem.concepts is not None else 0
    threads = 1 if _C.is_forked() else torch.get_num_threads()
    tile, together = _C.tiling(instruction_set(), [batch, heads, queries, keys, tokens, dim], threads)
    return (
        f"instruction set {instruction_set()}, {threads} thread{'s' * (threads != 1)}"
        f"{' (forked child)' * _C.is_forked()}, tiles of {tile} queries, {together} heads at a time"
    )


def run(problem: Problem) -> Tensor:
    return _run(problem, None)


def run_with_statistics(problem: Problem) -> tuple[Tensor, Tables]:
    batch, _, queries, _, _ = problem.sizes
    entries = problem.concepts.entries if problem.concepts is not None else 0
    tables = Tables(torch.zeros(entries, 5), torch.zeros(entries, queries), torch.zeros(batch, 3))
    return _run(problem, tables), tables


def _run(problem: Problem, tables: Tables | None) -> Tensor:
    batch, heads, queries, _, dim = problem.sizes
    out = problem.query.new_empty(batch, queries, heads, dim).transpose(1, 2)
    call = arguments(problem, out)
    _C.run_cpu(
        call.values,
        addresses(tables or [None] * 3),
        GATE_REPORT_LEVEL,
        instruction_set(),
        torch.get_num_threads(),
    )
    return out
