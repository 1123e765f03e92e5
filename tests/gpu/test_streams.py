# SPDX-License-Identifier: Apache-2.0
"""The operator among what else a process does on a GPU: streams, threads, CUDA graphs, compiled code,
autocast, other devices."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from card import (
    DEVICE,
    FEATURE_MAX,
    REHEARSED,
    call,
    call_with_statistics,
    every_backend,
    needs_gpu,
    new_stream,
    on_card,
    same,
    synchronize,
)
from support import Judge, make_problem
from torch import Tensor

import fastnegate as fn
from fastnegate.operator.problem import Problem
from fastnegate.testing import moved

pytestmark = pytest.mark.usefixtures("one_thread")
# One launch, two and three.
every_launch = pytest.mark.parametrize(
    "rule", ("protore", "nag", FEATURE_MAX), ids=lambda rule: getattr(rule, "name", rule)
)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small(**changes: Any) -> Problem:
    case = {"batch": 2, "queries": 200, "dim": 64, "dtype": torch.float16, "rows": "same", "layout": "bnhd"}
    return make_problem(**{**case, **changes})


def with_query(problem: Problem, query: Tensor) -> Problem:
    return dataclasses.replace(problem, query=query)


# ---- streams and threads ----------------------------------------------------------------------


@needs_gpu
@every_launch
@every_backend
def test_on_a_side_stream_behind_a_pending_producer(rule: Any, backend: str) -> None:
    """The kernels go where torch's current stream is, behind what is queued there; no call waits for them."""
    problem = on_card(small(rule=rule))
    expected = call(problem, backend)
    right = problem.query.clone()
    problem.query.zero_()
    assert not same(call(problem, backend), expected)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(problem, backend)  # so that this stream has memory: asking the driver for it might wait
        torch.cuda.synchronize()
        torch.cuda._sleep(1_000_000_000)  # cycles, half a second
        problem.query.copy_(right)
        output = call(problem, backend)
    assert not stream.query(), "the call has waited for the GPU"
    stream.synchronize()
    assert same(output, expected)


@every_launch
@every_backend
def test_two_threads_on_two_streams(rule: Any, backend: str) -> None:
    """From their first calls on, which make the launches of kernels that are new."""
    cases = [small(rule=rule, dim=88, queries=queries, seed=queries) for queries in (150, 151)]
    problems = [on_card(case) for case in cases]
    together = threading.Barrier(2)
    synchronize()

    def work(problem: Problem) -> list[Tensor]:
        with new_stream():
            together.wait(60)
            outputs = [call(problem, backend) for _ in range(40)]
        synchronize()
        return outputs

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(work, problems))
    for case, problem, outputs in zip(cases, problems, results):
        expected = call(problem, backend)
        Judge(case).check(expected.cpu(), backend)
        assert all(same(output, expected) for output in outputs)


@needs_gpu
@every_launch
@every_backend
def test_the_second_call_allocates_its_output_alone(rule: Any, backend: str) -> None:
    """And the sums of a rule that needs them over heads."""
    problem = on_card(small(rule=rule))
    call(problem, backend)
    torch.cuda.synchronize()
    name = "allocation.all.allocated"
    before = torch.cuda.memory_stats()[name]
    output = call(problem, backend)
    assert torch.cuda.memory_stats()[name] - before == 1 + len(problem.rule.sums_over_heads)
    assert output.untyped_storage().nbytes() == output.numel() * output.element_size()


@needs_gpu
@every_backend
def test_every_device_and_the_current_one_stays(backend: str) -> None:
    case = small()
    judge, before = Judge(case), torch.cuda.current_device()
    for device in range(torch.cuda.device_count()):
        output = call(moved(case, f"cuda:{device}"), backend)
        assert torch.cuda.current_device() == before and output.device.index == device
        judge.check(output.cpu(), backend)


# ---- CUDA graphs ------------------------------------------------------------------------------


class Again:
    """In rehearsals a replay is another call."""

    def __init__(self, work: Callable[[], list[Tensor]], results: list[Tensor]) -> None:
        self._work, self._results = work, results

    def replay(self) -> None:
        for result, now in zip(self._results, self._work()):
            result.copy_(now)


def captured(work: Callable[[], list[Tensor]]) -> tuple[Any, list[Tensor]]:
    """A graph of the work, and the tensors that each replay writes."""
    if REHEARSED:
        results = work()
        return Again(work, results), results
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()
    return graph, results


