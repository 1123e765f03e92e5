# SPDX-License-Identifier: Apache-2.0
"""What every backend promises for every rule it supports; numbered as in the definition."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from support import (
    DTYPES,
    RULES,
    Judge,
    eps,
    every_backend,
    every_dtype,
    every_rule,
    make_problem,
    plain,
    run,
    run_with_statistics,
    with_concepts,
    with_rule,
)
from torch import Tensor

import fastnegate as fn
from fastnegate.operator import reference
from fastnegate.operator.problem import Problem
from fastnegate.operator.rule import GATES, SELECTS, Rule

pytestmark = pytest.mark.usefixtures("one_thread")


def only(**words: str) -> pytest.MarkDecorator:
    """Parametrize over the rules that have one of the given words (`norm="none limit"`)."""
    rules = [r for r in RULES.values() if all(getattr(r, k) in v.split() for k, v in words.items())]
    assert rules
    return pytest.mark.parametrize("rule", rules, ids=lambda rule: rule.name)


def rows_of(problem: Problem) -> list[list[int]]:
    """The entries of every batch row."""
    offsets = problem.concepts.index[-problem.sizes[0] - 1 :].tolist()
    return [list(range(begin, end)) for begin, end in itertools.pairwise(offsets)]


def norm(x: Tensor, rule: Rule) -> Tensor:
    """[B, H or 1, N]: the norm over the rule's scope, in float64."""
    powers = (x.double().abs() ** rule.norm_order).sum(-1)
    powers = powers if rule.scope == "head" else powers.sum(1, keepdim=True)
    return powers ** (1 / rule.norm_order)


# ---- 1, 2: doing nothing -------------------------------------------------------------------------


@every_dtype
@every_rule
@every_backend
def test_01_no_existing_entry_is_plain_attention(backend: str, rule: Rule, dtype: torch.dtype) -> None:
    problem = make_problem(dtype=dtype, rule=rule, rows="same", mask="padding")
    expected = run(plain(problem), backend)
    nothing = [
        make_problem(dtype=dtype, rule=rule, rows="none", mask="padding"),
        make_problem(dtype=dtype, rule=rule, rows=[[{"concept": 1, "active": 0}]] * 3, mask="padding"),
    ]
    if rule.reads.tokens:
        masked = torch.full_like(problem.concepts.token_bias, -torch.inf)
        none = problem.concepts.index.clone()
        entries, concepts = problem.concepts.entries, problem.concepts.concepts
        none[entries + concepts : entries + 2 * concepts] = 0
        nothing += [with_concepts(problem, token_bias=masked), with_concepts(problem, index=none)]
    if rule.reads.direction:
        nothing.append(with_concepts(problem, direction=None, update=None))
    for idle in nothing:
        idle = dataclasses.replace(
            idle, query=problem.query, key=problem.key, value=problem.value, key_bias=problem.key_bias
        )
        assert torch.equal(run(idle, backend), expected)
    assert not torch.equal(run(problem, backend), expected)


@every_dtype
@every_rule
@every_backend
def test_01_a_row_without_entries_in_a_live_batch(backend: str, rule: Rule, dtype: torch.dtype) -> None:
    problem = make_problem(dtype=dtype, rule=rule, rows=[[0, 2], [], [1]])
    assert torch.equal(run(problem, backend)[1], run(plain(problem), backend)[1])


@every_dtype
@only(combine="separate", norm="none limit")
@every_backend
def test_02_strength_zero_is_plain_attention(backend: str, rule: Rule, dtype: torch.dtype) -> None:
    problem = make_problem(dtype=dtype, rule=rule, rows="same")
    problem.concepts.strength.zero_()
    output, expected = run(problem, backend), run(plain(problem), backend)
    if rule.blend == 1:
        assert torch.equal(output, expected)
    else:  # neighbours at most
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        apart = output.contiguous().view(bits).int() - expected.contiguous().view(bits).int()
        assert apart.abs().max() <= 1


