# SPDX-License-Identifier: Apache-2.0
"""Whole pipelines: `install`, `negate`, policies per request, and everything that must stay as it was."""

from __future__ import annotations

import copy
import gc
import itertools
import logging
import pickle
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from fastnegate import ConceptBank, Policy, RowMapError, Rule
from fastnegate.engine.engine import Record
from fastnegate.engine.errors import NegationNotAppliedError

pytest.importorskip("diffusers")

import diffusers
import pipelines
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks
from pipelines import SUPPORTED, generate, one_thread  # noqa: F401

import fastnegate as fn
from fastnegate.integrations.diffusers.contract import denoiser
from fastnegate.integrations.diffusers.install import engine_of
from fastnegate.integrations.diffusers.layers.classic import Classic

CONCEPTS = {"dog": ["dog", "a red dog"], "cat": "cat"}
DOG, CAT, BOTH = Policy({"dog": 1.0}), Policy({"cat": 1.0}), Policy({"dog": 0.5, "cat": 1.0})
OPEN = Rule.preset("protore", threshold=-1.0)  # random features need not be similar to act
METHODS = {m: OPEN if m == "protore" else m for m in ("protore", "eiup", "nag", "vsf", "nasa", "ong")}
KINDS_AND_METHODS = [
    *((kind, "nag") for kind in SUPPORTED),
    *((kind, method) for kind in ("sd15", "pixart_alpha") for method in METHODS if method != "nag"),
]


def bank_of(pipe: Any) -> ConceptBank:
    return ConceptBank.from_prompts(pipe, CONCEPTS, templates=["{}", "a {}"])


@contextmanager
def installed(pipe: Any, rule: Rule | str = OPEN, **options: Any) -> Iterator[fn.Engine]:
    engine = fn.install(pipe, bank_of(pipe), rule=rule, **options)
    yield engine
    engine.remove()


def negated(pipe: Any, policies: Sequence[Policy | None], *arguments: Any, **options: Any) -> Tensor:
    """Latents of one call with these policies."""
    engine = engine_of(pipe)
    assert engine is not None
    with engine.batch(policies):
        return generate(pipe, *arguments, **options)


def processors(pipe: Any) -> dict[str, Any]:
    return dict(denoiser(pipe).attn_processors)


def hooks(pipe: Any) -> int:
    """What is left in the pipeline and its denoiser: hooks, and classes of our own."""
    model = denoiser(pipe)
    ours = sum("_fastnegate_base" in vars(type(thing)) for thing in (pipe, model))
    return len(model._forward_hooks) + len(model._forward_pre_hooks) + ours


@contextmanager
def attention_outputs(pipe: Any) -> Iterator[list[Tensor]]:
    """Outputs of the text cross-attention layers in the order of their calls."""
    outputs: list[Tensor] = []
    handles = [
        attn.register_forward_hook(lambda _module, _args, output: outputs.append(output))
        for attn in pipelines.attentions(pipe).values()
    ]
    yield outputs
    for handle in handles:
        handle.remove()


@pytest.fixture(params=["sd15", "sdxl", "pixart_alpha"])
def pipe(request: pytest.FixtureRequest) -> Any:
    return pipelines.build(request.param)


@pytest.fixture
def sd() -> Any:
    return pipelines.build("sd15")


# In and out again.


@pytest.mark.parametrize(("kind", "method"), KINDS_AND_METHODS)
def test_negation_changes_what_is_generated_and_leaves_no_trace(kind: str, method: str) -> None:
    pipe = pipelines.build(kind)
    before, untouched = processors(pipe), generate(pipe)
    attributes, state = dict(vars(pipe)), denoiser(pipe).state_dict().keys()
    with installed(pipe, METHODS[method]):
        assert denoiser(pipe).state_dict().keys() == state  # what would be saved
        assert torch.equal(generate(pipe), untouched)  # no policy
        assert torch.equal(negated(pipe, [None]), untouched)
        assert torch.equal(negated(pipe, [Policy({"dog": 0.0})]), untouched)
        dog, cat = (negated(pipe, [policy]) for policy in (DOG, CAT))
        assert not torch.allclose(dog, untouched) and not torch.allclose(dog, cat)
        assert torch.equal(generate(pipe), untouched)  # the policy ended with its batch
    assert torch.equal(generate(pipe), untouched)
    assert vars(pipe).keys() == attributes.keys() and hooks(pipe) == 0 and engine_of(pipe) is None
    after = processors(pipe)
    assert after.keys() == before.keys() and all(after[n] is before[n] for n in before)


@pytest.mark.parametrize("concepts", ["dog", ["dog", "red cat"], {"x": ["dog", "cat"]}, "bank"], ids=str)
def test_negate(sd: Any, concepts: Any) -> None:
    concepts = bank_of(sd) if concepts == "bank" else concepts
    before, untouched = processors(sd), generate(sd)
    with fn.negate(sd, concepts, OPEN) as handle:
        first = generate(sd)
        assert not torch.allclose(first, untouched)
        many = generate(sd, ["a cat", "a dog", "a photo"], images=2)  # any number of images
        assert not torch.allclose(many[:1], untouched)
    assert torch.equal(generate(sd), untouched)
    handle = fn.negate(sd, concepts, OPEN)
    assert torch.equal(generate(sd), first)
    handle.remove()
    handle.remove()
    assert torch.equal(generate(sd), untouched) and processors(sd) == before


