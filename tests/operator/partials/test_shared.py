# SPDX-License-Identifier: Apache-2.0
"""Attention whose keys are not all here: `shared`, `prompt`, `combine`, and concept tokens of each row's own
(docs/semantics.md, section 9)."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from support import (
    BACKENDS,
    CPU_BACKENDS,
    DTYPES,
    RULES,
    Judge,
    every_backend,
    every_dtype,
    fair,
    make_problem,
    pairwise,
    plain,
    run,
    run_with_statistics,
    with_concepts,
    with_rule,
)
from torch import Tensor

import fastnegate as fn
from fastnegate.operator import reference
from fastnegate.operator import registration as ops
from fastnegate.operator.backends import cuda
from fastnegate.operator.problem import Problem
from fastnegate.operator.rule import SHARED, Rule
from fastnegate.testing.problems import PARTIALS, with_partials

pytestmark = pytest.mark.usefixtures("one_thread")


def words(rule: Rule) -> tuple[str, ...]:
    return ("joint",) if rule.combine == "joint" else ("inside", "outside")


# Every rule with every word that goes with it.
ALL = {
    f"{name}-{word}": dataclasses.replace(rule, shared=word)
    for name, rule in RULES.items()
    for word in words(rule)
}
every_rule = pytest.mark.parametrize("rule", ALL.values(), ids=list(ALL))
every_kind = pytest.mark.parametrize("which", PARTIALS)


def fits(rule: Rule, which: str) -> bool:
    return rule.direction != "retrieve" or which == "shared"


def with_nothing(problem: Problem, *names: str) -> Problem:
    """Without keys in these partials: they hold NaN."""
    changes = {}
    for name in names:
        partial = getattr(problem, name)
        changes[name] = fn.Partial(
            torch.full_like(partial.out, torch.nan), torch.full_like(partial.lse, -torch.inf)
        )
    return dataclasses.replace(problem, **changes)


# ---- accuracy ---------------------------------------------------------------------------------------

FACTORS = {
    "rule": list(ALL),
    "which": PARTIALS,
    "dtype": DTYPES,
    "dim": (16, 40, 64, 80, 128),
    "queries": (1, 33, 200),
    "keys": (0, 7, 77),
    "mask": ("none", "padding", "per_query"),
    "rows": ("none", "same", "mixed", "inactive"),
    "layout": ("contiguous", "bnhd", "odd"),
    "statistics": (False, True),
}
CASES = [case for case in pairwise(FACTORS) if fits(ALL[case["rule"]], case["which"])]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_grid(case: dict[str, Any]) -> None:
    case = dict(case)
    which, statistics, rule = case.pop("which"), case.pop("statistics"), ALL[case.pop("rule")]
    problems = (with_partials(make_problem(rule=rule, **case, seed=s), which, seed=s) for s in range(9))
    # With shared keys in every F all concepts look alike, and which of them is the nearest says nothing.
    alike = rule.select == "max" and rule.shared == "inside"
    judge = Judge(next(problems), leave_near=True) if alike else fair(problems)
    for backend in BACKENDS:
        if statistics:
            output, measured = run_with_statistics(judge.problem, backend)
            judge.check_statistics(measured, backend)
        else:
            output = run(judge.problem, backend)
        judge.check(output, f"{backend} {which}")
        assert output.transpose(1, 2).is_contiguous()


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return ((query @ key.mT) * scale).softmax(-1) @ value


def image_and_concept(dtype: torch.dtype, rule: Rule) -> tuple[Problem, dict[str, Tensor]]:
    """A problem with shared keys of which the tensors are known, in float64; one concept in all rows."""
    problem = make_problem(
        2, 3, 120, 19, 40, dtype, rule=rule, rows=[[0], [0]], concept_lengths=(8,), extras=False
    )
    generator = torch.Generator().manual_seed(1)
    key, value = (torch.randn(2, 3, 50, 40, generator=generator).to(dtype).double() for _ in range(2))
    query = problem.query.double()
    done = reference.partial(query, key, value, None, problem.scale)
    shared = fn.Partial(done.out.to(dtype), done.lse.float())
    concept = (t.double().transpose(0, 1) for t in (problem.concepts.key, problem.concepts.value))
    names = ("query", "key", "value", "image_key", "image_value", "concept_key", "concept_value")
    tensors = (query, problem.key.double(), problem.value.double(), key, value, *concept)
    return dataclasses.replace(problem, shared=shared), dict(zip(names, tensors))


@every_dtype
@every_backend
def test_inside_is_the_two_passes_of_nag(backend: str, dtype: torch.dtype) -> None:
    """Attention to image and prompt, attention to image and concept, and the published mix of both."""
    rule = Rule.preset("nag", family="flux")
    problem, t = image_and_concept(dtype, rule)

    def both(name: str) -> Tensor:
        key, value = t[f"{name}key"], t[f"{name}value"]
        key = torch.cat([t["image_key"], key.expand(2, -1, -1, -1)], 2)
        value = torch.cat([t["image_value"], value.expand(2, -1, -1, -1)], 2)
        return attention(t["query"], key, value, problem.scale)

    z, f = both(""), both("concept_")
    y = z + rule.strength * (z - f)
    sizes = (x.abs().sum((1, 3), keepdim=True) for x in (y, z))
    y = y * (rule.norm_limit / math.prod((next(sizes), 1 / next(sizes)))).clamp(max=1)
    truth = rule.blend * y + (1 - rule.blend) * z
    Judge(problem, truth).check(run(problem, backend), f"{backend} two passes")


@every_dtype
@every_backend
def test_joint_is_one_softmax_over_everything(backend: str, dtype: torch.dtype) -> None:
    rule = Rule.preset("vsf")
    problem, t = image_and_concept(dtype, rule)
    key = torch.cat([t["image_key"], t["key"], t["concept_key"].expand(2, -1, -1, -1)], 2)
    value = torch.cat(
        [t["image_value"], t["value"], -rule.strength * t["concept_value"].expand(2, -1, -1, -1)], 2
    )
    logits = (t["query"] @ key.mT) * problem.scale
    logits[..., -8:] -= rule.logit_bias
    Judge(problem, logits.softmax(-1) @ value).check(run(problem, backend), f"{backend} one softmax")


@pytest.mark.parametrize("at", (0, 1, 40, 76, 77))
@every_dtype
@every_backend
def test_a_prompt_may_be_split_anywhere(backend: str, dtype: torch.dtype, at: int) -> None:
    """Into a partial that is shared, by a rule for which shared keys are the prompt's, and the rest."""
    rule = Rule.preset("vsf")
    whole = make_problem(2, 2, 100, 77, 64, dtype, rule=rule, mask="additive")
    query, bias = whole.query.double(), whole.key_bias
    parts = (whole.key[:, :, :at].double(), whole.value[:, :, :at].double(), bias[..., :at])
    done = reference.partial(query, *parts, whole.scale)
    split = dataclasses.replace(
        whole, key=whole.key[:, :, at:], value=whole.value[:, :, at:], key_bias=bias[..., at:],
        shared=fn.Partial(done.out.to(dtype), done.lse.float()),
    )  # fmt: skip
    truth = reference.evaluate(whole).output
    Judge(split, truth).check(run(split, backend), f"{backend} split")


