# SPDX-License-Identifier: Apache-2.0
"""Models whose image and text attend to each other: against literal passes of their own, in plain torch."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

pytest.importorskip("diffusers")

import pipelines
from diffusers import guiders, modular_pipelines
from diffusers.models import attention_processor
from diffusers.models.transformers import (
    transformer_flux,
    transformer_flux2,
    transformer_qwenimage,
    transformer_z_image,
)
from diffusers.modular_pipelines.qwenimage import prompt_templates
from joint_pipelines import JOINT, build, generate
from pipelines import one_thread  # noqa: F401

import fastnegate as fn
from fastnegate import ConceptBank, Policy, Rule
from fastnegate.integrations.diffusers.contract import encoder_of

NAG = Rule.preset("nag", family="flux")
# What a random model makes of a few words is not much, so everything is stronger.
STRONG = Rule.preset("nag", family="flux", strength=10.0, norm_limit=5.0, blend=1.0)
VSF = Rule.preset("vsf", strength=3.0)
# One family for each way to board.
MECHANISMS = ("flux", "klein_edit", "qwen", "zimage", "sd3")


def bank_of(pipe: Any) -> ConceptBank:
    return ConceptBank.from_prompts(pipe, {"dog": ["a dog"], "red": "red painting"}, templates=["{}"])


def errs(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


class Literal:
    """The transformer on two rows, of the prompt and of the concept, of which the first one counts: its image
    attends to the prompt, that of the second to the concept, and both get what the rule makes of it.

    Args:
        text: of the concept, [T, C].
        seen: which of its tokens are there at all, bool [T].
    """

    def __init__(self, pipe: Any, rule: Rule, text: Tensor, seen: Tensor) -> None:
        self.pipe, self.rule, self.text, self.seen = pipe, rule, text, seen
        self.layout: tuple[int, int, int, int] = (0, 0, 0, 0)  # begin of text and image, lengths of both
        self.masks = torch.ones(2, 0, dtype=torch.bool)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        kind, model = type(self.pipe).__name__, self.pipe.transformer
        plain = model.forward
        home: Any = next(
            module
            for name, module in {
                "Flux2": transformer_flux2,
                "Flux": transformer_flux,
                "Qwen": transformer_qwenimage,
                "ZImage": transformer_z_image,
                "StableDiffusion3": attention_processor,
            }.items()
            if kind.startswith(name)
        )
        double = getattr(self, "zimage" if kind.startswith("ZImage") else "doubled")
        with pytest.MonkeyPatch.context() as patch:
            if home is attention_processor:
                patch.setattr(home, "F", _Functions(self.of_sdpa))
            else:
                patch.setattr(home, "dispatch_attention_fn", self.attend)
            patch.setattr(model, "forward", lambda *args, **given: (double(plain, *args, **given),))
            yield

    def doubled(self, plain: Any, **given: Any) -> Tensor:
        image, text = given["hidden_states"], given["encoder_hidden_states"]
        prompt, batched = text.shape[1], {"hidden_states": torch.cat([image] * 2)}
        length = max(prompt, len(self.text))
        rows = [torch.cat([t, t.new_zeros(length - len(t), t.shape[1])]) for t in (text[0], self.text)]
        batched["encoder_hidden_states"] = torch.stack(rows)
        for name in ("timestep", "pooled_projections", "guidance"):
            if given.get(name) is not None:
                batched[name] = torch.cat([given[name]] * 2)
        if "img_shapes" in given:
            batched["img_shapes"] = given["img_shapes"] * 2
        self.masks = torch.zeros(2, length, dtype=torch.bool)
        self.masks[0, :prompt] = True
        self.masks[1, : len(self.seen)] = self.seen
        if image.dim() == 4:  # of SD3, whose image comes first
            tokens = image.shape[2] * image.shape[3]
            self.layout = (tokens, 0, length, tokens)
        else:
            target = image.shape[1]
            if "img_shapes" in given:
                target = math.prod(given["img_shapes"][0][0])
            elif "img_ids" in given:
                ids = given["img_ids"]
                target = int(((ids[0] if ids.dim() == 3 else ids)[:, 0] == 0).sum())
            self.layout = (0, length, length, target)
        made: Tensor = plain(**{**given, **batched})[0][:1]
        return made

    def zimage(self, plain: Any, x: Any, t: Tensor, cap_feats: Any, **given: Any) -> list[Tensor]:
        tokens = math.prod(x[0].shape[1:]) // 4
        padded = [len(text) + -len(text) % 32 for text in (cap_feats[0], self.text)]
        self.masks = torch.ones(2, max(padded), dtype=torch.bool)
        for row, length in enumerate(padded):
            self.masks[row, length:] = False
        if not self.seen.all():
            self.masks[1] = False
            self.masks[1, : len(self.seen)] = self.seen
        self.layout = (tokens, 0, max(padded), tokens)
        made = plain([x[0]] * 2, torch.cat([t] * 2), [cap_feats[0], self.text], **given)
        images: list[Tensor] = made[0][:1]
        return images

    def of_sdpa(self, query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        return self.attend(*(t.transpose(1, 2) for t in (query, key, value))).transpose(1, 2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        """[2, S, H, D]"""
        q, k, v = (t.transpose(1, 2).double() for t in (query, key, value))
        text_at, image_at, length, image = self.layout
        logits = (q @ k.mT) * q.shape[-1] ** -0.5
        whole = k.shape[2] >= length + image
        if whole or k.shape[2] == length:  # or the text alone, in a refiner
            at = text_at if whole else 0
            logits[..., at : at + length] = logits[..., at : at + length].masked_fill(
                ~self.masks[:, None, None], -torch.inf
            )
        out = (logits.softmax(-1) @ v).transpose(1, 2)
        if whole:
            guided, beside = slice(image_at, image_at + image), slice(text_at + length + image, None)
            if text_at == 0:  # a picture to go by is the prompt's, and not guided
                out[1, beside] = out[0, beside]
            if self.rule.combine == "joint":
                out[:, guided] = self.joint(logits, v, slice(text_at, text_at + length), guided)
            else:
                out[:, guided] = self.mixed(out[:1, guided], out[1:, guided])
        return out.to(query.dtype)

    def mixed(self, z: Tensor, f: Tensor) -> Tensor:
        """Published NAG."""
        rule = self.rule
        y = z + rule.strength * (z - f)
        y = y * (rule.norm_limit * self.size(z) / self.size(y)).clamp(max=1)
        return rule.blend * y + (1 - rule.blend) * z

    def joint(self, logits: Tensor, value: Tensor, text: slice, guided: slice) -> Tensor:
        """Published VSF: one softmax over the keys of both rows; values of the concept change their sign."""
        both = torch.cat([logits[:1, :, guided], logits[1:, :, guided, text] - self.rule.logit_bias], -1)
        values = torch.cat([value[:1], -self.rule.strength * value[1:, :, text]], 2)
        return (both.softmax(-1) @ values).transpose(1, 2)

    @staticmethod
    def size(x: Tensor) -> Tensor:
        return x.abs().sum((2, 3), keepdim=True)


class _Functions:
    """`torch.nn.functional`, but for its attention."""

    def __init__(self, attend: Any) -> None:
        self.scaled_dot_product_attention = attend

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.nn.functional, name)


def concept(pipe: Any, text: str, rule: Rule) -> tuple[Tensor, Tensor]:
    """The text as the pipeline encodes a prompt, and which tokens the rule reads."""
    kind = type(pipe).__name__
    given: dict[str, Any] = {"device": torch.device("cpu")}
    if kind.startswith("StableDiffusion3"):
        given |= {"prompt_2": None, "prompt_3": None, "do_classifier_free_guidance": False}
    elif kind.startswith("ZImage"):
        given["do_classifier_free_guidance"] = False
    elif kind.startswith("FluxP") or kind.startswith("FluxK"):
        given["prompt_2"] = None
    encoded = encoder_of(pipe).encode_prompt(prompt=[text], **given)[0][0]
    seen = torch.ones(len(encoded), dtype=torch.bool)
    if rule.tokens == "content":
        bank = ConceptBank.from_prompts(pipe, {"it": text}, templates=["{}"])
        words = bank["it"].prompt[bank["it"].roles == 1]
        seen = torch.isclose(encoded[:, None], words[None].to(encoded), rtol=1e-4, atol=1e-5).all(-1).any(1)
        # Two words, of one encoder or of two, and nothing of what is around them.
        assert seen.sum() == len(words) == (4 if kind.startswith("StableDiffusion3") else 2)
    return encoded.detach(), seen


@pytest.mark.parametrize("rule", (NAG, STRONG, VSF), ids=("published", "strong", "vsf"))
@pytest.mark.parametrize("kind", JOINT)
def test_it_is_the_literal_passes(kind: str, rule: Rule) -> None:
    _check_literal(kind, rule)


@pytest.mark.parametrize("size", [(40, 8), (16, 32)])
@pytest.mark.parametrize("kind", MECHANISMS)
def test_at_other_sizes_and_lengths_of_text(kind: str, size: tuple[int, int]) -> None:
    height, width = size
    scale = 4 if kind == "zimage" else 1  # 32 tokens of its image, or a multiple
    _check_literal(
        kind, STRONG, "a photo of a dog and a red cat in it", height=scale * height, width=scale * width
    )


def _check_literal(kind: str, rule: Rule, prompt: str = "a cat", **options: Any) -> None:
    pipe = build(kind)
    plain = generate(pipe, prompt, **options)
    with Literal(pipe, rule, *concept(pipe, "a dog", rule)).at_work():
        expected = generate(pipe, prompt, **options)
    with fn.negate(pipe, bank_of(pipe), method=rule) as handle:
        handle.engine.set_requests([Policy({"dog": 1.0})])
        output = generate(pipe, prompt, **options)
    assert errs(output, expected) <= 5e-6 < 20 * 5e-6 < errs(plain, expected)
    assert torch.equal(generate(pipe, prompt, **options), plain)


@pytest.mark.parametrize("kind", ("flux", "klein", "qwen"))
def test_two_graphs_whatever_is_negated(kind: str) -> None:
    """One with riders and one without, over policies, concepts, strengths, windows and steps."""
    torch._dynamo.reset()
    pipe, counter = build(kind), CompileCounter()
    bank = bank_of(pipe)
    eager = build(kind)
    pipe.transformer = torch.compile(pipe.transformer, backend=counter, fullgraph=True)
    engine = fn.install(pipe, bank, rule=STRONG, max_tokens=1024)
    reference = fn.install(eager, bank, rule=STRONG)
    policies: list[Policy | None] = [
        Policy({"dog": 1.0}),
        None,
        Policy({"red": 0.5}),
        Policy({"dog": 0.3, "red": 0.7}),
        Policy({"dog": 1.0}, stop=0.5),
        Policy({"dog": 2.0}, start=0.5),
        Policy({"red": 1.0}),
    ]
    for policy in policies:
        with engine.batch([policy]), reference.batch([policy]):
            assert errs(generate(pipe, num_inference_steps=3), generate(eager, num_inference_steps=3)) <= 5e-6
    assert counter.frame_count == 2
    torch._dynamo.reset()


def test_there_may_be_more_room_than_a_model_has_places() -> None:
    """Compiled code has columns in which nobody rides; the model's table of rotations may be shorter."""
    torch._dynamo.reset()
    pipe, eager = build("zimage"), build("zimage")
    bank = bank_of(pipe)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    assert pipe.transformer.rope_embedder.axes_lens[0] < 512
    engine, reference = (fn.install(p, bank, rule=STRONG, max_tokens=512) for p in (pipe, eager))
    with engine.batch([Policy({"dog": 1.0})]), reference.batch([Policy({"dog": 1.0})]):
        output, expected = (generate(p, num_inference_steps=1) for p in (pipe, eager))
    assert errs(output, expected) <= 5e-6
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", MECHANISMS)
def test_rows_have_policies_of_their_own(kind: str) -> None:
    """Also beside prompts of other lengths, whose padding is masked."""
    pipe = build(kind)
    engine = fn.install(pipe, bank_of(pipe), rule=STRONG)
    policies = [Policy({"dog": 1.0, "red": 0.5}), Policy({"red": 1.0}, stop=0.5), None]
    prompts, seeds = ["a cat and a dog in it of red", "a dog", "a photo of it"], (0, 1, 2)
    with engine.batch(policies):
        together = generate(pipe, prompts, seeds)
    for row, (policy, prompt, seed) in enumerate(zip(policies, prompts, seeds)):
        with engine.batch([policy]):
            alone = generate(pipe, prompt, (seed,))
        assert errs(together[row : row + 1], alone) <= 5e-6
    with engine.batch([policies[0], policies[0], None]):
        other = generate(pipe, prompts, seeds)
    assert errs(other[:1], together[:1]) <= 5e-6 and errs(other[1:2], together[1:2]) > 1e-4


