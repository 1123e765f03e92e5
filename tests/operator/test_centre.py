# SPDX-License-Identifier: Apache-2.0
"""Centring (docs/semantics.md, section 11): the reference against the literal form and that of moments, what
it promises, how it is carried, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import logging
import pickle
from typing import Any

import pytest
import torch
from support import CPU_BACKENDS, Judge, make_problem, plain, with_concepts, with_rule
from torch import Tensor

import fastnegate as fn
from fastnegate.operator import choice, reference
from fastnegate.operator import registration as ops
from fastnegate.operator.problem import Problem
from fastnegate.operator.rule import COMBINES, DIRECTIONS, SHARED, SIMILARITIES, Rule
from fastnegate.testing import moved, with_partials

RULES = {
    rule.name: rule
    for rule in (
        Rule.preset("protore", center="neutral", threshold=0.2),
        Rule.preset("nasa", center="neutral"),
        Rule.preset("ong", center="neutral"),
        Rule.preset("casteer", center="neutral"),
        Rule("cosine", "ramp", "difference", norm="limit", norm_order=1, norm_limit=1.5, blend=0.5,
             center="neutral", name="difference"),
        Rule("mass", "sigmoid", "orthogonal", norm="preserve", scope="feature", center="neutral",
             name="mass"),
        Rule("direction", "sigmoid", "raw", shared="outside", blend=0.75, center="neutral", name="along"),
    )
}  # fmt: skip
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
needs_cpu = pytest.mark.skipif(not CPU_BACKENDS, reason="the CPU kernel is not part of this install")


def centred(rule: Rule, **changes: Any) -> Problem:
    """Of float32, whose last concept is neutral."""
    return make_problem(rule=rule, **{"rows": [[0, 2], [], [1]], **changes})


# ---- the definition, literally ----------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output [H, N, D] and log-sum-exp [H, N]."""
    logits = q @ k.mT * scale + bias
    return logits.softmax(-1).nan_to_num(0.0) @ v, logits.logsumexp(-1)


