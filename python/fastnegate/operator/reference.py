# SPDX-License-Identifier: Apache-2.0
"""The definition of `negated_attention` as torch code: the oracle that every backend is judged by.

Differentiable, on any device, in float64 unless told otherwise, and slow: it loops over batch rows
and entries and reads `ConceptTokens.index` on the host.

Notation: Z is the attention to the prompt, F the attention to one concept's tokens (its own
softmax), r a similarity, g a gate, D the direction subtracted. Everything ends as
`O = a Z + sum_e b_e X_e + b0 F0` with scalars a, b_e and b0 per query, where F0, the attention to the row's
neutral tokens, is there for a rule that centres.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .mixing import (
    NO_NUDGE,
    Entry,
    Mixed,
    Segment,
    attend,
    divide,
    dot,
    entry_statistics,
    entry_values,
    gate,
    keep_largest,
    mass_share,
    merge,
    mix,
    near_jump,
    over_scope,
    reduced,
    row_statistics,
    span_of,
    text_of,
    unknown,
)
from .mixing import (
    Nudge as Nudge,
)
from .plan import require, unknown_word
from .problem import Partial, Problem, Slots
from .rule import Rule
from .statistics import Tables
from .tokens import ConceptTokens

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
    "shared": ("inside", "joint", "outside"),
    "center": ("none", "neutral"),
}


class Evaluation(NamedTuple):
    """Result of `evaluate`: `output` [B, H, N, D], and for accuracy budgets `magnitude` [B, H, N] =
    max_d(|a||Z| + sum|b||X| + |b0||F0|) and `near_jump` [B, H, N]: a similarity or the two best gates lie
    within `Nudge.delta` of where the output jumps."""

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
        shared: Partial | None = None,
        prompt: Partial | None = None,
        slots: Slots | None = None,
    ) -> tuple[Tensor, Tables | None]:
        problem = Problem(query, key, value, key_bias, concepts, self.rule, self.scale, shared, prompt, slots)
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


def partial(query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None, scale: float) -> Partial:
    """Attention to some keys, in the dtype of the query; both have gradients, also in rows without keys."""
    exact = torch.promote_types(query.dtype, torch.float32)
    bias = None if key_bias is None else key_bias.to(exact)
    top, mass, output = attend(query, key, value, bias, scale=scale)
    none = mass == 0  # NaN is something, and shows
    lse = torch.where(none, -torch.inf, top + torch.where(none, 1.0, mass).log())
    return Partial(output.to(query.dtype), lse)


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
    tables = Tables.zeros(problem.entries, batch, queries, problem.query.device)
    tables = Tables._make(table.to(scalar) for table in tables)
    existing = [[] if tokens is None else _existing(problem, tokens, b) for b in range(batch)]
    neutral = [_neutral(problem, tokens, b) if existing[b] and tokens else None for b in range(batch)]
    outputs, magnitudes, jumps = [], [], []
    for b in range(batch):
        q = problem.query[b].to(dtype)
        text = _prompt(problem, b, q, dtype)
        shared = _reduced(problem.shared, b, scalar)
        if rule.shared not in WORDS["shared"]:
            raise unknown("shared", rule.shared)
        around = shared if rule.shared == "outside" and existing[b] else None
        prompt = text if shared is None or around is not None else merge(shared, text)
        seen = _Row(problem, b, q, prompt, shared, None, dtype, nudge)
        if tokens is not None and (c := neutral[b]) is not None:
            seen = seen._replace(neutral=_feature(seen, _attended(seen, tokens, c)))
        entries = [_measure(seen, tokens, e, c) for e, c in existing[b] if tokens is not None]
        near = torch.zeros(heads, queries, dtype=torch.bool, device=q.device)
        z = prompt.output
        mixed = Mixed(z, z, z.abs(), z.new_zeros(1, queries))
        if entries:
            near = near | near_jump(rule, entries, nudge.delta)
            if rule.select == "max":
                keep_largest(entries, nudge.runner_up)
            elif rule.select != "all":
                raise unknown("select", rule.select)
            mixed = mix(rule, prompt, entries, scalar, around, seen.neutral)
        for entry in entries if heads and queries else ():
            seen_at = entry.share if rule.similarity == "one" and shared is not None else 1.0
            tables.heat[entry.index] = (entry.g * seen_at).expand(heads, queries).mean(0).detach()
            tables.entries[entry.index] = entry_statistics(entry, prompt)
        share = z.new_zeros(heads, queries) if shared is None else mass_share(shared, text, z.new_zeros(()))
        tables.rows[b] = row_statistics(mixed, share, problem.query.dtype)
        magnitude = mixed.magnitude.detach()
        outputs.append(mixed.output)
        magnitudes.append(magnitude.amax(-1) if magnitude.shape[-1] else magnitude.sum(-1))
        jumps.append(near)
    if not batch:
        none = problem.query.new_zeros(0, heads, queries)
        return Evaluation(problem.query.to(dtype), tables, none, none.bool())
    return Evaluation(torch.stack(outputs), tables, torch.stack(magnitudes), torch.stack(jumps))


def _prompt(problem: Problem, b: int, q: Tensor, dtype: torch.dtype) -> Segment:
    """The prompt of row b alone, without shared keys."""
    scalar = torch.promote_types(dtype, torch.float32)
    if (reduced_ := _reduced(problem.prompt, b, scalar)) is not None:
        return reduced_
    bias = None
    if problem.key_bias is not None:
        bias = problem.key_bias[min(b, problem.key_bias.shape[0] - 1)].to(scalar)
    return attend(q, problem.key[b].to(dtype), problem.value[b].to(dtype), bias, scale=problem.scale)


def _reduced(partial: Partial | None, b: int, scalar: torch.dtype) -> Segment | None:
    return None if partial is None else reduced(partial.out[b], partial.lse[b], scalar)


def _existing(problem: Problem, tokens: ConceptTokens, b: int) -> list[tuple[int, int]]:
    """(entry, concept) of the entries of row b that exist, indices clamped."""
    reads = problem.rule.reads
    index = tokens.index.tolist()
    entries, concepts = tokens.entries, tokens.concepts
    rows = index[entries + 2 * concepts :]
    found: list[tuple[int, int]] = []
    if concepts == 0:
        return found
    for e in range(max(rows[b], 0), min(rows[b + 1], entries)):
        c = min(max(index[e], 0), concepts - 1)
        has_what_is_read = (_has_tokens(problem, tokens, b, c) or not (reads.tokens or problem.slots)) and (
            tokens.direction is not None or not reads.direction
        )
        if has_what_is_read and not float(tokens.active[e].detach()) <= 0:  # NaN: 1
            found.append((e, c))
    return found


def _neutral(problem: Problem, tokens: ConceptTokens, b: int) -> int | None:
    """The neutral concept of row b, which has entries; None for a rule that does not centre.

    Raises:
        ValueError: the rule centres, and there is none.
    """
    rule = problem.rule
    if rule.center == "none":
        return None
    if rule.center != "neutral":
        raise unknown("center", rule.center)
    c = -1 if tokens.neutral is None else int(tokens.neutral[b])
    if not 0 <= c < tokens.concepts or not _has_tokens(problem, tokens, b, c):
        raise ValueError(f"center='neutral': row {b} of concepts has entries and no neutral tokens")
    return c


def _has_tokens(problem: Problem, tokens: ConceptTokens, b: int, c: int) -> bool:
    """Whether some token of a concept is not masked, or some query of row b has the partial of it."""
    if problem.slots:
        return bool((problem.slots[c].lse[b] != -torch.inf).any())
    span, bias = span_of(tokens, c), tokens.token_bias
    return span.stop > span.start and (bias is None or bool((bias[span] > -torch.inf).any()))


class _Row(NamedTuple):
    """What entries of one row are measured against."""

    problem: Problem
    b: int
    q: Tensor
    prompt: Segment  # with what the rule puts into Z
    shared: Segment | None
    neutral: Tensor | None  # F0, of a rule that centres
    dtype: torch.dtype
    nudge: Nudge


def _attended(row: _Row, tokens: ConceptTokens, c: int) -> Segment:
    """The softmax of a concept's own tokens."""
    if row.problem.slots:
        slot = row.problem.slots[c]
        return reduced(slot.out[row.b], slot.lse[row.b], row.prompt.output.dtype)
    return attend(row.q, *text_of(tokens, c, row.b, row.dtype), scale=row.problem.scale)


