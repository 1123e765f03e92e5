# SPDX-License-Identifier: Apache-2.0
"""Families whose attention layers are not diffusers' `Attention` with its usual processor, against the
equations of NAG written out in torch inside diffusers' own processors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from fastnegate import Policy, Rule
from fastnegate.engine.engine import Record
from fastnegate.engine.errors import NegationNotAppliedError

pytest.importorskip("diffusers")

import diffusers
import pipelines
from pipelines import FAMILIES, OTHERS, generate, one_thread  # noqa: F401

import fastnegate as fn
from fastnegate.integrations.diffusers.contract import denoisers
from fastnegate.integrations.diffusers.install import engine_of

PROMPTS = ["a cat", "a photo of a dog", "red"]
NEGATIVES = ["red dog", None, "a painting"]  # one for each
POLICIES = [None if text is None else Policy(negative_prompt=text) for text in NEGATIVES]


def _only_in_full(*kinds: str) -> list[Any]:
    return [pytest.param(kind, marks=pytest.mark.full) for kind in kinds]


@contextmanager
def installed(pipe: Any, rule: Rule | str = "nag", **options: Any) -> Iterator[fn.Engine]:
    bank = fn.ConceptBank.from_prompts(pipe, {"dog": ["dog", "a red dog"], "cat": "cat"})
    engine = fn.install(pipe, bank, rule=rule, **options)
    yield engine
    engine.remove()


def negated(pipe: Any, policies: Sequence[Policy | None], *arguments: Any, **options: Any) -> Tensor:
    engine = engine_of(pipe)
    assert engine is not None
    with engine.batch(policies):
        return generate(pipe, *arguments, **options)


@contextmanager
def literal_nag(pipe: Any, negatives: Sequence[str | None], rule: Rule) -> Iterator[None]:
    """diffusers' own processors, with NAG where they call torch's attention in a text layer: in the rows of a
    batch that belong to the conditional half, or in all rows of a call that is the first of its step."""
    video = "Wan" in type(pipe).__name__
    encoded = [None if text is None else _encoded(pipe, text) for text in negatives]
    attend = torch.nn.functional.scaled_dot_product_attention
    state: dict[str, Any] = {"layer": None, "model": None, "calls": 0}

    def nag(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        z = attend(query, key, value, *args, **kwargs)
        layer = state["layer"]
        if layer is None or key.shape[2] != state["text"] or (video and state["calls"] % 2 == 0):
            return z
        first = 0 if video else len(z) // 2
        out = z.clone()
        for row, concept in enumerate(encoded, first):
            if concept is None:
                continue
            text, mask = concept
            k, v = _keys_and_values(layer, _projected(state["model"], text))
            f = torch.softmax(query[row] @ k.mT * query.shape[-1] ** -0.5 + mask, -1) @ v
            whole = z[row].transpose(0, 1).flatten(1)  # features of all heads
            y = whole + rule.strength * (whole - f.transpose(0, 1).flatten(1))
            size, most = y.abs().sum(1, True), rule.norm_limit * whole.abs().sum(1, True)
            y = torch.where(size > most, y * most / size, y)
            y = rule.blend * y + (1 - rule.blend) * whole
            out[row] = y.view(y.shape[0], z.shape[1], -1).transpose(0, 1)
        return out

    def enter(layer: Any, args: Any, kwargs: Any) -> None:
        text = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
        images = pipelines.IMAGE_TOKENS if getattr(layer, "add_k_proj", None) is not None else 0
        state.update(layer=layer, text=text.shape[1] - images)

    def called(model: Any, _args: Any, _kwargs: Any) -> None:
        state.update(model=model, calls=state["calls"] + 1)

    handles = [m.register_forward_pre_hook(called, with_kwargs=True) for m in denoisers(pipe).values()]
    for layer in pipelines.attentions(pipe).values():
        handles.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(layer.register_forward_hook(lambda *_: state.update(layer=None)))
    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", nag):
        yield
    for handle in handles:
        handle.remove()


@torch.no_grad()
def _encoded(pipe: Any, text: str) -> tuple[Tensor, Tensor]:
    """Embeddings [1, M, C] as the pipeline makes them of a prompt, and what is added to their logits."""
    if "Wan" in type(pipe).__name__:
        embeddings, _ = pipe.encode_prompt(text, None, False, max_sequence_length=512)
        return embeddings, torch.zeros(embeddings.shape[1])
    embeddings, mask, *_ = pipe.encode_prompt(text, do_classifier_free_guidance=False)
    return embeddings, (1 - mask[0].float()) * -10000.0


def _projected(model: Any, text: Tensor) -> Tensor:
    if hasattr(model, "condition_embedder"):
        return model.condition_embedder.text_embedder(text)
    text = model.caption_projection(text)
    return model.caption_norm(text) if hasattr(model, "caption_norm") else text


def _keys_and_values(layer: Any, text: Tensor) -> tuple[Tensor, Tensor]:
    """[H, M, D]"""
    key, value = layer.norm_k(layer.to_k(text)), layer.to_v(text)
    return tuple(t[0].unflatten(1, (layer.heads, -1)).transpose(0, 1) for t in (key, value))


def error(actual: Tensor, wanted: Tensor) -> float:
    """Relative to the largest output."""
    return float((actual - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("kind", FAMILIES)
def test_rows_with_other_negative_prompts_are_literal_nag(kind: str) -> None:
    """Side by side, one of them with none; without a live entry the pipeline is untouched, to the bit."""
    pipe = pipelines.build(kind)
    call = {"prompts": PROMPTS, "steps": 2, "guidance": 2.0}
    untouched = generate(pipe, **call)
    before = [model.attn_processors for model in denoisers(pipe).values()]
    with installed(pipe) as engine:
        assert engine.rule == Rule.preset("nag", family="sana" if kind == "sana" else "wan")
        assert engine.layers == tuple(pipelines.attentions(pipe))
        assert torch.equal(generate(pipe, **call), untouched)
        assert torch.equal(negated(pipe, [None] * 3, **call), untouched)
        actual = negated(pipe, POLICIES, **call)
        assert torch.equal(generate(pipe, **call), untouched)
    assert [model.attn_processors for model in denoisers(pipe).values()] == before
    with literal_nag(pipe, NEGATIVES, engine.rule):
        wanted = generate(pipe, **call)
    assert error(actual, wanted) <= 5e-6
    changed = [error(a, b) > 1e-3 for a, b in zip(actual, untouched)]
    assert changed == [text is not None for text in NEGATIVES]
    assert error(actual[1], untouched[1]) <= 5e-6


@pytest.mark.parametrize("kind", OTHERS)
def test_further_pipelines_around_known_denoisers(kind: str) -> None:
    """ControlNets, distilled models, refiners, videos from images: rows are those of the usual pipelines."""
    pipe, records = pipelines.build(kind), list[Record]()
    prompts = ["a cat", "a photo"]
    untouched = generate(pipe, prompts)
    with installed(pipe) as engine:
        assert torch.equal(generate(pipe, prompts), untouched)
        engine.observer = records.append
        actual = negated(pipe, [None, Policy({"dog": 1.0}, stop=0.5)], prompts)
        assert engine.call == 1
    unguided = () if kind == "lcm" else (None, None)
    assert {record.requests for record in records} == {(*unguided, 0, 1)}
    assert {row for record in records for _, row, _ in record.entries} == {len(unguided) + 1}
    assert {record.step for record in records} == {0, 1}  # of three
    assert {record.layer for record in records} == {*pipelines.attentions(pipe)}
    assert error(actual[1], untouched[1]) > 1e-3 and error(actual[0], untouched[0]) < 1e-4


def test_a_refiner_has_one_text_encoder() -> None:
    pipe = pipelines.build("sdxl_refiner")
    bank = fn.ConceptBank.from_prompts(pipe, {"dog": "dog"})
    assert bank.width == pipe.text_encoder_2.config.hidden_size
    with pytest.raises(fn.BankMismatchError):
        fn.install(pipelines.build("sdxl"), bank)


@pytest.mark.parametrize("kind", ["wan22", "ltx", "sana"])
def test_windows_mates_and_audits(kind: str) -> None:
    """Wan 2.2's first denoiser runs the noisier steps, the second the others: the schedule is one."""
    pipe, layers = pipelines.build(kind), []
    call = {"prompts": PROMPTS[:2], "steps": 4}
    models = list(denoisers(pipe).values())
    handles = [
        attn.register_forward_hook(lambda attn, *_: layers.append(attn))
        for attn in pipelines.attentions(pipe).values()
    ]
    with installed(pipe) as engine:
        dog, late = Policy({"dog": 1.0}, stop=0.5), Policy({"cat": 1.0}, start=0.75)
        with fn.audit(pipe) as audit:
            both = negated(pipe, [dog, late], **call)
        assert engine.call == 1
        audit.verify()
        counts = {line["concept"]: line["calls"] for line in audit.report()}
        per_model = len(engine.layers) // len(models)
        assert counts == {"dog": 2 * per_model, "cat": per_model}
        frames = audit.heatmap("dog").frames(1 if kind == "sana" else 2)
        assert [frame.array(32, 32).shape for frame in frames] == [(32, 32)] * len(frames)
        for policies, row in (([dog, None], 0), ([Policy({"cat": 1.0}), late], 1)):
            assert error(negated(pipe, policies, **call)[row], both[row]) <= 5e-6
        if kind == "wan22":
            assert {attn in set(models[1].modules()) for attn in layers} == {False, True}
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("kind", ["wan22", "ltx", "sana", *_only_in_full("wan", "wan_i2v")])
def test_what_displaces_is_noticed_in_every_denoiser(kind: str) -> None:
    pipe = pipelines.build(kind)
    for model in denoisers(pipe).values():
        with installed(pipe):
            attn = [m for name, m in model.named_modules() if name.endswith("attn2")][-1]
            attn.set_processor(type(attn.processor.inner)())
            with pytest.raises(fn.DisplacedProcessorError, match="1 of 2 processors"):
                negated(pipe, [Policy({"dog": 1.0})], steps=4)
    for name in denoisers(pipe):
        with installed(pipe) as engine:
            held = getattr(pipe, name)
            setattr(pipe, name, copy.deepcopy(held))
            with pytest.raises(fn.DisplacedProcessorError, match=f"pipeline's {name} is another"):
                with engine.batch([Policy({"dog": 1.0})]):
                    generate(pipe)
            setattr(pipe, name, held)