def test_negate_passes_its_options_on(sd: Any) -> None:
    def run(*arguments: Any, **options: Any) -> Tensor:
        with fn.negate(sd, "dog", *arguments, **options):
            return generate(sd, steps=4)

    untouched = generate(sd, steps=4)
    assert torch.equal(run("nag", 0.0), untouched)
    results = [run("nag"), run("ong"), run("nag", 0.5), run("nag", start=0.5), run("nag", stop=0.5)]
    results.append(run(Rule.preset("nag", blend=0.9)))
    for i, a in enumerate(results):
        assert all(not torch.allclose(a, b) for b in results[:i])
    assert torch.equal(run(method="nag", strength=1.0, start=0.0, stop=1.0), results[0])
    before = processors(sd)
    for bad in ({"strength": -1.0}, {"start": 2.0}, {"method": "magic"}, {"method": "casteer"}):
        with pytest.raises(ValueError):
            fn.negate(sd, "dog", **bad)
        assert processors(sd) == before and hooks(sd) == 0


def test_an_error_in_the_block_restores_too(sd: Any) -> None:
    before = processors(sd)
    with pytest.raises(ZeroDivisionError), fn.negate(sd, "dog"):
        raise ZeroDivisionError
    assert processors(sd) == before and hooks(sd) == 0
    with installed(sd) as engine, mock.patch.object(sd.scheduler, "step", side_effect=ZeroDivisionError):
        with pytest.raises(ZeroDivisionError):
            negated(sd, [DOG])
        assert not engine.armed and not engine.live


def test_after_an_error_in_the_denoiser_nothing_is_live(sd: Any) -> None:
    fail = mock.patch.object(sd.unet.conv_out, "forward", side_effect=ZeroDivisionError)
    with installed(sd) as engine, fail:
        engine.set_requests([DOG])
        with pytest.raises(ZeroDivisionError):
            generate(sd)
        assert not engine.live


@pytest.mark.parametrize("kind", SUPPORTED)
def test_presets_take_the_constants_of_the_family(kind: str) -> None:
    constants = kind.split("_")[0]
    pipe = pipelines.build(kind)
    for preset in ("nag", "nasa"):
        with installed(pipe, rule=preset) as engine:
            assert engine.rule == Rule.preset(preset, family=constants)


def test_one_engine_at_a_time(sd: Any) -> None:
    with installed(sd):
        with pytest.raises(ValueError, match="remove"):
            fn.install(sd, bank_of(sd))
        with pytest.raises(ValueError, match="remove"):
            fn.negate(sd, "dog")


def test_an_engine_does_not_keep_its_pipeline_alive() -> None:
    pipe = pipelines.build("sd15")
    fn.install(pipe, bank_of(pipe))
    model = weakref.ref(pipe.unet)
    del pipe
    gc.collect()
    assert model() is None


# Rows.


@contextmanager
def by_hand(pipe: Any, *arguments: Any, **options: Any) -> Iterator[None]:
    """Processors without an engine, while it lasts."""
    before = processors(pipe)
    denoiser(pipe).set_attn_processor(fn.NegationAttnProcessor(*arguments, **options))
    yield
    denoiser(pipe).set_attn_processor(before)


@pytest.mark.parametrize(
    ("prompts", "policies", "guidance", "images", "rows"),
    [
        (1, [DOG], 5.0, 1, "_d"),
        (1, [DOG], 1.0, 1, "d"),
        (2, [DOG, None], 5.0, 1, "__d_"),
        (2, [None, DOG], 5.0, 2, "______dd"),
        (2, [DOG, None], 1.0, 2, "dd__"),
        (3, [DOG], 5.0, 1, "___ddd"),
        (2, [DOG], 1.0, 2, "dddd"),
    ],
)
def test_only_conditional_rows_of_the_request_are_negated(
    pipe: Any, prompts: int, policies: list, guidance: float, images: int, rows: str
) -> None:
    call = {"prompts": ["a cat", "a photo", "red"][:prompts], "guidance": guidance, "images": images}
    nobody = by_hand(pipe, bank_of(pipe), conditional=[False] * len(rows))  # our attention, no negation
    with attention_outputs(pipe) as plain, nobody:
        generate(pipe, steps=1, **call)
    with attention_outputs(pipe) as outputs, installed(pipe):
        negated(pipe, policies, steps=1, **call)
    assert len(outputs) == len(plain) > 0
    untouched = torch.stack([(a == b).flatten(1).all(1) for a, b in zip(outputs, plain)]).all(0)
    assert untouched.tolist() == [row == "_" for row in rows]