GUIDED: dict[str, dict[str, Any]] = {
    "qwen": {"true_cfg_scale": 3.0, "negative_prompt": "red"},
    "zimage": {"guidance_scale": 3.0, "negative_prompt": "red"},
    "sd3": {"guidance_scale": 3.0, "negative_prompt": "red"},
    "klein": {"guidance_scale": 3.0},
}


@pytest.mark.parametrize("kind", GUIDED)
def test_with_guidance_the_conditional_rows_alone_are_negated(kind: str) -> None:
    """Whether both kinds of rows come in one call, in which order, or in a call each: what is negated is what
    the literal passes make of the prompt, beside an unconditional row that is left alone."""
    pipe = build(kind)
    if kind == "klein":
        pipe.register_to_config(is_distilled=False)
    options = {"num_inference_steps": 1, **GUIDED[kind]}
    bank = bank_of(pipe)
    guided = generate(pipe, **options)
    unguided = {name: 1.0 for name in options if name.endswith("scale")}
    if kind == "zimage":
        unguided = {"guidance_scale": 0.0}
    plain = generate(pipe, num_inference_steps=1, **unguided)
    engine = fn.install(pipe, bank, rule=STRONG)
    with engine.batch([Policy({"dog": 1.0})]):
        both, negated = generate(pipe, **options), generate(pipe, num_inference_steps=1, **unguided)
    # One step is linear in what the model says, and guidance in its two kinds of rows.
    if kind == "qwen":  # but for a norm: here the direction alone can be told
        assert errs(both, guided) > 1e-3
    else:
        factor = 4.0 if kind == "zimage" else 3.0
        assert errs(both - guided, factor * (negated - plain)) <= 1e-4
    calls: list[int] = []
    end = engine.watch(lambda record: calls.extend(record.requests))
    with engine.batch([Policy({"dog": 1.0})]):
        generate(pipe, **options)
    end()
    assert {request for request in calls if request is not None} == {0}


