# SPDX-License-Identifier: Apache-2.0
"""The compiled CPU kernel (csrc/cpu): one pass over the queries, no [N, M] tensor in memory."""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from ..plan import planned, require, unknown_word
from ..problem import Partial, Problem, Slots, located
from ..statistics import GATE_REPORT_LEVEL, Tables
from ..tokens import ConceptTokens
from . import native

NAME = "cpu"
WORDS = native.WORDS  # all of them
# torch is imported above, so its OpenMP runtime is loaded before the extension asks for one.
_C, _MISSING = native.extension("_C")
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
    if problem.query.dtype not in native.DTYPES:
        return f"dtype {problem.query.dtype} is not float32, bfloat16 or float16"
    if dim % 8 or not 8 <= dim <= 256:
        return f"head_dim={dim} is not a multiple of 8 up to 256"
    if keys > MOST_KEYS:
        return f"{keys} prompt keys are more than {MOST_KEYS}"
    if tokens is not None and tokens.longest > MOST_KEYS:
        return f"a concept of {tokens.longest} tokens is longer than {MOST_KEYS}"
    return unknown_word(WORDS, problem.rule)


class CpuPlan:
    """Calls of one signature. Instruction set and threads are asked for at each, which costs nothing."""

    backend = NAME

    def __init__(self, problem: Problem, statistics: bool) -> None:
        self._layout = layout = native.layout(problem)
        self._out = layout.out_shape, layout.out_strides
        self._as_it_is, self._negates = layout.as_it_is, layout.negates
        self._partials = len(problem.partials) > 0
        self._call = _C.Call(self._layout.arguments, GATE_REPORT_LEVEL)
        batch, heads, queries, keys, dim = problem.sizes
        tokens = problem.concepts.tokens if problem.concepts is not None else 0
        self._sizes = [batch, heads, queries, keys, tokens, dim]
        self._tables = Tables.shapes(problem.entries, batch, queries) if statistics else ()

    def __repr__(self) -> str:
        return f"<plan of the CPU backend: {self.describe()}>"

    def describe(self) -> str:
        threads = 1 if _C.is_forked() else torch.get_num_threads()
        tile, together = _C.tiling(instruction_set(), self._sizes, threads)
        return (
            f"instruction set {instruction_set()}, {threads} thread{'s' * (threads != 1)}"
            f"{' (forked child)' * _C.is_forked()}, tiles of {tile} queries, {together} heads at a time"
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
        tables = Tables._make(map(torch.zeros, self._tables)) if self._tables else None
        _C.run_cpu(
            self._call,
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            out.data_ptr(),
            0 if key_bias is None else key_bias.data_ptr(),
            text,
            native.partial_addresses(shared, prompt, slots if self._negates else None)
            if self._partials
            else (),
            *((0, 0, 0) if tables is None else native.addresses(tables)),
            instruction_set(),
            torch.get_num_threads(),
        )
        return out, tables


def plan(problem: Problem, statistics: bool) -> CpuPlan:
    require(NAME, unknown_word(WORDS, problem.rule))
    return CpuPlan(problem, statistics)


def run(problem: Problem) -> Tensor:
    return planned(NAME, problem, False, plan).run(*problem.operands)[0]


def run_with_statistics(problem: Problem) -> tuple[Tensor, Tables]:
    output, tables = planned(NAME, problem, True, plan).run(*problem.operands)
    assert tables is not None
    return output, tables
