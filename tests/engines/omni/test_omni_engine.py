# SPDX-License-Identifier: Apache-2.0
"""vLLM-Omni's real engine in this process: its scheduler, its worker, its RPC. `environment.sh` makes the
environment and runs this.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm_omni", reason="not in this environment: see environment.sh")

import omni_served as served
import omni_stubs as stubs
from omni_served import CALL, POLICIES, PROMPT, Picture, Server, far, pictures, request
from vllm_omni.diffusion.data import DiffusionOutput, OmniDiffusionConfig
from vllm_omni.diffusion.models.diffusers_adapter.pipeline_diffusers_adapter import DiffusersAdapterPipeline
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.worker.diffusion_worker import CustomPipelineWorkerExtension
from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch
from vllm_omni.errors import OmniClientError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

from fastnegate.integrations.vllm_omni import proof_of, reload_bank

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served.fill(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    yield server
    server.close()


@pytest.fixture(scope="module")
def right(folder: Path) -> Callable[..., Picture]:
    """What a picture should be."""
    return served.alone(folder / "first")


# ---- batches --------------------------------------------------------------------------------------


def test_unlike_policies_in_one_batch(server: Server, right: Callable[..., Picture]) -> None:
    calls: list[int] = []
    draw = server.pipeline._draw
    server.pipeline._draw = lambda group: calls.append(len(group)) or draw(group)
    answers = server.ask(*(request(policy, seed) for seed, policy in enumerate(POLICIES)))
    server.pipeline._draw = draw
    assert calls == [len(POLICIES)]
    bank = server.pipeline.engine.bank.digest
    for seed, (policy, answer) in enumerate(zip(POLICIES, answers)):
        assert far(pictures(answer)[0], right(policy, seed)) <= 1
        proof_of(answer).check(policy, bank=bank)
        assert answer.multimodal_output["metadata"] == {"negation": proof_of(answer).to_json()}


@pytest.mark.parametrize(
    "bad",
    [
        request({"concepts": {"green": 1.0}}),
        request({"concept": {"red": 1.0}}),
        request({"concepts": {"red": -1.0}}),
        request({"concepts": {"red": 1.0}, "start": 0.4, "stop": 0.45}),
        request(prompt="a red zebra"),
        request(height=33, width=33),
        request(num_outputs_per_prompt=11),
    ],
    ids=["concept", "field", "strength", "window", "word", "size", "images"],
)
def test_a_bad_request_fails_right(
    bad: OmniDiffusionRequest, server: Server, right: Callable[..., Picture]
) -> None:
    first, failed, last = server.ask(request(POLICIES[1], 1), bad, request(POLICIES[2], 2))
    assert isinstance(failed, OmniClientError) and failed.status_code == 400 and str(failed)
    assert far(pictures(first)[0], right(POLICIES[1], 1)) <= 1
    assert far(pictures(last)[0], right(POLICIES[2], 2)) <= 1


def test_a_request_of_its_own_kind_has_a_call_of_its_own(
    server: Server, right: Callable[..., Picture]
) -> None:
    noise = torch.randn(1, 12, 16, 16, generator=torch.Generator().manual_seed(7))
    one, given, longer = server.ask(
        request(POLICIES[1], 1),
        request(POLICIES[2], 2, latents=noise),
        request(POLICIES[3], 3, num_inference_steps=8),
    )
    assert far(pictures(one)[0], right(POLICIES[1], 1)) <= 1
    assert far(pictures(given)[0], right(POLICIES[2], 2, latents=noise)) <= 1
    assert far(pictures(longer)[0], right(POLICIES[3], 3, num_inference_steps=8)) <= 1
    assert proof_of(longer).steps == 8


def test_several_images_of_a_request(server: Server) -> None:
    pair = server.ask(
        request(POLICIES[1], 1, num_outputs_per_prompt=2), request(POLICIES[2], 2, num_outputs_per_prompt=2)
    )
    (single,) = server.ask(request(POLICIES[1], 1, num_outputs_per_prompt=2))
    assert [len(pictures(answer)) for answer in (*pair, single)] == [2, 2, 2]
    assert all(far(a, b) <= 1 for a, b in zip(pictures(pair[0]), pictures(single)))


# ---- another bank -----------------------------------------------------------------------------


def test_another_bank_for_all_workers(server: Server, folder: Path) -> None:
    rpc = server.engine.async_collective_rpc
    with pytest.raises(ValueError, match="No such file"):
        server.run(reload_bank(rpc, folder / "none"))
    with pytest.raises(ValueError, match="another text encoder"):
        server.run(reload_bank(rpc, folder / "foreign"))
    old = proof_of(server.ask(request({"concepts": {"blue": 1.0}}))[0])
    digest = server.run(reload_bank(rpc, folder / "second"))
    new, gone = server.ask(request({"concepts": {"square": 1.0}}), request({"concepts": {"blue": 1.0}}))
    assert proof_of(new).bank == digest != old.bank
    assert isinstance(gone, OmniClientError) and "the bank has red, square" in str(gone)
    assert server.run(reload_bank(rpc, folder / "first")) == old.bank


# ---- the stubs --------------------------------------------------------------------------------

REAL: dict[Any, Any] = {
    stubs.OmniClientError: OmniClientError,
    stubs.DiffusionOutput: DiffusionOutput,
    stubs.OmniDiffusionConfig: OmniDiffusionConfig,
    stubs.OmniDiffusionSamplingParams: OmniDiffusionSamplingParams,
    stubs.OmniDiffusionRequest: OmniDiffusionRequest,
    stubs.DiffusionRequestBatch: DiffusionRequestBatch,
    stubs.DiffusersAdapterPipeline: DiffusersAdapterPipeline,
    stubs.CustomPipelineWorkerExtension: CustomPipelineWorkerExtension,
}


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("stub", REAL, ids=lambda stub: stub.__name__)
def test_stubs_have_the_real_signatures(stub: Any) -> None:
    real = REAL[stub]
    if dataclasses.is_dataclass(stub):
        theirs = {field.name: field for field in dataclasses.fields(real)}
        for field in dataclasses.fields(stub):
            assert field.default == theirs[field.name].default, field.name
    for name, member in vars(stub).items():
        if inspect.isfunction(member) and not (dataclasses.is_dataclass(stub) and name.startswith("__")):
            assert parameters(member) == parameters(getattr(real, name)), name
        if isinstance(member, property):
            assert isinstance(inspect.getattr_static(real, name), property), name


def test_every_stubbed_name_exists() -> None:
    for name, content in stubs.MODULES.items():
        module = importlib.import_module(name)
        for attribute, stub in content.items():
            real = getattr(module, attribute)
            if inspect.isclass(stub):
                assert REAL[stub] is real
            elif inspect.isfunction(stub):
                assert parameters(stub) == parameters(real)


@pytest.mark.parametrize(
    ("prompt", "sampling"),
    [
        (PROMPT, {"seed": 3}),
        ({"prompt": PROMPT, "negative_prompt": "red"}, {"seed": 3, "num_outputs_per_prompt": 2}),
        ({"prompt": PROMPT}, {"height": 32, "width": 32, "generator_device": "cpu"}),
        (PROMPT, {"latents": torch.zeros(1, 12, 16, 16), "timesteps": torch.ones(2), "eta": 0.5}),
    ],
)
def test_stubs_make_the_same_call(prompt: Any, sampling: dict[str, Any], server: Server) -> None:
    def call(pipeline: Any, request: Any, batch: Any, params: Any) -> dict[str, Any]:
        made = pipeline._build_call_kwargs(batch([request(prompt, params(**CALL, **sampling), "request")]))
        generator = made.pop("generator")
        return {**made, "seed": generator.initial_seed()}

    real = call(server.pipeline, OmniDiffusionRequest, DiffusionRequestBatch, OmniDiffusionSamplingParams)
    stub = call(
        stubs.DiffusersAdapterPipeline(od_config=stubs.OmniDiffusionConfig("easy")),
        stubs.OmniDiffusionRequest,
        stubs.DiffusionRequestBatch,
        stubs.OmniDiffusionSamplingParams,
    )
    if sampling.get("seed") is None:  # the real request draws one
        real.pop("seed"), stub.pop("seed")
    assert real.keys() == stub.keys()
    for name, value in real.items():
        same = torch.equal(value, stub[name]) if isinstance(value, torch.Tensor) else value == stub[name]
        assert same, name
