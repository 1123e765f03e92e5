# SPDX-License-Identifier: Apache-2.0
"""The operator as PyTorch sees it: schemas, fakes, export, compile, autocast, gradients, processes."""

from __future__ import annotations

import dataclasses
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support import CPU_BACKENDS, eps, every_dtype, make_problem, plain, run, with_concepts
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastnegate as fn
from fastnegate.operator import reference
from fastnegate.operator import registration as ops
from fastnegate.operator.backends import cuda
from fastnegate.operator.problem import Problem
from fastnegate.operator.rule import Rule

NAMES = ("reference", "cpu") if CPU_BACKENDS else ("reference",)
every_name = pytest.mark.parametrize("backend", NAMES)
needs_cpu = pytest.mark.skipif(not CPU_BACKENDS, reason="the CPU kernel is not part of this install")
pytestmark = pytest.mark.usefixtures("one_thread")
OPERATORS = ("negated_attention", "negated_attention_with_statistics")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def call(problem: Problem, backend: str = "auto", **changes: object) -> Tensor:
    p = dataclasses.replace(problem, **changes)
    return fn.negated_attention(
        p.query, p.key, p.value, p.concepts, p.rule, scale=p.scale, key_bias=p.key_bias, backend=backend
    )


def operator(name: str) -> Callable:
    return getattr(torch.ops.fastnegate, name).default


# ---- schema and fake -----------------------------------------------------------------------------

CONCEPT_TENSORS = (
    "key", "value", "index", "numbers", "token_bias", "token_weight", "direction", "update", "offset",
)  # fmt: skip
# Of the operator's arguments, those that may lie anyhow: of `ConceptTokens`, all but the index.
PERMUTED = (
    "query", "key", "value", "key_bias", "concept_key", "concept_value",
    *(name for name in CONCEPT_TENSORS if name not in ("key", "value", "index")),
)  # fmt: skip


def permuted(t: Tensor) -> Tensor:
    """The same values in another memory order, the last dimension still contiguous where it must be."""
    if t.dim() < 3:
        return torch.stack([t, t + 1], -1)[..., 0]
    return t.transpose(0, -2).contiguous().transpose(0, -2)


@pytest.mark.parametrize("argument", [None, *PERMUTED])
@pytest.mark.parametrize("name", OPERATORS)
@every_name
def test_opcheck(backend: str, name: str, argument: str | None) -> None:
    rule = "casteer" if argument in ("direction", "update", "offset") else "eiup"
    problem = make_problem(2, 2, 5, 7, 16, rule=rule, mask="per_query")
    arguments = list(ops.flat(problem, backend))
    if argument is not None:
        at = [a.name for a in operator(name)._schema.arguments].index(argument)
        as_it_was = operator(name)(*arguments)
        arguments[at] = permuted(arguments[at])
        assert not arguments[at].is_contiguous()
        same = operator(name)(*arguments)
        if isinstance(same, tuple):
            assert all(torch.equal(a, b) for a, b in zip(same, as_it_was))
        else:
            assert torch.equal(same, as_it_was)
    torch.library.opcheck(operator(name), tuple(arguments))


@pytest.mark.parametrize("argument", [None, *PERMUTED[:3]])
@every_dtype
@every_name
def test_fake_strides_are_real_strides(backend: str, dtype: torch.dtype, argument: str | None) -> None:
    problem = make_problem(2, 3, 5, 7, 16, dtype)
    if argument is not None:
        problem = dataclasses.replace(problem, **{argument: permuted(getattr(problem, argument))})
    for name in OPERATORS:
        arguments = ops.flat(problem, backend)
        meta = tuple(a.to("meta") if isinstance(a, Tensor) else a for a in arguments)
        real, fake = (operator(name)(*a) for a in (arguments, meta))
        for r, f in zip(real, fake) if isinstance(real, tuple) else [(real, fake)]:
            assert f.device.type == "meta"
            assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype)


def test_meta_tensors_through_the_public_operator() -> None:
    problem = make_problem(2, 3, 5, 7, 16, rows="same")
    concepts = {name: getattr(problem.concepts, name).to("meta") for name in CONCEPT_TENSORS}
    query, key, value = (t.to("meta") for t in (problem.query, problem.key, problem.value))
    meta = dataclasses.replace(with_concepts(problem, **concepts), query=query, key=key, value=value)
    for p in (meta, plain(meta)):
        output = call(p)
        assert output.device.type == "meta" and output.shape == (2, 3, 5, 16)
        assert output.stride() == call(problem).stride()


# ---- export, compile -----------------------------------------------------------------------------


class Layer(torch.nn.Module):
    """A cross-attention that negates, with everything but the query fixed."""

    def __init__(self, problem: Problem, backend: str = "auto") -> None:
        super().__init__()
        self.problem, self.backend = problem, backend

    def forward(self, query: Tensor) -> Tensor:
        return call(self.problem, self.backend, query=query * 1.5) * 2.0


