# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel computes the definition: run by test_triton.py under Triton's interpreter, which has
to be chosen before Triton is imported and cannot share a process with its compiler.

What does not depend on the backend is tested in test_attention.py; here are the kernel's own branches.
Every launch of every test runs in the corrected interpreter, with its accesses checked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import interpreter
import pytest
import torch
from support import DTYPES, RULES, Judge, fair, pairwise, plain, with_concepts, with_rule
from torch import Tensor

import fastnegate as fn
from fastnegate.operator import reference
from fastnegate.operator.backends import triton as backend
from fastnegate.operator.problem import Problem
from fastnegate.operator.rule import COMBINES, GATES, SELECTS, Rule
from fastnegate.testing import problems
from fastnegate.testing.problems import PARTIALS, with_partials

torch.set_num_threads(1)
FEATURE_MAX = Rule(
    "cosine", "ramp", "projection", select="max", norm="limit", norm_order=1, scope="feature", strength=2.0
)
SUPPORTED = {name: rule for name, rule in RULES.items() if rule.direction != "retrieve"}

FACTORS = {
    "rule": tuple(SUPPORTED),
    "dtype": DTYPES,
    "dim": (16, 32, 40, 64, 72, 80, 88, 96, 112, 128, 160, 256),
    "queries": (1, 17),
    "keys": (0, 7, 77, 130),
    "layout": ("bnhd", "broadcast", "odd"),
    "mask": ("none", "padding", "additive"),
    "rows": ("same", "mixed", "zero_tokens", "inactive"),
    "concept_lengths": ((8, 3, 12), (4, 70, 2)),
    "statistics": (False, True),
}
# By default one dimension of each padded size, whole and not; a kernel of each is compiled besides.
FEW_DIMENSIONS = (16, 40, 64, 88, 128, 160)
GRID = [
    *(pytest.param(case) for case in pairwise({**FACTORS, "dim": FEW_DIMENSIONS})),
    *(pytest.param(case, marks=pytest.mark.full) for case in pairwise(FACTORS)),
]


def make_problem(batch: int = 3, heads: int = 2, queries: int = 18, *sizes: int, **words: Any) -> Problem:
    """With one whole tile of queries and a part of another, unless said otherwise."""
    return problems.make_problem(batch, heads, queries, *sizes, **words)


@pytest.fixture(autouse=True)
def memory() -> Iterator[interpreter.Memory]:
    with interpreter.checked("out", "moments", "norms", "trace_entries", "trace_rows") as memory:
        yield memory


def supports(problem: Problem) -> str | None:
    """As the backend, which refuses bfloat16 because of the interpreter as it comes."""
    reason = backend.supports(problem)
    return None if reason is not None and "interpreter computes bfloat16" in reason else reason


@pytest.mark.parametrize("case", GRID, ids=lambda case: "-".join(map(str, case.values())))
def test_grid(case: dict, memory: interpreter.Memory) -> None:
    made = {name: value for name, value in case.items() if name != "statistics"}
    made["rule"] = SUPPORTED[case["rule"]]
    judge = fair(make_problem(**made, seed=seed) for seed in range(5))
    problem = judge.problem
    assert supports(problem) is None
    if case["statistics"]:
        output, tables = backend.run_with_statistics(problem)
        judge.check_statistics(tables.named, "triton")
    else:
        output = backend.run(problem)
    judge.check(output, "triton")
    assert output.transpose(1, 2).is_contiguous()
    written = {name: size for name, size in memory.written.items() if name.startswith("out")}
    assert list(written.values()) == [output.numel() * output.element_size()]  # once


@pytest.mark.parametrize("select", ("all", "max"))
@pytest.mark.parametrize("combine", ("separate", "joint"))
@pytest.mark.parametrize("norm", ("none", "limit", "preserve"))
def test_three_launches(select: str, combine: str, norm: str) -> None:
    """Scope `feature` with gates that need sums over heads, and a norm that needs the gates."""
    direction = "raw" if combine == "joint" else "projection"
    rule = Rule(
        "cosine", "ramp", direction, combine, select, norm, norm_limit=1.1, scope="feature", strength=1.5
    )
    problem = make_problem(rule=rule, dim=16)
    assert backend.plan(problem, False).describe().endswith("launches" if norm == "none" else "3 launches")
    Judge(problem).check(backend.run(problem), "triton")


