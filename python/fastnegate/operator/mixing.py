# SPDX-License-Identifier: Apache-2.0
"""The mathematics of the reference, one batch row at a time: softmax segments, gates, the mix of what entries
remove, norms. Notation as in reference.py; tensors [H, N] unless they say otherwise."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .rule import Rule
from .statistics import GATE_REPORT_LEVEL
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
    x: Tensor  # D = x X + z Z + n F0
    z: Tensor
    n: Tensor
    r: Tensor
    share: Tensor  # of softmax mass against shared keys
    present: Tensor | None  # [., N], where there is a partial of it; None: everywhere
    g: Tensor = field(init=False)


@dataclass(frozen=True)
class Nudge:
    """Which side of a jump to take, for judging results next to one (see `Evaluation.near_jump`)."""

    threshold: float = 0.0
    runner_up: bool = False
    delta: float = 0.0  # how close counts as next to a jump


NO_NUDGE = Nudge()


def span_of(tokens: ConceptTokens, c: int) -> slice:
    """The tokens of a concept, clamped."""
    begin, length = tokens.index[tokens.entries + c :: tokens.concepts][:2].tolist()
    begin = min(max(begin, 0), tokens.tokens)
    return slice(begin, begin + min(max(length, 0), tokens.longest, tokens.tokens - begin))


class Text(NamedTuple):
    """Keys and values [H, T, D] of a concept, what is added to its logits, and what its values are multiplied
    by."""

    key: Tensor
    value: Tensor
    bias: Tensor | None
    weight: Tensor | None


def text_of(tokens: ConceptTokens, c: int, b: int, dtype: torch.dtype) -> Text:
    """The tokens of concept c, as row b reads them."""
    span, of_row = span_of(tokens, c), b if tokens.key.dim() == 4 else slice(None)
    key, value = (t[of_row][span].transpose(0, 1).to(dtype) for t in (tokens.key, tokens.value))
    bias, weight = (None if t is None else t[span] for t in (tokens.token_bias, tokens.token_weight))
    scalar = torch.promote_types(dtype, torch.float32)
    return Text(key, value, None if bias is None else bias.to(scalar)[None, None], weight)


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, weight: Tensor | None = None, *, scale: float
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
    probabilities = divide(weights, mass.unsqueeze(-1))
    if weight is not None:
        v = (v.to(scalar) * weight.to(scalar).unsqueeze(-1)).to(v.dtype)
    return Segment(top, mass, (probabilities.to(v.dtype) @ v).to(scalar))


def reduced(out: Tensor, lse: Tensor, scalar: torch.dtype) -> Segment:
    """The segment of a partial; what it holds where there are no keys is left alone."""
    empty = lse == -torch.inf
    output = out.to(scalar).masked_fill(empty.unsqueeze(-1), 0.0)
    return Segment(lse.to(scalar), (~empty).to(scalar), output)


def merge(first: Segment, second: Segment) -> Segment:
    """One softmax over the tokens of both. One that is empty changes no bit of the other."""
    top = torch.maximum(first.top, second.top).detach()
    finite = top.clamp(min=torch.finfo(top.dtype).min)
    mass = first.mass * (first.top - finite).exp() + second.mass * (second.top - finite).exp()
    return Segment(top, mass, merged(first, second, second.output))


def merged(first: Segment, second: Segment, output: Tensor) -> Tensor:
    """The output of the merge if `output` were that of the second; an empty first leaves it as it is."""
    none = first.top.new_zeros(())
    shares = mass_share(second, first, none), mass_share(first, second, none)
    mixed = shares[0].unsqueeze(-1) * first.output + shares[1].unsqueeze(-1) * output
    mixed = torch.where((second.mass == 0).unsqueeze(-1), first.output, mixed)
    return torch.where((first.mass == 0).unsqueeze(-1), output, mixed)


def gate(rule: Rule, r: Tensor, values: dict[str, Tensor], nudge: Nudge) -> Tensor:
    threshold, width = values["threshold"] + nudge.threshold, values["width"]
    if rule.gate == "open":
        psi = torch.ones_like(r)
    elif rule.gate == "step":
        psi = (r > threshold).to(r.dtype)
    elif rule.gate == "ramp":
        psi = divide(r - threshold, width.expand_as(r)).clamp(0, 1)
    elif rule.gate == "sigmoid":
        psi = torch.sigmoid(width * (r - threshold))
    else:
        raise unknown("gate", rule.gate)
    return torch.where(r.isnan(), r, psi)  # NaN has to show in the output


def keep_largest(entries: list[Entry], runner_up: bool) -> None:
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


def entry_values(tokens: ConceptTokens, rule: Rule, e: int, scalar: torch.dtype) -> dict[str, Tensor]:
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


class Mixed(NamedTuple):
    """What comes out, for one row."""

    output: Tensor  # [H, N, D]
    z: Tensor  # what it would have been without entries
    magnitude: Tensor  # |a||Z| + sum |b||X| + |b0||F0|
    limited: Tensor  # [., N], where the norm was limited


def mix(
    rule: Rule,
    prompt: Segment,
    entries: list[Entry],
    scalar: torch.dtype,
    around: Segment | None = None,
    neutral: Tensor | None = None,
) -> Mixed:
    """`a Z + sum b X + b0 F0`, with norm and blend. `around`: shared keys that are merged after the removal
    (`shared="outside"`), else None; `neutral`: F0 of a rule that centres."""
    z = prompt.output
    a = torch.ones(1, 1, dtype=scalar, device=z.device)
    b = []
    if rule.combine == "joint":
        prompt_share, shares = joint_shares(prompt, entries)
        a = prompt_share
        b = [-e.numbers["strength"] * share for e, share in zip(entries, shares)]
    elif rule.combine == "separate":
        for e in entries:
            pull = e.numbers["strength"] * e.g
            a = a - pull * e.z
            b.append(-pull * e.x)
    else:
        raise unknown("combine", rule.combine)
    features = [e.feature for e in entries]
    if neutral is not None:
        features.append(neutral)
        b.append(sum((-e.numbers["strength"] * e.g * e.n for e in entries), torch.zeros_like(a)))
    y = a.unsqueeze(-1) * z
    for feature, coefficient in zip(features, b):
        y = y + coefficient.unsqueeze(-1) * feature
    own = z
    if around is not None:
        y, z = merged(around, prompt, y), merged(around, prompt, z)
    factor, limited = norm_factor(rule, y, z)
    a = rule.blend * factor * a + (1 - rule.blend)
    output = rule.blend * factor.unsqueeze(-1) * y + (1 - rule.blend) * z
    magnitude = a.abs().unsqueeze(-1) * own.abs()
    for feature, coefficient in zip(features, b):
        magnitude = magnitude + (rule.blend * factor * coefficient).abs().unsqueeze(-1) * feature.abs()
    if around is not None:
        kept = (rule.blend * factor + 1 - rule.blend).abs().unsqueeze(-1)
        magnitude = merged(around._replace(output=kept * around.output.abs()), prompt, magnitude)
    if around is not None:  # without a prompt nothing is removed
        alone = ((prompt.mass == 0) & (around.mass > 0)).unsqueeze(-1)
        output = torch.where(alone, z, output)
    if all(e.present is not None for e in entries):
        some = torch.stack(torch.broadcast_tensors(*[e.present for e in entries])).any(0).unsqueeze(-1)
        output, magnitude = torch.where(some, output, z), torch.where(some, magnitude, z.abs())
    return Mixed(output, z, magnitude, limited)


def joint_shares(prompt: Segment, entries: list[Entry]) -> tuple[Tensor, list[Tensor]]:
    """Softmax shares of the prompt and of each entry, with logits L and L_e - logit_bias + log g."""

    def logit(top: Tensor, mass: Tensor) -> Tensor:
        none = mass == 0  # NaN is something, and shows
        return torch.where(none, -torch.inf, top + torch.where(none, 1.0, mass).log())

    logits = [logit(prompt.top, prompt.mass)]
    for e in entries:
        assert e.segment is not None
        logits.append(logit(e.segment.top - e.numbers["logit_bias"], e.segment.mass * e.g))
    stacked = torch.stack(torch.broadcast_tensors(*logits))
    top = stacked.detach().amax(0).clamp(min=torch.finfo(stacked.dtype).min)
    masses = (stacked - top).exp()
    total = masses.sum(0)
    shares = torch.where(total == 0, 0.0, masses / torch.where(total == 0, 1.0, total))
    return shares[0], list(shares[1:])


def norm_factor(rule: Rule, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    norm_z = norm(z, rule)
    if rule.norm == "none":
        return torch.ones_like(norm_z), torch.zeros_like(norm_z)
    ratio = divide(norm(y, rule), norm_z)
    if rule.norm == "limit":
        factor = divide(torch.full_like(ratio, rule.norm_limit), ratio).clamp(max=1)
        factor = torch.where(ratio > 0, factor, 1.0)
    elif rule.norm == "preserve":
        factor = divide(torch.ones_like(ratio), ratio)
    else:
        raise unknown("norm", rule.norm)
    factor = torch.where(norm_z < TINY, 1.0, factor)
    return factor, (ratio > rule.norm_limit).to(z.dtype) * (rule.norm == "limit")


def norm(x: Tensor, rule: Rule) -> Tensor:
    if rule.norm_order == 1:
        return over_scope(x.abs().sum(-1), rule.scope)
    if rule.norm_order == 2:
        return dot(x, x, rule.scope).sqrt()
    raise unknown("norm_order", rule.norm_order)


def dot(x: Tensor, y: Tensor, scope: str) -> Tensor:
    return over_scope((x * y).sum(-1), scope)


def over_scope(x: Tensor, scope: str) -> Tensor:
    """[H, N] for scope `head`, [1, N] summed over heads for `feature`."""
    if scope == "head":
        return x
    if scope == "feature":
        return x.sum(0, keepdim=True)
    raise unknown("scope", scope)


def divide(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(y < TINY, 0.0, x / torch.where(y < TINY, 1.0, y))


def mass_share(prompt: Segment, segment: Segment | None, logit_bias: Tensor) -> Tensor:
    """exp(L_e - beta) / (exp L + exp(L_e - beta)), [H, N]; of shared keys and a text the text's."""
    if segment is None:
        return torch.zeros_like(prompt.mass)
    top = segment.top - logit_bias
    highest = torch.maximum(prompt.top, top).clamp(min=torch.finfo(top.dtype).min)
    ours = segment.mass * (top - highest).exp()
    return divide(ours, ours + prompt.mass * (prompt.top - highest).exp())


