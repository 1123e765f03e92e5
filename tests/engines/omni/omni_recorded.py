# SPDX-License-Identifier: Apache-2.0
"""Pipelines for the real engine: one that records whose requests shared a call, and one without negation."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from vllm_omni.diffusion.data import DiffusionOutput
from vllm_omni.diffusion.models.diffusers_adapter.pipeline_diffusers_adapter import DiffusersAdapterPipeline
from vllm_omni.platforms import current_omni_platform

from fastnegate.integrations.vllm_omni import NegatedPipeline


class RecordedPipeline(NegatedPipeline):
    """Writes a line for each call to the file VLLM_OMNI_RECORD: the policies of its requests."""

    def _draw(self, group: Sequence[Any]) -> list[DiffusionOutput]:
        policies = [None if job.policy is None else job.policy.to_json() for job in group]
        with open(os.environ["VLLM_OMNI_RECORD"], "a") as file:
            file.write(json.dumps(policies) + "\n")
        return super()._draw(group)


class PlainPipeline(DiffusersAdapterPipeline):
    """What a server without this package's pipeline would run."""

    def __init__(self, *, od_config: Any, device: Any = None) -> None:
        super().__init__(od_config=od_config, device=device or current_omni_platform.get_torch_device())

    def load_weights(self, weights: Any = None) -> None:
        super().load_weights()

    def forward(self, req: Any) -> DiffusionOutput:
        return DiffusionOutput(output=[]) if req.is_dummy_run() else super().forward(req)