@pytest.mark.parametrize("dim, keys", ((24, 130), (128, 5), (160, 33), (256, 17)))
def test_sizes(dim: int, keys: int) -> None:
    """Padded head dimensions, and prompts and concepts of several tiles."""
    problem = make_problem(1, 1, 20, keys, dim, rows="same", concept_lengths=(70, 1))
    Judge(problem).check(backend.run(problem), "triton")


def test_long_sums_of_float32() -> None:
    """256 products, and as many rows as make the budget depend on what torch makes of them."""
    problem = make_problem(
        2, 3, 45, 77, 256, rule=RULES["vsf"], layout="bnhd", mask="additive", concept_lengths=(4, 20, 2)
    )
    Judge(problem).check(backend.run(problem), "triton")


@pytest.mark.parametrize("rule", ("protore", "vsf", FEATURE_MAX), ids=("protore", "vsf", "feature"))
def test_row_without_entries_is_plain_attention(rule: Rule | str) -> None:
    problem = make_problem(rule=rule, mask="additive")
    z = backend.run(plain(problem))
    output = backend.run(problem)
    assert torch.equal(output[1], z[1])  # lists nothing
    assert not torch.equal(output[0], z[0])
    inactive = with_concepts(problem, numbers=problem.concepts.numbers.clone())
    inactive.concepts.active.zero_()
    assert torch.equal(backend.run(inactive), z)
    masked = with_concepts(problem, token_bias=torch.full_like(problem.concepts.token_bias, -torch.inf))
    assert torch.equal(backend.run(masked), z)


@pytest.mark.parametrize("rule", ("protore", FEATURE_MAX), ids=("head", "feature"))
def test_row_does_not_depend_on_other_rows(rule: Rule | str) -> None:
    problem = make_problem(rule=rule, rows=[[0, 2], [1], [2]])
    alone = make_problem(rule=rule, rows=[[0, 2], [], []])
    assert torch.equal(backend.run(problem)[0], backend.run(alone)[0])


@pytest.mark.parametrize("rule", ("protore", "nag", "vsf"))
@pytest.mark.parametrize("name", ("key", "value"))
def test_nan_in_a_concept_shows(name: str, rule: str) -> None:
    """It never comes out as if nothing were negated."""
    problem = with_concepts(make_problem(rule=rule, rows=[[0, 1], [1], []]), token_bias=None)
    spoiled = getattr(problem.concepts, name).clone()
    spoiled[0] = torch.nan  # the first token of the first concept
    output = backend.run(with_concepts(problem, **{name: spoiled}))
    assert output[0].isnan().any(-1).all()
    assert torch.equal(output[1:], backend.run(problem)[1:])


def test_masked_tokens_are_absent() -> None:
    problem = make_problem(mask="padding", rows="same")
    expected = backend.run(problem)
    concepts = problem.concepts
    key, value = problem.key.clone(), problem.value.clone()
    gone = (problem.key_bias == -torch.inf).expand(*key.shape[:2], 1, -1).squeeze(2)
    assert gone.all(-1).any() and not gone.all()
    key[gone], value[gone] = torch.nan, torch.inf
    concept_key, concept_value = concepts.key.clone(), concepts.value.clone()
    masked = concepts.token_bias == -torch.inf
    assert masked.any() and not masked.all()
    concept_key[masked], concept_value[masked] = torch.nan, torch.inf
    spoiled = with_concepts(problem, key=concept_key, value=concept_value)
    spoiled = dataclasses.replace(spoiled, key=key, value=value)
    assert torch.equal(backend.run(spoiled), expected)
    fully_masked = gone.all(-1).all(-1)
    assert not backend.run(plain(spoiled))[fully_masked].any()