@every_dtype
@every_backend
def test_merging_commutes_and_associates(backend: str, dtype: torch.dtype) -> None:
    """Three pieces of a prompt, in every order and grouping."""
    whole = plain(make_problem(2, 2, 100, 60, 64, dtype))
    query, truth = whole.query.double(), reference.evaluate(whole).output
    bounds = (0, 7, 30, 60)

    def piece(*which: int) -> fn.Partial:
        keys = torch.cat([torch.arange(bounds[i], bounds[i + 1]) for i in which])
        key, value = whole.key[:, :, keys].double(), whole.value[:, :, keys].double()
        done = reference.partial(query, key, value, None, whole.scale)
        return fn.Partial(done.out.to(dtype), done.lse.float())

    none = whole.key[:, :, :0]
    for a, b, c in itertools.permutations(range(3)):
        for shared, prompt in ((piece(a, b), piece(c)), (piece(a), piece(b, c))):
            p = dataclasses.replace(whole, key=none, value=none, shared=shared, prompt=prompt)
            Judge(p, truth).check(run(p, backend), f"{backend} merge")


# ---- bits -------------------------------------------------------------------------------------------


@every_rule
@every_backend
def test_shared_without_keys_changes_no_bit(backend: str, rule: Rule) -> None:
    problem = make_problem(rule=rule, mask="padding")
    nothing = with_nothing(with_partials(problem, "shared"), "shared")
    assert torch.equal(run(nothing, backend), run(problem, backend))


