# SPDX-License-Identifier: Apache-2.0
# vLLM-Omni's classes are not typed here:
# mypy: disable-error-code="misc"
"""`NegatedWorker`: what a worker answers to `reload_bank`."""

from __future__ import annotations

from vllm_omni.diffusion.worker.diffusion_worker import CustomPipelineWorkerExtension

from ...engine.bank import ConceptBank
from .pipeline import NegatedPipeline


class NegatedWorker(CustomPipelineWorkerExtension):
    """Mixed into the engine's worker class, as `worker_extension_cls`. Its methods are for the engine's
    `collective_rpc`, which runs them between batches, on every worker. They answer {"bank": digest} or
    {"refused": why}: an exception would be told differently by each executor."""

    _staged: ConceptBank | None = None

    def negation_stage(self, path: str) -> dict[str, str]:
        """Read a bank file and keep it aside."""
        pipeline: NegatedPipeline = self.model_runner.pipeline
        self._staged = None
        try:
            self._staged = pipeline.read(path)
        except (ValueError, OSError) as error:
            return {"refused": str(error)}
        return {"bank": self._staged.digest}

    def negation_commit(self, digest: str) -> dict[str, str]:
        """Take the bank that was kept aside, if it is the one with this digest."""
        staged, self._staged = self._staged, None
        if staged is None or staged.digest != digest:
            return {"refused": f"digest={digest!r}: no such bank was read"}
        try:
            self.model_runner.pipeline.engine.replace_bank(staged)
        except ValueError as error:
            return {"refused": str(error)}
        return {"bank": digest}
