# SPDX-License-Identifier: Apache-2.0
"""The pipeline and the worker of vLLM-Omni, driven as the engine drives them, without it."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

pytest.importorskip("diffusers")

import omni_stubs as omni

import fastnegate as fn
from fastnegate import testbed
from fastnegate.integrations.vllm_omni import proof_of, reload_bank

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT, STEPS, SEATS = "a red circle and a blue square", 3, 8
CALL = {"num_inference_steps": STEPS, "guidance_scale": 3.0}
POLICIES: tuple[dict[str, Any] | None, ...] = (
    None,
    {"concepts": {"red": 1.0}},
    {"concepts": {"blue": 1.0}},
    {"concepts": {"red": 0.5, "circle": 1.0}},
    {"concepts": {"circle": 1.0}, "stop": 0.5},
    {"negative_prompt": "blue square"},
    {},
    None,
)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a concept that is not in the bank": ({"negation": {"concepts": {"green": 1.0}}}, "the bank has red"),
    "a field that there is not": ({"negation": {"concept": {"red": 1.0}}}, "policy has 'concept'"),
    "a negative strength": ({"negation": {"concepts": {"red": -1.0}}}, "strength of 'red'"),
    "no object": ({"negation": ["red"]}, "must be an object"),
    "null": ({"negation": None}, "must be an object"),
    "a window without a step": (
        {"negation": {"concepts": {"red": 1.0}, "start": 0.4, "stop": 0.5}},
        "window",
    ),
}


@pytest.fixture(scope="module", autouse=True)
def stubs() -> Iterator[None]:
    with omni.in_place():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bank files."""
    folder = tmp_path_factory.mktemp("banks")
    pipe = testbed.load("easy")
    for name, concepts in {"first": ["red", "blue", "circle"], "second": ["red", "square"]}.items():
        members = {concept: testbed.members(concept) for concept in concepts}
        fn.ConceptBank.from_prompts(pipe, members).save(folder / name)
    fn.ConceptBank.from_prompts(testbed.load("easy-joint"), {"red": "red"}).save(folder / "foreign")
    return folder


def configured(bank: Path, **config: Any) -> omni.OmniDiffusionConfig:
    given = {"pipeline_class": "of this test", "bank": str(bank), **config.pop("given", {})}
    return omni.OmniDiffusionConfig("easy", custom_pipeline_args=given, max_num_seqs=SEATS, **config)


def start(config: omni.OmniDiffusionConfig) -> Any:
    """As the engine does it: make, load, warm up."""
    from fastnegate.integrations.vllm_omni import NegatedPipeline

    pipeline = NegatedPipeline(od_config=config)
    pipeline.load_weights(())
    dummy = omni.OmniDiffusionSamplingParams(height=512, width=512, num_inference_steps=2, guidance_scale=0.0)
    first = omni.OmniDiffusionRequest({"prompt": "dummy run"}, dummy, "dummy_req_id")
    (output,) = pipeline.forward(omni.DiffusionRequestBatch([first]))
    assert output.error is None and output.output == []
    return pipeline


class Server:
    """A pipeline, and how many requests each of its calls was for."""

    def __init__(self, bank: Path) -> None:
        self.pipeline = start(configured(bank))
        self.calls: list[int] = []
        self.pipeline._draw = functools.partial(self._draw, self.pipeline._draw)

    def _draw(self, draw: Callable[..., Any], group: list[Any]) -> Any:
        self.calls.append(len(group))
        return draw(group)

    def ask(self, *requests: omni.OmniDiffusionRequest) -> list[omni.DiffusionOutput]:
        self.calls.clear()
        outputs: list[omni.DiffusionOutput] = self.pipeline.forward(omni.DiffusionRequestBatch([*requests]))
        return outputs


@pytest.fixture(scope="module")
def shared(folder: Path) -> Server:
    return Server(folder / "first")


@pytest.fixture
def own(folder: Path) -> Server:
    """For tests that change it."""
    return Server(folder / "first")


