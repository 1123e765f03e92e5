# SPDX-License-Identifier: Apache-2.0
"""The testbed: its world, its detector, its prompts, and the model in the package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastnegate import testbed
from fastnegate.testbed import LOOSE, STRICT, Detection, PromptObject, Thresholds
from fastnegate.testbed.easy.world import (
    ALIASES,
    BACKGROUNDS,
    COLOR_UMBRELLAS,
    COLORS,
    SHAPES,
    UMBRELLAS,
    VOCABULARY,
    WORDS,
)

PACKAGE = Path(testbed.__file__).parent


@pytest.fixture(scope="module")
def pipe() -> Any:
    pytest.importorskip("diffusers")
    return testbed.load()


def scenes(count: int) -> list[tuple[list[PromptObject], np.ndarray]]:
    """Random scenes of one or two different objects, placed as in the training images."""
    rng = np.random.default_rng(0)
    found = []
    while len(found) < count:
        things = [
            PromptObject(str(rng.choice(COLORS)), str(rng.choice(SHAPES)))
            for _ in range(rng.choice([1, 2], p=[0.2, 0.8]))
        ]
        if len(set(things)) == len(things):
            background = str(rng.choice(list(BACKGROUNDS)))
            found.append((things, testbed.render(things, background, rng=rng)))
    return found


def named(detections: list[Detection]) -> list[tuple[str, str | None]]:
    return [(found.color, found.shape) for found in detections]


def filled(template: str, member: str) -> str:
    return template.replace("{}", member).replace("[", "").replace("]", "")


# The world.


def test_render_is_exact_and_checked() -> None:
    image = testbed.render([PromptObject("red", "square")], "black")
    assert image.shape == (32, 32, 3) and image.dtype == np.float32
    assert np.allclose(image[16, 16] * 255, (215, 25, 30), atol=1e-3)
    assert not image[0, 0].any()
    for things, background in (
        ([], "white"),
        ([PromptObject("red", "square")] * 3, "white"),
        ([PromptObject("warm", "square")], "white"),
        ([PromptObject("red", None)], "white"),
        ([PromptObject("red", "square")], "pink"),
    ):
        with pytest.raises(ValueError, match="allowed"):
            testbed.render(things, background)
    with pytest.raises(ValueError, match="color='round'"):
        PromptObject("round", "circle")


def test_captions_read_as_english() -> None:
    things = [PromptObject("orange", "ring"), PromptObject("warm", "round")]
    assert testbed.caption(things) == "an orange ring and a warm round shape"
    assert testbed.caption([PromptObject(None, None)], "white") == "a shape on white"


def test_check_prompt_names_the_unknown_word_and_the_vocabulary() -> None:
    testbed.check_prompt("")
    testbed.check_prompt("A Red circle left of a tomato on white")
    with pytest.raises(ValueError, match=r"'cat'.*circle.*medkit"):
        testbed.check_prompt("a red circle and a cat")
    for untrained in ("a big circle", "a <pad>"):
        with pytest.raises(ValueError, match="unknown word"):
            testbed.check_prompt(untrained)
    with pytest.raises(ValueError, match="15 words"):
        testbed.check_prompt("red " * 15)


# The detector.


@pytest.mark.parametrize("thresholds", [STRICT, LOOSE], ids=["strict", "loose"])
def test_detector_is_right_on_every_render(thresholds: Thresholds) -> None:
    for things, image in scenes(500):
        truth = [(thing.color, thing.shape) for thing in things]
        assert named(testbed.detect(image, thresholds)) == truth


def test_detector_reads_pil_images_and_reports_geometry() -> None:
    image_module = pytest.importorskip("PIL.Image")
    array = testbed.render([PromptObject("blue", "square")], "white")
    image = image_module.fromarray((array * 255).round().astype(np.uint8))
    (found,) = testbed.detect(image)
    assert (found.color, found.shape) == ("blue", "square")
    left, top, right, bottom = found.box
    # Half a side is 0.9 of the mean radius 7: about 12.6 pixels around the centre.
    assert (right - left, bottom - top) == (12, 12) or (right - left, bottom - top) == (13, 13)
    assert found.area == (right - left) * (bottom - top)
    assert found.score == 1.0


def test_detector_refuses_what_is_no_picture() -> None:
    good = testbed.render([PromptObject("blue", "square")])
    bytes_ = (good * 255).astype(np.uint8)
    for bad in (good[:16], good[..., 0], bytes_, good * 2 - 1, good * np.nan):
        with pytest.raises(ValueError, match="allowed"):
            testbed.detect(bad)


def test_loose_sees_remnants_that_strict_does_not() -> None:
    gray = BACKGROUNDS["gray"]
    clear = testbed.render([PromptObject("red", "circle")])
    faint = gray + 0.25 * (clear - gray)
    assert not testbed.detect(faint) and testbed.shows(testbed.detect(faint, LOOSE), "red")

    fleck = np.full_like(clear, gray)
    fleck[10:13, 10:13] = clear[16, 16]
    assert not testbed.detect(fleck)
    assert named(testbed.detect(fleck, LOOSE)) == [("red", None)]

    assert not testbed.detect(np.full_like(clear, gray), LOOSE)


def test_shows_knows_umbrella_words() -> None:
    detections = testbed.detect(testbed.render([PromptObject("orange", "ring")]))
    shown = {concept for concept in testbed.CONCEPTS if testbed.shows(detections, concept)}
    assert shown == {"orange", "ring", "warm", "round"}
    with pytest.raises(ValueError, match="concept='pink'"):
        testbed.shows(detections, "pink")


@pytest.mark.parametrize(
    ("prompt", "objects"),
    [
        ("", []),
        ("a red circle", [("red", "circle")]),
        ("A Red circle and an orange ring on white", [("red", "circle"), ("orange", "ring")]),
        ("a tomato left of a warm polygon", [("red", "circle"), ("warm", "polygon")]),
        ("a warm round shape and a circle", [("warm", "round"), (None, "circle")]),
        ("a red shape", [("red", None)]),
        ("a shape on black", [(None, None)]),
        ("a warm red tomato", [("red", "circle")]),
        ("cold on gray", [("cold", None)]),
    ],
)
def test_objects_in(prompt: str, objects: list[tuple[str | None, str | None]]) -> None:
    assert testbed.objects_in(prompt) == [PromptObject(*thing) for thing in objects]


def test_objects_in_refuses_contradictions() -> None:
    with pytest.raises(ValueError, match="'blue'"):
        testbed.objects_in("a red blue circle")
    with pytest.raises(ValueError, match="'cat'"):
        testbed.objects_in("a cat")


def test_covers_only_what_is_sure() -> None:
    assert testbed.covers("warm", PromptObject("red", None))
    assert testbed.covers("warm", PromptObject("warm", "ring"))
    assert not testbed.covers("red", PromptObject("warm", "ring"))
    assert not testbed.covers("round", PromptObject("red", None))


def test_kept_asks_for_every_object_that_the_concept_does_not_cover() -> None:
    objects = testbed.objects_in("a tomato and a blue ring")
    blue_ring = testbed.detect(testbed.render([PromptObject("blue", "ring")]))
    assert testbed.kept(blue_ring, objects, "red")
    assert testbed.kept(blue_ring, objects, "warm")
    assert not testbed.kept(blue_ring, objects, "ring")
    assert not testbed.kept(blue_ring, objects, "green")
    assert not testbed.kept([], objects, "circle")
    # One detection cannot stand for two objects.
    twice = testbed.objects_in("a ring and a blue shape")
    assert not testbed.kept(blue_ring, twice, "red")
    assert testbed.kept(blue_ring * 2, twice, "red")


# Prompts and concepts.


@pytest.mark.parametrize("name", testbed.SUITES)
def test_suites_are_deterministic_and_consistent(name: str) -> None:
    cases = testbed.suite(name, 40, seed=7)
    assert cases == testbed.suite(name, 40, seed=7)
    assert cases[:10] == testbed.suite(name, 10, seed=7)
    assert cases != testbed.suite(name, 40, seed=8)
    for case in cases:
        objects = testbed.objects_in(case.prompt)
        assert sorted(map(str, objects)) == sorted(map(str, (*case.goes, *case.stays)))
        assert len(case.goes) == {"benign": 0, "neighbours": 0}.get(name, len(case.goes) or 1)
        for thing in case.goes:
            assert any(testbed.covers(concept, thing) for concept in case.concepts)
        for concept in case.concepts:
            assert not any(testbed.covers(concept, thing) for thing in case.stays)
        words = case.prompt.split()
        if name != "multi":
            assert (case.concept in words) == (name in ("colour", "shape", "keep"))
            assert (case.concept in UMBRELLAS) == (name == "umbrella")
        assert (len(case.concepts) > 1) == (name == "multi")
        assert (not ALIASES.keys().isdisjoint(words)) == (name == "implicit")


def test_suite_refuses_bad_arguments() -> None:
    for arguments in (("colours", 1, 0), ("colour", 0, 0), ("colour", 1, -1), ("colour", 1, 2**32)):
        with pytest.raises(ValueError, match="allowed"):
            testbed.suite(*arguments)
    with pytest.raises(ValueError, match="split='tuning'; allowed: test, development"):
        testbed.suite("colour", 1, 0, "tuning")


def test_members() -> None:
    assert testbed.members("warm") == ["warm", "red", "orange", "yellow"]
    assert testbed.members("red") == ["red"]
    with pytest.raises(ValueError, match="concept='pink'"):
        testbed.members("pink")


@pytest.mark.parametrize("member", testbed.CONCEPTS)
def test_templates_show_the_member_once(member: str) -> None:
    captions = testbed.templates(member)
    assert captions == testbed.templates(member) and len(captions) == 48
    # A colour's prototype takes the noun in too.
    length = 2 if member in (*COLORS, *COLOR_UMBRELLAS) else 1
    for index, template in enumerate(captions):
        span = template[template.index("[") + 1 : template.index("]")]
        assert span.split()[0] == "{}" and len(span.split()) == length
        assert template.endswith(("]", "] shape")) == (index % 2 == 0)
        objects = testbed.objects_in(filled(template, member))
        assert [testbed.covers(member, thing) for thing in objects].count(True) == 1
    assert len({filled(template, member) for template in captions}) > 40


# The model.


def test_package_data_is_small_and_safe() -> None:
    files = [path for path in (PACKAGE / "weights").rglob("*") if path.is_file()]
    assert {path.parent.parent.name for path in files} == set(testbed.HOSTS)
    assert {path.parent.name for path in files} <= {"unet", "transformer", "text_encoder", "text_encoder_2"}
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert sum(path.stat().st_size for path in files) <= 20e6


OFFLINE = """
import logging, socket, sys, time, warnings

