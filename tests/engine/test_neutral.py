# SPDX-License-Identifier: Apache-2.0
"""Neutral tokens: what a bank makes of them, and which rows read them, in cross-attention and as riders."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

pytest.importorskip("diffusers")

import joint_pipelines
import pipelines
from pipelines import one_thread  # noqa: F401

import fastnegate as fn
from fastnegate import ConceptBank, Policy, Rule
from fastnegate.engine.concepts import Fingerprint, Role
from fastnegate.integrations.diffusers import processor
from fastnegate.integrations.diffusers.joint import attention
from fastnegate.integrations.diffusers.text.encode import with_roles

CENTRED = Rule.preset("protore", center="neutral", threshold=0.0)
RAW = Rule(shared="outside", center="neutral", strength=2.0, tokens="prototype", name="raw")
CONCEPTS = {"dog": ["dog", "a red dog"], "cat": "cat"}


def close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() < 1e-4 * other.abs().max())


def bank_of(pipe: Any, neutral: Any = "empty") -> ConceptBank:
    return ConceptBank.from_prompts(pipe, CONCEPTS, templates=["{}"], neutral=neutral)


# ---- the bank ---------------------------------------------------------------------------------------


def test_kinds_of_neutral_tokens() -> None:
    pipe = pipelines.build("sd15")
    embeddings, roles = with_roles(pipe, "")
    assert roles.tolist() == [Role.SOT, Role.EOT] + [Role.PADDING] * (len(roles) - 2)
    assert torch.equal(bank_of(pipe, "empty").neutral, embeddings[1:2])
    assert torch.equal(bank_of(pipe, "padding").neutral, embeddings[2:].mean(0, keepdim=True))
    bank = bank_of(pipe, ["dog", "a red dog"])
    assert torch.equal(bank.neutral, torch.cat(bank["dog"].prototypes).mean(0, keepdim=True))
    of_common_words = bank_of(pipe, "mean").neutral
    assert of_common_words.shape == (1, 32) and not torch.equal(of_common_words, bank.neutral)
    given = torch.randn(3, 32, dtype=torch.float16, requires_grad=True)
    own = bank_of(pipe, given).neutral
    assert torch.equal(own, given.detach().float()) and not own.requires_grad
    assert bank_of(pipe, None).neutral is None
    version, bank.neutral = bank.version, None
    assert bank.neutral is None and bank.version == version + 1 and len(bank) == len(CONCEPTS)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("pixart_alpha", (1, None)), ("sana", (None, None)), ("qwen", (12, None)), ("sd3", (2, 1))],
)
def test_kinds_that_an_encoder_does_not_have(kind: str, sizes: tuple[int | None, int | None]) -> None:
    module = joint_pipelines if kind in joint_pipelines.JOINT else pipelines
    pipe = module.build(kind)
    for neutral, size in zip(("empty", "padding"), sizes):
        if size is None:
            with pytest.raises(ValueError, match=f"neutral='{neutral}': the text encoder has no such tokens"):
                bank_of(pipe, neutral)
        else:
            assert len(bank_of(pipe, neutral).neutral) == size


@pytest.mark.parametrize(
    ("neutral", "said"),
    [
        ("middle", "neutral='middle': must be empty, padding, mean, a list of phrases"),
        ([], "neutral={}"),
        (["dog", ""], "neutral"),
        (["dog " * 99], r"neutral\['dog dog .* tokens: the encoder takes"),
        (torch.ones(1, 31), r"width 32: this bank has 31|neutral has shape \[1, 31\]"),
        (torch.full((1, 32), torch.nan), "nan"),
        (torch.ones(0, 32), r"T > 0|prototypes\[0\] has shape \[0, 32\]"),
    ],
)
def test_neutral_tokens_that_are_none(neutral: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        bank_of(pipelines.build("sd15"), neutral)


def test_a_bank_keeps_them(tmp_path: Path) -> None:
    pipe = pipelines.build("sd15")
    bank, path = bank_of(pipe), tmp_path / "bank.safetensors"
    bank.save(path)
    loaded = ConceptBank.load(path, pipe)
    for same in (loaded, copy.deepcopy(bank), pickle.loads(pickle.dumps(bank))):
        assert torch.equal(same.neutral, bank.neutral) and list(same) == ["dog", "cat"]
    again = tmp_path / "again.safetensors"
    loaded.save(again)
    assert path.read_bytes() == again.read_bytes()
    without = bank_of(pipe, None)
    without.save(path)
    assert ConceptBank.load(path, pipe).neutral is None


def test_they_are_set_like_a_concept() -> None:
    bank = ConceptBank({}, Fingerprint({}, torch.zeros(1)))
    bank.neutral = tokens = torch.ones(2, 8)
    before = bank.snapshot()
    tokens.zero_()  # the caller's own
    assert bank.width == 8 and torch.equal(bank.neutral, torch.ones(2, 8))
    with pytest.raises(ValueError, match=r"neutral has shape \[1, 9\]: must be \[T, 8\]"):
        bank.neutral = torch.ones(1, 9)
    bank.update("x", torch.ones(1, 8))
    assert bank.snapshot().neutral is before.neutral and bank.version == before.version + 1
    bank.neutral = torch.zeros(1, 8)
    assert bank.version == before.version + 2 and torch.equal(before.neutral, torch.ones(2, 8))


# ---- refusals ---------------------------------------------------------------------------------------


def test_a_rule_that_centres_wants_a_bank_with_neutral_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipelines.build("sd15")
    bank, said = (
        bank_of(pipe, None),
        r"rule 'protore\[center=neutral\]' .*from_prompts\(..., neutral='empty'\)",
    )
    monkeypatch.setattr(ConceptBank, "from_prompts", None)  # nothing is encoded first
    processors = dict(pipe.unet.attn_processors)
    for wrong in (
        lambda: fn.install(pipe, bank, rule=CENTRED),
        lambda: fn.negate(pipe, bank, CENTRED),
        lambda: fn.negate(pipe, "dog", CENTRED),
        lambda: fn.negate(pipe, negative_prompts=["dog"], method=CENTRED),
        lambda: fn.NegationAttnProcessor(bank, rule=CENTRED),
    ):
        with pytest.raises(ValueError, match=said):
            wrong()
    assert pipe.unet.attn_processors == processors and fn.install(pipe, bank).rule.center == "none"


# ---- cross-attention --------------------------------------------------------------------------------


def recorded(monkeypatch: pytest.MonkeyPatch, module: Any) -> list[fn.ConceptTokens]:
    """The tokens of every call of the operator with a rule, from now on."""
    seen: list[fn.ConceptTokens] = []

    def recording(plain: Any) -> Any:
        def record(*args: Any, **options: Any) -> Any:
            if len(args) > 3 and args[3] is not None:
                seen.append(args[3])
            return plain(*args, **options)

        return record

    for name in ("negated_attention", "negated_attention_with_statistics"):
        monkeypatch.setattr(module, name, recording(getattr(module, name)))
    return seen


def spans(tokens: fn.ConceptTokens) -> list[slice]:
    """Of each concept, in the token axis."""
    begins, lengths = tokens.index[tokens.entries :][: 2 * tokens.concepts].view(2, -1).tolist()
    return [slice(begin, begin + length) for begin, length in zip(begins, lengths)]


def test_every_layer_reads_them_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipelines.build("sd15")
    bank = bank_of(pipe, torch.randn(3, 32, generator=torch.Generator().manual_seed(0)))
    seen = recorded(monkeypatch, processor)
    engine = fn.install(pipe, bank, rule=dataclasses.replace(CENTRED, threshold=-1.0))
    with engine.batch([Policy({"dog": 1.0}), None]):
        pipelines.generate(pipe, ["a cat", "a dog"], steps=1)
    made = [
        attn.to_k(bank.neutral).unflatten(-1, (attn.heads, -1))
        for attn in pipelines.attentions(pipe).values()
    ]
    assert len(seen) == len(made)
    for tokens in seen:
        assert tokens.batch == 4 and len(set(tokens.neutral.tolist())) == 1
        span = spans(tokens)[int(tokens.neutral[0])]
        mine = [key for key in made if key.shape == tokens.key[span].shape and close(key, tokens.key[span])]
        assert len(mine) == 1 and span.stop - span.start == 3
        offsets = tokens.index[-5:].tolist()
        assert [b - a for a, b in itertools.pairwise(offsets)] == [0, 0, 2, 0]  # two members of a dog
        assert int(tokens.neutral[0]) not in tokens.index[:2].tolist()  # and nobody negates it


def test_pictures_of_a_centred_rule() -> None:
    """Where the neutral features are zero it is the rule without centring; where they are the concept's
    nothing is removed; a request that asks for nothing has the bits that it has beside any rule."""
    pipe = pipelines.build("sd15")
    pipelines.row_by_row(pipe)
    plain = pipelines.generate(pipe, ["a cat", "a dog"])

    def drawn(rule: Rule, neutral: Tensor) -> Tensor:
        bank = ConceptBank.from_prompts(pipe, {"dog": "dog"}, templates=["{}"], neutral=neutral)
        engine = fn.install(pipe, bank, rule=rule, backend="reference")
        with engine.batch([Policy({"dog": 1.0}), None]):
            made = pipelines.generate(pipe, ["a cat", "a dog"])
        engine.remove()
        return made

    dog = ConceptBank.from_prompts(pipe, {"dog": "dog"}, templates=["{}"])["dog"].prototypes[0]
    nothing = torch.zeros(1, 32)  # keys and values have no biases
    uncentred = drawn(dataclasses.replace(RAW, center="none"), nothing)
    assert close(drawn(RAW, nothing), uncentred) and not close(uncentred[0], plain[0])
    unmoved, moved = drawn(RAW, dog), drawn(RAW, torch.ones(1, 32))
    assert close(unmoved, plain) and not close(moved[0], plain[0])
    assert torch.equal(moved[1], uncentred[1]) and close(moved[1], plain[1])


def test_processors_that_are_set_by_hand() -> None:
    pipe = pipelines.build("sd15")
    bank = bank_of(pipe)
    with fn.negate(pipe, bank, CENTRED, backend="reference"):
        expected = pipelines.generate(pipe)
    pipe.unet.set_attn_processor(fn.NegationAttnProcessor(bank, rule=CENTRED, backend="reference"))
    assert close(pipelines.generate(pipe), expected)
    fn.remove(pipe)
    assert not close(pipelines.generate(pipe), expected)


@pytest.mark.full
def test_one_graph_whoever_negates_what() -> None:
    results = []
    counter = CompileCounterWithBackend("aot_eager")
    for kind in ("eager", "compiled"):
        pipe = pipelines.build("pixart_alpha")
        engine = fn.install(pipe, bank_of(pipe, ["dog", "cat"]), rule=CENTRED)
        if kind == "compiled":
            pipe.transformer.compile(backend=counter)
        made, graphs = [], []
        for policy in (Policy({"dog": 1.0}), Policy({"cat": 2.0, "dog": 1.0}), None):
            with engine.batch([policy]):
                made.append(pipelines.generate(pipe))
            graphs.append(counter.frame_count)
        results.append(torch.cat(made))
    assert close(*results) and not close(results[0][0], results[0][2])
    assert graphs[0] == graphs[1] > 0


# ---- riders -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ("flux", "qwen", "zimage", "sd3"))
def test_they_ride_in_rows_that_negate(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = joint_pipelines.build(kind)
    bank = bank_of(pipe)
    seen = recorded(monkeypatch, attention)
    engine = fn.install(pipe, bank, rule=dataclasses.replace(CENTRED, threshold=-1.0))
    options = {"sd3": {"guidance_scale": 1.0}, "zimage": {"guidance_scale": 0.0}}.get(kind, {})
    with engine.batch([Policy({"dog": 1.0, "cat": 1.0}), Policy({"cat": 1.0})]):
        joint_pipelines.generate(pipe, ["a cat", "a dog"], (0, 1), **options)
    tokens = seen[0]
    offsets = tokens.index[-3:].tolist()
    assert offsets == [0, 3, 4] and tokens.concepts == 6 and tokens.neutral.tolist() == [4, 5]
    lengths = [span.stop - span.start for span in spans(tokens)]
    assert lengths[4:] == [len(bank.neutral)] * 2
    for row, mine in enumerate(([0, 1, 2, 4], [3, 5])):  # everybody has columns of their own
        taken = [column for i in mine for column in range(*spans(tokens)[i].indices(tokens.tokens))]
        assert len(taken) == len(set(taken)) and max(taken) < tokens.key.shape[1], row


@pytest.mark.parametrize("kind", ("flux", "sd3"))
def test_riders_alike_remove_nothing(kind: str) -> None:
    """In models that tell no place of a text: the neutral tokens and the concept evolve alike."""
    pipe = joint_pipelines.build(kind)
    plain = joint_pipelines.generate(pipe)
    dog = ConceptBank.from_prompts(pipe, {"dog": "dog"}, templates=["{}"])
    made = []
    for neutral in (dog["dog"].prototypes[0], torch.ones(1, dog.width)):
        dog.neutral = neutral
        with fn.negate(pipe, dog, RAW):
            made.append(joint_pipelines.generate(pipe))
    assert close(made[0], plain) and not close(made[1], plain)