def request(policy: Any = None, seed: int = 0, prompt: Any = PROMPT, **sampling: Any) -> Any:
    extra = sampling.pop("extra_args", {} if policy is None else {"negation": policy})
    if "generator" not in sampling:
        sampling["generator"] = torch.Generator().manual_seed(seed)  # so does the engine's runner
    params = omni.OmniDiffusionSamplingParams(**{**CALL, **sampling}, seed=seed, extra_args=extra)
    return omni.OmniDiffusionRequest(prompt, params, f"request-{seed}")


def pictures(output: omni.DiffusionOutput) -> NDArray[np.int16]:
    assert output.error is None, output.error
    return np.stack([np.asarray(picture) for picture in output.output["payload"]["image"]]).astype(np.int16)


def same(one: omni.DiffusionOutput, other: omni.DiffusionOutput) -> bool:
    a, b = pictures(one), pictures(other)
    return a.shape == b.shape and bool(np.abs(a - b).max() <= 1)


def refused(output: omni.DiffusionOutput) -> str:
    """The message of a request that was wrong."""
    assert output.error_status_code == 400 and output.error is not None and output.output is None
    return output.error


# ---- batches --------------------------------------------------------------------------------------


def test_unlike_policies_share_a_call_and_nothing_else(shared: Server) -> None:
    requests = [functools.partial(request, policy, seed) for seed, policy in enumerate(POLICIES)]
    together = shared.ask(*(make() for make in requests))
    assert shared.calls == [SEATS]
    alone = [shared.ask(make())[0] for make in requests]
    assert all(map(same, together, alone))
    assert not same(alone[1], shared.ask(request(seed=1))[0])  # negation is seen


def test_every_answer_proves_what_acted(shared: Server) -> None:
    bank = shared.pipeline.engine.bank.digest
    for policy, output in zip(POLICIES, shared.ask(*map(request, POLICIES))):
        proof = proof_of(output)
        proof.check(None if policy is None else fn.Policy.from_json(policy), bank=bank)
        assert (proof.rule, proof.steps) == ("protore", STEPS)
        assert output.output["metadata"] == {"negation": proof.to_json()}
        steps = 2 if policy and "stop" in policy else STEPS  # of 0, 1/3 and 2/3, two are below one half
        assert set(proof.concepts.values()) <= {steps}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_policy_fails_its_request_alone(kind: str, shared: Server) -> None:
    extra, message = BAD[kind]
    good = functools.partial(request, POLICIES[1], 1)
    first, bad, last = shared.ask(good(), request(extra_args=extra), good())
    assert message in refused(bad) and refused(bad).startswith("negation: ")
    assert shared.calls == [2] and same(first, last)


def test_what_only_the_pipeline_can_refuse_fails_its_request_alone(shared: Server) -> None:
    good = functools.partial(request, POLICIES[1], 1)
    first, bad, last = shared.ask(good(), request(prompt="a red zebra"), good())
    assert "zebra" in refused(bad)
    assert shared.calls == [3, 1, 2, 1, 1] and same(first, last)
    assert same(first, shared.ask(good())[0])  # the call that failed has drawn none of its noise


def test_a_failure_of_the_server_is_no_fault_of_a_request(own: Server) -> None:
    own.pipeline.engine.remove()
    with_policy, without = own.ask(request(POLICIES[1]), request())
    assert with_policy.error_status_code is None and "removed" in with_policy.error
    assert without.error is None or without.error_status_code is None


def test_an_answer_without_its_negation_never_leaves(own: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        fn.Batch, "proofs", property(lambda batch: (fn.Proof("protore", "0" * 64, STEPS, {}),))
    )
    (output,) = own.ask(request(POLICIES[1]))
    assert output.output is None and "nothing acted" in str(output.error)


# ---- what is a request's own ------------------------------------------------------------------