# ---- 3: joint ------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("mask", ["none", "padding", "additive", "per_query"])
@every_backend
def test_03_joint_is_the_concatenated_softmax(backend: str, mask: str, dtype: torch.dtype) -> None:
    rule = Rule(combine="joint", strength=1.75)
    problem = make_problem(dtype=dtype, rule=rule, rows=[[0], [2, 1], [1, 0, 2]], mask=mask)
    tokens = problem.concepts
    begins, lengths = tokens.index[tokens.entries : tokens.entries + 6].view(2, 3).tolist()
    truth = []
    for b, concepts in enumerate([[0], [2, 1], [1, 0, 2]]):
        spans = [slice(begins[c], begins[c] + lengths[c]) for c in concepts]
        query = problem.query[b].double()
        keys = [problem.key[b].double(), *(tokens.key[s].transpose(0, 1).double() for s in spans)]
        weighted = tokens.value.double() * tokens.token_weight[:, None, None].double()
        values = [problem.value[b].double(), *(-1.75 * weighted[s].transpose(0, 1) for s in spans)]
        scores = query @ torch.cat(keys, -2).mT * problem.scale
        bias = torch.zeros(1, 1, 1, 21) if problem.key_bias is None else problem.key_bias
        prompt_bias = bias[b % len(bias)].expand(2, 37, 21)
        token_bias = torch.cat([tokens.token_bias[s] for s in spans]).expand(2, 37, -1)
        weights = (scores + torch.cat([prompt_bias, token_bias], -1)).softmax(-1)
        truth.append(weights @ torch.cat(values, -2))
    Judge(problem, truth=torch.stack(truth)).check(run(problem, backend), backend)


# ---- 4: order ------------------------------------------------------------------------------------


@every_dtype
@every_rule
@every_backend
def test_04_order_of_entries_and_tokens_only_rounds(backend: str, rule: Rule, dtype: torch.dtype) -> None:
    problem = make_problem(dtype=dtype, rule=rule, rows=[[0, 1, 2], [1, 2], [2, 0]])
    judge = Judge(problem)
    backwards = make_problem(dtype=dtype, rule=rule, rows=[[2, 1, 0], [2, 1], [0, 2]])
    judge.check(run(backwards, backend), backend)
    tokens = problem.concepts
    order = torch.cat([b + torch.randperm(n) for b, n in ((0, 8), (8, 3), (11, 12))])
    shuffled = {name: getattr(tokens, name)[order] for name in ("key", "value", "token_bias", "token_weight")}
    judge.check(run(with_concepts(problem, **shuffled), backend), backend)


# ---- 5, 6, 13: bits ------------------------------------------------------------------------------


@every_dtype
@every_rule
@every_backend
def test_05_bits_of_a_row_depend_on_that_row_alone(backend: str, rule: Rule, dtype: torch.dtype) -> None:
    rows = [[0, 2], [1], [2, 1, 0], []]
    problem = make_problem(4, queries=83, dtype=dtype, rule=rule, rows=rows, mask="padding")
    tokens = problem.concepts
    other = make_problem(4, queries=83, dtype=dtype, rule=rule, rows=rows, seed=99)
    expected = run(problem, backend)
    for b in range(4):
        entries = rows_of(problem)[b]
        offsets = [entries[0], entries[-1] + 1] if entries else [0, 0]
        index = torch.cat([tokens.index[: tokens.entries + 6], torch.tensor(offsets, dtype=torch.int32)])
        alone = dataclasses.replace(
            with_concepts(problem, index=index),
            query=problem.query[b : b + 1],
            key=problem.key[b : b + 1],
            value=problem.value[b : b + 1],
            key_bias=problem.key_bias[b : b + 1],
        )
        assert torch.equal(run(alone, backend)[0], expected[b]), f"row {b} alone"

        mine = (torch.arange(4) == b)[:, None, None, None]
        numbers = tokens.numbers * 0.5
        numbers[entries] = tokens.numbers[entries]
        crowd = dataclasses.replace(
            with_concepts(problem, numbers=numbers),
            query=torch.where(mine, problem.query, other.query * 100),
            key=torch.where(mine, problem.key, other.key),
            value=torch.where(mine, problem.value, torch.nan),
        )
        assert torch.equal(run(crowd, backend)[b], expected[b]), f"row {b} among others"


@every_rule
@every_backend
def test_05_bits_do_not_depend_on_the_thread_count(backend: str, rule: Rule) -> None:
    problem = make_problem(2, queries=200, rule=rule, rows="same", layout="bnhd")
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run_with_statistics(problem, backend))
    finally:
        torch.set_num_threads(1)
    output, statistics = results[0]
    for other, others in results[1:]:
        assert torch.equal(other, output)
        assert all(torch.equal(a, b) for a, b in zip(statistics, others))