def test_a_live_batch_without_negation_is_the_untouched_pipeline_within_rounding(pipe: Any) -> None:
    """Rows without entries take our plain attention instead of torch's."""
    prompts = ["a cat", "a red dog"]
    untouched = generate(pipe, prompts)
    with installed(pipe):
        actual = negated(pipe, [None, DOG], prompts)
    torch.testing.assert_close(actual[0], untouched[0], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(actual[1], untouched[1])


REQUESTS = [("a cat", 1, DOG), ("red", 2, BOTH), ("a dog in it", 3, CAT), ("a photo of a dog", 4, DOG)]


def serve(pipe: Any, requests: Sequence[tuple[str, int, Policy | None]]) -> Tensor:
    prompts, seeds, policies = zip(*requests)
    return negated(pipe, policies, prompts, seeds=seeds)


def test_permuting_requests_permutes_results(pipe: Any) -> None:
    pipelines.row_by_row(pipe)
    with installed(pipe):
        order = [2, 0, 3, 1]
        expected = serve(pipe, REQUESTS)[order]
        assert torch.equal(serve(pipe, [REQUESTS[i] for i in order]), expected)


def test_a_request_does_not_see_its_batch_mates(pipe: Any) -> None:
    pipelines.row_by_row(pipe)
    others = [("it", 5, None), ("painting", 6, BOTH), ("a red cat", 7, Policy({"dog": 3.0}, stop=0.5))]
    with installed(pipe):
        for place in (0, 2, 3):
            mates = [*others[:place], REQUESTS[0], *others[place:]]
            here = [*REQUESTS[1 : place + 1], REQUESTS[0], *REQUESTS[place + 1 :]]
            assert torch.equal(serve(pipe, mates)[place], serve(pipe, here)[place])


def test_images_of_one_prompt_are_those_of_as_many_requests(pipe: Any) -> None:
    pipelines.row_by_row(pipe)
    prompts, policies = ["a cat", "a dog"], [DOG, None]
    with installed(pipe):
        together = negated(pipe, policies, prompts, images=2, seeds=[1, 2, 3, 4])
        apart = negated(pipe, [DOG, DOG, None, None], [p for p in prompts for _ in "ab"], seeds=[1, 2, 3, 4])
    assert torch.equal(together, apart)


@pytest.mark.parametrize(
    ("policies", "prompts", "message"),
    [
        ([DOG, CAT], ["a cat"], "1 prompts, but 2 policies"),
        ([DOG, CAT], ["a cat"] * 3, "3 prompts, but 2 policies"),
        ([DOG, None], ["a cat"] * 4, "4 prompts, but 2 policies"),
        ([DOG], ["a cat"] * 5, "10 rows.*max_batch=4"),
        ([DOG] * 5, ["a cat"] * 5, "5 policies.*max_batch=4"),
    ],
)
def test_a_batch_that_contradicts_the_policies_is_not_run(
    sd: Any, policies: list, prompts: list, message: str
) -> None:
    with installed(sd, max_batch=4), pytest.raises(RowMapError, match=message):
        negated(sd, policies, prompts)


# Time.


def steps_negated(pipe: Any, policy: Policy, steps: int, **options: Any) -> list[bool]:
    """At which steps the operator ran in place of diffusers' attention."""
    live = []
    engine = engine_of(pipe)

    def watch(*_arguments: Any) -> None:
        live.append(engine.live)

    handle = next(iter(pipelines.attentions(pipe).values())).register_forward_hook(watch)
    negated(pipe, [policy], steps=steps, **options)
    handle.remove()
    return live


@pytest.mark.parametrize(
    ("method", "window", "expected"),
    [
        ("nag", {}, "+++++"),
        ("nag", {"stop": 0.4}, "++---"),
        ("nag", {"start": 0.5}, "---++"),
        ("nag", {"start": 0.2, "stop": 0.6}, "-++--"),
        ("eiup", {}, "++++-"),
        ("eiup", {"stop": 1.0}, "+++++"),
    ],
)
def test_windows(pipe: Any, method: str, window: dict[str, float], expected: str) -> None:
    with installed(pipe, rule=method):
        live = steps_negated(pipe, Policy({"dog": 1.0}, **window), 5)
    assert live == [c == "+" for c in expected]


def test_each_request_of_a_batch_has_its_own_window(pipe: Any) -> None:
    """Which rows act changes from step to step, under layers that keep what they made."""
    policies = [
        Policy({"dog": 1.0}, stop=0.5),
        Policy({"cat": 1.0}, start=0.5),
        Policy({"dog": 1.0}, start=0.25),
    ]
    prompts = ["a cat", "a dog", "a photo"]
    with installed(pipe, rule="nag"):
        together = negated(pipe, policies, prompts, steps=4)
        for i, policy in enumerate(policies):
            mates = [None, None, None]
            mates[i] = policy
            alone = negated(pipe, mates, prompts, steps=4)[i]
            torch.testing.assert_close(together[i], alone, rtol=1e-3, atol=1e-4)


def test_outside_its_window_a_policy_changes_nothing(pipe: Any) -> None:
    def trace(run: Callable[..., Tensor]) -> list[Tensor]:
        seen: list[Tensor] = []

        def note(_pipe: Any, _i: int, _t: Any, given: dict[str, Any]) -> dict[str, Any]:
            seen.append(given["latents"].clone())
            return given

        if "PixArt" in type(pipe).__name__:
            return run(callback=lambda _i, _t, latents: seen.append(latents.clone())), seen
        return run(callback_on_step_end=note), seen

    untouched, before = trace(lambda **options: generate(pipe, steps=4, **options))
    with installed(pipe):
        late, after = trace(lambda **o: negated(pipe, [Policy({"dog": 1.0}, start=0.5)], steps=4, **o))
    assert [torch.equal(a, b) for a, b in zip(after, before)] == [True, True, False, False]
    assert not torch.equal(late, untouched)


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("PNDMScheduler", "+++---"),  # 5 steps are 6 calls
        ("HeunDiscreteScheduler", "+++++----"),  # 5 steps are 9 calls
        ("EulerAncestralDiscreteScheduler", "+++--"),
        ("DPMSolverMultistepScheduler", "+++--"),
        ("UniPCMultistepScheduler", "+++--"),
        ("LCMScheduler", "+++--"),
    ],
)
def test_windows_with_other_schedulers(sd: Any, scheduler: str, expected: str) -> None:
    options = {"skip_prk_steps": True} if scheduler == "PNDMScheduler" else {}
    sd.scheduler = getattr(diffusers, scheduler).from_config(sd.scheduler.config, **options)
    with installed(sd):
        live = steps_negated(sd, Policy({"dog": 1.0}, stop=0.5), 5)
    assert live == [c == "+" for c in expected]


