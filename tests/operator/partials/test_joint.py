# SPDX-License-Identifier: Apache-2.0
"""`partial_attention` and the operator together: what joint attention computes of all keys at once."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from partial_truth import EXACT, attention, exact
from support import CPU_BACKENDS, Judge, every_dtype, make_problem
from torch import Tensor

import fastnegate as fn
from fastnegate.operator.problem import Problem

pytestmark = pytest.mark.usefixtures("one_thread")
every_backend = pytest.mark.parametrize("backend", ["reference", *(["cpu"] if CPU_BACKENDS else [])])
JOINED = fn.Rule(name="joined")  # nobody reads it


def of_joint_model(
    rule: str, dtype: torch.dtype, concept: int
) -> tuple[Problem, Tensor, Tensor, Tensor, Tensor]:
    """An image that looks at itself, a prompt and one concept; and keys and values of image and concept."""
    p = make_problem(
        2, 2, 70, 12, 40, dtype, rule=rule, rows=[[0], [0]], concept_lengths=(concept,), extras=False
    )
    image = attention(2, 2, 70, 70, dtype=dtype, seed=1)
    key, value = (t.transpose(0, 1).expand(2, -1, -1, -1) for t in (p.concepts.key, p.concepts.value))
    return p, image.key, image.value, key, value


def negated(problem: Problem, backend: str, **partials: fn.Partial) -> Tensor:
    p = problem
    return fn.negated_attention(p.query, p.key, p.value, p.concepts, p.rule, backend=backend, **partials)


@every_dtype
@every_backend
@pytest.mark.parametrize("concept", [8, 30])
def test_inside_is_two_passes_over_all_keys(concept: int, backend: str, dtype: torch.dtype) -> None:
    p, key, value, concept_key, concept_value = of_joint_model("nag", dtype, concept)
    z, _ = exact(p.query, torch.cat([key, p.key], 2), torch.cat([value, p.value], 2), None, p.scale)
    f, _ = exact(
        p.query, torch.cat([key, concept_key], 2), torch.cat([value, concept_value], 2), None, p.scale
    )
    y = z + p.rule.strength * (z - f)
    ratio = y.abs().sum((1, 3), keepdim=True) / z.abs().sum((1, 3), keepdim=True)
    y = y * (p.rule.norm_limit / ratio).clamp(max=1)
    truth = p.rule.blend * y + (1 - p.rule.blend) * z
    shared = fn.partial_attention(p.query, key, value)
    judge = Judge(dataclasses.replace(p, shared=shared), truth=truth)
    judge.check(negated(p, backend, shared=shared), f"joint {backend}")


@every_dtype
@every_backend
def test_joint_is_one_softmax_over_all_keys(backend: str, dtype: torch.dtype) -> None:
    p, key, value, concept_key, concept_value = of_joint_model("vsf", dtype, 8)
    bias = torch.zeros(1, 1, 1, 70 + 12 + 8, dtype=EXACT)
    bias[..., -8:] = -p.rule.logit_bias
    flipped = -p.rule.strength * concept_value.to(EXACT)
    truth, _ = exact(
        p.query,
        torch.cat([key, p.key, concept_key], 2),
        torch.cat([value.to(EXACT), p.value.to(EXACT), flipped], 2),
        bias,
        p.scale,
    )
    shared = fn.partial_attention(p.query, key, value)
    judge = Judge(dataclasses.replace(p, shared=shared), truth=truth)
    judge.check(negated(p, backend, shared=shared), f"joint {backend}")


@every_dtype
@every_backend
@pytest.mark.parametrize("place", [0, 1, 13, 21])
def test_a_prompt_may_be_split_anywhere(place: int, backend: str, dtype: torch.dtype) -> None:
    """Keys before the place come as `shared`; those after it as keys, or as `prompt`."""
    p = dataclasses.replace(attention(queries=70, dtype=dtype), rule=JOINED)
    judge = Judge(p)
    first = fn.partial_attention(p.query, p.key[:, :, :place], p.value[:, :, :place])
    key, value = p.key[:, :, place:], p.value[:, :, place:]
    rest = dataclasses.replace(p, key=key, value=value)
    judge.check(negated(rest, backend, shared=first), f"split {backend}")
    second = fn.partial_attention(p.query, key, value)
    merged = fn.negated_attention(
        p.query, None, None, None, JOINED, shared=first, prompt=second, backend=backend
    )
    judge.check(merged, f"split {backend}")


@every_dtype
@every_backend
def test_partials_may_be_merged_in_any_order(backend: str, dtype: torch.dtype) -> None:
    p = dataclasses.replace(attention(queries=70, dtype=dtype), rule=JOINED)
    judge = Judge(p)
    cuts = [slice(0, 4), slice(4, 5), slice(5, 21)]
    parts = [fn.partial_attention(p.query, p.key[:, :, cut], p.value[:, :, cut]) for cut in cuts]

    def merge(first: fn.Partial, second: fn.Partial) -> fn.Partial:
        out = fn.negated_attention(
            p.query, None, None, None, JOINED, shared=first, prompt=second, backend=backend
        )
        return fn.Partial(out, torch.logaddexp(first.lse, second.lse))

    for a, b, c in itertools.permutations(parts):
        judge.check(merge(merge(a, b), c).out, f"merge {backend}")
        judge.check(merge(a, merge(b, c)).out, f"merge {backend}")


@every_backend
def test_an_empty_partial_is_as_if_it_were_not_there(backend: str) -> None:
    p = make_problem(rule="nag")
    empty = fn.partial_attention(p.query, p.key[:, :, :0], p.value[:, :, :0])
    assert torch.equal(negated(p, backend, shared=empty), negated(p, backend))
