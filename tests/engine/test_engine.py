# SPDX-License-Identifier: Apache-2.0
"""`Policy` and `Engine`: policies become rows of small static tensors, or an error."""

from __future__ import annotations

import copy
import itertools
import threading
from typing import Any

import pytest
import torch

from fastnegate import Policy, RowMapError, Rule
from fastnegate.engine.bank import ConceptBank
from fastnegate.engine.concepts import Concept, Fingerprint, Role
from fastnegate.engine.engine import Engine
from fastnegate.engine.errors import NegationNotAppliedError
from fastnegate.engine.session.call import RUNNING, Call, Running
from fastnegate.engine.session.rows import Step
from fastnegate.operator.tokens import ConceptTokens

CPU = torch.device("cpu")
RULE = Rule.preset("nasa", strength=2.0)  # "full": one slot per concept
WIDTH, HEADS, DIM = 4, 1, 8
A, B = Policy({"a": 1.0}), Policy({"b": 0.5})


def make_bank(**tokens: int) -> ConceptBank:
    """Concepts by name with so many tokens."""
    concepts = {name: Concept.from_embeddings(torch.randn(n, WIDTH)) for name, n in tokens.items()}
    return ConceptBank(concepts, Fingerprint({}, torch.zeros(1)))


def make_engine(rule: Rule = RULE, max_batch: int = 4, **tokens: int) -> Engine:
    return Engine(make_bank(**(tokens or {"a": 2, "b": 3})), rule, ["layer"], max_batch=max_batch)


def call(engine: Engine, batch: int, *, guided: bool = False, progress: float | None = 0.0) -> Running:
    """A denoiser call, as an integration makes it."""
    step = None if progress is None else Step(round(progress * 1000), 1000)
    with engine.running(Call(batch, CPU, lambda: guided, step=step)) as running:
        running.negated = running.live  # as a layer says that runs
        assert running.state == ("live" if engine.live else "dormant" if engine.armed else "idle")
        return running


def tokens_of(running: Running) -> ConceptTokens:
    """What a layer would read."""
    projected = torch.nn.functional.pad(running.context[0], (0, DIM - WIDTH)).unsqueeze(1)
    return running.tokens(projected, projected + 1)


def entries(engine: Engine, running: Running) -> list[dict[str, float]]:
    """Per batch row what it negates, read as a kernel does: concept -> strength where active."""
    if not running.live:
        return [NONE] * running.call.batch
    tokens, slots = tokens_of(running), list(engine.bank)
    assert tokens.batch == running.call.batch
    offsets = tokens.index[-tokens.batch - 1 :].tolist()
    begins, lengths = tokens.index[tokens.entries : -tokens.batch - 1].view(2, -1).tolist()
    assert lengths == [len(engine.bank[c].prompt) for c in slots]
    assert begins == [sum(lengths[:i]) for i in range(len(lengths))]
    for name, begin, length in zip(slots, begins, lengths):
        assert torch.equal(tokens.key[begin : begin + length, 0, :WIDTH], engine.bank[name].prompt)
    return [
        {
            slots[tokens.index[e]]: tokens.strength[e].item()
            for e in range(first, last)
            if tokens.active[e] > 0
        }
        for first, last in itertools.pairwise(offsets)
    ]


NONE: dict[str, float] = {}
ROW_A, ROW_B = {"a": 2.0}, {"b": 1.0}  # relative strength times the rule's


@pytest.mark.parametrize(
    ("policies", "guided", "expected"),
    [
        ([A, B], False, [ROW_A, ROW_B]),
        ([A, B], True, [NONE, NONE, ROW_A, ROW_B]),
        ([A, B], True, [NONE, NONE, NONE, NONE, ROW_A, ROW_A, ROW_B, ROW_B]),
        ([A, B], False, [ROW_A, ROW_A, ROW_B, ROW_B]),
        ([A], True, [NONE, ROW_A]),
        ([A], False, [ROW_A, ROW_A, ROW_A]),
        ([A], True, [NONE, NONE, NONE, ROW_A, ROW_A, ROW_A]),
        ([None, B], True, [NONE, NONE, NONE, ROW_B]),
        ([None, None], True, [NONE] * 4),
        ([Policy({"a": 0.0}), B], False, [NONE, ROW_B]),
        ([Policy({"b": 0.5, "a": 1.0})], False, [{"a": 2.0, "b": 1.0}]),
    ],
    ids=str,
)
def test_rows_of_a_pipeline_call(
    policies: list[Policy | None], guided: bool, expected: list[dict[str, float]]
) -> None:
    engine = make_engine()
    with engine.batch(policies) as batch:
        assert batch.engine is engine
        running = call(engine, len(expected), guided=guided)
        assert entries(engine, running) == expected
        assert running.live == any(expected)
    assert call(engine, len(expected), guided=guided).state == "idle"
    assert not engine.live and not engine.armed