def test_custom_timesteps(sd: Any) -> None:
    sd.scheduler = diffusers.EulerDiscreteScheduler.from_config(sd.scheduler.config)
    with installed(sd):
        live = steps_negated(sd, Policy({"dog": 1.0}, stop=0.5), 3, timesteps=[900, 700, 300, 100])
    assert live == [True, True, False, False]


# What is projected when.


@contextmanager
def projections() -> Iterator[list[Any]]:
    """The layers that project, whatever the text: prompts and concepts."""
    seen: list[Any] = []
    project = Classic.project

    def note(self: Any, attn: Any, context: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(attn)
        return project(self, attn, context)

    with mock.patch.object(Classic, "project", note):
        yield seen


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_concepts_of_plain_layers_are_projected_once_per_pipeline_call(kind: str) -> None:
    pipe = pipelines.build(kind)
    layers = list(pipelines.attentions(pipe).values())
    with installed(pipe), projections() as seen:
        for calls in (1, 2):
            negated(pipe, [DOG], steps=4)
            assert Counter(map(id, seen)) == {id(attn): calls * (4 + 1) for attn in layers}


def _hook(pipe: Any) -> None:
    for attn in pipelines.attentions(pipe).values():
        attn.to_v.register_forward_hook(lambda *_arguments: None)


def _patch(pipe: Any) -> None:
    for attn in pipelines.attentions(pipe).values():
        attn.to_k.forward = attn.to_k.forward


@pytest.mark.parametrize(
    ("kind", "change", "options"),
    [
        ("sd15", _hook, {}),
        ("sd15", _patch, {}),
        ("sd15", lambda _pipe: None, {"callback_on_step_end": lambda _pipe, _i, _t, given: given}),
        ("pixart_alpha", lambda _pipe: None, {}),  # its captions go through a projection of the model
    ],
    ids=["hooks", "another forward", "a callback", "projected captions"],
)
def test_else_they_are_projected_at_every_step(kind: str, change: Any, options: dict[str, Any]) -> None:
    pipe = pipelines.build(kind)
    change(pipe)
    layers = list(pipelines.attentions(pipe).values())
    with installed(pipe), projections() as seen:
        negated(pipe, [DOG], steps=4, **options)
    assert Counter(map(id, seen)) == {id(attn): 2 * 4 for attn in layers}


def test_weights_that_change_between_steps_are_seen(sd: Any) -> None:
    """In place, exchanged, or behind autograd's back."""
    latents = {}
    attn = next(iter(pipelines.attentions(sd).values()))
    weights = attn.to_v.weight.detach().clone()

    def in_place() -> None:
        with torch.no_grad():
            attn.to_v.weight.mul_(0.5)

    def exchanged() -> None:
        attn.to_v.weight = nn.Parameter(weights * 0.5)

    def behind() -> None:
        attn.to_v.weight.data.mul_(0.5)

    with installed(sd, rule="nag"):
        for change in (in_place, exchanged, behind):
            attn.to_v.weight = nn.Parameter(weights.clone())

            def halve(_pipe: Any, i: int, _t: Any, given: Any, change: Any = change) -> Any:
                if i == 0:
                    change()
                return given

            latents[change.__name__] = negated(sd, [DOG], callback_on_step_end=halve)
        attn.to_v.weight = nn.Parameter(weights.clone())
        unchanged = negated(sd, [DOG])
    assert torch.equal(latents["in_place"], latents["exchanged"])
    assert torch.equal(latents["in_place"], latents["behind"])
    assert not torch.allclose(latents["in_place"], unchanged)


class Adapted(nn.Module):
    """A linear layer with a low-rank part beside it, as adapters wrap it; its `weight` is the base's."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.scale = base, 0.0
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.down = nn.Linear(base.in_features, 2, bias=False)
            self.up = nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * self.up(self.down(x))


def test_adapters_around_projections_act_on_concepts(sd: Any) -> None:
    """Beside the weights or merged into them, and when they are switched between calls."""
    adapters = []
    for attn in pipelines.attentions(sd).values():
        for name in ("to_k", "to_v"):
            setattr(attn, name, Adapted(getattr(attn, name)))
            adapters.append(getattr(attn, name))
    with installed(sd):
        off = negated(sd, [DOG])
        for adapter in adapters:
            adapter.scale = 3.0
        beside = negated(sd, [DOG])
    with installed(sd):
        assert torch.equal(negated(sd, [DOG]), beside)
        for adapter in adapters:
            with torch.no_grad():
                adapter.base.weight += 3.0 * adapter.up.weight @ adapter.down.weight
            adapter.scale = 0.0
        merged = negated(sd, [DOG])
    torch.testing.assert_close(beside, merged, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(beside, off, rtol=1e-2, atol=1e-2)


def test_hot_swap_acts_at_the_next_call(sd: Any) -> None:
    with installed(sd, rule="nag") as engine:
        with engine.batch([BOTH]):
            before = generate(sd)
            engine.bank.update("dog", ConceptBank.from_prompts(sd, {"x": "a photo"})["x"])
            after = generate(sd)
            assert not torch.allclose(before, after)
            engine.bank.remove("cat")
            with pytest.raises(NegationNotAppliedError, match="'cat' was removed"):
                generate(sd)
        fewer = negated(sd, [Policy({"dog": 0.5})])
        assert not torch.allclose(fewer, after)
    with fn.negate(sd, {"dog": "a photo"}, method="nag", strength=0.5):
        torch.testing.assert_close(generate(sd), fewer)


# The watchdog.

DISPLACE: dict[str, Callable[[Any], None]] = {
    "SlicedAttnProcessor": lambda pipe: pipe.enable_attention_slicing(1),
    "FusedAttnProcessor2_0": lambda pipe: denoiser(pipe).fuse_qkv_projections(),
    "AttnProcessor2_0": lambda pipe: denoiser(pipe).set_attn_processor(AttnProcessor2_0()),
    "AttnProcessor": lambda pipe: denoiser(pipe).set_default_attn_processor(),
}


@pytest.mark.parametrize("name", DISPLACE)
def test_displaced_processors_stop_the_pipeline(name: str, sd: Any) -> None:
    with installed(sd):
        DISPLACE[name](sd)
        with pytest.raises(fn.DisplacedProcessorError, match=f"4 of 4 .*attn2.* by {name};"):
            negated(sd, [DOG])


@pytest.mark.parametrize("name", DISPLACE)
def test_displaced_processors_only_warn(name: str, sd: Any, caplog: pytest.LogCaptureFixture) -> None:
    with installed(sd, on_displaced="warn"):
        DISPLACE[name](sd)
        untouched = generate(sd)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "fastnegate"):
            assert torch.equal(negated(sd, [DOG]), untouched)
        assert f"by {name}" in caplog.text
        theirs = processors(sd)
    assert processors(sd) == theirs  # what somebody else put in our place stays theirs


@pytest.mark.parametrize("name", DISPLACE)
def test_displaced_processors_are_reinstalled(name: str, sd: Any, caplog: pytest.LogCaptureFixture) -> None:
    with installed(sd, on_displaced="reinstall"):
        expected = negated(sd, [DOG])
        DISPLACE[name](sd)
        with caplog.at_level(logging.WARNING, "fastnegate"):
            torch.testing.assert_close(negated(sd, [DOG]), expected, rtol=1e-3, atol=1e-4)
        assert f"by {name}" in caplog.text


def test_one_displaced_layer_is_enough(sd: Any) -> None:
    with installed(sd):
        name, attn = next(iter(pipelines.attentions(sd).items()))
        attn.set_processor(AttnProcessor2_0())
        with pytest.raises(fn.DisplacedProcessorError, match=f"1 of 4 .*{name} by"):
            negated(sd, [DOG])


def test_on_displaced_is_a_word(sd: Any) -> None:
    with pytest.raises(ValueError, match="on_displaced='ignore': allowed are raise, warn, reinstall"):
        fn.install(sd, bank_of(sd), on_displaced="ignore")


# Servers that call the denoiser themselves.


def direct(pipe: Any) -> Callable[..., Tensor]:
    """The denoiser's call in a pipeline call of two unguided prompts, to be repeated without the pipeline."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    model = denoiser(pipe)
    handle = model.register_forward_pre_hook(
        lambda _model, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    generate(pipe, ["a cat", "a photo"], guidance=1.0, steps=1)
    handle.remove()
    ((args, kwargs),) = calls

    def run(timestep: float | None = None) -> Tensor:
        given = args if timestep is None else (args[0], torch.tensor(timestep))
        with torch.no_grad():
            return denoiser(pipe)(*given, **kwargs)[0]

    return run


@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "after a guided call"])
def test_outside_a_pipeline_call_rows_must_be_said(pipe: Any, warm: bool) -> None:
    denoise = direct(pipe)
    untouched = denoise()
    with installed(pipe) as engine:
        if warm:
            generate(pipe)
        engine.set_requests([DOG])
        with pytest.raises((fn.UnsupportedModelError, NegationNotAppliedError), match="conditional"):
            denoise()
        engine.set_rows([DOG, None])
        first = denoise()
        assert not torch.allclose(first[0], untouched[0])
        torch.testing.assert_close(first[1], untouched[1], rtol=1e-3, atol=1e-4)
        engine.set_rows([CAT, DOG], row_map=[1, 0], conditional=[True, False])  # row 1 is unconditional
        second = denoise()
        torch.testing.assert_close(second[0], first[0])
        torch.testing.assert_close(second[1], untouched[1], rtol=1e-3, atol=1e-4)
        engine.clear()
        assert torch.equal(denoise(), untouched)
    with by_hand(pipe, bank_of(pipe)):
        with pytest.raises((fn.UnsupportedModelError, NegationNotAppliedError), match="conditional"):
            denoise()


