# SPDX-License-Identifier: Apache-2.0
"""What has gone wrong once, each by the smallest test of it."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import gc
import pickle
import weakref
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import fastnegate as fn
from fastnegate.engine.session.batch import _ENTRIES

pytest.importorskip("diffusers")

import diffusers
from pipelines import attentions, build, generate, one_thread  # noqa: F401
from schedules import BARE, CAT, DOG, NAMED, House, bank_of, fair, house, negated, outcome

from fastnegate.integrations.diffusers.contract import denoiser


@pytest.fixture
def sd() -> House:
    return house()


def between_steps(pipe: Any, change: Callable[[], Any]) -> None:
    """Without a callback, so that what may be kept is kept."""
    step = pipe.scheduler.step

    def changed(*args: Any, **kwargs: Any) -> Any:
        change()
        return step(*args, **kwargs)

    pipe.scheduler.step = changed


# ---- silent: an image that is not what was asked for -------------------------------------------


def _redefine(h: House) -> None:
    other = fn.ConceptBank.from_prompts(h.pipe, {"dog": "red"}, templates=["{}"])
    h.engine.bank.update("dog", other["dog"])


MEANWHILE: dict[str, Callable[[House], Any]] = {
    "cleared": lambda h: h.engine.clear(),
    "others set for everybody": lambda h: h.engine.set_requests([CAT]),
    "rows set": lambda h: h.engine.set_rows([CAT], [None, 0]),
    "concept redefined": _redefine,
}


@pytest.mark.parametrize("change", MEANWHILE)
def test_what_changes_during_a_call_for_everybody_acts_at_the_next(sd: House, change: str) -> None:
    """`clear` and `set_requests` promise that calls that run keep theirs."""
    step = sd.pipe.scheduler.step
    sd.pipe.scheduler.step = lambda *a, **k: (
        BARE["Thread"](lambda: (MEANWHILE[change](sd), 0)),
        step(*a, **k),
    )[1]
    sd.engine.set_requests([DOG])
    assert fair(outcome(sd), sd.dog)


def test_a_concept_redefined_during_a_call_acts_at_the_next(sd: House) -> None:
    between_steps(sd.pipe, lambda: _redefine(sd))
    assert fair(outcome(lambda: negated(sd.pipe, sd.engine)), sd.dog)


def test_a_batch_left_from_elsewhere_during_a_call_stops_it_or_lets_it_end(sd: House) -> None:
    batch = sd.engine.batch([DOG])

    def leave(pipe: Any, i: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        if i == 0:
            contextvars.copy_context().run(batch.__exit__, None, None, None)
        return given

    def request() -> Any:
        batch.__enter__()
        return outcome(lambda: sd(callback_on_step_end=leave))

    assert fair(contextvars.Context().run(request), sd.dog)


GONE: dict[str, Callable[[House], Any]] = {
    "engine removed": lambda h: h.engine.remove(),
    "all removed": lambda h: fn.remove(h.pipe),
    "another engine": lambda h: (h.engine.remove(), fn.install(h.pipe, h.engine.bank, rule="nag")),
}


@pytest.mark.parametrize("change", GONE)
def test_an_engine_removed_between_two_calls_of_a_batch_is_noticed(sd: House, change: str) -> None:
    got: list[Any] = []

    def batch() -> None:
        with sd.engine.batch([DOG]):
            sd()
            GONE[change](sd)
            got.append(sd())

    assert isinstance(outcome(batch), NAMED) or torch.equal(got[0], sd.dog)


@pytest.mark.parametrize("when", ["during a call", "between two calls"])
def test_the_denoiser_of_a_sibling_pipeline_swapped(sd: House, when: str) -> None:
    """A pipeline around the same components is watched as the one that the engine was installed in."""
    sibling = diffusers.StableDiffusionPipeline(**sd.pipe.components, requires_safety_checker=False)
    sibling.set_progress_bar_config(disable=True)

    def swap(pipe: Any, i: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipe.unet = build("sd15").unet
        return given

    got: list[Any] = []

    def batch() -> None:
        with sd.engine.batch([DOG]):
            if when == "during a call":
                got.append(generate(sibling, callback_on_step_end=swap))
            else:
                generate(sibling)
                sibling.unet = build("sd15").unet
                got.append(generate(sibling))

    assert isinstance(outcome(batch), NAMED) or torch.equal(got[0], sd.dog)


BY_HAND: dict[str, Callable[[Any], Any]] = {
    "slicing": lambda p: p.enable_attention_slicing(1),
    "fused projections": lambda p: p.fuse_qkv_projections(),
    "a block": lambda p: p.unet.up_blocks.__setitem__(0, build("sd15").unet.up_blocks[0]),
}


@pytest.mark.parametrize("change", BY_HAND)
def test_processors_set_layer_by_layer_are_watched(sd: House, change: str) -> None:
    sd.engine.remove()
    ours = fn.NegationAttnProcessor(bank_of(sd.pipe), "nag", conditional="all")
    for attn in attentions(sd.pipe).values():
        attn.set_processor(ours)
    want = sd()
    BY_HAND[change](sd.pipe)
    assert fair(outcome(sd), want)


def _scale_weights(pipe: Any, factor: float) -> None:
    for attn in attentions(pipe).values():
        for part in (attn.to_k, attn.to_v):
            part.weight.data.mul_(factor)


@pytest.mark.parametrize("where", ["hook", "scheduler"])
def test_weights_changed_in_place_without_a_callback(where: str) -> None:
    """`.data` leaves no trace in the version of a parameter. The reference projects at every step."""
    images = []
    for kept in (True, False):
        h = house()
        pipe = h.pipe
        if not kept:  # somebody's hook: nothing may be kept
            for attn in attentions(pipe).values():
                attn.to_k.register_forward_hook(lambda *_: None)
        if where == "hook":
            pipe.unet.register_forward_pre_hook(lambda *_, p=pipe: _scale_weights(p, 1.5))
        else:
            step = pipe.scheduler.step
            pipe.scheduler.step = lambda *a, p=pipe, step=step, **k: (_scale_weights(p, 1.5), step(*a, **k))[
                1
            ]
        images.append(negated(pipe, h.engine))
    assert torch.equal(*images)


def _loss(model: Any, text: Tensor) -> Tensor:
    sample = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"timestep": torch.tensor([500])}
    if isinstance(model, diffusers.PixArtTransformer2DModel):
        options["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return model(sample, encoder_hidden_states=text, **options).sample.square().mean()


def _gradients(model: Any, *losses: Tensor) -> list[Tensor]:
    model.zero_grad()
    sum(losses).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def _text() -> Tensor:
    return torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["sd15", "pixart_alpha"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("leaf", [False, True])
def test_checkpointing_recomputes_right(kind: str, reentrant: bool, leaf: bool) -> None:
    """What is recomputed after the call; text that is made by trained modules is another tensor then."""
    h = house(kind)
    model = denoiser(h.pipe)
    model.train()

    def gradients() -> list[Tensor]:
        text = _text().requires_grad_()
        h.engine.set_rows([DOG])
        loss = _loss(model, text if leaf else 1.0 * text)
        h.engine.clear()
        return _gradients(model, loss)

    want = gradients()
    model.enable_gradient_checkpointing(
        lambda f, *a: torch.utils.checkpoint.checkpoint(f, *a, use_reentrant=reentrant)
    )
    got = outcome(gradients)
    assert isinstance(got, NAMED) or all(map(torch.allclose, got, want))


@pytest.mark.parametrize("kind", ["sd15", "pixart_alpha"])
@pytest.mark.parametrize("second", ["asks for nothing", "asks for another"])
def test_checkpointing_two_calls_with_one_text(kind: str, second: str) -> None:
    """As a loss that compares a model with negation and without."""
    h = house(kind)
    model = denoiser(h.pipe)
    model.train()

    def gradients() -> list[Tensor]:
        text = _text()
        h.engine.set_rows([DOG])
        first = _loss(model, text)
        h.engine.set_rows([CAT]) if second == "asks for another" else h.engine.clear()
        other = _loss(model, text)
        h.engine.clear()
        return _gradients(model, first, 3 * other)

    want = gradients()
    model.enable_gradient_checkpointing()
    got = outcome(gradients)
    assert isinstance(got, NAMED) or all(map(torch.allclose, got, want))


@pytest.mark.parametrize("steps", [1, 3])
def test_weights_changed_in_place_in_a_loop_of_ones_own(steps: int) -> None:
    """A server's own loop: its code runs between steps, and between calls."""
    images = []
    for kept in (True, False):
        h = house()
        unet, scheduler = h.pipe.unet, h.pipe.scheduler
        if not kept:
            for attn in attentions(h.pipe).values():
                attn.to_k.register_forward_hook(lambda *_: None)
        h.engine.set_rows([DOG])
        scheduler.set_timesteps(steps)
        sample, text = torch.ones(1, 4, 16, 16), torch.linspace(-1, 1, 77 * 32).view(1, 77, 32)
        made = []
        with torch.no_grad():
            for _ in range(2):
                for t in scheduler.timesteps:
                    made.append(unet(sample, t, text).sample)
                    _scale_weights(h.pipe, 1.5)
        images.append(torch.stack(made))
    assert torch.equal(*images)