@pytest.mark.parametrize(
    ("policies", "row_map", "conditional", "expected"),
    [
        ([A, B], None, None, [ROW_A, ROW_B]),
        ([A, B], [1, 0, 1], None, [ROW_B, ROW_A, ROW_B]),
        ([A, B], [0, 0, 1, 1], [True, False, False, True], [ROW_A, NONE, NONE, ROW_B]),
        ([None, B], [None, 1], None, [NONE, ROW_B]),
        ([A, None], [1, 0], [True, True], [NONE, ROW_A]),
        ([A, B], None, [False, True], [NONE, ROW_B]),
    ],
)
def test_rows_of_a_server(policies: list, row_map: Any, conditional: Any, expected: list) -> None:
    engine = make_engine()
    engine.set_rows(policies, row_map, conditional)
    for _ in range(2):  # they stay until changed; nobody asks about guidance
        assert entries(engine, call(engine, len(expected), guided=None)) == expected
    engine.clear()
    assert entries(engine, call(engine, len(expected))) == [NONE] * len(expected)


def test_guidance_is_asked_for_only_when_it_matters() -> None:
    engine = make_engine()
    facts = Call(2, CPU, lambda: 1 / 0)
    engine.set_requests([None])
    with engine.running(facts) as running:
        assert running.state == "idle"
    engine.set_requests([A])
    with pytest.raises(ZeroDivisionError), engine.running(facts):
        pass


@pytest.mark.parametrize(
    ("policies", "batch", "guided", "message"),
    [
        ([A, B], 3, False, r"3 rows \(without .*2 requests"),
        ([A, B], 2, True, r"2 rows \(with .*2 requests"),
        ([A], 3, True, "3 rows"),
        ([A, B], 1, False, "1 rows"),
        ([A], 9, False, "9 rows.*max_batch=4.*8"),
    ],
)
def test_a_batch_that_contradicts_the_policies(
    policies: list, batch: int, guided: bool, message: str
) -> None:
    engine = make_engine()
    engine.set_requests(policies)
    with pytest.raises(RowMapError, match=message):
        call(engine, batch, guided=guided)
    assert not engine.live


@pytest.mark.parametrize(
    ("row_map", "conditional", "message"),
    [
        ([0, 2], None, r"row_map\[1\]=2: must be None or 0 to 1"),
        ([0, 0.5], None, r"row_map\[1\]=0.5"),
        ([0, True], None, r"row_map\[1\]=True"),
        ([None, 1], None, r"policies\[0\] has no row"),
        ([-1], None, r"row_map\[0\]=-1"),
        ([0, 1], [True], "conditional has 1 rows, row_map has 2"),
        (None, [True] * 3, "conditional has 3 rows, row_map has 2"),
    ],
)
def test_row_maps_that_contradict_themselves(row_map: Any, conditional: Any, message: str) -> None:
    engine = make_engine()
    with pytest.raises(RowMapError, match=message):
        engine.set_rows([A, B], row_map, conditional)
    assert not engine.armed


def test_explicit_rows_must_be_those_that_come() -> None:
    engine = make_engine()
    engine.set_rows([A, B])
    with pytest.raises(RowMapError, match="got 4 rows, set_rows described 2"):
        call(engine, 4)


