# SPDX-License-Identifier: Apache-2.0
"""Pipelines made of blocks, whose guiders call the denoiser once for each kind of rows: what has the prompt's
text is negated, whatever a guider makes of it. Against NAG written out in torch."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")

import pipelines
from diffusers import guiders
from diffusers.hooks import LayerSkipConfig
from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks, Wan22Blocks, WanBlocks
from diffusers.modular_pipelines.wan import encoders
from pipelines import one_thread  # noqa: F401

import fastnegate as fn
from fastnegate import ConceptBank, Policy, Rule
from fastnegate.integrations.diffusers.contract import denoisers

NAG = Rule.preset("nag", strength=4.0, norm_limit=2.5, blend=0.5)
STEPS = 4


def _skipping(blocks: str, **options: Any) -> Any:
    return LayerSkipConfig(indices=[0], fqn=blocks, **options)


def _skip_layers(blocks: str, scale: float = 2.0, **options: Any) -> Any:
    return guiders.SkipLayerGuidance(
        scale,
        skip_layer_config=_skipping(blocks),
        skip_layer_guidance_start=0.0,
        skip_layer_guidance_stop=1.0,
        **options,
    )


def _perturbed(blocks: str, scale: float = 2.0) -> Any:
    config = _skipping(blocks, skip_attention=False, skip_attention_scores=True, skip_ff=False)
    return guiders.PerturbedAttentionGuidance(
        scale, perturbed_guidance_config=config, perturbed_guidance_start=0.0, perturbed_guidance_stop=1.0
    )


GUIDERS: dict[str, Callable[[str], Any]] = {
    "CFG": lambda blocks: guiders.ClassifierFreeGuidance(2.0),
    "CFG, rescaled, for a while": lambda blocks: guiders.ClassifierFreeGuidance(
        2.0, 0.7, start=0.25, stop=0.75
    ),
    "CFG, off": lambda blocks: guiders.ClassifierFreeGuidance(1.0),
    "CFG-Zero*": lambda blocks: guiders.ClassifierFreeZeroStarGuidance(2.0),
    "APG": lambda blocks: guiders.AdaptiveProjectedGuidance(2.0),
    "APG mix": lambda blocks: guiders.AdaptiveProjectedMixGuidance(
        2.0, adaptive_projected_guidance_scale=2.0, adaptive_projected_guidance_start_step=1
    ),
    "tangential": lambda blocks: guiders.TangentialClassifierFreeGuidance(2.0),
    "skip layer": lambda blocks: _skip_layers(blocks),
    "skip layer, without CFG": lambda blocks: _skip_layers(blocks, 1.0),
    "skip layer, CFG for a while": lambda blocks: _skip_layers(blocks, stop=0.5),
    "PAG": lambda blocks: _perturbed(blocks),
    "PAG, without CFG": lambda blocks: _perturbed(blocks, 1.0),
    "smoothed energy": lambda blocks: guiders.SmoothedEnergyGuidance(
        2.0,
        seg_guidance_config=guiders.smoothed_energy_guidance.SmoothedEnergyGuidanceConfig(
            indices=[0], fqn=blocks
        ),
    ),
    "auto": lambda blocks: guiders.AutoGuidance(2.0, auto_guidance_config=_skipping(blocks)),
}


NOT_OF_WAN = ("CFG, off", "PAG", "PAG, without CFG")  # diffusers' own blocks fail


class LiteralNag:
    """diffusers' attention to text, with NAG in it where the text is the prompt's."""

    def __init__(self, prompt: Tensor, concept: Tensor, rule: Rule) -> None:
        self.prompt, self.concept, self.rule, self.calls = prompt, concept, rule, 0

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any
    ) -> Tensor:
        query, text, rule = attn.to_q(hidden_states), encoder_hidden_states, self.rule

        def attend(text: Tensor) -> Tensor:
            parts = query, attn.to_k(text), attn.to_v(text)
            if attn.norm_q is not None:
                parts = attn.norm_q(parts[0]), attn.norm_k(parts[1]), parts[2]
            q, k, v = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in parts)
            return ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)

        z = attend(text)
        if text.shape == self.prompt.shape and torch.equal(text, self.prompt):
            self.calls += 1
            y = z + rule.strength * (z - attend(self.concept))
            y = y * (rule.norm_limit * z.abs().sum(-1, True) / y.abs().sum(-1, True)).clamp(max=1)
            z = rule.blend * y + (1 - rule.blend) * z
        return attn.to_out[0](z)


BLOCKS_OF = {"sdxl": StableDiffusionXLAutoBlocks, "wan": WanBlocks, "wan22": Wan22Blocks}
ENCODED = {"sdxl": {}, "wan": {"max_sequence_length": 512}, "wan22": {"max_sequence_length": 512}}


def build(kind: str) -> tuple[Any, Tensor]:
    """Made of blocks, around the parts of the whole pipeline, and what that makes of the prompt."""
    whole, pipe = pipelines.build(kind), BLOCKS_OF[kind]().init_pipeline()
    names = pipe.components.keys() & whole.components.keys()
    pipe.update_components(**{name: whole.components[name] for name in names if whole.components[name]})
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        return pipe, whole.encode_prompt("a cat", do_classifier_free_guidance=False, **ENCODED[kind])[0]


def run(pipe: Any, guider: str) -> Tensor:
    of_wan = "Wan" in type(pipe).__name__
    blocks = "blocks" if of_wan else "mid_block.attentions.0.transformer_blocks"
    names = [name for name in ("guider", "guider_2") if name in pipe.components]
    # New ones: a used one remembers its last step.
    pipe.update_components(**{name: GUIDERS[guider](blocks) for name in names})
    kind = {"num_frames": 5, "output_type": "pt"} if of_wan else {"output_type": "latent"}
    return pipe(
        prompt="a cat", negative_prompt="red", num_inference_steps=STEPS, height=32, width=32,
        generator=torch.Generator().manual_seed(0), output="latents", **kind,
    )  # fmt: skip


def error(actual: Tensor, wanted: Tensor) -> float:
    return float((actual - wanted).abs().max() / wanted.abs().max())


def cases(*kinds: str) -> list[Any]:
    """All but a few with `-m full` alone."""
    chosen = {
        ("sdxl", "CFG"), ("sdxl", "tangential"), ("sdxl", "smoothed energy"),
        ("sdxl", "skip layer, without CFG"), ("wan", "skip layer, CFG for a while"), ("wan22", "CFG"),
    }  # fmt: skip
    return [
        pytest.param(kind, guider, marks=() if (kind, guider) in chosen else pytest.mark.full)
        for kind in kinds
        for guider in GUIDERS
        if kind == "sdxl" or guider not in NOT_OF_WAN
    ]


@pytest.mark.parametrize(("kind", "guider"), cases("sdxl", "wan", "wan22"))
def test_what_has_the_prompt_for_its_text_is_negated(
    kind: str, guider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every step, and nothing else."""
    monkeypatch.setattr(encoders, "ftfy", types.SimpleNamespace(fix_text=str), raising=False)
    pipe, prompt = build(kind)
    bank = ConceptBank.from_prompts(pipe, {"dog": "dog"}, templates=["{}"])
    untouched = run(pipe, guider)
    engine = fn.install(pipe, bank, rule=NAG)
    assert torch.equal(run(pipe, guider), untouched)
    records: list[Any] = []
    engine.observer = records.append
    with engine.batch([Policy({"dog": 1.0})]):
        actual = run(pipe, guider)
    assert engine.call == 1
    assert {record.step for record in records} == {*range(STEPS)}
    assert torch.equal(run(pipe, guider), untouched)
    engine.remove()
    assert torch.equal(run(pipe, guider), untouched)

    literals = []
    for model in denoisers(pipe).values():
        project = model.condition_embedder.text_embedder if kind != "sdxl" else nn.Identity()
        literals.append(LiteralNag(project(prompt), project(bank["dog"].prompt[None]), NAG))
        for name, attn in model.named_modules():
            if name.endswith("attn2"):
                attn.set_processor(literals[-1])
    wanted = run(pipe, guider)
    assert sum(literal.calls for literal in literals) == len(records)
    assert error(actual, wanted) <= 5e-6 < 20 * 5e-6 < error(actual, untouched)