def test_latents_are_stacked(shared: Server) -> None:
    noise = [torch.randn(1, 12, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    requests = [functools.partial(request, POLICIES[i], 9, latents=noise[i]) for i in range(3)]
    together = shared.ask(*(make() for make in requests), request(POLICIES[1], 9))
    assert shared.calls == [3, 1]  # noise that was given, and noise that is drawn
    alone = [shared.ask(make())[0] for make in requests]
    assert all(map(same, together, alone))


@pytest.mark.parametrize(
    "sampling",
    [{"num_inference_steps": 2}, {"guidance_scale": 2.0}, {"eta": 0.5}, {"num_outputs_per_prompt": 2}],
    ids=lambda sampling: next(iter(sampling)),
)
def test_what_a_call_has_one_of_is_not_shared(sampling: dict[str, Any], shared: Server) -> None:
    """The engine would not batch these; a setting of its may."""
    other = functools.partial(request, POLICIES[2], 2, **sampling)
    first, second, third = shared.ask(request(POLICIES[1], 1), other(), request(POLICIES[1], 1))
    assert shared.calls == [2, 1] and same(first, third) and same(second, shared.ask(other())[0])


def test_an_absent_negative_prompt_is_not_an_empty_one(shared: Server) -> None:
    shared.ask(
        request(prompt={"prompt": PROMPT, "negative_prompt": "red"}), request(prompt={"prompt": PROMPT})
    )
    assert shared.calls == [1, 1]


def test_a_tensor_of_timesteps_shares_no_call(shared: Server) -> None:
    strange = [request(timesteps=torch.tensor(steps)) for steps in ([900, 500, 1], [800, 400, 1])]
    good, *bad = shared.ask(request(), *strange)
    assert shared.calls == [1, 1, 1] and good.error is None
    assert all("timestep" in refused(output) for output in bad)  # this scheduler has its own alone


def test_images_of_one_prompt_take_turns_with_its_generator(shared: Server) -> None:
    several = functools.partial(request, POLICIES[1], 5, num_outputs_per_prompt=3)
    pair = shared.ask(several(), request(POLICIES[2], 6, num_outputs_per_prompt=3))
    assert shared.calls == [2] and [len(pictures(output)) for output in pair] == [3, 3]
    assert same(pair[0], shared.ask(several())[0])
    first, second, _third = (pictures(pair[0])[i : i + 1] for i in range(3))
    assert np.abs(first - second).max() > 50
    assert np.abs(first - pictures(shared.ask(request(POLICIES[1], 5))[0])).max() <= 1


def test_more_images_than_one_call_holds_are_several_calls(shared: Server) -> None:
    several = [request({}, seed, num_outputs_per_prompt=4) for seed in range(4)]
    assert all(output.error is None for output in shared.ask(*several))
    assert shared.calls == [2, 2]  # max_images = 10 in a call


def test_counts_that_cannot_be_are_refused(shared: Server) -> None:
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    many, wrong = shared.ask(
        request({}, num_outputs_per_prompt=11), request({}, generator=generators, num_outputs_per_prompt=3)
    )
    assert "at most 10" in refused(many) and "generator has 2 entries" in refused(wrong)


def test_one_request_may_ask_for_more_images_than_there_are_seats(shared: Server) -> None:
    (output,) = shared.ask(request(POLICIES[1], num_outputs_per_prompt=10, num_inference_steps=1))
    assert len(pictures(output)) == 10 and shared.calls == [1]


def test_generators_are_not_used_up(shared: Server) -> None:
    one, *several = (torch.Generator().manual_seed(seed) for seed in range(3))
    before = one.get_state(), several[1].get_state()
    outputs = shared.ask(
        request(generator=one, num_inference_steps=1),
        request(POLICIES[1], generator=several, num_outputs_per_prompt=2, num_inference_steps=1),
    )
    assert [len(pictures(output)) for output in outputs] == [1, 2]
    assert torch.equal(one.get_state(), before[0]) and torch.equal(several[1].get_state(), before[1])


def test_a_call_that_nobody_spoke_for_does_not_run(shared: Server) -> None:
    with pytest.raises(fn.NegationNotAppliedError, match="unasked"):
        shared.pipeline._pipeline(PROMPT, num_inference_steps=1)


# ---- start ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bank", "config", "error", "message"),
    [
        ("none", {}, (OSError, ValueError), "No such file"),
        ("foreign", {}, fn.BankMismatchError, "another text encoder"),
        ("first", {"given": {"rul": "nag"}}, ValueError, "'rul': allowed are bank, rule"),
        ("first", {"given": {"rule": "nagg"}}, ValueError, "nagg"),
        ("first", {"given": {"max_images": 0}}, ValueError, "max_images=0"),
        ("first", {"given": {"bank": None}}, ValueError, "bank=None"),
        ("first", {"step_execution": True}, ValueError, "step_execution"),
        ("first", {"streaming_output": True}, ValueError, "step_execution"),
        ("first", {"model_class_name": "FluxPipeline"}, ValueError, "DiffusersAdapterPipeline"),
    ],
)
def test_what_cannot_negate_does_not_start(
    bank: str, config: dict[str, Any], error: Any, message: str, folder: Path
) -> None:
    with pytest.raises(error, match=message):
        start(configured(folder / bank, **config))


def test_a_bank_must_be_named() -> None:
    with pytest.raises(ValueError, match="no 'bank'"):
        start(omni.OmniDiffusionConfig("easy", custom_pipeline_args={"pipeline_class": "of this test"}))


def test_a_warm_up_that_is_not_negated_stops_the_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fn.Batch, "proofs", property(lambda batch: (fn.Proof("protore", "0" * 64, 2, {}),)))
    with pytest.raises(fn.NegationNotAppliedError, match="nothing acted"):
        start(configured(folder / "first"))