def test_key_bias_of_any_stride_and_dtype() -> None:
    problem = make_problem(mask="additive")
    expected = backend.run(problem)
    spread = problem.key_bias.repeat_interleave(2, -1)[..., ::2]
    assert spread.stride(-1) == 2
    assert torch.equal(backend.run(dataclasses.replace(problem, key_bias=spread)), expected)
    half = dataclasses.replace(problem, key_bias=problem.key_bias.half())
    Judge(half).check(backend.run(half), "triton")


@pytest.mark.parametrize("select", ("all", "max"))
def test_closed_gates_have_no_part_in_joint(select: str) -> None:
    """However large the logits of the concept are."""
    rule = Rule(gate="step", combine="joint", select=select, threshold=2.0, logit_bias=-1000.0)
    opened = {"concept": 1, "threshold": 0.5, "logit_bias": 0.0}
    problem = make_problem(rule=rule, rows=[[0, opened], [0], []])
    Judge(problem).check(backend.run(problem), "triton")


@pytest.mark.parametrize("dtype", DTYPES)
def test_joint_with_tiny_gates(dtype: torch.dtype) -> None:
    """Without a prompt the concepts share all mass, however small their gates are."""
    rows = [[{"concept": 0, "active": 1e-31}], [{"concept": 1, "active": 1e-33}, 2], []]
    problem = make_problem(keys=0, rule="vsf", rows=rows, dtype=dtype, extras=False)
    Judge(problem).check(backend.run(problem), "triton")


@pytest.mark.parametrize("rule", ("none", "closed"))
@pytest.mark.parametrize("scale", (0.25, 1.0))
def test_lowest_bias_is_a_number(rule: str, scale: float) -> None:
    """A prompt masked with the lowest float32 instead of -inf has a softmax, next to closed gates too."""
    problem = make_problem(rule=Rule(gate="step", combine="joint", threshold=2.0), rows=[[0, 1]] * 3)
    lowest = torch.full((1, 1, 1, problem.key.shape[2]), torch.finfo(torch.float32).min)
    problem = dataclasses.replace(problem, key_bias=lowest, scale=scale)
    mean = problem.value.mean(2, keepdim=True).expand_as(problem.query)
    torch.testing.assert_close(backend.run(plain(problem) if rule == "none" else problem), mean)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("select", SELECTS)
@pytest.mark.parametrize("combine", COMBINES)
def test_similarity_that_is_nan_shows(combine: str, select: str, gate: str) -> None:
    """From a concept that holds one: negation that cannot be computed must not be left out."""
    direction = "difference" if combine == "separate" else "raw"
    rule = Rule("direction", gate, direction, combine, select=select)
    problem = make_problem(rule=rule, rows=[[0, 1], [1, 2], [2, 0]], dtype=torch.float16)
    offset = torch.zeros(3)
    offset[1] = torch.nan
    output, tables = backend.run_with_statistics(with_concepts(problem, offset=offset))
    assert output[:2].isnan().all() and output[2].isfinite().all()
    gates = tables.named.gate_max
    assert gates.isnan().tolist() == [False, True, True, False, False, False] and not gates.isinf().any()


def test_ties_of_max() -> None:
    """Equal gates: larger r, then the lower concept, then the first entry."""
    rule = Rule("direction", "open", "fixed", select="max", strength=1.0)
    problem = make_problem(rule=rule, batch=1, extras=False)

    def run(rows: list, **changes: torch.Tensor) -> torch.Tensor:
        again = make_problem(rule=rule, batch=1, extras=False, rows=[rows])
        return backend.run(with_concepts(again, **changes))

    first, second = {"concept": 1, "strength": 0.5}, {"concept": 1, "strength": 2.0}
    assert torch.equal(run([first, second]), run([first]))
    assert torch.equal(run([second, first]), run([second]))
    same = {"direction": problem.concepts.direction[:1].expand(3, -1, -1)}
    assert torch.equal(run([{"concept": 2, "strength": 2.0}, first], **same), run([first], **same))
    larger = {**same, "offset": torch.tensor([0.0, 1.0, 2.0])}
    assert torch.equal(run([first, 2, 0], **larger), run([2], **larger))


