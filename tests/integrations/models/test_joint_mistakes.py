# SPDX-License-Identifier: Apache-2.0
"""What goes wrong around joint models: it raises, or it is right; a concept is never taken for the prompt."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from diffusers import guiders, modular_pipelines
from diffusers.hooks import LayerSkipConfig
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName
from joint_pipelines import JOINT, build, generate
from pipelines import one_thread  # noqa: F401

import fastnegate as fn
from fastnegate import ConceptBank, Policy, Rule, UnsupportedModelError

STRONG = Rule.preset("nag", family="flux", strength=10.0, norm_limit=5.0, blend=1.0)
VSF = Rule.preset("vsf", strength=3.0)
DOG = Policy({"dog": 1.0})
FRAMED = ("flux2", "klein", "qwen", "zimage")


def bank_of(pipe: Any) -> ConceptBank:
    return ConceptBank.from_prompts(pipe, {"dog": ["a dog"], "red": "red painting"}, templates=["{}"])


def errs(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("kind", ("flux", "sd3"))
def test_a_rule_that_retrieves_is_refused_at_once(kind: str) -> None:
    """It reads the prompt's tokens, and these models' share one softmax with the image."""
    pipe = build(kind)
    with pytest.raises(UnsupportedModelError, match="direction='retrieve' reads the prompt's own tokens"):
        fn.install(pipe, bank_of(pipe), rule="protore_retrieve")
    fn.install(pipe, bank_of(pipe)).remove()  # nothing stayed behind


@pytest.mark.parametrize("kind", (*FRAMED, "flux", "sd3"))
def test_white_space_around_a_concept_is_not_part_of_it(kind: str) -> None:
    """Not of its tokens, where a chat template is around it; and not of its prototype."""
    pipe = build(kind)
    plain = ConceptBank.from_prompts(pipe, {"x": "red dog"}, templates=["a [{}]"])["x"]
    for text in ("red dog\n", "  red dog", "\nred dog \n\n"):
        concept = ConceptBank.from_prompts(pipe, {"x": text}, templates=["a [{}]"])["x"]
        assert torch.equal(concept.roles, plain.roles)
        torch.testing.assert_close(concept.prompt, plain.prompt)
        torch.testing.assert_close(concept.prototypes[0], plain.prototypes[0])
    engine = fn.install(pipe, bank_of(pipe), rule=VSF)
    with engine.batch([Policy(negative_prompt="red dog")]):
        wanted = generate(pipe)
    with engine.batch([Policy(negative_prompt="\nred dog\n")]):
        assert errs(generate(pipe), wanted) <= 5e-6


def test_a_word_that_the_pipeline_takes_out_is_no_part_of_a_concept() -> None:
    pipe = build("flux2")
    plain = ConceptBank.from_prompts(pipe, {"x": "dog"}, templates=["{}"])["x"]
    concept = ConceptBank.from_prompts(pipe, {"x": "[IMG]dog"}, templates=["{}"])["x"]
    assert torch.equal(concept.roles, plain.roles)
    torch.testing.assert_close(concept.prompt, plain.prompt)


@pytest.mark.parametrize(("kind", "word"), [("qwen", "prompt_template_encode"), ("flux2", "system_message")])
def test_a_bank_of_another_template_is_refused(kind: str, word: str) -> None:
    pipe = build(kind)
    bank = bank_of(pipe)
    fn.install(pipe, bank).remove()
    setattr(pipe, word, getattr(pipe, word).replace("\n", " ") + "!" if kind == "qwen" else "be brief")
    with pytest.raises(fn.BankMismatchError, match="frame"):
        fn.install(pipe, bank)


@pytest.mark.parametrize("kind", ("flux", "klein"))
def test_ids_that_do_not_tell_the_image_are_refused(kind: str) -> None:
    """In a loop of one's own, where nobody else tells how many tokens it has."""
    pipe = build(kind)
    engine = fn.install(pipe, bank_of(pipe), rule=STRONG)
    axes, channels = (3, 4) if kind == "flux" else (4, 16)
    given = {
        "hidden_states": torch.zeros(1, 6, channels),
        "encoder_hidden_states": torch.zeros(1, 8, 32 if kind == "flux" else 24),
        "timestep": torch.ones(1),
        "txt_ids": torch.zeros(8, axes),
    }
    if kind == "flux":
        given["pooled_projections"] = torch.zeros(1, 32)
    for ids in (torch.ones(6, axes), torch.cat([torch.ones(2, axes), torch.zeros(4, axes)])):
        engine.set_rows([DOG])
        with pytest.raises(fn.UnsupportedModelError, match="img_ids"):
            pipe.transformer(**given, img_ids=ids)
        engine.clear()
        pipe.transformer(**given, img_ids=ids)  # nobody asks


def _midway(pipe: Any, act: Any) -> None:
    """Once, in the middle of a denoiser call."""
    layers = [m for m in pipe.transformer.modules() if hasattr(m, "processor")]
    done: list[bool] = []

    def hook(*_: Any) -> None:
        if not done:
            done.append(True)
            act()

    layers[-1].register_forward_pre_hook(hook)