@pytest.mark.parametrize("kind", MECHANISMS)
def test_a_window_ends_and_then_it_is_the_plain_model(kind: str) -> None:
    pipe = build(kind)
    plain: list[Tensor] = []
    seen: list[Tensor] = []
    watch = {"callback_on_step_end": lambda _pipe, _i, _t, given: (seen.append(given["latents"]), {})[1]}
    generate(pipe, num_inference_steps=4, **watch)
    plain, seen = seen, []
    engine = fn.install(pipe, bank_of(pipe), rule=STRONG)
    late, early = Policy({"dog": 1.0}, start=0.5), Policy({"dog": 1.0}, stop=0.5)
    watch = {"callback_on_step_end": lambda _pipe, _i, _t, given: (seen.append(given["latents"]), {})[1]}
    with engine.batch([late]):
        generate(pipe, num_inference_steps=4, **watch)
    assert torch.equal(seen[1], plain[1]) and not torch.equal(seen[2], plain[2])
    widths: list[int] = []
    linear = next(
        m
        for n, m in pipe.transformer.named_modules()
        if n.endswith(("add_k_proj", "layers.0.attention.to_k"))
    )
    handle = linear.register_forward_hook(lambda _module, _given, made: widths.append(made.shape[1]))
    with engine.batch([early]):
        generate(pipe, num_inference_steps=4)
    handle.remove()
    per_step = len(widths) // 4
    assert min(widths[: 2 * per_step]) > max(widths[2 * per_step :])


