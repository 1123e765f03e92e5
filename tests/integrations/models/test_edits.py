# SPDX-License-Identifier: Apache-2.0
"""Edits in pipelines: each acts, lets negation act, refuses what it does not fit, and leaves nothing."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")

import diffusers
import joint_pipelines
from pipelines import attentions, build, generate, one_thread  # noqa: F401

import fastnegate as fn
from fastnegate import ConceptBank, NegationNotAppliedError, UnsupportedModelError

PROMPTS = ["a cat and a dog in red", "a painting of a cat"]


def trained(pipe: Any) -> dict[str, Tensor]:
    """The denoiser as if it had been trained on something."""
    noise = torch.Generator().manual_seed(5)
    state = {name: weight.detach() for name, weight in pipe.unet.named_parameters()}
    return {name: w + 0.05 * torch.randn(w.shape, generator=noise) for name, w in state.items()}


EDITS: dict[str, Callable[..., Any]] = {
    "adavd": lambda pipe, c="dog": fn.edits.adavd(pipe, c),
    "safree": lambda pipe, c="dog": fn.edits.safree(pipe, c, margin=0.0, middle=-9.0),
    "sld": lambda pipe, c="dog": fn.edits.sld(pipe, c, "max"),
    "crg": lambda pipe, c="dog": fn.edits.crg(pipe, c, threshold=-100.0),
    "uce": lambda pipe, c="dog": fn.edits.uce(pipe, c, "cat"),
    "rece": lambda pipe, c="dog": fn.edits.rece(pipe, c, ridge=0.1),
    "task_vector": lambda pipe, _c="dog": fn.edits.task_vector(pipe, trained(pipe)),
}
OF_CONCEPTS = [name for name in EDITS if name != "task_vector"]
by_edit = pytest.mark.parametrize("edit", EDITS)


def draw(pipe: Any, **options: Any) -> Tensor:
    made: Tensor = generate(pipe, PROMPTS, **{"height": 16, "width": 16, "steps": 1, **options})
    return made


def bits(pipe: Any) -> dict[str, Any]:
    """All that an edit may touch."""
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in pipe.unet.modules()]
    weights = [w.detach().clone() for w in pipe.unet.parameters()]
    return {"classes": (type(pipe), type(pipe.unet)), "hooks": hooks, "weights": weights}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    equal = all(torch.equal(x, y) for x, y in zip(a["weights"], b["weights"]))
    return equal and a["hooks"] == b["hooks"] and all(x is y for x, y in zip(a["classes"], b["classes"]))


@by_edit
def test_it_acts_and_leaves_nothing(edit: str) -> None:
    pipe = build("sd15")
    before, plain = bits(pipe), draw(pipe)
    with EDITS[edit](pipe) as on:
        edited = draw(pipe)
        assert not torch.equal(edited, plain)
        assert torch.equal(draw(pipe), edited)  # nothing is remembered from the generation before
        assert on.extra_passes == (1 if edit in ("sld", "crg") else 0)
    assert same(bits(pipe), before) and torch.equal(draw(pipe), plain)
    on.remove()  # nothing is left to do
    with pytest.raises(NegationNotAppliedError, match=f"this {edit} was removed"), on:
        pass
    with pytest.raises(ZeroDivisionError), EDITS[edit](pipe):
        draw(pipe, callback_on_step_end=lambda *_: 1 / 0)
    assert same(bits(pipe), before)


def test_all_of_them_within_each_other() -> None:
    pipe = build("sd15")
    before = bits(pipe)
    pictures, on = [draw(pipe)], []
    for make in EDITS.values():
        on.append(make(pipe))
        pictures.append(draw(pipe))
    for edit, picture in zip(reversed(on), reversed(pictures)):
        assert torch.equal(draw(pipe), picture)
        edit.remove()
    assert torch.equal(draw(pipe), pictures[0]) and same(bits(pipe), before)
    assert len({p.numpy().tobytes() for p in pictures}) == len(pictures)


@pytest.mark.parametrize(
    "edit",
    [
        *("adavd", "safree", "sld", "uce"),
        *(pytest.param(edit, marks=pytest.mark.full) for edit in ("crg", "rece", "task_vector")),
    ],
)
def test_it_composes_with_negation_in_either_order(edit: str) -> None:
    pipe = build("sd15")
    make, before = EDITS[edit], bits(pipe)

    def negated() -> Any:
        return fn.negate(pipe, ["red", "dog"], method="nag", strength=4.0)

    with negated():
        alone = draw(pipe, steps=2)
        with make(pipe):
            inside = draw(pipe, steps=2)
        assert torch.equal(draw(pipe, steps=2), alone)  # what was kept of weights was made anew
    with make(pipe):
        edited = draw(pipe, steps=2)
        with negated():
            outside = draw(pipe, steps=2)
        assert torch.equal(draw(pipe, steps=2), edited)
    assert torch.equal(inside, outside)
    assert not torch.equal(inside, alone) and not torch.equal(inside, edited)
    with negated() as negation, make(pipe):  # and left in another order than they were entered in
        negation.remove()
        assert torch.equal(draw(pipe, steps=2), edited)
    assert same(bits(pipe), before)


@pytest.mark.parametrize("edit", ("adavd", "sld", "uce"))
def test_it_composes_with_an_engine_whose_requests_differ(edit: str) -> None:
    """And an engine takes the edit's further passes for none of its own."""
    pipe = build("sd15")
    engine = fn.install(pipe, ConceptBank.from_prompts(pipe, {"dog": "dog"}), rule="nag", unasked="raise")
    dog = fn.Policy({"dog": 4.0})
    with EDITS[edit](pipe), fn.audit(pipe) as audit:
        with engine.batch([None, None]):
            plain = draw(pipe)
        with engine.batch([dog, None]):
            first = draw(pipe)
        with pytest.raises(NegationNotAppliedError):
            draw(pipe)  # that nobody spoke for
    assert not torch.allclose(first[0], plain[0], rtol=0.1)
    torch.testing.assert_close(first[1], plain[1], rtol=1e-3, atol=1e-3)  # by another kernel beside the first
    assert engine.call == 0 + 1 and audit.verify() is None
    with EDITS[edit](pipe), engine.batch([None, None]):
        assert torch.equal(draw(pipe), plain)


