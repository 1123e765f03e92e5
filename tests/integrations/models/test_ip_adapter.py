# SPDX-License-Identifier: Apache-2.0
"""IP-Adapters: text is negated, as the reference operator says; to images the untouched processor attends."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from fastnegate import Policy, Rule
from fastnegate.engine.engine import Record
from fastnegate.engine.errors import NegationNotAppliedError

pytest.importorskip("diffusers")

import pipelines
from cross_pipelines import images, literal, load_adapters
from diffusers.models.attention_processor import (
    AttnProcessor2_0,
    IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0,
)
from pipelines import generate, one_thread  # noqa: F401

import fastnegate as fn
from fastnegate.integrations.diffusers.install import processors_for

ONE = {"device": "cpu", "num_images_per_prompt": 1}
PROMPTS = ["a cat", "a photo of a dog", "red"]
NEGATIVES = ["red dog", None, "a painting"]  # one for each
POLICIES = [None if text is None else Policy(negative_prompt=text) for text in NEGATIVES]
DOG = Policy({"dog": 1.0})


def build(kind: str = "sd15", *which: int) -> Any:
    pipe = pipelines.build(kind)
    if which:
        load_adapters(pipe, *which)
    return pipe


@contextmanager
def installed(pipe: Any, rule: Rule | str = "nag", **options: Any) -> Iterator[fn.Engine]:
    bank = fn.ConceptBank.from_prompts(pipe, {"dog": ["dog", "a red dog"], "cat": "cat"})
    engine = fn.install(pipe, bank, rule=rule, **options)
    yield engine
    engine.remove()


def negated(engine: fn.Engine, pipe: Any, policies: Sequence[Policy | None], **options: Any) -> Tensor:
    with engine.batch(policies):
        return generate(pipe, PROMPTS[: len(policies)], **options)


def error(actual: Tensor, wanted: Tensor) -> float:
    """Relative to the largest output."""
    return float((actual - wanted).abs().max() / wanted.abs().max())


def masks(*which: int, count: int = 1) -> list[Tensor]:
    """Left half, right half, ... for the images of each adapter."""
    columns = torch.arange(32).expand(count, 32, 32)
    lines = torch.arange(count).view(-1, 1, 1)
    return [((columns // 16 + lines + i) % 2 == 0).float()[None] for i, _ in enumerate(which)]


CASES: dict[str, Any] = {
    "one": ((0,), {}, 0.8),
    "plus": ((1,), {}, [0.5]),
    "two": ((0, 1), {}, [0.7, 0.4]),
    "off": ((0,), {}, 0.0),
    "blocks": ((0,), {}, {"down": 0.2, "up": 0.9}),
    "unguided": ((0,), {"guidance": 1.0}, 1.0),
    "masks": ((0, 1), {"masked": 1}, [0.7, 0.4]),
    "masked images": ((0,), {"masked": 2}, [[0.3, 0.9]]),
}


def options_of(which: Sequence[int], given: dict[str, Any]) -> dict[str, Any]:
    masked = given.get("masked", 0)
    options = {name: value for name, value in given.items() if name != "masked"}
    options["ip_adapter_image_embeds"] = images(*which, count=masked or 1)
    if options.get("guidance") == 1.0:
        options["ip_adapter_image_embeds"] = [both[1:] for both in options["ip_adapter_image_embeds"]]
    if masked:
        options["cross_attention_kwargs"] = {"ip_adapter_masks": masks(*which, count=masked)}
    return options


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        *(("sd15", case) for case in CASES),
        *(pytest.param("sdxl", case, marks=() if case == "masks" else pytest.mark.full) for case in CASES),
    ],
)
def test_text_is_negated_and_images_are_not(kind: str, case: str) -> None:
    """Rows side by side, one with nothing; without a live entry the pipeline is untouched, to the bit."""
    which, given, scale = CASES[case]
    pipe = build(kind, *which)
    pipe.set_ip_adapter_scale(scale)
    call = {"steps": 2, "guidance": 2.0, **options_of(which, given)}
    untouched = generate(pipe, PROMPTS, **call)
    before, weights = pipe.unet.attn_processors, list(pipe.unet.state_dict())
    with installed(pipe) as engine:
        assert list(pipe.unet.state_dict()) == weights
        assert torch.equal(generate(pipe, PROMPTS, **call), untouched)
        assert torch.equal(negated(engine, pipe, [None] * 3, **call), untouched)
        actual = negated(engine, pipe, POLICIES, **call)
        assert torch.equal(generate(pipe, PROMPTS, **call), untouched)
    assert pipe.unet.attn_processors == before and list(pipe.unet.state_dict()) == weights
    with literal(pipe, NEGATIVES, engine.rule):
        wanted = generate(pipe, PROMPTS, **call)
    assert error(actual, wanted) <= 5e-6
    changed = [error(a, b) > 1e-3 for a, b in zip(actual, untouched)]
    assert changed == [text is not None for text in NEGATIVES]


def test_images_matter_in_these_tests() -> None:
    """Their tokens, scales and masks show in the output."""
    pipe = build("sd15", 0)
    outputs = [
        generate(pipe, PROMPTS[:1], **options_of((0,), given)) for given in ({}, {"masked": 1}, {"masked": 2})
    ]
    pipe.set_ip_adapter_scale(0.0)
    outputs.append(generate(pipe, PROMPTS[:1], **options_of((0,), {})))
    for i, one in enumerate(outputs):
        assert all(error(one, other) > 1e-2 for other in outputs[:i])


def test_the_older_processor() -> None:
    pipe = build("sd15", 0, 1)
    call = options_of((0, 1), {"masked": 1})
    with installed(pipe) as engine:
        expected = negated(engine, pipe, POLICIES, **call)
    for attn in pipelines.attentions(pipe).values():
        new, old = attn.processor, IPAdapterAttnProcessor(16, 32, num_tokens=(4, 3))
        old.to_k_ip, old.to_v_ip = new.to_k_ip, new.to_v_ip
        attn.set_processor(old)
    untouched = generate(pipe, PROMPTS, **call)
    with installed(pipe) as engine:
        assert torch.equal(generate(pipe, PROMPTS, **call), untouched)
        assert error(negated(engine, pipe, POLICIES, **call), expected) <= 5e-6


def test_scales_that_are_set_while_installed() -> None:
    pipe = build("sd15", 0)
    call = options_of((0,), {})
    with installed(pipe) as engine:
        pipe.set_ip_adapter_scale(0.25)
        actual, idle = negated(engine, pipe, [DOG], **call), generate(pipe, PROMPTS[:1], **call)
    assert torch.equal(generate(pipe, PROMPTS[:1], **call), idle)  # it is the processors' own scale
    with installed(pipe) as engine:
        assert torch.equal(negated(engine, pipe, [DOG], **call), actual)
        next(iter(pipelines.attentions(pipe).values())).processor.scale = [0.5]
        assert error(negated(engine, pipe, [DOG], **call), actual) > 1e-4


def test_weights_go_where_the_model_goes() -> None:
    pipe = build("sd15", 0)
    with installed(pipe):
        pipe.unet.to(torch.float64)
        pipe.text_encoder.to(torch.float64)
        adapters = [attn.processor for attn in pipelines.attentions(pipe).values()]
        assert {w.dtype for a in adapters for w in (*a.inner.parameters(), *a.parameters())} == {
            torch.float64
        }
        assert all(a.inner.to_k_ip[0].weight is a.to_k_ip[0].weight for a in adapters)


def _load(pipe: Any) -> None:
    load_adapters(pipe, 0)


def _unload(pipe: Any) -> None:
    pipe.unload_ip_adapter()


@pytest.mark.parametrize("change", [_load, _unload])
def test_adapters_that_come_and_go_are_noticed(
    change: Callable[[Any], None], caplog: pytest.LogCaptureFixture
) -> None:
    """And where what was displaced is put back, it is around what is there now."""
    given = options_of((0,), {})
    pipe, fresh = (build("sd15", *(() if change is _load else (0,))) for _ in range(2))
    call = given if change is _load else {}
    change(fresh)
    untouched = generate(fresh, PROMPTS[:1], **call)
    with installed(fresh) as engine:
        expected = negated(engine, fresh, [DOG], **call)
    with installed(pipe):
        change(pipe)
        with pytest.raises(fn.DisplacedProcessorError, match="4 of 4 processors were replaced"):
            generate(pipe, PROMPTS[:1], **call)
    assert torch.equal(generate(pipe, PROMPTS[:1], **call), untouched)
    with installed(pipe) as engine:
        assert torch.equal(negated(engine, pipe, [DOG], **call), expected)
    pipe = build("sd15", *(() if change is _load else (0,)))
    with installed(pipe, on_displaced="reinstall") as engine:
        change(pipe)
        assert torch.equal(negated(engine, pipe, [DOG], **call), expected)
        assert "processors were replaced" in caplog.text
        assert torch.equal(generate(pipe, PROMPTS[:1], **call), untouched)
    assert torch.equal(generate(pipe, PROMPTS[:1], **call), untouched)


def test_processors_by_hand() -> None:
    pipe = build("sd15", 0)
    call = options_of((0,), {})
    untouched = generate(pipe, PROMPTS[:1], **call)
    bank = fn.ConceptBank.from_prompts(pipe, {"dog": ["dog", "a red dog"], "cat": "cat"})
    with installed(pipe) as engine:
        expected = negated(engine, pipe, [DOG], **call)
    wrap = functools.partial(fn.NegationAttnProcessor, bank, "nag", strengths={"dog": 1.0})
    before = dict(pipe.unet.attn_processors)
    layers = [name for name in before if name.endswith("attn2.processor")]
    pipe.unet.set_attn_processor({**before, **{name: wrap(inner=before[name]) for name in layers}})
    assert error(generate(pipe, PROMPTS[:1], **call), expected) <= 5e-6
    pipe.set_ip_adapter_scale(0.25)
    assert error(generate(pipe, PROMPTS[:1], **call), expected) > 1e-3
    pipe.set_ip_adapter_scale(1.0)
    pipe.unet.set_attn_processor(dict(before))
    made = processors_for(pipe, engine)
    assert all(made[name].inner is before[name] for name in layers)
    assert all(isinstance(made[name], IPAdapterAttnProcessor2_0) for name in layers)
    assert torch.equal(generate(pipe, PROMPTS[:1], **call), untouched)
    with pytest.raises(fn.UnsupportedModelError, match=r"by hand would take the place of an IP-Adapter's"):
        pipe.unet.set_attn_processor(wrap())
    fn.remove(pipe)
    assert torch.equal(generate(pipe, PROMPTS[:1], **call), untouched)
    pipe.unet.set_attn_processor({**before, **{name: wrap(inner=before[name]) for name in layers}})
    pipe.unload_ip_adapter()
    with pytest.raises(fn.DisplacedProcessorError, match="replaced"):
        generate(pipe, PROMPTS[:1])


def test_images_without_an_adapter_are_an_unknown_call() -> None:
    pipe, other = build("sd15", 0), build("sd15")
    bank = fn.ConceptBank.from_prompts(other, {"dog": "dog"})
    other.unet.set_attn_processor(fn.NegationAttnProcessor(bank, "nag"))
    other.unet.encoder_hid_proj = pipe.unet.encoder_hid_proj
    other.unet.config.encoder_hid_dim_type = "ip_image_proj"
    with pytest.raises(NegationNotAppliedError, match="is given images, and the processor"):
        generate(other, PROMPTS[:1], **options_of((0,), {}))


def test_text_and_images_in_one_tensor_are_an_unknown_call() -> None:
    pipe = build("sd15", 0)
    attn = next(iter(pipelines.attentions(pipe).values()))
    processor = fn.NegationAttnProcessor(
        fn.ConceptBank.from_prompts(pipe, {"dog": "dog"}), conditional="all", inner=attn.processor
    )
    with pytest.raises(NegationNotAppliedError, match="in one tensor: they must be a pair"):
        processor(attn, torch.zeros(1, 4, 16), torch.zeros(1, 77 + 4, 32))


def test_windows_mates_and_audits() -> None:
    pipe, records = build("sdxl", 0), list[Record]()
    call = {"steps": 4, **options_of((0,), {"masked": 1})}
    late = Policy({"cat": 1.0}, start=0.75)
    with installed(pipe, "protore") as engine:
        engine.observer = records.append
        with fn.audit(pipe) as audit:
            both = negated(engine, pipe, [Policy({"dog": 1.0}, stop=0.5), late], **call)
        audit.verify()
        assert {record.requests for record in records} == {(None, None, 0, 1)}
        alone = negated(engine, pipe, [None, late], **call)
        assert error(alone[1], both[1]) <= 5e-6


def test_gradients_through_checkpoints() -> None:
    """Layers that are computed again find their rows by the text, which is one of a pair."""
    pipe = build("sd15", 0)
    text = pipe.encode_prompt("a cat", do_classifier_free_guidance=False, **ONE)[0].detach()
    with installed(pipe) as engine:
        engine.set_rows([DOG], [0])
        gradients = []
        for checkpoints in (False, True):
            pipe.unet.train(checkpoints)
            (pipe.unet.enable_gradient_checkpointing if checkpoints else lambda: None)()
            sample = torch.linspace(-1, 1, 4 * 16 * 16).view(1, 4, 16, 16).requires_grad_()
            given = {"image_embeds": [both[1:] for both in images(0)]}
            pipe.unet(sample, 10, text.clone(), added_cond_kwargs=given).sample.square().mean().backward()
            gradients.append(sample.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("masked", [1, pytest.param(0, marks=pytest.mark.full)])
def test_compiled(masked: int) -> None:
    pipe = build("sd15", 0)
    call = options_of((0,), {"masked": masked})
    with installed(pipe) as engine:
        expected = negated(engine, pipe, POLICIES[:1], **call)
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    with installed(pipe) as engine:
        assert error(negated(engine, pipe, POLICIES[:1], **call), expected) <= 5e-6


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))], ids=["copy", "pickle"]
)
def test_copies(copied: Callable[[Any], Any]) -> None:
    """Of an installed one what it wraps, of one by hand one by hand; each with weights of its own."""
    pipe = build("sd15", 0)
    with installed(pipe):
        again = copied(pipe.unet)
        assert {type(p) for p in again.attn_processors.values()} == {
            AttnProcessor2_0,
            IPAdapterAttnProcessor2_0,
        }
    inner = next(iter(pipelines.attentions(pipe).values())).processor
    bank = fn.ConceptBank.from_prompts(pipe, {"dog": "dog"})
    mine = copied(fn.NegationAttnProcessor(bank, "nag", inner=inner))
    assert isinstance(mine, fn.NegationAttnProcessor) and isinstance(mine, IPAdapterAttnProcessor2_0)
    assert mine.inner is not inner and mine.to_k_ip is mine.inner.to_k_ip


def test_defaults_displace_adapters_as_before() -> None:
    pipe = build("sd15", 0)
    with installed(pipe) as engine:
        pipe.unet.set_default_attn_processor()
        with pytest.raises(fn.DisplacedProcessorError):
            negated(engine, pipe, [DOG])