@every_dtype
@every_rule
@every_backend
def test_06_a_shared_bank_is_a_duplicated_bank(backend: str, rule: Rule, dtype: torch.dtype) -> None:
    problem = make_problem(dtype=dtype, rule=rule, rows="same")
    t = problem.concepts
    concept, begin, length, offsets = t.index.split([t.entries, t.concepts, t.concepts, 4])
    owner = torch.tensor([b for b, row in enumerate(rows_of(problem)) for _ in row])
    copies = torch.arange(3).repeat_interleave(t.concepts)
    index = [concept + owner * t.concepts, begin.repeat(3) + copies * t.tokens, length.repeat(3), offsets]
    arrays = ("key", "value", "token_bias", "token_weight", "direction", "update", "offset")
    duplicated = with_concepts(
        problem,
        concepts=3 * t.concepts,
        index=torch.cat(index).int(),
        **{name: torch.cat([getattr(t, name)] * 3) for name in arrays},
    )
    assert torch.equal(run(duplicated, backend), run(problem, backend))


@every_dtype
@every_rule
@every_backend
def test_13_two_runs_give_the_same_bits(backend: str, rule: Rule, dtype: torch.dtype) -> None:
    problem = make_problem(2, queries=150, dtype=dtype, rule=rule)
    first, statistics = run_with_statistics(problem, backend)
    for _ in range(2):
        again, measured = run_with_statistics(problem, backend)
        assert torch.equal(again, first)
        assert all(torch.equal(a, b) for a, b in zip(measured, statistics))


# ---- 7: masks ------------------------------------------------------------------------------------


@every_dtype
@every_rule
@every_backend
def test_07_a_masked_concept_token_is_absent(backend: str, rule: Rule, dtype: torch.dtype) -> None:
    problem = make_problem(dtype=dtype, rule=rule, rows="same")
    tokens = problem.concepts
    gone = torch.zeros(tokens.tokens, dtype=torch.bool)
    gone[[0, 1, 5, 8, 22]] = True  # of 8, 3 and 12 tokens
    bias = tokens.token_bias.masked_fill(gone, -torch.inf)
    masked = with_concepts(problem, token_bias=bias)
    hole = gone[:, None, None]
    poisoned = with_concepts(
        masked,
        key=tokens.key.masked_fill(hole, torch.nan),
        value=tokens.value.masked_fill(hole, torch.nan),
    )
    output = run(masked, backend)
    assert torch.equal(run(poisoned, backend), output)

    begins, lengths = torch.tensor([0, 5, 7], dtype=torch.int32), torch.tensor([5, 2, 11], dtype=torch.int32)
    index = torch.cat([tokens.index[: tokens.entries], begins, lengths, tokens.index[-4:]])
    kept = {n: getattr(tokens, n)[~gone] for n in ("key", "value", "token_bias", "token_weight")}
    absent = with_concepts(problem, index=index, longest=11, **kept)
    Judge(absent).check(output, backend)


@every_dtype
@every_rule
@every_backend
def test_07_a_masked_prompt_key_is_absent(backend: str, rule: Rule, dtype: torch.dtype) -> None:
    problem = make_problem(dtype=dtype, rule=rule)
    gone = torch.arange(21) % 4 == 1
    bias = torch.zeros(1, 1, 1, 21).masked_fill(gone, -torch.inf)
    hole = gone[:, None]
    masked = dataclasses.replace(problem, key_bias=bias)
    poisoned = dataclasses.replace(
        masked,
        key=problem.key.masked_fill(hole, torch.nan),
        value=problem.value.masked_fill(hole, torch.nan),
    )
    output = run(masked, backend)
    assert torch.equal(run(poisoned, backend), output)
    absent = dataclasses.replace(problem, key=problem.key[:, :, ~gone], value=problem.value[:, :, ~gone])
    Judge(absent).check(output, backend)


@every_backend
def test_07_keys_masked_in_one_row_and_head_only(backend: str) -> None:
    problem = make_problem(rows="same")
    gone = torch.rand(3, 2, 1, 21, generator=torch.Generator().manual_seed(0)) < 0.3
    masked = dataclasses.replace(problem, key_bias=torch.zeros(gone.shape).masked_fill(gone, -torch.inf))
    poisoned = dataclasses.replace(
        masked,
        key=problem.key.masked_fill(gone.mT, torch.nan),
        value=problem.value.masked_fill(gone.mT, torch.nan),
    )
    assert torch.equal(run(poisoned, backend), run(masked, backend))


