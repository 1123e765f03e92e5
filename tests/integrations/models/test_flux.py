# SPDX-License-Identifier: Apache-2.0
"""FLUX.1: what can happen to its processors and its dispatcher. What negation makes of it is in
test_joint.py, with the other joint models."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

import pipelines
from diffusers.models import attention_dispatch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from pipelines import one_thread  # noqa: F401

import fastnegate as fn
from fastnegate import ConceptBank, Policy, Rule
from fastnegate.integrations.diffusers.joint import seam
from fastnegate.integrations.diffusers.joint.seam import SLOT

SIZE = {"height": 24, "width": 16}  # 96 tokens
NAG = Rule.preset("nag", family="flux")
# Words of this tiny vocabulary; what a random model makes of them is not much, so everything is stronger.
STRONG = Rule.preset("nag", family="flux", strength=10.0, norm_limit=5.0, blend=1.0)


def flux(**options: Any) -> Any:
    pipe = pipelines.build("flux", **options)
    with torch.no_grad():  # random models hardly look at their text
        for block in pipe.transformer.transformer_blocks:
            block.attn.add_v_proj.weight *= 30
    return pipe


def bank_of(pipe: Any) -> ConceptBank:
    return ConceptBank.from_prompts(pipe, {"dog": ["dog"], "red": "red"}, templates=["{}"])


def generate(
    pipe: Any, prompts: str | list[str] = "a cat", seeds: tuple[int, ...] = (0,), **options: Any
) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    options = {**SIZE, "num_inference_steps": 2, "max_sequence_length": 512, **options}
    return pipe(prompts, output_type="latent", generator=generators, **options).images


def errs(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


class Other:
    """A processor that nobody knows."""

    _attention_backend = _parallel_config = None

    def __call__(self, *_arguments: Any, **_options: Any) -> Any:
        raise AssertionError("it is not called")


@pytest.mark.parametrize("method", ("nag", "vsf", "protore", "eiup", "casteer"))
def test_without_an_entry_it_is_the_untouched_pipeline(method: str) -> None:
    """To the last bit: nobody asks, None, after the window, and after removal."""
    pipe = flux()
    plain = generate(pipe)
    if method == "casteer":  # its direction belongs to no layer's text
        with pytest.raises(ValueError, match="casteer"):
            fn.install(pipe, bank_of(pipe), rule=method)
        return
    engine = fn.install(pipe, bank_of(pipe), rule=method)
    assert torch.equal(generate(pipe), plain)
    with engine.batch([None]):
        assert torch.equal(generate(pipe), plain)
    with engine.batch([Policy({"dog": 1.0})]):
        assert not torch.equal(generate(pipe), plain)
    engine.remove()
    assert torch.equal(generate(pipe), plain)
    assert all(
        type(m.processor) is FluxAttnProcessor for m in pipe.transformer.modules() if hasattr(m, "processor")
    )


def test_a_negative_prompt_per_request_and_true_guidance() -> None:
    """The unconditional calls of true classifier-free guidance are left alone."""
    pipe = flux()
    guided = {"negative_prompt": "red", "true_cfg_scale": 3.0}
    plain, with_guidance = generate(pipe), generate(pipe, **guided)
    engine = fn.install(pipe, bank_of(pipe), rule=STRONG)
    with engine.batch([Policy(negative_prompt="dog")]):
        text, both = generate(pipe), generate(pipe, **guided)
    with engine.batch([Policy({"dog": 1.0})]):
        assert errs(text, generate(pipe)) <= 5e-6 < 1e-4 < errs(text, plain)
    calls: list[int] = []
    end = engine.watch(lambda record: calls.append(record.call))
    with engine.batch([Policy({"dog": 1.0})]):
        again = generate(pipe, **guided)
    end()
    layers = len(engine.layers)
    assert len(calls) == 2 * layers  # two steps, one of two calls each
    assert errs(both, again) <= 5e-6 < 1e-4 < errs(both, with_guidance)


def test_a_window_ends() -> None:
    pipe = flux()
    engine = fn.install(pipe, bank_of(pipe), rule=STRONG)
    lengths: list[int] = []
    embedder = pipe.transformer.context_embedder
    handle = embedder.register_forward_hook(lambda module, given, made: lengths.append(made.shape[1]))
    with engine.batch([Policy({"dog": 1.0}, stop=0.5)]):
        generate(pipe, num_inference_steps=4, max_sequence_length=64)
    handle.remove()
    assert lengths == [64 + 512, 64 + 512, 64, 64]  # a concept is padded as the model pads


def test_what_the_user_chooses_is_kept() -> None:
    """A backend set while installed acts on calls that are not negated."""
    pipe = flux()
    plain = generate(pipe)
    engine = fn.install(pipe, bank_of(pipe), rule=NAG)
    pipe.transformer.set_attention_backend("_native_math")
    processors = [m.processor for m in pipe.transformer.modules() if hasattr(m, "processor")]
    assert {p._attention_backend.value for p in processors} == {"_native_math"}
    with engine.batch([Policy({"dog": 1.0})]):
        assert not torch.equal(generate(pipe), plain)
    copied = copy.deepcopy(pipe.transformer)
    for module in copied.modules():
        if hasattr(module, "processor"):
            assert type(module.processor) is FluxAttnProcessor
            assert module.processor._attention_backend.value == "_native_math"
    torch.testing.assert_close(generate(pipe), plain, rtol=1e-5, atol=1e-5)


def test_a_choice_outlives_the_engine() -> None:
    pipe = flux()
    engine = fn.install(pipe, bank_of(pipe), rule=NAG)
    pipe.transformer.set_attention_backend("_native_math")
    engine.remove()
    for module in pipe.transformer.modules():
        if hasattr(module, "processor"):
            assert type(module.processor) is FluxAttnProcessor
            assert module.processor._attention_backend.value == "_native_math"


def test_a_layer_past_the_hook_raises() -> None:
    """In a thread that does not know of the denoiser call the text holds concepts, which plain attention
    would take for the prompt's."""
    pipe = flux()
    engine = fn.install(pipe, bank_of(pipe), rule=NAG)
    block = pipe.transformer.single_transformer_blocks[0]
    forward = block.forward

    def elsewhere(*args: Any, **kwargs: Any) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(forward, *args, **kwargs).result()

    plain = generate(pipe)
    block.forward = elsewhere
    assert torch.equal(generate(pipe), plain)  # nobody asks
    with (
        pytest.raises(fn.NegationNotAppliedError, match="without the hook"),
        engine.batch([Policy({"dog": 1.0})]),
    ):
        generate(pipe)
    assert engine.riding == 0
    del block.forward
    with (
        pytest.raises(fn.NegationNotAppliedError, match="without the hook"),
        engine.batch([Policy({"dog": 1.0})]),
    ):
        type(pipe.transformer).forward(pipe.transformer, **arguments(pipe))