def test_bad_requests_are_refused_at_once() -> None:
    engine = make_engine(max_batch=2)
    engine.set_requests([A])
    for policies, error, message in (
        ([A, A, A], RowMapError, "3 policies.*max_batch=2"),
        ([Policy({"x": 1.0})], ValueError, "concept 'x': the bank has a, b"),
        ([None, {"a": 1.0}], TypeError, r"policies\[1\] is a dict"),
    ):
        for set_ in (engine.set_requests, engine.set_rows):
            with pytest.raises(error, match=message):
                set_(policies)
    assert entries(engine, call(engine, 1)) == [ROW_A]  # what was set before stays
    for max_batch in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="max_batch"):
            make_engine(max_batch=max_batch)
    with pytest.raises(ValueError, match="empty"):
        Engine(make_bank(), RULE, ["layer"])


def test_a_batch_that_nobody_served_says_so() -> None:
    engine = make_engine()
    with pytest.raises(NegationNotAppliedError, match="no denoiser call"), engine.batch([A]):
        pass
    with engine.batch([None]):
        pass


def test_batches_nest_and_restore() -> None:
    engine = make_engine()
    engine.set_requests([B])
    with engine.batch([A]):
        with engine.batch([None]):
            assert not engine.armed
        assert entries(engine, call(engine, 1)) == [ROW_A]
    assert entries(engine, call(engine, 1)) == [ROW_B]


def test_what_holds_for_everybody_does_not_reach_a_batch() -> None:
    engine = make_engine()
    with engine.batch([A]):
        for change in (lambda: engine.set_requests([None]), lambda: engine.set_rows([B]), engine.clear):
            thread = threading.Thread(target=change)
            thread.start()
            thread.join()
            assert entries(engine, call(engine, 1)) == [ROW_A]
    engine.set_rows([B])
    assert entries(engine, call(engine, 1)) == [ROW_B]


def test_a_removed_engine_takes_no_requests() -> None:
    engine = make_engine()
    engine.remove()
    with pytest.raises(NegationNotAppliedError, match="removed"):
        engine.set_requests([A])


def test_as_many_policies_as_prompts_or_one() -> None:
    engine = make_engine()
    engine.set_requests([A, None])
    with engine.running(Call(2, CPU, lambda: False, prompts=2)):
        pass
    four = Call(4, CPU, lambda: False, prompts=4)
    with pytest.raises(RowMapError, match="4 prompts, but 2 policies"), engine.running(four):
        pass
    engine.set_requests([A])
    with engine.running(four):
        pass


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (RULE, {"start": 0.5, "stop": 0.5}, "the window is empty"),
        (RULE, {"start": 0.8, "stop": 0.2}, "the window is empty"),
        (Rule.preset("eiup"), {"start": 0.9}, "the window of rule 'eiup' ends at 0.8"),
        (Rule.preset("nag"), {"threshold": 0.5}, "rule 'nag' has no gate"),
        (Rule.preset("protore"), {"threshold": 1.0}, "needs one below 1"),
    ],
)
def test_policies_that_could_never_act_are_refused(rule: Rule, options: dict, message: str) -> None:
    engine = make_engine(rule)
    with pytest.raises(ValueError, match=message):
        engine.set_requests([Policy({"a": 1.0}, **options)])


# Windows.


@pytest.mark.parametrize(
    ("window", "rule", "steps", "active"),
    [
        ({}, RULE, 3, [1, 1, 1]),
        ({"stop": 0.5}, RULE, 4, [1, 1, 0, 0]),
        ({"start": 0.5}, RULE, 4, [0, 0, 1, 1]),
        ({"start": 0.3, "stop": 0.7}, RULE, 10, [0, 0, 0, 1, 1, 1, 1, 0, 0, 0]),
        ({}, Rule.preset("eiup"), 5, [1, 1, 1, 1, 0]),
        ({"stop": 1.0}, Rule.preset("eiup"), 5, [1, 1, 1, 1, 1]),
    ],
    ids=str,
)
def test_windows(window: dict, rule: Rule, steps: int, active: list[int]) -> None:
    """Step i of n acts if start <= i / n < stop; rows that say the same are the same tensors."""
    engine = make_engine(rule)
    engine.set_requests([Policy({"a": 1.0}, **window), None])
    made = set()
    for i, on in enumerate(active):
        running = call(engine, 2, progress=i / steps)
        assert [len(row) for row in entries(engine, running)] == [on, 0]
        assert running.live == bool(on)
        made |= {id(running.numbers)} if on else set()
    assert len(made) == 1


