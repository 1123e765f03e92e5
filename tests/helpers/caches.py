# SPDX-License-Identifier: Apache-2.0
"""Caches of diffusers that reuse at a step what was computed at an earlier one, and each of them written out:
everything is computed at every step, and then replaced by what the cache would have reused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from features import STEPS, models
from torch import Tensor, nn

# Of a policy: all of four steps, all but the first, all but the last.
WINDOWS: dict[str, dict[str, float]] = {"whole": {}, "late": {"start": 0.25}, "early": {"stop": 0.75}}


@dataclass(frozen=True, eq=False)
class Cache:
    """One of them.

    Attributes:
        name: its title in docs/models.md.
        config: what `enable_cache` is given, so that it reuses whatever it can.
        whole, late, early: for a policy with that window, which step each step's parts are of.
        literal: writes it out in a model: (its hooked modules, where it is).
        apart: whether it keeps conditional and unconditional calls apart.
    """

    name: str
    config: Any
    whole: Sequence[int]
    late: Sequence[int]
    early: Sequence[int]
    literal: Callable[[list[nn.Module], Count], None]
    apart: bool = True

    def write_out(self, pipe: Any, window: str, calls: int) -> None:
        """For that many calls a step, of which the first is conditional: nothing ever changes for others."""
        steps = {"whole": self.whole, "late": self.late, "early": self.early}[window]
        sources = (steps, self.whole)[:calls] if calls == 1 or self.apart else (range(STEPS),) * calls
        for model in models(pipe):
            twin = copy.deepcopy(model)
            twin.enable_cache(self.config)
            hooked = [name for name, module in twin.named_modules() if name and _has_hooks(module)]
            self.literal([model.get_submodule(name) for name in hooked], Count(model, sources))


def _has_hooks(module: nn.Module) -> bool:
    registry = getattr(module, "_diffusers_hook", None)
    return registry is not None and bool(registry.hooks)


class Count:
    """At which step a model is, in which of its calls, and where what it reuses there is from."""

    def __init__(self, model: nn.Module, sources: Sequence[Sequence[int]]) -> None:
        self._sources, self._count = sources, -1
        model.register_forward_pre_hook(self._next)

    def _next(self, _model: nn.Module, _args: Any) -> None:
        self._count += 1

    @property
    def here(self) -> tuple[int, int]:
        step, call = divmod(self._count, len(self._sources))
        return step % STEPS, call

    @property
    def source(self) -> tuple[int, int]:
        step, call = self.here
        return self._sources[call][step], call


def _output(modules: list[nn.Module], count: Count) -> None:
    """Of each module."""

    def reusing(compute: Callable[..., Any]) -> Callable[..., Any]:
        made: dict[tuple[int, int], Any] = {}

        def forward(*args: Any, **kwargs: Any) -> Any:
            made[count.here] = compute(*args, **kwargs)
            return made[count.source]

        return forward

    for module in modules:
        module.forward = reusing(module.forward)


def _image(given: Any, kwargs: dict[str, Any]) -> Tensor:
    return kwargs.get("hidden_states", given[0] if given else None)


def _added(of_input: bool) -> Callable[[list[nn.Module], Count], None]:
    """What all blocks add to the image, or those after the first one."""

    def literal(blocks: list[nn.Module], count: Count) -> None:
        before: dict[tuple[int, int], Tensor] = {}
        added: dict[tuple[int, int], Tensor] = {}
        head, tail = blocks[0].forward, blocks[-1].forward

        def first(*args: Any, **kwargs: Any) -> Any:
            made = head(*args, **kwargs)
            before[count.here] = _image(args, kwargs) if of_input else _last(made)
            return made

        def last(*args: Any, **kwargs: Any) -> Any:
            made = tail(*args, **kwargs)
            added[count.here] = _last(made) - before[count.here]
            if count.source == count.here:
                return made
            image = before[count.here] + added[count.source]
            return (*made[:-1], image) if isinstance(made, tuple) else image

        blocks[0].forward, blocks[-1].forward = first, last

    return literal


def _last(made: Any) -> Tensor:
    """Blocks of joint models return text and image."""
    return made[-1] if isinstance(made, tuple) else made


CACHES = (
    Cache(
        "First-Block cache", diffusers.FirstBlockCacheConfig(threshold=1e9),
        (0, 0, 0, 0), (0, 1, 1, 1), (0, 0, 0, 3), _added(of_input=False),
    ),
    Cache(
        "MagCache",
        diffusers.MagCacheConfig(
            mag_ratios=torch.ones(STEPS), num_inference_steps=STEPS, retention_ratio=0.0, max_skip_steps=STEPS
        ),
        (0, 0, 0, 0), (0, 1, 1, 1), (0, 0, 0, 3), _added(of_input=True),
    ),
    Cache(
        "TaylorSeer",
        diffusers.TaylorSeerCacheConfig(
            disable_cache_before_step=1, max_order=0, taylor_factors_dtype=torch.float32,
            cache_identifiers=[r".*\.attn\d?"],
        ),
        (0, 0, 2, 2), (0, 1, 1, 3), (0, 0, 2, 3), _output,
    ),
    Cache(
        "Pyramid Attention Broadcast",
        diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, cross_attention_block_skip_range=2,
            current_timestep_callback=lambda: 500,
        ),
        (0, 0, 2, 2), (0, 1, 2, 2), (0, 0, 2, 3), _output, apart=False,
    ),
)  # fmt: skip
