# SPDX-License-Identifier: Apache-2.0
"""The definition of `negated_attention` as torch code: the oracle that every backend is judged by.

Differentiable, on any device, in float64 unless told otherwise, and slow: it loops over batch rows
and entries and reads `ConceptTokens.index` on the host.

Notation: Z is the attention to the prompt, F the attention to one concept's tokens (its own
softmax), r a similarity, g a gate, D the direction subtracted. Everything ends as
`O = a Z + sum_e b_e X_e` with scalars a and b_e per query.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .problem import GATE_REPORT_LEVEL, Problem, Tables
from .rule import Rule
from .tokens import NUMBERS, ConceptTokens

TINY = 1e-30  # x / y means 0 where y < TINY; there is no other epsilon


class Segment(NamedTuple):
    """One softmax over its own tokens; top + log(mass) is its log-sum-exp. Tensors [H, N(, D)]."""

    top: Tensor
    mass: Tensor
    output: Tensor


@dataclass
class Entry:
    """One existing entry of a row: its numbers, features and, step by step, its coefficients."""

    index: int
    concept: int
    numbers: dict[str, Tensor]
    segment: Segment | None  # None: the rule reads no tokens, or there are none
    feature: Tensor  # X [H, N, D]
    x: Tensor  # D = x X + z Z
    z: Tensor
    r: Tensor
    g: Tensor = field(init=False)


@dataclass(frozen=True)
class Nudge:
    """Which side of a jump to take, for judging results next to one (see `Evaluation.near_jump`)."""

    threshold: float = 0.0
    runner_up: bool = False
    delta: float = 0.0  # how close counts as next to a jump


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
    """The reference computes everything."""
    return None


def run(problem: Problem) -> Tensor:
    """[B, H, N, D] as a view of [B, N, H, D] memory, in the dtype of the query."""
    return _as_stored(evaluate(problem).output, problem)


def run_with_statistics(problem: Problem) -> tuple[Tensor, Tables]:
    result = evaluate(problem)
    return _as_stored(result.output, problem), Tables._make(t.float() for t in result.tables)


def _as_stored(output: Tensor, problem: Problem) -> Tensor:
    return output.to(problem.query.dtype).transpose(1, 2).contiguous().transpose(1, 2)


def evaluate(problem: Problem, *, dtype: torch.dtype = torch.float64, nudge: Nudge = Nudge()) -> Evaluation:
    """Evaluate the operator in `dtype`.

    With a 16-bit `dtype` this is the plain torch formula on the stored inputs: products in that
    dtype, softmax and scalars in float32, which is what an accuracy budget compares with.
    """
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
        prompt = _segment(q, problem.key[b].to(dtype), problem.value[b].to(dtype), problem.scale, bias)
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
            near = near | _near_jump(rule, entries, nudge.delta)
            if rule.select == "max":
                _keep_largest(entries, nudge.runner_up)
            output, magnitude, limited = _mix(rule, prompt, entries, scalar)
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


def _segment(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, weight: Tensor | None = None
) -> Segment:
    """Softmax attention of q [H, N, D] to k, v [H, M, D] with additive bias [.., 1 or N, M]."""
    scalar = torch.promote_types(q.dtype, torch.float32)
    if bias is not None:
        # A token masked for every query is absent: even NaN in it must not reach the output.
        absent = (bias == -torch.inf).all(-2).unsqueeze(-1)
        k, v = k.masked_fill(absent, 0.0), v.masked_fill(absent, 0.0)
    scores = (q @ k.transpose(-1, -2)).to(scalar) * scale
    if bias is not None:
        scores = scores + bias
    if scores.shape[-1] == 0:
        zero = torch.zeros(scores.shape[:-1], dtype=scalar, device=q.device)
        return Segment(zero - torch.inf, zero, torch.zeros_like(q, dtype=scalar))
    top = scores.detach().amax(-1)
    weights = (scores - top.clamp(min=torch.finfo(scalar).min).unsqueeze(-1)).exp()
    mass = weights.sum(-1)
    probabilities = _divide(weights, mass.unsqueeze(-1))
    if weight is not None:
        v = (v.to(scalar) * weight.to(scalar).unsqueeze(-1)).to(v.dtype)
    return Segment(top, mass, (probabilities.to(v.dtype) @ v).to(scalar))


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
        has_what_is_read = (present or not rule.reads_tokens) and (
            tokens.direction is not None or not rule.reads_direction
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
    if rule.reads_tokens:
        k = tokens.key[span].transpose(0, 1).to(dtype)
        v = tokens.value[span].transpose(0, 1).to(dtype)
        bias = None if tokens.token_bias is None else tokens.token_bias[span].to(z.dtype)[None, None]
        weight = None if tokens.token_weight is None else tokens.token_weight[span]
        segment = _segment(q, k, v, problem.scale, bias, weight)
        feature = f = segment.output
    along = zero
    if rule.reads_direction:
        assert tokens.direction is not None  # for the type checker: `_existing` has checked it
        offset = zero if tokens.offset is None else tokens.offset[c].to(z.dtype)
        along = _dot(z, tokens.direction[c].to(z.dtype).unsqueeze(1), rule.scope) + offset

    zz, zf, ff = _dot(z, z, rule.scope), _dot(z, f, rule.scope), _dot(f, f, rule.scope)
    if rule.similarity == "one":
        r = one
    elif rule.similarity == "cosine":
        r = _divide(zf, zz.sqrt() * ff.sqrt())
    elif rule.similarity == "direction":
        r = along
    else:
        r = _mass(prompt, segment, values["logit_bias"])
        r = r if rule.scope == "head" else r.mean(0, keepdim=True)

    x, zc = one, zero
    if rule.direction == "difference":
        zc = -one
    elif rule.direction == "orthogonal":
        zc = -_divide(zf, zz)
    elif rule.direction == "projection":
        x = _divide(zf, ff)
    elif rule.direction == "fixed":
        update = tokens.direction if tokens.update is None else tokens.update
        assert update is not None
        x, feature = along, update[c].to(z.dtype).unsqueeze(1).expand_as(z)
    elif rule.direction == "retrieve":
        inverse = problem.scale if rule.temperature is None else 1 / rule.temperature
        feature = _segment(z.to(dtype), v, v, inverse, bias, weight).output

    entry = Entry(e, c, values, segment, feature, x, zc, r)
    entry.g = values["active"] * torch.minimum(_gate(rule, r, values, nudge), values["cap"])
    return entry


def _gate(rule: Rule, r: Tensor, values: dict[str, Tensor], nudge: Nudge) -> Tensor:
    threshold, width = values["threshold"] + nudge.threshold, values["width"]
    if rule.gate == "open":
        psi = torch.ones_like(r)
    elif rule.gate == "step":
        psi = (r > threshold).to(r.dtype)
    elif rule.gate == "ramp":
        psi = _divide(r - threshold, width.expand_as(r)).clamp(0, 1)
    else:
        psi = torch.sigmoid(width * (r - threshold))
    return torch.where(r.isnan(), r, psi)  # NaN has to show in the output


def _keep_largest(entries: list[Entry], runner_up: bool) -> None:
    """`select="max"`: zero every gate but the largest, which a NaN is; ties: larger r, lower concept, lower
    entry."""
    order = sorted(range(len(entries)), key=lambda i: (entries[i].concept, entries[i].index))
    g = torch.stack(torch.broadcast_tensors(*[entries[i].g for i in order]))
    r = torch.stack(torch.broadcast_tensors(*[entries[i].r for i in order]))
    largest = torch.where(g.isnan(), torch.inf, g)
    chosen = torch.where(largest == largest.amax(0), r, -torch.inf).argmax(0)  # of numbers and NaN it is NaN
    if runner_up and len(entries) > 1:
        rest = g.scatter(0, chosen.unsqueeze(0), -1.0)
        chosen = torch.where(rest == rest.amax(0), r, -torch.inf).argmax(0)
    for place, i in enumerate(order):
        entries[i].g = torch.where(chosen == place, g[place], 0.0)


def _mix(
    rule: Rule, prompt: Segment, entries: list[Entry], scalar: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [H, N, D], its magnitude |a||Z| + sum |b||X|, and where the norm was limited [., N]."""
    z = prompt.output
    a = torch.ones(1, 1, dtype=scalar, device=z.device)
    b = []
    if rule.combine == "joint":
        prompt_share, shares = _joint_shares(prompt, entries)
        a = prompt_share
        b = [-e.numbers["strength"] * share for e, share in zip(entries, shares)]
    else:
        for e in entries:
            pull = e.numbers["strength"] * e.g
            a = a - pull * e.z
            b.append(-pull * e.x)
    y = a.unsqueeze(-1) * z
    for e, coefficient in zip(entries, b):
        y = y + coefficient.unsqueeze(-1) * e.feature
    factor, limited = _norm_factor(rule, y, z)
    a = rule.blend * factor * a + (1 - rule.blend)
    output = rule.blend * factor.unsqueeze(-1) * y + (1 - rule.blend) * z
    magnitude = a.abs().unsqueeze(-1) * z.abs()
    for e, coefficient in zip(entries, b):
        magnitude = magnitude + (rule.blend * factor * coefficient).abs().unsqueeze(-1) * e.feature.abs()
    return output, magnitude, limited


