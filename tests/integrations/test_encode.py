# SPDX-License-Identifier: Apache-2.0
"""Phrases -> concepts: what the pipeline's own text encoders say, checked before they are asked."""

from __future__ import annotations

import io
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import tokenizers
import torch
from torch import Tensor

from fastnegate import ConceptBank, Rule
from fastnegate.engine.concepts import Role

pytest.importorskip("diffusers")

import diffusers
import pipelines
from pipelines import one_thread  # noqa: F401

import fastnegate as fn
from fastnegate.engine import host
from fastnegate.integrations.diffusers import contract
from fastnegate.integrations.diffusers.text import encode
from fastnegate.integrations.diffusers.text.words import Words

SOT, CONTENT, EOT, PADDING = Role
FAMILIES = ("sd15", "sdxl", "pixart_alpha")
WIDTHS = {"sd15": 32, "sdxl": 64, "pixart_alpha": 32}
close = torch.testing.assert_close


def encoded(pipe: Any, text: str) -> Tensor:
    """What the denoiser would receive for a prompt, [tokens, width]."""
    with torch.no_grad():
        return pipe.encode_prompt(
            prompt=text, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )[0][0]


def normalized(tokens: Tensor) -> Tensor:
    return torch.nn.functional.normalize(tokens, dim=-1)