@pytest.mark.parametrize("word", SHARED)
@every_kind
@every_backend
def test_without_an_entry_it_is_the_merge(backend: str, which: str, word: str) -> None:
    """To the last bit that of the backend without concepts, whatever the word and the other rows."""
    rule = Rule.preset("vsf" if word == "joint" else "nag", shared=word)
    some = with_partials(make_problem(rule=rule, rows=[[0], [], [1]]), which)
    if which == "combine":
        some.slots[0].lse[1:] = -torch.inf
        some.slots[1].lse[:2] = -torch.inf
        some.slots[2].lse[:] = -torch.inf
        assert not some.slots[0].out.isfinite().all()
    expected = run(dataclasses.replace(plain(some), slots=None), backend)
    output = run(some, backend)
    assert torch.equal(output[1], expected[1]) and not torch.equal(output[0], expected[0])


@every_backend
def test_a_query_without_a_concept_is_left_alone(backend: str) -> None:
    """`combine`: the entry is there for some queries of a row, with a norm and a blend that round."""
    rule = Rule.preset("nag", scope="head", norm_limit=1.0)
    problem = with_partials(make_problem(rule=rule, rows="same"), "combine")
    gone = torch.arange(problem.query.shape[2]) % 4 == 1
    for slot in problem.slots:
        slot.lse[:, :, gone] = -torch.inf
    expected = run(dataclasses.replace(plain(problem), slots=None), backend)
    output, statistics = run_with_statistics(problem, backend)
    assert torch.equal(output[:, :, gone], expected[:, :, gone])
    assert not (output[:, :, ~gone] == expected[:, :, ~gone]).all(-1).any()
    assert (statistics.heat[:, gone] == 0).all() and (statistics.heat[:, ~gone] > 0).any(1).all()


@every_rule
@every_kind
@pytest.mark.parametrize("backend", CPU_BACKENDS[:1])
def test_a_row_has_its_bits_whatever_its_mates(backend: str, which: str, rule: Rule) -> None:
    if not fits(rule, which):
        pytest.skip("retrieve reads tokens")
    problem = with_partials(make_problem(rule=rule, queries=70), which)
    together, tokens = run(problem, backend), problem.concepts
    offsets = tokens.index[-4:].tolist()
    for b in range(3):

        def row(t: Tensor, b: int = b) -> Tensor:
            return t[b : b + 1]

        def alone(partial: fn.Partial | None, b: int = b) -> fn.Partial | None:
            return None if partial is None else fn.Partial(partial.out[b : b + 1], partial.lse[b : b + 1])

        low, high = offsets[b], offsets[b + 1]
        index = torch.cat(
            [tokens.index[low:high], tokens.index[tokens.entries : -4], torch.tensor([0, high - low])]
        )
        single = dataclasses.replace(
            problem, query=row(problem.query), key=row(problem.key), value=row(problem.value),
            shared=alone(problem.shared), prompt=alone(problem.prompt),
            slots=None if problem.slots is None else tuple(map(alone, problem.slots)),
            concepts=dataclasses.replace(
                tokens, index=index.int(), numbers=tokens.numbers[low:high], entries=high - low
            ),
        )  # fmt: skip
        assert torch.equal(run(single, backend)[0], together[b])


@every_rule
@every_backend
def test_a_prompt_without_keys_leaves_the_shared_ones(backend: str, rule: Rule) -> None:
    """Z is the attention to shared keys; `outside` it is the whole output."""
    problem = with_partials(make_problem(rule=rule, rows=[[0], [0], []], keys=0), "shared")
    problem.shared.lse.nan_to_num_(neginf=1.0)
    problem.shared.out.nan_to_num_(nan=0.5)
    output = run(problem, backend)
    left = 3 if rule.shared == "outside" else 1
    assert torch.equal(output[-left:], problem.shared.out[-left:])


@every_kind
@every_backend
def test_what_is_nan_shows(backend: str, which: str) -> None:
    """In queries of it alone: a log-sum-exp that is NaN is no missing partial."""
    problem = with_partials(make_problem(rule="nag", rows="same", queries=40), which)
    partials = [partial for _, partial in problem.partials]
    for part in range(1 if which == "prompt" else 2):  # of the only segment nobody reads the mass
        for partial in partials:
            kept = partial[part].clone()
            partial[part][:, :, 8] = torch.nan  # a query that has keys everywhere
            output = run(problem, backend)
            assert output[:, :, 8].isnan().any(-1).all()
            assert output[:, :, torch.arange(40) != 8].isfinite().all()
            partial[part].copy_(kept)


