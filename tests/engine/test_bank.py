# SPDX-License-Identifier: Apache-2.0
"""`ConceptBank`: a named collection that threads share, and its files."""

from __future__ import annotations

import copy
import json
import pickle
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastnegate import BankMismatchError, Concept, ConceptBank, Rule
from fastnegate.engine.concepts import Fingerprint, Role

pytest.importorskip("diffusers")

import pipelines
from pipelines import one_thread  # noqa: F401

import fastnegate as fn

CONTENT, EOT = Role.CONTENT, Role.EOT
FAMILIES = ("sd15", "sdxl", "pixart_alpha")
WIDTHS = {"sd15": 32, "sdxl": 64, "pixart_alpha": 32}
NAN = float("nan")


def make_concept() -> Concept:
    roles = torch.tensor([CONTENT, CONTENT, EOT], dtype=torch.int8)
    return Concept(torch.arange(6.0).view(3, 2), roles, (torch.ones(1, 2), torch.zeros(3, 2)), ("p", "q"))


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


def test_names_are_texts() -> None:
    bank = make_bank()
    for name in ("", 1, None):
        with pytest.raises(ValueError, match=f"name={name!r}: must be a str"):
            bank.update(name, torch.ones(1, 2))  # type: ignore[arg-type]
    assert not len(bank) and bank.version == 0


def test_a_snapshot_never_changes() -> None:
    bank = make_bank(x=make_concept(), y=make_concept())
    version, concepts = bank.version, bank.snapshot().concepts
    assert bank.snapshot() is bank.snapshot()
    bank.remove("x")
    bank.update("z", make_concept())
    assert list(concepts) == ["x", "y"] and list(bank.snapshot().concepts) == ["y", "z"]
    assert bank.version == bank.snapshot().version == version + 2
    with pytest.raises(TypeError):
        concepts["w"] = make_concept()  # type: ignore[index]


def test_threads_read_whole_banks_while_others_change_them() -> None:
    """Writer k adds and removes its own concept; a reader sees, for equal versions, equal concepts, and may
    iterate all along."""
    bank = make_bank(x=make_concept())
    seen: dict[int, tuple[str, ...]] = {}
    wrong: list[str] = []
    rounds, writers = 300, 3

    def write(name: str) -> None:
        for _ in range(rounds):
            bank.update(name, make_concept())
            bank.remove(name)

    def read() -> None:
        while any(thread.is_alive() for thread in threads[:writers]):
            now = bank.snapshot()
            version, names = now.version, tuple(now.concepts)
            if seen.setdefault(version, names) != names:
                wrong.append(f"version {version}: {seen[version]} and {names}")
            try:
                [name for name in bank]
            except RuntimeError as error:
                wrong.append(str(error))

    threads = [threading.Thread(target=write, args=(f"w{i}",)) for i in range(writers)]
    threads += [threading.Thread(target=read) for _ in range(2)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong and list(bank) == ["x"]
    assert bank.version == 1 + 2 * rounds * writers  # no change was lost


def test_banks_say_what_they_hold() -> None:
    bank = make_bank(x=make_concept(), y=Concept.from_embeddings(torch.ones(1, 2), ["cat"]))
    assert repr(bank) == "ConceptBank(2 concepts: x (2 members), y (1 member); width 2)"
    assert repr(make_bank()) == "ConceptBank(0 concepts; width 0)"
    assert repr(make_bank(**{c: make_concept() for c in "abcdefgh"})).endswith(
        "d (2 members), 4 more; width 2)"
    )
    assert repr(Fingerprint({"text_encoder": "T5", "sampled": 8}, torch.zeros(8))) == (
        "Fingerprint(text_encoder=T5, sampled=8)"
    )


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))], ids=["copy", "pickle"]
)
def test_copies_of_a_bank_forget_the_pipeline(copied: Any) -> None:
    pipe = pipelines.build("sd15")
    bank = ConceptBank.from_prompts(pipe, {"x": "cat"})
    again = copied(bank)
    assert again.pipe is None and torch.equal(again["x"].prompt, bank["x"].prompt)
    assert again.version == bank.version and repr(again) == repr(bank)
    again.check(pipe)
    again.remove("x")
    assert list(bank) == ["x"]


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
    many = ["red cat in a painting with a dog"] * 40  # more than one prompt holds
    prompts = {"b": ["red", "cat"], "a": "dog", "ä b/c": "a photo", "many": many}
    bank = ConceptBank.from_prompts(pipe, prompts)
    bank.update("raw", torch.randn(2, WIDTHS[family]))
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    bank.save(files[0])
    bank.save(str(files[1]))
    loaded = ConceptBank.load(files[0], pipe)
    assert loaded.digest == bank.digest
    loaded.save(files[2])
    assert same(loaded, bank) and loaded.pipe is pipe
    assert len({f.read_bytes() for f in files}) == 1
    assert not len(loaded["many"].prompt) and len(loaded["many"].prototypes) == 40


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
        ("facts", "encoder is a list"),
        ("dtype", "fingerprint is torch.float64: must be torch.float32"),
        ("twice", "two concepts have the same name"),
        ("members", "members of 'x' is 'cat': must be a list of phrases"),
        ("roles", "must be int8, of"),
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
    if damage == "facts":
        header["encoder"] = []
    if damage == "dtype":
        tensors["fingerprint"] = tensors["fingerprint"].double()
    if damage == "twice":
        header["concepts"] *= 2
        tensors |= {"1" + name[1:]: value.clone() for name, value in tensors.items() if name[0] == "0"}
    if damage == "members":
        header["concepts"][0]["members"] = "cat"
    if damage == "roles":
        tensors["0.roles"][0] = 9
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