def arguments(pipe: Any) -> dict[str, Any]:
    """Of a denoiser call."""
    text, ids = torch.zeros(1, 8, 32), torch.zeros(8, 3)
    image = torch.zeros(1, 4, pipe.transformer.config.in_channels)
    named = {
        "pooled_projections": torch.zeros(1, 32),
        "timestep": torch.ones(1),
        "img_ids": torch.zeros(4, 3),
    }
    return {"hidden_states": image, "encoder_hidden_states": text, "txt_ids": ids, **named}


def test_an_idle_engine_may_be_compiled() -> None:
    torch._dynamo.reset()
    pipe = flux()
    plain = generate(pipe)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager", fullgraph=True)
    fn.install(pipe, bank_of(pipe), rule=NAG)
    assert torch.equal(generate(pipe), plain)
    torch._dynamo.reset()


def test_a_dispatcher_that_does_not_call_us_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = attention_dispatch._AttentionBackendRegistry
    monkeypatch.setattr(seam, "dispatch_attention_fn", lambda query, key, value, **_: query)
    monkeypatch.setattr(registry, "_backends", {k: v for k, v in registry._backends.items() if k is not SLOT})
    pipe = flux()
    with pytest.raises(fn.UnsupportedModelError, match="did not call the backend"):
        fn.install(pipe, bank_of(pipe), rule=NAG)
    assert SLOT not in registry._backends
    assert all(
        type(m.processor) is FluxAttnProcessor for m in pipe.transformer.modules() if hasattr(m, "processor")
    )


def test_a_displaced_processor_raises() -> None:
    pipe = flux()
    engine = fn.install(pipe, bank_of(pipe), rule=NAG)
    pipe.transformer.transformer_blocks[0].attn.set_processor(FluxAttnProcessor())
    with (
        pytest.raises(fn.DisplacedProcessorError, match="processors were replaced"),
        engine.batch([Policy({"dog": 1})]),
    ):
        generate(pipe)


def test_what_is_refused() -> None:
    pipe = flux()
    bank = bank_of(pipe)
    namesake = type("FluxAttnProcessor", (Other,), {})
    pipe.transformer.transformer_blocks[0].attn.set_processor(namesake())
    with pytest.raises(fn.UnsupportedModelError, match="cannot be wrapped"):
        fn.install(pipe, bank, rule=NAG)
    pipe.transformer.transformer_blocks[0].attn.set_processor(Other())
    with pytest.raises(fn.UnsupportedModelError, match=r"Other.*supported are FluxAttnProcessor"):
        fn.install(pipe, bank, rule=NAG)
    pipe = flux()
    engine = fn.install(pipe, bank_of(pipe), rule=NAG)
    with (
        pytest.raises(fn.UnsupportedModelError, match="joint_attention_kwargs"),
        engine.batch([Policy({"dog": 1})]),
    ):
        generate(pipe, joint_attention_kwargs={"ip_adapter_masks": None})
