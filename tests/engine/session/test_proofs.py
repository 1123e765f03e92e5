# SPDX-License-Identifier: Apache-2.0
"""What an engine tells a server: whether a request could be served, which concepts it is served from, and
what became of it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fastnegate import BankMismatchError, NegationNotAppliedError, Policy, Proof, Rule
from fastnegate.engine.bank import ConceptBank
from fastnegate.engine.concepts import Concept, Fingerprint
from fastnegate.engine.engine import Engine
from fastnegate.engine.session.call import Call, PipelineCall
from fastnegate.engine.session.rows import Step

CPU = torch.device("cpu")
A, B = Policy({"a": 1.0}), Policy({"b": 0.5, "c": 0.0}, stop=0.5)


def make_bank(**tokens: int) -> ConceptBank:
    """Concepts by name with so many tokens, the same each time."""
    numbers = torch.Generator().manual_seed(0)
    named = {name: torch.randn(n, 4, generator=numbers) for name, n in tokens.items()}
    concepts = {name: Concept.from_embeddings(embeddings, [name]) for name, embeddings in named.items()}
    return ConceptBank(concepts, Fingerprint({"encoder": "E"}, torch.zeros(1)))


def make_engine(**arguments: Any) -> Engine:
    arguments = {"rule": Rule.preset("nasa"), "layers": ["layer"], "max_batch": 4, **arguments}
    return Engine(make_bank(a=2, b=3, c=1), **arguments)


def run(engine: Engine, rows: int, steps: Sequence[Step | None], lost: bool = False) -> None:
    """A pipeline call of so many rows."""
    of = PipelineCall()
    for step in steps:
        with engine.running(Call(rows, CPU, lambda: False, of=of, step=step)) as running:
            running.negated = running.live and not lost


TEN = [Step(i, 10) for i in range(10)]


def test_a_batch_proves_what_acted_at_how_many_steps() -> None:
    engine = make_engine()
    digest = engine.bank.digest
    assert engine.last == ()
    with engine.batch([A, None, B]) as batch:
        assert batch.proofs == tuple([Proof("nasa", "", 0, {})] * 3)  # nothing ran yet
        run(engine, 3, TEN)
    expected = (
        Proof("nasa", digest, 10, {"a": 10}),
        Proof("nasa", digest, 10, {}),
        Proof("nasa", digest, 10, {"b": 5}),
    )
    assert batch.proofs == engine.last == expected
    for policy, proof in zip([A, None, B], batch.proofs):
        proof.check(policy, bank=digest)


def test_a_step_counts_once_however_many_calls_it_has() -> None:
    engine = make_engine()
    with engine.batch([A]) as batch:
        run(engine, 1, [step for step in TEN for _ in range(2)])
        assert batch.proofs[0].concepts == {"a": 10} and batch.proofs[0].steps == 10
        run(engine, 1, TEN[:5])  # another pipeline call
        run(engine, 1, [None, None])  # a loop whose steps nobody knows: each call is one
    assert batch.proofs[0].concepts == {"a": 17} and batch.proofs[0].steps == 17


def test_what_no_layer_did_is_not_proven() -> None:
    engine = make_engine()
    with pytest.raises(NegationNotAppliedError, match="never acted"), engine.batch([A, None]) as batch:
        run(engine, 2, TEN, lost=True)
    assert batch.proofs[0] == Proof("nasa", engine.bank.digest, 10, {})
    with pytest.raises(NegationNotAppliedError, match="nothing acted"):
        batch.proofs[0].check(A)


def test_requests_that_ask_for_nothing_have_proofs_too() -> None:
    engine = make_engine()
    with engine.batch([None, Policy()]) as batch:
        run(engine, 2, TEN)
    assert batch.proofs == tuple([Proof("nasa", engine.bank.digest, 10, {})] * 2)


def test_what_is_set_for_everybody_is_counted_from_then_on() -> None:
    engine = make_engine()
    engine.set_requests([A])
    for _ in range(2):
        run(engine, 1, TEN)
    assert engine.last == (Proof("nasa", engine.bank.digest, 20, {"a": 20}),)
    engine.set_rows([A, B], row_map=[1, 0])
    run(engine, 2, TEN)
    assert [proof.concepts for proof in engine.last] == [{"a": 10}, {"b": 5}]


def test_negative_prompts_are_proven_apart_from_concepts_of_their_name() -> None:
    engine = make_engine(encode=lambda text: Concept.from_embeddings(torch.ones(2, 4), [text]))
    policies = [Policy(negative_prompt="a"), Policy({"a": 1.0}, negative_prompt="x"), A]
    with engine.batch(policies) as batch:
        run(engine, 3, TEN)
    assert [(p.concepts, p.negative_prompt) for p in batch.proofs] == [
        ({}, 10),
        ({"a": 10}, 10),
        ({"a": 10}, 0),
    ]
    for policy, proof in zip(policies, batch.proofs):
        proof.check(policy)


def test_batches_of_several_threads_count_their_own_steps() -> None:
    engine, found = make_engine(), {}

    def serve(steps: int, policy: Policy, name: str) -> None:
        for _ in range(20):
            with engine.batch([policy]) as batch:
                run(engine, 1, [Step(i, steps) for i in range(steps)])
            found.setdefault((steps, name), set()).add((batch.proofs[0].steps, str(batch.proofs[0].concepts)))

    threads = [threading.Thread(target=serve, args=of) for of in [(4, A, "a"), (6, A, "a"), (8, B, "b")]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = {"a": 1.0, "b": 0.5}
    assert found == {
        (n, name): {(n, str({name: round(n * counts[name])}))} for n, name in [(4, "a"), (6, "a"), (8, "b")]
    }


# ---- before a request is in a batch -------------------------------------------------------------


def never(text: str) -> Concept:
    pytest.fail(f"{text!r} was encoded")


def refuse(text: str) -> None:
    if "ü" in text:
        raise ValueError(f"negative_prompt: {text!r} has characters that the tokenizer does not know")


@pytest.mark.parametrize(
    ("policy", "steps", "message"),
    [
        (Policy({"d": 1.0}), None, "concept 'd': the bank has a, b, c"),
        (Policy({"a": 1.0}, threshold=0.5), None, "has no gate"),
        (Policy({"a": 3e38}), None, "strength"),
        (
            Policy({"a": 1.0}, start=0.55, stop=0.6),
            4,
            r"start=0.55, stop=0.6: the window holds none of the 4",
        ),
        (Policy(negative_prompt="grün"), None, "tokenizer does not know"),
    ],
    ids=str,
)
def test_a_request_that_would_stop_a_batch_is_refused_before(
    policy: Policy, steps: int | None, message: str
) -> None:
    engine = make_engine(encode=never, check_text=refuse, rule=Rule.preset("nasa", strength=2.0))
    with pytest.raises(ValueError, match=message):
        engine.check(policy, steps)


def test_a_check_changes_nothing() -> None:
    encoded: list[str] = []

    def encode(text: str) -> Concept:
        encoded.append(text)
        return Concept.from_embeddings(torch.ones(2, 4), [text])

    engine = make_engine(encode=encode, check_text=refuse)
    for policy in (None, A, B, Policy(negative_prompt="grey")):
        engine.check(policy, 10)
    assert not encoded and not engine.armed and engine.last == () and engine.ledger() is None
    with pytest.raises(TypeError, match=r"policies\[0\] is a dict: must be a Policy or None"):
        engine.check({"concepts": {}})  # type: ignore[arg-type]
    engine.remove()
    with pytest.raises(NegationNotAppliedError, match="was removed"):
        engine.check(A)


def test_a_rule_of_directions_reads_no_negative_prompt() -> None:
    engine = Engine(make_bank(), Rule.preset("casteer"), ["layer"], encode=never)
    for ask in (engine.check, lambda policy: engine.batch([policy])):
        with pytest.raises(ValueError, match="'grey': rule 'casteer' reads a steering direction"):
            ask(Policy(negative_prompt="grey"))


# ---- another bank -------------------------------------------------------------------------------


def test_a_bank_becomes_another_at_once() -> None:
    bank, other = make_bank(a=2, b=3), make_bank(b=1, d=2)
    other.neutral = torch.ones(2, 4)
    before, version = bank.snapshot(), bank.version
    bank.replace(other)
    assert list(bank) == ["b", "d"] and bank["d"] is other["d"] and bank.neutral is other.neutral
    assert bank.version == version + 1 and list(before.concepts) == ["a", "b"]
    assert bank.digest == other.digest != before.digest
    other.remove("d")
    assert "d" in bank


def test_readers_have_the_old_bank_or_the_new_one() -> None:
    bank, banks = make_bank(), [make_bank(a=1, b=1), make_bank(c=1, d=1, e=1)]
    names = {bank.digest: ()} | {b.digest: tuple(b) for b in banks}
    wrong, done = [], threading.Event()

    def read() -> None:
        while not done.is_set():
            now = bank.snapshot()
            if names.get(now.digest) != tuple(now.concepts):
                wrong.append(tuple(now.concepts))

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(200):
        bank.replace(banks[i % 2])
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_bank_of_another_encoder_replaces_nothing() -> None:
    bank, version = make_bank(a=2), 1
    other = ConceptBank({}, Fingerprint({"encoder": "F"}, torch.zeros(1)))
    with pytest.raises(BankMismatchError, match="other was made for another text encoder: encoder is 'F'"):
        bank.replace(other)
    with pytest.raises(TypeError, match="other is a dict: must be a ConceptBank"):
        bank.replace({})  # type: ignore[arg-type]
    assert bank.version == version and list(bank) == ["a"]


def test_an_engine_refuses_a_bank_that_its_rule_cannot_read() -> None:
    engine = make_engine(rule=Rule.preset("protore"))
    bad = make_bank(a=1)
    bad.update("none", Concept(torch.ones(2, 4), torch.ones(2, dtype=torch.int8), ()))
    before = engine.bank.digest
    with pytest.raises(ValueError, match="have no prototype tokens for rule 'protore'"):
        engine.replace_bank(bad)
    assert engine.bank.digest == before
    with engine.batch([A]) as batch:
        run(engine, 1, TEN[:1])
        engine.replace_bank(make_bank(a=5))
        run(engine, 1, TEN[:1])
    assert batch.proofs[0].bank == engine.bank.digest == make_bank(a=5).digest != before


def test_a_digest_is_of_what_concepts_are() -> None:
    bank = make_bank(a=2, b=3)
    assert bank.digest == make_bank(a=2, b=3).digest
    assert len(bank.digest) == 64 and bank.digest == bank.digest.lower()
    turned = ConceptBank({"b": bank["b"], "a": bank["a"]}, bank.fingerprint)
    assert turned.digest == bank.digest  # whatever the order
    seen = {bank.digest}
    for change in ({"a": 2}, {"a": 2, "c": 3}, {"a": 3, "b": 2}):
        seen.add(make_bank(**change).digest)
    bank.neutral = torch.ones(1, 4)
    seen.add(bank.digest)
    bank.update("b", Concept.from_embeddings(bank["b"].prompt + 1e-6))
    seen.add(bank.digest)
    assert len(seen) == 6