def test_a_window_needs_a_timestep_of_the_scheduler(sd: Any) -> None:
    denoise = direct(sd)
    with installed(sd) as engine:
        sd.scheduler.set_timesteps(4)
        assert sd.scheduler.timesteps.tolist() == [751, 501, 251, 1]
        engine.set_rows([Policy({"dog": 1.0}, stop=0.5), None])
        early, late = denoise(501), denoise(251)
        with pytest.raises(NegationNotAppliedError, match="timestep"):
            denoise(500)
        engine.set_rows([DOG, None])
        denoise(500)  # no window: nothing to know
        engine.clear()
        assert not torch.allclose(denoise(501), early)
        assert torch.equal(denoise(251), late)


def test_attention_called_past_the_hook_raises(sd: Any) -> None:
    """Somebody runs the layers without the denoiser's own call, which prepares the rows."""
    inputs = torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 77, 32)
    with installed(sd) as engine, torch.no_grad():
        untouched = sd.unet.forward(*inputs).sample
        engine.set_rows([DOG])
        with pytest.raises(NegationNotAppliedError, match=r"attn2.*without the hook"):
            sd.unet.forward(*inputs)
        engine.clear()
        assert torch.equal(sd.unet.forward(*inputs).sample, untouched)


# The plain idiom of diffusers.


