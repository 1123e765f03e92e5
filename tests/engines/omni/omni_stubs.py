# SPDX-License-Identifier: Apache-2.0
"""What `fastnegate.integrations.vllm_omni` uses of vLLM-Omni, in as few lines as that needs: with these the
default suite drives the pipeline and the worker without the engine. `test_omni_engine.py` holds them
against the real classes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from fastnegate import testbed


class OmniClientError(ValueError):
    def __init__(self, message: str, *, status_code: int = 400, error_type: str = "BadRequestError") -> None:
        super().__init__(message)
        self.message, self.status_code, self.error_type = message, status_code, error_type


@dataclass
class DiffusionOutput:
    output: Any = None
    error: str | None = None
    error_status_code: int | None = None
    error_type: str | None = None
    stage_durations: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_exception(cls, exc: BaseException) -> DiffusionOutput:
        client = isinstance(exc, OmniClientError)
        status, kind = (exc.status_code, exc.error_type) if client else (None, None)
        return cls(error=str(exc), error_status_code=status, error_type=kind)


@dataclass
class OmniDiffusionConfig:
    model: str | None = None
    model_class_name: str | None = None
    custom_pipeline_args: dict[str, Any] | None = None
    max_num_seqs: int = 1
    step_execution: bool = False
    streaming_output: bool = False
    output_type: str = "pil"


@dataclass
class OmniDiffusionSamplingParams:
    num_outputs_per_prompt: int = 1
    seed: int | None = None
    generator: torch.Generator | list[torch.Generator] | None = None
    generator_device: str | None = None
    latents: torch.Tensor | None = None
    height: int | None = None
    width: int | None = None
    timesteps: torch.Tensor | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0
    eta: float = 0.0
    extra_args: dict[str, Any] = field(default_factory=dict)


@dataclass
class OmniDiffusionRequest:
    prompt: Any
    sampling_params: OmniDiffusionSamplingParams
    request_id: str


@dataclass
class DiffusionRequestBatch:
    requests: list[OmniDiffusionRequest]

    @property
    def num_reqs(self) -> int:
        return len(self.requests)

    @property
    def prompts(self) -> list[Any]:
        return [request.prompt for request in self.requests]

    @property
    def sampling_params(self) -> OmniDiffusionSamplingParams:
        (request,) = self.requests
        return request.sampling_params

    def is_dummy_run(self) -> bool:
        return self.requests[0].request_id == "dummy_req_id"


# Sampling parameters that this model's pipeline takes as they are.
PASSED = ("latents", "timesteps", "height", "width", "num_inference_steps", "eta")
PASSED += ("guidance_scale", "guidance_rescale")


class DiffusersAdapterPipeline(nn.Module):
    """It loads a model of the testbed, by its name."""

    supports_request_batch = False

    def __init__(self, *, od_config: OmniDiffusionConfig, device: torch.device | None = None) -> None:
        super().__init__()
        self.od_config, self.device = od_config, device

    def load_weights(self) -> None:
        self._pipeline = self._load_pipeline_from_pretrained(self.od_config.model, {})

    def _load_pipeline_from_pretrained(self, model_id: str, load_kwargs: dict[str, Any]) -> Any:
        return testbed.load(model_id)

    def _build_call_kwargs(self, req: DiffusionRequestBatch) -> dict[str, Any]:
        sampling, (prompt,) = req.sampling_params, req.prompts
        call = {"prompt": prompt} if isinstance(prompt, str) else {"prompt": prompt.get("prompt", "")}
        if not isinstance(prompt, str) and prompt.get("negative_prompt") is not None:
            call["negative_prompt"] = prompt["negative_prompt"]
        call |= {name: getattr(sampling, name) for name in PASSED if getattr(sampling, name) is not None}
        call["output_type"] = self.od_config.output_type
        call["num_images_per_prompt"] = sampling.num_outputs_per_prompt
        call["generator"] = sampling.generator
        if sampling.generator is None:
            call["generator"] = torch.Generator(sampling.generator_device or "cpu")
            if sampling.seed is not None:
                call["generator"].manual_seed(sampling.seed)
        return call


class CustomPipelineWorkerExtension:
    def re_init_pipeline(self, custom_pipeline_args: dict[str, Any]) -> None:
        """The engine calls it; tests set `model_runner` themselves."""


def processor_of(od_config: OmniDiffusionConfig) -> Any:
    """The engine's own, for classes that it has models of."""
    return len if od_config.model_class_name == "FluxPipeline" else None


MODULES: dict[str, dict[str, Any]] = {
    "vllm_omni": {},
    "vllm_omni.errors": {"OmniClientError": OmniClientError},
    "vllm_omni.platforms": {
        "current_omni_platform": SimpleNamespace(get_torch_device=lambda: torch.device("cpu"))
    },
    "vllm_omni.inputs": {},
    "vllm_omni.inputs.data": {"OmniDiffusionSamplingParams": OmniDiffusionSamplingParams},
    "vllm_omni.diffusion": {},
    "vllm_omni.diffusion.data": {
        "DiffusionOutput": DiffusionOutput,
        "OmniDiffusionConfig": OmniDiffusionConfig,
    },
    "vllm_omni.diffusion.models": {},
    "vllm_omni.diffusion.models.diffusers_adapter": {},
    "vllm_omni.diffusion.models.diffusers_adapter.pipeline_diffusers_adapter": {
        "DiffusersAdapterPipeline": DiffusersAdapterPipeline
    },
    "vllm_omni.diffusion.registry": {
        "get_diffusion_pre_process_func": processor_of,
        "get_diffusion_post_process_func": processor_of,
    },
    "vllm_omni.diffusion.request": {"OmniDiffusionRequest": OmniDiffusionRequest},
    "vllm_omni.diffusion.worker": {},
    "vllm_omni.diffusion.worker.request_batch": {"DiffusionRequestBatch": DiffusionRequestBatch},
    "vllm_omni.diffusion.worker.diffusion_worker": {
        "CustomPipelineWorkerExtension": CustomPipelineWorkerExtension
    },
}
OF_SERVERS = ("fastnegate.integrations.vllm_omni.pipeline", "fastnegate.integrations.vllm_omni.worker")


@contextmanager
def in_place() -> Iterator[None]:
    """Within it, these are vLLM-Omni."""
    before = {name: sys.modules.pop(name, None) for name in (*MODULES, *OF_SERVERS)}
    for name, content in MODULES.items():
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__dict__.update(content)
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
