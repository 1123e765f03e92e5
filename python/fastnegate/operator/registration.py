# SPDX-License-Identifier: Apache-2.0
"""torch.library registration: flat functional schemas, fakes, and the one place that calls backends.

`define` + `impl` instead of `custom_op`, which costs about twice as much per call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import load
from .problem import Problem, Tables
from .rule import Rule
from .tokens import ConceptTokens

_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? key_bias, Tensor? concept_key, "
    "Tensor? concept_value, Tensor? index, Tensor? numbers, Tensor? token_bias, "
    "Tensor? token_weight, Tensor? direction, Tensor? update, Tensor? offset, "
    "int[] limits, int[] rule, float[] rule_numbers, float scale, str backend"
)
_library = torch.library.Library("fastnegate", "DEF")
_library.define(f"negated_attention({_ARGUMENTS}) -> Tensor")
_library.define(f"negated_attention_with_statistics({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)")


def _problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    concept_key: Tensor | None,
    concept_value: Tensor | None,
    index: Tensor | None,
    numbers: Tensor | None,
    token_bias: Tensor | None,
    token_weight: Tensor | None,
    direction: Tensor | None,
    update: Tensor | None,
    offset: Tensor | None,
    limits: list[int],
    rule: list[int],
    rule_numbers: list[float],
    scale: float,
    backend: str,
) -> Problem:
    concepts = None
    if concept_key is not None:
        assert concept_value is not None and index is not None and numbers is not None
        entries, count, longest, busiest = limits
        concepts = ConceptTokens(
            concept_key,
            concept_value,
            index,
            numbers,
            entries,
            count,
            longest,
            busiest,
            token_bias,
            token_weight,
            direction,
            update,
            offset,
        )
    return Problem(query, key, value, key_bias, concepts, Rule.from_flat(rule, rule_numbers), scale)


def _run(*args: object) -> Tensor:
    output: Tensor = load(args[-1]).run(_problem(*args))  # type: ignore[arg-type]
    return output


def _run_with_statistics(*args: object) -> tuple[Tensor, ...]:
    module = load(args[-1])  # type: ignore[arg-type]
    output, tables = module.run_with_statistics(_problem(*args))  # type: ignore[arg-type]
    return output, *tables


def _fake(*args: object) -> Tensor:
    query: Tensor = args[0]  # type: ignore[assignment]
    batch, heads, queries, dim = query.shape
    return query.new_empty(batch, queries, heads, dim).transpose(1, 2)


def _fake_with_statistics(*args: object) -> tuple[Tensor, ...]:
    query: Tensor = args[0]  # type: ignore[assignment]
    numbers: Tensor | None = args[7]  # type: ignore[assignment]
    entries = 0 if numbers is None else numbers.shape[0]

    shapes = ((entries, 5), (entries, query.shape[2]), (query.shape[0], 3))
    return _fake(*args), *(query.new_empty(shape, dtype=torch.float32) for shape in shapes)


for _name, _impl, _meta in (
    ("negated_attention", _run, _fake),
    ("negated_attention_with_statistics", _run_with_statistics, _fake_with_statistics),
):
    _library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastnegate::{_name}", _meta, lib=_library)


def _flat(problem: Problem, backend: str) -> tuple[object, ...]:
    tokens = problem.concepts
    if tokens is None:
        packed: tuple[Tensor | None, ...] = (None,) * 9
        limits = [0, 0, 0, 0]
    else:
        packed = (
            tokens.key, tokens.value, tokens.index, tokens.numbers, tokens.token_bias,
            tokens.token_weight, tokens.direction, tokens.update, tokens.offset,
        )  # fmt: skip
        limits = [tokens.entries, tokens.concepts, tokens.longest, tokens.busiest]
    rule = problem.rule
    return (
        problem.query, problem.key, problem.value, problem.key_bias, *packed,
        limits, rule.codes, rule.numbers, problem.scale, backend,
    )  # fmt: skip


def run(problem: Problem, backend: str) -> Tensor:
    """Run the registered operator; the problem is valid and the backend supports it."""
    result: Tensor = torch.ops.fastnegate.negated_attention.default(*_flat(problem, backend))
    return result


def run_with_statistics(problem: Problem, backend: str) -> tuple[Tensor, Tables]:
    op = torch.ops.fastnegate.negated_attention_with_statistics.default
    output, *tables = op(*_flat(problem, backend))
    return output, Tables._make(tables)
