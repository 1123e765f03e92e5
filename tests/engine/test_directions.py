# SPDX-License-Identifier: Apache-2.0
"""Steering directions: what is collected is what layers give; `casteer` reads it, however it is set up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastnegate as fn
from fastnegate import (
    BankMismatchError,
    ConceptBank,
    NegationNotAppliedError,
    Policy,
    Rule,
    UnsupportedModelError,
)
from fastnegate.engine.bank import calls_for
from fastnegate.engine.concepts import Directions
from fastnegate.engine.files import contents

pytest.importorskip("diffusers")

import joint_pipelines
import pipelines
from pipelines import attentions, generate, one_thread  # noqa: F401

PAIRS = [("a red cat", "a cat"), ("a dog in red", "a dog"), ("red", "a photo")]
CALL: dict[str, Any] = {"num_inference_steps": 2, "height": 32, "width": 32}


def bank_of(pipe: Any, *names: str, **options: Any) -> ConceptBank:
    bank = ConceptBank.from_prompts(pipe, {name: name for name in names or ("red",)})
    bank.add_directions(pipe, {name: PAIRS for name in bank}, **CALL, **options)
    return bank


def layer_outputs(pipe: Any, prompts: list[str], guidance: float) -> dict[str, Tensor]:
    """Mean over conditional rows, pixels, steps and prompts of what goes into output projections, [H * D]."""
    seen: dict[str, list[Tensor]] = {}

    def remember(name: str) -> Any:
        return lambda _module, given: seen.setdefault(name, []).append(given[0].detach().double())

    handles = [a.to_out[0].register_forward_pre_hook(remember(n)) for n, a in attentions(pipe).items()]
    for seed, prompt in enumerate(prompts):
        pipe(
            prompt,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            guidance_scale=guidance,
            **CALL,
        )
    for handle in handles:
        handle.remove()
    return {name: torch.stack([given[-1].mean(0) for given in calls]).mean(0) for name, calls in seen.items()}


@pytest.mark.parametrize(("kind", "guidance"), [("sd15", 5.0), ("sd15", 1.0), ("pixart_sigma", 5.0)])
def test_directions_are_unit_differences_of_means(kind: str, guidance: float) -> None:
    pipe = pipelines.build(kind)
    options = {"use_resolution_binning": False, "clean_caption": False} if kind != "sd15" else {}
    bank = ConceptBank.from_prompts(pipe, {"red": "red"})
    bank.add_directions(pipe, {"red": PAIRS}, batch=2, guidance_scale=guidance, **CALL, **options)
    directions = bank["red"].directions
    assert directions is not None and {*directions.layers} == {*attentions(pipe)}
    if options:
        return
    shown, absent = (layer_outputs(pipe, [pair[i] for pair in PAIRS], guidance) for i in (0, 1))
    for name, found in directions.layers.items():
        expected = shown[name] - absent[name]
        torch.testing.assert_close(found.flatten().double(), expected / expected.norm(), rtol=0, atol=1e-4)


def test_nothing_stays_behind() -> None:
    pipe = pipelines.build("sd15")
    before = generate(pipe), type(pipe.unet), pipe.unet.attn_processors
    bank_of(pipe)
    assert torch.equal(generate(pipe), before[0]) and type(pipe.unet) is before[1]
    assert all(not attn.to_out[0]._forward_pre_hooks for attn in attentions(pipe).values())


def test_casteer_does_what_its_formula_says() -> None:
    """O = Z - 2 max(<Z, u>, 0) u in each layer: seen in what goes into the output projection."""
    pipe = pipelines.build("sd15")
    bank = bank_of(pipe)
    directions = bank["red"].directions
    assert directions is not None
    name, attn = next(iter(attentions(pipe).items()))
    seen: list[Tensor] = []
    attn.to_out[0].register_forward_pre_hook(lambda _module, given: seen.append(given[0].detach().double()))
    generate(pipe, steps=1)  # at the first layer of the first step nothing has been changed before
    with fn.negate(pipe, bank, "casteer"):
        generate(pipe, steps=1)
    plain, steered = seen
    u = directions.layers[name].flatten().double()
    along = (plain[1] @ u).clamp(min=0)
    assert (along > 0).any()
    torch.testing.assert_close(steered[1], plain[1] - 2 * along.unsqueeze(1) * u, rtol=0, atol=1e-4)
    torch.testing.assert_close(steered[0].float(), plain[0].float())  # the unconditional row


def test_by_hand_and_installed_are_the_same() -> None:
    pipe = pipelines.build("sd15")
    bank = bank_of(pipe)
    plain = generate(pipe)
    with fn.negate(pipe, bank, "casteer"):
        installed = generate(pipe)
    processors = dict(pipe.unet.attn_processors)
    ours = fn.NegationAttnProcessor(bank, "casteer")
    pipe.unet.set_attn_processor({n: ours if "attn2" in n else p for n, p in processors.items()})
    assert torch.equal(generate(pipe), installed) and not torch.equal(installed, plain)


@pytest.mark.parametrize(
    "kind",
    ["wan22", "sana", *(pytest.param(k, marks=pytest.mark.full) for k in ("sdxl", "pixart_sigma", "ltx"))],
)
def test_other_families(kind: str) -> None:
    """Also two denoisers that share the steps: their layers have names of their own."""
    pipe = pipelines.build(kind)
    options = {"wan22": {"num_frames": 5}, "ltx": {"num_frames": 9}}.get(kind, {})
    if kind in ("sana", "pixart_sigma"):
        options |= {"use_resolution_binning": False}
    if kind == "sana":
        options |= {"complex_human_instruction": None}
    bank = ConceptBank.from_prompts(pipe, {"red": "red"})
    bank.add_directions(pipe, {"red": PAIRS}, **{**CALL, "num_inference_steps": 4, **options})
    engine = fn.install(pipe, bank, rule="casteer")
    directions = bank["red"].directions
    assert directions is not None and {*directions.layers} == {*engine.layers}
    plain = generate(pipe, "a red cat")
    with engine.batch([Policy({"red": 1.0})]):
        assert not torch.equal(generate(pipe, "a red cat"), plain)
    engine.remove()


def test_policies_choose_among_directions() -> None:
    pipe = pipelines.build("sd15")
    bank = bank_of(pipe, "red", "cat")
    single = {}
    for name in bank:
        with fn.negate(pipe, ConceptBank({name: bank[name]}, bank.fingerprint, pipe), "casteer"):
            single[name] = generate(pipe, "a dog")
    engine = fn.install(pipe, bank, rule="casteer")
    with engine.batch([Policy({"red": 1.0}), None, Policy({"cat": 1.0})]):
        made = generate(pipe, ["a dog"] * 3, seeds=[0, 0, 0])
    engine.remove()
    torch.testing.assert_close(made[0], single["red"][0], rtol=0, atol=1e-4)
    torch.testing.assert_close(made[2], single["cat"][0], rtol=0, atol=1e-4)
    torch.testing.assert_close(made[1], generate(pipe, "a dog")[0], rtol=0, atol=1e-4)
    assert not torch.allclose(made[0], made[1], atol=1e-3)


@pytest.mark.full
def test_compiled_code_reads_the_directions_of_its_rows() -> None:
    """One graph, whoever asks for what."""
    pipe = pipelines.build("sd15")
    bank = bank_of(pipe, "red", "cat")
    plain, expected = generate(pipe), {}
    for names in (("red",), ("red", "cat")):
        engine = fn.install(pipe, bank, rule="casteer")
        with engine.batch([Policy(dict.fromkeys(names, 1.0))]):
            expected[names] = generate(pipe)
        engine.remove()
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    engine = fn.install(pipe, bank, rule="casteer")
    torch._dynamo.utils.counters.clear()
    for names, made in expected.items():
        with engine.batch([Policy(dict.fromkeys(names, 1.0))]):
            torch.testing.assert_close(generate(pipe), made, rtol=0, atol=1e-4)
    with engine.batch([None]):
        torch.testing.assert_close(generate(pipe), plain, rtol=0, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_several_are_made_orthogonal() -> None:
    pipe = pipelines.build("sd15")
    bank = ConceptBank.from_prompts(pipe, {"red": "red", "cat": "cat"})
    pairs = {"red": PAIRS, "cat": [("a cat in it", "a dog in it")]}
    bank.add_directions(pipe, pairs, make_orthogonal=True, **CALL)
    red, cat = (bank[name].directions.layers for name in bank)  # type: ignore[union-attr]
    assert all(abs(float((red[layer] * cat[layer]).sum())) < 1e-6 for layer in red)


def test_directions_are_kept_in_files(tmp_path: Path) -> None:
    pipe = pipelines.build("sd15")
    bank = bank_of(pipe)
    bank.update("plain", ConceptBank.from_prompts(pipe, {"x": "dog"})["x"])
    files = [tmp_path / "a", tmp_path / "b"]
    bank.save(files[0])
    loaded = ConceptBank.load(files[0], pipe)
    loaded.save(files[1])
    assert files[0].read_bytes() == files[1].read_bytes()
    ours, theirs = bank["red"].directions, loaded["red"].directions
    assert ours is not None and theirs is not None and [*ours.layers] == [*theirs.layers]
    assert all(torch.equal(ours.layers[n], theirs.layers[n]) for n in ours.layers)
    assert loaded["plain"].directions is None and contents(files[0]).concepts["red"].directions is not None


def test_another_denoiser_is_refused(tmp_path: Path) -> None:
    """With the same text encoder: fine-tunes have those."""
    pipe = pipelines.build("sd15")
    bank = bank_of(pipe)
    bank.save(tmp_path / "bank")
    with torch.no_grad():
        attn = next(iter(attentions(pipe).values()))
        attn.to_v.weight += 0.5
    with pytest.raises(BankMismatchError, match="has directions of another denoiser: the weights differ"):
        ConceptBank.load(tmp_path / "bank", pipe)
    for refuse in (bank.check, lambda p: fn.install(p, bank), lambda p: fn.negate(p, bank, "casteer")):
        with pytest.raises(BankMismatchError, match="another denoiser"):
            refuse(pipe)
    bank.add_directions(pipe, {"red": PAIRS}, **CALL)  # all that the bank has, so they may be of this one
    bank.check(pipe)
    with torch.no_grad():
        attn.to_v.weight -= 0.5
    other = ConceptBank.from_prompts(pipe, {"cat": "cat"})
    other.add_directions(pipe, {"cat": PAIRS}, **CALL)
    with pytest.raises(ValueError, match="concept 'cat' has directions of another denoiser than the bank's"):
        bank.update("cat", other["cat"])


def test_a_bank_without_directions_is_refused_as_before() -> None:
    pipe = pipelines.build("sd15")
    bank = ConceptBank.from_prompts(pipe, {"red": "red"})
    with pytest.raises(ValueError, match="'casteer' reads a steering direction per layer, which Concept"):
        fn.negate(pipe, bank, "casteer")
    steered = bank_of(pipe)
    steered.update("plain", bank["red"])
    with pytest.raises(ValueError, match="reads a steering direction"):
        fn.install(pipe, steered, rule="casteer")


def test_a_layer_without_a_direction_stops_generation() -> None:
    pipe = pipelines.build("sd15")
    bank = bank_of(pipe)
    directions = bank["red"].directions
    assert directions is not None
    name, *rest = directions.layers
    few = Directions({layer: directions.layers[layer] for layer in rest}, directions.model)
    bank.remove("red")
    bank.update("red", replace(ConceptBank.from_prompts(pipe, {"x": "red"})["x"], directions=few))
    with (
        fn.negate(pipe, bank, "casteer"),
        pytest.raises(NegationNotAppliedError, match=f"layer {name}: the bank"),
    ):
        generate(pipe)


def test_rules_that_read_tokens_and_a_direction_get_both() -> None:
    pipe = pipelines.build("sd15")
    bank = bank_of(pipe)
    rule = Rule(similarity="direction", gate="step", direction="raw", tokens="prototype", strength=0.5)
    (group,) = bank["red"].groups(rule)
    assert group.directions is bank["red"].directions and group.embeddings is bank["red"].prototypes[0]
    plain = generate(pipe)
    with fn.negate(pipe, bank, rule):
        assert not torch.equal(generate(pipe), plain)


def test_a_rule_may_read_a_direction_and_centre() -> None:
    """The neutral tokens have a slot, and no direction."""
    pipe = pipelines.build("sd15")
    bank = bank_of(pipe, "dog", "red")
    bank.neutral = ConceptBank.from_prompts(pipe, {"red": "red"}, neutral="empty").neutral
    rule = Rule("direction", "step", "projection", center="neutral", tokens="prototype")
    pictures = []
    for names in (("dog", "red"), ("red",)):  # where it is in the bank changes nothing
        part = ConceptBank({name: bank[name] for name in names}, bank.fingerprint, pipe, bank.neutral)
        engine = fn.install(pipe, part, rule=rule)
        with engine.batch([Policy({"red": 1.0})]):
            pictures.append(generate(pipe))
        engine.remove()
    assert torch.equal(*pictures) and not torch.equal(pictures[0], generate(pipe))


def test_directions_of_another_denoiser_stop_an_engine() -> None:
    pipe, other = pipelines.build("sd15"), pipelines.build("sd15", seed=1)
    bank, theirs = bank_of(pipe), bank_of(other)
    engine = fn.install(pipe, bank, rule="casteer")
    with engine.batch([Policy({"red": 1.0})]):
        generate(pipe)
        bank.update("red", replace(bank["red"], directions=theirs["red"].directions))
        with pytest.raises(
            NegationNotAppliedError, match="directions of another denoiser: the weights differ"
        ):
            generate(pipe)


def test_directions_of_another_denoiser_stop_processors_set_by_hand() -> None:
    pipe, other = pipelines.build("sd15"), pipelines.build("sd15", seed=1)
    bank, theirs = bank_of(pipe), bank_of(other)
    pipe.unet.set_attn_processor(fn.NegationAttnProcessor(bank, rule="casteer"))
    generate(pipe)
    bank.update("red", replace(bank["red"], directions=theirs["red"].directions))
    with pytest.raises(BankMismatchError, match="directions of another denoiser: the weights differ"):
        generate(pipe)


def test_what_cannot_be_collected_is_refused() -> None:
    pipe = pipelines.build("sd15")
    bank = bank_of(pipe)
    for pairs in (
        {"blue": PAIRS},
        {"red": []},
        {"red": [("cat", "cat")]},
        {"red": [("cat",)]},
        {"red": "cat"},
    ):
        with pytest.raises(ValueError, match=r"blue|pairs\['red'\]="):
            bank.add_directions(pipe, pairs, **CALL)
    with pytest.raises(ValueError, match="pairs is empty"):
        bank.add_directions(pipe, {}, **CALL)
    with pytest.raises(ValueError, match="batch=0"):
        bank.add_directions(pipe, {"red": PAIRS}, batch=0, **CALL)
    with fn.negate(pipe, bank), pytest.raises(ValueError, match="pipe has an engine"):
        bank.add_directions(pipe, {"red": PAIRS}, **CALL)
    flux = joint_pipelines.build("flux")
    with pytest.raises(UnsupportedModelError, match="FluxPipeline has layers in which text is not apart"):
        ConceptBank.from_prompts(flux, {"red": "red"}).add_directions(flux, {"red": PAIRS})


def test_calls_are_counted() -> None:
    pipe, calls = pipelines.build("sd15"), []
    bank_of(pipe, batch=2, on_call=lambda: calls.append(1))
    assert len(calls) == calls_for({"red": PAIRS}, 2) == 4


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({}, "no layer"),
        ({"a": torch.ones(4)}, r"directions\['a'\] is torch.float32 of shape \[4\]"),
        ({"a": torch.ones(2, 2)}, r"directions\['a'\] has length 2: must be 1"),
        ({"a": torch.full((2, 2), torch.nan)}, "has length nan"),
    ],
)
def test_bad_directions(layers: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Directions(layers, ConceptBank({}, None).fingerprint)  # type: ignore[arg-type]
