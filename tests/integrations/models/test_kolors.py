# SPDX-License-Identifier: Apache-2.0
"""Kolors: padding comes before a text, and all of its tokens are attended to."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastnegate import Policy
from fastnegate.engine.concepts import Role
from fastnegate.engine.prototypes import prototype

pytest.importorskip("diffusers")
pytest.importorskip("sentencepiece", reason="Kolors' tokenizer needs it")

import cross_pipelines
from cross_pipelines import images, literal, load_adapters
from pipelines import generate, one_thread  # noqa: F401

import fastnegate as fn

PROMPTS = ["a cat", "a photo of a dog", "red"]
NEGATIVES = ["red dog", None, "a painting"]  # one for each
POLICIES = [None if text is None else Policy(negative_prompt=text) for text in NEGATIVES]
KINDS = ["KolorsPipeline", "KolorsImg2ImgPipeline"]


def options_of(kind: str) -> dict[str, Any]:
    if kind == "KolorsPipeline":
        return {}
    return {"image": torch.linspace(0, 1, 3 * 3 * 32 * 32).view(3, 3, 32, 32), "strength": 1.0}


@pytest.mark.parametrize("adapters", [(), (0,)], ids=["text", "and images"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_with_other_negative_prompts(kind: str, adapters: tuple[int, ...]) -> None:
    """As the reference operator says; without a live entry the pipeline is untouched, to the bit."""
    pipe, call = cross_pipelines.kolors(kind), options_of(kind)
    if adapters:
        load_adapters(pipe, *adapters)
        call["ip_adapter_image_embeds"] = images(*adapters)
    untouched = generate(pipe, PROMPTS, **call)
    bank = fn.ConceptBank.from_prompts(pipe, {"dog": "dog"})
    engine = fn.install(pipe, bank, rule="nag")
    assert engine.rule == fn.Rule.preset("nag", family="sdxl")
    assert torch.equal(generate(pipe, PROMPTS, **call), untouched)
    with engine.batch(POLICIES):
        actual = generate(pipe, PROMPTS, **call)
    engine.remove()
    with literal(pipe, NEGATIVES, engine.rule):
        wanted = generate(pipe, PROMPTS, **call)
    assert float((actual - wanted).abs().max() / wanted.abs().max()) <= 5e-6
    changed = [float((a - b).abs().max() / b.abs().max()) > 1e-3 for a, b in zip(actual, untouched)]
    assert changed == [text is not None for text in NEGATIVES]


def test_words_of_a_concept_are_found() -> None:
    pipe = cross_pipelines.kolors()
    bank = fn.ConceptBank.from_prompts(pipe, {"it": "red dog"}, templates=["a photo of a {} and a cat"])
    whole = pipe.encode_prompt("red dog", do_classifier_free_guidance=False)[0][0]
    words = len(pipe.tokenizer.tokenize("red dog"))
    assert torch.equal(bank["it"].prompt, whole)
    padding = [Role.PADDING] * (256 - 2 - words)
    assert bank["it"].roles.tolist() == [*padding, Role.SOT, Role.SOT, *[Role.CONTENT] * words]
    caption = pipe.encode_prompt("a photo of a red dog and a cat", do_classifier_free_guidance=False)[0][0]
    after = len(pipe.tokenizer.tokenize("and a cat"))
    expected = prototype([caption[256 - after - words : 256 - after]])
    torch.testing.assert_close(bank["it"].prototypes[0], expected)


@pytest.mark.parametrize("adapters", [(), (0,)], ids=["text", "and images"])
def test_processors_by_hand(adapters: tuple[int, ...]) -> None:
    """They find the projection of text by its name, which an IP-Adapter changes."""
    pipe, call = cross_pipelines.kolors(), dict[str, Any]()
    if adapters:
        load_adapters(pipe, *adapters)
        call["ip_adapter_image_embeds"] = images(*adapters)
    bank = fn.ConceptBank.from_prompts(pipe, {"dog": "dog"})
    with fn.negate(pipe, bank, "nag"):
        expected = generate(pipe, PROMPTS[:1], **call)
    before = dict(pipe.unet.attn_processors)
    pipe.unet.set_attn_processor(
        {
            name: fn.NegationAttnProcessor(bank, "nag", inner=p) if name.endswith("attn2.processor") else p
            for name, p in before.items()
        }
    )
    torch.testing.assert_close(generate(pipe, PROMPTS[:1], **call), expected)
    pipe.unet.set_attn_processor(before)
    assert not torch.equal(generate(pipe, PROMPTS[:1], **call), expected)
