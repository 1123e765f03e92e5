# SPDX-License-Identifier: Apache-2.0
"""Prepare once, run many: which calls share a plan, what a call costs the host, who sees it."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import sys
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support import CPU_BACKENDS, Judge, make_problem, plain, with_concepts, with_rule
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastnegate as fn
from fastnegate.operator import plan as planning
from fastnegate.operator import registration as ops
from fastnegate.operator.backends import cpu
from fastnegate.operator.plan import Plans, plans
from fastnegate.operator.problem import Problem
from fastnegate.operator.rule import Rule

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not CPU_BACKENDS, reason="the CPU kernel is not part of this install"),
]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    plans.clear()
    yield
    plans.clear()


def call(p: Problem, **changes: Any) -> Tensor:
    options = {"scale": p.scale, "key_bias": p.key_bias, "backend": "cpu", **changes}
    return fn.negated_attention(p.query, p.key, p.value, p.concepts, p.rule, **options)


def small(**changes: Any) -> Problem:
    return make_problem(
        **{"batch": 2, "heads": 2, "queries": 8, "keys": 8, "dim": 16, "rows": "same", **changes}
    )


def moved(problem: Problem) -> Problem:
    """The same call with other values in other memory, as the next layer or step makes it."""
    tensors = {name: getattr(problem, name) * 0.5 for name in ("query", "key", "value")}
    numbers = problem.concepts.numbers.clone()
    numbers[:, 0] = 0.25
    return dataclasses.replace(with_concepts(problem, numbers=numbers), **tensors)


# ---- what shares a plan -----------------------------------------------------------------------------


def test_a_plan_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = small()
    call(problem)
    monkeypatch.setattr(cpu, "CpuPlan", None)
    other = moved(problem)
    Judge(other).check(call(other), "cpu")
    assert len(plans) == 1


def renamed(problem: Problem) -> Problem:
    return with_rule(problem, name="another", tokens="none", stop=0.5)


def test_names_make_no_plan() -> None:
    call(small())
    call(renamed(small()))
    assert len(plans) == 1


CHANGES: dict[str, Callable[[Problem], Problem]] = {
    "rule": lambda p: with_rule(p, strength=0.5),
    "scale": lambda p: dataclasses.replace(p, scale=0.3),
    "queries": lambda p: dataclasses.replace(p, query=p.query[:, :, 1:]),
    "dtype": lambda p: dataclasses.replace(
        with_concepts(p, key=p.concepts.key.half(), value=p.concepts.value.half()),
        query=p.query.half(), key=p.key.half(), value=p.value.half(),
    ),
    "strides": lambda p: dataclasses.replace(p, key=torch.stack([p.key, p.key], 1)[:, 0]),
    "strides of a concept": lambda p: with_concepts(
        p, key=torch.stack([p.concepts.key, p.concepts.key], 1)[:, 0]
    ),
    "no key_bias": lambda p: dataclasses.replace(p, key_bias=None),
    "key_bias per query": lambda p: dataclasses.replace(p, key_bias=p.key_bias.expand(-1, -1, 8, -1)),
    "an optional tensor": lambda p: with_concepts(p, token_bias=None),
    "capacity": lambda p: with_concepts(p, longest=p.concepts.longest + 1),
    "no concepts": plain,
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_plan_depends_on_makes_a_new_one(change: str) -> None:
    problem = small(mask="padding")
    call(problem)
    other = CHANGES[change](problem)
    output = call(other)
    assert len(plans) == 2
    plans.clear()
    assert torch.equal(call(other), output)


def test_a_misaligned_concept_makes_a_new_one() -> None:
    """A kernel reads two numbers at a time: such a tensor is copied first."""
    problem = small(rule="casteer")
    room = torch.empty(problem.concepts.direction.numel() + 1)[1:]
    other = with_concepts(
        problem, direction=room.view_as(problem.concepts.direction).copy_(problem.concepts.direction)
    )
    assert torch.equal(call(problem), call(other)) and len(plans) == 2


@pytest.mark.parametrize("statistics", (False, True))
def test_in_place_changes_show_without_a_new_plan(statistics: bool) -> None:
    problem, seen = small(rule="nasa"), []
    function = fn.negated_attention_with_statistics if statistics else fn.negated_attention
    for change in (
        lambda: None,
        lambda: problem.concepts.strength.fill_(0.25),
        lambda: problem.concepts.active.zero_(),
        lambda: problem.query.mul_(0.5),
    ):
        change()
        output = function(*problem.operands[:3], problem.concepts, problem.rule, backend="cpu")
        output = output[0] if statistics else output
        assert not any(torch.equal(output, before) for before in seen)
        seen.append(output)
    assert len(plans) == 1


def test_memory_that_moves_is_seen() -> None:
    """What is kept of concepts are addresses, too: a stale one would be read after it was freed."""
    problem = small(rule="nasa")
    tokens = problem.concepts
    before = call(problem)
    tokens.value.data = tokens.value * 2
    assert not torch.equal(call(problem), before)
    tokens.value.set_(torch.zeros_like(tokens.value))
    moved = call(problem)
    plans.clear()
    assert torch.equal(moved, call(with_concepts(problem, value=torch.zeros_like(tokens.value))))


@pytest.mark.parametrize("how", (copy.copy, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))))
def test_copies_are_looked_at_anew(how: Callable[[Any], Any]) -> None:
    problem = small()
    expected = call(problem)
    copied = how(problem.concepts)
    assert "found" not in vars(copied)
    assert torch.equal(call(dataclasses.replace(problem, concepts=copied)), expected)


def test_a_plan_holds_no_tensor() -> None:
    problem = small()
    call(problem, backend="cpu")
    held = [weakref.ref(t) for t in (problem.query, problem.key, problem.concepts.key, problem.concepts)]
    del problem
    gc.collect()
    assert len(plans) == 1 and not any(ref() is not None for ref in held)


def test_plans_are_forgotten_oldest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "most", 2)
    for queries in (4, 5, 6):
        call(small(queries=queries))
    made = [*plans]
    call(small(queries=6))
    assert [*plans] == made and len(plans) == 2
    call(small(queries=4))
    assert len({*plans} & {*made}) == 1


def test_plans_of_several_threads() -> None:
    few = Plans(most=8)

    def work(start: int) -> None:
        for i in range(start, start + 500):
            few.add(i % 23, i)  # type: ignore[arg-type]
            assert few.get(i % 29) is None or len(few) <= 8

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, (0, 7, 100, 1000)))
    assert len(few) == 8


def test_layouts_are_forgotten_and_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastnegate.operator import problem

    monkeypatch.setattr(problem, "_MOST_LAYOUTS", 1)
    monkeypatch.setattr(problem, "_layouts", {})
    one, two = small(), small(concept_lengths=(3, 4, 5))
    expected = [call(one), call(two)]
    for _ in range(2):
        again = [call(with_concepts(p, longest=p.concepts.longest)) for p in (one, two)]
        assert all(torch.equal(a, b) for a, b in zip(again, expected))


def test_plans_describe_themselves() -> None:
    problem = small()
    call(problem)
    (plan,) = plans
    assert plan.backend == "cpu" and plan.describe() in repr(plan)
    assert "1 thread, tiles of " in plan.describe()
    said = fn.explain(problem.query, problem.key, problem.value, problem.concepts, problem.rule)
    assert f"  cpu: chosen: {plan.describe()}" in said


# ---- what a call costs ------------------------------------------------------------------------------

CALLS = 8  # of Python, from `negated_attention` to the extension


@pytest.mark.parametrize("backend", ("cpu", "auto"))
@pytest.mark.parametrize("concepts", (True, False))
def test_few_python_calls_lead_to_the_extension(backend: str, concepts: bool) -> None:
    problem = small() if concepts else plain(small())
    seen: list[str] = []

    def watch(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            seen.append(frame.f_code.co_name)
        elif event == "c_call" and getattr(argument, "__name__", "") == "run_cpu":
            seen.append("the extension")

    with torch.inference_mode():
        call(problem, backend=backend)
        sys.setprofile(watch)
        try:
            call(problem, backend=backend)
        finally:
            sys.setprofile(None)
    way = seen[seen.index("negated_attention") : seen.index("the extension")]
    assert len(way) <= CALLS, way


def test_nothing_is_asked_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the choice of a backend nor checks: the plan has them behind it."""
    problem = small()
    call(problem, backend="auto")
    for module, name in ((fn.operator.checks, "problem"), (fn.operator.choice, "choose"), (cpu, "supports")):
        monkeypatch.setattr(module, name, lambda *arguments: pytest.fail("it was asked again"))
    call(problem, backend="auto")


