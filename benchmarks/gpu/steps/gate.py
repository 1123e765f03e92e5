# SPDX-License-Identifier: Apache-2.0
"""Whether a backend computes the definition on this card: forty problems against references that were made
before, then what the definition promises besides numbers. tests/gpu goes further; this takes seconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastnegate import negated_attention, negated_attention_with_statistics
from fastnegate.operator.backends import load, unavailable
from fastnegate.operator.problem import Problem, Statistics
from fastnegate.testing import Judge, make_problem, moved

from ..card import Card
from ..carried import load as carried
from ..step import Item, Setting

REPEATS = 20  # of a call that must not change a bit
PROMISED = ("protore", "nag")  # one launch; sums over heads between launches
Operator = Callable[[Problem], Tensor]


def items(setting: Setting) -> Iterator[Item]:
    backend = setting.card.backends[setting.part]
    for name, judge in carried(setting.carried).gate.items():
        yield Item(name, partial(_judged, judge, backend, setting.card))
    for rule in PROMISED:
        for promise in (graph, repeated, busy_stream, other_rows, masked, without_entries):
            name = f"{promise.__name__.replace('_', ' ')}, {rule}"
            yield Item(name, partial(_kept, promise, rule, backend, setting.card))


def operator(problem: Problem, backend: str, function: Callable[..., Any] = negated_attention) -> Any:
    p = problem
    return function(
        p.query, p.key, p.value, p.concepts, p.rule, scale=p.scale, key_bias=p.key_bias, backend=backend
    )


def _judged(judge: Judge, backend: str, card: Card) -> dict[str, Any]:
    """The share of the accuracy budget that was used."""
    if (reason := unavailable(backend)) is not None:
        return {"failed": reason}
    problem = moved(judge.problem, card.device)
    if (reason := load(backend).supports(problem)) is not None:
        return {"refused": reason}
    poison(problem.query)
    used = judge.check(operator(problem, backend).cpu())
    poison(problem.query)
    output, tables = operator(problem, backend, negated_attention_with_statistics)
    judge.check(output.cpu())
    judge.check_statistics(Statistics._make(t.cpu() for t in tables))
    return {"used": used}


def poison(like: Tensor) -> None:
    """Leave NaN in the memory that tensors up to this size are given next: what is not written shows."""
    held = [torch.full(like.shape, torch.nan, dtype=like.dtype, device=like.device) for _ in range(8)]
    held.clear()  # a call with statistics takes memory for these first


# ---- promises ---------------------------------------------------------------------------------


def promised(rule: str, mask: bool = False) -> Problem:
    """What the promises are tried with; the masks of `masked` make it another kernel."""
    problem = make_problem(
        3, 2, 130, 77, 64, torch.bfloat16, rule=rule, rows=[[0, 1, 2], [], [2]], layout="bnhd", seed=1,
        concept_lengths=(8, 8, 8),
    )  # fmt: skip
    if not mask:
        return problem
    bias = torch.zeros(3, 1, 1, 77)
    bias[..., 60:] = -torch.inf
    return dataclasses.replace(problem, key_bias=bias)


def _kept(promise: Callable[..., None], rule: str, backend: str, card: Card) -> dict[str, Any]:
    problem = moved(promised(rule, mask=promise is masked), card.device)
    promise(problem, partial(operator, backend=backend), card)
    return {"kept": True}


def graph(problem: Problem, call: Operator, card: Card) -> None:
    """A captured call gives the bits of an eager one, also after query and strengths changed in place."""
    outputs: list[Tensor] = []
    eager = call(problem)
    replay = card.captured([lambda: outputs.append(call(problem))])
    replay()
    same(outputs[-1], eager, "replayed")
    assert problem.concepts is not None
    problem.query.mul_(0.5)
    problem.concepts.numbers[:, 0] = 0.25
    changed = call(problem)
    replay()
    same(outputs[-1], changed, "replayed after a change")
    assert not torch.equal(changed, eager), "the change changed nothing"


def repeated(problem: Problem, call: Operator, card: Card) -> None:
    first = call(problem)
    for _ in range(REPEATS):
        same(call(problem), first, "again")


def busy_stream(problem: Problem, call: Operator, card: Card) -> None:
    """On a side stream it waits for what is on that stream, not for the default one."""
    expected, query = call(problem), problem.query.clone()
    problem.query.zero_()
    outputs: list[Tensor] = []

    def late() -> None:
        problem.query.copy_(query)
        outputs.append(call(problem))

    card.on_a_busy_stream(late, warm=lambda: call(problem))
    same(outputs[-1], expected, "on a side stream")


def other_rows(problem: Problem, call: Operator, card: Card) -> None:
    """NaN in another row of the batch does not reach this one, nor does its absence."""
    expected = call(problem)
    for tensor in (problem.query, problem.key, problem.value):
        tensor[1:] = torch.nan
    same(call(problem)[:1], expected[:1], "beside rows of NaN")


def masked(problem: Problem, call: Operator, card: Card) -> None:
    """NaN in masked keys and tokens does not reach the output."""
    concepts = problem.concepts
    assert concepts is not None and concepts.token_bias is not None
    expected = call(problem)
    gone = concepts.token_bias == -torch.inf
    assert gone.any()
    for tensor in (problem.key, problem.value):
        tensor[:, :, 60:] = torch.nan
    for tensor in (concepts.key, concepts.value):
        tensor[gone] = torch.nan
    same(call(problem), expected, "with NaN in masked keys")


def without_entries(problem: Problem, call: Operator, card: Card) -> None:
    """A row that negates nothing has the bits of plain attention."""
    plain = call(dataclasses.replace(problem, concepts=None))
    same(call(problem)[1], plain[1], "of a row without entries")
    assert not torch.equal(call(problem)[0], plain[0]), "the negation changed nothing"


def same(actual: Tensor, expected: Tensor, what: str) -> None:
    """Raises AssertionError unless the bits are equal and finite."""
    assert expected.isfinite().all(), f"{what}: not finite"
    different = (actual != expected).sum().item()
    assert different == 0, f"{what}: {different} of {expected.numel()} numbers differ"