@pytest.mark.parametrize("kind", ("klein", "qwen", "zimage", "sd3"))
def test_an_engine_that_is_removed_while_the_denoiser_runs(kind: str) -> None:
    """The layers that are left would take concepts for the prompt."""
    pipe = build(kind)
    engine = fn.install(pipe, bank_of(pipe), rule=STRONG)

    def away() -> None:
        thread = threading.Thread(target=engine.remove)
        thread.start()
        thread.join()

    _midway(pipe, away)
    with pytest.raises(fn.NegationNotAppliedError, match="removed while"), engine.batch([DOG]):
        generate(pipe, num_inference_steps=1)


@pytest.mark.parametrize("kind", ("klein", "qwen", "sd3"))
def test_processors_that_are_replaced_while_the_denoiser_runs(kind: str) -> None:
    """Also at the last step, which no other follows."""
    pipe = build(kind)
    engine = fn.install(pipe, bank_of(pipe), rule=STRONG)

    def replace() -> None:
        for module in pipe.transformer.modules():
            if hasattr(module, "processor"):
                module.set_processor(module.processor.inner)

    _midway(pipe, replace)
    with pytest.raises(fn.DisplacedProcessorError, match="while the denoiser ran"), engine.batch([DOG]):
        generate(pipe, num_inference_steps=1)


@pytest.mark.parametrize("rule", (STRONG, VSF), ids=("nag", "vsf"))
def test_a_kernel_without_masks_refines_concepts_one_by_one(
    rule: Rule, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = build("zimage")
    registry: Any = attention_dispatch._AttentionBackendRegistry
    native = registry._backends[AttentionBackendName.NATIVE]

    def without_masks(*args: Any, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        if attn_mask is not None:
            raise ValueError("`attn_mask` is not supported")
        return native(*args, **options)

    engine = fn.install(pipe, bank_of(pipe), rule=rule)
    both = Policy({"dog": 1.0, "red": 0.5})
    with engine.batch([both]):
        wanted = generate(pipe)
    monkeypatch.setitem(registry._backends, AttentionBackendName._NATIVE_MATH, without_masks)
    pipe.transformer.set_attention_backend("_native_math")
    with engine.batch([both]):
        assert errs(generate(pipe), wanted) <= 5e-6


@pytest.mark.parametrize("kind", ("qwen", "zimage"))
def test_perturbed_attention_has_no_text_in_it(kind: str) -> None:
    """Where a guider gives each token its own value there is nothing to negate."""
    whole = build(kind)
    blocks = {"qwen": modular_pipelines.QwenImageAutoBlocks, "zimage": modular_pipelines.ZImageAutoBlocks}
    made_of = blocks[kind]()
    del made_of.sub_blocks["decode"]
    pipe = made_of.init_pipeline()
    names = pipe.components.keys() & whole.components.keys()
    pipe.update_components(**{name: whole.components[name] for name in names})
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 64, "width": 32} if kind == "zimage" else {"height": 24, "width": 16}
    layers = "layers" if kind == "zimage" else "transformer_blocks"
    config = LayerSkipConfig(
        indices=[0, 1], fqn=layers, skip_attention=False, skip_attention_scores=True, skip_ff=False
    )

    said: list[Tensor] = []  # by the denoiser
    whole.transformer.register_forward_hook(
        lambda _model, _given, made: said.append(made[0][0] if kind == "zimage" else made[0])
    )

    def run() -> list[Tensor]:
        said.clear()
        pipe.update_components(
            guider=guiders.PerturbedAttentionGuidance(
                1.0, perturbed_guidance_config=config, perturbed_guidance_start=0.0,
                perturbed_guidance_stop=1.0,
            )
        )  # fmt: skip
        pipe(
            prompt="a cat", num_inference_steps=2, output="latents",
            generator=torch.Generator().manual_seed(0), **size,
        )  # fmt: skip
        return [*said]

    plain = run()
    assert len(plain) == 3  # the guider begins at its second step
    engine = fn.install(pipe, bank_of(pipe), rule=STRONG)
    assert all(map(torch.equal, run(), plain))
    with engine.batch([Policy({"dog": 1.0}, start=0.5)]):
        _, conditional, perturbed = run()
    engine.remove()
    assert errs(conditional, plain[1]) > 1e-3 and errs(perturbed, plain[2]) <= 5e-6


def test_a_list_of_pictures_is_refused_by_name_and_no_concern_of_a_call_that_asks_for_nothing() -> None:
    pipe = build("zimage")
    engine = fn.install(pipe, bank_of(pipe), rule=STRONG)
    rows = [[torch.zeros(4, 1, 8, 8), torch.zeros(4, 1, 8, 8)]]
    given = {"t": torch.ones(1), "cap_feats": [torch.zeros(32, 16)]}
    engine.set_rows([DOG])
    with pytest.raises(fn.UnsupportedModelError, match="omni"):
        pipe.transformer(x=rows, **given)
    with pytest.raises(fn.UnsupportedModelError, match="controlnet_block_samples"):
        pipe.transformer(x=rows[0][:1], **given, controlnet_block_samples={})
    engine.remove()


def test_every_joint_family_is_here() -> None:
    assert {*FRAMED, "flux", "sd3"} <= {*JOINT}