def _feature(row: _Row, segment: Segment) -> Tensor:
    """F of a concept: with the shared keys, where the rule puts them into it."""
    inside = row.shared is not None and row.problem.rule.shared == "inside"
    return merge(row.shared, segment).output if inside and row.shared is not None else segment.output


def _measure(row: _Row, tokens: ConceptTokens, e: int, c: int) -> Entry:
    """Feature, similarity, gate and direction coefficients of one entry."""
    problem, b, _, prompt, shared, neutral, dtype, nudge = row
    rule, z = problem.rule, prompt.output
    values = entry_values(tokens, rule, e, z.dtype)
    zero = torch.zeros(1, 1, dtype=z.dtype, device=z.device)
    one = zero + 1

    segment, feature, share, present = None, z * 0, zero, None
    if problem.slots:
        present = over_scope(_attended(row, tokens, c).mass, rule.scope) > 0
    if rule.reads.tokens:
        segment = _attended(row, tokens, c)
        feature = _feature(row, segment)
        share = zero if shared is None else mass_share(shared, segment, zero)
    f = feature
    if neutral is not None:
        z, f = z - neutral, f - neutral
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

    x, zc = one, zero  # D = x X + zc Z, each centred where it is of Z or F
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
        _, value, *rest = text_of(tokens, c, b, dtype)
        feature = attend(z.to(dtype), value, value, *rest, scale=inverse).output
    elif rule.direction != "raw":
        raise unknown("direction", rule.direction)

    n = -zc if rule.direction == "fixed" else -(x + zc)  # u' is not centred
    entry = Entry(e, c, values, segment, feature, x, zc, n, r, share, present)
    entry.g = values["active"] * torch.minimum(gate(rule, r, values, nudge), values["cap"])
    if present is not None:
        entry.g, entry.r = torch.where(present, entry.g, 0.0), torch.where(present, r, 0.0)
    return entry
