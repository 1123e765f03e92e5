# SPDX-License-Identifier: Apache-2.0
"""The replica that Ray Serve runs, without Ray: `tests/engines/ray.sh` has the rest."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from pipelines import one_thread  # noqa: F401

import fastnegate as fn
from fastnegate import testbed
from fastnegate.integrations.diffusers.install import engine_of
from fastnegate.integrations.ray_serve import Negation, picture

PROMPT, STEPS = "a red circle and a blue square", 3
CALL = {"guidance_scale": testbed.DEFAULT_GUIDANCE}
POLICIES: tuple[fn.Policy | None, ...] = (
    None,
    fn.Policy({"red": 1.0}),
    fn.Policy({"blue": 0.5, "red": 1.0}, stop=0.5),
    fn.Policy(negative_prompt="circle"),
)
Answer = tuple[int, dict[str, Any]]


def load() -> Any:
    made = testbed.load()
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Negation:
    """For tests that change nothing."""
    file = tmp_path_factory.mktemp("steady") / "bank"
    save_bank(pipe := load(), file, red="red", blue="blue")
    return Negation(lambda: pipe, file, max_batch=4, steps=STEPS, most_steps=8, call=CALL)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load()


@pytest.fixture
def replica(pipe: Any, tmp_path: Path) -> Iterator[Negation]:
    save_bank(pipe, tmp_path / "bank", red="red", blue="blue")
    made = Negation(lambda: pipe, tmp_path / "bank", max_batch=4, steps=STEPS, most_steps=8, call=CALL)
    yield made
    made.engine.remove()


def save_bank(pipe: Any, path: Path, **members: str) -> None:
    """In the place of the file that is there."""
    bank = fn.ConceptBank.from_prompts(pipe, members, templates=testbed.templates)
    bank.save(path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def form(policy: fn.Policy | None = None, **fields: Any) -> dict[str, Any]:
    fields = {"prompt": PROMPT, **fields}
    return fields if policy is None else {**fields, "negation": policy.to_json()}


def ask(replica: Negation, *forms: Any) -> list[Answer]:
    """What it answers to requests that arrive together."""

    async def together() -> list[Answer]:
        bodies = (form if isinstance(form, bytes) else json.dumps(form).encode() for form in forms)
        return await asyncio.gather(*(replica.answer(body) for body in bodies))

    return asyncio.run(together())


def pixels(answer: dict[str, Any], policy: fn.Policy | None) -> np.ndarray:
    return np.asarray(picture(answer, policy), np.int16)


def test_unlike_requests_share_a_batch_and_are_as_alone(steady: Negation) -> None:
    alone = [ask(steady, form(policy, seed=seed))[0] for seed, policy in enumerate(POLICIES)]
    together = ask(steady, *(form(policy, seed=seed) for seed, policy in enumerate(POLICIES)))
    digest = steady.engine.bank.digest
    for policy, (status, one), (_, other) in zip(POLICIES, alone, together):
        assert status == 200 and one["batch"] == 1 and other["batch"] == 4
        assert abs(pixels(one, policy) - pixels(other, policy)).max() <= 1
        assert one["negation"] == other["negation"] and one["negation"]["bank"] == digest
    plain = [ask(steady, form(seed=seed))[0][1] for seed in range(len(POLICIES))]
    changed = [abs(pixels(a, None) - pixels(b, p)).max() for a, (_, b), p in zip(plain, alone, POLICIES)]
    assert changed[0] == 0 and min(changed[1:]) > 20


def test_numbers_of_steps_are_batches_of_their_own(steady: Negation) -> None:
    answers = ask(steady, form(POLICIES[1]), form(POLICIES[1], steps=5), form(steps=5))
    assert [(a["negation"]["steps"], a["batch"]) for _, a in answers] == [(3, 1), (5, 2), (5, 2)]


def test_more_than_a_batch_holds_wait(steady: Negation) -> None:
    sizes = [answer["batch"] for _, answer in ask(steady, *(form(steps=1) for _ in range(6)))]
    assert sorted(sizes) == [2, 2, 4, 4, 4, 4]


WRONG: dict[str, tuple[Any, str]] = {
    "no JSON": (b"{", "Expecting property name"),
    "no text": (b"\xff", "codec can't decode"),
    "no object": ([], "the request is a list: must be an object"),
    "too deep": (b"[" * 60_000, "nested too deeply"),
    "too long": (b" " * 70_000, "the request has 70000 bytes: at most 65536"),
    "a field twice": (b'{"prompt": "a circle", "negation": {}, "negation": null}', "has a field twice"),
    "unknown field": (form(negatoin={}), "the request has 'negatoin': its fields are prompt, negation"),
    "no prompt": ({"seed": 1}, "prompt=None: must be a text"),
    "long prompt": ({"prompt": "a " * 2000}, "prompt has 4000 characters: at most 2000"),
    "unknown word": ({"prompt": "hello"}, "has the unknown word 'hello'"),
    "seed": (form(seed=-1), "seed=-1: must be a whole number from 0"),
    "steps": (form(steps=9), "steps=9: must be a whole number from 1 to 8"),
    "steps of another type": (form(steps=True), "steps=True: must be a whole number"),
    "no policy": (form(negation="red"), "policy is a str: must be an object"),
    "unknown concept": (form(fn.Policy({"green": 1.0})), "concept 'green': the bank has red, blue"),
    "no step": (form(fn.Policy({"red": 1.0}, start=0.9)), "the window holds none of the 3 steps"),
    "negative prompt": (form(fn.Policy(negative_prompt="hello")), "negative_prompt: .*'hello'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_request_is_said_to_it_alone(steady: Negation, case: str) -> None:
    wrong, message = WRONG[case]
    (status, refused), (good, answer) = ask(steady, wrong, form(POLICIES[1], steps=1))
    assert status == 400 and list(refused) == ["error"] and good == 200
    with pytest.raises(ValueError, match=message):
        raise ValueError(refused["error"])
    assert answer["negation"]["concepts"] == {"red": 1}


def test_a_client_that_goes_takes_nobody_with_it(steady: Negation) -> None:
    async def one_goes() -> list[Any]:
        requests = [asyncio.ensure_future(steady.answer(json.dumps(form()).encode())) for _ in range(3)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        requests[1].cancel()
        return await asyncio.gather(*requests, return_exceptions=True)

    first, gone, last = asyncio.run(one_goes())
    assert first[0] == last[0] == 200 and isinstance(gone, asyncio.CancelledError)


def test_another_file_is_served_from_at_once(replica: Negation, pipe: Any, tmp_path: Path) -> None:
    before = replica.engine.bank.digest
    save_bank(pipe, tmp_path / "bank", red="red", green="green")
    (status, answer), (gone, refused) = ask(replica, form(fn.Policy({"green": 1.0})), form(POLICIES[2]))
    assert status == 200 and answer["negation"]["bank"] == replica.engine.bank.digest != before
    assert gone == 400 and "concept 'blue': the bank has red, green" in refused["error"]


def test_a_concept_that_goes_while_its_request_waits_fails_alone(
    replica: Negation, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = replica.engine.check

    def then_remove(policy: Any, steps: Any) -> None:
        check(policy, steps)
        if policy is not None and "blue" in policy.concepts:
            replica.engine.bank.remove("blue")

    monkeypatch.setattr(replica.engine, "check", then_remove)
    (good, answer), (status, refused) = ask(replica, form(POLICIES[1]), form(POLICIES[2]))
    assert good == 200 and answer["negation"]["concepts"] == {"red": 3}
    assert status == 400 and "concept 'blue': the bank has red" in refused["error"]


@pytest.mark.parametrize("broken", ["missing", "no bank", "another encoder"])
def test_a_file_that_cannot_be_served_from_changes_nothing(
    replica: Negation, pipe: Any, tmp_path: Path, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    before, file = replica.engine.bank.digest, tmp_path / "bank"
    if broken == "missing":
        file.unlink()
    elif broken == "no bank":
        file.write_bytes(b"\x80\x02}")
    else:
        other = fn.ConceptBank({}, fn.ConceptBank.load(file, pipe).fingerprint)
        other.fingerprint.facts["encoder"] = "another"  # type: ignore[index]
        other.save(file)
    with caplog.at_level(logging.ERROR, "fastnegate"):
        for status, answer in ask(replica, *[form(POLICIES[1], steps=1)] * 2):
            assert status == 200 and answer["negation"]["bank"] == before
    (said,) = (record.message for record in caplog.records)
    assert said.startswith("the bank stays as it was: ")


def test_a_replica_without_a_bank_never_serves(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="bank"):
        Negation(lambda: pipe, tmp_path / "bank")
    (tmp_path / "bank").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a concept bank"):
        Negation(lambda: pipe, tmp_path / "bank")
    assert engine_of(pipe) is None


def test_a_replica_that_fails_its_first_picture_never_serves(pipe: Any, tmp_path: Path) -> None:
    save_bank(pipe, tmp_path / "bank", red="red")
    with pytest.raises(ValueError, match="batch size of 2"):
        Negation(lambda: pipe, tmp_path / "bank", call={"num_images_per_prompt": 2})
    assert engine_of(pipe) is None


def test_other_pictures_than_there_are_requests_are_nobodys(
    replica: Negation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica, "pipe", lambda *_, **__: SimpleNamespace(images=[None, None]))
    assert ask(replica, form()) == [(500, {"error": "the pipeline made 2 pictures of 1 requests"})]


BREAKS: dict[str, Callable[[Negation], Any]] = {
    "removed": lambda replica: replica.engine.remove(),
    "displaced": lambda replica: replica.pipe.unet.set_attn_processor(
        next(iter(testbed.load().unet.attn_processors.values()))
    ),
}


@pytest.mark.parametrize("how", BREAKS)
def test_a_replica_that_does_not_negate_is_not_healthy(replica: Negation, how: str) -> None:
    asyncio.run(replica.check_health())
    processors = dict(replica.pipe.unet.attn_processors)
    BREAKS[how](replica)
    try:
        (status, answer), (other, _) = ask(replica, form(POLICIES[1]), form())
        assert status == 500 and "image" not in answer and other in (200, 500)
        with pytest.raises(fn.NegationNotAppliedError):
            asyncio.run(replica.check_health())
    finally:
        if how == "displaced":
            replica.pipe.unet.set_attn_processor(processors)


def test_pictures_are_proof_of_health(replica: Negation, monkeypatch: pytest.MonkeyPatch) -> None:
    """And none is made besides, while they are."""
    proven = []
    monkeypatch.setattr(replica, "_prove", lambda: proven.append(threading.get_ident()))
    asyncio.run(replica.check_health())  # since it began
    asyncio.run(replica.check_health())
    ask(replica, form(POLICIES[1]))
    asyncio.run(replica.check_health())
    assert len(proven) == 1
    ask(replica, form())  # which proves nothing
    asyncio.run(replica.check_health())
    assert len(proven) == 2


@pytest.mark.parametrize(
    ("answer", "message"),
    [({}, "proves nothing"), ({"negation": None}, "proves nothing"), ({"negation": {}}, "proves nothing")],
    ids=str,
)
def test_a_client_takes_no_picture_without_a_proof(answer: dict[str, Any], message: str) -> None:
    white = base64.b64encode(b"").decode()
    for policy in POLICIES:
        with pytest.raises(fn.NegationNotAppliedError, match=message):
            picture({"image": white, **answer}, policy)


def test_a_client_takes_no_picture_of_another_policy(steady: Negation) -> None:
    ((_, answer),) = ask(steady, form(POLICIES[1], steps=1))
    picture(answer, POLICIES[1], bank=steady.engine.bank.digest)
    for policy in (None, *POLICIES[2:]):
        with pytest.raises(fn.NegationNotAppliedError):
            picture(answer, policy)
    with pytest.raises(fn.NegationNotAppliedError, match="asked for was"):
        picture(answer, POLICIES[1], bank="0" * 64)
    assert torch.is_grad_enabled()