def merged(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """One softmax over both."""
    lse = torch.logaddexp(first[1], second[1])
    shares = ((lse_ - lse).exp().nan_to_num(0.0).unsqueeze(-1) for _, lse_ in (first, second))
    return sum(share * out for share, (out, _) in zip(shares, (first, second))), lse


def dot(x: Tensor, y: Tensor, rule: Rule) -> Tensor:
    """<x, y> [H or 1, N, 1]."""
    found = (x * y).sum(-1, keepdim=True)
    return found if rule.scope == "head" else found.sum(0, keepdim=True)


def norm(x: Tensor, rule: Rule) -> Tensor:
    return dot(x, x, rule).sqrt() if rule.norm_order == 2 else dot(x, x.sign(), rule)


class Row:
    """Row b of a problem in float64: Z, F0 and, by entry, F, with what the rule has in them."""

    def __init__(self, p: Problem, b: int) -> None:
        self.p, self.rule, self.b, tokens = p, p.rule, b, p.concepts
        index = tokens.index.tolist()
        offsets = index[-p.sizes[0] - 1 :]
        self.entries = [(e, index[e]) for e in range(offsets[b], offsets[b + 1])]
        self.shared = None if p.shared is None else (p.shared.out[b].double(), p.shared.lse[b].double())
        if self.shared is not None:  # what it holds where there are no keys is not read
            self.shared = (
                self.shared[0].masked_fill(self.shared[1].isneginf()[..., None], 0.0),
                self.shared[1],
            )
        self.prompt = attend(
            p.query[b].double(), p.key[b].double(), p.value[b].double(), torch.zeros(()), p.scale
        )
        self.inside = self.shared is not None and self.rule.shared == "inside"
        self.z, self.lse = merged(self.shared, self.prompt) if self.inside else self.prompt
        self.f0 = self.concept(int(tokens.neutral[b]))[0]

    def concept(self, c: int) -> tuple[Tensor, Tensor]:
        """F, and the log-sum-exp of its own tokens."""
        t = self.p.concepts
        index = t.index.tolist()
        begin, length = index[t.entries + c], index[t.entries + t.concepts + c]
        span = slice(begin, begin + length)
        k, v = (x[span].double().transpose(0, 1) for x in (t.key, t.value))
        weight = torch.ones(length) if t.token_weight is None else t.token_weight[span]
        bias = torch.zeros(length) if t.token_bias is None else t.token_bias[span]
        own = attend(
            self.p.query[self.b].double(), k, v * weight[:, None].double(), bias.double(), self.p.scale
        )
        return (merged(self.shared, own) if self.inside else own)[0], own[1]

    def number(self, e: int, name: str) -> float:
        given = float(getattr(self.p.concepts, name)[e])
        default = {"active": 1.0, "width": self.rule.width or 0.0}.get(name, getattr(self.rule, name, 0.0))
        if name == "width" and self.rule.width is None:
            default = 1 - self.number(e, "threshold")
        return default if given != given else given

    def gate(self, e: int, r: Tensor) -> Tensor:
        threshold, width = self.number(e, "threshold"), self.number(e, "width")
        psi = {
            "open": torch.ones_like(r),
            "step": (r > threshold).double(),
            "ramp": ((r - threshold) / width).clamp(0, 1),
            "sigmoid": (width * (r - threshold)).sigmoid(),
        }[self.rule.gate]
        return self.number(e, "active") * psi.clamp(max=self.number(e, "cap"))

    def mass(self, e: int, lse: Tensor) -> Tensor:
        share = (lse - self.number(e, "logit_bias") - self.lse).sigmoid().unsqueeze(-1)
        return share if self.rule.scope == "head" else share.mean(0, keepdim=True)

    def vectors(self, c: int) -> tuple[Tensor, Tensor, float]:
        """u, u' [H, 1, D] and c0."""
        t = self.p.concepts
        u = t.direction[c].double().unsqueeze(1)
        update = u if t.update is None else t.update[c].double().unsqueeze(1)
        return u, update, 0.0 if t.offset is None else float(t.offset[c])

    def finished(self, y: Tensor) -> Tensor:
        """Norm and blend, of Y and Z and not of Z'."""
        rule, z = self.rule, self.z
        if self.shared is not None and rule.shared == "outside":
            y, z = (merged(self.shared, (x, self.lse))[0] for x in (y, z))
        ratio = norm(y, rule) / norm(z, rule)
        factor = {
            "none": torch.ones_like(ratio),
            "limit": (rule.norm_limit / ratio).clamp(max=1),
            "preserve": 1 / ratio,
        }[rule.norm]
        return rule.blend * factor * y + (1 - rule.blend) * z


def literal(row: Row) -> Tensor:
    """`Y = Z - sum strength g D(Z', F')` with Z' = Z - F0 and F' = F - F0, as it is written."""
    rule, z = row.rule, row.z - row.f0
    removed = []
    for e, c in row.entries:
        f, lse = row.concept(c)
        f = f - row.f0
        u, update, offset = row.vectors(c)
        along = dot(z, u, rule) + offset
        r = {
            "one": torch.ones_like(along),
            "cosine": dot(z, f, rule) / (norm_2(z, rule) * norm_2(f, rule)),
            "direction": along,
            "mass": row.mass(e, lse),
        }[rule.similarity]
        direction = {
            "raw": f,
            "difference": f - z,
            "orthogonal": f - dot(f, z, rule) / dot(z, z, rule) * z,
            "projection": dot(z, f, rule) / dot(f, f, rule) * f,
            "fixed": along * update,
        }[rule.direction]
        removed.append((row.gate(e, r), row.number(e, "strength") * direction))
    if rule.select == "max" and removed:
        largest = torch.stack([g for g, _ in removed]).amax(0)
        removed = [(torch.where(g == largest, g, 0.0), direction) for g, direction in removed]
    return row.finished(row.z - sum(g * direction for g, direction in removed))


def norm_2(x: Tensor, rule: Rule) -> Tensor:
    return dot(x, x, rule).sqrt()


def of_moments(row: Row) -> Tensor:
    """`O = a Z + sum b X + b0 F0`: r, g and the coefficients from inner products of Z, F and F0 alone, as a
    kernel has them."""
    rule, z, f0 = row.rule, row.z, row.f0
    a, b0, y, gates = 1.0, 0.0, 0.0, []
    z0, n0 = dot(z, f0, rule), dot(f0, f0, rule)
    for e, c in row.entries:
        f, lse = row.concept(c)
        u, update, offset = row.vectors(c)
        zz = dot(z, z, rule) - 2 * z0 + n0
        zf = dot(z, f, rule) - z0 - dot(f, f0, rule) + n0
        ff = dot(f, f, rule) - 2 * dot(f, f0, rule) + n0
        along = dot(z, u, rule) - dot(f0, u, rule) + offset
        r = {
            "one": torch.ones_like(zf),
            "cosine": zf / (zz * ff).sqrt(),
            "direction": along,
            "mass": row.mass(e, lse),
        }[rule.similarity]
        of_z, of_f, of_u = {
            "raw": (0.0, 1.0, 0.0),
            "difference": (-1.0, 1.0, 0.0),
            "orthogonal": (-zf / zz, 1.0, 0.0),
            "projection": (0.0, zf / ff, 0.0),
            "fixed": (0.0, 0.0, along),
        }[rule.direction]
        gates.append(row.gate(e, r))
        pull = row.number(e, "strength") * gates[-1]
        if rule.select == "max" and len(row.entries) > 1:
            others = [of for of in row.entries if of[0] != e]
            pull = pull * (gates[-1] > max_gate(row, others))
        a, b0 = a - pull * of_z, b0 + pull * (of_z + of_f)
        y = y - pull * (of_f * f + of_u * update)
    return row.finished(a * z + y + b0 * f0)


def max_gate(row: Row, entries: list[tuple[int, int]]) -> Tensor:
    """The largest gate of some entries of a rule with similarity cosine."""
    z, found = row.z - row.f0, []
    for e, c in entries:
        f = row.concept(c)[0] - row.f0
        r = dot(z, f, row.rule) / (norm_2(z, row.rule) * norm_2(f, row.rule))
        found.append(row.gate(e, r))
    return torch.stack(found).amax(0)


@every_rule
@pytest.mark.parametrize("form", (literal, of_moments))
@pytest.mark.parametrize("shared", (None, "inside", "outside"))
def test_the_reference_is_the_literal_form_and_that_of_moments(
    rule: Rule, form: Any, shared: str | None
) -> None:
    problem = centred(rule, rows="mixed")
    if shared is not None:
        problem = with_partials(with_rule(problem, shared=shared), "shared")
    tokens = problem.concepts
    lives = [b for b in range(3) if Row(problem, b).entries]
    truth = reference.evaluate(problem).output.clone()
    for b in lives:
        truth[b] = form(Row(problem, b))
    assert len(lives) == 2 and tokens.neutral.tolist() == [3, 3, 3]
    judge = Judge(problem, truth=truth, leave_near=True)
    judge.check(reference.run(problem), f"reference-{form.__name__}")
    uncentred = reference.run(with_rule(problem, center="none"))
    assert judge.verdict(uncentred).wrong  # centring is something else


# ---- what it promises -------------------------------------------------------------------------------


@every_rule
def test_a_neutral_of_zeros_changes_nothing(rule: Rule) -> None:
    problem = centred(rule)
    value = problem.concepts.value.clone()
    value[-4:] = 0.0
    nothing = with_concepts(problem, value=value)
    assert torch.equal(reference.run(nothing), reference.run(with_rule(nothing, center="none")))
    assert not torch.equal(reference.run(problem), reference.run(with_rule(problem, center="none")))


@pytest.mark.parametrize("direction", [d for d in DIRECTIONS if d != "retrieve"])
@pytest.mark.parametrize("similarity", ("cosine", "direction"))
def test_what_all_values_share_is_not_seen(similarity: str, direction: str) -> None:
    """A constant that is added to every value moves the output by itself and changes nothing else."""
    rule = Rule(similarity, "sigmoid", direction, width=2.0, center="neutral")
    problem = centred(rule)
    tokens = with_concepts(problem, token_weight=None).concepts

    def on_a_grid(values: Tensor) -> Tensor:  # where sums have no rounding
        return (values * 256).round() / 256

    problem = dataclasses.replace(
        problem,
        value=on_a_grid(problem.value),
        concepts=dataclasses.replace(tokens, value=on_a_grid(tokens.value)),
    )
    constant = on_a_grid(4 * torch.randn(2, 40, generator=torch.Generator().manual_seed(0)))
    shifted = dataclasses.replace(
        with_concepts(problem, value=problem.concepts.value + constant),
        value=problem.value + constant.unsqueeze(1),
    )
    truth = reference.evaluate(problem).output + constant.unsqueeze(1).double()
    judge = Judge(shifted, truth=truth)
    judge.check(reference.run(shifted))
    if similarity == "cosine":
        assert judge.verdict(reference.run(with_rule(shifted, center="none"))).wrong


@pytest.mark.parametrize("direction", ("raw", "orthogonal", "projection"))
@pytest.mark.parametrize("shared", (None, "inside", "outside"))
def test_a_neutral_concept_is_not_removed(direction: str, shared: str | None) -> None:
    problem = centred(Rule("cosine", "open", direction, shared=shared, strength=3.0, center="neutral"))
    problem = with_concepts(problem, neutral=torch.tensor([0, -1, 1], dtype=torch.int32))
    problem = with_concepts(problem, index=problem.concepts.index.clone())
    problem.concepts.index[:3] = torch.tensor([0, 0, 1])
    if shared is not None:
        problem = with_partials(problem, "shared")
    Judge(problem, truth=reference.evaluate(plain(problem)).output).check(reference.run(problem))


@every_rule
def test_a_row_without_entries_is_plain_attention(rule: Rule) -> None:
    problem = centred(rule, rows=[[0, 2], [], [{"concept": 1, "active": 0.0}]])
    for some in (problem, with_partials(problem, "shared")):
        output, expected = reference.run(some), reference.run(plain(some))
        assert torch.equal(output[1:], expected[1:]) and not torch.equal(output[0], expected[0])
        anything = torch.tensor([3, -7, 99], dtype=torch.int32)  # is not looked at there
        assert torch.equal(reference.run(with_concepts(some, neutral=anything)), output)


@every_rule
def test_the_order_of_entries_and_of_neutral_tokens_only_rounds(rule: Rule) -> None:
    problem = centred(rule, rows=[[0, 1, 2], [1, 2], [2, 0]])
    judge = Judge(problem)
    judge.check(reference.run(centred(rule, rows=[[2, 1, 0], [2, 1], [0, 2]])))
    tokens, order = problem.concepts, torch.tensor([*range(23), 25, 23, 26, 24])
    names = ("key", "value", "token_bias", "token_weight")
    judge.check(
        reference.run(with_concepts(problem, **{name: getattr(tokens, name)[order] for name in names}))
    )


def test_the_neutral_concept_is_measured_like_any_other() -> None:
    """With biases and weights of its tokens; one that is masked is absent, NaN included. Its place among the
    concepts is of no matter, nor whether a row has tokens of its own."""
    problem = centred(Rule(center="neutral"))
    tokens, before = problem.concepts, reference.run(problem)
    for name in ("token_bias", "token_weight"):
        changed = getattr(tokens, name).clone()
        changed[-1] += 1.0
        assert not torch.equal(reference.run(with_concepts(problem, **{name: changed})), before)
    masked, value = tokens.token_bias.clone(), tokens.value.clone()
    masked[-1], value[-1] = -torch.inf, torch.nan
    shorter = tokens.index.clone()
    shorter[tokens.entries + 2 * tokens.concepts - 1] = 3
    absent = reference.run(with_concepts(problem, index=shorter))
    assert torch.equal(reference.run(with_concepts(problem, token_bias=masked, value=value)), absent)

    first = fn.ConceptTokens.pack(
        *([t[23:], t[:8], t[8:11], t[11:23]] for t in (tokens.key, tokens.value)),
        [[1, 3], [], [2]],
        token_bias=torch.cat([tokens.token_bias[23:], tokens.token_bias[:23]]),
        token_weight=torch.cat([tokens.token_weight[23:], tokens.token_weight[:23]]),
        neutral=[0, None, 0],
    )
    assert torch.equal(reference.run(dataclasses.replace(problem, concepts=first)), before)
    own = fn.ConceptTokens.from_activations(tokens.key.expand(3, -1, -1, -1), tokens.value, tokens)
    own = dataclasses.replace(own, value=tokens.value.expand(3, -1, -1, -1))
    assert torch.equal(reference.run(dataclasses.replace(problem, concepts=own)), before)


def test_copies_of_a_concept_are_one() -> None:
    rule = RULES["protore[center=neutral]"]
    once, twice = (centred(rule, rows=[[0] * n, [], []], concept_lengths=(8,), extras=False) for n in (1, 2))
    assert torch.equal(reference.run(once), reference.run(twice))


def test_all_segments_may_be_partials() -> None:
    problem = with_partials(centred(RULES["protore[center=neutral]"], rows="same", extras=False), "combine")
    zeros = fn.Partial(torch.zeros_like(problem.slots[0].out), torch.zeros_like(problem.slots[0].lse))
    nothing = dataclasses.replace(problem, slots=(*problem.slots[:3], zeros))
    uncentred = reference.run(with_rule(nothing, center="none"))
    assert torch.equal(reference.run(nothing), uncentred)
    assert not torch.equal(reference.run(problem), uncentred)


def test_a_common_part_opens_every_gate_unless_it_is_taken_out() -> None:
    """What the word is for: the prompt shows another concept, and all values share one large vector."""
    problem = centred(Rule.preset("protore", center="neutral"), rows=[[0], [0], [0]], extras=False)
    common = 12 * torch.nn.functional.normalize(
        torch.randn(2, 40, generator=torch.Generator().manual_seed(1)), dim=-1
    )
    problem = dataclasses.replace(
        with_concepts(problem, value=problem.concepts.value + common),
        value=problem.value + common.unsqueeze(1),
    )
    groups = torch.arange(37) % 4

    def gates(rule: Rule) -> Tensor:
        heat = reference.run_with_statistics(dataclasses.replace(problem, rule=rule))[1].named.heat.mean(0)
        return torch.stack([heat[groups == group].mean() for group in range(4)])

    uncentred, taken_out = gates(Rule.preset("protore")), gates(problem.rule)
    assert uncentred.min() > 0.5  # open for queries that look at anything
    assert taken_out[0] > 0.2 and taken_out[1:].max() < 0.05


def test_statistics_are_of_what_was_measured() -> None:
    problem = centred(RULES["protore[center=neutral]"], rows=[[0], [], [2]], extras=False)
    output, tables = reference.run_with_statistics(problem)
    found = tables.named
    assert found.gate_max.shape == (2,) and torch.equal(
        output, reference.run(problem)
    )  # none of the neutral one
    row = Row(problem, 0)
    z, f = row.z - row.f0, row.concept(0)[0] - row.f0
    largest = (dot(z, f, problem.rule) / (norm_2(z, problem.rule) * norm_2(f, problem.rule))).max()
    assert found.similarity_max[0] == largest.float()
    z = row.z
    assert found.removed_energy[0] == pytest.approx(
        float((literal(row) - z).square().sum() / z.square().sum()), rel=1e-6
    )
    assert found.removed_energy[1] == 0


def test_gradients_go_through_the_neutral_tokens() -> None:
    small = {"batch": 1, "heads": 1, "queries": 2, "keys": 3, "dim": 4, "concept_lengths": (2, 1)}
    problem = centred(Rule("cosine", "sigmoid", "projection", center="neutral"), rows=[[0, 1]], **small)
    tokens = problem.concepts.cast(torch.float64)
    query, key, value = (t.double() for t in (problem.query, problem.key, problem.value))

    def output(query: Tensor, concept_value: Tensor) -> Tensor:
        replaced = dataclasses.replace(tokens, value=concept_value)
        return fn.negated_attention(query, key, value, replaced, problem.rule)

    asked = query.requires_grad_(), tokens.value.clone().requires_grad_()
    assert torch.autograd.gradcheck(output, asked)
    (grad,) = torch.autograd.grad(output(*asked).square().sum(), asked[1])
    assert grad[-4:].abs().sum() > 0


# ---- how it is carried ------------------------------------------------------------------------------


def test_tokens_carry_it() -> None:
    tokens = centred(Rule(center="neutral")).concepts
    assert tokens.neutral.dtype == torch.int32 and tokens.neutral.tolist() == [3, 3, 3]
    assert (
        tokens.first_rows(2).neutral.tolist() == [3, 3]
        and tokens.cast(torch.float16).neutral is tokens.neutral
    )
    for copied in (copy.deepcopy(tokens), pickle.loads(pickle.dumps(tokens)), moved(tokens, "cpu")):
        assert copied.neutral is not tokens.neutral and torch.equal(copied.neutral, tokens.neutral)
    parts = [tokens.key[:8], tokens.key[8:11], tokens.key[23:]]
    uniform = fn.ConceptTokens.uniform(parts, parts, 2, neutral=1)
    assert uniform.index[:4].tolist() == [0, 2, 0, 2] and uniform.neutral.tolist() == [1, 1]
    assert fn.ConceptTokens.uniform(parts, parts, 2).neutral is None


def test_other_rules_do_not_read_it() -> None:
    problem = with_rule(centred(RULES["protore[center=neutral]"]), center="none")
    without = with_concepts(problem, neutral=None)
    assert torch.equal(reference.run(problem), reference.run(without))


@pytest.mark.parametrize("name", ("negated_attention", "negated_attention_with_statistics"))
def test_opcheck(name: str) -> None:
    problem = centred(RULES["protore[center=neutral]"], queries=5, dim=16)
    torch.library.opcheck(getattr(torch.ops.fastnegate, name).default, ops.flat(problem, "reference"))


def test_programs_from_before_there_was_the_word_still_run() -> None:
    problem = make_problem(rows="same")
    arguments = [*ops.flat(problem, "reference")]
    arguments[14] = arguments[14][:-1]  # codes of the rule
    operator = torch.ops.fastnegate.negated_attention.default
    assert torch.equal(operator(*arguments[:-1]), reference.run(problem))
    assert torch.equal(operator(*arguments[:18]), reference.run(problem))


class Layer(torch.nn.Module):
    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.problem = problem

    def forward(self, query: Tensor) -> Tensor:
        p = self.problem
        return fn.negated_attention(query, p.key, p.value, p.concepts, p.rule)


def test_export_and_compile_keep_it() -> None:
    problem = centred(RULES["protore[center=neutral]"], queries=5, dim=16)
    layer, expected = Layer(problem), reference.run(problem)
    program = torch.export.export(layer, (problem.query,))
    assert torch.equal(program.module()(problem.query), expected)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(problem.query), expected)
    problem.concepts.neutral.fill_(0)  # contents may change in place
    assert torch.equal(compiled(problem.query), reference.run(problem))
    assert not torch.equal(compiled(problem.query), expected)