@pytest.mark.parametrize("kind", MECHANISMS)
def test_audit_tells_shares_on_the_image_s_own_grid(kind: str) -> None:
    pipe = build(kind)
    engine = fn.install(pipe, bank_of(pipe), rule=NAG)
    seen = []
    engine.watch(seen.append)
    with engine.batch([Policy({"dog": 1.0}), None]), fn.audit(pipe) as audit:
        made = generate(pipe, ["a cat", "a dog"], (0, 1))
    tokens = {"flux": 96, "klein_edit": 96, "qwen": 24, "zimage": 128, "sd3": 96}[kind]
    assert {record.layer for record in seen} == {*engine.layers}
    for record in seen:
        statistics = record.statistics
        assert 0 < statistics.concept_share.item() < 1 and (statistics.text_share > 0).all()
        assert statistics.heat.shape == (1, tokens)
    assert audit.report()[0]["concept"] == "dog" and len(made) == 2


@pytest.mark.parametrize("kind", MECHANISMS)
def test_more_tokens_than_there_is_room_for(kind: str) -> None:
    pipe = build(kind)
    steps: list[int] = []
    pipe.transformer.register_forward_pre_hook(lambda *_: steps.append(1))
    engine = fn.install(pipe, bank_of(pipe), rule=STRONG, max_tokens=3)
    with (
        pytest.raises(fn.NegationNotAppliedError, match="max_tokens=3"),
        engine.batch([Policy({"dog": 1.0})]),
    ):
        generate(pipe)
    assert not steps
    engine.remove()
    for wrong in (0, True, 1.5):
        with pytest.raises(ValueError, match="max_tokens="):
            fn.install(pipe, bank_of(pipe), max_tokens=wrong)