@pytest.mark.parametrize("make", ["generator", "async generator", "future", "iterator"])
def test_results_that_run_later_are_refused(sd: House, make: str) -> None:
    async def stream() -> AsyncIterator[Tensor]:
        yield sd()

    with ThreadPoolExecutor(1) as pool, contextlib.suppress(*NAMED), sd.engine.batch([DOG]) as batch:
        calls: dict[str, Callable[[], Any]] = {
            "generator": lambda: (sd() for _ in range(1)),
            "async generator": lambda: stream(),
            "future": lambda: pool.submit(sd),
            "iterator": lambda: map(lambda _: sd(), range(1)),
        }
        with pytest.raises(TypeError):
            batch.run(calls[make])


def test_an_abandoned_coroutine_does_not_touch_the_context_that_collects_it(sd: House) -> None:
    async def waits() -> None:
        await asyncio.Event().wait()

    async def start(batch: Any, kept: list[Any]) -> None:
        kept.append(batch.bind(waits)())
        with contextlib.suppress(StopIteration):
            kept[0].send(None)

    kept: list[Any] = []
    with sd.engine.batch([None]) as other:
        asyncio.run(start(other, kept))
    with sd.engine.batch([DOG]):
        kept.pop().close()  # as the garbage collector does, wherever it runs
        assert fair(outcome(sd), sd.dog)
        assert torch.equal(sd(), sd.dog)