def test_each_request_has_its_own_window() -> None:
    engine = make_engine()
    engine.set_requests([Policy({"a": 1.0}, stop=0.5), Policy({"b": 0.5}, start=0.5)])
    assert entries(engine, call(engine, 2, progress=0.0)) == [ROW_A, NONE]
    assert entries(engine, call(engine, 2, progress=0.5)) == [NONE, ROW_B]


@pytest.mark.parametrize(
    ("rule", "policy", "raises"),
    [
        (RULE, A, False),
        (RULE, Policy({"a": 1.0}, stop=0.9), True),
        (RULE, Policy({"a": 1.0}, start=0.1), True),
        (Rule.preset("eiup"), A, True),
        (Rule.preset("eiup"), Policy({"a": 1.0}, stop=1.0), False),
        (Rule.preset("eiup"), None, False),
    ],
    ids=str,
)
def test_a_window_needs_to_know_the_progress(rule: Rule, policy: Policy | None, raises: bool) -> None:
    engine = make_engine(rule)
    engine.set_requests([policy])
    if not raises:
        assert call(engine, 1, progress=None).live == (policy is not None)
        return
    with pytest.raises(NegationNotAppliedError, match="progress"):
        call(engine, 1, progress=None)
    assert not engine.live


def test_thresholds_of_requests() -> None:
    engine = make_engine(Rule.preset("protore"))
    engine.set_requests([Policy({"a": 1.0}, threshold=0.25), Policy({"a": 1.0})])
    threshold = tokens_of(call(engine, 2)).threshold
    assert threshold[0] == 0.25 and threshold[1].isnan()  # NaN: the rule's own


def test_prototypes_are_entries_of_their_own() -> None:
    engine = make_engine(Rule.preset("protore"))
    engine.bank.update("a", [torch.randn(1, WIDTH), torch.randn(2, WIDTH)])
    engine.set_requests([A])
    tokens = tokens_of(call(engine, 1))
    assert tokens.index[tokens.entries : -2].tolist() == [0, 1, 3, 1, 2, 3]  # begins, lengths
    assert tokens.index[-2:].tolist() == [0, 2]
    assert tokens.strength[:2].tolist() == [2.0, 2.0]


# Hot swap.


def test_another_bank_of_the_same_shape_is_read_at_once() -> None:
    engine = make_engine()
    engine.set_requests([A, B])
    before = call(engine, 2)
    engine.bank.update("a", torch.randn(2, WIDTH))
    engine.set_requests([Policy({"a": 0.25, "b": 0.5}), None])
    after = call(engine, 2)
    assert entries(engine, after) == [{"a": 0.5, "b": 1.0}, NONE]
    assert not torch.equal(after.context[0, :2], before.context[0, :2])
    assert torch.equal(after.context[0, 2:], before.context[0, 2:])


# At fixed addresses, for compiled code.


def fixed(engine: Engine, batch: int, **options: Any) -> list[int]:
    """A call that reads them; checks that it reads what other calls would, and gives the addresses."""
    with engine.running(Call(batch, CPU, lambda: False, fixed=True, compiled=True, **options)) as running:
        rows = engine.fixed
        assert rows.ready and engine.fixed.owner == threading.get_ident()
        projected = torch.nn.functional.pad(rows.context[0], (0, DIM - WIDTH)).unsqueeze(1)
        tokens = rows.tokens(projected, projected)
        assert tokens.batch == batch and torch.equal(rows.context, running.context)
        offsets = tokens.index[-batch - 1 :].tolist()
        found = [
            {list(engine.bank)[tokens.index[e]]: tokens.strength[e].item() for e in range(*span)}
            for span in itertools.pairwise(offsets)
        ]
    assert not rows.ready and engine.fixed.owner is None
    assert found == entries(engine, call(engine, batch))
    return [t.data_ptr() for t in (rows.context, rows.index, rows.numbers)]