# ---- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_words_that_leave_nothing_to_centre(
    similarity: str, direction: str, combine: str, shared: str
) -> None:
    words = {"similarity": similarity, "direction": direction, "combine": combine, "shared": shared}
    try:
        Rule(**words)
    except ValueError:
        return
    cancels = direction == "difference" and similarity in ("one", "mass")
    if combine == "separate" and direction != "retrieve" and not cancels:
        assert Rule(**words, center="neutral").center == "neutral"
        return
    named = {"joint": "combine", "separate": "direction"}[combine]
    with pytest.raises(ValueError, match=f"center='neutral': means nothing with {named}='"):
        Rule(**words, center="neutral")


def test_words_and_names() -> None:
    with pytest.raises(ValueError, match="center='middle': allowed are none, neutral"):
        Rule(center="middle")
    rule = Rule.preset("protore", center="neutral", threshold=0.3)
    assert rule.name == "protore[center=neutral]" and rule.threshold == 0.3
    assert Rule.preset("protore", center="none") == Rule.preset("protore")
    assert Rule.from_flat(rule.codes, rule.numbers).center == "neutral"


def call(problem: Problem, **changes: Any) -> Tensor:
    p = dataclasses.replace(problem, **changes)
    return fn.negated_attention(p.query, p.key, p.value, p.concepts, p.rule, scale=p.scale)