@every_dtype
@every_backend
def test_concept_tokens_of_each_rows_own(backend: str, dtype: torch.dtype) -> None:
    """Entries of a row read the tokens of that row: the same as a bank that holds all of them."""
    problem = make_problem(2, 2, 70, 21, 40, dtype, rows=[[0, 1], [1]], concept_lengths=(8, 3))
    tokens = problem.concepts
    other = make_problem(2, 2, 70, 21, 40, dtype, rows="same", concept_lengths=(8, 3), seed=5).concepts
    key, value = torch.stack([tokens.key, other.key]), torch.stack([tokens.value, other.value])
    own = dataclasses.replace(problem, concepts=fn.ConceptTokens.from_activations(key, value, tokens))
    lengths, spans = (8, 3), (slice(0, 8), slice(8, 11))
    bank = fn.ConceptTokens.pack(
        [t[span] for t in key for span in spans], [t[span] for t in value for span in spans],
        [[{"concept": 0}, {"concept": 1}], [{"concept": 3}]],
        token_bias=tokens.token_bias.repeat(2), token_weight=tokens.token_weight.repeat(2),
        direction=tokens.direction.repeat(2, 1, 1), update=tokens.update.repeat(2, 1, 1),
        offset=tokens.offset.repeat(2),
    )  # fmt: skip
    assert sum(lengths) * 2 == bank.tokens
    expected = dataclasses.replace(problem, concepts=bank)
    assert torch.equal(run(own, backend), run(expected, backend))
    assert not torch.equal(run(own, backend)[1], run(problem, backend)[1])
    first = dataclasses.replace(own, query=own.query[:1], key=own.key[:1], value=own.value[:1])
    first = dataclasses.replace(first, concepts=own.concepts.first_rows(1))
    assert torch.equal(run(first, backend)[0], run(own, backend)[0])
    Judge(own).check(run(own, backend), f"{backend} own tokens")


@pytest.mark.parametrize("lowest", (torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min, -2.4e38))
@every_backend
def test_a_mask_of_the_lowest_float_is_no_mask(backend: str, lowest: float) -> None:
    """It is a number, of keys that weigh nothing beside others."""
    problem = with_partials(make_problem(rule="nag", rows="same"), "combine")
    for name in ("shared", "prompt"):
        out, lse = (t.clone() for t in getattr(problem, name))
        lse[:, :, 4:9] = lowest
        low = dataclasses.replace(problem, **{name: fn.Partial(out.nan_to_num(), lse)})
        output = run(low, backend)
        assert output.isfinite().all()
        torch.testing.assert_close(output, reference.run(low), rtol=1e-4, atol=1e-5)