@needs_cpu
def test_export_keeps_the_operator() -> None:
    problem = make_problem(2, 2, 9, 7, 16, rows="same")
    program = torch.export.export(Layer(problem), (problem.query,))
    targets = [str(node.target) for node in program.graph.nodes]
    assert "fastnegate.negated_attention.default" in targets
    assert torch.equal(program.module()(problem.query), Layer(problem)(problem.query))


@needs_cpu
@pytest.mark.parametrize("backend", ["auto", "cpu"])
@pytest.mark.parametrize("statistics", [False, True])
def test_one_graph_when_strengths_and_rows_change_in_place(statistics: bool, backend: str) -> None:
    problem = make_problem(2, 2, 33, 7, 16, rule="nasa", rows=[[0, 1], [2]])
    tokens = problem.concepts
    counter = CompileCounterWithBackend("aot_eager")

    def layer(query: Tensor, concepts: fn.ConceptTokens) -> Tensor:
        arguments = (query * 1.5, problem.key, problem.value, concepts, problem.rule)
        if not statistics:
            return fn.negated_attention(*arguments, backend=backend) * 2.0
        output, measured = fn.negated_attention_with_statistics(*arguments, backend=backend)
        return output * 2.0 + measured.removed_energy[:, None, None, None] + measured.heat.sum()

    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    seen = []
    for change in (
        lambda: None,
        lambda: tokens.strength.copy_(torch.tensor([0.5, 2.0, 1.0])),
        lambda: tokens.index[:3].copy_(torch.tensor([2, 0, 1])),  # other concepts
        lambda: tokens.index[-3:].copy_(torch.tensor([0, 1, 3])),  # entries of other rows
        lambda: tokens.active.zero_(),
        lambda: tokens.numbers.fill_(torch.nan),
    ):
        change()
        output = compiled(problem.query, tokens)
        assert torch.equal(output, layer(problem.query, tokens))
        assert not any(torch.equal(output, before) for before in seen)
        seen.append(output)
    assert counter.frame_count == 1


@needs_cpu
def test_compile_with_changing_rules_and_inference_mode() -> None:
    problem = make_problem(2, 2, 9, 7, 16, rows="same")
    compiled = torch.compile(Layer(problem), fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        assert torch.equal(compiled(problem.query), Layer(problem)(problem.query))
    for name in ("nag", "vsf", "casteer"):
        layer = Layer(dataclasses.replace(problem, rule=Rule.preset(name)))
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(problem.query), layer(problem.query))


