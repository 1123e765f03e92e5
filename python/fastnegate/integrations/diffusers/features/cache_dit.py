# SPDX-License-Identifier: Apache-2.0
"""cache-dit (`cache_dit.enable_cache`): blocks of its own take the place of a denoiser's while that runs.
What they keep from step to step lies in contexts, which are made anew for each pipeline call.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ....engine.errors import UnsupportedModelError


class CacheDitContext:
    """One context, by name: the object may be another one at the next step."""

    def __init__(self, manager: Any, name: str) -> None:
        self._manager, self._name = manager, name

    @property
    def _now(self) -> Any:
        return self._manager._cached_context_manager.get(self._name)

    @property
    def part(self) -> str:
        """Which of a step's denoiser calls comes next: those with and without a prompt may be kept apart."""
        return "cfg" if self._now is not None and self._next_is_cfg(self._now) else ""

    @staticmethod
    def _next_is_cfg(context: Any) -> bool:
        config = context.cache_config
        second = context.transformer_executed_steps % 2 == 1  # of the two calls of a step
        return bool(config.enable_separate_cfg) and second is not config.cfg_compute_first

    def forget(self) -> None:
        """All that the calls that the next one is one of have kept."""
        context = self._now
        if context is None:
            return
        cfg = self._next_is_cfg(context)
        for name in [name for name in context.buffers if name.endswith("_cfg") is cfg]:
            del context.buffers[name]
        for calibrator in context.get_cfg_calibrators() if cfg else context.get_calibrators():
            if calibrator is not None:
                calibrator.reset_cache()

    def check(self) -> None:
        """Raise UnsupportedModelError where blocks are skipped by rules that cannot do without what was kept:
        pruning, and steps that are chosen beforehand."""
        kind, context = type(self._manager).__name__, self._now
        if kind != "CachedContextManager":
            raise UnsupportedModelError(
                f"{kind} of cache-dit cannot be combined with negation: use its DBCacheConfig"
            )
        config = None if context is None else context.cache_config
        if config is None or config.steps_computation_mask is None:
            return
        if config.steps_computation_policy == "static":
            raise UnsupportedModelError(
                "steps_computation_policy='static' of cache-dit cannot be combined with negation: use "
                "steps_computation_policy='dynamic'"
            )


def contexts(model: nn.Module) -> list[CacheDitContext]:
    """Of a denoiser; none where cache-dit is not at work."""
    facts = vars(model)
    manager = facts.get("_context_manager")
    if manager is None or not type(manager).__module__.startswith("cache_dit."):
        return []
    return [CacheDitContext(manager, name) for name in facts["_context_names"]]