def _joint_shares(prompt: Segment, entries: list[Entry]) -> tuple[Tensor, list[Tensor]]:
    """Softmax shares of the prompt and of each entry, with logits L and L_e - logit_bias + log g."""

    def logit(top: Tensor, mass: Tensor) -> Tensor:
        some = mass > 0
        return torch.where(some, top + torch.where(some, mass, 1.0).log(), -torch.inf)

    logits = [logit(prompt.top, prompt.mass)]
    for e in entries:
        assert e.segment is not None
        logits.append(logit(e.segment.top - e.numbers["logit_bias"], e.segment.mass * e.g))
    stacked = torch.stack(torch.broadcast_tensors(*logits))
    top = stacked.detach().amax(0).clamp(min=torch.finfo(stacked.dtype).min)
    masses = (stacked - top).exp()
    total = masses.sum(0)
    shares = torch.where(total > 0, masses / torch.where(total > 0, total, 1.0), 0.0)
    return shares[0], list(shares[1:])


def _norm_factor(rule: Rule, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    norm_z = _norm(z, rule)
    if rule.norm == "none":
        return torch.ones_like(norm_z), torch.zeros_like(norm_z)
    ratio = _divide(_norm(y, rule), norm_z)
    if rule.norm == "limit":
        factor = _divide(torch.full_like(ratio, rule.norm_limit), ratio).clamp(max=1)
        factor = torch.where(ratio > 0, factor, 1.0)
    else:
        factor = _divide(torch.ones_like(ratio), ratio)
    factor = torch.where(norm_z < TINY, 1.0, factor)
    return factor, (ratio > rule.norm_limit).to(z.dtype) * (rule.norm == "limit")


def _norm(x: Tensor, rule: Rule) -> Tensor:
    if rule.norm_order == 1:
        return _over_scope(x.abs().sum(-1), rule.scope)
    return _dot(x, x, rule.scope).sqrt()


def _dot(x: Tensor, y: Tensor, scope: str) -> Tensor:
    return _over_scope((x * y).sum(-1), scope)


def _over_scope(x: Tensor, scope: str) -> Tensor:
    """[H, N] for scope `head`, [1, N] summed over heads for `feature`."""
    return x if scope == "head" else x.sum(0, keepdim=True)


def _divide(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(y < TINY, 0.0, x / torch.where(y < TINY, 1.0, y))


def _mass(prompt: Segment, segment: Segment | None, logit_bias: Tensor) -> Tensor:
    """exp(L_e - beta) / (exp L + exp(L_e - beta)), [H, N]."""
    if segment is None:
        return torch.zeros_like(prompt.mass)
    top = segment.top - logit_bias
    highest = torch.maximum(prompt.top, top).clamp(min=torch.finfo(top.dtype).min)
    ours = segment.mass * (top - highest).exp()
    return _divide(ours, ours + prompt.mass * (prompt.top - highest).exp())


def _near_jump(rule: Rule, entries: list[Entry], delta: float) -> Tensor:
    """Where a step, a ramp steep enough to count as one, or the choice of `max` may tip; [., N]."""
    near = torch.zeros_like(entries[0].r, dtype=torch.bool)
    for e in entries:
        threshold, width = e.numbers["threshold"], e.numbers["width"]
        if rule.gate == "step":
            near = near | ((e.r - threshold).abs() <= delta)
        elif rule.gate == "ramp":
            inside = (e.r >= threshold - delta) & (e.r <= threshold + width + delta)
            near = near | (inside & (width < 16 * delta))
    if rule.select == "max" and len(entries) > 1:
        best = torch.stack(torch.broadcast_tensors(*[e.g for e in entries])).topk(2, dim=0).values
        near = near | ((best[0] > 0) & (best[0] - best[1] <= delta))
    return near


def _entry_statistics(entry: Entry, prompt: Segment) -> Tensor:
    g = entry.g
    mass = _mass(prompt, entry.segment, entry.numbers["logit_bias"])
    above = (g > GATE_REPORT_LEVEL).to(g.dtype)
    return torch.stack([g.max(), g.mean(), above.mean(), mass.mean(), entry.r.max()]).detach()


def _row_statistics(output: Tensor, z: Tensor, limited: Tensor, stored: torch.dtype) -> Tensor:
    energy = _divide((output - z).square().sum(), z.square().sum())
    share = limited.mean() if limited.numel() else limited.sum()
    nonfinite = (~output.to(stored).isfinite()).sum()
    return torch.stack([energy, share, nonfinite.to(z.dtype)])