@pytest.mark.parametrize(("kind", "method"), KINDS_AND_METHODS)
def test_processors_set_by_hand_do_what_install_does(kind: str, method: str) -> None:
    pipe = pipelines.build(kind)
    bank, prompts = bank_of(pipe), ["a cat", "a photo"]
    untouched = generate(pipe, prompts)
    with fn.negate(pipe, bank, METHODS[method], stop=1.0):
        expected = generate(pipe, prompts)
    with by_hand(pipe, bank, METHODS[method]):
        actual = generate(pipe, prompts)
    assert (actual - expected).norm() < (actual - untouched).norm() / 1000


def test_by_hand_rows_follow_the_guidance(pipe: Any) -> None:
    bank, untouched = bank_of(pipe), generate(pipe)
    with by_hand(pipe, bank, OPEN):
        unguided = generate(pipe, guidance=1.0)
        guided = generate(pipe)
    with by_hand(pipe, bank, OPEN, conditional="all"):
        assert torch.equal(generate(pipe, guidance=1.0), unguided)
        everything = generate(pipe)
    with by_hand(pipe, bank, OPEN, conditional=[False, True]):
        assert torch.equal(generate(pipe), guided)
    assert not torch.allclose(everything, guided) and not torch.allclose(everything, untouched)


def test_by_hand_hot_swap_and_strengths(sd: Any) -> None:
    bank = bank_of(sd)

    def run(**strengths: float) -> Tensor:
        with by_hand(sd, bank, "nag", strengths=strengths):
            return generate(sd)

    results = [run(dog=1.0), run(dog=0.5), run(cat=0.5), run(dog=0.5, cat=0.5), run()]
    for i, a in enumerate(results):
        assert all(not torch.allclose(a, b) for b in results[:i])
    with by_hand(sd, bank, "nag", strengths={"dog": 0.5}):
        bank.update("dog", bank["cat"])
        assert torch.equal(generate(sd), results[2])


# Precision.


def check_rounding(actual: Tensor, negated: Tensor, untouched: Tensor) -> None:
    """It differs from full precision, but far less than from the pipeline that does not negate."""
    assert actual.isfinite().all()
    assert 0 < (actual.float() - negated).norm() < (actual.float() - untouched).norm() / 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(pipe: Any, dtype: torch.dtype) -> None:
    bank = bank_of(pipe)
    untouched = generate(pipe)
    with fn.negate(pipe, bank, OPEN):
        full = generate(pipe)
    pipe.to(dtype)
    with fn.negate(pipe, bank, OPEN):
        actual = generate(pipe)
    assert actual.dtype == dtype
    check_rounding(actual, full, untouched)


def test_autocast(sd: Any) -> None:
    untouched = generate(sd)
    with fn.negate(sd, "dog", OPEN):
        full = generate(sd)
        with torch.autocast("cpu", torch.bfloat16):
            actual = generate(sd)
        assert torch.equal(generate(sd), full)
    check_rounding(actual, full, untouched)


def test_a_pipeline_may_change_its_precision_under_the_engine(sd: Any) -> None:
    bank = bank_of(sd)
    with fn.negate(sd, bank, OPEN):
        full = generate(sd)
        sd.to(torch.bfloat16)
        half = generate(sd)
        sd.to(torch.float32)  # weights stay rounded
        assert not torch.equal(generate(sd), full)
    sd.to(torch.bfloat16)
    with fn.negate(sd, bank, OPEN):
        assert torch.equal(generate(sd), half)


# Statistics.


