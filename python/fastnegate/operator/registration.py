# SPDX-License-Identifier: Apache-2.0
"""torch.library registration: flat functional schemas and fakes, for compilers, export and whoever else must
see the operator. Other eager calls do not come here.

Exported programs hold the schema: a new argument goes to the end and has a default. `define` + `impl` instead
of `custom_op`, which costs about twice as much per call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks
from .backends import NAMES, load
from .plan import Plan, planned
from .problem import Partial, Problem, Slots
from .rule import Rule
from .statistics import Tables
from .tokens import CAPACITIES, TENSORS, ConceptTokens

# The prompt, the concepts in the order of `tokens.TENSORS`, and `limits` in that of `tokens.CAPACITIES`.
_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? key_bias, Tensor? concept_key, "
    "Tensor? concept_value, Tensor? index, Tensor? numbers, Tensor? token_bias, "
    "Tensor? token_weight, Tensor? direction, Tensor? update, Tensor? offset, "
    "int[] limits, int[] rule, float[] rule_numbers, float scale, str backend, "
    "Tensor? shared_out=None, Tensor? shared_lse=None, Tensor? prompt_out=None, Tensor? prompt_lse=None, "
    "Tensor[]? slots=None, Tensor? neutral=None"
)
_BACKEND = 17  # its place
_LATER = 6  # arguments behind it, which have defaults

_library = torch.library.Library("fastnegate", "DEF")
_library.define(f"negated_attention({_ARGUMENTS}) -> Tensor")
_library.define(f"negated_attention_with_statistics({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)")


def flat(problem: Problem, backend: str) -> tuple[Any, ...]:
    """The arguments of the registered operators."""
    tokens, rule = problem.concepts, problem.rule
    packed: tuple[Tensor | None, ...] = (None,) * len(TENSORS)
    limits = [0] * len(CAPACITIES)
    if tokens is not None:
        packed, limits = tokens.tensors, list(tokens.capacities)
    return (
        problem.query, problem.key, problem.value, problem.key_bias, *packed,
        limits, list(rule.codes), list(rule.numbers), problem.scale, backend,
        *(problem.shared or (None, None)), *(problem.prompt or (None, None)),
        # torch resolves lazily negated tensors, but not in a list that may be None.
        None if problem.slots is None else [t.resolve_neg() for slot in problem.slots for t in slot],
        None if tokens is None else tokens.neutral,
    )  # fmt: skip


def from_flat(*arguments: Any) -> Problem:
    """The inverse of `flat`, but for the backend.

    Raises:
        ValueError: a code of the rule stands for no word, or there are too few capacities.
    """
    query, key, value, key_bias, *packed, limits, codes, numbers, scale, _ = arguments[: _BACKEND + 1]
    later = (*arguments[_BACKEND + 1 :], *(None,) * _LATER)[:_LATER]  # a call may leave them out
    shared, prompt, slots = _partials(*later[:-1])
    concepts = None
    if packed[0] is not None:
        if len(limits) != len(CAPACITIES):
            raise ValueError(f"limits={limits}: must be {', '.join(CAPACITIES)}")
        packed_as = dict(zip(TENSORS, packed)) | dict(zip(CAPACITIES, limits))
        concepts = ConceptTokens(**packed_as, neutral=later[-1])
    rule = Rule.from_flat(codes, numbers)
    return Problem(query, key, value, key_bias, concepts, rule, scale, shared, prompt, slots)


def _partials(
    shared_out: Tensor | None = None,
    shared_lse: Tensor | None = None,
    prompt_out: Tensor | None = None,
    prompt_lse: Tensor | None = None,
    slots: list[Tensor] | None = None,
) -> tuple[Partial | None, Partial | None, Slots | None]:
    made = []
    for name, out, lse in (("shared", shared_out, shared_lse), ("prompt", prompt_out, prompt_lse)):
        if (out is None) is not (lse is None):
            raise ValueError(f"{name}_out and {name}_lse go together: both or neither")
        made.append(None if out is None or lse is None else Partial(out, lse))
    if slots is None:
        return made[0], made[1], None
    if len(slots) % 2:
        raise ValueError(f"slots has {len(slots)} tensors: must be out and lse of each")
    return made[0], made[1], tuple(map(Partial, slots[::2], slots[1::2]))


def run(problem: Problem, backend: str, statistics: bool) -> tuple[Tensor, Tables | None]:
    """Run the registered operator; the problem is valid and the backend supports it."""
    if not statistics:
        return torch.ops.fastnegate.negated_attention.default(*flat(problem, backend)), None
    operator = torch.ops.fastnegate.negated_attention_with_statistics.default
    output, *tables = operator(*flat(problem, backend))
    return output, Tables._make(tables)


def _planned(arguments: tuple[Any, ...], statistics: bool) -> tuple[Tensor, Tables | None]:
    problem, backend = from_flat(*arguments), arguments[_BACKEND]
    if backend not in NAMES:
        raise ValueError(f"backend={backend!r}: allowed are {', '.join(NAMES)}")

    def make(problem: Problem, statistics: bool) -> Plan:
        checks.check(problem)
        return load(backend).plan(problem, statistics)

    return planned(backend, problem, statistics, make).run(*problem.operands)


def _run(*arguments: Any) -> Tensor:
    return _planned(arguments, False)[0]


def _run_with_statistics(*arguments: Any) -> tuple[Tensor, ...]:
    output, tables = _planned(arguments, True)
    assert tables is not None
    return output, *tables


def _fake(query: Tensor, *_: Any) -> Tensor:
    batch, heads, queries, dim = query.shape
    return query.new_empty(batch, queries, heads, dim).transpose(1, 2)


def _fake_with_statistics(*arguments: Any) -> tuple[Tensor, ...]:
    query: Tensor = arguments[0]
    numbers: Tensor | None = arguments[4 + TENSORS.index("numbers")]
    entries = 0 if numbers is None else numbers.shape[0]
    shapes = Tables.shapes(entries, query.shape[0], query.shape[2])
    return _fake(query), *(query.new_empty(shape, dtype=torch.float32) for shape in shapes)


for _name, _impl, _meta in (
    ("negated_attention", _run, _fake),
    ("negated_attention_with_statistics", _run_with_statistics, _fake_with_statistics),
):
    _library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastnegate::{_name}", _meta, lib=_library)