def test_max_tokens_is_for_riders() -> None:
    pipe = pipelines.build("sd15")
    bank = ConceptBank.from_prompts(pipe, {"dog": "dog"})
    with pytest.raises(ValueError, match="joint models alone"):
        fn.install(pipe, bank, max_tokens=8)


@pytest.mark.parametrize("kind", MECHANISMS)
def test_copies_and_removal_leave_nothing(kind: str) -> None:
    pipe = build(kind)
    plain = generate(pipe)
    kinds = [type(module) for module in pipe.transformer.modules()]
    processors = [type(m.processor) for m in pipe.transformer.modules() if hasattr(m, "processor")]
    engine = fn.install(pipe, bank_of(pipe))
    assert engine.rule.name == "nag"
    copied = copy.deepcopy(pipe.transformer)
    engine.remove()
    for model in (copied, pipe.transformer):
        assert [type(module) for module in model.modules()] == kinds
        assert [type(m.processor) for m in model.modules() if hasattr(m, "processor")] == processors
    assert torch.equal(generate(pipe), plain)


@pytest.mark.parametrize("kind", ("klein", "qwen", "zimage", "sd3"))
def test_what_it_does_not_know_is_refused(kind: str) -> None:
    pipe = build(kind)
    engine = fn.install(pipe, bank_of(pipe))
    word = "attention_kwargs" if kind in ("qwen", "klein") else "joint_attention_kwargs"
    with (
        pytest.raises(fn.UnsupportedModelError, match="attention_kwargs"),
        engine.batch([Policy({"dog": 1})]),
    ):
        generate(pipe, **{word: {"ip_adapter_masks": None}})
    assert engine.riding == 0


@pytest.mark.parametrize("method", ("protore", "eiup", "nasa", "vsf", "ong"))
@pytest.mark.parametrize("kind", MECHANISMS)
def test_every_rule_acts(kind: str, method: str) -> None:
    pipe = build(kind)
    plain = generate(pipe)
    rule = Rule.preset(method, threshold=-1.0) if method == "protore" else Rule.preset(method)
    with fn.negate(pipe, bank_of(pipe), method=rule) as handle:
        handle.engine.set_requests([Policy({"dog": 1.0})])
        assert errs(generate(pipe), plain) > 1e-4
    assert torch.equal(generate(pipe), plain)