@pytest.mark.parametrize("edit", ("adavd", "sld", "crg"))
def test_it_composes_with_processors_set_by_hand(edit: str) -> None:
    pipe = build("sd15")
    bank = ConceptBank.from_prompts(pipe, {"dog": "dog"})
    with EDITS[edit](pipe):
        edited = draw(pipe)
        pipe.unet.set_attn_processor(
            {
                name: fn.NegationAttnProcessor(bank, "nag", strengths={"dog": 4.0})
                if "attn2" in name
                else processor
                for name, processor in pipe.unet.attn_processors.items()
            }
        )
        both = draw(pipe)
    by_hand = draw(pipe)
    assert not torch.equal(both, edited) and not torch.equal(both, by_hand)
    fn.remove(pipe)


@pytest.mark.parametrize(
    "edit",
    [
        *("adavd", "sld", "uce"),
        *(pytest.param(edit, marks=pytest.mark.full) for edit in ("safree", "crg", "rece")),
    ],
)
def test_concepts_are_words_a_bank_or_embeddings(edit: str) -> None:
    pipe = build("sd15")
    bank = ConceptBank.from_prompts(pipe, {"dog": "dog"})
    pictures = []
    for concept in ("dog", {"x": ["dog"]}, bank, ["dog"]):
        with EDITS[edit](pipe, concept):
            pictures.append(draw(pipe))
    assert all(torch.equal(p, pictures[0]) for p in pictures)
    learned = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    for concepts in (learned, {"x": learned}, [bank["dog"], learned]):
        with EDITS[edit](pipe, concepts):
            pictures.append(draw(pipe))
    assert torch.equal(pictures[4], pictures[5]) and len({p.numpy().tobytes() for p in pictures}) == 3