@pytest.mark.parametrize("batch", [1, 2, 4, 8])
def test_rows_keep_their_addresses_while_the_bank_keeps_its_shape(batch: int) -> None:
    engine = make_engine()
    engine.set_requests([A])
    first = fixed(engine, 3)
    assert fixed(engine, batch) == first
    engine.bank.update("a", torch.randn(2, WIDTH))
    engine.set_requests([Policy({"a": 0.25, "b": 0.5})])
    assert fixed(engine, batch) == first
    engine.clear()
    assert fixed(engine, batch) == first


def test_calls_that_read_fixed_addresses_take_turns() -> None:
    engine = make_engine()
    engine.set_requests([A])
    facts = Call(1, CPU, lambda: False, fixed=True)
    entered: list[str] = []

    def other() -> None:
        with engine.running(facts):
            entered.append("other")

    thread = threading.Thread(target=other)
    with engine.running(facts):
        thread.start()
        thread.join(0.2)
        assert entered == [] and thread.is_alive()
        with pytest.raises(NegationNotAppliedError, match="within its own forward"), engine.running(facts):
            pass
    thread.join(60)
    assert entered == ["other"]


def test_concepts_come_and_go() -> None:
    engine = make_engine()
    engine.set_requests([Policy({"a": 1.0, "b": 0.5})])
    call(engine, 1)
    engine.bank.update("a", torch.randn(5, WIDTH))  # longer
    assert entries(engine, call(engine, 1)) == [{"a": 2.0, "b": 1.0}]
    engine.bank.update("c", torch.randn(1, WIDTH))  # new
    assert entries(engine, call(engine, 1)) == [{"a": 2.0, "b": 1.0}]
    engine.set_requests([Policy({"b": 0.5, "c": 1.0})])
    assert entries(engine, call(engine, 1)) == [{"b": 1.0, "c": 2.0}]
    engine.bank.remove("c")
    with pytest.raises(NegationNotAppliedError, match="'c' was removed"):
        call(engine, 1)
    engine.set_requests([B])
    assert entries(engine, call(engine, 1)) == [ROW_B]


def test_a_change_of_roles_changes_weights() -> None:
    """The weighted rule reads roles: they may change while every shape stays."""
    engine = make_engine(Rule.preset("eiup"))
    engine.set_requests([A])
    for roles in ([Role.SOT, Role.CONTENT], [Role.CONTENT, Role.EOT]):
        old = engine.bank["a"]
        engine.bank.update("a", Concept(old.prompt, torch.tensor(roles, dtype=torch.int8), old.prototypes))
        weight = call(engine, 1).weight
        assert weight is not None
        assert weight[:2].tolist() == [float(r == Role.CONTENT) for r in roles]


def test_the_last_concept_may_go() -> None:
    """A pipeline without policies runs as if nothing were installed, whatever the bank holds."""
    engine = make_engine(a=2)
    engine.bank.remove("a")
    assert entries(engine, call(engine, 2, guided=True)) == [NONE, NONE] and not engine.live
    engine.bank.update("a", torch.randn(3, WIDTH))
    engine.set_requests([A])
    assert entries(engine, call(engine, 2, guided=True)) == [NONE, ROW_A]


def test_remove_runs_once_and_engines_are_not_copied() -> None:
    engine, calls = make_engine(), []
    engine.on_remove(lambda: calls.append(1))
    engine.set_requests([A])
    with pytest.raises(TypeError, match="belongs to its pipeline"):
        copy.deepcopy(engine)
    engine.remove()
    engine.remove()
    assert calls == [1] and not engine.armed


def test_after_an_error_nothing_of_a_call_is_left() -> None:
    engine = make_engine()
    engine.set_requests([A])
    for error in (ZeroDivisionError, KeyboardInterrupt):
        for fixed in (False, True):
            facts = Call(1, CPU, lambda: False, fixed=fixed, compiled=fixed)
            with pytest.raises(error), engine.running(facts):
                assert engine.live
                raise error
            assert RUNNING.get() is None and not engine.live
            assert not engine.fixed.ready and engine.fixed.owner is None


# Negative prompts.


