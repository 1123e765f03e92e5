# SPDX-License-Identifier: Apache-2.0
"""Families x features: what is negated under a feature is what is negated without its machinery, whenever it
is switched on; what is not is the untouched pipeline's, to the bit."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

import diffusers
import features
from caches import CACHES, WINDOWS, Cache
from features import FAMILIES, FEATURES, STEPS, Family, Feature
from matrix import matrix
from parked import parked  # noqa: F401
from pipelines import one_thread  # noqa: F401

import fastnegate as fn
from fastnegate import ConceptBank, Policy, Rule

pytestmark = pytest.mark.usefixtures("parked")
# Random models hardly look at their text, so everything is stronger than published.
STRONG = Rule.preset("nag", strength=10.0, norm_limit=5.0, blend=1.0)
DOG = Policy({"dog": 1.0})
SDXL = next(family for family in FAMILIES if family.kind == "sdxl")
PROMPTS = ["a cat", "a photo"]

every_family = pytest.mark.parametrize(
    "family",
    [pytest.param(f, id=f.name, marks=() if f.default else pytest.mark.full) for f in FAMILIES],
)


def run(family: Family, pipe: Any, feature: Feature | None = None, **options: Any) -> Tensor:
    """Latents of two prompts."""
    more = {} if feature is None else feature.call(pipe)
    return family.generate(pipe, PROMPTS, **{"steps": 2, **more, **options})


def negated(
    family: Family, pipe: Any, engine: fn.Engine, *args: Any, policy: Policy = DOG, **options: Any
) -> Tensor:
    """The first of the two is."""
    with engine.batch([policy, None]):
        return run(family, pipe, *args, **options)


def bank_of(pipe: Any) -> ConceptBank:
    return ConceptBank.from_prompts(pipe, {"dog": ["dog"]}, templates=["{}"])


@contextmanager
def installed(pipe: Any, bank: ConceptBank) -> Iterator[fn.Engine]:
    engine = fn.install(pipe, bank, rule=STRONG)
    yield engine
    engine.remove()


def error(actual: Tensor, wanted: Tensor) -> float:
    """Relative to the largest output."""
    return float((actual - wanted).abs().max() / wanted.abs().max())


@functools.cache
def without(family: Family) -> tuple[Tensor, Tensor]:
    """Without any feature: untouched, and negated."""
    pipe = family.build()
    untouched = run(family, pipe)
    with installed(pipe, bank_of(pipe)) as engine:
        return untouched, negated(family, pipe, engine)


def written_out(family: Family, feature: Feature) -> tuple[Tensor, Tensor]:
    """The same without the machinery."""
    pipe = family.build()
    feature.literal(pipe)
    plain = run(family, pipe)
    with installed(pipe, bank_of(pipe)) as engine:
        wanted = negated(family, pipe, engine)
    assert error(wanted[0], plain[0]) > 1e-3
    return plain, wanted


@every_family
@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_a_feature(family: Family, feature: Feature) -> None:
    if feature.needs is not None and importlib.util.find_spec(feature.needs) is None:
        pytest.skip(f"needs {feature.needs}")
    pipe = family.build()
    if not feature.offered(pipe) or feature.name in family.fails:
        pytest.skip("diffusers does not have it, or fails itself")
    bank = bank_of(pipe)
    if (name := feature.refused(pipe)) is not None:
        feature.on(pipe)
        plain = run(family, pipe)
        with pytest.raises(fn.UnsupportedModelError, match=name), installed(pipe, bank) as engine:
            assert torch.equal(run(family, pipe), plain)
            negated(family, pipe, engine)
        return

    literal, wanted = written_out(family, feature)

    def check(pipe: Any, engine: fn.Engine) -> None:
        assert torch.equal(run(family, pipe, feature), plain)
        actual = negated(family, pipe, engine, feature)
        assert error(actual, wanted) <= feature.near
        assert error(actual[1], plain[1]) <= 5e-6  # nobody asked for its negation

    def check_restored(actual: Tensor, before: Tensor) -> None:
        assert torch.equal(actual, before) if feature.exact else error(actual, before) <= 5e-6

    off = feature.on(pipe)
    plain = run(family, pipe, feature)
    assert error(plain, literal) <= feature.near
    with installed(pipe, bank) as engine:  # it was there before
        check(pipe, engine)
        if off is not None:
            off()
            check_restored(negated(family, pipe, engine), without(family)[1])
            off = feature.on(pipe)  # and comes again after
            check(pipe, engine)
            off()
    if off is not None:
        check_restored(run(family, pipe), without(family)[0])
        return
    assert torch.equal(run(family, pipe, feature), plain)
    pipe = family.build()
    with installed(pipe, bank_of(pipe)) as engine:
        feature.on(pipe)
        check(pipe, engine)
    assert torch.equal(run(family, pipe, feature), plain)


@every_family
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("cache", CACHES, ids=lambda cache: cache.name)
def test_a_cache(family: Family, cache: Cache, window: str) -> None:
    """What it kept before a window began, or ended, is not used after."""
    pipe, policy = family.build(), Policy({"dog": 1.0}, **WINDOWS[window])
    if not features.has_caches(pipe) or cache.name in family.fails:
        pytest.skip("diffusers does not have it, or fails itself")
    bank = bank_of(pipe)
    with installed(pipe, bank) as engine:
        without = negated(family, pipe, engine, policy=policy, steps=STEPS)

    reference = family.build()
    cache.write_out(reference, window, family.calls)
    with installed(reference, bank_of(reference)) as engine:
        wanted = negated(family, reference, engine, policy=policy, steps=STEPS)

    for model in features.models(pipe):
        model.enable_cache(cache.config)
    plain = run(family, pipe, steps=STEPS)
    with installed(pipe, bank) as engine:
        assert torch.equal(run(family, pipe, steps=STEPS), plain)
        actual = negated(family, pipe, engine, policy=policy, steps=STEPS)
        assert torch.equal(run(family, pipe, steps=STEPS), plain)
    assert error(actual, wanted) <= 5e-6, error(actual, wanted)
    assert error(actual[0], plain[0]) > 1e-3
    assert error(wanted, without) > 1e-4 or not cache.apart


@pytest.mark.parametrize("cache", CACHES, ids=lambda cache: cache.name)
def test_what_a_call_that_failed_left_in_a_cache_is_not_used(cache: Cache) -> None:
    """diffusers forgets it at the end of a call alone."""
    family, other = FAMILIES[0], Policy({"dog": 0.5})
    pipe = family.build()
    for model in features.models(pipe):
        model.enable_cache(cache.config)
    with installed(pipe, bank_of(pipe)) as engine:
        wanted = negated(family, pipe, engine, policy=other, steps=STEPS)
        with mock.patch.object(pipe.scheduler, "step", side_effect=ZeroDivisionError):
            with pytest.raises(ZeroDivisionError):
                negated(family, pipe, engine)
        assert torch.equal(negated(family, pipe, engine, policy=other, steps=STEPS), wanted)


def test_an_audit_tells_of_layers_that_a_cache_skipped() -> None:
    family = FAMILIES[0]
    pipe = family.build()
    features.models(pipe)[0].enable_cache(CACHES[0].config)
    with installed(pipe, bank_of(pipe)) as engine, fn.audit(pipe) as audit:
        negated(family, pipe, engine, steps=STEPS)
    assert {line["calls"] for line in audit.report()} == {2 + (STEPS - 1)}  # two layers, then the first alone
    with pytest.raises(fn.AuditError, match="ran 0 times at step 1"):
        audit.verify()


def test_by_hand_too_a_cache_that_leaves_out_rows_is_refused() -> None:
    pipe = SDXL.build()
    bank = bank_of(pipe)
    pipe.unet.set_attn_processor(fn.NegationAttnProcessor(bank, STRONG))
    diffusers.hooks.apply_faster_cache(pipe.unet, features.FASTER)
    with pytest.raises(fn.UnsupportedModelError, match="FasterCache"):
        run(SDXL, pipe)


def test_the_matrix_is_the_one_of_the_docs() -> None:
    assert matrix() in (Path(__file__).parents[3] / "docs" / "models.md").read_text()
