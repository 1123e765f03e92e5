# SPDX-License-Identifier: Apache-2.0
"""LTX-2.0, 2.3 and 2.5: video from text is negated, sound is not, against NAG written out in float64 with the
blocks' own modulation of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from fastnegate import Policy, Rule
from fastnegate.engine.engine import Record
from fastnegate.engine.errors import NegationNotAppliedError
from fastnegate.engine.prototypes import prototype

pytest.importorskip("diffusers")

import cross_pipelines
import pipelines
from cross_pipelines import LENGTH, film
from pipelines import one_thread  # noqa: F401

import fastnegate as fn

PROMPTS = ["a cat", "a photo of a dog", "red"]
NEGATIVES = ["red dog", None, "a painting"]  # one for each
POLICIES = [None if text is None else Policy(negative_prompt=text) for text in NEGATIVES]
VARIANTS = ["2.0", "2.3", "2.5"]


@contextmanager
def installed(pipe: Any, rule: Rule | str = "nag", sound: bool = False) -> Iterator[fn.Engine]:
    concepts = {"dog": ["dog", "a red dog"], "cat": "cat"}
    bank = fn.ConceptBank.from_prompts(pipe, concepts, templates=["{}"])
    engine = fn.install(pipe, bank, rule=rule, sound=sound)
    yield engine
    engine.remove()


@torch.no_grad()
def encoded(pipe: Any, text: str, sound: bool = False) -> tuple[Tensor, Tensor]:
    """What the pipeline makes of a prompt for the video, or the sound: [1, M, C], and which of it is attended
    to."""
    embeddings, mask, *_ = pipe.encode_prompt(text, do_classifier_free_guidance=False)
    of_video, of_sound, kept = pipe.connectors(embeddings, mask, padding_side="left")
    return of_sound if sound else of_video, kept[0].bool()


class Literal:
    """`attn2` of one block in plain torch, or `audio_attn2`, with NAG before the gate; the softmax and NAG in
    float64."""

    def __init__(
        self,
        pipe: Any,
        block: Any,
        concepts: Sequence[tuple[Tensor, Tensor] | None],
        rule: Rule,
        sound: bool = False,
    ) -> None:
        self.model, self.block, self.concepts, self.rule = pipe.transformer, block, concepts, rule
        self.sound = "audio_" if sound else ""
        self.temb: Tensor | None = None
        self.handle = block.register_forward_pre_hook(self.enter, with_kwargs=True)

    def enter(self, _block: Any, _args: Any, kwargs: Any) -> None:
        self.temb = kwargs["temb_prompt_audio" if self.sound else "temb_prompt"]

    def modulated(self, text: Tensor, row: int) -> Tensor:
        if hasattr(self.model, "caption_projection"):
            return getattr(self.model, f"{self.sound}caption_projection")(text)
        shift, scale = getattr(self.block, f"{self.sound}prompt_scale_shift_table")
        if self.temb is not None:  # [B, 1, 2 * C]
            of_time = self.temb[row].unflatten(-1, (2, -1))[0]
            shift, scale = shift + of_time[0], scale + of_time[1]
        return text * (1 + scale) + shift

    def heads(self, attn: Any, states: Tensor) -> Tensor:
        return states.unflatten(-1, (attn.heads, -1)).transpose(-2, -3).double()

    def softmax(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | float) -> Tensor:
        return torch.softmax(query @ key.mT * query.shape[-1] ** -0.5 + bias, -1) @ value

    def __call__(self, attn: Any, hidden: Tensor, text: Tensor, mask: Tensor, *_: Any) -> Tensor:
        query = self.heads(attn, attn.norm_q(attn.to_q(hidden)))
        key, value = self.heads(attn, attn.norm_k(attn.to_k(text))), self.heads(attn, attn.to_v(text))
        z = self.softmax(query, key, value, mask[:, None])
        out, first = z.clone(), len(z) - len(self.concepts)  # unconditional rows come first, if there are any
        assert first in (0, len(self.concepts))
        for row, concept in enumerate(self.concepts, first):
            if concept is None:
                continue
            words, kept = concept
            words = self.modulated(words[:, kept], row)[0]
            k, v = self.heads(attn, attn.norm_k(attn.to_k(words))), self.heads(attn, attn.to_v(words))
            f = self.softmax(query[row], k, v, 0.0).transpose(0, 1).flatten(1)
            whole = z[row].transpose(0, 1).flatten(1)  # features of all heads
            y = whole + self.rule.strength * (whole - f)
            size, most = y.abs().sum(1, True), self.rule.norm_limit * whole.abs().sum(1, True)
            y = torch.where(size > most, y * most / size, y)
            y = self.rule.blend * y + (1 - self.rule.blend) * whole
            out[row] = y.unflatten(1, (attn.heads, -1)).transpose(0, 1)
        if attn.to_gate_logits is not None:
            out = out * (2 * torch.sigmoid(attn.to_gate_logits(hidden))).mT.unsqueeze(-1)
        return attn.to_out[0](out.transpose(1, 2).flatten(2).to(hidden.dtype))


@contextmanager
def literal(pipe: Any, negatives: Sequence[str | None], rule: Rule, sound: bool = False) -> Iterator[None]:
    concepts = [None if text is None else encoded(pipe, text, sound) for text in negatives]
    blocks = list(pipe.transformer.transformer_blocks)
    layers = [block.audio_attn2 if sound else block.attn2 for block in blocks]
    before = [layer.processor for layer in layers]
    made = [Literal(pipe, block, concepts, rule, sound) for block in blocks]
    for layer, processor in zip(layers, made):
        layer.set_processor(processor)
    yield
    for layer, processor, old in zip(layers, made, before):
        layer.set_processor(old)
        processor.handle.remove()


def error(actual: Tensor, wanted: Tensor) -> float:
    """Relative to the largest output."""
    return float((actual - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize(
    ("variant", "image"),
    [
        ("2.0", False),
        ("2.3", True),
        ("2.5", False),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (("2.0", True), ("2.3", False), ("2.5", True))
        ),
    ],
)
def test_rows_with_other_negative_prompts_are_literal_nag(variant: str, image: bool) -> None:
    """In the three denoiser calls of a step; without a live entry the pipeline is untouched, to the bit."""
    pipe = cross_pipelines.ltx2(variant, image)
    untouched = film(pipe, PROMPTS)
    before = dict(pipe.transformer.attn_processors)
    with installed(pipe) as engine:
        assert engine.rule == Rule.preset("nag", family="wan")
        assert engine.layers == ("transformer_blocks.0.attn2", "transformer_blocks.1.attn2")
        for idle in (film(pipe, PROMPTS), _negated(engine, pipe, [None] * 3)):
            assert all(torch.equal(a, b) for a, b in zip(idle, untouched))
        actual = _negated(engine, pipe, POLICIES)
        assert engine.call == 1
        assert all(torch.equal(a, b) for a, b in zip(film(pipe, PROMPTS), untouched))
    assert pipe.transformer.attn_processors == before
    with literal(pipe, NEGATIVES, engine.rule):
        wanted = film(pipe, PROMPTS)
    for made, of_formula, plain in zip(actual, wanted, untouched):  # videos, sounds
        assert error(made, of_formula) <= 5e-6
        changed = [error(a, b) > 1e-3 for a, b in zip(made, plain)]
        assert changed == [text is not None for text in NEGATIVES]


@pytest.mark.parametrize("variant", ["2.0", "2.3", pytest.param("2.5", marks=pytest.mark.full)])
def test_what_the_sound_reads_is_negated_where_that_is_asked_for(variant: str) -> None:
    pipe = cross_pipelines.ltx2(variant, False)
    untouched = film(pipe, PROMPTS)
    with installed(pipe) as engine:
        without = _negated(engine, pipe, POLICIES)
    with installed(pipe, sound=True) as engine:
        assert engine.layers == ("transformer_blocks.0.attn2", "transformer_blocks.1.attn2")  # of pictures
        assert all(torch.equal(a, b) for a, b in zip(film(pipe, PROMPTS), untouched))
        with fn.audit(pipe) as audit:
            actual = _negated(engine, pipe, POLICIES)
        audit.verify()
    with literal(pipe, NEGATIVES, engine.rule), literal(pipe, NEGATIVES, engine.rule, sound=True):
        wanted = film(pipe, PROMPTS)
    for made, of_formula in zip(actual, wanted):
        assert error(made, of_formula) <= 5e-6
    changed = [error(a, b) > 1e-3 for a, b in zip(actual[1], without[1])]
    assert changed == [text is not None for text in NEGATIVES]


def test_embeddings_of_one_s_own_are_of_the_video_or_of_both() -> None:
    pipe = cross_pipelines.ltx2()
    width = encoded(pipe, "dog")[0].shape[2]
    embeddings = torch.zeros(2, width).normal_(generator=torch.manual_seed(0))
    for sound in (False, True):
        with installed(pipe, sound=sound) as engine:
            bank = fn.ConceptBank({"own": fn.Concept.from_embeddings(embeddings)}, engine.bank.fingerprint)
        engine = fn.install(pipe, bank, rule="vsf", sound=sound)
        if sound:
            with pytest.raises(ValueError, match="for the sound"), engine.batch([Policy({"own": 1.0})]):
                film(pipe, PROMPTS[:1])
        else:
            with engine.batch([Policy({"own": 1.0})]):
                film(pipe, PROMPTS[:1])
        engine.remove()


def test_sound_is_of_pipelines_that_make_one() -> None:
    pipe = pipelines.build("sd15")
    with pytest.raises(ValueError, match="StableDiffusionPipeline makes none"):
        fn.install(pipe, fn.ConceptBank.from_prompts(pipe, {"dog": "dog"}), sound=True)


def _negated(engine: fn.Engine, pipe: Any, policies: Sequence[Policy | None], **options: Any) -> Any:
    with engine.batch(policies):
        return film(pipe, PROMPTS[: len(policies)], **options)


@pytest.mark.parametrize(
    "options",
    [
        {"guidance": 1.0, "audio_guidance_scale": 1.0},
        {"stg_scale": 0.0, "audio_stg_scale": 0.0, "modality_scale": 1.0, "audio_modality_scale": 1.0},
    ],
    ids=["without unconditional rows", "without further calls"],
)
def test_whatever_guides(options: dict[str, Any]) -> None:
    pipe = cross_pipelines.ltx2()
    with installed(pipe) as engine:
        actual, _ = _negated(engine, pipe, POLICIES, **options)
    with literal(pipe, NEGATIVES, engine.rule):
        wanted, _ = film(pipe, PROMPTS, **options)
    assert error(actual, wanted) <= 5e-6


@pytest.mark.parametrize("registers", [16, None])
@pytest.mark.parametrize("variant", ["2.0", "2.3"])
def test_words_of_a_concept_are_found(variant: str, registers: int | None) -> None:
    """Connectors put a text first and registers behind it, or leave it where it was: behind its padding."""
    pipe = cross_pipelines.ltx2(variant, registers=registers)
    bank = fn.ConceptBank.from_prompts(pipe, {"it": "red dog"}, templates=["a photo of a {} and a cat"])
    whole, kept = encoded(pipe, "red dog")
    whole = torch.cat([whole, encoded(pipe, "red dog", sound=True)[0]], -1)
    concept = bank["it"]
    # diffusers attends to padding, too, where there are no registers.
    assert len(concept.prompt) == kept.sum() == 1024 and torch.equal(concept.prompt, whole[0])
    padding = [3] * 1021
    assert concept.roles.tolist() == ([0, 1, 1, *padding] if registers else [*padding, 0, 1, 1])
    caption = torch.cat(
        [encoded(pipe, "a photo of a red dog and a cat", sound)[0] for sound in (False, True)], -1
    )
    begin = 0 if registers else 1024 - 10
    torch.testing.assert_close(concept.prototypes[0], prototype([caption[0, begin + 5 : begin + 7]]))
    if registers is None:
        with installed(pipe) as engine:
            actual, _ = _negated(engine, pipe, POLICIES)
        with literal(pipe, NEGATIVES, engine.rule):
            wanted, _ = film(pipe, PROMPTS)
        assert error(actual, wanted) <= 5e-6


def test_a_bank_is_of_its_connectors() -> None:
    pipe = cross_pipelines.ltx2()
    bank = fn.ConceptBank.from_prompts(pipe, {"dog": "dog"})
    with torch.no_grad():
        pipe.connectors.video_text_proj_in.weight.add_(1.0)
    with pytest.raises(fn.BankMismatchError, match="the weights differ"):
        fn.install(pipe, bank)


@pytest.mark.parametrize("variant", ["2.0", "2.3"])
def test_windows_mates_and_audits(variant: str) -> None:
    pipe, records = cross_pipelines.ltx2(variant), list[Record]()
    dog, late = Policy({"dog": 1.0}, stop=0.5), Policy({"cat": 1.0}, start=0.75)
    with installed(pipe, "protore") as engine:
        engine.observer = records.append
        with fn.audit(pipe) as audit:
            both, _ = _negated(engine, pipe, [dog, late], num_inference_steps=4)
        audit.verify()
        counts = [(line["image"], line["concept"], line["calls"]) for line in audit.report()]
        assert counts == [(0, "dog", 12), (1, "cat", 6)]  # of three denoiser calls a step, with two layers
        assert len(audit.heatmap("dog").frames(2)) == 2
        for policies, row in (([dog, None], 0), ([None, late], 1)):
            alone, _ = _negated(engine, pipe, policies, num_inference_steps=4)
            assert error(alone[row], both[row]) <= 5e-6
    # Of the three calls of a step one has unconditional rows before the conditional ones.
    assert {record.requests for record in records} == {(None, None, 0, 1), (0, 1)}


def transformed(pipe: Any, video: Tensor, *times: float) -> Tensor:
    """A denoiser call of one's own, with rows [B, 8, 4] of a video at these times."""
    text, kept = encoded(pipe, "a cat")
    rows, t, model = len(times), torch.tensor(times), pipe.transformer
    width = 32 if hasattr(model, "caption_projection") else 16  # of the sound's text
    made, _sound = model(
        hidden_states=video, num_frames=2, height=2, width=2, timestep=t, sigma=t, return_dict=False,
        encoder_hidden_states=text[:, :LENGTH].expand(rows, -1, -1),
        encoder_attention_mask=kept[None, :LENGTH].expand(rows, -1),
        audio_hidden_states=torch.zeros(rows, 9, 4), audio_num_frames=9,
        audio_encoder_hidden_states=torch.ones(rows, LENGTH, width),
    )  # fmt: skip
    return made


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_at_other_timesteps(variant: str) -> None:
    """Only where text is modulated by them concepts would have to be other tokens in each row."""
    pipe, video = cross_pipelines.ltx2(variant), torch.ones(2, 8, 4)
    with installed(pipe) as engine, torch.no_grad():
        engine.set_rows([Policy({"dog": 1.0})], [0, 0])
        alike = transformed(pipe, video, 900.0, 900.0)
        if variant == "2.3":
            with pytest.raises(fn.UnsupportedModelError, match=r"sigma=\[900.0, 100.0\]: .* one timestep"):
                transformed(pipe, video, 900.0, 100.0)
        else:
            torch.testing.assert_close(transformed(pipe, video, 900.0, 100.0)[0], alike[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_checkpointing(variant: str) -> None:
    """Blocks that modulate text make another tensor of it when they are computed again."""
    pipe, gradients = cross_pipelines.ltx2(variant), []
    with installed(pipe) as engine:
        engine.set_rows([Policy({"dog": 1.0})], [0])
        for checkpoints in (False, True):
            pipe.transformer.train(checkpoints)
            if checkpoints:
                pipe.transformer.enable_gradient_checkpointing()
            video = torch.ones(1, 8, 4).requires_grad_()
            made = transformed(pipe, video, 900.0).square().mean()
            if checkpoints and variant != "2.0":
                with pytest.raises(NegationNotAppliedError, match="gradient checkpointing"):
                    made.backward()
                continue
            made.backward()
            gradients.append(video.grad)
    if variant == "2.0":
        torch.testing.assert_close(*gradients)


def test_what_displaces_is_noticed() -> None:
    pipe = cross_pipelines.ltx2()
    with installed(pipe) as engine:
        attn = pipe.transformer.transformer_blocks[1].attn2
        attn.set_processor(type(attn.processor.inner)())
        with pytest.raises(fn.DisplacedProcessorError, match="1 of 2 processors"):
            _negated(engine, pipe, [Policy({"dog": 1.0})])


@pytest.mark.parametrize("variant", ["2.3", pytest.param("2.0", marks=pytest.mark.full)])
def test_compiled_blocks(variant: str) -> None:
    """All of them, or one."""
    pipe = cross_pipelines.ltx2(variant)
    one = {"stg_scale": 0.0, "audio_stg_scale": 0.0, "modality_scale": 1.0, "audio_modality_scale": 1.0}
    half = [policy and Policy(negative_prompt=policy.text, stop=0.5) for policy in POLICIES]
    untouched = film(pipe, PROMPTS, **one)[0]
    with installed(pipe) as engine:
        expected, windowed = (_negated(engine, pipe, p, **one)[0] for p in (POLICIES, half))
    pipe.transformer.transformer_blocks[0].compile(backend="eager", fullgraph=True)
    with installed(pipe) as engine:
        assert error(_negated(engine, pipe, POLICIES, **one)[0], expected) <= 5e-6
        assert error(_negated(engine, pipe, half, **one)[0], windowed) <= 5e-6
        assert error(film(pipe, PROMPTS, **one)[0], untouched) <= 5e-6
    pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    with installed(pipe) as engine:
        assert error(_negated(engine, pipe, half, **one)[0], windowed) <= 5e-6


def test_processors_by_hand_are_refused_by_name() -> None:
    pipe = cross_pipelines.ltx2()
    processor = fn.NegationAttnProcessor(fn.ConceptBank.from_prompts(pipe, {"dog": "dog"}), "nag")
    pipe.transformer.transformer_blocks[0].attn2.set_processor(processor)
    with pytest.raises(fn.UnsupportedModelError, match=r"LTX2Attention .* by hand"):
        film(pipe)
