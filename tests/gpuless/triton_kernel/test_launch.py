# SPDX-License-Identifier: Apache-2.0
"""How the Triton kernel is launched: once made, a launch is a look-up; nothing waits for the device;
compiled code runs the same program. On the simulated device, which runs what Triton compiles."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ptxsim.device import SimulatedDevice
from support import Judge, make_problem, with_concepts, with_rule
from torch.utils._python_dispatch import TorchDispatchMode

from fastnegate.operator import registration as ops
from fastnegate.operator.backends import triton as backend
from fastnegate.operator.plan import planned, plans
from fastnegate.operator.problem import Problem

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces Triton"),
]


@pytest.fixture(autouse=True)
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedDevice]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with SimulatedDevice() as device:
        yield device


def small(**changes: Any) -> Problem:
    return make_problem(
        **{"batch": 2, "heads": 1, "queries": 20, "dim": 32, "dtype": torch.float16, **changes}
    )


def repeated(problem: Problem) -> Problem:
    """The same call with other values in other memory, as the next layer or step makes it."""
    tensors = {name: getattr(problem, name).clone() for name in ("query", "key", "value")}
    concepts = problem.concepts
    assert concepts is not None
    numbers = concepts.numbers.clone()
    numbers[:, 0] = 0.25
    return dataclasses.replace(problem, **tensors, concepts=dataclasses.replace(concepts, numbers=numbers))


def test_a_launch_is_made_once(device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = small()
    first = backend.run(problem)
    kernel = backend._kernel()
    monkeypatch.setattr(type(kernel), "run", None)  # Triton's own way of launching: looks at every argument
    monkeypatch.setattr(backend, "launch_of", None)
    assert torch.equal(backend.run(problem), first)
    other = repeated(problem)
    output = backend.run(other)
    assert not torch.equal(output, first)
    Judge(other).check(output, "launched again")
    assert len(device.launches) == 3


def test_numbers_and_sizes_of_concepts_do_not_compile() -> None:
    """Strengths, thresholds, rules of the same kind of pointers, other N and B: the same kernel."""
    problem = small()
    backend.run(problem)
    kernel = backend._kernel()
    before = {key: len(cache[0]) for key, cache in kernel.device_caches.items()}
    backend.run(repeated(problem))
    backend.run(with_rule(problem, strength=0.5, threshold=0.1))
    backend.run(with_rule(problem, similarity="one", gate="open", direction="difference"))
    backend.run(small(batch=3, queries=33, rows="same"))
    assert {key: len(cache[0]) for key, cache in kernel.device_caches.items()} == before


def changed(name: str) -> Problem:
    problem = small()
    if name == "stride":
        key = torch.stack([problem.key, problem.key], 1)[:, 0]
        return dataclasses.replace(problem, key=key)
    if name == "alignment":
        room = torch.empty(problem.query.numel() + 1, dtype=torch.float16)[1:]
        return dataclasses.replace(problem, query=room.view_as(problem.query).copy_(problem.query))
    if name == "optional tensor":
        return with_concepts(problem, token_bias=None)
    if name == "longest":
        return with_concepts(problem, longest=problem.concepts.longest + 1)
    if name == "rule":
        return with_rule(problem, strength=0.5)
    if name == "scale":
        return dataclasses.replace(problem, scale=0.3)
    if name == "dtype":
        return small(dtype=torch.bfloat16)
    if name == "entries":
        return small(rows=[[0, 2], [1, 0]])
    assert name == "queries"
    return small(queries=21)


def test_statistics_make_a_new_launch() -> None:
    problem = small()
    output = backend.run(problem)
    again, tables = backend.run_with_statistics(problem)
    assert torch.equal(output, again) and len(plans) == 2
    Judge(problem).check_statistics(tables.named)


@pytest.mark.parametrize("name", (
    "stride", "alignment", "optional tensor", "longest", "rule", "scale", "queries", "dtype", "entries",
))  # fmt: skip
def test_what_a_launch_depends_on_makes_a_new_one(name: str) -> None:
    backend.run(small())
    other = changed(name)
    Judge(other).check(backend.run(other), name)
    assert len(plans) == 2


def test_plans_are_forgotten_oldest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "most", 2)
    for queries in (4, 5, 6):
        planned("triton", small(queries=queries), False, backend.plan)
    assert [plan.launch.scalars[35] for plan in plans] == [5, 6]


class Recorded(TorchDispatchMode):
    """Names of the operations of torch that are executed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(op.overloadpacket.__name__)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", ("protore", "nag", "ong"))
def test_calls_can_be_captured_in_a_graph(
    rule: str, device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second call on: memory of the output and of sums, views, launches. Nothing reads a value of
    the device, which would wait for it."""
    problem = small(rule=rule, heads=2)
    backend.run(problem)
    monkeypatch.setattr(device, "launch", lambda program, call: None)  # the simulator itself uses torch
    with Recorded() as recorded:
        backend.run(problem)
    memory = {"new_empty_strided"} | ({"new_empty"} if rule != "protore" else set())
    assert set(recorded.names) == memory


@pytest.mark.parametrize("rule", ("protore", "nag"))
def test_compiled_code_runs_the_same_program(rule: str, device: SimulatedDevice) -> None:
    """Inductor could launch the kernel itself, but has no way to say `enable_fp_fusion`: another program,
    other bits. So it calls the operator."""
    problem = small(rule=rule, heads=2)

    def call(query: torch.Tensor) -> torch.Tensor:
        return ops.run(dataclasses.replace(problem, query=query), "triton", False)[0]

    torch._dynamo.reset()
    with torch.no_grad():
        eager = call(problem.query)
        launches = 1 + len(problem.rule.sums_over_heads)
        compiled = torch.compile(call, fullgraph=True)(problem.query)
    assert torch.equal(compiled, eager)
    first, second = device.launches[:launches], device.launches[launches:]
    assert [id(launch.program) for launch in first] == [id(launch.program) for launch in second]
    assert len(plans) == 1, "Triton compiled it once"
    (plan,) = plans
    for kernel in plan.launch.compiled.values():
        assert {name: getattr(kernel.metadata, name) for name in backend.OPTIONS} == backend.OPTIONS
        assert "fma.rn.f32" not in kernel.asm["ptx"]


def test_dynamic_sizes_of_text(device: SimulatedDevice) -> None:
    """A second length makes compilers take it for a variable."""

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return ops.run(dataclasses.replace(problem, query=query, key=key, value=value), "triton", False)[0]

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for keys in (21, 33, 77):
        problem = small(keys=keys)
        with torch.no_grad():
            Judge(problem).check(compiled(problem.query, problem.key, problem.value), "compiled")


def test_exported_programs_keep_the_operator() -> None:
    problem = small()

    class Layer(torch.nn.Module):
        def forward(self, query: torch.Tensor) -> torch.Tensor:
            return ops.run(dataclasses.replace(problem, query=query), "triton", False)[0]

    program = torch.export.export(Layer(), (problem.query,)).run_decompositions()
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == ["fastnegate.negated_attention.default"]
