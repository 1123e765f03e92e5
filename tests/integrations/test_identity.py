# SPDX-License-Identifier: Apache-2.0
"""Whose words a bank holds, also when the text encoder is away by the time it is asked."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastnegate as fn
from fastnegate import BankMismatchError, ConceptBank, UnsupportedModelError

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")

import accelerate
import pipelines
from pipelines import one_thread  # noqa: F401

from fastnegate.integrations.diffusers.text.identity import fingerprint

CPU = torch.device("cpu")


def encoders(pipe: Any) -> list[str]:
    return [name for name in ("text_encoder", "text_encoder_2") if hasattr(pipe, name)]


def free(pipe: Any) -> None:
    for name in encoders(pipe):
        setattr(pipe, name, None)


def free_tokenizers(pipe: Any) -> None:
    free(pipe)
    for name in ("tokenizer", "tokenizer_2"):
        if hasattr(pipe, name):
            setattr(pipe, name, None)


def offload(pipe: Any) -> None:
    for name in encoders(pipe):
        accelerate.cpu_offload(getattr(pipe, name), CPU)


def offload_sequentially(pipe: Any) -> None:
    pipe.enable_sequential_cpu_offload(device="cpu")


def offload_models(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def compile_encoders(pipe: Any) -> None:
    for name in encoders(pipe):
        setattr(pipe, name, torch.compile(getattr(pipe, name), backend="eager"))


AWAY = (free, free_tokenizers, offload, offload_sequentially)
every_way = pytest.mark.parametrize("take_away", [*AWAY, offload_models, compile_encoders])


def bank_of(pipe: Any) -> ConceptBank:
    return ConceptBank.from_prompts(pipe, {"dog": "dog", "cat": "cat"}, templates=["{}"])


@pytest.mark.parametrize("family", ["sd15", "sdxl", "pixart_alpha"])
@every_way
def test_a_bank_stays_good_when_its_encoder_is_away(
    family: str, take_away: Callable[[Any], None], tmp_path: Path
) -> None:
    pipe = pipelines.build(family)
    bank = bank_of(pipe)
    bank.save(tmp_path / "bank")
    take_away(pipe)
    bank.check(pipe)
    again = ConceptBank.load(tmp_path / "bank", pipe)
    again.check(pipe)
    fn.install(pipe, again).remove()
    for other in (pipelines.build(family, seed=1), pipelines.build("sd2" if family == "sd15" else "sd15")):
        with pytest.raises(BankMismatchError, match="another text encoder"):
            again.check(other)


def test_offloaded_encoders_encode() -> None:
    pipe = pipelines.build("sd15")
    before = bank_of(pipe)
    offload_models(pipe)
    after = bank_of(pipe)
    assert torch.equal(before["dog"].prompt, after["dog"].prompt)
    assert torch.equal(before["cat"].prototypes[0], after["cat"].prototypes[0])


def test_a_picture_without_its_encoder() -> None:
    """Freed, with the prompt's embeddings at hand: the usual way to save memory."""
    pipe = pipelines.build("sd15")
    with torch.no_grad():
        embeddings, negative = pipe.encode_prompt(
            "a dog", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )
    bank = bank_of(pipe)
    given = {"prompt_embeds": embeddings, "negative_prompt_embeds": negative, "negative_prompt": None}

    def draw() -> torch.Tensor:
        return pipe(
            **given, num_inference_steps=2, height=32, width=32, output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip

    with fn.negate(pipe, bank):
        expected = draw()
    free(pipe)
    with fn.negate(pipe, bank):
        assert torch.equal(draw(), expected)
    assert not torch.equal(draw(), expected)


@pytest.mark.parametrize("take_away", AWAY)
def test_encoders_that_were_never_seen_are_refused(take_away: Callable[[Any], None], tmp_path: Path) -> None:
    bank = bank_of(pipelines.build("sd15"))
    bank.save(tmp_path / "bank")
    pipe = pipelines.build("sd15")  # the same encoder, in fact; nobody can tell
    take_away(pipe)
    before = "freeing" if take_away in (free, free_tokenizers) else "enabling offload"
    for ask in (
        bank.check,
        lambda p: ConceptBank.load(tmp_path / "bank", p),
        lambda p: fn.install(p, bank),
        bank_of,
    ):
        with pytest.raises(UnsupportedModelError, match=f"make or load the bank before {before}"):
            ask(pipe)


@pytest.mark.parametrize("take_away", [None, offload])
def test_another_encoder_in_its_place_is_refused(take_away: Callable[[Any], None] | None) -> None:
    pipe, other = pipelines.build("sd15"), pipelines.build("sd15", seed=1)
    bank = bank_of(pipe)
    pipe.text_encoder = other.text_encoder
    if take_away is not None:
        take_away(pipe)
        with pytest.raises(UnsupportedModelError, match="offloaded"):  # never seen, whatever stood there
            bank.check(pipe)
        return
    with pytest.raises(BankMismatchError, match="the weights differ"):
        bank.check(pipe)
    pipe.text_encoder = None  # what counts is the encoder that was seen last
    with pytest.raises(BankMismatchError, match="the weights differ"):
        bank.check(pipe)


def test_another_vocabulary_is_refused_without_the_encoder() -> None:
    pipe = pipelines.build("sd15")
    bank = bank_of(pipe)
    free(pipe)
    pipe.tokenizer.add_tokens(["zebra"])
    with pytest.raises(BankMismatchError, match="tokenizer is"):
        bank.check(pipe)


def test_weights_that_are_there_are_looked_at_again() -> None:
    pipe = pipelines.build("sd15")
    bank = bank_of(pipe)
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight.mul_(2)
    with pytest.raises(BankMismatchError, match="the weights differ"):
        bank.check(pipe)


def test_an_encoder_that_grew_before_it_was_offloaded_is_refused() -> None:
    """Adapters and learned words change what it says; what was seen of it before says nothing then."""
    pipe = pipelines.build("sd15")
    bank = bank_of(pipe)
    pipe.text_encoder.resize_token_embeddings(1001)
    offload(pipe)
    with pytest.raises(UnsupportedModelError, match="offloaded"):
        bank.check(pipe)


def test_pipelines_that_share_an_offloaded_encoder_share_what_was_seen() -> None:
    pipe = pipelines.build("sd15")
    bank = bank_of(pipe)
    offload(pipe)
    bank.check(type(pipe)(**pipe.components, requires_safety_checker=False))


def test_copies_of_a_pipeline_answer_for_themselves() -> None:
    pipe = pipelines.build("sd15")
    bank = bank_of(pipe)
    twin = copy.deepcopy(pipe)
    bank.check(twin)
    with torch.no_grad():
        twin.text_encoder.get_input_embeddings().weight.mul_(2)
    with pytest.raises(BankMismatchError):
        bank.check(twin)
    bank.check(pipe)
    free(pipe)
    with pytest.raises(UnsupportedModelError, match="before freeing"):  # a copy was never seen itself
        bank.check(copy.deepcopy(pipe))


def test_looking_keeps_nothing_alive_and_adds_nothing_to_the_pipeline() -> None:
    pipe = pipelines.build("sdxl")
    before = {**vars(pipe)}, {**vars(pipe.text_encoder)}
    fingerprint(pipe)
    assert ({**vars(pipe)}, {**vars(pipe.text_encoder)}) == before
    gone = [weakref.ref(pipe.text_encoder), weakref.ref(pipe)]
    pipe = before = None
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