def roles_of(family: str, content: int) -> list[Role]:
    if family == "pixart_alpha":  # T5: no start token, padding is masked
        return [CONTENT] * content + [EOT]
    return [SOT] + [CONTENT] * content + [EOT] + [PADDING] * (75 - content)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_have_roles(family: str) -> None:
    pipe = pipelines.build(family)
    bank = ConceptBank.from_prompts(pipe, {"one": "cat", "two": "red dog", "joined": ["cat", "red dog"]})
    assert list(bank) == ["one", "two", "joined"] and bank.pipe is pipe
    for name, prompt, members in (
        ("one", "cat", ("cat",)),
        ("two", "red dog", ("red dog",)),
        ("joined", "cat red dog", ("cat", "red dog")),  # one negative prompt
    ):
        concept = bank[name]
        roles = roles_of(family, len(prompt.split()))
        assert concept.roles.tolist() == roles and concept.members == members
        close(concept.prompt, encoded(pipe, prompt)[: len(roles)])
        assert [len(p) for p in concept.prototypes] == [len(m.split()) for m in members]
        assert concept.width == WIDTHS[family] == concept.prototypes[0].shape[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_prototypes_are_means_over_captions(family: str) -> None:
    """By hand: the member's tokens in each caption; their mean, at the mean length of a token."""
    pipe = pipelines.build(family)
    first = 0 if family == "pixart_alpha" else 1
    places = {"{}": 0, "a photo of {}": 3, "{} in it": 0, "a {} and a dog": 1}
    spans = []
    for caption, words_before in places.items():
        begin = first + words_before
        spans.append(encoded(pipe, caption.format("red cat"))[begin : begin + 2])
    mean = torch.stack(spans).mean(0)
    length = torch.stack([s.norm(dim=1) for s in spans]).mean()
    bank = ConceptBank.from_prompts(pipe, {"x": "red cat"}, templates=list(places))
    close(bank["x"].prototypes[0], normalized(mean) * length)


@pytest.mark.parametrize("family", FAMILIES)
def test_brackets_mark_a_longer_span(family: str) -> None:
    pipe = pipelines.build(family)
    first = 0 if family == "pixart_alpha" else 1
    templates = ["a photo of [a {} dog] and it"]
    (prototype,) = ConceptBank.from_prompts(pipe, {"x": "red"}, templates=templates)["x"].prototypes
    tokens = encoded(pipe, "a photo of a red dog and it")[first + 3 : first + 6]
    close(prototype, normalized(tokens) * tokens.norm(dim=1).mean())


def test_templates_may_depend_on_the_member() -> None:
    pipe = pipelines.build("sd15")
    asked = []

    def templates(member: str) -> list[str]:
        asked.append(member)
        return ["[{} dog]"] if member == "red" else ["{}"]

    bank = ConceptBank.from_prompts(pipe, {"x": ["red", "cat"], "y": "cat"}, templates=templates)
    assert asked == ["red", "cat", "cat"]
    assert [len(p) for p in bank["x"].prototypes] == [2, 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_capitals_do_not_matter(family: str) -> None:
    """Every supported pipeline lower-cases its prompts, here or in the tokenizer."""
    pipe = pipelines.build(family)
    bank = ConceptBank.from_prompts(pipe, {"small": "red cat", "large": "Red CAT"})
    small, large = bank["small"], bank["large"]
    assert torch.equal(small.roles, large.roles)
    close(small.prompt, large.prompt)
    close(small.prototypes[0], large.prototypes[0])


def test_multi_vector_tokens() -> None:
    """Textual inversion: the pipeline expands one word of the prompt to several tokens."""
    pipe = pipelines.build("sd15")
    pipe.tokenizer.add_tokens(["<x>", "<x>_1"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    concept = ConceptBank.from_prompts(pipe, {"x": "<x>"}, templates=["a {}"])["x"]
    assert concept.roles.tolist() == roles_of("sd15", 2)
    close(concept.prompt, encoded(pipe, "<x>"))
    close(normalized(concept.prototypes[0]), normalized(encoded(pipe, "a <x>")[2:4]))


def test_tokenizers_that_do_not_agree_are_refused() -> None:
    """A word learned by one of two tokenizers has its tokens at other places in the other's encoding."""
    pipe = pipelines.build("sdxl")
    pipe.tokenizer.add_tokens(["<x>", "<x>_1"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    with pytest.raises(ValueError, match=r"prompts\['y'\]: 'a <x>' has 3 and \d+ tokens: .* must agree"):
        ConceptBank.from_prompts(pipe, {"y": "a <x>"})


@pytest.mark.parametrize(
    ("prompts", "templates", "message"),
    [
        ({}, None, "must map concept names"),
        (["cat"], None, "must map concept names"),
        ({"x": []}, None, r"prompts\['x'\]"),
        ({"x": ["cat", " "]}, None, r"prompts\['x'\]"),
        ({"x": [1]}, None, r"prompts\['x'\]"),
        ({"x": None}, None, r"prompts\['x'\]=None: must be phrases"),
        ({"x": "cat", 1: "cat"}, None, "prompts has the name 1: must be a str"),
        ({"": "cat"}, None, "prompts has the name ''"),
        ({"x": "a " * 76}, None, "has 76 tokens: the encoder takes 75"),
        ({"x": "cat"}, ["a photo"], "'a photo' must contain {} exactly once"),
        ({"x": "cat"}, ["{} and {}"], "exactly once"),
        ({"x": "cat"}, ["a [photo] of {}"], "one pair of brackets"),
        ({"x": "cat"}, ["[a {}"], "one pair of brackets"),
        ({"x": "cat"}, ["[{}] [dog]"], "one pair of brackets"),
        ({"x": "cat"}, ["{}", "[a {}]"], "'cat' has .1, 2. tokens"),
        ({"x": "cat"}, lambda _: [], "'cat'"),
        ({"x": "cat"}, "a {}", "templates='a {}': must be several captions"),
        ({"x": "cat"}, [1], "1 must contain {} exactly once"),
        ({"x": "cat"}, ["{}" + " a" * 75], "has 76 tokens: the encoder takes 75"),
        ({"x": "cat"}, ["a{}"], "'cat' in 'acat' must be whole tokens"),
        ({"x": "cat", "y": ["dog", "a " * 76]}, None, r"prompts\['y'\]: 'a a .* has 76 tokens"),
        ({"x": "<|endoftext|>"}, None, r"prompts\['x'\]: .* characters or words that the tokenizer"),
    ],
)
def test_what_cannot_be_encoded_is_refused_before_anything_is(
    prompts: Any, templates: Any, message: str
) -> None:
    pipe = pipelines.build("sd15")
    with mock.patch.object(pipe.text_encoder, "forward", side_effect=AssertionError("encoded")):
        with pytest.raises(ValueError, match=message):
            ConceptBank.from_prompts(pipe, prompts, templates=templates)


def test_unknown_characters_are_refused() -> None:
    """T5 has one token for all of them, which says nothing."""
    with pytest.raises(ValueError, match=r"prompts\['x'\]: 'red ☃' has characters or words that"):
        ConceptBank.from_prompts(pipelines.build("pixart_alpha"), {"x": ["cat", "red ☃"]})


def test_phrases_of_nothing_are_refused() -> None:
    """T5's own normalizer drops characters without width."""
    pipe = pipelines.build("pixart_alpha")
    pipe.tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Replace("\u200b", "")
    with pytest.raises(ValueError, match=r"prompts\['x'\]: '\\u200b' has no tokens"):
        ConceptBank.from_prompts(pipe, {"x": "\u200b"})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: fn.negate(p, {"x": []}), r"^concepts\['x'\]=\[\]: must be phrases"),
        (lambda p: fn.negate(p, ["cat", " "]), r"^concepts\[' '\]=\[' '\]: must be phrases"),
        (lambda p: fn.negate(p, "a " * 76), r"^concepts\[.*has 76 tokens"),
    ],
)
def test_messages_name_the_argument_as_the_caller_wrote_it(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(pipelines.build("sd15"))


# Concepts of many members.


def many_members(pipe: Any) -> list[str]:
    """As many as take two prompts."""
    room = Words(pipe).room
    words = [word for word in pipelines.WORDS if word != "it"]
    return [f"{words[i % 11]} {words[i // 11 % 11]}" for i in range(room)]


@pytest.mark.parametrize("family", FAMILIES)
def test_more_members_than_one_prompt_holds(family: str) -> None:
    pipe = pipelines.build(family)
    members = many_members(pipe)
    bank = ConceptBank.from_prompts(pipe, {"many": members, "few": members[:2]}, templates=["{}"])
    assert bank["many"].prompt.shape == (0, WIDTHS[family]) and len(bank["many"].prototypes) == len(members)
    close(bank["many"].prototypes[0], bank["few"].prototypes[0])
    fn.install(pipe, bank).remove()  # `protore` reads prototypes
    with pytest.raises(ValueError, match="more members than one prompt holds, and rule 'nag' reads"):
        fn.install(pipe, bank, rule="nag")
    fn.install(pipe, ConceptBank({"few": bank["few"]}, bank.fingerprint), rule="nag").remove()


def test_members_that_just_fit_share_a_prompt() -> None:
    pipe = pipelines.build("sd15")
    members = [f"{'cat ' * 24}dog"] * 3
    assert len(ConceptBank.from_prompts(pipe, {"x": members}, templates=["{}"])["x"].prompt) == 77
    members[0] += " red"
    assert not len(ConceptBank.from_prompts(pipe, {"x": members}, templates=["{}"])["x"].prompt)


# How encoding goes about it.


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_are_encoded_once_and_in_batches(family: str) -> None:
    pipe = pipelines.build(family)
    sizes = []
    forward = pipe.text_encoder.forward

    def counted(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(input_ids))
        return forward(input_ids, *args, **kwargs)

    members = [f"{a} {b}" for a in pipelines.WORDS[:8] for b in pipelines.WORDS[:8]]
    with mock.patch.object(pipe.text_encoder, "forward", counted):
        ConceptBank.from_prompts(pipe, {"x": members, "y": members[0]}, templates=["{}", "photo {}"])
    joint = int(Words(pipe).fit(members))
    assert sum(sizes) == 2 * len(members) + joint and len(sizes) == -(
        -sum(sizes) // contract.family(pipe).at_once
    )


def test_a_concept_does_not_depend_on_the_others() -> None:
    pipe = pipelines.build("sd15")
    members = [f"{a} {b}" for a in pipelines.WORDS for b in pipelines.WORDS[:3]]
    together = ConceptBank.from_prompts(pipe, {m: m for m in members})
    for name in members[::7]:
        alone = ConceptBank.from_prompts(pipe, {name: name})[name]
        close(alone.prompt, together[name].prompt)
        close(alone.prototypes[0], together[name].prototypes[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_encoding_leaves_no_trace(family: str) -> None:
    """Neither in the caller's random numbers, nor in the pipeline, nor in gradient or inference mode."""
    pipe = pipelines.build(family)
    pipe.text_encoder.train()
    for module in pipe.text_encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = module.dropout = 0.5
    state = {name: value for name, value in vars(pipe).items()}
    before = torch.get_rng_state()
    with torch.inference_mode():
        first = ConceptBank.from_prompts(pipe, {"x": "cat"})
    second = ConceptBank.from_prompts(pipe, {"x": "cat"})
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first["x"].prompt, second["x"].prompt)
    assert all(module.training for module in pipe.text_encoder.modules())
    assert vars(pipe) == state
    for tensor in (first["x"].prompt, *first["x"].prototypes):
        assert not tensor.is_inference() and not tensor.requires_grad


def test_a_bar_appears_where_it_takes_long() -> None:
    pipe = pipelines.build("sd15")

    def shown(delay: float) -> str:
        made = encode.tqdm
        with mock.patch.object(sys, "stderr", io.StringIO()) as stderr:
            with mock.patch.object(
                encode, "tqdm", lambda **given: made(**{**given, "delay": delay, "mininterval": 0})
            ):
                ConceptBank.from_prompts(pipe, {"x": "cat"})
        return stderr.getvalue()

    pipe.set_progress_bar_config()
    assert "encoding concepts" in shown(delay=1e-9)
    assert shown(delay=600.0) == ""
    with mock.patch.object(encode, "tqdm") as bar:
        ConceptBank.from_prompts(pipe, {"x": "cat"})
    assert bar.call_args.kwargs["delay"] == 2 and bar.call_args.kwargs["leave"] is False
    pipe.set_progress_bar_config(disable=True)
    assert shown(delay=1e-9) == ""


# Default captions.


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """What the log said so far about captions."""
    with caplog.at_level(logging.INFO, logger="fastnegate"):
        yield lambda: [message for message in caplog.messages if message.startswith("captions")]


def test_default_captions_that_the_tokenizer_refuses_are_left_out(told: Callable[[], list[str]]) -> None:
    """As a word-level tokenizer does that knows no trees and no pictures."""
    pipe = pipelines.build("sd15")
    tokenize = type(pipe.tokenizer).__call__

    def picky(self: Any, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(text, str) and {"tree", "picture"} & {*text.split()}:
            raise ValueError(f"{text!r} has an unknown word")
        return tokenize(self, text, *args, **kwargs)

    taken = ["{}", "a photo of {}", "a painting of {}"]
    expected = ConceptBank.from_prompts(pipe, {"x": "cat"}, templates=taken)["x"]
    assert not told()
    with mock.patch.object(type(pipe.tokenizer), "__call__", picky):
        bank = ConceptBank.from_prompts(pipe, {"x": "cat", "y": ["dog", "red"]})
        with pytest.raises(ValueError, match=r"prompts\['x'\]: 'a tree' has an unknown word"):
            ConceptBank.from_prompts(pipe, {"x": "a tree"})
    close(bank["x"].prototypes[0], expected.prototypes[0])
    (line,) = told()
    assert line.endswith("left out: a picture with {} in it, {} and a tree")


def test_default_captions_that_would_be_too_long_are_left_out(told: Callable[[], list[str]]) -> None:
    pipe = pipelines.build("sd15")
    long = "cat " * 74 + "dog"
    bank = ConceptBank.from_prompts(pipe, {"x": long})
    tokens = encoded(pipe, long)[1:76]
    close(bank["x"].prototypes[0], normalized(tokens) * tokens.norm(dim=1).mean())
    assert len(told()) == 1


def test_a_tokenizer_may_offer_captions_of_its_own() -> None:
    pipe = pipelines.build("sd15")
    pipe.tokenizer.concept_templates = lambda m: ["a [{} dog]", "[{} dog] in it"] if m == "red" else []
    bank = ConceptBank.from_prompts(pipe, {"red": "red", "cat": "cat"})
    expected = ConceptBank.from_prompts(pipe, {"red": "red"}, templates=["a [{} dog]", "[{} dog] in it"])
    close(bank["red"].prototypes[0], expected["red"].prototypes[0])
    close(
        bank["cat"].prototypes[0],
        ConceptBank.from_prompts(pipelines.build("sd15"), {"cat": "cat"})["cat"].prototypes[0],
    )


def test_the_embedded_model_negates_a_word_of_its_own() -> None:
    """Without templates, which ordinary captions would not even be words of: red goes, the rest stays."""
    assert fn.__getattr__("testbed") is fn.testbed  # without an import of its own
    pipe = fn.testbed.load()
    prompt = "a tomato and a blue square"

    def draw() -> Any:
        generator = [torch.Generator().manual_seed(seed) for seed in range(4)]
        return pipe(
            [prompt] * 4, num_inference_steps=12, guidance_scale=3.0, generator=generator, output_type="np"
        ).images

    def red(images: Any) -> int:
        return sum(fn.testbed.shows(fn.testbed.detect(image, fn.testbed.LOOSE), "red") for image in images)

    with fn.negate(pipe, "red"):
        negated = draw()
    objects = fn.testbed.objects_in(prompt)
    assert red(draw()) == 4 and red(negated) == 0
    assert sum(fn.testbed.kept(fn.testbed.detect(i, fn.testbed.STRICT), objects, "red") for i in negated) >= 3
    fn.negate(pipe, "medkit").remove()  # captions of the model's own are offered for its concepts only
    with pytest.raises(ValueError, match=r"concepts\['cat'\]: .* unknown word 'cat'"):
        fn.negate(pipe, "cat")


# Negative prompts.


@pytest.mark.parametrize("family", FAMILIES)
def test_a_negative_prompt_is_encoded_as_the_pipeline_does(family: str) -> None:
    pipe = pipelines.build(family)
    text = "Red cat, a dog ,, photo"
    concept = host.of(pipe).negative_prompt(pipe, text)
    with torch.no_grad():
        options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
        made = pipe.encode_prompt("a photo", negative_prompt=text, **options)
    negative, kept = (made[2], made[3][0].bool()) if family == "pixart_alpha" else (made[1], slice(None))
    close(concept.prompt, negative[0][kept])
    tokens = Words(pipe).count(text)
    assert concept.roles.tolist() == roles_of(family, tokens) and tokens > 4  # commas are tokens, too
    assert concept.members == ("Red cat", "a dog", "photo")
    bank = ConceptBank.from_prompts(pipe, {"x": ["red cat", "a dog", "photo"]})
    for ours, theirs in zip(concept.prototypes, bank["x"].prototypes):
        close(ours, theirs)
    for preset in ("protore", "nag", "vsf", "eiup"):
        assert concept.groups(Rule.preset(preset))


def test_a_negative_prompt_is_deterministic() -> None:
    pipe = pipelines.build("sdxl")
    first, second = (encode.negative_prompt(pipe, "red cat, dog") for _ in range(2))
    assert torch.equal(first.prompt, second.prompt)
    assert all(map(torch.equal, first.prototypes, second.prototypes))


@pytest.mark.parametrize("family", FAMILIES)
def test_threads_encode_beside_each_other_and_the_pipeline(family: str) -> None:
    """A tokenizer keeps the padding that its last caller asked for, whoever that was."""
    pipe = pipelines.build(family)
    texts = ["red cat", "dog, a photo of it", "cat, dog, red, painting"]
    expected = [encode.negative_prompt(pipe, text) for text in texts]
    wrong: list[str] = []

    def ask() -> None:
        for text, concept in zip(texts * 6, expected * 6):
            try:
                found = encode.negative_prompt(pipe, text)
            except ValueError as error:
                wrong.append(str(error))
                continue
            if not (torch.equal(found.prompt, concept.prompt) and torch.equal(found.roles, concept.roles)):
                wrong.append(text)

    def tokenize() -> None:
        while any(thread.is_alive() for thread in threads[:3]):
            lengths = {
                len(ids) for ids in pipe.tokenizer(texts, padding="max_length", max_length=40).input_ids
            }
            if lengths != {40}:
                wrong.append(f"the pipeline's own texts have {lengths} tokens")

    threads = [threading.Thread(target=ask) for _ in range(3)] + [threading.Thread(target=tokenize)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("text", [None, 7, ["cat"], "", " \n", " , ,", "cat, " * 40, "<|endoftext|>"])
def test_bad_negative_prompts(text: Any) -> None:
    with pytest.raises(ValueError, match=r"^negative_prompt[=:]"):
        encode.negative_prompt(pipelines.build("sd15"), text)


@pytest.mark.parametrize("name", ["text_encoder", "tokenizer_2"])
def test_without_an_encoder_nothing_is_encoded(name: str) -> None:
    pipe = pipelines.build("sdxl")
    setattr(pipe, name, None)
    for call in (
        lambda: ConceptBank.from_prompts(pipe, {"x": "cat"}),
        lambda: encode.negative_prompt(pipe, "cat"),
    ):
        with pytest.raises(fn.UnsupportedModelError, match=f"pipe.{name} is None, so .*before freeing it"):
            call()


def test_unsupported_pipelines_are_refused() -> None:
    flux = pipelines.build("flux")
    parts = {name: getattr(flux, name) for name in ("transformer", "vae", "text_encoder", "tokenizer")}
    parts |= {name: getattr(flux, name) for name in ("text_encoder_2", "tokenizer_2", "scheduler")}
    because = r"FluxControlPipeline is not supported \(not tested: a picture joins the channels"
    with pytest.raises(fn.UnsupportedModelError, match=because):
        ConceptBank.from_prompts(diffusers.FluxControlPipeline(**parts), {"x": "cat"})