# ---- 8 to 11: identities -------------------------------------------------------------------------


def concept_is_prompt(rule: Rule, dtype: torch.dtype) -> Problem:
    problem = make_problem(
        2, concept_lengths=(21,), rows="same", layout="broadcast", extras=False, dtype=dtype, rule=rule
    )
    key, value = (t[0].transpose(0, 1) for t in (problem.key, problem.value))
    return with_concepts(problem, key=key, value=value)


@every_dtype
@pytest.mark.parametrize("scope", ["head", "feature"])
@pytest.mark.parametrize("direction", ["raw", "orthogonal", "difference"])
@every_backend
def test_08_concept_equal_to_the_prompt(backend: str, direction: str, scope: str, dtype: torch.dtype) -> None:
    problem = concept_is_prompt(Rule(direction=direction, scope=scope, name=f"{direction}-{scope}"), dtype)
    z = reference.evaluate(plain(problem)).output
    judge = Judge(problem, truth=torch.zeros_like(z) if direction == "raw" else z)
    judge.check(run(problem, backend), backend)


@every_dtype
@pytest.mark.parametrize("scope", ["head", "feature"])
@every_backend
def test_08_preserve_undoes_any_shrinking(backend: str, scope: str, dtype: torch.dtype) -> None:
    """Y = Z / 16 gets the norm of Z back."""
    rule = Rule(norm="preserve", scope=scope, strength=15 / 16, name=f"preserve-{scope}")
    problem = concept_is_prompt(rule, dtype)
    z = reference.evaluate(plain(problem)).output
    Judge(problem, truth=z).check(run(problem, backend), backend)


@every_dtype
@pytest.mark.parametrize("scope", ["head", "feature"])
@every_backend
def test_09_orthogonal_keeps_the_part_along_z(backend: str, scope: str, dtype: torch.dtype) -> None:
    rule = Rule(direction="orthogonal", scope=scope, strength=1.5)
    problem = make_problem(dtype=dtype, rule=rule, rows="same")
    judge = Judge(problem)
    z = reference.evaluate(plain(problem)).output
    moved = ((run(problem, backend).double() - z) * z).sum(-1)
    room = judge.allowed[0] * judge.magnitude * z.abs().sum(-1)
    if scope == "feature":
        moved, room = moved.sum(1), room.sum(1)
    assert (moved.abs() <= room).all()


@every_dtype
@every_backend
def test_10_reflection_keeps_the_norm(backend: str, dtype: torch.dtype) -> None:
    rule = Rule(direction="fixed", scope="feature", strength=2.0)
    problem = make_problem(dtype=dtype, rule=rule, rows=[[0], [1], [2]], extras=False)
    assert torch.allclose(problem.concepts.direction.flatten(1).norm(dim=1), torch.ones(3))
    judge = Judge(problem)
    z = reference.evaluate(plain(problem)).output
    output = run(problem, backend)
    room = judge.allowed[0] * (40 * judge.magnitude.square().sum(1)).sqrt()
    assert ((norm(output, rule) - norm(z, rule))[:, 0].abs() <= room).all()
    assert not torch.equal(output, run(plain(problem), backend))


@every_dtype
@pytest.mark.parametrize("scope", ["head", "feature"])
@pytest.mark.parametrize("norm_order", [1, 2])
@pytest.mark.parametrize("limit, blend", [(1.0, 1.0), (1.5, 1.0), (2.5, 0.375)])
@every_backend
def test_11_limit_limits(
    backend: str, limit: float, blend: float, norm_order: int, scope: str, dtype: torch.dtype
) -> None:
    rule = Rule(
        direction="difference",
        norm="limit",
        norm_order=norm_order,
        norm_limit=limit,
        blend=blend,
        scope=scope,
        strength=10.0,
    )
    problem = make_problem(dtype=dtype, rule=rule, rows="same")
    output, statistics = run_with_statistics(problem, backend)
    assert (statistics.limited_fraction > 0.5).all()
    most = (blend * limit + 1 - blend) * norm(run(plain(problem), backend), rule)
    assert (norm(output, rule) <= most * (1 + 4 * eps(dtype))).all()