# ---- who sees the operator --------------------------------------------------------------------------


class Recorded(TorchDispatchMode):
    """Names of the operations of torch that are executed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(op))
        return op(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", (Recorded, Functions))
def test_modes_see_the_operator(mode: type[Any]) -> None:
    problem = small()
    expected = call(problem)
    with mode() as seen:
        output = call(problem)
    assert "fastnegate.negated_attention.default" in seen.names
    assert torch.equal(output, expected)


def test_fake_tensors_stay_fake() -> None:
    problem = small()
    call(problem)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        query, key, value = (mode.from_tensor(t) for t in problem.operands[:3])
        output = fn.negated_attention(query, key, value, problem.concepts, problem.rule)
    assert type(output).__name__ == "FakeTensor" and output.shape == problem.query.shape


def test_vmap_is_not_passed_by() -> None:
    problem = plain(small(mask="none"))
    expected = call(problem)
    queries = torch.stack([problem.query, problem.query * 2])
    outputs = torch.vmap(lambda query: call(dataclasses.replace(problem, query=query)))(queries)
    assert torch.equal(outputs[0], expected) and not torch.equal(outputs[1], expected)


@pytest.mark.filterwarnings("ignore")
def test_traces_hold_the_operator() -> None:
    problem = plain(small(mask="none"))
    call(problem)
    traced = torch.jit.trace(lambda query: call(dataclasses.replace(problem, query=query)), (problem.query,))
    assert "fastnegate::negated_attention" in str(traced.graph)
    other = problem.query * 2
    assert torch.equal(traced(other), call(dataclasses.replace(problem, query=other)))


def test_profiles_show_the_operator() -> None:
    problem = small()
    call(problem)
    with torch.profiler.profile() as profile:
        call(problem)
    assert "fastnegate::negated_attention" in {event.key for event in profile.key_averages()}


class Subclass(Tensor):
    pass


def test_subclasses_are_not_passed_by() -> None:
    problem = small()
    expected = call(problem)
    output = call(dataclasses.replace(problem, query=problem.query.as_subclass(Subclass)))
    assert type(output) is Subclass and torch.equal(output.as_subclass(Tensor), expected)


def test_negative_views_are_read_as_what_they_say() -> None:
    """Their memory holds the opposite."""
    problem = small()
    call(problem)
    negative = torch._neg_view(problem.query)
    assert negative.is_neg()
    expected = call(dataclasses.replace(problem, query=-problem.query))
    assert torch.equal(call(dataclasses.replace(problem, query=negative)), expected)
    opposite = torch._neg_view(problem.concepts.value)
    expected = call(with_concepts(problem, value=-problem.concepts.value))
    assert torch.equal(call(with_concepts(problem, value=opposite)), expected)


def test_sparse_tensors_are_refused_by_name() -> None:
    problem = plain(small())
    with pytest.raises(ValueError, match=r"query has layout torch\.sparse_coo: must be"):
        call(dataclasses.replace(problem, query=problem.query.to_sparse()))


def test_a_plan_does_not_hide_what_requires_grad() -> None:
    problem = small()
    call(problem)
    call(problem, backend="auto")
    leaf = dataclasses.replace(problem, query=problem.query.clone().requires_grad_())
    with pytest.raises(fn.BackendError, match="requires grad"):
        call(leaf)
    assert call(leaf, backend="auto").requires_grad
    value = problem.concepts.value.clone().requires_grad_()
    assert call(with_concepts(problem, value=value), backend="auto").requires_grad
    problem.concepts.numbers.requires_grad_()
    with pytest.raises(fn.BackendError, match="requires grad"):
        call(problem)


def test_a_plan_does_not_hide_autocast() -> None:
    problem = small()
    call(problem)
    with torch.autocast("cpu", torch.bfloat16):
        assert call(problem).dtype == torch.bfloat16
    assert call(problem).dtype == torch.float32


def test_outputs_may_be_changed_in_place() -> None:
    """They are no views of anything that autograd knows."""
    problem = small()
    with torch.no_grad():
        output = call(problem)
    assert output._base is None and not output._is_view()
    output.mul_(torch.ones((), requires_grad=True))
    assert output.requires_grad


def test_the_registered_operator_checks_what_it_is_given() -> None:
    """Programs that were exported for other sizes come here."""
    problem = small()
    arguments = [*ops.flat(problem, "cpu")]
    arguments[1] = problem.key[:, :, :, :8]
    operator = torch.ops.fastnegate.negated_attention.default
    with pytest.raises(ValueError, match="key has shape"):
        operator(*arguments)
    with pytest.raises(ValueError, match="backend='abacus': allowed are reference"):
        operator(*ops.flat(problem, "abacus"))
    arguments = [*ops.flat(problem, "cpu")]
    arguments[13] = [1, 2]
    with pytest.raises(ValueError, match=r"limits=.*: must be entries, concepts, longest, busiest"):
        operator(*arguments)


@pytest.mark.parametrize(
    "changes", ({"rule": []}, {"scale": torch.ones(())}, {"backend": ["cpu"]}, {"scale": True})
)
def test_odd_arguments_are_refused_as_ever(changes: dict[str, Any]) -> None:
    problem = small()
    call(problem)
    options = {"rule": problem.rule, "backend": "cpu", **changes}
    with pytest.raises((TypeError, ValueError), match=next(iter(changes))):
        fn.negated_attention(*problem.operands[:3], problem.concepts, **options)


def test_numbers_of_any_kind_and_names_of_rules_share_results() -> None:
    problem = small(rule="protore", mask="none")
    expected = call(problem, scale=1.0)
    assert torch.equal(call(problem, scale=1), expected)
    named = fn.negated_attention(*problem.operands[:3], problem.concepts, "protore", backend="cpu")
    again = fn.negated_attention(*problem.operands[:3], problem.concepts, "protore", backend="cpu")
    ruled = fn.negated_attention(
        *problem.operands[:3], problem.concepts, Rule.preset("protore"), backend="cpu"
    )
    assert torch.equal(named, again) and torch.equal(named, ruled)


def test_concepts_without_entries_are_plain_attention() -> None:
    problem = small(rows="none")
    assert problem.concepts.entries == 0
    for _ in range(2):
        assert torch.equal(call(problem), call(plain(problem)))
    assert planning.plans is plans