def test_wan_tells_its_unconditional_calls_by_their_text() -> None:
    """Also where both texts are equal, but not where they are one tensor."""
    pipe, records = pipelines.build("wan"), list[Record]()
    text, _ = pipe.encode_prompt("red", None, False, max_sequence_length=512)

    def run(negative: Tensor, **options: Any) -> Tensor:
        embeddings = {"prompt_embeds": text, "negative_prompt_embeds": negative, "negative_prompt": None}
        return generate(pipe, None, seeds=[0], steps=2, **embeddings, **options)

    untouched = run(text)
    with installed(pipe) as engine:
        engine.observer = records.append
        assert torch.equal(run(text), untouched)
        with engine.batch([Policy({"dog": 1.0})]):
            twin = run(text.clone())
            assert len(records) == 2 * 2  # steps x layers of the conditional calls
            with pytest.raises(fn.UnsupportedModelError, match="WanPipeline is conditional"):
                run(text)
            assert not torch.equal(run(text, guidance=1.0), untouched)
    assert error(twin, untouched) > 1e-3


@pytest.mark.parametrize("kind", ["wan", "wan_i2v"])
def test_fused_projections(kind: str) -> None:
    pipe = pipelines.build(kind)
    with installed(pipe):
        expected = negated(pipe, POLICIES[:1], steps=2)
        for attn in pipelines.attentions(pipe).values():
            attn.fuse_projections()
            attn.to_k = attn.to_v = None  # not called any longer
        assert error(negated(pipe, POLICIES[:1], steps=2), expected) <= 5e-6