def test_a_call_without_neutral_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = centred(RULES["protore[center=neutral]"])
    monkeypatch.setattr(reference, "evaluate", None)  # it is refused before any work
    without = with_concepts(problem, neutral=None)
    with pytest.raises(ValueError, match=r"center='neutral'.*no neutral tokens; ConceptTokens.pack"):
        call(without)
    slot = fn.Partial(problem.query, torch.zeros(problem.query.shape[:3]))
    with pytest.raises(ValueError, match=r"center='neutral'.*combine takes none"):
        fn.combine(None, slot, [slot], problem.rule)
    for neutral, said in (
        (problem.concepts.neutral.long(), "neutral has dtype torch.int64: must be torch.int32"),
        (problem.concepts.neutral[:2], r"neutral has shape \[2\]: must be \[3\]"),
    ):
        with pytest.raises(ValueError, match=said):
            call(with_concepts(problem, neutral=neutral))


@pytest.mark.parametrize(
    ("neutral", "said"),
    [
        ([0, None, None], r"neutral of rows\[2\] is None: must be the index of a concept that has tokens"),
        (3, r"neutral of rows\[0\] is 3"),
        (-1, r"neutral of rows\[0\] is -1"),
        (1, r"neutral of rows\[0\] is 1"),  # has no tokens
        (True, r"neutral of rows\[0\] is True"),
        ([0, 0], "neutral has 2 rows, rows has 3"),
    ],
)
def test_neutrals_that_are_none(neutral: Any, said: str) -> None:
    parts = [torch.ones(n, 2, 8) for n in (2, 0, 1)]
    with pytest.raises(ValueError, match=said):
        fn.ConceptTokens.pack(parts, parts, [[0], [], [2]], neutral=neutral)
    assert fn.ConceptTokens.pack(parts, parts, [[0], [], [2]], neutral=[2, None, 0]).neutral.tolist() == [
        2,
        -1,
        0,
    ]


