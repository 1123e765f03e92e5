# SPDX-License-Identifier: Apache-2.0
"""The definition of `negated_attention` as torch code: the oracle that every backend is judged by.

Differentiable, on any device, in float64 unless told otherwise, and slow: it loops over batch rows
and entries and reads `ConceptTokens.index` on the host.

Notation: Z is the attention to the prompt, F the attention to one concept's tokens (its own
softmax), r a similarity, g a gate, D the direction subtracted. Everything ends as
`O = a Z + sum_e b_e X_e` with scalars a and b_e per query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .mixing import (
    NO_NUDGE,
    Entry,
    Segment,
    attend,
    divide,
    dot,
    gate,
    keep_largest,
    mass_share,
    mix,
    near_jump,
    unknown,
)
from .mixing import (
    Nudge as Nudge,
)
from .plan import require, unknown_word
from .problem import Problem
from .rule import Rule
from .statistics import GATE_REPORT_LEVEL, Tables
from .tokens import NUMBERS, ConceptTokens

NAME = "reference"
WORDS = {
    "similarity": ("one", "cosine", "direction", "mass"),
    "gate": ("open", "step", "ramp", "sigmoid"),
    "direction": ("raw", "difference", "orthogonal", "projection", "fixed", "retrieve"),
    "combine": ("separate", "joint"),
    "select": ("all", "max"),
    "norm": ("none", "limit", "preserve"),
    "norm_order": (1, 2),
    "scope": ("head", "feature"),
}


class Evaluation(NamedTuple):
    """Result of `evaluate`: `output` [B, H, N, D], and for accuracy budgets `magnitude` [B, H, N] =
    max_d(|a||Z| + sum|b||X|) and `near_jump` [B, H, N]: a similarity or the two best gates lie within
    `Nudge.delta` of where the output jumps."""

    output: Tensor
    tables: Tables
    magnitude: Tensor
    near_jump: Tensor


def unavailable() -> str | None:
    """It needs nothing but torch."""
    return None


def supports(problem: Problem) -> str | None:
    """The reference computes everything but words that it does not know."""
    return unknown_word(WORDS, problem.rule)


@dataclass(frozen=True)
class ReferencePlan:
    rule: Rule
    scale: float
    statistics: bool
    backend: str = NAME

    def describe(self) -> str:
        return "float64, one batch row and entry after the other"

    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_bias: Tensor | None,
        concepts: ConceptTokens | None,
    ) -> tuple[Tensor, Tables | None]:
        problem = Problem(query, key, value, key_bias, concepts, self.rule, self.scale)
        result = evaluate(problem)
        output = result.output.to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2)
        return output, Tables._make(t.float() for t in result.tables) if self.statistics else None


def plan(problem: Problem, statistics: bool) -> ReferencePlan:
    """There is nothing to prepare: it exists so that backends are alike."""
    require(NAME, supports(problem))
    return ReferencePlan(problem.rule, problem.scale, statistics)


def run(problem: Problem) -> Tensor:
    """[B, H, N, D] in [B, N, H, D] memory, in the dtype of the query."""
    return plan(problem, False).run(*problem.operands)[0]


def run_with_statistics(problem: Problem) -> tuple[Tensor, Tables]:
    output, tables = plan(problem, True).run(*problem.operands)
    assert tables is not None
    return output, tables


def evaluate(problem: Problem, *, dtype: torch.dtype = torch.float64, nudge: Nudge = NO_NUDGE) -> Evaluation:
    """Evaluate the operator in `dtype`.

    With a 16-bit `dtype` this is the plain torch formula on the stored inputs: products in that
    dtype, softmax and scalars in float32, which is what an accuracy budget compares with.

    Raises:
        BackendError: the rule has a word that is not implemented.
    """
    require(NAME, supports(problem))
    with torch.autocast(problem.query.device.type, enabled=False):
        return _evaluate(problem, dtype, nudge)


def _evaluate(problem: Problem, dtype: torch.dtype, nudge: Nudge) -> Evaluation:
    batch, heads, queries, _, _ = problem.sizes
    tokens, rule = problem.concepts, problem.rule
    scalar = torch.promote_types(dtype, torch.float32)
    made: dict[str, Any] = {"dtype": scalar, "device": problem.query.device}
    entry_count = tokens.entries if tokens is not None else 0
    entry_table = torch.zeros(entry_count, 5, **made)
    heat = torch.zeros(entry_count, queries, **made)
    row_table = torch.zeros(batch, 3, **made)
    outputs, magnitudes, jumps = [], [], []
    for b in range(batch):
        q = problem.query[b].to(dtype)
        bias = None
        if problem.key_bias is not None:
            bias = problem.key_bias[min(b, problem.key_bias.shape[0] - 1)].to(scalar)
        prompt = attend(q, problem.key[b].to(dtype), problem.value[b].to(dtype), problem.scale, bias)
        z = prompt.output
        entries = []
        if tokens is not None:
            entries = [
                _measure(problem, tokens, e, q, prompt, dtype, nudge) for e in _existing(tokens, rule, b)
            ]
        near = torch.zeros(heads, queries, dtype=torch.bool, device=z.device)
        if not entries:
            output, magnitude, limited = z, z.abs(), torch.zeros(1, queries, **made)
        else:
            near = near | near_jump(rule, entries, nudge.delta)
            if rule.select == "max":
                keep_largest(entries, nudge.runner_up)
            elif rule.select != "all":
                raise unknown("select", rule.select)
            output, magnitude, limited = mix(rule, prompt, entries, scalar)
        for entry in entries if heads and queries else ():
            heat[entry.index] = entry.g.expand(heads, queries).mean(0).detach()
            entry_table[entry.index] = _entry_statistics(entry, prompt)
        row_table[b] = _row_statistics(output.detach(), z.detach(), limited, problem.query.dtype)
        outputs.append(output)
        magnitudes.append(magnitude.detach().amax(-1) if magnitude.shape[-1] else magnitude.sum(-1))
        jumps.append(near)
    tables = Tables(entry_table, heat, row_table)
    if not batch:
        none = problem.query.new_zeros(0, heads, queries)
        return Evaluation(problem.query.to(dtype), tables, none, none.bool())
    return Evaluation(torch.stack(outputs), tables, torch.stack(magnitudes), torch.stack(jumps))


def _existing(tokens: ConceptTokens, rule: Rule, b: int) -> list[tuple[int, int, int, int]]:
    """(entry, concept, begin, length) of the entries of row b that exist, indices clamped."""
    index = tokens.index.tolist()
    entries, concepts = tokens.entries, tokens.concepts
    rows = index[entries + 2 * concepts :]
    found: list[tuple[int, int, int, int]] = []
    if concepts == 0:
        return found
    for e in range(max(rows[b], 0), min(rows[b + 1], entries)):
        c = min(max(index[e], 0), concepts - 1)
        begin = min(max(index[entries + c], 0), tokens.tokens)
        length = min(max(index[entries + concepts + c], 0), tokens.longest, tokens.tokens - begin)
        present = length > 0
        if present and tokens.token_bias is not None:
            present = bool((tokens.token_bias[begin : begin + length] > -torch.inf).any())
        has_what_is_read = (present or not rule.reads.tokens) and (
            tokens.direction is not None or not rule.reads.direction
        )
        if has_what_is_read and float(tokens.active[e].detach()) > 0:
            found.append((e, c, begin, length))
    return found


def _entry_values(tokens: ConceptTokens, rule: Rule, e: int, scalar: torch.dtype) -> dict[str, Tensor]:
    """The numbers of entry e; NaN stands for the rule's default."""
    values: dict[str, Tensor] = {}
    for column, name in enumerate(NUMBERS):
        number = tokens.numbers[e, column].to(scalar)
        if name == "active":
            default = torch.ones_like(number)
        elif name == "width" and rule.width is None:
            default = 1 - values["threshold"]
        else:
            default = torch.full_like(number, getattr(rule, name))
        values[name] = torch.where(number.isnan(), default, number)
    return values