def _group_offload(model: Any) -> None:
    cpu = torch.device("cpu")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def _casting(model: Any) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def _first_block_cache(model: Any) -> None:
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.0))


def _compiled_blocks(model: Any) -> None:
    model.compile_repeated_blocks(backend="eager", fullgraph=True)


@pytest.mark.parametrize(
    "feature",
    [_group_offload, _casting, _first_block_cache, pytest.param(_compiled_blocks, marks=pytest.mark.full)],
)
@pytest.mark.parametrize("kind", ["ltx", *_only_in_full("wan", "wan22", "wan_i2v")])
def test_features_of_diffusers(kind: str, feature: Callable[[Any], None]) -> None:
    """What they do to the weights they do to both: what is negated stays as it was, within that."""
    pipe = pipelines.build(kind)
    with installed(pipe):
        untouched, expected = generate(pipe, steps=2), negated(pipe, POLICIES[:1], steps=2)
    for model in denoisers(pipe).values():
        feature(model)
    with installed(pipe):
        drift = error(generate(pipe, steps=2), untouched)
        assert error(negated(pipe, POLICIES[:1], steps=2), expected) <= 5e-6 + 2 * drift
        assert error(expected, untouched) > 4 * drift


def test_a_chosen_attention_backend_runs_what_is_not_negated() -> None:
    pipe = pipelines.build("ltx")
    pipe.transformer.set_attention_backend("_native_math")
    untouched = generate(pipe)
    pipe.transformer.set_attention_backend("native")
    with installed(pipe):
        pipe.transformer.set_attention_backend("_native_math")
        assert torch.equal(generate(pipe), untouched)
    chosen = {attn.processor._attention_backend.value for attn in pipelines.attentions(pipe).values()}
    assert chosen == {"_native_math"}