BAD_CONCEPTS: list[tuple[Any, str]] = [
    ([], "must name at least one"),
    (torch.zeros(3), "must be \\[T, 32\\]"),
    (torch.zeros(0, 32), "must be \\[T, 32\\]"),
    (torch.zeros(2, 31), "has width 31: the pipeline's text has 32"),
    (torch.full((2, 32), torch.nan), "nan or inf"),
    ("", "must be phrases that are not empty"),
]


def test_bad_concepts_change_nothing() -> None:
    pipe = build("sd15")
    before = bits(pipe)
    for edit in OF_CONCEPTS:
        for concepts, says in BAD_CONCEPTS:
            with pytest.raises(ValueError, match=says):
                EDITS[edit](pipe, concepts)
    assert same(bits(pipe), before)


BAD: list[tuple[Callable[[Any], Any], str]] = [
    (lambda p: fn.edits.adavd(p, "dog", -1.0), "strength=-1.0"),
    (lambda p: fn.edits.adavd(p, "dog", threshold=2), "threshold=2"),
    (lambda p: fn.edits.adavd(p, "dog", tokens="all"), "tokens='all': allowed are prompt, prototype"),
    (lambda p: fn.edits.adavd(p, {"x": ["dog", "cat"]}), "'x' has 2 members"),
    (lambda p: fn.edits.safree(p, "dog", rise=0), "rise=0"),
    (lambda p: fn.edits.sld(p, "dog", "weakest"), "preset='weakest': allowed are weak, medium"),
    (lambda p: fn.edits.sld(p, "dog", warm_up=3), "warm_up=3: sld has warmup, strength"),
    (lambda p: fn.edits.sld(p, "dog", inertia=-1), "inertia=-1"),
    (lambda p: fn.edits.crg(p, "dog", gain=0), "gain=0"),
    (lambda p: fn.edits.uce(p, "dog", ridge=0), "ridge=0"),
    (lambda p: fn.edits.uce(p, "dog", tokens="x"), "tokens='x'"),
    (lambda p: fn.edits.uce(p, "dog", ["cat", "red"]), "target has 2 concepts, cat, red: must be one"),
    (lambda p: fn.edits.uce(p, "dog", preserve={}), "preserve={}: must name"),
    (lambda p: fn.edits.rece(p, "dog", epochs=0), "epochs=0"),
    (lambda p: fn.edits.rece(p, "dog", adversarial_ridge=0), "adversarial_ridge=0"),
    (lambda p: fn.edits.task_vector(p, {}), "matches no weight"),
    (lambda p: fn.edits.task_vector(p, {"x": torch.zeros(1)}), "trained has 'x'"),
    (lambda p: fn.edits.task_vector(p, {"conv_in.bias": torch.zeros(1)}), "\\[1\\]: must be \\[8\\]"),
    (lambda p: fn.edits.task_vector(p, {"conv_in.bias": torch.full((8,), torch.inf)}), "nan or inf"),
    (lambda p: fn.edits.task_vector(p, trained(p), -1), "strength=-1"),
    (lambda p: fn.edits.task_vector(p, trained(p), layers=["*attn3*"]), "'\\*attn3\\*' matches no weight"),
    (lambda p: fn.edits.task_vector(p, trained(p), layers="*"), "must be a list of patterns"),
]


def test_bad_arguments_change_nothing() -> None:
    pipe = build("sd15")
    before = bits(pipe)
    for call, says in BAD:
        with pytest.raises(ValueError, match=says):
            call(pipe)
    assert same(bits(pipe), before)


REFUSED = [
    ("flux", ("adavd", "uce", "rece"), "text changes from layer to layer"),
    ("flux", ("safree",), "safree needs one text encoder, CLIP's"),
    ("sd3", ("adavd", "uce", "rece"), "text changes from layer to layer"),
    ("sd3", ("sld", "crg"), "needs a UNet .* StableDiffusion3Pipeline is neither"),
    ("sdxl", ("safree",), "CLIPTextModel and CLIPTextModelWithProjection"),
    ("pixart_sigma", ("safree",), "has T5EncoderModel"),
    ("pixart_sigma", ("sld", "crg"), "PixArtSigmaPipeline is neither"),
]