@pytest.mark.parametrize("statistics", (False, True), ids=("output", "statistics"))
@every_launch
@every_backend
def test_a_graph_follows_changes_in_place(rule: Any, statistics: bool, backend: str) -> None:
    """Of strengths, concepts, rows and queries."""
    problem = on_card(small(rule=rule, rows=[[0, 1], [2]]))
    tokens, query = problem.concepts, problem.query

    def work() -> list[Tensor]:
        if not statistics:
            return [call(problem, backend)]
        output, tables = fn.negated_attention_with_statistics(
            query, problem.key, problem.value, tokens, problem.rule, scale=problem.scale, backend=backend
        )
        return [output, *tables]

    graph, results = captured(work)
    seen: list[Tensor] = []
    for change in (
        lambda: None,
        lambda: tokens.strength.copy_(torch.tensor([0.5, 0.75, 1.0])),
        lambda: tokens.index[:3].copy_(torch.tensor([2, 0, 1])),  # other concepts
        lambda: tokens.index[-3:].copy_(torch.tensor([0, 1, 3])),  # entries of other rows
        lambda: query.mul_(0.5),
        lambda: tokens.active.zero_(),
    ):
        change()
        graph.replay()
        eager = work()
        assert len(results) == len(eager) and all(map(same, results, eager))
        assert not any(same(results[0], before) for before in seen), "the change shows"
        seen.append(results[0].cpu().clone())


# ---- torch's modes ----------------------------------------------------------------------------


@every_launch
@every_backend
def test_compiled_code_gives_the_same_bits(rule: Any, backend: str) -> None:
    """Of torch.compile with inductor, with its CUDA graphs too."""
    problem = on_card(small(rule=rule))

    def layer(query: Tensor) -> Tensor:
        return call(with_query(problem, query * 2.0), backend) * 0.5

    queries = [problem.query, problem.query * 0.5, -problem.query]
    expected = [layer(query) for query in queries]
    for mode in ("default", "reduce-overhead"):
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, mode=mode)
        for query, right in [*zip(queries, expected)] * 2:
            torch.compiler.cudagraph_mark_step_begin()
            assert same(compiled(query), right), mode


@every_backend
def test_autocast_computes_in_its_dtype(backend: str) -> None:
    problem = on_card(small(dtype=torch.float32, mask="additive"))
    tokens = problem.concepts.cast(torch.bfloat16)
    query, key, value = (t.bfloat16() for t in (problem.query, problem.key, problem.value))
    cast = dataclasses.replace(problem, query=query, key=key, value=value, concepts=tokens)
    with torch.autocast(DEVICE, torch.bfloat16):
        output = call(problem, backend)
        like = torch.nn.functional.scaled_dot_product_attention(problem.query, problem.key, problem.value)
    assert output.dtype == like.dtype == torch.bfloat16
    assert same(output, call(cast, backend))


@every_backend
def test_inference_mode(backend: str) -> None:
    case = small()
    expected = call(on_card(case), backend)
    problem = on_card(case)
    with torch.inference_mode():
        output, made = call(problem, backend), call(on_card(case), backend)
    assert output.is_inference() and same(output, expected) and same(made, expected)


@every_backend
def test_gradients_are_refused_by_name_unless_none_are_wanted(backend: str) -> None:
    problem = on_card(small())
    expected = call(problem, backend)
    learned = with_query(problem, problem.query.clone().requires_grad_())
    with pytest.raises(fn.BackendError, match=f"backend='{backend}' cannot run this call: an input requires"):
        call(learned, backend)
    with torch.no_grad():
        output = call(learned, backend)
    assert same(output, expected) and not output.requires_grad


@every_backend
def test_nothing_to_compute(backend: str) -> None:
    """Empty problems are not launched, and a prompt without keys is a fully masked one."""
    for sizes in ({"queries": 0}, {"batch": 0}):
        problem = on_card(small(**sizes))
        output, statistics = call_with_statistics(problem, backend)
        assert output.shape == problem.query.shape and output.device.type == DEVICE
        assert not any(t.any() for t in statistics)
    judge = Judge(small(keys=0, rule="vsf"))
    judge.check(call(on_card(judge.problem), backend).cpu(), backend)