@pytest.mark.skipif(cuda._cuda is None, reason="the CUDA kernels are not part of this install")
@pytest.mark.parametrize("backend", ["auto", "cuda"])
def test_compilers_trace_what_the_cuda_backend_asks(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reference in the place of its kernels: on a CPU it would refuse before it asks."""
    monkeypatch.setattr(cuda, "_refused_device", lambda query: None)
    monkeypatch.setattr(cuda, "_unavailable", lambda: None)
    monkeypatch.setattr(cuda, "plan", reference.plan)
    problem = make_problem(2, 2, 9, 7, 40, torch.float16, rows="same")
    compiled = torch.compile(Layer(problem, backend), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(problem.query), Layer(problem, "cuda")(problem.query))


@every_name
def test_inference_mode_and_no_grad(backend: str) -> None:
    problem = make_problem(rows="same")
    expected = call(problem, backend)
    with torch.inference_mode():
        inside = call(problem, backend)
        made = call(make_problem(rows="same"), backend)
    with torch.no_grad():
        learned = call(problem, backend, query=problem.query.clone().requires_grad_())
    assert all(torch.equal(t, expected) for t in (inside, made, learned))
    assert inside.is_inference() and not learned.requires_grad


# ---- autocast ------------------------------------------------------------------------------------


@every_name
@every_dtype
def test_autocast_does_as_scaled_dot_product_attention(dtype: torch.dtype, backend: str) -> None:
    problem = make_problem(dtype=dtype, mask="additive")
    cast = dataclasses.replace(
        with_concepts(problem, key=problem.concepts.key.bfloat16(), value=problem.concepts.value.bfloat16()),
        query=problem.query.bfloat16(),
        key=problem.key.bfloat16(),
        value=problem.value.bfloat16(),
    )
    with torch.autocast("cpu", torch.bfloat16):
        output = call(problem, backend)
        judged = F.scaled_dot_product_attention(problem.query, problem.key, problem.value)
    assert output.dtype == judged.dtype == torch.bfloat16
    assert torch.equal(output, call(cast, backend))
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert torch.equal(call(problem, backend), call(problem, backend))
        assert call(problem, backend).dtype == dtype


def test_autocast_leaves_float64_alone_as_scaled_dot_product_attention_does() -> None:
    problem = plain(make_problem())
    double = [t.double() for t in (problem.query, problem.key, problem.value)]
    with torch.autocast("cpu", torch.bfloat16):
        judged = F.scaled_dot_product_attention(*double)
        output = fn.negated_attention(*double, backend="reference")
    assert output.dtype == judged.dtype


def test_autocast_mixes_what_it_would_refuse() -> None:
    problem = make_problem(rows="same")
    mixed = dataclasses.replace(problem, key=problem.key.half(), value=problem.value.bfloat16())
    with pytest.raises(ValueError, match="dtype"):
        call(mixed)
    with torch.autocast("cpu", torch.bfloat16):
        assert call(mixed).dtype == torch.bfloat16


# ---- gradients -----------------------------------------------------------------------------------

SMOOTH = {
    "separate": Rule("cosine", "sigmoid", "projection", norm="preserve", width=3.0, threshold=0.25),
    "joint": Rule("mass", "sigmoid", combine="joint", strength=1.5, blend=0.75),
    "fixed": Rule("direction", "sigmoid", "fixed", scope="feature", strength=2.0, width=0.5),
    "retrieve": Rule("one", "open", "retrieve"),
    "nag": Rule.preset("nag", strength=0.5),
}


@pytest.mark.parametrize("rule", SMOOTH.values(), ids=list(SMOOTH))
def test_gradients_through_the_reference(rule: Rule) -> None:
    problem = make_problem(2, 2, 2, 3, 4, rule=rule, rows=[[0, 1], [1]], concept_lengths=(2, 1), extras=False)
    tokens = problem.concepts.cast(torch.float64)
    numbers = torch.tensor([1.5, 0.2, 0.1, 0.8, 0.9, 0.7, 0, 0], dtype=torch.float32).repeat(3, 1)

    def attention(query, key, value, concept_key, concept_value) -> Tensor:
        concepts = dataclasses.replace(tokens, key=concept_key, value=concept_value, numbers=numbers)
        return call(problem, "auto", query=query, key=key, value=value, concepts=concepts)

    leaves = (problem.query, problem.key, problem.value, tokens.key, tokens.value)
    leaves = tuple(t.double().detach().clone().requires_grad_() for t in leaves)
    assert torch.autograd.gradcheck(attention, leaves)
    assert torch.equal(attention(*leaves), reference.run(dataclasses.replace(
        problem, query=leaves[0], key=leaves[1], value=leaves[2],
        concepts=dataclasses.replace(tokens, key=leaves[3], value=leaves[4], numbers=numbers),
    )))  # fmt: skip


# ---- processes -----------------------------------------------------------------------------------


@needs_cpu
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_returns_the_same_bits() -> None:
    """The parent has used its OpenMP threads, which do not exist in the child."""
    problem = make_problem(2, queries=300, rows="same")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = run(problem, CPU_BACKENDS[0]).numpy().tobytes()
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.close(reading)
                for _ in range(2):  # compared without torch, whose own loops use threads
                    same = run(problem, CPU_BACKENDS[0]).numpy().tobytes() == expected
                    os.write(writing, b"y" if same else b"n")
                status = 0
            finally:
                os._exit(status)
        os.close(writing)
        said = b""
        while select.select([reading], [], [], 60)[0]:
            if not (part := os.read(reading, 16)):
                break
            said += part
        else:
            os.kill(child, signal.SIGKILL)
            said += b" then hung"
        os.close(reading)
        assert said == b"yy" and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert run(problem, CPU_BACKENDS[0]).numpy().tobytes() == expected
    finally:
        torch.set_num_threads(threads)


@needs_cpu
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system has no /proc/self/maps")
def test_one_openmp_runtime_in_the_process() -> None:
    """In a process that imports nothing else, whatever the order of the imports."""
    script = (
        "{first}\n{second}\n"
        "q = torch.zeros(1, 2, 200, 16)\n"
        "fastnegate.negated_attention(q, q, q, backend='cpu')\n"
        "files = {{line.split()[-1] for line in open('/proc/self/maps') if 'omp.so' in line}}\n"
        "print(len(files), *files)"
    )
    for first, second in (("import torch", "import fastnegate"), ("import fastnegate", "import torch")):
        child = subprocess.run(
            [sys.executable, "-c", script.format(first=first, second=second)],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert child.returncode == 0, child.stderr
        assert child.stdout.startswith("1 "), child.stdout


@needs_cpu
def test_threads_may_call_at_once() -> None:
    """The kernel runs without the GIL."""
    tasks = [make_problem(2, queries=70, seed=seed) for seed in range(4)]
    expected = [call(problem, "cpu") for problem in tasks]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda problem: call(problem, "cpu"), tasks * 4))
    assert all(torch.equal(result, one) for result, one in zip(results, expected * 4))


def test_eps_is_that_of_the_page() -> None:
    assert [eps(t) for t in (torch.float32, torch.bfloat16, torch.float16)] == [2**-23, 2**-7, 2**-10]
