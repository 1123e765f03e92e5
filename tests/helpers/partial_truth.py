# SPDX-License-Identifier: Apache-2.0
"""What the tests of `partial_attention` share: problems, and one judge of `out` and `lse`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastnegate import Partial, Rule
from fastnegate.operator.problem import Problem
from fastnegate.testing import Judge, eps, make_problem

EXACT = torch.float64


def attention(
    batch: int = 2, heads: int = 2, queries: int = 37, keys: int = 21, **options: object
) -> Problem:
    """Plain attention, whose rule nobody reads."""
    options = {"dim": 40, "rule": Rule(name="plain"), "rows": "none", **options}
    return make_problem(batch, heads, queries, keys, **options)


def exact(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp in float64; empty rows 0 and -inf."""
    logits = q.to(EXACT) @ k.to(EXACT).mT * scale
    if bias is not None:
        logits = logits + bias.to(EXACT)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp()
    return weights @ v.to(EXACT), lse


def check(problem: Problem, partial: Partial, label: str = "") -> None:
    """The accuracy budget: `out` is judged as what it is, attention. An error of `lse` is a relative error of
    its mass in a merge. What section 8 of the definition grants small problems is granted here, relative to
    the largest logit before anything cancels; in 16 bit also a quarter of eps, which is what it grants the
    mean: products are of stored numbers, so nothing but the kernel's own exponentials may add to it.
    """
    p, dtype = problem, problem.query.dtype
    _, truth = exact(p.query, p.key, p.value, p.key_bias, p.scale)
    assert partial.lse.dtype == torch.promote_types(dtype, torch.float32)
    assert partial.lse.shape == truth.shape and partial.lse.device == p.query.device
    assert torch.equal(partial.lse == -torch.inf, truth == -torch.inf)
    some = truth > -torch.inf
    if dtype == EXACT:  # has no budget: that of float32, in its own eps
        judge = Judge(p)
        allowed = 8 * eps(EXACT)
        assert partial.out.dtype == EXACT
        assert judge.errors(partial.out)[some].max().item() <= allowed
    else:
        Judge(p).check(partial.out, label)
        allowed = 8 * eps(torch.float32)
    room = allowed * _logit(p).clamp(min=1.0)
    if dtype in (torch.float16, torch.bfloat16):
        room = room + eps(dtype) / 4
    assert ((partial.lse - truth).abs() <= room)[some].all()


def _logit(p: Problem) -> Tensor:
    """The largest sum of magnitudes that makes a logit of each row, [B, H, N]."""
    if not p.key.shape[2]:
        return torch.zeros(p.query.shape[:3], dtype=EXACT)
    sums = p.query.to(EXACT).abs() @ p.key.to(EXACT).abs().mT * p.scale
    if p.key_bias is not None:
        sums = sums + torch.where(p.key_bias.isfinite(), p.key_bias.abs(), 0.0)
    return sums.amax(-1)