@pytest.mark.parametrize("begin, end", ((-5, 5), (2**31 - 1, 2**31 - 1), (-(2**31), -(2**31))))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_indices_are_clamped(dtype: torch.dtype, begin: int, end: int) -> None:
    """As in the reference, and nothing outside the arrays is read: NaN surrounds them."""
    problem = make_problem(rule="eiup", rows="same", dtype=dtype)
    concepts = problem.concepts
    entries, count = concepts.entries, concepts.concepts
    index = concepts.index.clone()
    index[0], index[1] = 99, -99  # concepts
    index[entries], index[entries + 1] = -7, concepts.tokens - 1  # begins
    index[entries + count : entries + 2 * count] = 10**6  # lengths
    index[-4], index[-1] = begin, end  # rows
    padded = {}
    for name in ("key", "value", "token_bias", "token_weight", "direction", "update", "offset", "numbers"):
        tensor = getattr(concepts, name)
        room = torch.full((len(tensor) + 64, *tensor.shape[1:]), torch.nan, dtype=tensor.dtype)
        padded[name] = room[32:-32].copy_(tensor)
    corrupt = with_concepts(problem, index=index, **padded)
    Judge(corrupt).check(backend.run(corrupt), "triton")


@pytest.mark.parametrize("rule", ("protore", FEATURE_MAX), ids=("head", "feature"))
def test_active_that_is_nan_stands_for_one(rule: Rule | str) -> None:
    problem = make_problem(1, 2, 5, rule=rule, rows=[[0, 1]])
    nan, one = (with_concepts(problem, numbers=problem.concepts.numbers.clone()) for _ in range(2))
    nan.concepts.active.fill_(torch.nan)
    one.concepts.active.fill_(1.0)
    assert torch.equal(backend.run(nan), backend.run(one))


# ---- partials ---------------------------------------------------------------------------------------

MERGED = {
    "protore": Rule.preset("protore"),
    "nag": Rule.preset("nag"),
    "nag-outside": Rule.preset("nag", shared="outside", scope="head"),
    "vsf": Rule.preset("vsf"),
    "casteer": Rule.preset("casteer"),
    "mass-preserve": RULES["mass-preserve"],
    "feature-outside": dataclasses.replace(FEATURE_MAX, shared="outside"),
    "joint-max": RULES["joint-max"],
}
GRID_OF_PARTIALS = list(
    pairwise(
        {
            "rule": tuple(MERGED),
            "which": PARTIALS,
            "dtype": DTYPES,
            "heads": (1, 2, 3),
            "dim": (16, 40, 80),
            "keys": (0, 7, 77),
            "layout": ("bnhd", "odd"),
            "statistics": (False, True),
        }
    )
)


@pytest.mark.parametrize("case", GRID_OF_PARTIALS, ids=lambda case: "-".join(map(str, case.values())))
def test_grid_of_partials(case: dict, memory: interpreter.Memory) -> None:
    case = dict(case)
    rule, which, statistics = MERGED[case.pop("rule")], case.pop("which"), case.pop("statistics")
    judge = fair(
        with_partials(make_problem(2, queries=18, rule=rule, **case, seed=s), which) for s in range(5)
    )
    problem = judge.problem
    assert supports(problem) is None
    if statistics:
        output, tables = backend.run_with_statistics(problem)
        judge.check_statistics(tables.named, "triton")
    else:
        output = backend.run(problem)
    judge.check(output, f"triton {which}")
    if which == "combine":
        check_bytes(problem, memory)


def check_bytes(problem: Problem, memory: interpreter.Memory) -> None:
    """What `combine` reads and writes are the rows that there are, once."""
    batch, heads, _, _, dim = problem.sizes
    concepts, size = problem.concepts, problem.query.element_size()
    index, rows = concepts.index.tolist(), concepts.index[-batch - 1 :].tolist()
    partials = {"shared_out": problem.shared, "prompt_out": problem.prompt}
    slots = {f"slot_outs.{i}": slot for i, slot in enumerate(problem.slots)}
    has = torch.zeros(len(slots), batch, dtype=torch.bool)
    for b in range(batch):
        for e in range(rows[b], rows[b + 1]):
            has[index[e], b] = concepts.active[e] > 0
    for name, partial in (partials | slots).items():
        there, of_lse = partial.lse != -torch.inf, partial.lse.numel()
        if name in slots:
            listed = has[int(name[10:])]
            of_lse = int(listed.sum()) * heads * partial.lse.shape[2]
            there = there & listed[:, None, None] & problem.rule.reads.tokens
        assert memory.read[name] == there.sum() * dim * size, name
        assert memory.read[name.replace("out", "lse")] == 4 * of_lse, name
    assert memory.written["out"] == problem.query.numel() * size