def test_a_copied_context_that_outlives_its_batch_is_stopped(sd: House) -> None:
    with sd.engine.batch([DOG]):
        sd()
        context = contextvars.copy_context()
    assert isinstance(outcome(lambda: context.run(sd)), fn.NegationNotAppliedError)
    assert torch.equal(sd(), sd.plain)


def test_a_callback_scheduled_without_a_task_that_outlives_its_batch_is_stopped(sd: House) -> None:
    loop, results = asyncio.new_event_loop(), []
    with sd.engine.batch([DOG]):
        sd()
        loop.call_soon(lambda: results.append(outcome(sd)))
    loop.call_later(0.01, loop.stop)
    loop.run_forever()
    loop.close()
    assert isinstance(results[0], fn.NegationNotAppliedError)


def test_what_is_set_during_a_call_that_asked_for_nothing_acts_at_the_next(sd: House) -> None:
    def meanwhile(pipe: Any, i: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        sd.engine.set_requests([DOG])
        return given

    assert fair(outcome(lambda: sd(callback_on_step_end=meanwhile)), sd.plain)
    assert torch.equal(sd(), sd.dog)


def test_interrupt_after_the_denoiser_was_swapped(sd: House) -> None:
    def stop(pipe: Any, i: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        if i == 0:
            pipe.unet = build("sd15").unet
        pipe._interrupt = i == 1
        return given

    assert isinstance(
        outcome(lambda: negated(sd.pipe, sd.engine, callback_on_step_end=stop)), fn.NegationNotAppliedError
    )


# ---- loud, but wrong; or left behind -----------------------------------------------------------


def test_from_pipe_takes_an_installed_pipeline(sd: House) -> None:
    """diffusers compares `type(component)`, which is ours while an engine is installed."""
    other = diffusers.StableDiffusionPipeline.from_pipe(sd.pipe)
    other.set_progress_bar_config(disable=True)
    assert torch.equal(negated(other, sd.engine), sd.dog)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))], ids=["copy", "pickle"]
)
def test_processors_by_hand_can_be_removed_from_copies(sd: House, copied: Callable[[Any], Any]) -> None:
    sd.engine.remove()
    sd.pipe.unet.set_attn_processor(fn.NegationAttnProcessor(bank_of(sd.pipe), "nag", conditional="all"))
    other = copied(sd.pipe)
    fn.remove(other)
    other.set_progress_bar_config(disable=True)
    assert torch.equal(generate(other), sd.plain)
    fn.install(other, bank_of(other)).remove()


