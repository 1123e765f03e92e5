# SPDX-License-Identifier: Apache-2.0
"""`Concept` and `ConceptBank`: what the text encoder said, which tokens a rule reads, and files."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastnegate import BankMismatchError, Concept, ConceptBank, Rule
from fastnegate.engine.concepts import Fingerprint, Role

pytest.importorskip("diffusers")

import pipelines
from pipelines import one_thread  # noqa: F401

import fastnegate as fn

SOT, CONTENT, EOT, PADDING = Role
FAMILIES = ("sd15", "sdxl", "pixart_alpha")
WIDTHS = {"sd15": 32, "sdxl": 64, "pixart_alpha": 32}


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


# Encoding.


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
        assert torch.equal(concept.prompt, encoded(pipe, prompt)[: len(roles)])
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
    torch.testing.assert_close(bank["x"].prototypes[0], normalized(mean) * length)


@pytest.mark.parametrize("family", FAMILIES)
def test_brackets_mark_a_longer_span(family: str) -> None:
    pipe = pipelines.build(family)
    first = 0 if family == "pixart_alpha" else 1
    templates = ["a photo of [a {} dog] and it"]
    (prototype,) = ConceptBank.from_prompts(pipe, {"x": "red"}, templates=templates)["x"].prototypes
    tokens = encoded(pipe, "a photo of a red dog and it")[first + 3 : first + 6]
    torch.testing.assert_close(prototype, normalized(tokens) * tokens.norm(dim=1).mean())


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
    assert torch.equal(small.prompt, large.prompt) and torch.equal(small.roles, large.roles)
    assert torch.equal(small.prototypes[0], large.prototypes[0])


def test_multi_vector_tokens() -> None:
    """Textual inversion: the pipeline expands one word of the prompt to several tokens."""
    pipe = pipelines.build("sd15")
    pipe.tokenizer.add_tokens(["<x>", "<x>_1"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    concept = ConceptBank.from_prompts(pipe, {"x": "<x>"}, templates=["a {}"])["x"]
    assert concept.roles.tolist() == roles_of("sd15", 2)
    assert torch.equal(concept.prompt, encoded(pipe, "<x>"))
    torch.testing.assert_close(normalized(concept.prototypes[0]), normalized(encoded(pipe, "a <x>")[2:4]))


@pytest.mark.parametrize(
    ("prompts", "templates", "message"),
    [
        ({}, None, "must map concept names"),
        (["cat"], None, "must map concept names"),
        ({"x": []}, None, r"prompts\['x'\]"),
        ({"x": ["cat", " "]}, None, r"prompts\['x'\]"),
        ({"x": [1]}, None, r"prompts\['x'\]"),
        ({"x": "a " * 76}, None, "has 76 tokens: the encoder takes 75"),
        ({"x": "cat"}, ["a photo"], "'a photo' must contain {} exactly once"),
        ({"x": "cat"}, ["{} and {}"], "exactly once"),
        ({"x": "cat"}, ["a [photo] of {}"], "one pair of brackets"),
        ({"x": "cat"}, ["[a {}"], "one pair of brackets"),
        ({"x": "cat"}, ["[{}] [dog]"], "one pair of brackets"),
        ({"x": "cat"}, ["{}", "[a {}]"], "'cat' has .1, 2. tokens"),
        ({"x": "cat"}, lambda _: [], "'cat'"),
    ],
)
def test_bad_prompts_and_templates(prompts: Any, templates: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConceptBank.from_prompts(pipelines.build("sd15"), prompts, templates=templates)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_unsupported_pipelines_are_refused(kind: str) -> None:
    with pytest.raises(fn.UnsupportedModelError, match=r"(StableDiffusion3|Flux)Pipeline is not supported"):
        ConceptBank.from_prompts(pipelines.build(kind), {"x": "cat"})


# What a rule reads.


def make_concept() -> Concept:
    roles = torch.tensor([SOT, CONTENT, CONTENT, EOT, PADDING], dtype=torch.int8)
    return Concept(torch.arange(10.0).view(5, 2), roles, (torch.ones(1, 2), torch.zeros(3, 2)), ("p", "q"))


@pytest.mark.parametrize(
    ("preset", "tokens", "weights"),
    [
        ("nag", [[0, 1, 2, 3, 4]], [None]),
        ("nasa", [[0, 1, 2, 3, 4]], [None]),
        ("ong", [[0, 1, 2, 3, 4]], [None]),
        ("vsf", [[1, 2]], [None]),
        ("eiup", [[0, 1, 2, 3, 4]], [[0, 1, 1, 0, 0]]),
    ],
)
def test_groups_of_prompt_tokens(preset: str, tokens: list, weights: list) -> None:
    concept = make_concept()
    groups = concept.groups(Rule.preset(preset))
    assert [g.embeddings.tolist() for g in groups] == [concept.prompt[t].tolist() for t in tokens]
    assert [None if g.weight is None else g.weight.tolist() for g in groups] == weights


@pytest.mark.parametrize("preset", ["protore", "protore_retrieve"])
def test_each_prototype_is_a_group(preset: str) -> None:
    concept = make_concept()
    groups = concept.groups(Rule.preset(preset))
    assert [g.embeddings for g in groups] == list(concept.prototypes)
    assert [g.weight for g in groups] == [None, None]


def test_a_concept_without_the_tokens_of_a_rule_is_refused() -> None:
    full = make_concept()
    with pytest.raises(ValueError, match="'casteer' reads a steering direction"):
        full.groups(Rule.preset("casteer"))
    with pytest.raises(ValueError, match="no prototype tokens for rule 'protore'"):
        Concept(full.prompt, full.roles, ()).groups(Rule.preset("protore"))
    empty = Concept(full.prompt, torch.full_like(full.roles, PADDING), full.prototypes)
    for preset in ("vsf", "eiup"):
        with pytest.raises(ValueError, match=f"for rule '{preset}'"):
            empty.groups(Rule.preset(preset))
    assert empty.groups(Rule.preset("nag"))
    with pytest.raises(ValueError, match="no full tokens"):
        Concept(full.prompt[:0], full.roles[:0], full.prototypes).groups(Rule.preset("nag"))


NAN, INF = float("nan"), float("inf")
ROLES = torch.tensor([CONTENT, EOT], dtype=torch.int8)


@pytest.mark.parametrize(
    ("prompt", "roles", "prototypes", "message"),
    [
        (torch.ones(2), ROLES, (), "prompt has shape"),
        (torch.ones(3, 2), ROLES, (), "roles"),
        (torch.ones(2, 2), ROLES, (torch.ones(1, 3),), r"prototypes\[0\].*2"),
        (torch.ones(2, 2), ROLES, (torch.ones(1, 2), torch.ones(0, 2)), r"prototypes\[1\]"),
        (torch.tensor([[1.0, NAN], [0, 0]]), ROLES, (), "prompt holds nan"),
        (torch.ones(2, 2), ROLES, (torch.tensor([[INF, 0]]),), r"prototypes\[0\] holds nan or inf"),
    ],
)
def test_bad_concepts(prompt: Tensor, roles: Tensor, prototypes: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Concept(prompt, roles, prototypes)


# The bank.


def make_bank(**concepts: Concept) -> ConceptBank:
    return ConceptBank(concepts, Fingerprint({}, torch.zeros(1)))


def test_raw_embeddings_are_prototypes_and_content() -> None:
    bank = make_bank()
    one, two = torch.randn(2, 4, dtype=torch.float16, requires_grad=True), torch.randn(1, 4)
    bank.update("x", one)
    bank.update("y", [one, two])
    assert bank["x"].prompt.dtype == torch.float32 and not bank["x"].prompt.requires_grad
    assert torch.equal(bank["y"].prompt, torch.cat([one.detach().float(), two]))
    assert bank["y"].roles.tolist() == [CONTENT] * 3
    assert [len(p) for p in bank["y"].prototypes] == [2, 1]
    for preset in ("protore", "eiup", "vsf", "nag"):
        assert sum(len(g.embeddings) for g in bank["y"].groups(Rule.preset(preset))) == 3


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (torch.full((1, 4), NAN), "nan"),
        (torch.ones(1, 5), "width 5.*4"),
        (torch.ones(4), "shape"),
        ([], "empty"),
        (torch.ones(0, 4), "must be"),
    ],
)
def test_bad_updates_change_nothing(embeddings: Any, message: str) -> None:
    bank = make_bank(x=Concept.from_embeddings(torch.ones(2, 4)))
    before, version = bank["x"], bank.version
    for name in ("x", "y"):
        with pytest.raises(ValueError, match=message):
            bank.update(name, embeddings)
    assert list(bank) == ["x"] and bank["x"] is before and bank.version == version


def test_bank_is_a_named_collection() -> None:
    bank = make_bank(x=make_concept(), y=make_concept())
    assert len(bank) == 2 and "x" in bank and "z" not in bank
    with pytest.raises(ValueError, match="concept 'z': the bank has x, y"):
        bank["z"]
    version = bank.version
    bank.remove("x")
    assert list(bank) == ["y"] and bank.version > version
    with pytest.raises(ValueError, match="concept 'x': the bank has y"):
        bank.remove("x")


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))], ids=["copy", "pickle"]
)
def test_copies_of_a_bank_forget_the_pipeline(copied: Any) -> None:
    pipe = pipelines.build("sd15")
    bank = ConceptBank.from_prompts(pipe, {"x": "cat"})
    again = copied(bank)
    assert again.pipe is None and torch.equal(again["x"].prompt, bank["x"].prompt)
    again.check(pipe)


# Files.


def same(a: ConceptBank, b: ConceptBank) -> bool:
    return list(a) == list(b) and all(
        a[n].members == b[n].members
        and all(map(torch.equal, (a[n].prompt, a[n].roles), (b[n].prompt, b[n].roles)))
        and all(map(torch.equal, a[n].prototypes, b[n].prototypes))
        for n in a
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_files_are_reproducible(family: str, tmp_path: Path) -> None:
    pipe = pipelines.build(family)
    prompts = {"b": ["red", "cat"], "a": "dog", "ä b/c": "a photo"}
    bank = ConceptBank.from_prompts(pipe, prompts)
    bank.update("raw", torch.randn(2, WIDTHS[family]))
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    bank.save(files[0])
    bank.save(str(files[1]))
    loaded = ConceptBank.load(files[0], pipe)
    loaded.save(files[2])
    assert same(loaded, bank) and loaded.pipe is pipe
    assert len({f.read_bytes() for f in files}) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_encoder_in_half_precision_is_the_same(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    pipe = pipelines.build(family)
    bank = ConceptBank.from_prompts(pipe, {"x": "cat"})
    bank.save(tmp_path / "bank")
    half = pipelines.build(family).to(dtype)
    assert same(ConceptBank.load(tmp_path / "bank", half), bank)
    bank.check(half)


@pytest.mark.parametrize("other", ["weights", "one weight of the second", "vocabulary", "family"])
def test_banks_of_another_encoder_are_refused(other: str, tmp_path: Path) -> None:
    ConceptBank.from_prompts(pipelines.build("sdxl"), {"x": "cat"}).save(tmp_path / "bank")
    pipe = pipelines.build("sd15" if other == "family" else "sdxl", seed=int(other == "weights"))
    if other == "one weight of the second":
        with torch.no_grad():
            pipe.text_encoder_2.text_projection.weight += 0.01
    if other == "vocabulary":
        pipe.tokenizer.add_tokens(["zebra"])
    with pytest.raises(BankMismatchError, match="another text encoder: "):
        ConceptBank.load(tmp_path / "bank", pipe)
    bank = ConceptBank.from_prompts(pipelines.build("sdxl"), {"x": "cat"})
    for refuse in (bank.check, lambda p: fn.install(p, bank), lambda p: fn.negate(p, bank)):
        with pytest.raises(BankMismatchError, match="another text encoder: "):
            refuse(pipe)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pickles_are_refused_unread(tmp_path: Path) -> None:
    pipe, harmed = pipelines.build("sd15"), tmp_path / "harmed"
    bomb = Bomb(harmed)
    (tmp_path / "plain.safetensors").write_bytes(pickle.dumps(bomb))
    torch.save({"x": bomb}, tmp_path / "torch.safetensors")
    for file in tmp_path.glob("*.safetensors"):
        with pytest.raises(ValueError, match="is not a concept bank"):
            ConceptBank.load(file, pipe)
    assert not harmed.exists()
    pickle.loads(pickle.dumps(bomb))
    assert harmed.exists()  # it would have gone off


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no header", "not a concept bank"),
        ("not json", "not a concept bank"),
        ("cut", "not a concept bank"),
        ("format", "format 99: this version reads 1"),
        ("tensor", "not a concept bank"),
        ("nan", "nan"),
    ],
)
def test_damaged_files_are_refused(damage: str, message: str, tmp_path: Path) -> None:
    pipe, file = pipelines.build("sd15"), tmp_path / "bank"
    bank = ConceptBank.from_prompts(pipe, {"x": "cat"})
    bank.save(file)
    tensors = load_file(file)
    header = {"format": 1, "encoder": dict(bank.fingerprint.facts), "concepts": []}
    header["concepts"] = [{"name": "x", "members": ["cat"], "prototypes": 1}]
    save_file(tensors, file, {"fastnegate": json.dumps(header)})
    assert same(ConceptBank.load(file, pipe), bank)
    if damage == "format":
        header["format"] = 99
    if damage == "tensor":
        del tensors["0.roles"]
    if damage == "nan":
        tensors["0.prompt"][0, 0] = NAN
    text = "{" if damage == "not json" else json.dumps(header)
    save_file(tensors, file, None if damage == "no header" else {"fastnegate": text})
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=message):
        ConceptBank.load(file, pipe)


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ConceptBank.load(tmp_path / "none", pipelines.build("sd15"))