def test_an_observer_gets_one_record_per_layer_and_live_step(pipe: Any) -> None:
    records: list[Record] = []
    layers = list(pipelines.attentions(pipe))
    with installed(pipe) as engine:
        plain = negated(pipe, [None, Policy({"dog": 1.0}, stop=0.5)], ["a cat", "a dog"], steps=4)
        engine.observer = records.append
        watched = negated(pipe, [None, Policy({"dog": 1.0}, stop=0.5)], ["a cat", "a dog"], steps=4)
    torch.testing.assert_close(watched, plain)
    assert Counter((r.step, r.layer) for r in records) == Counter(itertools.product((0, 1), layers))
    for record in records:
        assert record.requests == (None, None, 0, 1)
        assert record.entries == ((0, 3, "dog"), (1, 3, "dog"))  # two prototypes
        energy = record.statistics.removed_energy
        assert energy[:3].tolist() == [0.0] * 3 and energy[3] > 0
        assert record.statistics.gate_max[:2].max() > 0 and not record.statistics.gate_max[2:].any()
        assert not record.statistics.nonfinite.any()


# Who is refused.


def test_unknown_pipelines_are_refused() -> None:
    flux, bank = pipelines.build("flux"), bank_of(pipelines.build("sd15"))
    pipe = pipelines._around(flux, diffusers.FluxControlPipeline)
    for refuse in (lambda: fn.install(pipe, bank), lambda: fn.negate(pipe, "dog")):
        with pytest.raises(fn.UnsupportedModelError, match=r"FluxControlPipeline.*PixArtSigmaPipeline"):
            refuse()


def test_subclasses_are_known_by_their_call(sd: Any) -> None:
    class Same(diffusers.StableDiffusionPipeline):
        pass

    class Different(diffusers.StableDiffusionPipeline):
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            return super().__call__(*arguments, **options)

    bank = bank_of(sd)
    same, different = (c(**sd.components, requires_safety_checker=False) for c in (Same, Different))
    fn.install(same, bank).remove()
    with pytest.raises(fn.UnsupportedModelError, match="Different"):
        fn.install(different, bank)


def test_another_pipeline_around_the_same_model(sd: Any) -> None:
    """Its calls are calls of the same denoiser, with its own rows and steps."""
    other = diffusers.StableDiffusionImg2ImgPipeline(**sd.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)

    def run(strength: float = 0.5) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        image = torch.zeros(1, 3, 32, 32)
        options = {"num_inference_steps": 4, "strength": strength, "output_type": "latent"}
        return other("a cat", image=image, generator=generator, **options).images

    untouched, all_steps = run(), run(1.0)
    with installed(sd, rule="nag") as engine:
        assert torch.equal(run(), untouched)
        with engine.batch([DOG]):
            assert not torch.allclose(run(), untouched)
        with engine.batch([Policy({"dog": 1.0}, start=0.5)]):
            assert not torch.allclose(run(), untouched)  # two of four steps run, the last ones
        early = Policy({"dog": 1.0}, stop=0.5)
        with pytest.raises(NegationNotAppliedError, match="none of the 2 steps that run"):
            with engine.batch([early]):
                run()
        with engine.batch([early]):
            assert not torch.allclose(run(1.0), all_steps)
        engine.set_rows([DOG], row_map=[None, 0])
        assert not torch.allclose(run(), untouched)


def test_a_pipeline_that_nobody_knows_around_the_same_model(sd: Any) -> None:
    """Its batch layout is not known: it runs without a policy and refuses one."""

    class Unknown(diffusers.StableDiffusionPipeline):
        def __call__(self, prompt: str) -> Tensor:
            text, _ = self.encode_prompt(prompt, "cpu", 1, False)
            return self.unet(torch.ones(1, 4, 16, 16), 1, text).sample

    other = Unknown(**sd.components, requires_safety_checker=False)
    with torch.no_grad():
        untouched = other("a cat")
        with installed(sd) as engine:
            assert torch.equal(other("a cat"), untouched)
            with pytest.raises(fn.UnsupportedModelError, match="conditional"), engine.batch([DOG]):
                other("a cat")
            engine.set_rows([DOG])
            assert not torch.allclose(other("a cat"), untouched)


def test_guiders_tell_steps_and_rows() -> None:
    """A pipeline of blocks calls its denoiser once for each kind of rows, as a guider says."""
    whole = pipelines.build("sdxl")
    pipe = StableDiffusionXLAutoBlocks().init_pipeline()
    names = pipe.components.keys() & whole.components.keys()
    pipe.update_components(**{name: whole.components[name] for name in names if whole.components[name]})
    pipe.set_progress_bar_config(disable=True)

    def run(prompts: Any = "a cat", steps: int = 4) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        size = {"height": 32, "width": 32, "output_type": "latent"}
        return pipe(prompt=prompts, num_inference_steps=steps, generator=generator, output="images", **size)

    untouched, records = run(), []
    with installed(pipe, rule="nag") as engine:
        assert torch.equal(run(), untouched)
        engine.observer = records.append
        with engine.batch([Policy({"dog": 1.0}, stop=0.5)]):
            assert not torch.allclose(run(), untouched)
        assert {record.requests for record in records} == {(0,)}  # of the conditional calls alone
        assert {record.step for record in records} == {0, 1} and engine.call == 1
        records.clear()
        with engine.batch([None, DOG]):
            run(["a cat", "a dog"])
        assert {record.requests for record in records} == {(0, 1)}
        assert all({row for _, row, _ in record.entries} == {1} for record in records)
        with pytest.raises(RowMapError, match="4 prompts, but 2 policies"), engine.batch([None, DOG]):
            run(["a cat", "a dog", "red", "a photo"])
        with pytest.raises(NegationNotAppliedError, match="none of the 1 steps"):
            with engine.batch([Policy({"dog": 1.0}, start=0.5)]):
                run(steps=1)
        with engine.batch([DOG]):
            expected = run()
    with by_hand(pipe, engine.bank, "nag", strengths={"dog": 1.0, "cat": 0.0}):
        torch.testing.assert_close(run(), expected, rtol=1e-3, atol=1e-4)  # of the conditional calls alone


