# SPDX-License-Identifier: Apache-2.0
"""SLD and CRG in pipelines, against denoising loops that spell the method out, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

import diffusers
import joint_pipelines
from pipelines import build, generate, one_thread  # noqa: F401

import fastnegate as fn
from fastnegate import ConceptBank, NegationNotAppliedError, UnsupportedModelError
from fastnegate.testbed.parts import PictureFlowMatchScheduler

PROMPTS = ["a cat in red", "a painting of a dog"]
STEPS, SCALE = 4, 5.0
SLD = {"warmup": 1, "strength": 2.0, "threshold": 0.1, "momentum": 0.3, "inertia": 0.4}
Spelt = Callable[[Tensor, Tensor, list[Tensor], int, float, float], Tensor]


def spelt_sld() -> Spelt:
    """g of a step, of predicted noises: prompt, empty, concepts, step, ᾱ and the next ᾱ."""
    v = 0.0

    def g(ep: Tensor, e0: Tensor, concepts: list[Tensor], step: int, _kept: float, _next: float) -> Tensor:
        nonlocal v
        guidance = 0.0
        for es in concepts:
            mu = torch.clamp((ep - es).abs() * SLD["strength"], max=1.0)
            mu = torch.where(ep - es >= SLD["threshold"], 0.0, mu)
            guidance = guidance + mu * (es - e0)
        guidance = guidance + SLD["momentum"] * v
        v = SLD["inertia"] * v + (1 - SLD["inertia"]) * guidance
        return guidance if step >= SLD["warmup"] else torch.zeros_like(e0)

    return g


def spelt_crg() -> Spelt:
    past: dict[int, Tensor] = {}

    def square(x: Tensor) -> Tensor:
        return (x**2).flatten(1).sum(1).view(-1, *[1] * (x.dim() - 1))

    def g(
        ep: Tensor, e0: Tensor, concepts: list[Tensor], _step: int, kept: float, following: float
    ) -> Tensor:
        total = torch.zeros_like(ep)
        alpha = kept / following
        for i, en in enumerate(concepts):
            b = square(ep - e0) - square(ep - en)
            presence = 0.7 / 2 * b + past.get(i, 0.0)
            omega = torch.clamp(presence + 1.0, min=0) / (0.7 * square(en - e0))
            total += 0.2 * omega * (en - e0)
            past[i] = past.get(i, 0.0) + b * (1 - alpha) / (2 * alpha * (1 - kept))
        return total

    return g


METHODS: dict[str, tuple[Callable[..., Any], Callable[[], Spelt]]] = {
    "sld": (lambda pipe, concepts: fn.edits.sld(pipe, concepts, **SLD), spelt_sld),
    "crg": (lambda pipe, concepts: fn.edits.crg(pipe, concepts, 0.2, threshold=-1.0, gain=0.7), spelt_crg),
}
by_method = pytest.mark.parametrize("method", METHODS)
mostly_sld = pytest.mark.parametrize("method", ["sld", pytest.param("crg", marks=pytest.mark.full)])


def double(pipe: Any) -> Any:
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.double()
    return pipe


def noise_of(kind: str, predicted: Tensor, x: Tensor, kept: float) -> Tensor:
    signal, noise = math.sqrt(kept), math.sqrt(1 - kept)
    if kind == "sample":
        return (x - signal * predicted) / noise
    return signal * predicted + noise * x if kind == "v_prediction" else predicted


def predicted_of(kind: str, e: Tensor, x: Tensor, kept: float) -> Tensor:
    signal, noise = math.sqrt(kept), math.sqrt(1 - kept)
    if kind == "sample":
        return (x - noise * e) / signal
    return (e - noise * x) / signal if kind == "v_prediction" else e


@by_method
@pytest.mark.parametrize("kind", ["epsilon", "sample", pytest.param("v_prediction", marks=pytest.mark.full)])
@torch.no_grad()
def test_a_unets_pipeline_is_the_loop_spelt_out(method: str, kind: str) -> None:
    """Each prediction on its own, turned into noise, guided, and turned back."""
    pipe = double(build("sd15"))
    pipe.scheduler = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1, prediction_type=kind)
    bank = ConceptBank.from_prompts(pipe, {"dog": "dog", "red": "red"})
    prompt, empty = pipe.encode_prompt(PROMPTS, "cpu", 1, True, ["picture"] * 2)
    make, spelt = METHODS[method]
    start = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3)).double()
    with make(pipe, bank) as on:
        assert on.extra_passes == 2
        got = pipe(
            prompt_embeds=prompt,
            negative_prompt_embeds=empty,
            latents=start,
            num_inference_steps=STEPS,
            guidance_scale=SCALE,
            output_type="latent",
        ).images

    x, guidance, scheduler = start, spelt(), pipe.scheduler
    scheduler.set_timesteps(STEPS)
    steps = scheduler.timesteps.tolist()
    for i, t in enumerate(steps):
        kept = scheduler.alphas_cumprod[t].item()
        following = scheduler.alphas_cumprod[steps[i + 1]].item() if i + 1 < STEPS else 0.999
        concepts = [bank[name].prompt.double().expand(2, -1, -1) for name in bank]
        said = [pipe.unet(x, t, encoder_hidden_states=c).sample for c in (prompt, empty, *concepts)]
        ep, e0, *of_concepts = [noise_of(kind, p, x, kept) for p in said]
        e = e0 + SCALE * (ep - e0 - guidance(ep, e0, of_concepts, i, kept, following))
        x = scheduler.step(predicted_of(kind, e, x, kept), t, x).prev_sample
    torch.testing.assert_close(got, x, rtol=1e-7, atol=1e-7)


@by_method
@torch.no_grad()
def test_flux_with_two_calls_a_step_is_the_loop_spelt_out(method: str) -> None:
    """The prompt's prediction comes first, so the empty text's is what is changed."""
    pipe = joint_pipelines.build("flux")
    pipe.transformer.double()
    bank = ConceptBank.from_prompts(pipe, {"dog": "dog"}, templates=["{}"])
    make, spelt = METHODS[method]
    guidance = spelt()
    calls: list[tuple[dict[str, Any], Tensor]] = []
    options = {"true_cfg_scale": SCALE, "num_inference_steps": 3, "output_type": "latent"}
    encoded = [pipe.encode_prompt(p, p, max_sequence_length=64) for p in ("a cat", "red")]
    (prompt, pooled, _), (negative, negative_pooled, _) = encoded
    given = {
        "prompt_embeds": prompt.double(),
        "pooled_prompt_embeds": pooled.double(),
        "negative_prompt_embeds": negative.double(),
        "negative_pooled_prompt_embeds": negative_pooled.double(),
    }
    forward, step = pipe.transformer.forward, pipe.scheduler.step
    steps: list[Tensor] = []

    def spy(**arguments: Any) -> Any:
        made = forward(**arguments)
        calls.append((arguments, made[0]))
        return made

    def told(predicted: Tensor, *rest: Any, **further: Any) -> Any:
        steps.append(predicted)
        return step(predicted, *rest, **further)

    pipe.transformer.forward, pipe.scheduler.step = spy, told
    with make(pipe, bank):
        pipe(**options, **given, height=24, width=16, generator=torch.Generator().manual_seed(0))
    assert len(calls) == 3 * 3 and len(steps) == 3
    sigmas = pipe.scheduler.timesteps.double() / 1000
    for i, predicted in enumerate(steps):
        (_, ep), (concept, en), (_, e0) = calls[3 * i : 3 * i + 3]
        assert torch.equal(concept["encoder_hidden_states"][0], bank["dog"].prompt.double())
        sigma = sigmas[i].item()
        kept, following = (
            (1 - s) ** 2 / ((1 - s) ** 2 + s**2) for s in (sigma, sigmas[min(i + 1, 2)].item())
        )
        if sigma == 1.0:
            expected = e0 + SCALE * (ep - e0)  # all is noise, and no prediction changes that
        else:
            n = [(1 - sigma) * f for f in (ep, e0, en)]  # what differs between their noises
            g = guidance(n[0], n[1], [n[2]], i, kept, following) / (1 - sigma)
            expected = e0 + SCALE * (ep - g - e0)
        torch.testing.assert_close(predicted, expected, rtol=1e-9, atol=1e-9)


@by_method
@torch.no_grad()
def test_a_flux_of_pictures_is_changed_as_one_of_velocities(method: str) -> None:
    """What a model predicts is what its scheduler says; the same model told otherwise draws the same."""
    drawn = []
    for scheduler in (diffusers.FlowMatchEulerDiscreteScheduler(), PictureFlowMatchScheduler()):
        pipe = joint_pipelines.build("flux")
        pipe.scheduler, forward = scheduler, pipe.transformer.forward
        if isinstance(scheduler, PictureFlowMatchScheduler):

            def pictures(forward: Any = forward, **given: Any) -> Any:
                velocity, sigma = forward(**given)[0], given["timestep"][:, None, None]
                return (given["hidden_states"] - sigma * velocity,)

            pipe.transformer.forward = pictures
        options = {"true_cfg_scale": SCALE, "negative_prompt": "red", "max_sequence_length": 512}
        plain = joint_pipelines.generate(pipe, **options)
        with METHODS[method][0](pipe, "dog"):
            drawn.append(joint_pipelines.generate(pipe, **options))
        assert not torch.allclose(drawn[-1], plain, rtol=0, atol=1e-3)
    torch.testing.assert_close(*drawn, rtol=0, atol=1e-4)


@mostly_sld
def test_flux_composes_with_negation(method: str) -> None:
    pipe = joint_pipelines.build("flux")
    make, _ = METHODS[method]
    options = {"true_cfg_scale": 3.0, "negative_prompt": "red", "max_sequence_length": 512}
    pictures = []

    def draw() -> None:
        pictures.append(joint_pipelines.generate(pipe, **options))

    draw()
    with fn.negate(pipe, "dog", strength=4.0):
        draw()
        with make(pipe, "dog"):
            draw()
    with make(pipe, "dog"):
        draw()
        with fn.negate(pipe, "dog", strength=4.0):
            draw()
    draw()
    plain, negated, both, edited, also, after = pictures
    assert torch.equal(plain, after) and torch.equal(both, also)
    assert len({p.numpy().tobytes() for p in (plain, negated, both, edited)}) == 4


@mostly_sld
def test_nothing_is_remembered_across_generations(method: str) -> None:
    """Neither from the one before, nor from one that failed, nor from one within it."""
    pipe = build("sd15")
    make, _ = METHODS[method]

    def draw(**options: Any) -> Tensor:
        made: Tensor = generate(pipe, PROMPTS, steps=3, height=16, width=16, **options)
        return made

    def fail(_pipe: Any, step: int, *_rest: Any) -> Any:
        if step == 1:
            raise InterruptedError
        return {}

    def another(_pipe: Any, step: int, *_rest: Any) -> Any:
        if step == 1:
            generate(pipe, "a painting", steps=3, height=16, width=16)
        return {}

    with make(pipe, "dog"):
        first = draw()
        assert torch.equal(draw(), first)
        with pytest.raises(InterruptedError):
            draw(callback_on_step_end=fail)
        assert torch.equal(draw(), first)
        scheduler = pipe.scheduler  # the same steps within the same steps
        assert torch.equal(draw(callback_on_step_end=another), first)
        assert pipe.scheduler is scheduler


@by_method
def test_without_guidance_it_raises(method: str) -> None:
    make, _ = METHODS[method]
    pipe = build("sd15")
    with make(pipe, "dog"), pytest.raises(NegationNotAppliedError, match="guidance_scale > 1"):
        generate(pipe, guidance=1.0)
    pipe = joint_pipelines.build("flux")
    with make(pipe, "dog"), pytest.raises(NegationNotAppliedError, match="true_cfg_scale > 1"):
        joint_pipelines.generate(pipe)


def test_a_warmup_that_never_ends_stops_generation() -> None:
    """As a window that holds no step does: what was asked for would not be done."""
    pipe = build("sd15")
    with fn.edits.sld(pipe, "dog", warmup=2):
        generate(pipe, steps=3, height=16, width=16)
        with pytest.raises(NegationNotAppliedError, match="sld acts from step 2 on, and 2 steps run"):
            generate(pipe, steps=2, height=16, width=16)


def test_schedulers_that_are_not_understood_are_refused() -> None:
    pipe = build("sd15")
    pipe.scheduler.register_to_config(prediction_type="flow_prediction")
    with pytest.raises(UnsupportedModelError, match="DDIMScheduler with prediction_type='flow_prediction'"):
        fn.edits.sld(pipe, "dog")


def test_a_concept_that_no_prompt_holds_is_refused() -> None:
    pipe = build("sd15")
    many = ConceptBank.from_prompts(pipe, {"many": ["a red painting of a dog in a picture"] * 12})
    with pytest.raises(ValueError, match="'many' has more members than one prompt holds"):
        fn.edits.sld(pipe, many)