def test_negative_prompts_are_encoded_once() -> None:
    asked: list[str] = []

    def encode(text: str) -> Concept:
        asked.append(text)
        return Concept.from_embeddings(torch.full((len(text), WIDTH), float(len(text))))

    engine = Engine(make_bank(a=2), RULE, ["layer"], max_batch=4, encode=encode)
    policies = [Policy(negative_prompt="xy"), Policy({"a": 1.0}, negative_prompt="pqr"), None]
    for _ in range(2):
        engine.set_requests(policies)
        running = call(engine, 3)
        tokens = tokens_of(running)
        assert running.context[0, 2:, 0].tolist() == [2.0] * 2 + [3.0] * 3
        assert tokens.index[-4:].tolist() == [0, 1, 3, 3]
        assert tokens.index[:3].tolist() == [1, 0, 2]
    engine.set_requests([Policy(negative_prompt="pqr", negative_strength=0.5)])
    assert tokens_of(call(engine, 1)).strength[0] == 1.0
    assert asked == ["xy", "pqr"]
    with engine.batch([Policy({"a": 1.0}, negative_prompt="z", negative_strength=0.0)]):
        assert len(call(engine, 1).context[0]) == 2
    assert asked == ["xy", "pqr"]


def test_a_text_is_encoded_again_when_the_encoder_has_changed() -> None:
    state, asked = [1], []

    def encode(text: str) -> Concept:
        asked.append(text)
        return Concept.from_embeddings(torch.full((2, WIDTH), float(state[0])))

    engine = Engine(make_bank(a=2), RULE, ["layer"], encode=encode, encoder_state=lambda: state[0])
    for state[0] in (1, 2, 1):
        engine.set_requests([Policy(negative_prompt="x")])
        assert call(engine, 1).context[0, 2:, 0].tolist() == [float(state[0])] * 2
    assert asked == ["x", "x"]


def test_another_negative_prompt_changes_no_size_that_was_compiled() -> None:
    def encode(text: str) -> Concept:
        return Concept.from_embeddings(torch.full((len(text), WIDTH), float(len(text))))

    engine = Engine(make_bank(a=2), RULE, ["layer"], max_batch=4, encode=encode)

    def sizes(*texts: str) -> tuple[Any, ...]:
        engine.set_requests([Policy(negative_prompt=text) for text in texts])
        with engine.running(Call(len(texts), CPU, lambda: False, fixed=True)):
            rows = engine.fixed
            return rows.embeddings.shape, rows.numbers.shape, rows._all.shape, rows.longest, rows.concepts

    first = sizes("xy")
    assert sizes("pqrst") == sizes("x", "yz", "zzz", "zzzz") == first


def test_an_engine_without_an_encoder_refuses_negative_prompts() -> None:
    with pytest.raises(ValueError, match="negative_prompt='x'"):
        make_engine().set_requests([Policy(negative_prompt="x")])


# Policy.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"concepts": {"a": -0.1}}, "strength of 'a'=-0.1"),
        ({"concepts": {"a": float("nan")}}, "strength of 'a'=nan"),
        ({"concepts": {"a": float("inf")}}, "strength of 'a'=inf"),
        ({"concepts": {"a": True}}, "strength of 'a'=True"),
        ({"concepts": {"a": "1"}}, "strength of 'a'='1'"),
        ({"start": -0.1}, "start=-0.1"),
        ({"start": None}, "start=None"),
        ({"stop": 1.1}, "stop=1.1"),
        ({"stop": float("nan")}, "stop=nan"),
        ({"threshold": float("inf")}, "threshold=inf"),
        ({"negative_prompt": " "}, "negative_prompt=' ': is blank"),
        ({"negative_strength": -1.0}, "negative_strength=-1.0"),
    ],
    ids=str,
)
def test_policy_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Policy(**arguments)


def test_policy_is_a_value() -> None:
    assert Policy({"a": 1}) == Policy({"a": 1.0}) != Policy({"a": 1.0}, stop=0.5)
    with pytest.raises(AttributeError):
        A.start = 0.5  # type: ignore[misc]
    concepts = {"a": 1.0}
    policy = Policy(concepts)
    concepts["a"] = -1.0  # would not have been accepted
    assert policy.concepts == {"a": 1.0}
