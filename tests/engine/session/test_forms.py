# SPDX-License-Identifier: Apache-2.0
"""JSON forms of what goes over the wire: policies, and proofs of negation. Whatever a client or a server
writes is taken as it is, or refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastnegate import NegationNotAppliedError, Policy, Proof

DIGEST = "0123456789abcdef" * 4
PROOF = Proof("protore", DIGEST, 20, {"red": 20, "blue": 4}, 16)

numbers = st.floats(0, 1e30) | st.integers(0, 10)
policies = st.builds(
    Policy,
    st.dictionaries(st.text(min_size=1, max_size=5), numbers, max_size=4),
    start=st.floats(0, 0.5),
    stop=st.none() | st.floats(0.6, 1),
    threshold=st.none() | numbers,
    negative_prompt=st.none() | st.just("blurry, grey"),
    negative_strength=numbers,
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(policies)
def test_a_policy_comes_back_from_its_form(policy: Policy) -> None:
    assert Policy.from_json(json.loads(json.dumps(policy.to_json()))) == policy


def test_a_form_has_what_is_not_by_default() -> None:
    assert Policy().to_json() == {} and not Policy.from_json({}).asks
    policy = Policy({"red": 1.0}, stop=0.8)
    assert policy.to_json() == {"concepts": {"red": 1.0}, "stop": 0.8}
    policy.to_json()["concepts"]["blue"] = 1.0
    assert policy == Policy({"red": 1.0}, stop=0.8)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (None, "policy is a NoneType: must be an object"),
        ([], "policy is a list: must be an object"),
        ('{"concepts": {}}', "policy is a str"),
        ({"concept": {"red": 1.0}}, "policy has 'concept': its fields are concepts, start, stop"),
        ({"x" * 10_000: 1}, r"policy has '(x{299})\.\.\.: its fields"),
        ({"concepts": ["red"]}, "concepts is a list: must map"),
        ({"concepts": None}, "concepts is a NoneType: must map"),
        ({"concepts": {"red": "1"}}, "strength of 'red'='1': must be a finite number"),
        ({"concepts": {"red": True}}, "strength of 'red'=True: must be a finite number"),
        ({"concepts": {"red": -1.0}}, "strength of 'red'=-1.0: must be in"),
        ({"concepts": {"red": float("nan")}}, "strength of 'red'=nan: must be a finite number"),
        ({"concepts": {"red": 1e39}}, "strength of 'red'=1e\\+39: must be a finite number"),
        ({"concepts": {"": 1.0}}, "concept '': a name has 1 to 200"),
        ({"concepts": {"x" * 201: 1.0}}, "concept 'x+': a name has 1 to 200"),
        ({"concepts": {str(i): 1.0 for i in range(65)}}, "concepts has 65 names: at most 64"),
        ({"start": None}, "start=None: must be a finite number"),
        ({"stop": 1.5}, "stop=1.5: must be in"),
        ({"start": 0.5, "stop": 0.5}, "the window is empty"),
        ({"threshold": "0.5"}, "threshold='0.5': must be a finite number"),
        ({"threshold": "5" * 10_000}, r"threshold='5{289}\.\.\.$"),
        ({"negative_prompt": " "}, "negative_prompt=' ': is blank"),
        ({"negative_prompt": 5}, "negative_prompt=5: must be a text or None"),
        ({"negative_prompt": "x" * 2001}, "negative_prompt has 2001 characters: at most 2000"),
        ({"negative_strength": False}, "negative_strength=False: must be a finite number"),
    ],
)  # fmt: skip
def test_what_a_client_wrote_wrongly_is_named(form: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Policy.from_json(form)


@given(json_values | st.dictionaries(st.sampled_from([*vars(Policy()), "other"]), json_values, max_size=3))
def test_any_other_form_is_one_kind_of_error(form: Any) -> None:
    try:
        policy = Policy.from_json(form)
    except ValueError as error:
        assert len(str(error)) < 1000
    else:
        assert isinstance(form, dict) and Policy.from_json(policy.to_json()) == policy


def test_a_proof_comes_back_from_its_form() -> None:
    form = json.loads(json.dumps(PROOF.to_json()))
    assert Proof.from_json(form) == PROOF and list(form) == [
        "rule", "bank", "steps", "concepts", "negative_prompt"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"rule": None}, {"bank": "0"}, {"bank": 5}, {"steps": 20.0}, {"steps": True}, {"steps": 19},
        {"concepts": ["red"]}, {"concepts": {"red": 21}}, {"concepts": {"red": "20"}}, {"more": 1},
        {"negative_prompt": -1}, {"negative_prompt": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_proof_that_is_none_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(NegationNotAppliedError, match="the answer"):
        Proof.from_json({**PROOF.to_json(), **change})


@pytest.mark.parametrize("form", [None, "yes", {}, {"concepts": {"red": 20}}, []], ids=str)
def test_an_answer_without_a_proof_is_refused(form: object) -> None:
    with pytest.raises(NegationNotAppliedError, match="the answer proves nothing"):
        Proof.from_json(form)


BOTH = Policy({"red": 1.0, "blue": 0.1, "green": 0.0}, negative_prompt="grey")


def test_a_proof_is_of_what_was_asked_for() -> None:
    PROOF.check(BOTH)
    PROOF.check(BOTH, bank=DIGEST)
    for nothing in (None, Policy({"red": 0.0}, negative_prompt="grey", negative_strength=0.0)):
        Proof("protore", DIGEST, 20, {}).check(nothing)


@pytest.mark.parametrize(
    ("proof", "policy", "message"),
    [
        (PROOF, None, r"asked to negate nothing: \['blue', 'red'\] acted"),
        (PROOF, Policy({"red": 1.0}, negative_prompt="grey"), r"asked to negate \['red'\]"),
        (Proof("protore", DIGEST, 20, {"red": 20}, 16), BOTH, r"\['blue', 'red'\]: \['red'\] acted"),
        (Proof("protore", DIGEST, 20, {"red": 20, "blue": 0}, 16), BOTH, r": \['red'\] acted"),
        (Proof("protore", DIGEST, 20, {}), Policy({"red": 1.0}), r"\['red'\]: nothing acted"),
        (
            Proof("protore", DIGEST, 20, {"red": 20, "blue": 4}),
            BOTH,
            "negative_prompt='grey' acted at 0 steps",
        ),
        (PROOF, Policy({"red": 1.0, "blue": 1.0}), "negative_prompt=None acted at 16 steps"),
        (Proof("protore", DIGEST, 0, {}), None, "no denoising step ran"),
    ],
)
def test_a_proof_of_anything_else_is_refused(proof: Proof, policy: Policy | None, message: str) -> None:
    with pytest.raises(NegationNotAppliedError, match=message):
        proof.check(policy)


def test_a_proof_from_another_bank_is_refused() -> None:
    with pytest.raises(NegationNotAppliedError, match=f"bank {DIGEST} was read: asked for was 0$"):
        PROOF.check(BOTH, bank="0")