def without_keys(problem: Problem, *names: str) -> Problem:
    changes = {}
    for name in names:
        partial = getattr(problem, name)
        nothing = torch.full_like(partial.lse, -torch.inf)
        changes[name] = partial._replace(out=torch.full_like(partial.out, torch.nan), lse=nothing)
    return dataclasses.replace(problem, **changes)


@pytest.mark.parametrize("rule", MERGED)
def test_shared_without_keys_changes_no_bit(rule: str) -> None:
    problem = make_problem(2, queries=5, rule=MERGED[rule], mask="padding")
    nothing = without_keys(with_partials(problem, "shared"), "shared")
    assert torch.equal(backend.run(nothing), backend.run(problem))


@pytest.mark.parametrize("rule", ("nag", "nag-outside", "vsf"))
@pytest.mark.parametrize("which", PARTIALS)
def test_without_an_entry_it_is_the_merge(which: str, rule: str) -> None:
    """Of a row, and with `combine` of a query, as without concepts, where another kernel merges."""
    problem = with_partials(make_problem(2, queries=10, rule=MERGED[rule], rows=[[0], []]), which)
    gone = torch.zeros(10, dtype=torch.bool)
    if which == "combine":
        gone[2:9] = True
        problem.slots[0].lse[:, :, gone] = -torch.inf
    expected = backend.run(dataclasses.replace(plain(problem), slots=None))
    output = backend.run(problem)
    assert torch.equal(output[1], expected[1]) and torch.equal(output[0][:, gone], expected[0][:, gone])
    assert not torch.equal(output[0], expected[0])


@pytest.mark.parametrize("rule", ("protore", "nag", "nag-outside"))
@pytest.mark.parametrize("which", ("shared", "both"))
def test_without_a_prompt_outside_is_what_is_shared(which: str, rule: str) -> None:
    problem = with_partials(make_problem(rule=MERGED[rule], rows=[[0], [0], []], keys=0, queries=5), which)
    problem.shared.lse.nan_to_num_(neginf=1.0)
    problem.shared.out.nan_to_num_(nan=0.5)
    output, left = backend.run(problem), 3 if problem.rule.shared == "outside" else 1
    assert torch.equal(output[-left:], problem.shared.out[-left:])


@pytest.mark.parametrize("which", PARTIALS)
def test_partial_that_is_nan_shows(which: str) -> None:
    """In the queries that have it: a log-sum-exp that is NaN is no missing partial."""
    problem = with_partials(make_problem(2, queries=10, rule="nag", rows=[[0], [1]]), which)
    for part in range(1 if which == "prompt" else 2):  # of the only segment nobody reads the mass
        for name, partial in problem.partials:
            kept = partial[part].clone()
            partial[part][:, :, 8] = torch.nan  # a query that has keys everywhere
            output = backend.run(problem)
            shows = {"concepts[0]": [True, False], "concepts[1]": [False, True], "concepts[2]": [False] * 2}
            assert output[:, :, 8].isnan().any(-1).all(-1).tolist() == shows.get(name, [True] * 2)
            assert output[:, :, torch.arange(10) != 8].isfinite().all()
            partial[part].copy_(kept)


def test_lowest_log_sum_exp_is_a_number() -> None:
    problem = with_partials(make_problem(2, queries=10, rule="nag", rows="same"), "combine")
    for name in ("shared", "prompt"):
        out, lse = (t.clone() for t in getattr(problem, name))
        lse[:, :, 2:6] = torch.finfo(torch.float32).min
        low = dataclasses.replace(problem, **{name: fn.Partial(out.nan_to_num(), lse)})
        output = backend.run(low)
        assert output.isfinite().all()
        torch.testing.assert_close(output, reference.run(low), rtol=1e-4, atol=1e-5)