@pytest.mark.parametrize("kind, edits, says", REFUSED)
def test_hosts_that_it_does_not_fit_are_refused_by_name(kind: str, edits: tuple[str, ...], says: str) -> None:
    pipe = build(kind)
    kinds = type(pipe), type(pipe.components.get("unet") or pipe.transformer)
    for edit in edits:
        with pytest.raises(UnsupportedModelError, match=says):
            EDITS[edit](pipe)
    assert kinds[0] is type(pipe) and kinds[1] is type(pipe.components.get("unet") or pipe.transformer)


@pytest.mark.parametrize(
    "kind",
    [
        *("sdxl", "sana"),
        *(
            pytest.param(kind, marks=pytest.mark.full)
            for kind in ("sd2", "sd15_controlnet", "pixart_sigma", "wan", "ltx")
        ),
    ],
)
def test_other_hosts(kind: str) -> None:
    """Those whose text is projected on its way to the layers, begins nowhere, or meets bias there."""
    pipe = build(kind)
    cross = ("adavd", "uce", "rece")
    fits = {"sdxl": (*cross, "sld"), "sd2": ("adavd", "safree", "crg"), "sd15_controlnet": ("sld",)}
    plain = generate(pipe, "a dog", steps=1)
    for edit in fits.get(kind, cross):
        with EDITS[edit](pipe):
            assert not torch.equal(generate(pipe, "a dog", steps=1), plain), edit
        assert torch.equal(generate(pipe, "a dog", steps=1), plain), edit


# ---- weights --------------------------------------------------------------------------------


def test_uce_answers_the_concept_as_the_target() -> None:
    """In the layers themselves; what is preserved, and other modules, stay."""
    pipe = build("sd15")
    old, new, kept = torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(1))
    layers = [getattr(attn, part) for attn in attentions(pipe).values() for part in ("to_k", "to_v")]
    wanted, stays = ([layer(text).detach() for layer in layers] for text in (new, kept))
    others = {n: w.detach().clone() for n, w in pipe.unet.named_parameters() if "attn2.to_" not in n}
    with fn.edits.uce(pipe, old, new, preserve=kept, ridge=1e-8):
        for layer, said, stayed in zip(layers, wanted, stays):
            torch.testing.assert_close(layer(old), said, rtol=0, atol=1e-4)
            torch.testing.assert_close(layer(kept), stayed, rtol=0, atol=1e-4)
        now = dict(pipe.unet.named_parameters())
        assert all(torch.equal(now[name], weight) for name, weight in others.items())
    assert all((layer(old) - said).abs().max() > 0.1 for layer, said in zip(layers, wanted))


def test_edits_of_weights_are_undone_in_reverse_order() -> None:
    pipe = build("sd15")
    first = fn.edits.uce(pipe, "dog")
    second = fn.edits.rece(pipe, "cat")
    with pytest.raises(RuntimeError, match="remove the last edit first"):
        first.remove()
    second.remove()
    first.remove()


def test_the_weights_stay_the_same_tensors() -> None:
    """Graphs and optimisers hold them; their versions tell those that keep what they made of them."""
    pipe = build("sd15")
    (attn, *_) = attentions(pipe).values()
    weight, address, version = attn.to_k.weight, attn.to_k.weight.data_ptr(), attn.to_k.weight._version
    with fn.edits.uce(pipe, "dog"):
        assert attn.to_k.weight is weight and weight.data_ptr() == address and weight._version > version
        version = weight._version
    assert attn.to_k.weight is weight and weight._version > version