# ---- 12, 14: size --------------------------------------------------------------------------------


@every_dtype
@every_rule
@every_backend
def test_12_extreme_inputs_never_give_nan(backend: str, rule: Rule, dtype: torch.dtype) -> None:
    largest = 65504.0 if dtype == torch.float16 else 1e15
    for rows, mask in (("same", "additive"), ("mixed", "additive"), ("same", "none")):
        problem = make_problem(dtype=dtype, rule=rule, rows=rows, mask=mask, extras=mask != "none")
        tokens = problem.concepts
        for grow in (torch.sign, lambda t: t / t.abs().amax()):
            extreme = dataclasses.replace(
                with_concepts(problem, key=grow(tokens.key) * largest, value=grow(tokens.value) * largest),
                query=grow(problem.query) * largest,
                key=grow(problem.key) * largest,
                value=grow(problem.value) * largest,
            )
            assert extreme.key.isfinite().all() and extreme.key.abs().max() > 0.99 * largest
            output, statistics = run_with_statistics(extreme, backend)
            assert not output.isnan().any()
            assert not any(t.isnan().any() for t in statistics)


@pytest.mark.parametrize("scale", [1e9, -1e9])
@every_dtype
@every_backend
def test_12_a_far_highest_logit_takes_all(backend: str, dtype: torch.dtype, scale: float) -> None:
    problem = dataclasses.replace(plain(make_problem(dtype=dtype)), scale=scale)
    logits = problem.query.double() @ problem.key.double().mT * scale
    first, second = logits.topk(2).values.unbind(-1)
    winner = logits.argmax(-1, keepdim=True).expand_as(problem.query)
    far = (first - second > 1e4) & (first > 1e9)  # a float32 logit of that size is off by some hundreds
    assert far.double().mean() > 0.9
    assert torch.equal(run(problem, backend)[far], problem.value.gather(2, winner)[far])


@pytest.mark.parametrize("power", [-10, -1, 3, 10])
@every_rule
@every_backend
def test_14_scaling_values_scales_the_output(backend: str, rule: Rule, power: int) -> None:
    if rule.reads.direction:
        rule = Rule(similarity="mass", gate=rule.gate, norm=rule.norm, norm_order=rule.norm_order, width=0.75)
    temperature = 40**0.5 if rule.direction == "retrieve" else None  # its logits are products of values
    problem = make_problem(rule=rule, rows="same")
    problem = with_rule(problem, temperature=temperature)
    factor = 2.0**power
    scaled = dataclasses.replace(
        with_concepts(problem, value=problem.concepts.value * factor), value=problem.value * factor
    )
    if temperature is not None:
        scaled = with_rule(scaled, temperature=temperature * factor**2)
    assert torch.equal(run(scaled, backend), run(problem, backend) * factor)


# ---- 15, 16 --------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("preset", ["protore", "protore_retrieve"])
@every_backend
def test_15_copies_under_protore_count_once(backend: str, preset: str, dtype: torch.dtype) -> None:
    one = make_problem(dtype=dtype, rule=preset, concept_lengths=(8,), rows="same", extras=False)
    key, value = one.concepts.key, one.concepts.value
    copies = fn.ConceptTokens.uniform([key] * 4, [value] * 4, 3)
    output = run(one, backend)
    assert torch.equal(run(dataclasses.replace(one, concepts=copies), backend), output)
    assert not torch.equal(run(plain(one), backend), output)


@pytest.mark.parametrize("active", [2.0**-40, pytest.param(1e-37, marks=pytest.mark.full), 1e-44])
@every_rule
@every_backend
def test_16_a_fading_schedule_ends_at_plain_attention(backend: str, rule: Rule, active: float) -> None:
    for dtype in DTYPES:
        problem = make_problem(dtype=dtype, rule=rule, rows=[[0], [1], [2]])
        assert not torch.equal(run(problem, backend), run(plain(problem), backend))
        problem.concepts.active.fill_(active)
        z = reference.evaluate(plain(problem)).output
        Judge(problem, truth=z).check(run(problem, backend), backend)