@every_backend
def test_a_merge_is_exact_beside_large_values(backend: str) -> None:
    """The share of the shared keys is small, what they hold is large."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 2, 300, 40, generator=generator)
    small, large = torch.randn_like(query), 1e4 * torch.randn(query.shape, generator=generator)
    lse = torch.rand(1, 2, 300, generator=generator)
    none = query[:, :, :0]
    for away in (7.0, 10.0, 14.0):
        shared, prompt = fn.Partial(large, lse), fn.Partial(small, lse + away)
        problem = Problem(query, none, none, None, None, Rule(), 1.0, shared, prompt)
        share = torch.sigmoid(lse.double() - prompt.lse.double())[..., None]
        truth = share * large + (1 - share) * small
        size = (share * large.abs() + (1 - share) * small.abs()).amax(-1, keepdim=True)
        assert ((run(problem, backend) - truth).abs() / size).max() <= 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
@pytest.mark.parametrize("rule", ("vsf", "nag", "protore"))
@every_backend
def test_what_is_no_log_sum_exp_shows(backend: str, rule: str, bad: float) -> None:
    problem = with_partials(make_problem(rule=rule, rows="same", queries=40), "combine")
    problem.shared.lse[:, :, 8] = bad
    output = run(problem, backend)
    assert output[:, :, 8].isnan().any(-1).all() and output[:, :, torch.arange(40) != 8].isfinite().all()


@pytest.mark.parametrize("name", ("reference", "cpu"))
def test_a_query_that_is_nan_is_not_one_without_keys(name: str) -> None:
    """It shows in a merge, which would drop a log-sum-exp of -inf in silence."""
    problem = make_problem(1, 2, 6, 77, 16)  # of few keys torch itself makes 0, as without NaN
    query = problem.query.clone()
    query[:, :, 3] = torch.nan
    partial = fn.partial_attention(query, problem.key, problem.value, backend=name)
    other = fn.partial_attention(problem.query, problem.key, problem.value)
    for shared, prompt in ((partial, other), (other, partial)):
        output = fn.negated_attention(problem.query, None, None, shared=shared, prompt=prompt)
        assert output[:, :, 3].isnan().all() and output[:, :, torch.arange(6) != 3].isfinite().all()


def test_what_transforms_made_is_not_kept() -> None:
    """Nor is a generator read twice, nor the sign of a lazily negated tensor lost."""
    problem = with_partials(make_problem(rule="nag", rows="same"), "combine")
    shared, prompt, slots = problem.shared, problem.prompt, list(problem.slots)
    sizes = {"strength": 0.5}

    def loss(out: Tensor) -> Tensor:
        return fn.combine(None, prompt._replace(out=out), slots, "nag", sizes).sum()

    expected = fn.combine(shared, prompt, slots, "nag", {"strength": 0.5000001})
    with pytest.raises(ValueError, match="does not require grad"):
        torch.func.grad(loss)(prompt.out.nan_to_num())
    assert torch.allclose(fn.combine(shared, prompt, slots, "nag", sizes), expected, atol=1e-4)
    assert torch.equal(
        fn.combine(shared, prompt, (s for s in slots), "nag", sizes),
        fn.combine(shared, prompt, slots, "nag", sizes),
    )
    lazy = [fn.Partial(s.out, torch.complex(s.lse, -s.lse).conj().imag) for s in slots]
    assert lazy[0].lse.is_neg()
    assert torch.equal(
        fn.combine(shared, prompt, lazy, "nag", sizes), fn.combine(shared, prompt, slots, "nag", sizes)
    )


# ---- as PyTorch sees it -----------------------------------------------------------------------------

NAMES = ("reference", "cpu") if CPU_BACKENDS else ("reference",)


@every_kind
@pytest.mark.parametrize("name", ("negated_attention", "negated_attention_with_statistics"))
@pytest.mark.parametrize("backend", NAMES)
def test_opcheck(backend: str, name: str, which: str) -> None:
    problem = with_partials(make_problem(2, 2, 5, 7, 16, rule="nag"), which)
    torch.library.opcheck(getattr(torch.ops.fastnegate, name).default, ops.flat(problem, backend))


def test_the_registered_operator_refuses_halves() -> None:
    problem = with_partials(make_problem(2, 2, 5, 7, 16), "combine")
    operator, flat = torch.ops.fastnegate.negated_attention.default, [*ops.flat(problem, "reference")]
    for at, said in ((18, "shared_out and shared_lse"), (21, "prompt_out and prompt_lse")):
        arguments = [*flat]
        arguments[at] = None
        with pytest.raises(ValueError, match=said):
            operator(*arguments)
    with pytest.raises(ValueError, match="slots has 5 tensors: must be out and lse of each"):
        operator(*flat[:22], flat[22][:-1])
    for slots in (flat[22][:-2], flat[22] + flat[22][:2]):
        with pytest.raises(ValueError, match="slots: must go with a prompt, one for each of 3 concepts"):
            operator(*flat[:22], slots)


class Layer(torch.nn.Module):
    """All that takes partials."""

    def __init__(self, tokens: fn.ConceptTokens) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor) -> Tensor:
        shared = fn.Partial(out, lse)
        first = fn.negated_attention(query, key, value, self.tokens, "nag", shared=shared)
        second = fn.negated_attention(query, None, None, self.tokens, "vsf", prompt=shared)
        third = fn.combine(
            shared, fn.Partial(first, lse), [fn.Partial(second, lse - 1)], "ong", {"strength": 0.5}
        )
        return first + second + third


def test_compile_and_export() -> None:
    torch._dynamo.reset()
    problem = with_partials(make_problem(2, 2, 40, 7, 16), "shared")
    inputs = (problem.query, problem.key, problem.value, problem.shared.out.nan_to_num(), problem.shared.lse)
    layer = Layer(problem.concepts)
    with torch.no_grad():
        expected = layer(*inputs)
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(*inputs), expected)
        exported = torch.export.export(layer, inputs, strict=False)
        assert torch.equal(exported.module()(*inputs), expected)
    torch._dynamo.reset()


def test_autocast_takes_partials_along() -> None:
    problem = with_partials(make_problem(rule="nag"), "both")
    shared, prompt = problem.shared, problem.prompt
    half = torch.bfloat16
    with torch.autocast("cpu", dtype=half):
        output = fn.negated_attention(
            problem.query, None, None, problem.concepts, "nag", shared=shared, prompt=prompt
        )
    cast = [fn.Partial(p.out.to(half), p.lse) for p in (shared, prompt)]
    expected = fn.negated_attention(
        problem.query.to(half), None, None, problem.concepts.cast(half), "nag", shared=cast[0], prompt=cast[1]
    )
    assert output.dtype == half and torch.equal(output, expected)


SMOOTH = {
    "inside": Rule("cosine", "sigmoid", "projection", norm="preserve", width=3.0, threshold=0.25),
    "outside": Rule(
        "cosine", "sigmoid", "orthogonal", norm="preserve", width=3.0, blend=0.7, shared="outside"
    ),
    "joint": Rule("mass", "sigmoid", combine="joint", strength=1.5, blend=0.75),
}


@every_kind
@pytest.mark.parametrize("rule", SMOOTH.values(), ids=list(SMOOTH))
def test_gradients_through_the_reference(rule: Rule, which: str) -> None:
    problem = with_partials(
        make_problem(2, 2, 2, 3, 4, rule=rule, rows=[[0, 1], [1]], concept_lengths=(2, 1), extras=False),
        which,
    )
    tokens = problem.concepts.cast(torch.float64)
    numbers = torch.tensor([1.5, 0.2, 0.1, 0.8, 0.9, 0.7, 0, 0]).repeat(3, 1)
    tokens = dataclasses.replace(tokens, numbers=numbers)
    partials = [t.double().nan_to_num(nan=0.3, neginf=-0.5) for _, p in problem.partials for t in p]

    def attention(query: Tensor, key: Tensor, value: Tensor, *parts: Tensor) -> Tensor:
        made = [fn.Partial(*pair) for pair in zip(parts[::2], parts[1::2])]
        shared = made.pop(0) if problem.shared is not None else None
        prompt = made.pop(0) if problem.prompt is not None else None
        if which == "combine":
            return fn.combine(shared, prompt, made, rule, {"strength": 1.5})
        if prompt is not None:
            key = value = None
        return fn.negated_attention(query, key, value, tokens, rule, shared=shared, prompt=prompt)

    leaves = [problem.query, problem.key, problem.value, *partials]
    leaves = [t.double().detach().clone().requires_grad_() for t in leaves]
    assert torch.autograd.gradcheck(attention, leaves)


@every_kind
def test_a_partial_without_gradient_is_refused_beside_inputs_with_one(which: str) -> None:
    problem = with_partials(make_problem(rule="nag"), which)
    query = problem.query.clone().requires_grad_()
    name = problem.partials[0][0]
    with pytest.raises(ValueError, match=rf"{name}.lse does not require grad.*partial_attention"):
        if which == "combine":
            out = problem.prompt.out.clone().requires_grad_()
            fn.combine(problem.shared, fn.Partial(out, problem.prompt.lse), problem.slots, "nag")
        else:
            key, value = (None, None) if problem.prompt else (problem.key, problem.value)
            fn.negated_attention(
                query, key, value, problem.concepts, "nag", shared=problem.shared, prompt=problem.prompt
            )
    with torch.no_grad():
        run(dataclasses.replace(problem, query=query), "reference")


# ---- what is refused --------------------------------------------------------------------------------


def call(**changes: Any) -> Tensor:
    p = with_partials(make_problem(2, 2, 5, 6, 16, rule="nag"), "shared")
    arguments = {"query": p.query, "key": p.key, "value": p.value, "concepts": p.concepts, "shared": p.shared}
    return fn.negated_attention(**{"rule": "nag", **arguments, **changes})


OUT, LSE = torch.zeros(2, 2, 5, 16), torch.zeros(2, 2, 5)
PARTIAL = fn.Partial(OUT, LSE)
CUT, ODD = OUT[:, :, :4], OUT.mT.contiguous().mT
NO_KEYS = {"key": None, "value": None, "prompt": PARTIAL}


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"shared": OUT}, TypeError, "shared is a Tensor: must be a Partial"),
        ({"shared": (OUT, LSE)}, TypeError, "shared is a tuple: must be a Partial"),
        ({"prompt": PARTIAL}, ValueError, "key is a Tensor: must be None beside prompt"),
        ({"key": None}, TypeError, "key is a NoneType: must be a tensor unless prompt is given"),
        ({"value": None}, TypeError, "value is a NoneType: must be a tensor unless prompt is given"),
        ({"shared": fn.Partial(OUT[:1], LSE)}, ValueError, r"shared.out has shape .*\[2, 2, 5, 16\]"),
        ({"shared": fn.Partial(OUT, LSE[..., None])}, ValueError, r"shared.lse has shape .*\[2, 2, 5\]"),
        ({"shared": fn.Partial(OUT.half(), LSE)}, ValueError, "shared.out has dtype torch.float16: must"),
        ({"shared": fn.Partial(OUT, LSE.double())}, ValueError, "shared.lse has dtype torch.float64: must"),
        ({"shared": fn.Partial(OUT, LSE.half())}, ValueError, "shared.lse has dtype torch.float16: must"),
        ({"shared": fn.Partial(OUT, None)}, TypeError, "shared.lse is a NoneType: must be a tensor"),
        ({"shared": fn.Partial(OUT.to("meta"), LSE)}, ValueError, "shared.out is on meta: must be on cpu"),
        ({"shared": fn.Partial(ODD, LSE)}, ValueError, "shared.out has strides .*the last must be 1"),
        ({**NO_KEYS, "prompt": fn.Partial(CUT, LSE)}, ValueError, "prompt.out has shape"),
        ({**NO_KEYS, "key_bias": LSE}, ValueError, "key_bias is a Tensor: must be None"),
        ({**NO_KEYS, "rule": "protore_retrieve"}, ValueError, "retrieve.*prompt is a partial"),
    ],
)  # fmt: skip
def test_wrong_partials_are_refused_by_name(
    changes: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        call(**changes)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"prompt": OUT}, TypeError, "prompt is a Tensor: must be a Partial"),
        ({"concepts": [OUT]}, TypeError, r"concepts\[0\] is a Tensor: must be a Partial"),
        ({"concepts": [PARTIAL, fn.Partial(OUT[:1], LSE)]}, ValueError, r"concepts\[1\].out has shape"),
        ({"rule": "protore_retrieve"}, ValueError, "retrieve.*concepts is a partial"),
        ({"rule": "mild"}, ValueError, "rule='mild'"),
        ({"numbers": {"force": 1.0}}, TypeError, "numbers has 'force': allowed are strength"),
        ({"numbers": {"cap": 2.0}}, ValueError, r"numbers\['cap'\]=2.0: must be in \[0, 1\]"),
        ({"numbers": {"strength": torch.ones(3, 1)}}, ValueError, r"'strength'\] has shape .*\[2, 1\]"),
        ({"numbers": {"strength": torch.ones(2, 1).double()}}, ValueError, r"'strength'\] is torch.float64"),
        ({"concepts": [], "direction": torch.zeros(1, 2, 16)}, ValueError, "concepts is empty"),
        ({"rule": "casteer"}, ValueError, "direction is None: must be given for a rule that reads it"),
        ({"update": torch.zeros(1, 2, 16)}, ValueError, "direction is None"),
        ({"direction": torch.zeros(2, 2, 16)}, ValueError, r"concepts.direction has shape \[2, 2, 16\]"),
    ],
)  # fmt: skip
def test_wrong_calls_of_combine_are_refused_by_name(
    changes: dict[str, Any], error: type[Exception], said: str
) -> None:
    arguments = {"shared": None, "prompt": PARTIAL, "concepts": [PARTIAL], "rule": "nag", **changes}
    with pytest.raises(error, match=said):
        fn.combine(**arguments)


def test_concept_tokens_of_another_batch_are_refused() -> None:
    tokens = make_problem(2, 2, 5, 6, 16).concepts
    own = fn.ConceptTokens.from_activations(
        tokens.key.expand(3, -1, -1, -1), tokens.value.expand(3, -1, -1, -1), tokens
    )
    with pytest.raises(
        ValueError, match=r"concepts.key has shape .*\[2, T, 2, 16\] where each row has its own"
    ):
        call(concepts=own, shared=None)
    for key in (tokens.key[:-1], tokens.key.expand(2, -1, -1, -1)[:, 1:], tokens.key[0]):
        with pytest.raises(ValueError, match=r"key has shape .* must have the 23 tokens of layout"):
            fn.ConceptTokens.from_activations(key, key, tokens)
    mixed = fn.ConceptTokens.from_activations(tokens.key, tokens.value.expand(2, -1, -1, -1), tokens)
    with pytest.raises(ValueError, match=r"concepts\.value has shape"):
        call(concepts=mixed, shared=None)


@pytest.mark.parametrize("which", (*PARTIALS, "own"))
def test_cuda_refuses_what_it_has_not(which: str) -> None:
    """A plan that was asked for without a question is refused as well: the kernel would read other keys."""
    problem = make_problem(rule="nag", dtype=torch.bfloat16)
    if which == "own":
        tokens = problem.concepts
        own = fn.ConceptTokens.from_activations(
            tokens.key.expand(3, -1, -1, -1), tokens.value.expand(3, -1, -1, -1), tokens
        )
        problem, said = (
            dataclasses.replace(problem, concepts=own),
            "concept keys of each batch row's own are not",
        )
    else:
        problem = with_partials(problem, which)
        said = "shared is a Partial, which is not" if problem.shared else "prompt is a Partial, which is not"
    with pytest.raises(fn.BackendError, match=said):
        cuda.plan(problem, False)


def test_words_that_do_not_go_together() -> None:
    for word in ("inside", "outside"):
        with pytest.raises(ValueError, match=f"shared='{word}': must be 'joint' with combine='joint'"):
            Rule(combine="joint", shared=word)
    with pytest.raises(
        ValueError, match="shared='joint': must be 'joint' with combine='joint', and only with it"
    ):
        Rule(shared="joint")
    with pytest.raises(ValueError, match="shared='beside': allowed are inside, joint, outside"):
        Rule(shared="beside")
    assert Rule().shared == "inside" and Rule(combine="joint").shared == "joint"
    assert repr(Rule(combine="joint")) == "Rule(combine='joint')"
    assert repr(Rule(shared="outside")) == "Rule(shared='outside')"


def test_presets_say_which_segments_hold_shared_keys() -> None:
    said = {name: rule.shared for name, rule in fn.presets().items()}
    assert said == {
        "protore": "outside", "protore_retrieve": "outside", "eiup": "outside", "nasa": "outside",
        "nag": "inside", "ong": "inside", "casteer": "inside", "vsf": "joint",
    }  # fmt: skip
    ours = Rule.preset("nag", shared="outside")
    assert ours.name == "nag[shared=outside]" and ours.shared == "outside"
    assert Rule.preset("eiup", combine="joint").shared == "joint"
    assert dataclasses.replace(Rule.preset("vsf"), combine="separate").shared == "inside"
    assert dataclasses.replace(Rule(), combine="joint").shared == "joint"
    with pytest.raises(ValueError, match="shared='outside'"):
        dataclasses.replace(Rule.preset("nasa"), combine="joint")
    assert Rule.preset("protore", shared=None).name == "protore[shared=inside]"


# ---- the public calls -------------------------------------------------------------------------------


@every_backend
def test_combine_is_negated_attention_on_partials(backend: str) -> None:
    """The public call, with numbers of every form, is the problem in which all segments are partials."""
    problem = with_partials(make_problem(rule="casteer", rows="same", extras=False), "combine")
    tokens = problem.concepts
    strength = torch.tensor([[0.5, torch.nan, 2.0]])
    numbers = tokens.numbers.clone().reshape(3, 3, -1)
    numbers[:, :, 0], numbers[:, :, 2] = strength, -1.5
    expected = run(with_concepts(problem, numbers=numbers.flatten(0, 1)), backend)
    name = backend.partition("-")[0]
    output = fn.combine(
        problem.shared, problem.prompt, problem.slots, "casteer", {"strength": strength, "threshold": -1.5},
        direction=tokens.direction, backend=name,
    )  # fmt: skip
    if backend in ("reference", CPU_BACKENDS[0]):
        assert torch.equal(output, expected)


def test_combine_of_directions_alone() -> None:
    """A rule that reads no tokens needs no partial of a concept."""
    problem = with_partials(make_problem(rule="casteer", rows="same", extras=False), "both")
    none = problem.query[:, :, :0]
    expected = fn.negated_attention(
        problem.query, None, None, problem.concepts, "casteer", shared=problem.shared, prompt=problem.prompt
    )
    assert none.numel() == 0
    direction = problem.concepts.direction
    assert torch.equal(
        fn.combine(problem.shared, problem.prompt, [], "casteer", direction=direction), expected
    )


def test_explain_knows_partials() -> None:
    p = with_partials(make_problem(rule="nag"), "both")
    text = fn.explain(p.query, None, None, p.concepts, "nag", shared=p.shared, prompt=p.prompt)
    assert "cpu: chosen" in text or not CPU_BACKENDS


@every_backend
def test_shares_are_of_shared_keys(backend: str) -> None:
    """0 without them; heat of a rule whose gate says nothing is that of shares."""
    problem = make_problem(rule="nag", rows="same")
    without = run_with_statistics(problem, backend)[1]
    assert (
        (without.concept_share == 0).all() and (without.text_share == 0).all() and (without.heat == 1).all()
    )
    shared = with_partials(problem, "shared")
    shared.shared.lse.fill_(3.0)
    seen = run_with_statistics(shared, backend)[1]
    assert (0 < seen.concept_share).all() and (seen.concept_share < 1).all() and (seen.text_share > 0).all()
    torch.testing.assert_close(seen.heat.mean(1), seen.concept_share, rtol=1e-5, atol=0)
    gated = with_rule(shared, similarity="mass", gate="step", threshold=-1.0)
    assert (run_with_statistics(gated, backend)[1].heat == 1).all()