def test_words_stand_where_they_stood_whatever_their_row_mates_have() -> None:
    """Padding before a text moves its words, and all rows of a batch have one set of positions."""
    pipe = build("flux2")
    engine = fn.install(pipe, bank_of(pipe), rule=VSF)
    engine.bank.update("own", torch.zeros(3, engine.bank.width).normal_(generator=torch.manual_seed(0)))
    policies = [
        Policy({"dog": 1.0}),
        Policy({"red": 1.0, "own": 1.0}),
        Policy(negative_prompt="a painting of a cat"),
    ]
    prompts, seeds = ["a cat", "a dog", "a photo"], (0, 1, 2)
    with engine.batch(policies):
        together = generate(pipe, prompts, seeds)
    for row, policy in enumerate(policies):
        with engine.batch([policy]):
            alone = generate(pipe, prompts[row], seeds[row : row + 1])
        if row != 1:  # embeddings of no text stand where the words beside them do
            assert errs(together[row : row + 1], alone) <= 5e-6
        else:
            assert errs(together[row : row + 1], alone) <= 1e-2


FURTHER = ("flux_img2img", "flux_inpaint", "flux_fill", "qwen_img2img", "zimage_img2img", "sd3_img2img")


@pytest.mark.parametrize("kind", FURTHER)
def test_further_pipelines_of_a_family(kind: str) -> None:
    pipe = build(kind)
    plain = generate(pipe)
    engine = fn.install(pipe, bank_of(pipe), rule=STRONG)
    assert torch.equal(generate(pipe), plain)
    with engine.batch([Policy({"dog": 1.0})]):
        assert errs(generate(pipe), plain) > 1e-4
    engine.remove()


def test_skip_layer_guidance_has_a_call_of_conditional_rows() -> None:
    pipe = build("sd3")
    options = {
        "guidance_scale": 3.0,
        "negative_prompt": "red",
        "skip_guidance_layers": [1],
        "num_inference_steps": 8,
    }
    plain = generate(pipe, **options)
    engine = fn.install(pipe, bank_of(pipe), rule=STRONG)
    rows: list[tuple[int | None, ...]] = []
    end = engine.watch(lambda record: rows.append(record.requests))
    with engine.batch([Policy({"dog": 1.0})]):
        assert errs(generate(pipe, **options), plain) > 1e-4
    end()
    assert {*rows} == {(None, 0), (0,)}


@pytest.mark.parametrize("kind", ("qwen", "zimage"))
def test_made_of_blocks_it_is_the_whole_pipeline(kind: str) -> None:
    """Whose guider calls the denoiser once for each kind of rows."""
    whole = build(kind)
    if kind == "qwen":  # which the blocks have, too
        whole.prompt_template_encode = prompt_templates.QWENIMAGE_PROMPT_TEMPLATE
        whole.prompt_template_encode_start_idx = prompt_templates.QWENIMAGE_PROMPT_TEMPLATE_START_IDX
    blocks = {"qwen": modular_pipelines.QwenImageAutoBlocks, "zimage": modular_pipelines.ZImageAutoBlocks}
    made_of = blocks[kind]()
    del made_of.sub_blocks["decode"]
    pipe = made_of.init_pipeline()
    names = pipe.components.keys() & whole.components.keys()
    pipe.update_components(**{name: whole.components[name] for name in names})
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 64, "width": 32} if kind == "zimage" else {"height": 24, "width": 16}

    def by_blocks() -> Tensor:
        pipe.update_components(guider=guiders.ClassifierFreeGuidance(4.0 if kind == "zimage" else 3.0))
        made: Tensor = pipe(
            prompt="a cat", negative_prompt="red", num_inference_steps=2, output="latents",
            generator=torch.Generator().manual_seed(0), **size,
        )  # fmt: skip
        return made

    def by_whole() -> Tensor:
        made = generate(whole, **GUIDED[kind])
        return whole._unpack_latents(made, 24, 16, whole.vae_scale_factor) if kind == "qwen" else made

    plain = by_whole()
    assert errs(by_blocks(), plain) <= 5e-6
    outputs = []
    for which, run in ((whole, by_whole), (pipe, by_blocks)):
        engine = fn.install(which, bank_of(whole), rule=STRONG)
        with engine.batch([Policy({"dog": 1.0})]):
            outputs.append(run())
        engine.remove()
    assert errs(outputs[1], outputs[0]) <= 5e-6 < 1e-3 < errs(plain, outputs[0])