@pytest.mark.parametrize("assign", (False, True))
def test_weights_that_were_lost_stop_the_call(assign: bool, caplog: pytest.LogCaptureFixture) -> None:
    pipe = build("sd15")
    state = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    with fn.edits.uce(pipe, "dog"), fn.edits.uce(pipe, "cat"):
        draw(pipe)
        pipe.unet.load_state_dict(state, assign=assign)
        with pytest.raises(NegationNotAppliedError, match="uce: weights that it wrote were changed since"):
            draw(pipe)
    assert bool(caplog.records) is not assign
    draw(pipe)


def test_edits_within_each_other_are_no_change_of_weights(caplog: pytest.LogCaptureFixture) -> None:
    pipe = build("sd15")
    with fn.edits.uce(pipe, "dog"):
        with fn.edits.rece(pipe, "cat"):
            pipe.to(torch.bfloat16)
        draw(pipe)
    assert not [record for record in caplog.records if record.name == "fastnegate"]


def test_a_pipeline_that_nobody_has_is_freed() -> None:
    pipe = build("sd15")
    alive = weakref.ref(pipe.unet)
    fn.edits.uce(pipe, "dog")
    del pipe
    gc.collect()
    assert alive() is None


def _quantized(attn: Any) -> None:
    attn.to_v.weight = nn.Parameter(attn.to_v.weight.to(torch.float8_e4m3fn), requires_grad=False)


class Adapter(nn.Linear):
    """Around a linear layer, as adapters are."""


def _adapted(attn: Any) -> None:
    attn.to_v = Adapter(attn.to_v.in_features, attn.to_v.out_features)


def _inference(attn: Any) -> None:
    with torch.inference_mode():
        attn.to_v.weight = nn.Parameter(attn.to_v.weight.clone(), requires_grad=False)


SPOILT: dict[str, Callable[[Any], Any]] = {
    "attn2.to_v is on the meta device": lambda attn: attn.to_v.to("meta"),
    "attn2.to_v is a Parameter of torch.float8_e4m3fn: it is quantized": _quantized,
    "attn2.to_v is an inference tensor": _inference,
    "attn2.to_v is a Adapter": _adapted,
    "has fused projections": lambda attn: attn.fuse_projections(),
}


@pytest.mark.parametrize("says", SPOILT)
def test_weights_that_cannot_be_written_are_refused_by_name(says: str) -> None:
    pipe = build("sd15")
    (attn, *_) = reversed(attentions(pipe).values())
    encoded = ConceptBank.from_prompts(pipe, {"dog": "dog"})
    SPOILT[says](attn)
    before = [w.detach().clone() for w in pipe.unet.parameters() if not w.is_meta]
    for method in (fn.edits.uce, fn.edits.rece):
        with pytest.raises(UnsupportedModelError, match=says):
            method(pipe, encoded)
    after = [w for w in pipe.unet.parameters() if not w.is_meta]
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(after, before))


def test_weights_offloaded_in_groups_are_refused() -> None:
    pipe = build("sd15")
    pipe.unet.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )
    for make in (EDITS["uce"], EDITS["task_vector"]):
        with pytest.raises(UnsupportedModelError, match="offloaded by groups"):
            make(pipe)


def test_a_task_vector_moves_the_layers_that_are_asked_for() -> None:
    pipe = build("sd15")
    before = {n: w.detach().clone() for n, w in pipe.unet.named_parameters()}
    after = trained(pipe)
    other = copy.deepcopy(pipe.unet)
    other.load_state_dict({**other.state_dict(), **after})
    for given in (after, other):
        with fn.edits.task_vector(pipe, given, 0.5, layers=["*attn2*", "conv_in.*"]):
            for name, weight in pipe.unet.named_parameters():
                moved = "attn2" in name or name.startswith("conv_in.")
                wanted = before[name] - 0.5 * (after[name] - before[name]) * moved
                torch.testing.assert_close(weight.detach(), wanted, rtol=0, atol=1e-6)