def _measure(
    problem: Problem,
    tokens: ConceptTokens,
    where: tuple[int, int, int, int],
    q: Tensor,
    prompt: Segment,
    dtype: torch.dtype,
    nudge: Nudge,
) -> Entry:
    """Feature, similarity, gate and direction coefficients of one entry."""
    rule, z = problem.rule, prompt.output
    e, c, begin, length = where
    span = slice(begin, begin + length)
    values = _entry_values(tokens, rule, e, z.dtype)
    zero = torch.zeros(1, 1, dtype=z.dtype, device=z.device)
    one = zero + 1

    segment, feature, f = None, z * 0, z * 0
    if rule.reads.tokens:
        k = tokens.key[span].transpose(0, 1).to(dtype)
        v = tokens.value[span].transpose(0, 1).to(dtype)
        bias = None if tokens.token_bias is None else tokens.token_bias[span].to(z.dtype)[None, None]
        weight = None if tokens.token_weight is None else tokens.token_weight[span]
        segment = attend(q, k, v, problem.scale, bias, weight)
        feature = f = segment.output
    along = zero
    if rule.reads.direction:
        assert tokens.direction is not None  # for the type checker: `_existing` has checked it
        offset = zero if tokens.offset is None else tokens.offset[c].to(z.dtype)
        along = dot(z, tokens.direction[c].to(z.dtype).unsqueeze(1), rule.scope) + offset

    zz, zf, ff = dot(z, z, rule.scope), dot(z, f, rule.scope), dot(f, f, rule.scope)
    if rule.similarity == "one":
        r = one
    elif rule.similarity == "cosine":
        r = divide(zf, zz.sqrt() * ff.sqrt())
    elif rule.similarity == "direction":
        r = along
    elif rule.similarity == "mass":
        r = mass_share(prompt, segment, values["logit_bias"])
        r = r if rule.scope == "head" else r.mean(0, keepdim=True)
    else:
        raise unknown("similarity", rule.similarity)

    x, zc = one, zero
    if rule.direction == "difference":
        zc = -one
    elif rule.direction == "orthogonal":
        zc = -divide(zf, zz)
    elif rule.direction == "projection":
        x = divide(zf, ff)
    elif rule.direction == "fixed":
        update = tokens.direction if tokens.update is None else tokens.update
        assert update is not None
        x, feature = along, update[c].to(z.dtype).unsqueeze(1).expand_as(z)
    elif rule.direction == "retrieve":
        inverse = problem.scale if rule.temperature is None else 1 / rule.temperature
        feature = attend(z.to(dtype), v, v, inverse, bias, weight).output
    elif rule.direction != "raw":
        raise unknown("direction", rule.direction)

    entry = Entry(e, c, values, segment, feature, x, zc, r)
    entry.g = values["active"] * torch.minimum(gate(rule, r, values, nudge), values["cap"])
    return entry


def _entry_statistics(entry: Entry, prompt: Segment) -> Tensor:
    g = entry.g
    share = mass_share(prompt, entry.segment, entry.numbers["logit_bias"])
    above = (g > GATE_REPORT_LEVEL).to(g.dtype)
    return torch.stack([g.max(), g.mean(), above.mean(), share.mean(), entry.r.max()]).detach()


def _row_statistics(output: Tensor, z: Tensor, limited: Tensor, stored: torch.dtype) -> Tensor:
    energy = divide((output - z).square().sum(), z.square().sum())
    share = limited.mean() if limited.numel() else limited.sum()
    nonfinite = (~output.to(stored).isfinite()).sum()
    return torch.stack([energy, share, nonfinite.to(z.dtype)])