# ---- another bank -----------------------------------------------------------------------------


def workers(*servers: Server) -> tuple[list[Any], Callable[..., Any]]:
    """Workers, and the engine's way to call them all."""
    from fastnegate.integrations.vllm_omni import NegatedWorker

    made = []
    for server in servers:
        worker = NegatedWorker()
        worker.model_runner = type("ModelRunner", (), {"pipeline": server.pipeline})()
        made.append(worker)

    async def collective_rpc(method: str, args: tuple[Any, ...] = ()) -> list[list[Any]]:
        return [[getattr(worker, method)(*args) for worker in made]]  # of the one replica

    return made, collective_rpc


def test_all_workers_take_another_bank(folder: Path) -> None:
    servers = Server(folder / "first"), Server(folder / "first")
    _, rpc = workers(*servers)
    digest = asyncio.run(reload_bank(rpc, folder / "second"))
    for server in servers:
        known, gone = server.ask(request({"concepts": {"square": 1.0}}), request({"concepts": {"blue": 1.0}}))
        assert proof_of(known).bank == digest == server.pipeline.engine.bank.digest
        assert "the bank has red, square" in refused(gone)


@pytest.mark.parametrize("path", ["none", "foreign"])
def test_a_bank_that_a_worker_refuses_is_taken_by_none(path: str, shared: Server, folder: Path) -> None:
    _, rpc = workers(shared)
    before = shared.pipeline.engine.bank.digest
    with pytest.raises(ValueError, match=r"No such file|another text encoder"):
        asyncio.run(reload_bank(rpc, folder / path))
    assert shared.pipeline.engine.bank.digest == before


def test_workers_that_read_different_banks_take_none(shared: Server, folder: Path) -> None:
    (one, other), rpc = workers(shared, shared)
    before = shared.pipeline.engine.bank.digest
    other.negation_stage = lambda _path, read=other.negation_stage: read(str(folder / "second"))
    with pytest.raises(ValueError, match="2 different banks"):
        asyncio.run(reload_bank(rpc, folder / "first"))
    assert shared.pipeline.engine.bank.digest == before
    assert "no such bank was read" in one.negation_commit("0" * 64)["refused"]


@pytest.mark.parametrize("answer", [[], [[{"supported": False, "error": "no method"}]], [["done"]], [None]])
def test_workers_without_negation_are_noticed(answer: Any) -> None:
    async def rpc(method: str, args: tuple[Any, ...]) -> Any:
        return answer

    with pytest.raises(ValueError, match=r"no worker answered|no method|NegatedWorker"):
        asyncio.run(reload_bank(rpc, "bank"))