@every_rule
def test_a_row_whose_neutral_tokens_are_not_there(rule: Rule) -> None:
    """Tensors may hold what `pack` would not have made."""
    problem = centred(rule)
    masked = problem.concepts.token_bias.clone()
    masked[-4:] = -torch.inf
    none = torch.tensor([3, 3, -1], dtype=torch.int32)
    for wrong in ({"neutral": none}, {"neutral": none + 5}, {"token_bias": masked}):
        with pytest.raises(
            ValueError, match=r"center='neutral': row [02] of concepts has entries and no neutral"
        ):
            call(with_concepts(problem, **wrong))


@needs_cpu
def test_fused_backends_refuse_the_word_and_auto_takes_the_reference(
    caplog: pytest.LogCaptureFixture,
) -> None:
    problem = centred(RULES["protore[center=neutral]"])
    arguments = problem.query, problem.key, problem.value, problem.concepts, problem.rule
    with pytest.raises(fn.BackendError, match="center='neutral' is not implemented"):
        fn.negated_attention(*arguments, backend="cpu")
    assert "cpu: center='neutral' is not implemented" in fn.explain(*arguments)
    choice.log_once.cache_clear()
    with caplog.at_level(logging.WARNING, "fastnegate"):
        outputs = [fn.negated_attention(*arguments) for _ in range(2)]
    assert torch.equal(*outputs) and torch.equal(outputs[0], reference.run(problem))
    (said,) = caplog.messages
    assert "slow reference" in said and "center='neutral' is not implemented" in said