def near_jump(rule: Rule, entries: list[Entry], delta: float) -> Tensor:
    """Where a step, a ramp steep enough to count as one, or the choice of `max` may tip; [., N]."""
    near = torch.zeros_like(entries[0].r, dtype=torch.bool)
    for e in entries:
        threshold, width = e.numbers["threshold"], e.numbers["width"]
        there = near | True if e.present is None else e.present
        if rule.gate == "step":
            near = near | (there & ((e.r - threshold).abs() <= delta))
        elif rule.gate == "ramp":
            inside = (e.r >= threshold - delta) & (e.r <= threshold + width + delta)
            near = near | (there & inside & (width < 16 * delta))
    if rule.select == "max" and len(entries) > 1:
        best = torch.stack(torch.broadcast_tensors(*[e.g for e in entries])).topk(2, dim=0).values
        near = near | ((best[0] > 0) & (best[0] - best[1] <= delta))
    return near


def entry_statistics(entry: Entry, prompt: Segment) -> Tensor:
    g = entry.g
    share = mass_share(prompt, entry.segment, entry.numbers["logit_bias"])
    above = (g > GATE_REPORT_LEVEL).to(g.dtype)
    numbers = g.max(), g.mean(), above.mean(), share.mean(), entry.r.max(), entry.share.mean()
    return torch.stack(numbers).detach()


def row_statistics(mixed: Mixed, share: Tensor, stored: torch.dtype) -> Tensor:
    output, z, limited = mixed.output.detach(), mixed.z.detach(), mixed.limited
    energy = divide((output - z).square().sum(), z.square().sum())
    nonfinite = (~output.to(stored).isfinite()).sum()
    means = (t.mean() if t.numel() else t.sum() for t in (limited, share.detach()))
    limited, share = means
    return torch.stack([energy, limited, nonfinite.to(z.dtype), share])


def unknown(word: str, value: object) -> NotImplementedError:
    """To be raised where a word is read and none of those known: never take a neighbour in silence."""
    return NotImplementedError(f"{word}={value!r} is not implemented")
