# SPDX-License-Identifier: Apache-2.0
"""Inversion: the loss is the model's own, the model stays what it was, and runs can be interrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastnegate as fn
from fastnegate import Concept, UnsupportedModelError, invert, phrases_shown
from fastnegate.engine import host

pytest.importorskip("diffusers")

import diffusers
import joint_pipelines
import pipelines
import transformers
from PIL import Image
from pipelines import generate, one_thread  # noqa: F401

# Pipeline, what builds it, and the size of its pictures.
HOSTS: dict[str, tuple[Callable[[str], Any], tuple[int, int]]] = {
    "sd15": (pipelines.build, (32, 32)),
    "sd2": (pipelines.build, (32, 32)),  # predicts v
    "sdxl": (pipelines.build, (32, 32)),
    "flux": (joint_pipelines.build, (24, 16)),
    "sd3": (joint_pipelines.build, (24, 16)),
}
on_all = pytest.mark.parametrize(
    "kind",
    [kind if kind in ("sd15", "flux") else pytest.param(kind, marks=pytest.mark.full) for kind in HOSTS],
)


def built(kind: str) -> tuple[Any, dict[str, Any]]:
    build, size = HOSTS[kind]
    return build(kind), {"size": size}


def pictures(count: int = 3) -> list[Image.Image]:
    numbers = np.random.default_rng(0).integers(0, 256, (count, 24, 24, 3), dtype=np.uint8)
    return [Image.fromarray(one) for one in numbers]


def weights(pipe: Any) -> dict[str, Tensor]:
    model = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


@on_all
def test_it_learns_and_the_denoiser_stays(kind: str) -> None:
    pipe, options = built(kind)
    model = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
    before, asked = weights(pipe), [weight.requires_grad for weight in model.parameters()]
    denoising = host.of(pipe).denoising(pipe)
    latents = denoising.latents(pictures(), options["size"])
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(3, *latents.shape[1:], generator=generator)
    when = torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64)

    def loss(concept: Concept) -> float:
        with torch.no_grad():
            text = concept.prompt.to(latents).expand(3, -1, -1)
            return float(denoising.loss(latents, noise.to(latents), when, text))

    begun = invert(pipe, pictures(), tokens=2, steps=1, rate=1e-9, **options)
    learned = invert(pipe, pictures(), tokens=2, steps=15, rate=0.1, batch=2, **options)
    assert loss(learned) < loss(begun)
    assert learned.prototypes[0].shape == (2, denoising.width) == learned.prompt.shape
    assert all(torch.equal(weight, before[name]) for name, weight in weights(pipe).items())
    assert all(weight.grad is None for weight in model.parameters())
    assert [weight.requires_grad for weight in model.parameters()] == asked


@on_all
def test_an_interrupted_run_ends_in_the_same_bits(kind: str, tmp_path: Path) -> None:
    pipe, options = built(kind)
    options |= {"tokens": 2, "batch": 2, "rate": 0.05, "caption": "a photo of {} cat", "seed": 5}
    whole: list[float] = []
    unbroken = invert(pipe, pictures(), steps=5, on_step=whole.append, **options)
    file, parts = tmp_path / "run", []

    def stop(loss: float) -> None:
        parts.append(loss)
        if len(parts) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        invert(pipe, pictures(), steps=5, checkpoint=file, every=3, on_step=stop, **options)
    torch.manual_seed(99)  # what the process draws besides does not matter
    resumed = invert(pipe, pictures(), steps=5, checkpoint=file, every=3, on_step=parts.append, **options)
    assert torch.equal(resumed.prompt, unbroken.prompt) and parts == whole
    again = invert(pipe, pictures(), steps=5, checkpoint=file, on_step=parts.append, **options)
    assert torch.equal(again.prompt, unbroken.prompt) and len(parts) == 5  # nothing is left to do
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("says", ["epsilon", "sample", "v_prediction"])
def test_the_loss_is_the_one_of_its_prediction(says: str) -> None:
    pipe = pipelines.build("sd15")
    pipe.scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000, prediction_type=says)
    denoising = host.of(pipe).denoising(pipe)
    clean = denoising.latents(pictures(), (32, 32))
    expected = pipe.vae.encode(pipe.image_processor.preprocess(pictures(), 32, 32)).latent_dist.mode()
    torch.testing.assert_close(clean, expected * pipe.vae.config.scaling_factor)
    noise, text = torch.randn_like(clean), torch.randn(3, 4, 32)
    times = torch.tensor([10, 500, 999])
    z = pipe.scheduler.add_noise(clean, noise, times)
    velocity = pipe.scheduler.get_velocity(clean, noise, times)
    target = {"epsilon": noise, "sample": clean, "v_prediction": velocity}[says]
    with torch.no_grad():
        expected = (pipe.unet(z, times, encoder_hidden_states=text).sample - target).square().mean()
        found = denoising.loss(clean, noise, times.double() / 1000 + 5e-4, text)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_loss_of_flow_matching(shift: float) -> None:
    pipe = joint_pipelines.build("flux")
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    denoising = host.of(pipe).denoising(pipe)
    clean = denoising.latents(pictures(), (24, 16))
    noise, text = torch.randn_like(clean), torch.randn(3, 4, 32)
    when = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    sigma = (shift * when / (1 + (shift - 1) * when)).float()
    z = (1 - sigma.view(-1, 1, 1, 1)) * clean + sigma.view(-1, 1, 1, 1) * noise
    _, pooled, _ = pipe.encode_prompt("", None)
    height, width = clean.shape[2:]
    with torch.no_grad():
        said = pipe.transformer(
            hidden_states=pipe._pack_latents(z, *z.shape), timestep=sigma, encoder_hidden_states=text,
            pooled_projections=pooled.expand(3, -1), txt_ids=torch.zeros(4, 3),
            img_ids=pipe._prepare_latent_image_ids(3, height // 2, width // 2, "cpu", torch.float32),
        ).sample  # fmt: skip
        expected = (said - pipe._pack_latents(noise - clean, *z.shape)).square().mean()
        found = denoising.loss(clean, noise, when, text)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_a_caption_is_encoded_around_the_tokens() -> None:
    pipe = pipelines.build("sd15")
    before, after = host.of(pipe).denoising(pipe).around("a photo of {} cat")
    embeddings, _ = pipe.encode_prompt("a photo of cat", "cpu", 1, False)
    assert torch.equal(torch.cat([before, after]), embeddings[0])
    assert len(before) == 4  # the beginning of a text, "a", "photo", "of"
    assert [len(part) for part in host.of(pipe).denoising(pipe).around(None)] == [0, 0]


@pytest.mark.parametrize("kind", ["sd15", "flux"])
def test_what_was_learned_is_negated(kind: str) -> None:
    """By each preset that reads tokens."""
    pipe, options = built(kind)
    concept = invert(pipe, pictures(), tokens=2, steps=2, **options)
    bank = fn.ConceptBank({"x": concept}, host.of(pipe).fingerprint(pipe), pipe)
    made = generate if kind == "sd15" else joint_pipelines.generate
    plain = made(pipe)
    for preset in (
        ("nag", "vsf", "nasa") if kind == "flux" else ("protore", "eiup", "nag", "vsf", "nasa", "ong")
    ):
        rule = fn.Rule.preset(preset, **({"threshold": -0.9} if preset == "protore" else {}))
        with fn.negate(pipe, bank, rule):
            assert not torch.equal(made(pipe), plain), preset


BAD: list[tuple[dict[str, Any], str]] = [
    ({"tokens": 0}, "tokens=0: must be a whole number >= 1"),
    ({"tokens": 9}, "tokens=9: must be at most 8"),
    ({"steps": 1.5}, "steps=1.5"),
    ({"batch": 0}, "batch=0"),
    ({"every": 0}, "every=0"),
    ({"rate": 0.0}, "rate=0.0: must be a finite number above 0"),
    ({"rate": float("inf")}, "rate=inf"),
    ({"images": []}, "images is empty"),
    ({"size": (33, 32)}, r"size=\(33, 32\): must be multiples of 2"),
    ({"caption": "a cat"}, "caption='a cat': must contain {} exactly once"),
    ({"caption": "a " * 100 + "{}"}, "caption: .*tokens: the encoder takes"),
    ({"start": torch.ones(2, 32)}, r"start has shape \[2, 32\]: must be \[1, 32\]"),
    ({"start": torch.full((1, 32), torch.nan)}, "all of it finite"),
]


@pytest.mark.parametrize(("given", "message"), BAD, ids=[message[:20] for _, message in BAD])
def test_bad_arguments_are_refused_before_a_step(given: dict[str, Any], message: str) -> None:
    steps: list[float] = []
    with pytest.raises(ValueError, match=message):
        invert(
            pipelines.build("sd15"),
            **{"images": pictures(1), "size": (32, 32), "on_step": steps.append, **given},
        )
    assert steps == []


def test_other_pipelines_schedules_and_engines_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="WanPipeline: its training loss is not known here"):
        invert(pipelines.build("wan"), pictures(1))
    pipe = pipelines.build("sd15")
    bank = fn.ConceptBank.from_prompts(pipe, {"red": "red"})
    with fn.negate(pipe, bank), pytest.raises(ValueError, match="pipe has an engine"):
        invert(pipe, pictures(1))
    pipe.scheduler = diffusers.EDMEulerScheduler(prediction_type="epsilon")
    with pytest.raises(UnsupportedModelError, match="EDMEulerScheduler with prediction_type='epsilon'"):
        invert(pipe, pictures(1))


def test_checkpoints_of_other_runs_are_refused(tmp_path: Path) -> None:
    pipe, file = pipelines.build("sd15"), tmp_path / "run"
    given: dict[str, Any] = {"size": (32, 32), "steps": 1, "checkpoint": file}
    invert(pipe, pictures(), **given)
    for other, name in (({"rate": 0.1}, "rate"), ({"seed": 1}, "seed"), ({"caption": "a {}"}, "caption")):
        with pytest.raises(ValueError, match=f"is of another run: {name} was"):
            invert(pipe, pictures(), **{**given, **other})
    with pytest.raises(ValueError, match="is of another run: pictures was"):
        invert(pipe, pictures(2), **given)
    with pytest.raises(ValueError, match="is of another run: denoiser was"):
        invert(pipelines.build("sd15", seed=1), pictures(), **given)
    file.write_bytes(b"no such thing")
    with pytest.raises(ValueError, match="is not one of an inversion"):
        invert(pipe, pictures(), **given)


def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    pipe = pipelines.build("sd15")
    start = torch.full((1, 32), 1e38)
    with pytest.raises(RuntimeError, match="the loss of step 0 is"):
        invert(pipe, pictures(1), size=(32, 32), start=start)


def with_tower(width: int = 32) -> Any:
    """SDXL with an image tower, as IP-Adapters bring one."""
    pipe = pipelines.build("sdxl")
    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8,
        patch_size=4, projection_dim=width,
    )  # fmt: skip
    torch.manual_seed(0)
    tower = transformers.CLIPVisionModelWithProjection(config).eval()
    sizes = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    preparing = transformers.CLIPImageProcessor(**sizes)
    pipe.register_modules(image_encoder=tower, feature_extractor=preparing)
    return pipe


def test_pictures_choose_phrases_by_the_towers_cosines() -> None:
    pipe, phrases = with_tower(), ["red", "a cat", "a photo of a dog", "painting"]
    pixels = pipe.feature_extractor(pictures(), return_tensors="pt").pixel_values
    seen = pipe.image_encoder(pixels).image_embeds
    ids = pipe.tokenizer_2(phrases, padding="max_length", max_length=77, return_tensors="pt").input_ids
    told = pipe.text_encoder_2(ids).text_embeds
    cosines = torch.nn.functional.cosine_similarity(seen[:, None], told[None], dim=-1)
    shares = (100 * cosines).softmax(1).mean(0)
    found = phrases_shown(pipe, pictures(), phrases)
    assert found == pytest.approx({p: float(s) for p, s in zip(phrases, shares) if s > 0.25}, rel=1e-4)
    assert [*found.values()] == sorted(found.values(), reverse=True) and found


def test_without_towers_of_one_space_there_is_inversion() -> None:
    for pipe in (pipelines.build("sdxl"), pipelines.build("sd15"), with_tower(24)):
        with pytest.raises(UnsupportedModelError, match=r"has no image_encoder.*fastnegate\.invert"):
            phrases_shown(pipe, pictures(), ["red", "cat"])
    for images, phrases, message in (
        ([], ["red", "cat"], "images is empty"),
        (pictures(), ["red"], "phrases="),
        (pictures(), ["red", "red"], "phrases="),
        (pictures(), "red", "phrases='red'"),
        (pictures(), ["red", "a " * 100], "phrases: .*the encoder takes"),
    ):
        with pytest.raises(ValueError, match=message):
            phrases_shown(with_tower(), images, phrases)


@pytest.mark.full
def test_pictures_of_red_things_teach_what_red_is() -> None:
    """On the trained model: tokens that were learned from 64 pictures take red out of prompts that say it."""
    from fastnegate import testbed
    from fastnegate.testbed.quality import _judge
    from fastnegate.testbed.world import BACKGROUNDS, SHAPES

    rng = np.random.default_rng(0)
    images = []
    for _ in range(64):
        thing = testbed.PromptObject("red", str(rng.choice(SHAPES)))
        pixels = testbed.render([thing], str(rng.choice([*BACKGROUNDS])), rng=rng)
        images.append(Image.fromarray((pixels * 255).round().astype(np.uint8)))
    pipe = testbed.load()
    concept = invert(pipe, images, steps=400, rate=0.02, batch=8)
    bank = fn.ConceptBank({"red": concept}, host.of(pipe).fingerprint(pipe), pipe)
    shares = {}
    for name in ("colour", "benign"):
        cases = [case for case in testbed.suite(name, 400, 1) if case.concept == "red"][:32]
        generators = [torch.Generator().manual_seed(7 + i) for i in range(len(cases))]
        with fn.negate(pipe, bank):
            made = pipe(
                [case.prompt for case in cases], num_inference_steps=testbed.DEFAULT_STEPS, output_type="np",
                guidance_scale=testbed.DEFAULT_GUIDANCE, generator=generators,
            ).images  # fmt: skip
        shares[name] = np.mean([_judge(image, case, name) for image, case in zip(made, cases)], 0)
    gone, kept, _ = shares["colour"]
    assert gone >= 0.9 and kept >= 0.8 and shares["benign"][2] >= 0.9
