# SPDX-License-Identifier: Apache-2.0
"""What the operator refuses, with which words, and what it accepts although it is empty."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable

import pytest
import torch
from support import (
    BACKENDS,
    CPU_BACKENDS,
    Judge,
    every_backend,
    make_problem,
    plain,
    run,
    run_with_statistics,
)
from torch import Tensor

import fastnegate as fn
from fastnegate.operator import choice, reference
from fastnegate.operator.problem import Problem
from fastnegate.operator.rule import Rule

pytestmark = pytest.mark.usefixtures("one_thread")


def call(problem: Problem | None = None, **changes: object) -> Tensor:
    """The operator on a small valid call with some arguments changed."""
    p = problem or make_problem(2, 4, 5, 6, 16, rows=[[0], []], concept_lengths=(3, 2))
    arguments = {
        "query": p.query,
        "key": p.key,
        "value": p.value,
        "concepts": p.concepts,
        "rule": p.rule,
        "backend": "reference",
    }
    return fn.negated_attention(**{**arguments, **changes})


def concepts_with(**changes: object) -> fn.ConceptTokens:
    tokens = make_problem(2, 4, 5, 6, 16, rows=[[0], []], concept_lengths=(3, 2)).concepts
    return dataclasses.replace(tokens, **changes)


def refused(action: Callable[[], object], error: type[Exception], *words: str) -> None:
    with pytest.raises(error) as caught:
        action()
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {str(caught.value)!r}"


T = torch.zeros

# ---- the call ------------------------------------------------------------------------------------

CALLS: dict[str, tuple[dict, type[Exception], tuple[str, ...]]] = {
    "query rank": ({"query": T(4, 5, 16)}, ValueError, ("query", "[4, 5, 16]", "[B, H, N, D]")),
    "key rank": ({"key": T(2, 4, 6, 16, 1)}, ValueError, ("key", "[2, 4, 6, 16, 1]")),
    "query type": ({"query": [[1.0]]}, TypeError, ("query", "list")),
    "key type": ({"key": None}, TypeError, ("key", "NoneType")),
    "query dtype": ({"query": T(2, 4, 5, 16, dtype=torch.int32)}, ValueError, ("query", "int32")),
    "key dtype": ({"key": T(2, 4, 6, 16).half()}, ValueError, ("key", "float16", "float32")),
    "value dtype": ({"value": T(2, 4, 6, 16).double()}, ValueError, ("value", "float64", "float32")),
    "key device": ({"key": T(2, 4, 6, 16, device="meta")}, ValueError, ("key", "meta", "cpu")),
    "value device": ({"value": T(2, 4, 6, 16, device="meta")}, ValueError, ("value", "meta", "cpu")),
    "key batch": ({"key": T(3, 4, 6, 16)}, ValueError, ("key", "[3, 4, 6, 16]")),
    "value batch": ({"value": T(1, 4, 6, 16)}, ValueError, ("value", "[1, 4, 6, 16]")),
    "key dim": ({"key": T(2, 4, 6, 8)}, ValueError, ("key", "[2, 4, 6, 8]")),
    "value dim": ({"value": T(2, 4, 6, 24)}, ValueError, ("value", "[2, 4, 6, 24]")),
    "value tokens": ({"value": T(2, 4, 7, 16)}, ValueError, ("value", "[2, 4, 7, 16]")),
    "more heads": ({"key": T(2, 5, 6, 16)}, ValueError, ("key", "[2, 5, 6, 16]")),
    "grouped queries": ({"key": T(2, 2, 6, 16)}, ValueError, ("key", "2 heads", "grouped-query")),
    "one key head": ({"value": T(2, 1, 6, 16)}, ValueError, ("value", "1 heads", "grouped-query")),
    "query strides": ({"query": T(2, 4, 16, 5).mT}, ValueError, ("query", "strides", "[320, 80, 1, 5]")),
    "key strides": ({"key": T(2, 4, 6, 32)[..., ::2]}, ValueError, ("key", "strides", "the last must be 1")),
    "value strides": ({"value": T(2, 4, 6, 1).expand(2, 4, 6, 16)}, ValueError, ("value", "strides")),
    "rule name": ({"rule": "protor"}, ValueError, ("rule", "'protor'", "protore", "nag")),
    "rule type": ({"rule": 3}, TypeError, ("rule", "int")),
    "backend name": ({"backend": "gpu"}, ValueError, ("backend", "'gpu'", "reference", "cpu", "triton")),
    "concepts type": ({"concepts": [1]}, TypeError, ("concepts", "list")),
    "scale nan": ({"scale": float("nan")}, ValueError, ("scale", "nan")),
    "scale inf": ({"scale": float("inf")}, ValueError, ("scale", "inf")),
    "scale type": ({"scale": "1"}, ValueError, ("scale", "'1'")),
    "key_bias rank": ({"key_bias": T(2, 6)}, ValueError, ("key_bias", "[2, 6]")),
    "key_bias keys": ({"key_bias": T(2, 1, 1, 7)}, ValueError, ("key_bias", "[2, 1, 1, 7]")),
    "key_bias one key": ({"key_bias": T(2, 1, 1, 1)}, ValueError, ("key_bias", "[2, 1, 1, 1]")),
    "key_bias batch": ({"key_bias": T(3, 1, 1, 6)}, ValueError, ("key_bias", "[3, 1, 1, 6]", "2 or 1")),
    "key_bias heads": ({"key_bias": T(1, 2, 1, 6)}, ValueError, ("key_bias", "[1, 2, 1, 6]", "4 or 1")),
    "key_bias queries": ({"key_bias": T(1, 1, 4, 6)}, ValueError, ("key_bias", "[1, 1, 4, 6]", "1 or 5")),
    "key_bias bool": ({"key_bias": T(2, 1, 1, 6).bool()}, ValueError, ("key_bias", "bool", "floating")),
    "key_bias int": ({"key_bias": T(2, 1, 1, 6).int()}, ValueError, ("key_bias", "int32")),
    "key_bias device": ({"key_bias": T(2, 1, 1, 6, device="meta")}, ValueError, ("key_bias", "meta", "cpu")),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_wrong_call_is_refused_by_name(case: str) -> None:
    changes, error, words = CALLS[case]
    for backend in {name.partition("-")[0] for name in BACKENDS} | {"auto"}:
        refused(lambda backend=backend: call(**{"backend": backend, **changes}), error, *words)


CONCEPTS: dict[str, tuple[dict, tuple[str, ...]]] = {
    "key heads": ({"key": T(5, 2, 16)}, ("concepts.key", "[5, 2, 16]", "[T, 4, 16]")),
    "value dim": ({"value": T(5, 4, 8)}, ("concepts.value", "[5, 4, 8]", "[T, 4, 16]")),
    "value tokens": ({"value": T(4, 4, 16)}, ("concepts.value", "[4, 4, 16]")),
    "key dtype": ({"key": T(5, 4, 16).half()}, ("concepts.key", "float16", "float32")),
    "value dtype": ({"value": T(5, 4, 16).bfloat16()}, ("concepts.value", "bfloat16", "float32")),
    "key strides": ({"key": T(5, 4, 32)[..., ::2]}, ("concepts.key", "strides")),
    "key device": ({"key": T(5, 4, 16, device="meta")}, ("concepts.key", "meta", "cpu")),
    "numbers device": ({"numbers": T(1, 8, device="meta")}, ("concepts.numbers", "meta", "cpu")),
    "index device": ({"index": T(8, dtype=torch.int32, device="meta")}, ("concepts.index", "meta")),
    "numbers shape": ({"numbers": T(1, 6)}, ("concepts.numbers", "[1, 6]", "[1, 8]")),
    "numbers dtype": ({"numbers": T(1, 8).double()}, ("concepts.numbers", "float64", "float32")),
    "index dtype": ({"index": T(8, dtype=torch.int64)}, ("concepts.index", "int64", "int32")),
    "token_bias shape": ({"token_bias": T(4)}, ("concepts.token_bias", "[4]", "[5]")),
    "token_bias dtype": ({"token_bias": T(5).half()}, ("concepts.token_bias", "float16", "float32")),
    "token_weight shape": ({"token_weight": T(5, 1)}, ("concepts.token_weight", "[5, 1]", "[5]")),
    "direction shape": ({"direction": T(2, 4, 8)}, ("concepts.direction", "[2, 4, 8]", "[2, 4, 16]")),
    "direction dtype": ({"direction": T(2, 4, 16).double()}, ("concepts.direction", "float64", "float32")),
    "update shape": ({"update": T(1, 4, 16)}, ("concepts.update", "[1, 4, 16]", "[2, 4, 16]")),
    "offset shape": ({"offset": T(3)}, ("concepts.offset", "[3]", "[2]")),
}


@pytest.mark.parametrize("case", CONCEPTS)
def test_wrong_concept_tensors_are_refused_by_name(case: str) -> None:
    changes, words = CONCEPTS[case]
    for backend in {name.partition("-")[0] for name in BACKENDS}:
        refused(lambda b=backend: call(concepts=concepts_with(**changes), backend=b), ValueError, *words)


def test_concepts_of_another_batch_are_refused() -> None:
    three = make_problem(3, 4, 5, 6, 16, concept_lengths=(3, 2)).concepts
    refused(lambda: call(concepts=three), ValueError, "3 rows", "2")
    call(concepts=three.first_rows(2))
    refused(lambda: three.first_rows(4), ValueError, "batch=4", "3")


# ---- ConceptTokens.pack --------------------------------------------------------------------------

K = [T(3, 4, 16), T(2, 4, 16)]
NAN, INF = float("nan"), float("inf")

PACKS: dict[str, tuple[dict, type[Exception], tuple[str, ...]]] = {
    "fewer values": ({"values": K[:1]}, ValueError, ("keys", "2", "values", "1")),
    "key rank": ({"keys": [K[0], T(2, 64)]}, ValueError, ("keys[1]", "[2, 64]")),
    "key heads": ({"keys": [K[0], T(2, 2, 16)]}, ValueError, ("keys[1]", "[2, 2, 16]", "[4, 16]")),
    "value dim": ({"values": [T(3, 4, 8), K[1]]}, ValueError, ("values[0]", "[3, 4, 8]")),
    "value tokens": ({"values": [T(4, 4, 16), K[1]]}, ValueError, ("values[0]", "4", "3")),
    "dtype": ({"values": [K[0], K[1].half()]}, ValueError, ("values[1]", "float16", "float32")),
    "device": ({"keys": [K[0], T(2, 4, 16, device="meta")]}, ValueError, ("keys[1]", "meta", "cpu")),
    "missing concept": ({"rows": [[0], [1, 2]]}, ValueError, ("rows[1][1]", "2")),
    "negative concept": ({"rows": [[-1], []]}, ValueError, ("rows[0][0]", "-1")),
    "no concepts": ({"keys": [], "values": [], "rows": [[0], []]}, ValueError, ("rows", "keys")),
    "float concept": ({"rows": [[0.0], []]}, ValueError, ("rows[0][0]", "0.0")),
    "bool concept": ({"rows": [[True], []]}, ValueError, ("rows[0][0]", "True")),
    "no concept": ({"rows": [[{"strength": 1.0}], []]}, ValueError, ("rows[0][0]", "concept")),
    "unknown key": ({"rows": [[{"concept": 0, "weight": 1.0}], []]}, TypeError, ("rows[0][0]", "'weight'")),
    "unknown number": ({"weight": 1.0}, TypeError, ("'weight'", "strength", "active")),
    "threshold nan": ({"threshold": NAN}, ValueError, ("threshold", "nan")),
    "threshold inf": ({"threshold": -INF}, ValueError, ("threshold", "-inf")),
    "strength nan": (
        {"rows": [[], [{"concept": 1, "strength": NAN}]]},
        ValueError,
        ("rows[1][0]", "strength"),
    ),
    "strength past float32": ({"strength": 1e39}, ValueError, ("strength", "1e+39")),
    "width zero": ({"width": 0.0}, ValueError, ("width", "0.0", "> 0")),
    "width negative": (
        {"rows": [[{"concept": 0, "width": -1}], []]},
        ValueError,
        ("rows[0][0]", "width", "-1"),
    ),
    "width below float32": ({"width": 1e-50}, ValueError, ("width", "1e-50")),
    "cap above": ({"cap": 1.5}, ValueError, ("cap", "1.5", "[0, 1]")),
    "cap below": ({"cap": -0.1}, ValueError, ("cap", "-0.1")),
    "active above": ({"rows": [[{"concept": 0, "active": 2}], []]}, ValueError, ("active", "2", "[0, 1]")),
    "active nan": ({"active": NAN}, ValueError, ("active", "nan")),
    "number type": ({"strength": "much"}, ValueError, ("strength", "'much'")),
    "bool number": ({"strength": True}, ValueError, ("strength", "True")),
    "token_bias shape": ({"token_bias": T(4)}, ValueError, ("token_bias", "[4]", "[5]")),
    "token_bias parts": ({"token_bias": [T(3)]}, ValueError, ("token_bias", "1", "2")),
    "token_bias part": ({"token_bias": [T(2), None]}, ValueError, ("token_bias", "[4]", "[5]")),
    "token_bias nan": ({"token_bias": torch.full((5,), NAN)}, ValueError, ("token_bias", "nan")),
    "token_bias inf": ({"token_bias": torch.full((5,), INF)}, ValueError, ("token_bias", "inf")),
    "token_weight nan": ({"token_weight": [None, T(2) + NAN]}, ValueError, ("token_weight", "nan")),
    "token_weight -inf": ({"token_weight": torch.full((5,), -INF)}, ValueError, ("token_weight", "inf")),
    "direction shape": ({"direction": T(2, 64)}, ValueError, ("direction", "[2, 64]", "[2, 4, 16]")),
    "direction nan": ({"direction": T(2, 4, 16) + NAN}, ValueError, ("direction", "nan")),
    "update shape": ({"update": [T(4, 16)]}, ValueError, ("update", "[1, 4, 16]", "[2, 4, 16]")),
    "offset inf": ({"offset": [0.0, INF]}, ValueError, ("offset", "inf")),
    "offset shape": ({"offset": [0.0]}, ValueError, ("offset", "[1]", "[2]")),
}


@pytest.mark.parametrize("case", PACKS)
def test_pack_refuses_by_name(case: str) -> None:
    changes, error, words = PACKS[case]
    arguments = {"keys": K, "values": K, "rows": [[0], [1]], **changes}
    refused(lambda: fn.ConceptTokens.pack(**arguments), error, *words)


def test_pack_accepts_the_limits() -> None:
    fn.ConceptTokens.pack(
        K,
        K,
        [[{"concept": 1, "cap": 0, "active": 1}], []],
        cap=1,
        active=0,
        width=1e-6,
        threshold=-3,
        strength=0,
    )


# ---- empty problems ------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["protore", "vsf", "ong", "casteer"])
@pytest.mark.parametrize("empty", ["batch", "heads", "queries", "all"])
@every_backend
def test_empty_results(backend: str, empty: str, rule: str) -> None:
    sizes = {"batch": 2, "heads": 2, "queries": 5}
    sizes = {name: 0 if empty in (name, "all") else size for name, size in sizes.items()}
    problem = make_problem(**sizes, rule=rule, rows="same")
    output, statistics = run_with_statistics(problem, backend)
    assert output.shape == problem.query.shape and output.dtype == torch.float32
    assert run(plain(problem), backend).shape == problem.query.shape
    shapes = [tuple(t.shape) for t in statistics]
    entries, queries = problem.concepts.entries, sizes["queries"]
    rows = (sizes["batch"],)
    assert shapes == [(entries,)] * 5 + [(entries, queries)] + [rows] * 3 + [(entries,), rows]
    assert all((t == 0).all() for t in statistics)  # zero denominators give 0


@every_backend
def test_no_entries_no_concepts_no_tokens(backend: str) -> None:
    problem = make_problem()
    expected = run(plain(problem), backend)
    nothing = torch.zeros(0, 2, 40)
    for tokens in (
        fn.ConceptTokens.pack([], [], [[], [], []]),
        fn.ConceptTokens.uniform([], [], 3),
        make_problem(rows="none").concepts,
        fn.ConceptTokens.uniform([nothing] * 2, [nothing] * 2, 3),
    ):
        output, statistics = run_with_statistics(dataclasses.replace(problem, concepts=tokens), backend)
        assert torch.equal(output, expected)
        assert statistics.removed_energy.tolist() == [0, 0, 0]


@pytest.mark.parametrize("rule", ["protore", "vsf", "nasa", "casteer", "nag"])
@pytest.mark.parametrize("how", ["no keys", "all masked", "all masked per query"])
@every_backend
def test_an_absent_prompt(backend: str, how: str, rule: str) -> None:
    """Z = 0 and L = -inf: nothing is left but what the rule makes of the concept alone."""
    problem = make_problem(rule=rule, rows=[[0], [1], []], keys=0 if how == "no keys" else 21)
    if how != "no keys":
        rows = 1 if how == "all masked" else 37
        bias = torch.full((1, 1, rows, 21), -torch.inf)
        problem = dataclasses.replace(problem, key_bias=bias)
    output = run(problem, backend)
    assert torch.equal(output[2], torch.zeros_like(output[2]))
    assert torch.equal(run(plain(problem), backend), torch.zeros_like(output))
    if rule == "protore":  # <Z, F> = 0: the gate is closed
        assert not output.any()
    elif rule in ("vsf", "nasa", "casteer"):  # minus the concept alone, or minus the offset along u'
        assert output[:2].any()
    elif rule == "nag":  # ratio to ‖Z‖ = 0 leaves it unlimited
        assert output[:2].any()
    Judge(problem).check(output, backend)


# ---- choice of a backend -------------------------------------------------------------------------


def test_backends_says_why_not() -> None:
    answer = fn.backends()
    assert list(answer) == ["reference", "cpu", "cuda", "triton"]
    assert answer["reference"] is None
    assert answer["cuda"] and (answer["cpu"] is None) == bool(CPU_BACKENDS)


REFUSALS: dict[str, tuple[str, Callable[[], Problem], str]] = {
    "cuda": ("cuda", make_problem, "CUDA"),
    "cpu dtype": ("cpu", lambda: double(make_problem()), "float64"),
    "cpu head_dim": ("cpu", lambda: make_problem(dim=20), "head_dim=20"),
    "cpu large head_dim": ("cpu", lambda: make_problem(dim=264), "head_dim=264"),
    "cpu keys": ("cpu", lambda: make_problem(keys=1025), "1025 prompt keys"),
    "cpu tokens": ("cpu", lambda: make_problem(concept_lengths=(1025,), rows="same"), "1025 tokens"),
}


def double(problem: Problem) -> Problem:
    return dataclasses.replace(
        problem,
        query=problem.query.double(),
        key=problem.key.double(),
        value=problem.value.double(),
        concepts=problem.concepts.cast(torch.float64),
    )


@pytest.mark.parametrize("case", REFUSALS)
def test_a_named_backend_never_falls_back(case: str) -> None:
    backend, make, word = REFUSALS[case]
    if backend == "cpu" and not CPU_BACKENDS:
        word = "not part of this install"
    if backend == "cuda":
        word = str(fn.backends()["cuda"])
    refused(lambda: call(make(), backend=backend), fn.BackendError, f"backend={backend!r}", word)


needs_cpu = pytest.mark.skipif(not CPU_BACKENDS, reason="the CPU kernel is not part of this install")


@needs_cpu
def test_the_largest_keys_and_concepts_run() -> None:
    problem = make_problem(1, 1, 9, 1024, 256, rows="same", concept_lengths=(1024,), rule="nasa")
    Judge(problem).check(run(problem, CPU_BACKENDS[0]), CPU_BACKENDS[0])


TENSORS = ("query", "key", "value", "key_bias")
CONCEPT_TENSORS = ("key", "value", "numbers", "token_bias", "token_weight", "direction", "update", "offset")


def requiring_grad(name: str) -> Problem:
    field = name.removeprefix("concepts.")
    fixed = field in ("direction", "update", "offset")
    problem = make_problem(rule=Rule(direction="fixed" if fixed else "raw"), mask="additive")
    if field != name:
        leaf = getattr(problem.concepts, field).clone().requires_grad_()
        return dataclasses.replace(problem, concepts=dataclasses.replace(problem.concepts, **{field: leaf}))
    return dataclasses.replace(problem, **{name: getattr(problem, name).clone().requires_grad_()})


@needs_cpu
@pytest.mark.parametrize("name", [*TENSORS, *(f"concepts.{t}" for t in CONCEPT_TENSORS)])
def test_gradients_are_refused_by_name_and_flow_through_auto(name: str) -> None:
    problem = requiring_grad(name)
    arguments = {"key_bias": problem.key_bias}
    refused(lambda: call(problem, backend="cpu", **arguments), fn.BackendError, "backend='cpu'", "grad")
    output = call(problem, backend="auto", **arguments)
    assert output.requires_grad
    output.sum().backward()
    holder = problem.concepts if name.startswith("concepts.") else problem
    gradient = getattr(holder, name.rpartition(".")[2]).grad
    assert gradient is not None and gradient.isfinite().all() and gradient.any()
    with torch.no_grad():
        call(problem, backend="cpu", **arguments)


def test_auto_takes_the_reference_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    choice.log_once.cache_clear()
    problem = double(make_problem())
    with caplog.at_level(logging.WARNING, logger="fastnegate"):
        outputs = [call(problem, backend="auto") for _ in range(3)]
    assert len(caplog.records) == 1
    assert "reference" in caplog.text and "float64" in caplog.text
    assert torch.equal(outputs[0], reference.run(problem))


@needs_cpu
def test_auto_takes_the_cpu_kernel_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    problem = make_problem()
    with caplog.at_level(logging.DEBUG, logger="fastnegate"):
        output = call(problem, backend="auto")
    assert not caplog.records
    assert torch.equal(output, call(problem, backend="cpu"))
    assert not torch.equal(output, call(problem, backend="reference"))


@needs_cpu
def test_an_unusable_instruction_set_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastnegate.operator.backends import cpu

    monkeypatch.setenv("FASTNEGATE_CPU_ISA", "avx1024")
    cpu.instruction_set.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=re.escape("FASTNEGATE_CPU_ISA='avx1024'")):
            call(backend="cpu")
    finally:
        monkeypatch.undo()
        cpu.instruction_set.cache_clear()


# ---- concept tokens ------------------------------------------------------------------------------


@every_backend
def test_strided_concept_tensors_are_read_as_they_are(backend: str) -> None:
    """Every optional tensor given as a view with gaps has the values of its contiguous copy."""
    problem = make_problem(rule=Rule("direction", "sigmoid", "fixed"), rows="same")
    both = [problem, make_problem(rule="nasa", rows="same")]
    for problem in both:
        tokens = problem.concepts
        gaps = {
            name: torch.stack([t, t + 1], -1)[..., 0]
            for name in ("index", "numbers", "token_bias", "token_weight", "direction", "update", "offset")
            if (t := getattr(tokens, name)) is not None
        }
        assert not any(t.is_contiguous() for t in gaps.values())
        for name, gap in gaps.items():
            strided = dataclasses.replace(problem, concepts=dataclasses.replace(tokens, **{name: gap}))
            assert torch.equal(run(strided, backend), run(problem, backend)), name


@every_backend
def test_pack_reads_strided_arguments_as_they_are(backend: str) -> None:
    tokens = make_problem(rows="same").concepts
    arguments = {
        name: getattr(tokens, name)
        for name in ("token_bias", "token_weight", "direction", "update", "offset")
    }
    gaps = {name: torch.stack([t, t + 1], -1)[..., 0] for name, t in arguments.items()}
    keys, values = tokens.key.split([8, 3, 12]), tokens.value.split([8, 3, 12])
    for rule in ("nasa", "casteer"):
        problem = make_problem(rule=rule)
        outputs = [
            run(
                dataclasses.replace(problem, concepts=fn.ConceptTokens.uniform(keys, values, 3, **a)), backend
            )
            for a in (arguments, gaps)
        ]
        assert torch.equal(*outputs)


def test_numbers_change_in_place() -> None:
    problem = make_problem(rule="nasa", rows="same")
    before = run(problem, "reference")
    problem.concepts.first_rows(3).strength.fill_(1.5)
    assert not torch.equal(run(problem, "reference"), before)
    assert problem.concepts.numbers[:, 0].tolist() == [1.5] * 9


def test_the_frozen_views_are_frozen() -> None:
    problem = make_problem()
    with pytest.raises(dataclasses.FrozenInstanceError):
        problem.concepts.key = problem.key
    with pytest.raises(dataclasses.FrozenInstanceError):
        problem.rule.strength = 3.0
