# SPDX-License-Identifier: Apache-2.0
"""Caches and `install`, whichever comes first, and what a cache does to rows beside each other. cache-dit is
here as a stand-in and, by `-m engines`, as itself: tests/engines/cache_dit.sh makes its environment. What
diffusers' caches reuse is tested in ../models/test_features.py."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")

import diffusers
import pipelines
from caches import CACHES, WINDOWS, Count
from features import FAMILIES, STEPS, Family
from pipelines import one_thread  # noqa: F401

import fastnegate as fn
from fastnegate import Policy, Rule
from fastnegate.integrations.diffusers.contract import denoiser
from fastnegate.integrations.diffusers.edits import safree
from fastnegate.integrations.diffusers.features.caches import check, remembering

# Random models hardly look at their text, so everything is stronger than published.
STRONG = Rule.preset("nag", strength=10.0, norm_limit=5.0, blend=1.0)
PROMPTS = ["a cat", "a photo"]
FLUX = FAMILIES[0]
FIRST_BLOCK = CACHES[0]


# ---- stand-ins ----------------------------------------------------------------------------------------


class CachedContextManager:
    """Of the contexts of a denoiser, by name."""

    __module__ = "cache_dit.stand_in"

    def __init__(self, **config: Any) -> None:
        self.reset: list[str] = []
        facts = {"enable_separate_cfg": True, "cfg_compute_first": False, "steps_computation_mask": None}
        context = SimpleNamespace(
            transformer_executed_steps=0,
            buffers=dict.fromkeys(("Fn_buffer", "Bn_buffer", "Fn_buffer_cfg", "Bn_buffer_cfg")),
            cache_config=SimpleNamespace(**facts | config),
            get_calibrators=lambda: (self._calibrator("prompt"), None),
            get_cfg_calibrators=lambda: (self._calibrator("no prompt"), None),
        )
        self._cached_context_manager = {"blocks": context}

    def _calibrator(self, name: str) -> Any:
        return SimpleNamespace(reset_cache=lambda: self.reset.append(name))


def denoiser_with(manager: Any) -> nn.Module:
    model = nn.Linear(1, 1)
    model._context_manager, model._context_names = manager, ["blocks"]
    return model


@pytest.mark.parametrize("first", [False, True], ids=["prompt first", "no prompt first"])
def test_calls_with_and_without_a_prompt_are_forgotten_apart(first: bool) -> None:
    manager = CachedContextManager(cfg_compute_first=first)
    [cache] = remembering(denoiser_with(manager))
    context = manager._cached_context_manager["blocks"]
    parts = []
    for step in range(2):
        context.transformer_executed_steps = step
        parts.append(cache.part)
        cache.forget()
        assert all(name.endswith("_cfg") is (first is (step == 1)) for name in context.buffers)
        assert manager.reset.pop() == ("no prompt" if first is (step == 0) else "prompt")
    assert not context.buffers and parts == (["cfg", ""] if first else ["", "cfg"])
    manager._cached_context_manager.clear()  # between two calls of the pipeline
    cache.forget()


def test_rules_that_need_what_was_kept_are_refused_by_name() -> None:
    [cache] = remembering(denoiser_with(CachedContextManager()))
    check(cache)
    static = CachedContextManager(steps_computation_mask=[1, 0], steps_computation_policy="static")
    with pytest.raises(
        fn.UnsupportedModelError,
        match="steps_computation_policy='static'",
    ):
        check(remembering(denoiser_with(static))[0])
    pruned = type("PrunedContextManager", (CachedContextManager,), {"__module__": "cache_dit.stand_in"})()
    with pytest.raises(fn.UnsupportedModelError, match="PrunedContextManager of cache-dit"):
        check(remembering(denoiser_with(pruned))[0])


# ---- the package itself ---------------------------------------------------------------------------------

engines = pytest.mark.engines
ORDERS = ("enabled, then installed", "installed, then enabled")
EVERYTHING = 2.0  # a threshold that nothing exceeds, so that all that can be is reused
two_families = pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f.kind in ("wan", "pixart_alpha")], ids=lambda family: family.name
)


def run(
    family: Family, pipe: Any, engine: fn.Engine | None = None, *policies: Policy | None, steps: int = STEPS
) -> Tensor:
    """Latents of two prompts, without an engine those of the pipeline as it is."""
    if engine is None:
        return family.generate(pipe, PROMPTS, steps)
    with engine.batch(policies):
        return family.generate(pipe, PROMPTS, steps)


def install(pipe: Any) -> fn.Engine:
    bank = fn.ConceptBank.from_prompts(pipe, {"dog": "dog"}, templates=["{}"])
    return fn.install(pipe, bank, rule=STRONG)


def enable(pipe: Any, threshold: float, **options: Any) -> None:
    import cache_dit

    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=1, residual_diff_threshold=threshold
    )
    cache_dit.enable_cache(pipe, cache_config=config, **options)


def disable(pipe: Any) -> None:
    import cache_dit

    cache_dit.disable_cache(pipe)


def error(actual: Tensor, wanted: Tensor) -> float:
    """Relative to the largest output."""
    return float((actual - wanted).abs().max() / wanted.abs().max())


@engines
@two_families
@pytest.mark.parametrize("order", ORDERS)
def test_with_cache_dit_in_either_order(family: Family, order: str) -> None:
    """With one block before it, its cache is a First-Block cache."""
    pytest.importorskip("cache_dit")
    policies = {name: Policy({"dog": 1.0}, **window) for name, window in WINDOWS.items()}
    wanted = {}
    for name, policy in policies.items():
        reference = family.build()
        steps = {"whole": FIRST_BLOCK.whole, "late": FIRST_BLOCK.late, "early": FIRST_BLOCK.early}[name]
        model = denoiser(reference)
        blocks = model.blocks if family.kind == "wan" else model.transformer_blocks
        FIRST_BLOCK.literal(list(blocks), Count(model, (steps, FIRST_BLOCK.whole)[: family.calls]))
        wanted[name] = run(family, reference, install(reference), policy, None)
    reference = family.build()
    untouched = run(family, reference)
    enable(reference, EVERYTHING)
    plain = run(family, reference)
    disable(reference)

    pipe = family.build()
    if order == ORDERS[0]:
        enable(pipe, EVERYTHING)
    engine = install(pipe)
    if order == ORDERS[1]:
        enable(pipe, EVERYTHING)
    for name, policy in policies.items():
        actual = run(family, pipe, engine, policy, None)
        assert error(actual, wanted[name]) <= 5e-6, name
        assert error(actual[0], plain[0]) > 1e-3
        assert torch.equal(run(family, pipe, engine, None, None), plain)
    if order == ORDERS[0]:  # they are undone in the order in which they came
        disable(pipe)
        engine.remove()
    else:
        engine.remove()
        assert torch.equal(run(family, pipe), plain)
        disable(pipe)
    assert torch.equal(run(family, pipe), untouched)


@engines
def test_extrapolation_starts_anew_when_what_acts_changes() -> None:
    cache_dit = pytest.importorskip("cache_dit")
    family = next(f for f in FAMILIES if f.kind == "pixart_alpha")
    calibrated = {"calibrator_config": cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1)}
    late = Policy({"dog": 1.0}, start=0.25)  # from the second step on, before which nothing is extrapolated
    made = []
    for options in ({}, calibrated):
        pipe = family.build()
        engine = install(pipe)
        enable(pipe, EVERYTHING, **options)
        made.append(run(family, pipe, engine, late, None))
        disable(pipe)
    assert error(made[0], made[1]) <= 5e-6  # of one step there is no slope


@engines
def test_edits_are_refused_beside_it() -> None:
    pytest.importorskip("cache_dit")
    pipe = pipelines.build("sd15")
    unet = denoiser(pipe)
    from cache_dit.caching.cache_contexts import CachedContextManager as Real

    unet._context_manager, unet._context_names = Real(), ["blocks"]
    with pytest.raises(fn.UnsupportedModelError, match="safree cannot be combined with CacheDitContext"):
        safree(pipe, "dog")


@engines
def test_rows_beside_each_other_under_cache_dit() -> None:
    pytest.importorskip("cache_dit")
    family = next(f for f in FAMILIES if f.kind == "pixart_alpha")
    assert moved(family, lambda pipe: enable(pipe, 0.0)) <= 1e-5
    assert moved(family, lambda pipe: enable(pipe, 0.2)) > 1e-3


# ---- diffusers' own ---------------------------------------------------------------------------------------


def first_block(threshold: float) -> Callable[[Any], None]:
    return lambda pipe: denoiser(pipe).enable_cache(diffusers.FirstBlockCacheConfig(threshold=threshold))


@pytest.mark.parametrize("window", WINDOWS)
def test_a_cache_that_is_enabled_after_install(window: str) -> None:
    policy = Policy({"dog": 1.0}, **WINDOWS[window])
    before, after = FLUX.build(), FLUX.build()
    first_block(EVERYTHING)(before)
    engines = install(before), install(after)
    first_block(EVERYTHING)(after)
    wanted, actual = (run(FLUX, pipe, engine, policy, None) for pipe, engine in zip((before, after), engines))
    assert torch.equal(actual, wanted)


def test_rows_beside_each_other_under_a_first_block_cache() -> None:
    """The caveat of docs/serving.md: whether a step is reused is decided by a mean over all rows, so that a
    row without a policy depends on its neighbour's."""
    assert moved(FLUX, first_block(1e-9)) <= 1e-5
    assert moved(FLUX, first_block(0.5)) > 1e-4


def moved(family: Family, enable: Callable[[Any], object]) -> float:
    """What a neighbour's policy changes in a row without one, relative to the largest output."""
    pipe = family.build()
    engine = install(pipe)
    enable(pipe)
    alone, beside = (run(family, pipe, engine, p, None, steps=8)[1] for p in (None, Policy({"dog": 1.0})))
    return error(beside, alone)
