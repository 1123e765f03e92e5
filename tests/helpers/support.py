# SPDX-License-Identifier: Apache-2.0
"""What the tests of the operator share: rules and backends; problems and the one judge of accuracy are
those of `fastnegate.testing`."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch
from torch import Tensor

import fastnegate as fn
from fastnegate.operator.backends import cpu, load
from fastnegate.operator.plan import planned
from fastnegate.operator.problem import Problem, Statistics
from fastnegate.operator.rule import Rule
from fastnegate.testing import (  # noqa: F401
    LAYOUTS,
    MASKS,
    ROWS,
    Judge,
    budget_report,
    eps,
    fair,
    make_problem,
    pairwise,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PRESETS = tuple(fn.presets())
# Presets, and rules for the words that no preset uses.
RULES = {
    **fn.presets(),
    **{
        rule.name: rule
        for rule in (
            Rule("mass", "sigmoid", "difference", norm="preserve", scope="feature", width=2.0,
                 strength=0.75, name="mass-preserve"),
            Rule("cosine", "step", "projection", select="max", scope="feature", threshold=0.4,
                 name="step-max"),
            Rule("cosine", "ramp", combine="joint", select="max", blend=0.75, width=0.8, name="joint-max"),
            Rule("direction", "sigmoid", "fixed", norm="limit", norm_order=1, norm_limit=1.25,
                 name="fixed-head"),
            Rule("mass", "ramp", "orthogonal", norm="limit", norm_limit=1.05, strength=1.5,
                 name="mass-limit"),
        )
    },
}  # fmt: skip
CPU_BACKENDS = tuple(f"cpu-{isa}" for isa in cpu._C.usable_isas()) if cpu._C is not None else ()
BACKENDS = ("reference", *CPU_BACKENDS)  # the CPU kernel once per instruction set of this machine

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))


# ---- running ----------------------------------------------------------------------------------


def run(problem: Problem, backend: str) -> Tensor:
    return _call(fn.negated_attention, problem, backend)


def run_with_statistics(problem: Problem, backend: str) -> tuple[Tensor, Statistics]:
    return _call(fn.negated_attention_with_statistics, problem, backend)


def _call(operator, p: Problem, backend: str):
    name, _, isa = backend.partition("-")
    with mock.patch.object(cpu, "instruction_set", lambda: isa):
        if p.partials:  # also where all segments are partials, for which there is another public operator
            output, tables = planned(name, p, operator is not fn.negated_attention, load(name).plan).run(
                *p.operands
            )
            return output if tables is None else (output, tables.named)
        return operator(
            p.query, p.key, p.value, p.concepts, p.rule, scale=p.scale, key_bias=p.key_bias, backend=name
        )


def plain(problem: Problem) -> Problem:
    """The same attention without concepts."""
    return dataclasses.replace(problem, concepts=None)


def with_rule(problem: Problem, **changes: object) -> Problem:
    return dataclasses.replace(problem, rule=dataclasses.replace(problem.rule, **changes))


def with_concepts(problem: Problem, **changes: object) -> Problem:
    return dataclasses.replace(problem, concepts=dataclasses.replace(problem.concepts, **changes))