def test_a_denoiser_compiled_during_a_call_is_an_error_with_a_name(sd: House) -> None:
    def compile_it(pipe: Any, i: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        if i == 0:
            pipe.unet = torch.compile(pipe.unet, backend="eager")
        return given

    torch._dynamo.reset()
    assert fair(outcome(lambda: negated(sd.pipe, sd.engine, callback_on_step_end=compile_it)), sd.dog)
    torch._dynamo.reset()


def test_audits_cross(sd: House) -> None:
    first, second = fn.audit(sd.pipe), fn.audit(sd.pipe)
    a = first.__enter__()
    b = second.__enter__()
    negated(sd.pipe, sd.engine)
    first.__exit__(None, None, None)
    negated(sd.pipe, sd.engine)
    second.__exit__(None, None, None)
    negated(sd.pipe, sd.engine)
    assert sd.engine.observer is None
    assert [len({line["image"] for line in audit.report()}) for audit in (a, b)] == [1, 2]


def test_many_batches_left_in_another_context_leave_nothing(sd: House) -> None:
    alive = []

    def many() -> None:
        for _ in range(500):
            batch = sd.engine.batch([None]).__enter__()
            contextvars.copy_context().run(batch.__exit__, None, None, None)
            alive.append(weakref.ref(batch))
            del batch
        gc.collect()
        assert len(_ENTRIES.get()) <= 1
        assert sum(ref() is not None for ref in alive) <= 1
        assert torch.equal(sd(), sd.plain)

    contextvars.Context().run(many)


def _nameless(model: Any) -> None:
    """What engines and caches do to a denoiser: another function in the place of its own."""
    own = model.forward
    model.forward = lambda *args, **kwargs: own(*args, **kwargs)


def test_a_forward_that_was_wrapped_before_is_negated(sd: House) -> None:
    """Arguments by position have the names that the class gives them."""
    wrapped = house(prepare=lambda pipe: _nameless(pipe.unet))
    assert torch.equal(wrapped.dog, sd.dog) and torch.equal(wrapped.plain, sd.plain)


def test_a_forward_that_was_wrapped_afterwards_is_negated(sd: House) -> None:
    _nameless(sd.pipe.unet)
    assert torch.equal(negated(sd.pipe, sd.engine), sd.dog)


def test_a_call_without_a_sample_says_what_it_has(sd: House) -> None:
    with pytest.raises(
        fn.UnsupportedModelError, match="without sample, hidden_states or x: what it got is t"
    ):
        sd.pipe.unet(t=torch.ones(1))