def test_diverse_inversion_chooses_the_strength() -> None:
    pipe = build("sd15")
    before, after = bits(pipe), trained(pipe)
    embeddings = [torch.randn(2, 32), torch.randn(3, 32)]
    seen = []

    def loss(edited: Any, embedding: Tensor) -> float:
        """How far the weights went, in steps of the vector; the longer embedding takes longer."""
        moved = edited.unet.conv_in.bias - before["weights"][1]
        assert edited is pipe
        seen.append(embedding)
        step = (after["conv_in.bias"] - before["weights"][1]).norm()
        return float(moved.norm() / step) / len(embedding)

    names = [name for name, _ in pipe.unet.named_parameters()]
    assert names[1] == "conv_in.bias"
    choice = fn.edits.diverse_inversion(pipe, after, embeddings, loss, 0.4, grid=(0.5, 1.0, 1.5, 2.0))
    assert choice.strength == 1.5 and [*choice.losses] == [0.5, 1.0, 1.5]  # 1.5 / 3 > 0.4 >= 1 / 3
    assert [e is embeddings[i % 2] for i, e in enumerate(seen)] == [True] * 6
    assert same(bits(pipe), before)
    with pytest.raises(ValueError, match="no strength"):
        fn.edits.diverse_inversion(pipe, after, embeddings, loss, 9.0)
    with pytest.raises(ValueError, match="embeddings: must be a list"):
        fn.edits.diverse_inversion(pipe, after, embeddings[0], loss, 0.4)
    with pytest.raises(ValueError, match="embeddings\\[0\\]"):
        fn.edits.diverse_inversion(pipe, after, [torch.zeros(32)], loss, 0.4)
    assert same(bits(pipe), before)


# ---- AdaVD and SAFREE -----------------------------------------------------------------------


def test_adavd_edits_conditional_values_behind_the_start_alone() -> None:
    pipe = build("sd15")
    (attn, *_) = attentions(pipe).values()
    made: list[Tensor] = []
    target = attn.to_v(ConceptBank.from_prompts(pipe, {"dog": "dog"})["dog"].prompt[1:2])[0]
    with fn.edits.adavd(pipe, "dog"):
        handle = attn.to_v.register_forward_hook(lambda _m, args, out: made.extend([args[0], out]))
        draw(pipe)
        handle.remove()
    text, values = made[0], made[1]
    plain = attn.to_v(text)
    assert len(text) == 4 and torch.equal(values[:2], plain[:2]) and torch.equal(values[2:, 0], plain[2:, 0])
    shared = values[2:, 1:] @ target / target.norm()
    assert shared.abs().max() < 1e-5 * values.norm() and (plain[2:, 1:] @ target).abs().max() > 1e-3


def test_adavd_leaves_negations_concepts_alone() -> None:
    """Of the very same concept; else negation would have nothing to take away."""
    pipe = build("sd15")
    (attn, *_) = attentions(pipe).values()
    seen: list[tuple[Tensor, Tensor]] = []
    with fn.edits.adavd(pipe, "dog"), fn.negate(pipe, "dog", method="nag"):
        handle = attn.to_v.register_forward_hook(lambda _m, args, out: seen.append((args[0], out)))
        draw(pipe)
        handle.remove()
    of_concepts = [(text, values) for text, values in seen if len(text) == 1]
    assert of_concepts and all(torch.equal(values, attn.to_v(text)) for text, values in of_concepts)


def test_safree_filters_the_first_steps_and_needs_words() -> None:
    pipe = build("sd15")
    texts: list[Tensor] = []
    forward = pipe.unet.forward
    pipe.unet.forward = lambda *a, **k: (texts.append(k["encoder_hidden_states"]), forward(*a, **k))[1]
    plain = pipe.encode_prompt(PROMPTS, "cpu", 1, False)[0]
    with fn.edits.safree(pipe, "dog", most_steps=1.0, middle=-99.0):  # steps 0 and 1
        generate(pipe, PROMPTS, steps=3, images=2)
        with pytest.raises(NegationNotAppliedError, match="safree needs prompt"):
            generate(pipe, None, seeds=[0], prompt_embeds=plain[:1], negative_prompt_embeds=plain[1:])
    first, second, third = (t.chunk(2) for t in texts)
    assert torch.equal(first[1], second[1]) and torch.equal(third[1], plain.repeat_interleave(2, 0))
    assert torch.equal(first[0], third[0]) and not torch.equal(first[1], third[1])
    changed = (first[1] != third[1]).any(-1)
    count = [len(pipe.tokenizer(p).input_ids) - 2 for p in PROMPTS]
    assert torch.equal(changed[0], changed[1]) and not changed[:, 0].any()
    assert not changed[0, count[0] + 1 :].any() and not changed[2, count[1] + 1 :].any()