# ---- corrupt data --------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["key", "value"])
@every_rule
@every_backend
def test_a_nan_in_a_concept_shows_and_stays_there(backend: str, rule: Rule, where: str) -> None:
    """Fails closed: a concept that cannot be measured must not pass as one that is absent."""
    problem = make_problem(rule=rule, rows=[[0, 1], [1], [2, 0]], extras=rule.reads.direction, queries=70)
    broken = getattr(problem.concepts, where).clone()
    broken[1, 0, 3] = torch.nan  # of concept 0, in the first head
    problem = with_concepts(problem, **{where: broken})
    expected = run(problem, "reference").isnan()
    assert expected[[0, 2]].any() or rule.direction == "fixed"  # which reads no tokens
    output, statistics = run_with_statistics(problem, backend)
    assert output.isnan()[expected].all() and not output[1].isnan().any()
    assert torch.equal(statistics.nonfinite, output.isnan().sum((1, 2, 3)).float())
    for at in (0, 33, 69):
        one = dataclasses.replace(problem, query=problem.query[:, :, at : at + 1])
        same = run(one, backend)[:, :, 0]
        assert torch.equal(same.nan_to_num(), output[:, :, at].nan_to_num())
        assert torch.equal(same.isnan(), output[:, :, at].isnan())


@every_backend
def test_entries_of_a_bank_without_concepts_do_not_exist(backend: str) -> None:
    problem = make_problem(rows="same")
    tokens = problem.concepts
    rows = tokens.index[-problem.sizes[0] - 1 :]
    empty = dataclasses.replace(
        tokens, concepts=0, index=torch.cat([tokens.index[: tokens.entries], rows]),
        direction=None, update=None, offset=None,
    )  # fmt: skip
    output = run(dataclasses.replace(problem, concepts=empty), backend)
    assert torch.equal(output, run(plain(problem), backend))


@pytest.mark.parametrize("wrong", [-(2**31), -1, 1000, 2**31 - 1])
@every_backend
def test_a_corrupt_index_never_leaves_the_arrays(backend: str, wrong: int) -> None:
    problem = make_problem(rows="same")
    for at in range(len(problem.concepts.index)):
        index = problem.concepts.index.clone()
        index[at] = wrong
        output, _ = run_with_statistics(with_concepts(problem, index=index), backend)
        assert output.isfinite().all()
    everywhere = torch.full_like(problem.concepts.index, wrong)
    assert run(with_concepts(problem, index=everywhere), backend).isfinite().all()


# ---- corners that single backends have missed -----------------------------------------------------


@every_backend
@every_dtype
def test_a_nan_in_key_bias_is_no_mask(backend: str, dtype: torch.dtype) -> None:
    problem = make_problem(dtype=dtype, mask="additive")
    bias = problem.key_bias.clone()
    bias[..., 0] = torch.nan
    assert run(dataclasses.replace(problem, key_bias=bias), backend).isnan().all()


@every_backend
@every_dtype
def test_joint_with_tiny_gates(backend: str, dtype: torch.dtype) -> None:
    """Without a prompt the concepts share all mass, however small their gates are."""
    rows = [[{"concept": 0, "active": 1e-31}], [{"concept": 1, "active": 1e-33}, 2], []]
    problem = make_problem(keys=0, rule="vsf", rows=rows, dtype=dtype, extras=False)
    Judge(problem).check(run(problem, backend), backend)


@every_backend
@pytest.mark.parametrize("rule", ("vsf", "protore"))
def test_a_prompt_masked_by_the_lowest_number(backend: str, rule: str) -> None:
    """Some callers mask with it: then all keys weigh the same. It must not become -inf by scaling."""
    rows = [[{"concept": 0, "active": 0.0}, 1], [2], []]
    problem = make_problem(rule=rule, dtype=torch.bfloat16, rows=rows)
    lowest = torch.full((3, 1, 1, problem.sizes[3]), torch.finfo(torch.float32).min)
    problem = dataclasses.replace(problem, key_bias=lowest, scale=1.0)
    Judge(problem).check(run(problem, backend), backend)


@every_backend
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("select", SELECTS)
def test_a_similarity_that_is_nan_shows(backend: str, select: str, gate: str) -> None:
    """From a concept that holds one: negation that cannot be computed must not be left out."""
    rule = Rule("direction", gate, "difference", select=select)
    problem = make_problem(rule=rule, dtype=torch.bfloat16, rows=[[0, 1], [1, 2], [2, 0]])
    offset = torch.zeros(3)
    offset[1] = torch.nan
    output = run(with_concepts(problem, offset=offset), backend)
    assert output[:2].isnan().all() and output[2].isfinite().all()
