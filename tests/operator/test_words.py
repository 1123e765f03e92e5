# SPDX-License-Identifier: Apache-2.0
"""A word that a backend does not know is refused by name: nobody computes a neighbour in its place."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support import CPU_BACKENDS, make_problem, with_rule

import fastnegate as fn
from fastnegate.operator import mixing, reference, rule
from fastnegate.operator import registration as ops
from fastnegate.operator.backends import BACKENDS, NAMES, cpu, native
from fastnegate.operator.problem import Problem
from fastnegate.operator.rule import CODES, Reads, Rule
from fastnegate.operator.statistics import GATE_REPORT_LEVEL
from fastnegate.operator.tokens import CAPACITIES, COLUMNS, NUMBERS, TENSORS

ROOT = Path(__file__).resolve().parents[2]
needs_cpu = pytest.mark.skipif(not CPU_BACKENDS, reason="the CPU kernel is not part of this install")
TOLD = [word for word in CODES if len(native.WORDS[word]) > 1]  # to csrc
every_word = pytest.mark.parametrize("word", CODES)


@pytest.fixture
def new(word: str, monkeypatch: pytest.MonkeyPatch) -> Problem:
    """A problem whose rule says a word that rule.py alone has."""
    if word == "norm_order":
        monkeypatch.setattr(rule, "NORM_ORDERS", (*rule.NORM_ORDERS, 3))
        return with_rule(make_problem(rows="same"), norm="limit", norm_order=3)
    monkeypatch.setitem(rule._WORDS, word, (*rule._WORDS[word], "smooth"))
    return with_rule(make_problem(rows="same", rule=Rule()), **{word: "smooth"})


def call(problem: Problem, backend: str, function: Any = fn.negated_attention) -> Any:
    p = problem
    return function(p.query, p.key, p.value, p.concepts, p.rule, backend=backend)


@every_word
@pytest.mark.parametrize("function", (fn.negated_attention, fn.negated_attention_with_statistics))
def test_a_new_word_is_refused_by_every_backend(word: str, function: Any, new: Problem) -> None:
    said = f"{word}={getattr(new.rule, word)!r} is not implemented"
    for name in ("reference", "auto", *(["cpu"] if CPU_BACKENDS else [])):  # others refuse tensors of the CPU
        with pytest.raises(fn.BackendError, match=re.escape(said)):
            call(new, name, function)


@every_word
def test_a_plan_of_a_new_word_is_refused_whoever_asks(word: str, new: Problem) -> None:
    """Those who make plans themselves have asked nobody."""
    said = f"{word}={getattr(new.rule, word)!r} is not implemented"
    for backend in BACKENDS:
        for statistics in (False, True):
            with pytest.raises(fn.BackendError, match=re.escape(said)):
                backend.plan(new, statistics)


@every_word
def test_the_registered_operator_refuses_it_too(word: str, new: Problem) -> None:
    operator = torch.ops.fastnegate.negated_attention.default
    for name in NAMES:
        with pytest.raises(fn.BackendError, match="is not implemented"):
            operator(*ops.flat(new, name))


@pytest.mark.parametrize("word", [word for word in CODES if word != "norm_order"])
def test_the_reference_raises_where_a_word_is_read(word: str, new: Problem, monkeypatch) -> None:
    """Its last branches are no neighbours either."""
    monkeypatch.setattr(reference, "unknown_word", lambda words, rule: None)
    problem = with_rule(new, norm="limit") if word == "scope" else new
    with pytest.raises(NotImplementedError, match=f"{word}='smooth'"):
        reference.run(problem)


def test_what_is_unknown_is_named() -> None:
    assert str(mixing.unknown("gate", "smooth")) == "gate='smooth' is not implemented"


@pytest.mark.parametrize("place", [i for i, word in enumerate(CODES) if word != "norm_order"])
@pytest.mark.parametrize("code", (-1, 99))
def test_codes_without_a_word_are_refused(place: int, code: int) -> None:
    codes = [*Rule().codes]
    codes[place] = code
    with pytest.raises(ValueError, match=f"{CODES[place]} has code {code}: must be from 0 to"):
        Rule.from_flat(codes, Rule().numbers)
    problem = make_problem(rows="same")
    arguments = [*ops.flat(problem, "reference")]
    arguments[14] = codes
    with pytest.raises(ValueError, match=f"{CODES[place]} has code {code}"):
        torch.ops.fastnegate.negated_attention.default(*arguments)


def test_flat_rules_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="codes of a rule has 7 values: must be similarity"):
        Rule.from_flat(Rule().codes[:-3], Rule().numbers)
    with pytest.raises(ValueError, match="numbers of a rule has 9 values: must be norm_limit"):
        Rule.from_flat(Rule().codes, (*Rule().numbers, 0.0))


@needs_cpu
@pytest.mark.parametrize("place", range(len(TOLD)))
@pytest.mark.parametrize("code", (-1, 9))
def test_the_extension_makes_no_call_of_such_codes(place: int, code: int) -> None:
    """Nothing is written either: there is no call to run."""
    *others, codes, numbers, reads, partials = native.layout(make_problem(rows="same")).arguments
    codes = (*codes[:place], code, *codes[place + 1 :])
    with pytest.raises(ValueError, match=f"{TOLD[place]} (has code|is) {code}: must be"):
        cpu._C.Call((*others, codes, numbers, reads, partials), GATE_REPORT_LEVEL)


@needs_cpu
def test_the_extension_makes_no_call_of_another_dtype() -> None:
    sizes, strides, bias, _, *others = native.layout(make_problem(rows="same")).arguments
    with pytest.raises(ValueError, match="dtype has code 3: must be from 0 to 2"):
        cpu._C.Call((sizes, strides, bias, 3, *others), GATE_REPORT_LEVEL)


@needs_cpu
def test_the_extension_runs_nothing_without_memory() -> None:
    problem = make_problem(rows="none")
    layout = native.layout(problem)
    made = cpu._C.Call(layout.arguments, GATE_REPORT_LEVEL)
    with pytest.raises(ValueError, match="has no memory"):
        cpu._C.run_cpu(made, 0, 0, 0, 0, 0, (), (), 0, 0, 0, cpu.instruction_set(), 1)
    with pytest.raises(ValueError, match="concepts have 9 addresses"):
        cpu._C.run_cpu(made, 0, 0, 0, 0, 0, (1, 2), (), 0, 0, 0, cpu.instruction_set(), 1)


# ---- the same in C++ --------------------------------------------------------------------------------


def header(name: str) -> str:
    return (ROOT / "csrc" / name).read_text()


def enums() -> dict[str, tuple[str, ...]]:
    """Enumerators by the name of their enum, in problem.h."""
    found = re.findall(r"enum class (\w+) : int \{([^}]*)\}", header("include/fastnegate/problem.h"))
    return {name: tuple(word.strip() for word in words.split(",")) for name, words in found}


def fields(struct: str) -> list[str]:
    """Of a struct of problem.h, without comments."""
    body = re.search(rf"struct {struct} \{{(.*?)\}};", header("include/fastnegate/problem.h"), re.S)[1]
    lines = [line.partition("//")[0].strip().rstrip(";") for line in body.splitlines()]
    names = [name for line in lines if line for name in line.split(maxsplit=1)[1].split(",")]
    return [name.strip(" *") for name in names]


def test_words_are_those_of_problem_h() -> None:
    """In the same order: a word crosses the boundary as its place."""
    found = enums()
    dtypes = found.pop("Dtype")
    assert {name.lower() for name in found} == {*TOLD} - {"norm_order"}
    for name, words in found.items():
        assert rule._WORDS[name.lower()] == words == native.WORDS[name.lower()]
    assert [str(dtype) for dtype in native.DTYPES] == [f"torch.{name}" for name in dtypes]
    assert [*native.DTYPES.values()] == list(range(len(dtypes)))


def test_bindings_know_the_last_word_of_each() -> None:
    """The one beyond which they refuse."""
    last = dict(re.findall(r'word\("(\w+)", \w+(?:\[\d\])?, \w+::(\w+)\)', header("arguments.h")))
    assert last == {name.lower(): words[-1] for name, words in enums().items()}


def test_numbers_and_what_is_read_are_those_of_problem_h() -> None:
    assert tuple(fields("Numbers")) == NUMBERS
    assert tuple(fields("Reads")) == Reads._fields
    assert fields("Rule")[: len(TOLD)] == TOLD
    assert f"kNumberColumns = {COLUMNS};" in header("include/fastnegate/problem.h")


def test_concepts_are_flattened_in_one_order() -> None:
    """That of tokens.py, in the registered operator, the Triton kernel and the bindings."""
    names = [argument.name for argument in torch.ops.fastnegate.negated_attention.default._schema.arguments]
    flat = ["concept_key", "concept_value", *TENSORS[2:]]
    assert names[4 : 4 + len(TENSORS)] == flat
    assigned = re.findall(r"p\.(\w+)(?:\.data)? = at<[^>]+>\(concepts\[(\d)\]\)", header("arguments.h"))
    assert [name for name, _ in assigned] == flat
    assert [int(place) for _, place in assigned] == list(range(len(TENSORS)))
    kernel = (ROOT / "triton_kernels" / "attention.py").read_text()
    signature = kernel[kernel.index("def attention(") :]
    assert "concept_key, concept_value, index, numbers, token_bias, token_weight," in signature
    sizes = re.findall(r"p\.(\w+) = sizes\[(\d)\]", header("arguments.h"))
    assert [name for name, _ in sizes][5:9] == [*CAPACITIES]
    assert [int(place) for _, place in sizes] == list(range(10))


def test_concept_tokens_have_that_order() -> None:
    tokens = make_problem(rows="same", rule="casteer").concepts
    assert all(a is getattr(tokens, name) for a, name in zip(tokens.tensors, TENSORS, strict=True))
    assert tokens.capacities == tuple(getattr(tokens, name) for name in CAPACITIES)
    names = {field.name for field in dataclasses.fields(tokens)}
    assert names == {*TENSORS, "neutral", *CAPACITIES}


def test_backends_list_words_of_the_rule_in_its_order() -> None:
    for backend in BACKENDS:
        assert set(backend.WORDS) == {*CODES}
        for word, words in backend.WORDS.items():
            known = rule.NORM_ORDERS if word == "norm_order" else rule._WORDS[word]
            assert [w for w in known if w in words] == [*words], (backend.NAME, word)


def test_every_preset_has_words_of_some_fused_backend() -> None:
    for preset in fn.presets().values():
        assert all(getattr(preset, word) in native.WORDS[word] for word in CODES)
