# SPDX-License-Identifier: Apache-2.0
# vLLM-Omni's classes are not typed here:
# mypy: disable-error-code="misc, no-any-return"
"""`NegatedPipeline`: a diffusers pipeline in vLLM-Omni whose requests carry policies and share batches."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from vllm_omni.diffusion.data import DiffusionOutput, OmniDiffusionConfig
from vllm_omni.diffusion.models.diffusers_adapter.pipeline_diffusers_adapter import DiffusersAdapterPipeline
from vllm_omni.diffusion.registry import get_diffusion_post_process_func, get_diffusion_pre_process_func
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch
from vllm_omni.errors import OmniClientError
from vllm_omni.platforms import current_omni_platform

from ...engine.bank import ConceptBank
from ...engine.engine import Engine
from ...engine.errors import BankMismatchError, RowMapError, UnsupportedModelError
from ...engine.policy import Policy
from ..diffusers.install import install
from .answer import written
from .calls import Job, groups, merged
from .client import FIELD
from .settings import Settings

log = logging.getLogger("fastnegate")
OF_SERVERS = (RowMapError, BankMismatchError, UnsupportedModelError)  # no request is to blame for these
PAYLOADS = {"images": "image", "frames": "video", "audios": "audio"}  # diffusers' word -> the engine's
PROCESSORS = (get_diffusion_pre_process_func, get_diffusion_post_process_func)


class NegatedPipeline(DiffusersAdapterPipeline):
    """Any supported diffusers pipeline, with per-request negation.

    The engine makes it of `custom_pipeline_args`: {"pipeline_class":
    "fastnegate.integrations.vllm_omni.NegatedPipeline", "bank": PATH}; `Settings` says what else may be in
    it. A request's policy is `extra_args["negation"]`, over HTTP `extra_params`; `Policy.from_json` reads it.

    The engine does not start unless negation is installed and its first request, which warms up, was negated.

    Raises:
        ValueError: settings that are none, step mode, or a model for which the engine has processors of its
            own.
    """

    supports_request_batch = True

    def __init__(self, *, od_config: OmniDiffusionConfig, device: torch.device | None = None) -> None:
        self.settings = Settings.of(od_config.custom_pipeline_args)
        _check(od_config)
        super().__init__(od_config=od_config, device=device or current_omni_platform.get_torch_device())

    # ---- start ------------------------------------------------------------------------------

    def load_weights(self, weights: Any = None) -> None:
        """Load the pipeline from its folder, and install negation in it. Raises what `ConceptBank.load` and
        `fastnegate.install` raise, which stops the start."""
        super().load_weights()
        given = self.settings
        self.engine: Engine = install(
            self._pipeline,
            self._bank,
            max(self.od_config.max_num_seqs, given.max_images),
            rule=given.rule,
            backend=given.backend,
            max_tokens=given.max_tokens,
            unasked="raise",
        )

    def _load_pipeline_from_pretrained(self, model_id: str, load_kwargs: dict[str, Any]) -> Any:
        pipeline = super()._load_pipeline_from_pretrained(model_id, load_kwargs)
        # Weights may be offloaded next, and who a text encoder is, is read from them.
        self._bank = ConceptBank.load(self.settings.bank, pipeline)
        return pipeline

    def _warm_up(self, request: OmniDiffusionRequest) -> DiffusionOutput:
        """Answer the engine's first request: a picture of the pipeline's own size, with a concept of the bank
        in the prompt, negated. Raises if that fails, which stops the start."""
        bank = self.engine.bank
        name = next((name for name in bank if bank[name].members), None)
        if name is None:
            log.warning("no warm-up: the bank has no concept with a member, of which to make a prompt")
        else:
            call = self._build_call_kwargs(DiffusionRequestBatch([request]))
            call = {k: v for k, v in call.items() if k not in ("height", "width")}
            self._draw([Job(0, Policy({name: 1.0}), {**call, "prompt": bank[name].members[0]}, 1)])
        return DiffusionOutput(output=[])

    # ---- batches ----------------------------------------------------------------------------

    @torch.inference_mode()
    def forward(self, req: DiffusionRequestBatch) -> list[DiffusionOutput]:
        """The answers to a batch of requests, in their order. A request that cannot be served has an error
        for an answer, and costs its neighbours nothing but time."""
        if req.is_dummy_run():
            return [self._warm_up(request) for request in req.requests]
        outputs: dict[int, DiffusionOutput] = {}
        jobs = []
        for place, request in enumerate(req.requests):
            try:
                jobs.append(self._job(place, request))
            except Exception as error:
                outputs[place] = _failure(error)
        for group in groups(jobs, self.engine.max_batch):
            outputs |= {job.place: output for job, output in zip(group, self._answers(group))}
        return [outputs[place] for place in range(req.num_reqs)]

    def read(self, path: str) -> ConceptBank:
        """A bank file for this pipeline. Raises as `ConceptBank.load`."""
        return ConceptBank.load(path, self._pipeline)

    # ---- a request --------------------------------------------------------------------------

    def _job(self, place: int, request: OmniDiffusionRequest) -> Job:
        """Raises ValueError if the request cannot be served, before anything runs."""
        call = self._build_call_kwargs(DiffusionRequestBatch([request]))
        policy = self._policy(request, call)
        counted = any(name.startswith("num_") and name.endswith("_per_prompt") for name in call)
        images = request.sampling_params.num_outputs_per_prompt if counted else 1
        most, generator = self.settings.max_images, call["generator"]
        if images > most:
            raise ValueError(f"num_outputs_per_prompt={images}: at most {most} are allowed")
        if isinstance(generator, list) and len(generator) != images:
            raise ValueError(f"generator has {len(generator)} entries: must be {images}, or one for all")
        return Job(place, policy, call, images)

    def _policy(self, request: OmniDiffusionRequest, call: Mapping[str, Any]) -> Policy | None:
        given = request.sampling_params.extra_args or {}
        if FIELD not in given:
            return None
        try:
            policy = Policy.from_json(given[FIELD])
            windowed = not policy.always(self.engine.rule.stop)
            self.engine.check(policy, self._steps(call) if windowed else None)
        except ValueError as error:
            raise ValueError(f"{FIELD}: {error}") from error
        return policy

    def _steps(self, call: Mapping[str, Any]) -> int | None:
        """Timesteps that a call goes through, where its number of steps alone says that; else None."""
        if any(call.get(name) is not None for name in ("timesteps", "sigmas", "strength")):
            return None
        steps = call.get("num_inference_steps")
        if steps is None:
            steps = inspect.signature(self._pipeline.__call__).parameters["num_inference_steps"].default
        scheduler = copy.deepcopy(self._pipeline.scheduler)
        try:
            scheduler.set_timesteps(steps)
        except (TypeError, ValueError):  # it wants to know more than the number
            return None
        return len(scheduler.timesteps)

    # ---- a call of the pipeline -------------------------------------------------------------

    def _answers(self, group: Sequence[Job]) -> list[DiffusionOutput]:
        try:
            return self._draw(group)
        except Exception as error:
            if len(group) == 1:
                return [_failure(error)]
            # Whose fault it is, only smaller calls tell.
            log.warning("a call for %d requests failed, and is made again as two: %s", len(group), error)
            half = len(group) // 2
            return [*self._answers(group[:half]), *self._answers(group[half:])]

    def _draw(self, group: Sequence[Job]) -> list[DiffusionOutput]:
        """Raises NegationNotAppliedError unless each request got exactly the negation that it asked for."""
        with self.engine.batch([job.policy for job in group]) as batch:
            result = self._pipeline(**merged(group))
        attribute = next((name for name in PAYLOADS if hasattr(result, name)), None)
        payload = "output" if attribute is None else PAYLOADS[attribute]
        drawn = result if attribute is None else getattr(result, attribute)
        outputs = []
        for job, proof, own in zip(group, batch.proofs, _shares(drawn, [job.images for job in group])):
            proof.check(job.policy)
            answer = {"payload": {payload: own}, "metadata": {FIELD: proof.to_json()}}
            outputs.append(DiffusionOutput(output=answer, stage_durations=written(proof)))
        return outputs


def _shares(drawn: Any, sizes: Sequence[int]) -> Iterator[Any]:
    """What belongs to whom of the results of one call. Raises RuntimeError: nobody can tell."""
    if len(sizes) == 1:
        yield drawn
        return
    if len(drawn) != sum(sizes):
        raise RuntimeError(f"the pipeline gave {len(drawn)} results for {sum(sizes)}: whose is which?")
    first = 0
    for size in sizes:
        yield drawn[first : first + size]
        first += size


def _check(od_config: OmniDiffusionConfig) -> None:
    """Raise ValueError for a configuration under which negation, or its proof, would not be right."""
    if od_config.step_execution or od_config.streaming_output:
        raise ValueError(
            "step_execution=True: in step mode the rows of a batch are at different timesteps, and windows "
            "of policies go by one; negation needs request batches"
        )
    if any(processor(od_config) is not None for processor in PROCESSORS):
        raise ValueError(
            f"model_class_name={od_config.model_class_name!r}: the engine would process what this pipeline "
            "gives as if its own had made it; start with model_class_name='DiffusersAdapterPipeline'"
        )


def _failure(error: Exception) -> DiffusionOutput:
    """An error as the answer to one request: the client's (4xx) if the request was wrong."""
    if isinstance(error, OF_SERVERS) or not isinstance(error, ValueError):
        log.error("a request failed", exc_info=error)
    elif not isinstance(error, OmniClientError):
        error = OmniClientError(str(error))
    return DiffusionOutput.from_exception(error)