def test_merge_is_exact_beside_large_values() -> None:
    generator = torch.Generator().manual_seed(0)
    small = torch.randn(1, 2, 40, 40, generator=generator)
    large, lse = 1e4 * small.flip(2), torch.rand(1, 2, 40, generator=generator)
    none = small[:, :, :0]
    shared, prompt = fn.Partial(large, lse), fn.Partial(small, lse + 10)
    problem = Problem(small, none, none, None, None, Rule(), 1.0, shared, prompt)
    share = torch.sigmoid(lse.double() - prompt.lse.double())[..., None]
    truth, size = share * large + (1 - share) * small, share * large.abs() + (1 - share) * small.abs()
    error = (backend.run(problem) - truth).abs() / size.amax(-1, keepdim=True)
    assert error.max() <= 8 * torch.finfo(torch.float32).eps


def test_concept_tokens_of_each_rows_own() -> None:
    problem = make_problem(2, rows=[[0, 1], [1]], concept_lengths=(8, 3), queries=20)
    tokens = problem.concepts
    other = make_problem(2, rows="same", concept_lengths=(8, 3), seed=5).concepts
    key, value = torch.stack([tokens.key, other.key]), torch.stack([tokens.value, other.value])
    own = with_concepts(problem, key=key, value=value)
    output = backend.run(own)
    Judge(own).check(output, "triton own tokens")
    second = backend.run(with_concepts(problem, key=other.key, value=other.value))
    assert torch.equal(output[0], backend.run(problem)[0]) and torch.equal(output[1], second[1])


def test_slots_of_any_strides() -> None:
    problem = with_partials(make_problem(rule="nag", rows="same", queries=20), "combine")

    def apart(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    first, *others = problem.slots
    moved = dataclasses.replace(problem, slots=(fn.Partial(apart(first.out), apart(first.lse)), *others))
    assert torch.equal(backend.run(moved), backend.run(problem))


def test_combine_without_slots() -> None:
    """For a rule that reads no tokens."""
    problem = with_partials(make_problem(rule="casteer", rows="same", queries=20), "both")
    alone = dataclasses.replace(problem, slots=())
    output = backend.run(alone)
    Judge(alone).check(output, "triton")
    assert (
        backend.plan(alone, False).describe()
        == "tiles of 16 queries and 2 heads, 8 warps, 6 programs, 1 launch"
    )


@pytest.mark.parametrize(
    "problem, reason",
    (
        (make_problem(dtype=torch.bfloat16), "interpreter computes bfloat16"),
        (make_problem(dtype=torch.float64), "float64"),
        (make_problem(mask="per_query"), "key_bias"),
        (make_problem(rule="protore_retrieve"), "retrieve"),
        (make_problem(dim=8), "head_dim=8"),
        (make_problem(dim=20), "head_dim=20"),
        (make_problem(dim=264), "head_dim=264"),
        (dataclasses.replace(make_problem(), scale=-1.0), "scale=-1"),
    ),
    ids=lambda x: x.replace(" ", "-") if isinstance(x, str) else "",
)
def test_refusals_name_the_reason(problem, reason: str) -> None:
    assert reason in backend.supports(problem)
    with pytest.raises(fn.BackendError, match=reason):
        fn.negated_attention(
            problem.query, problem.key, problem.value, problem.concepts, problem.rule,
            scale=problem.scale, key_bias=problem.key_bias, backend="triton",
        )  # fmt: skip


def test_public_operator() -> None:
    """Through the registered operator; empty problems are not launched."""
    problem = make_problem()
    call = (problem.query, problem.key, problem.value, problem.concepts)
    output = fn.negated_attention(*call, with_rule(problem).rule, backend="triton")
    assert torch.equal(output, backend.run(problem))
    empty = make_problem(queries=0)
    output, statistics = backend.run_with_statistics(empty)
    assert output.shape == empty.query.shape
    assert all(t.isfinite().all() and not t.any() for t in statistics)