def test_safree_within_safree_filters_both() -> None:
    pipe = build("sd15")
    pictures = [draw(pipe)]
    with EDITS["safree"](pipe):
        pictures.append(draw(pipe))
        with EDITS["safree"](pipe, "red"):
            pictures.append(draw(pipe))
        assert torch.equal(draw(pipe), pictures[1])
    assert len({p.numpy().tobytes() for p in pictures}) == 3


# ---- what goes wrong later ------------------------------------------------------------------


@pytest.mark.parametrize("edit", ("adavd", "safree", "uce"))
def test_another_denoiser_stops_the_call(edit: str) -> None:
    pipe, other = build("sd15"), build("sd15", seed=1)
    own = pipe.unet
    with EDITS[edit](pipe):
        pipe.unet = other.unet
        with pytest.raises(NegationNotAppliedError, match=r"pipe\.unet is another model"):
            draw(pipe)
        pipe.unet = own
    draw(pipe)


@pytest.mark.full
def test_compiled_denoisers_are_refused() -> None:
    pipe = build("sd15")
    own, compiled = pipe.unet, torch.compile(pipe.unet)
    for edit in ("adavd", "safree", "sld"):
        pipe.unet = compiled
        with pytest.raises(UnsupportedModelError, match=f"{edit} cannot be put into compiled code"):
            EDITS[edit](pipe)
        pipe.unet = own
        with EDITS[edit](pipe):
            pipe.unet = compiled
            with pytest.raises(UnsupportedModelError, match="compiled code"):
                draw(pipe)
            pipe.unet = own


def test_cached_denoisers_are_refused() -> None:
    pipe = build("ltx")
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(UnsupportedModelError, match="adavd cannot be combined with FBC"):
        EDITS["adavd"](pipe)


@pytest.mark.parametrize("edit", ("adavd", "safree", "sld", "crg"))
def test_a_call_that_nobody_can_place_raises(edit: str) -> None:
    pipe = build("sd15")
    x, text = torch.zeros(2, 4, 16, 16), torch.zeros(2, 77, 32)
    with EDITS[edit](pipe), pytest.raises(NegationNotAppliedError, match=edit):
        pipe.unet(x, 10, encoder_hidden_states=text)
    pipe.unet(x, 10, encoder_hidden_states=text)


def test_copies_are_not_edited() -> None:
    pipe = build("sd15")
    x, text = torch.zeros(2, 4, 8, 8), torch.ones(2, 7, 32)
    plain = pipe.unet(x, 10, encoder_hidden_states=text).sample
    for edit in ("adavd", "sld"):
        with EDITS[edit](pipe):
            twin = copy.deepcopy(pipe.unet)
            assert type(twin) is type(build("sd15").unet)
            assert torch.equal(twin(x, 10, encoder_hidden_states=text).sample, plain)


# ---- joint models ---------------------------------------------------------------------------


def test_task_vectors_fit_joint_models() -> None:
    pipe = joint_pipelines.build("flux")
    plain = joint_pipelines.generate(pipe)
    after = {n: w.detach() * 1.1 for n, w in pipe.transformer.named_parameters()}
    with fn.edits.task_vector(pipe, after), fn.negate(pipe, "dog"):
        assert not torch.equal(joint_pipelines.generate(pipe), plain)
    assert torch.equal(joint_pipelines.generate(pipe), plain)