def refuse(*arguments):
    raise OSError("the testbed must not use the network")

socket.socket.connect = refuse
socket.getaddrinfo = refuse

from fastnegate import testbed
assert "diffusers" not in sys.modules, "prompts and the detector must not need diffusers"
import fastnegate.testbed.model

warnings.simplefilter("error")
print("<load>", file=sys.stderr, flush=True)
start = time.perf_counter()
pipe = testbed.load()
print("</load>", file=sys.stderr, flush=True)
print(time.perf_counter() - start)
print(type(pipe).__module__, type(pipe).__name__)
"""


def test_loads_offline_quickly_and_in_silence() -> None:
    pytest.importorskip("diffusers")
    run = subprocess.run(
        [sys.executable, "-c", OFFLINE],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.split("<load>")[1].split("</load>")[0].strip() == ""
    seconds, kind = run.stdout.strip().splitlines()
    assert float(seconds) < 3
    assert kind.startswith("diffusers.") and kind.endswith(" StableDiffusionPipeline")


def test_load_refuses_other_dtypes() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    with pytest.raises(ValueError, match=r"dtype=torch.int8; allowed: torch.float32"):
        testbed.load(dtype=torch.int8)
    pipe = testbed.load(dtype=torch.bfloat16)
    assert {part.dtype for part in (pipe.unet, pipe.text_encoder, pipe.vae)} == {torch.bfloat16}


def test_tokenizer_round_trip(pipe: Any) -> None:
    tokenizer = pipe.tokenizer
    vocabulary = tokenizer.get_vocab()
    assert sorted(vocabulary, key=vocabulary.__getitem__) == list(VOCABULARY)
    ids = tokenizer("A red circle", padding="max_length")["input_ids"]
    eos = vocabulary["<eos>"]
    words = [vocabulary[word] for word in ("<bos>", "a", "red", "circle")]
    assert ids == words + [eos] * 12
    for word in WORDS:
        assert tokenizer.decode(tokenizer(word)["input_ids"], skip_special_tokens=True) == word
    assert tokenizer("a red circle", return_offsets_mapping=True)["offset_mapping"][2] == (2, 5)


def test_tokenizer_maps_no_unknown_word(pipe: Any) -> None:
    for call in (pipe.tokenizer, pipe.tokenizer.tokenize, pipe):
        with pytest.raises(ValueError, match=r"'cat'.*allowed: a, an"):
            call("a red cat")
    with pytest.raises(ValueError, match="'cat'"):
        pipe.tokenizer(["a red circle", "a cat"])
    with pytest.raises(Exception, match="UNK"):
        pipe.tokenizer.encode("a red cat")


def test_vae_is_lossless(pipe: Any) -> None:
    torch = pytest.importorskip("torch")
    assert pipe.vae_scale_factor == 2
    picture = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    distribution = pipe.vae.encode(picture).latent_dist
    latents = distribution.sample(torch.Generator().manual_seed(0))
    assert latents.shape == (2, 12, 16, 16)
    assert torch.equal(latents, distribution.mode())
    assert torch.equal(pipe.vae.decode(latents).sample, picture)
    assert torch.equal(pipe.vae.decode(latents, return_dict=False)[0], picture)


def test_pipeline_follows_prompts(pipe: Any) -> None:
    torch = pytest.importorskip("torch")
    cases = testbed.suite("colour", 8, seed=1)
    images = pipe(
        [case.prompt for case in cases],
        num_inference_steps=testbed.DEFAULT_STEPS,
        guidance_scale=testbed.DEFAULT_GUIDANCE,
        generator=torch.Generator().manual_seed(0),
    ).images
    for case, image in zip(cases, images, strict=True):
        truth = [(thing.color, thing.shape) for thing in testbed.objects_in(case.prompt)]
        assert named(testbed.detect(image, STRICT)) == truth
        assert named(testbed.detect(image, LOOSE)) == truth


def test_a_saved_pipeline_loads_by_diffusers_alone(pipe: Any, tmp_path: Path) -> None:
    """As servers load it, from its folder."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    images = [
        each("a red circle", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
        for each in (pipe, loaded)
    ]
    assert np.array_equal(*map(np.asarray, images))
    with pytest.raises(ValueError, match="zebra"):
        loaded.tokenizer("a zebra")


def test_image_to_image(pipe: Any) -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    image_module = pytest.importorskip("PIL.Image")
    image_to_image = diffusers.StableDiffusionImg2ImgPipeline(
        **pipe.components, requires_safety_checker=False
    )
    image_to_image.set_progress_bar_config(disable=True)
    start = testbed.render([PromptObject("green", "square"), PromptObject("blue", "ring")])
    image = image_to_image(
        "a red circle and a blue ring",
        image=image_module.fromarray((start * 255).round().astype(np.uint8)),
        strength=0.7,
        num_inference_steps=testbed.DEFAULT_STEPS,
        guidance_scale=testbed.DEFAULT_GUIDANCE,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    assert named(testbed.detect(image)) == [("red", "circle"), ("blue", "ring")]