def test_a_pipeline_made_of_the_class_of_an_installed_one(sd: Any) -> None:
    with installed(sd, rule="nag") as engine:
        expected = negated(sd, [DOG])
        second = type(sd)(**sd.components, requires_safety_checker=False)
        second.set_progress_bar_config(disable=True)
        assert type(second) is diffusers.StableDiffusionPipeline
        for _ in range(3):
            with engine.batch([DOG]):
                assert torch.equal(generate(second), expected)
    assert type(second) is diffusers.StableDiffusionPipeline


def test_processors_of_others_stay_wrapped(sd: Any) -> None:
    """`AttnProcessor` computes without torch's fused attention; it stays what runs without a policy."""
    sd.unet.set_attn_processor(AttnProcessor())
    untouched, before = generate(sd), processors(sd)
    with installed(sd):
        assert torch.equal(generate(sd), untouched)
        assert not torch.allclose(negated(sd, [DOG]), untouched)
    assert processors(sd) == before
    assert {type(p) for p in before.values()} == {AttnProcessor}


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deep", "flat", "pickle"],
)
def test_copies_of_the_model_are_clean(sd: Any, copied: Callable[[Any], Any]) -> None:
    denoise = direct(sd)
    untouched, original = denoise(), sd.unet
    with installed(sd) as engine:
        engine.set_rows([DOG, None])
        sd.unet = clean = copied(original)
        assert type(clean) is diffusers.UNet2DConditionModel and hooks(sd) == 1  # the pipeline has its engine
        if copied is not copy.copy:  # a flat copy has the very same layers
            assert {type(p) for p in clean.attn_processors.values()} == {AttnProcessor2_0}
            assert torch.equal(denoise(), untouched)
        with pytest.raises(fn.DisplacedProcessorError, match="unet is another one"):
            generate(sd)
        sd.unet = original
        assert not torch.allclose(denoise(), untouched)


def test_copies_of_the_pipeline_are_clean(sd: Any) -> None:
    untouched = generate(sd)
    with installed(sd) as engine:
        engine.set_requests([DOG])
        twin = copy.deepcopy(sd)
        assert (
            type(twin) is diffusers.StableDiffusionPipeline and hooks(twin) == 0 and engine_of(twin) is None
        )
        assert torch.equal(generate(twin), untouched)
        assert not torch.allclose(generate(sd), untouched)


def test_what_is_left_can_always_be_removed(sd: Any) -> None:
    """Also when the engine is lost, modules were replaced, or nothing is there."""
    untouched = generate(sd)
    fn.install(sd, bank_of(sd)).set_requests([DOG])
    fn.remove(sd)
    assert torch.equal(generate(sd), untouched) and hooks(sd) == 0 and engine_of(sd) is None
    fn.remove(sd)
    fn.install(sd, bank_of(sd)).set_requests([DOG])
    block = sd.unet.mid_block
    for name, fresh in pipelines.build("sd15").unet.mid_block.named_children():
        setattr(block, name, fresh)
    with pytest.raises(fn.DisplacedProcessorError):
        generate(sd)
    fn.remove(sd)
    generate(sd)
    sd.unet.set_attn_processor(fn.NegationAttnProcessor(bank_of(sd), OPEN))
    fn.remove(sd)
    assert hooks(sd) == 0 and not any(
        isinstance(p, fn.NegationAttnProcessor) for p in processors(sd).values()
    )


def test_negative_prompts_follow_the_text_encoder(sd: Any) -> None:
    """What was encoded stays while the encoder does; a changed one encodes anew, a freed one is not asked."""
    encode = mock.patch.object(sd, "encode_prompt", wraps=sd.encode_prompt)
    with installed(sd, rule="nag") as engine, encode as encoded:

        def asked() -> bool:
            encoded.reset_mock()
            engine.set_requests([Policy(negative_prompt="red")])
            return encoded.called

        assert [asked(), asked()] == [True, False]
        with torch.no_grad():
            sd.text_encoder.get_input_embeddings().weight.mul_(1.5)
        assert [asked(), asked()] == [True, False]
        sd.text_encoder = None
        assert not asked()


@pytest.mark.parametrize("kind", ["sd15", "wan"])
def test_a_batch_proves_its_steps(kind: str) -> None:
    """Of Wan each step has two calls of the denoiser; its concepts act in one of them."""
    pipe = pipelines.build(kind)
    engine = fn.install(pipe, fn.ConceptBank.from_prompts(pipe, {"dog": "dog", "cat": "cat"}), rule="nag")
    with engine.batch([Policy({"dog": 1.0}), Policy({"cat": 1.0}, stop=0.5)]) as batch:
        generate(pipe, ["a cat", "a dog"], steps=4)
    assert [(proof.steps, proof.concepts) for proof in batch.proofs] == [(4, {"dog": 4}), (4, {"cat": 2})]
    assert {proof.bank for proof in batch.proofs} == {engine.bank.digest}