@pytest.mark.parametrize("kind", ["wan", "ltx", "sana"])
def test_processors_by_hand_are_refused_by_name(kind: str) -> None:
    pipe = pipelines.build(kind)
    processor = fn.NegationAttnProcessor(fn.ConceptBank.from_prompts(pipe, {"dog": "dog"}), "nag")
    with pytest.raises(fn.UnsupportedModelError, match="by hand"):
        pipe.transformer.set_attn_processor(processor)
        generate(pipe)


def test_image_tokens_without_an_image_are_an_unknown_call() -> None:
    pipe = pipelines.build("wan_i2v")
    pipe.encode_image = lambda _image, _device: torch.zeros(1, 0, 8)
    with installed(pipe), pytest.raises(NegationNotAppliedError, match="512 tokens of image and text"):
        negated(pipe, [Policy({"dog": 1.0})])


def test_a_text_is_tokenized_as_its_pipeline_cleans_it() -> None:
    pipe = pipelines.build("wan")
    bank = fn.ConceptBank.from_prompts(pipe, {"a": "red &amp; dog", "b": "red & dog"})
    assert torch.equal(bank["a"].prompt, bank["b"].prompt)
    assert all(torch.equal(x, y) for x, y in zip(bank["a"].prototypes, bank["b"].prototypes))


def test_a_pipeline_that_only_encodes_has_nothing_to_install_in() -> None:
    """Denoisers are often left out where texts are encoded; one of Wan 2.2's may be left out, too."""
    pipe = pipelines.build("wan22")
    pipe.transformer, second = None, pipe.transformer
    bank = fn.ConceptBank.from_prompts(pipe, {"dog": "dog"})
    engine = fn.install(pipe, bank)
    assert engine.layers == ("blocks.0.attn2", "blocks.1.attn2")
    engine.remove()
    pipe.transformer_2 = None
    assert engine_of(pipe) is None
    with pytest.raises(fn.UnsupportedModelError, match=r"pipe\.transformer is None"):
        fn.install(pipe, bank)
    fn.remove(pipe)
    pipe.transformer = second
    fn.install(pipe, bank).remove()


@pytest.mark.parametrize("kind", ("wan", "sdxl"))
def test_one_graph_whatever_is_negated(kind: str) -> None:
    """Over policies, concepts, strengths, windows and steps; compiled code always takes the negated path."""
    torch._dynamo.reset()
    pipe, counter = pipelines.build(kind), CompileCounter()
    bank = fn.ConceptBank.from_prompts(pipe, {"dog": "dog", "red": "red"}, templates=["{}"])
    name, model = next(iter(denoisers(pipe).items()))
    setattr(pipe, name, torch.compile(model, backend=counter, fullgraph=True))
    engine = fn.install(pipe, bank, rule="nag")
    policies = [
        Policy({"dog": 1.0}), None, Policy({"red": 0.5}), Policy({"dog": 0.3, "red": 0.7}),
        Policy({"dog": 1.0}, stop=0.5), Policy({"dog": 2.0}, start=0.5), Policy({"red": 1.0}),
    ]  # fmt: skip
    for policy in policies:
        with engine.batch([policy]):
            pipelines.generate(pipe, steps=3)
    assert counter.frame_count == 1
    engine.remove()
    torch._dynamo.reset()
