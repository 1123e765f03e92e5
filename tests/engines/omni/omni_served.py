# SPDX-License-Identifier: Apache-2.0
"""What the tests of the real engine share: a folder to serve, the engine in this process, requests, and
pictures that one pipeline makes of one request at a time, without the engine."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.diffusion_engine import DiffusionEngine
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

import fastnegate as fn
from fastnegate import testbed

T = TypeVar("T")
Picture = NDArray[np.uint8]
PROMPT, STEPS, SEATS = "a red circle and a blue square", 6, 8
CALL = {"num_inference_steps": STEPS, "guidance_scale": 3.0}
POLICIES: tuple[fn.Policy | None, ...] = (
    None,
    fn.Policy({"red": 1.0}),
    fn.Policy({"blue": 1.0}),
    fn.Policy({"red": 0.5, "circle": 1.0}),
    fn.Policy({"circle": 1.0}, stop=0.5),
    fn.Policy({"blue": 1.0}, start=0.25),
    fn.Policy(negative_prompt="blue square"),
)
PIPELINE = "fastnegate.integrations.vllm_omni.NegatedPipeline"
BANKS = {"first": ["red", "blue", "circle"], "second": ["red", "square"]}


def fill(folder: Path) -> Path:
    """Write a model as its publisher would save it, and banks, one of which is another model's."""
    pipe = testbed.load("easy")
    pipe.save_pretrained(folder / "model")
    for name, concepts in BANKS.items():
        members = {concept: testbed.members(concept) for concept in concepts}
        fn.ConceptBank.from_prompts(pipe, members).save(folder / name)
    fn.ConceptBank.from_prompts(testbed.load("easy-joint"), {"red": "red"}).save(folder / "foreign")
    return folder


class Server:
    """The engine, and the loop that it answers in. There can be one at a time."""

    def __init__(self, folder: Path, bank: str = "first", pipeline: str = PIPELINE, **config: Any) -> None:
        given = {"pipeline_class": pipeline, "bank": str(folder / bank), **config.pop("given", {})}
        od_config = OmniDiffusionConfig(
            model=str(folder / "model"),
            dtype=torch.float32,
            custom_pipeline_args=given,
            worker_extension_cls="fastnegate.integrations.vllm_omni.NegatedWorker",
            request_batch_max_wait_ms=200,
            **{"max_num_seqs": SEATS, **config},
        )
        od_config.enrich_config()
        self.engine = DiffusionEngine.make_engine(od_config)
        self._loop = asyncio.new_event_loop()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(coroutine)

    def ask(self, *requests: OmniDiffusionRequest) -> list[Any]:
        """Answers, or errors."""

        async def one(request: OmniDiffusionRequest) -> Any:
            async for outputs in self.engine.step_streaming(request):
                (answer,) = outputs
            return answer

        async def all_of_them() -> list[Any]:
            return await asyncio.gather(*map(one, requests), return_exceptions=True)

        return self.run(all_of_them())

    @property
    def pipeline(self) -> Any:
        return self.engine.executor.driver_worker.worker.model_runner.pipeline

    def close(self) -> None:
        self.engine.close()
        self._loop.close()


_numbers = itertools.count()


def request(policy: Any = None, seed: int = 0, prompt: Any = PROMPT, **sampling: Any) -> OmniDiffusionRequest:
    """For a policy, or for something that is none."""
    form = policy.to_json() if isinstance(policy, fn.Policy) else policy
    extra = {} if form is None else {"negation": form}
    params = OmniDiffusionSamplingParams(**{**CALL, **sampling}, seed=seed, extra_args=extra)
    return OmniDiffusionRequest(prompt, params, f"request-{next(_numbers)}")


def alone(bank: Path) -> Callable[..., Picture]:
    """A function from policy and seed to the picture, made without the engine: [H, W, 3]."""
    pipe = testbed.load("easy")
    engine = fn.install(pipe, fn.ConceptBank.load(bank, pipe), unasked="raise")

    def make(policy: fn.Policy | None, seed: int, prompt: str = PROMPT, **call: Any) -> Picture:
        with engine.batch([policy]):
            made = pipe(prompt, generator=torch.Generator().manual_seed(seed), **{**CALL, **call})
        return np.asarray(made.images[0])

    return make


def pictures(answer: Any) -> list[Picture]:
    if isinstance(answer, BaseException):
        raise answer
    return [np.asarray(image) for image in answer.images]


def far(one: Picture, other: Picture) -> int:
    """The largest difference of two pictures, of 255."""
    return int(np.abs(one.astype(int) - other.astype(int)).max())
