# SPDX-License-Identifier: Apache-2.0
"""What people who serve diffusion models do to them: a request that asked for negation gets it or an error
with a name, and one that did not is left alone. Most of these went wrong once."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import functools
import gc
import pickle
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
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
from schedules import BARE, CAT, DOG, NAMED, THREADS, House, bank_of, fair, house, negated, outcome

from fastnegate.integrations.diffusers.contract import denoiser


@pytest.fixture
def sd() -> House:
    return house()


def fails(error: type[Exception] | tuple[type[Exception], ...] = NAMED, match: str = "") -> Any:
    return pytest.raises(error, match=match)


# ---- contexts: coroutines, threads, frameworks -------------------------------------------------


def test_two_coroutines_and_a_lock_around_the_pipeline(sd: House) -> None:
    async def request(policy: fn.Policy | None, lock: asyncio.Lock) -> Tensor:
        with sd.engine.batch([policy]):
            async with lock:
                return await asyncio.to_thread(sd)

    async def main() -> list[Tensor]:
        lock = asyncio.Lock()
        first = asyncio.create_task(request(DOG, lock))
        await asyncio.sleep(0)
        return await asyncio.gather(first, *(asyncio.create_task(request(p, lock)) for p in (None, CAT)))

    dog, plain, cat = asyncio.run(main())
    assert torch.equal(dog, sd.dog) and torch.equal(plain, sd.plain) and torch.equal(cat, sd.cat)
    assert not sd.engine.armed


def test_a_thread_does_not_see_the_batch_of_another(sd: House) -> None:
    with sd.engine.batch([DOG]):
        assert torch.equal(BARE["Thread"](sd), sd.plain)
        assert torch.equal(sd(), sd.dog)


@pytest.mark.parametrize("way", THREADS)
def test_bind_and_run_carry_a_batch_into_threads(sd: House, way: str) -> None:
    with sd.engine.batch([CAT]) as outer, sd.engine.batch([DOG]) as batch:
        for call in (batch.bind(sd), lambda: batch.run(sd), batch.bind(lambda: outer.run(batch.run, sd))):
            assert torch.equal(THREADS[way](call), sd.dog)
        assert torch.equal(THREADS[way](outer.bind(sd)), sd.cat)


@pytest.mark.parametrize("way", BARE)
def test_a_thread_that_nobody_bound_is_noticed(sd: House, way: str) -> None:
    with fails(match="bind"), sd.engine.batch([DOG]):
        assert torch.equal(BARE[way](sd), sd.plain)


@pytest.mark.parametrize("way", BARE)
def test_servers_have_it_raised_at_once(way: str) -> None:
    pipe = build("sd15")
    engine = fn.install(pipe, bank_of(pipe), rule="nag", unasked="raise")
    with fails(match="nobody said"), engine.batch([DOG]):
        BARE[way](lambda: generate(pipe))
    with engine.batch([None]) as batch:
        BARE[way](batch.bind(lambda: generate(pipe)))


class _Callable:
    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call

    def __call__(self) -> Any:
        return self.call()


def test_everything_that_is_called_can_be_bound(sd: House) -> None:
    async def soon() -> Tensor:
        await asyncio.sleep(0)
        return sd()

    with sd.engine.batch([DOG]) as batch:
        for now in (sd, _Callable(sd), functools.partial(sd), lambda: sd(), sd.__call__):
            assert torch.equal(BARE["Thread"](batch.bind(now)), sd.dog)
        for later in (soon, functools.partial(soon)):
            bound = batch.bind(later)
            assert torch.equal(BARE["Thread"](lambda bound=bound: asyncio.run(bound())), sd.dog)


def test_what_would_run_outside_of_the_batch_is_refused(sd: House) -> None:
    async def soon() -> Tensor:
        return sd()

    def images() -> Iterator[Tensor]:
        yield sd()

    async def stream() -> AsyncIterator[Tensor]:
        yield sd()

    class Soon:
        async def __call__(self) -> Tensor:
            return sd()

    with contextlib.suppress(*NAMED), sd.engine.batch([DOG]) as batch:
        for later in (images, stream, functools.partial(images)):
            with pytest.raises(TypeError):
                batch.bind(later)
        for later in (soon, images, stream, lambda: soon(), Soon()):
            with pytest.raises(TypeError):
                batch.run(later)


def test_a_task_that_outlives_its_batch_is_stopped(sd: House) -> None:
    async def later(ended: asyncio.Event) -> Any:
        await ended.wait()
        return outcome(sd)

    async def main() -> Any:
        ended = asyncio.Event()
        with sd.engine.batch([DOG]):
            sd()
            task = asyncio.create_task(later(ended))
            await asyncio.sleep(0)
        ended.set()
        return await task

    assert isinstance(asyncio.run(main()), fn.NegationNotAppliedError)


def test_a_callback_of_the_loop_that_outlives_its_batch_is_stopped(sd: House) -> None:
    results: list[Any] = []

    async def main() -> None:
        with sd.engine.batch([DOG]):
            sd()
            asyncio.get_running_loop().call_soon(lambda: results.append(outcome(sd)))
        await asyncio.sleep(0.01)

    asyncio.run(main())
    assert isinstance(results[0], fn.NegationNotAppliedError)


def test_a_bound_call_after_the_batch_is_refused(sd: House) -> None:
    async def soon() -> Tensor:
        return sd()

    with sd.engine.batch([DOG]) as batch:
        sd()
        now, later = batch.bind(sd), batch.bind(soon)
    for call in (now, lambda: asyncio.run(later()), lambda: batch.run(sd)):  # type: ignore[arg-type]
        with fails(match="closed"):
            call()


def test_a_batch_is_entered_once(sd: House) -> None:
    batch = sd.engine.batch([DOG])
    for use in (lambda: batch.run(sd), lambda: batch.bind(sd)):
        with fails(match="new, not open"):
            use()
    with batch:
        sd()
    with fails(match="closed"), batch:
        pass


def test_sync_dependency_left_in_another_context(sd: House) -> None:
    """As a framework does it that runs each half of the dependency in a copy of the request's context."""

    @contextlib.contextmanager
    def dependency() -> Iterator[Any]:
        with sd.engine.batch([DOG]) as batch:
            yield batch

    manager = dependency()
    with ThreadPoolExecutor(1) as pool:
        batch = pool.submit(contextvars.copy_context().run, manager.__enter__).result()
        assert torch.equal(pool.submit(batch.run, sd).result(), sd.dog)
        pool.submit(contextvars.copy_context().run, manager.__exit__, None, None, None).result()
        assert torch.equal(pool.submit(sd).result(), sd.plain)
    assert torch.equal(sd(), sd.plain) and not sd.engine.armed


def test_async_dependency_left_in_another_task(sd: House) -> None:
    @contextlib.asynccontextmanager
    async def dependency(policy: fn.Policy) -> AsyncIterator[Any]:
        with sd.engine.batch([policy]) as batch:
            yield batch

    async def request(policy: fn.Policy) -> Tensor:
        manager = dependency(policy)
        await asyncio.create_task(manager.__aenter__())  # a task: its context is a copy
        await asyncio.sleep(0)
        await asyncio.create_task(manager.__aexit__(None, None, None))
        return sd()

    async def entered_here(policy: fn.Policy) -> Tensor:
        manager = dependency(policy)
        await manager.__aenter__()
        await asyncio.sleep(0)
        image = await asyncio.to_thread(sd)
        await asyncio.create_task(manager.__aexit__(None, None, None))
        assert torch.equal(sd(), sd.plain)  # the batch is over
        return image

    async def main() -> list[Any]:
        calls = (entered_here(DOG), entered_here(CAT), request(DOG))
        return await asyncio.gather(*calls, return_exceptions=True)

    dog, cat, unserved = asyncio.run(main())
    assert torch.equal(dog, sd.dog) and torch.equal(cat, sd.cat)
    assert isinstance(unserved, fn.NegationNotAppliedError)  # said where the dependency ended
    assert not sd.engine.armed


def test_batches_nest_and_cross_in_one_context(sd: House) -> None:
    outer, inner = sd.engine.batch([DOG]), sd.engine.batch([CAT])
    outer.__enter__()
    assert torch.equal(sd(), sd.dog)
    inner.__enter__()
    assert torch.equal(sd(), sd.cat)
    outer.__exit__(None, None, None)
    assert torch.equal(sd(), sd.cat)
    inner.__exit__(None, None, None)
    assert torch.equal(sd(), sd.plain)


def test_a_batch_of_nothing_covers_what_is_set_for_everybody(sd: House) -> None:
    sd.engine.set_requests([DOG])
    with sd.engine.batch([None]), sd.engine.batch([CAT]):
        assert torch.equal(sd(), sd.cat)
    with sd.engine.batch([None]) as batch:
        assert torch.equal(sd(), sd.plain)
        assert torch.equal(BARE["submit"](batch.bind(sd)), sd.plain)
        assert torch.equal(BARE["submit"](sd), sd.dog)
    assert torch.equal(sd(), sd.dog)


def test_many_batches_leave_nothing(sd: House) -> None:
    alive = []

    def many() -> None:
        for _ in range(500):
            batch = sd.engine.batch([None]).__enter__()
            batch.__exit__(None, None, None)
            alive.append(weakref.ref(batch))
            del batch
        gc.collect()
        assert len(_ENTRIES.get()) <= 1
        assert sum(ref() is not None for ref in alive) <= 1
        assert torch.equal(sd(), sd.plain)

    contextvars.Context().run(many)


def test_shared_components_and_threads(sd: House) -> None:
    """A pipeline per thread around the same components, each with its own scheduler."""
    second = diffusers.StableDiffusionPipeline(
        **{**sd.pipe.components, "scheduler": copy.deepcopy(sd.pipe.scheduler)}, requires_safety_checker=False
    )
    second.set_progress_bar_config(disable=True)
    barrier = threading.Barrier(2)

    def step(pipe: Any, i: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        barrier.wait(30)
        return given

    def asking() -> Tensor:
        return negated(sd.pipe, sd.engine, callback_on_step_end=step)

    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            first = pool.submit(asking)
            other = pool.submit(generate, second, callback_on_step_end=step)
            assert torch.equal(first.result(), sd.dog) and torch.equal(other.result(), sd.plain)


# ---- what changes while a pipeline call runs ---------------------------------------------------


def _in_thread(change: Callable[..., Any]) -> Callable[..., Any]:
    return lambda h, batch: BARE["Thread"](lambda: change(h, batch))


def _replace_attn2(unet: Any) -> None:
    fresh = dict(build("sd15").unet.named_modules())
    for name in [n for n in fresh if n.endswith("attn2")]:
        unet.get_submodule(name.rpartition(".")[0]).attn2 = fresh[name]


def _replace_block(unet: Any) -> None:
    unet.up_blocks[0] = build("sd15").unet.up_blocks[0]


MEANWHILE: dict[str, Callable[[House, Any], Any]] = {
    "cleared": lambda h, b: h.engine.clear(),
    "cleared by a thread": _in_thread(lambda h, b: h.engine.clear()),
    "others set for everybody": lambda h, b: h.engine.set_requests([CAT]),
    "others set by a thread": _in_thread(lambda h, b: h.engine.set_requests([CAT])),
    "rows set by a thread": _in_thread(lambda h, b: h.engine.set_rows([CAT], [None, 0])),
    "concept removed": _in_thread(lambda h, b: h.engine.bank.remove("dog")),
    "other concept removed": _in_thread(lambda h, b: h.engine.bank.remove("cat")),
    "engine removed": lambda h, b: h.engine.remove(),
    "engine removed by a thread": _in_thread(lambda h, b: h.engine.remove()),
    "engine installed anew": lambda h, b: (h.engine.remove(), fn.install(h.pipe, h.engine.bank, rule="nag")),
    "batch opened and left": lambda h, b: h.engine.batch([None]).__enter__().__exit__(None, None, None),
    "denoiser swapped": lambda h, b: setattr(h.pipe, "unet", build("sd15").unet),
    "denoiser copied": lambda h, b: setattr(h.pipe, "unet", copy.deepcopy(h.pipe.unet)),
    "attention replaced": lambda h, b: _replace_attn2(h.pipe.unet),
    "block replaced": lambda h, b: _replace_block(h.pipe.unet),
    "default processors": lambda h, b: h.pipe.unet.set_default_attn_processor(),
    "sliced": lambda h, b: h.pipe.enable_attention_slicing(1),
    "fused projections": lambda h, b: h.pipe.fuse_qkv_projections(),
    "forward replaced": lambda h, b: setattr(
        h.pipe.unet, "forward", functools.partial(type(h.pipe.unet).forward, h.pipe.unet)
    ),
}


FOR_EVERYBODY = [c for c in MEANWHILE if " set" not in c and "cleared" not in c]


@pytest.mark.parametrize(
    ("change", "asked"),
    [*((c, "by a batch") for c in MEANWHILE), *((c, "for everybody") for c in FOR_EVERYBODY)],
)
def test_what_changes_during_a_call_acts_at_the_next_or_stops_it(sd: House, change: str, asked: str) -> None:
    """The image is the one that the call began, or an error with a name."""

    def meanwhile(pipe: Any, i: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        if i == 0:
            MEANWHILE[change](sd, batch)
        return given

    batch = None
    if asked == "for everybody":
        sd.engine.set_requests([DOG])
        got = outcome(lambda: sd(callback_on_step_end=meanwhile))
    else:
        batch = sd.engine.batch([DOG])

        def request() -> Any:
            assert batch is not None
            batch.__enter__()
            got = outcome(lambda: sd(callback_on_step_end=meanwhile))
            outcome(lambda: batch.__exit__(None, None, None))
            return got

        got = contextvars.Context().run(request)
    assert fair(got, sd.dog)


def test_a_denoiser_called_by_a_callback(sd: House) -> None:
    """Its two rows are its own, conditional both; it is no step of the pipeline call."""
    rows: set[Any] = set()

    def probe(pipe: Any, i: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        if i == 0:
            sd.engine.observer = lambda record: rows.add(record.requests)
            pipe.unet(torch.randn(2, 4, 16, 16), t, torch.randn(2, 77, 32))
            sd.engine.observer = None
        return given

    calls = sd.engine.call
    assert torch.equal(negated(sd.pipe, sd.engine, callback_on_step_end=probe), sd.dog)
    assert rows == {(0, 0)} and sd.engine.call == calls + 1


def test_a_pipeline_called_by_a_callback(sd: House) -> None:
    """With another policy, on the same denoiser, by the same object and by one that shares its components."""
    second = diffusers.StableDiffusionPipeline(**sd.pipe.components, requires_safety_checker=False)
    second.set_progress_bar_config(disable=True)
    inner: list[Tensor] = []

    def within(pipe: Any, i: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        if i == 2:
            inner.append(negated(second, sd.engine, CAT))
            inner.append(generate(second))
            inner.append(negated(second, sd.engine, None))
        return given

    assert torch.equal(negated(sd.pipe, sd.engine, callback_on_step_end=within), sd.dog)
    assert all(map(torch.equal, inner, (sd.cat, sd.dog, sd.plain)))


def test_dynamic_guidance(sd: House) -> None:
    """A callback that turns classifier-free guidance off halves the rows."""

    def off(pipe: Any, i: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        if i == 0:
            given["prompt_embeds"] = given["prompt_embeds"].chunk(2)[-1]
            pipe._guidance_scale = 0.0
        return given

    options = {"callback_on_step_end": off, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    rows: list[Any] = []
    sd.engine.observer = lambda record: rows.append(record.requests)
    image = negated(sd.pipe, sd.engine, **options)
    sd.engine.observer = None
    assert set(rows) == {(None, 0), (0,)}
    assert not torch.allclose(image, sd(**options))


def test_interrupt(sd: House) -> None:
    def stop(pipe: Any, i: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = i == 1
        return given

    image = negated(sd.pipe, sd.engine, callback_on_step_end=stop)
    assert not torch.allclose(image, sd(callback_on_step_end=stop))


class _Broken(Exception):
    pass


ERRORS: list[tuple[type[BaseException], str, bool]] = [
    *((error, where, False) for error in (_Broken, KeyboardInterrupt)
      for where in ("denoiser", "attention", "scheduler", "callback")),
    (KeyboardInterrupt, "scheduler", True),
]  # fmt: skip


@pytest.mark.parametrize(("error", "where", "compiled"), ERRORS)
def test_an_error_anywhere_leaves_no_trace(error: type[BaseException], where: str, compiled: bool) -> None:
    def prepare(pipe: Any) -> None:
        if compiled:
            pipe.unet.compile(backend="eager")

    h = house(prepare=prepare)
    pipe, calls = h.pipe, [0]

    def once(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise error
        return args[-1] if where == "callback" else None

    options: dict[str, Any] = {}
    undo: Callable[[], object] = lambda: None  # noqa: E731
    if where == "denoiser":
        undo = pipe.unet.conv_out.register_forward_pre_hook(once).remove
    elif where == "attention":
        undo = attentions(pipe).popitem()[1].to_out[0].register_forward_pre_hook(once).remove
    elif where == "scheduler":
        step = pipe.scheduler.step
        pipe.scheduler.step = lambda *a, **k: (once(), step(*a, **k))[1]
        undo = lambda: delattr(pipe.scheduler, "step")  # noqa: E731
    else:
        options = {"callback_on_step_end": once}
    with pytest.raises(error):
        negated(pipe, h.engine, **options)
    undo()
    assert not h.engine.armed and not h.engine.live and not _ENTRIES.get()
    assert h.near(h(), h.plain) and torch.equal(negated(pipe, h.engine), h.dog)


# ---- the model ---------------------------------------------------------------------------------

BETWEEN: dict[str, Callable[[House], Any]] = {
    "another denoiser": lambda h: setattr(h.pipe, "unet", build("sd15").unet),
    "registered": lambda h: h.pipe.register_modules(unet=build("sd15").unet),
    "a deep copy": lambda h: setattr(h.pipe, "unet", copy.deepcopy(h.pipe.unet)),
    "a pickle": lambda h: setattr(h.pipe, "unet", pickle.loads(pickle.dumps(h.pipe.unet))),
    "attention modules": lambda h: _replace_attn2(h.pipe.unet),
    "a block": lambda h: _replace_block(h.pipe.unet),
    "middle block": lambda h: setattr(h.pipe.unet, "mid_block", build("sd15").unet.mid_block),
    "all blocks": lambda h: setattr(h.pipe.unet, "up_blocks", build("sd15").unet.up_blocks),
    "default processors": lambda h: h.pipe.unet.set_default_attn_processor(),
    "one processor": lambda h: setattr(attentions(h.pipe).popitem()[1], "processor", _Processor()),
    "slicing": lambda h: h.pipe.enable_attention_slicing(1),
    "fused projections": lambda h: h.pipe.fuse_qkv_projections(),
    "moved": lambda h: h.pipe.to("cpu"),
    "compiled in place": lambda h: h.pipe.unet.compile(backend="eager"),
    "compiled": lambda h: setattr(h.pipe, "unet", torch.compile(h.pipe.unet, backend="eager")),
    "a compiled block": lambda h: h.pipe.unet.up_blocks.__setitem__(
        0, torch.compile(h.pipe.unet.up_blocks[0], backend="eager")
    ),
    "a block compiled in place": lambda h: h.pipe.unet.up_blocks[0].compile(backend="eager"),
    "repeated blocks": lambda h: h.pipe.unet.compile_repeated_blocks(backend="eager"),
    "forward compiled": lambda h: setattr(
        h.pipe.unet, "forward", torch.compile(h.pipe.unet.forward, backend="eager")
    ),
    "a forward compiled": lambda h: setattr(
        h.pipe.unet.up_blocks[0], "forward", torch.compile(h.pipe.unet.up_blocks[0].forward, backend="eager")
    ),
}


class _Processor(diffusers.models.attention_processor.AttnProcessor2_0):
    pass


@pytest.mark.parametrize(
    "change", [pytest.param(c, marks=pytest.mark.full) if "compiled" in c else c for c in BETWEEN]
)
def test_what_changes_between_two_calls_of_a_batch(sd: House, change: str) -> None:
    """Most of these swap in weights that are equal, so an image without negation would be the plain one."""
    got: list[Any] = []

    def batch() -> None:
        with sd.engine.batch([DOG]):
            sd()
            BETWEEN[change](sd)
            got.append(sd())

    result = outcome(batch)
    assert isinstance(result, NAMED) or torch.allclose(got[0], sd.dog)


@pytest.mark.parametrize("change", ["another denoiser", "a deep copy", "a block", "one processor", "slicing"])
def test_what_changes_under_a_policy_for_everybody(sd: House, change: str) -> None:
    sd.engine.set_requests([DOG])
    BETWEEN[change](sd)
    got = outcome(sd)
    assert isinstance(got, NAMED) or torch.allclose(got, sd.dog)


COMPILED: dict[str, Callable[[Any], Any]] = {
    "model": lambda p: setattr(p, "unet", torch.compile(p.unet, backend="eager")),
    "in place": lambda p: p.unet.compile(backend="eager"),
    "repeated blocks": lambda p: p.unet.compile_repeated_blocks(fullgraph=True, backend="eager"),
    "a block": lambda p: p.unet.up_blocks.__setitem__(0, torch.compile(p.unet.up_blocks[0], backend="eager")),
    "the middle in place": lambda p: p.unet.mid_block.compile(backend="eager"),
    "forward": lambda p: setattr(p.unet, "forward", torch.compile(p.unet.forward, backend="eager")),
    "forward of a block": lambda p: setattr(
        p.unet.up_blocks[0], "forward", torch.compile(p.unet.up_blocks[0].forward, backend="eager")
    ),
}


# Of those that take seconds, one; test_compile.py has the usual ones.
@pytest.mark.parametrize(
    "how",
    [how if how == "a block" else pytest.param(how, marks=pytest.mark.full) for how in COMPILED],
)
def test_compiled_before(how: str) -> None:
    torch._dynamo.reset()
    eager = house()
    h = house(prepare=COMPILED[how])
    assert eager.near(h.plain, eager.plain) and eager.near(h(), eager.plain)
    assert eager.near(h.dog, eager.dog) and eager.near(h.cat, eager.cat)
    with h.engine.batch([None, DOG]):
        h(prompts=["a cat", "a dog"])
    h.engine.remove()
    assert eager.near(h(), eager.plain)
    torch._dynamo.reset()


# ---- copies ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "by_hand"),
    [
        ("deepcopy", False),
        ("pickle", False),
        ("saved", False),
        ("copy", False),
        ("saved", True),
        ("copy", True),
    ],
)
def test_copies_of_an_installed_pipeline_are_clean(sd: House, way: str, by_hand: bool, tmp_path: Any) -> None:
    pipe, want = sd.pipe, sd.plain
    if by_hand:
        sd.engine.remove()
        pipe.unet.set_attn_processor(
            fn.NegationAttnProcessor(bank_of(pipe), "nag", conditional=[False, True])
        )
        want = generate(pipe)
    else:
        sd.engine.set_requests([DOG])
    if way == "deepcopy":
        other = copy.deepcopy(pipe)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(pipe))
    elif way == "saved":
        pipe.save_pretrained(tmp_path)
        other = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
        want = sd.plain
    else:
        other, want = copy.copy(pipe), sd.dog if not by_hand else want
    other.set_progress_bar_config(disable=True)
    assert type(other) is diffusers.StableDiffusionPipeline
    torch.testing.assert_close(generate(other), want)
    if way != "copy":
        assert type(other.unet) is diffusers.UNet2DConditionModel
        fn.remove(other)
        fn.install(other, bank_of(other)).remove()
    fn.remove(pipe)
    assert (
        type(pipe) is diffusers.StableDiffusionPipeline and type(pipe.unet) is diffusers.UNet2DConditionModel
    )
    torch.testing.assert_close(generate(pipe), sd.plain)


def test_a_copied_model_with_processors_by_hand_is_watched(sd: House) -> None:
    sd.engine.remove()
    sd.pipe.unet.set_attn_processor(fn.NegationAttnProcessor(bank_of(sd.pipe), "nag", conditional="all"))
    sd.pipe.unet = copy.deepcopy(sd.pipe.unet)
    sd.pipe.enable_attention_slicing(1)
    got = outcome(sd)
    assert isinstance(got, NAMED) or not torch.allclose(got, sd.plain)


BY_HAND: dict[str, Callable[[Any], Any]] = {
    "slicing": lambda p: p.enable_attention_slicing(1),
    "fused projections": lambda p: p.fuse_qkv_projections(),
    "default": lambda p: p.unet.set_default_attn_processor(),
    "attention modules": lambda p: _replace_attn2(p.unet),
    "a block": lambda p: _replace_block(p.unet),
    "attribute": lambda p: setattr(attentions(p).popitem()[1], "processor", _Processor()),
}


@pytest.mark.parametrize("change", BY_HAND)
def test_processors_by_hand_are_watched(sd: House, change: str) -> None:
    sd.engine.remove()
    ours = fn.NegationAttnProcessor(bank_of(sd.pipe), "nag", conditional="all")
    sd.pipe.unet.set_attn_processor(ours)
    want = sd()
    BY_HAND[change](sd.pipe)
    got = outcome(sd)
    if change == "default":
        assert isinstance(got, NAMED) or torch.equal(got, sd.plain)  # that is how one takes them out
    else:
        assert isinstance(got, NAMED) or torch.equal(got, want)
    fn.remove(sd.pipe)


def test_by_hand_the_caption_projection_is_that_of_the_model() -> None:
    first, second = build("pixart_alpha"), build("pixart_alpha")
    with torch.no_grad():
        for weight in second.transformer.parameters():
            weight += 0.3 * weight.abs().mean() * torch.randn_like(weight)
    images = []
    for concepts in (bank_of(first), bank_of(second)):
        ours = fn.NegationAttnProcessor(concepts, "nag", conditional=[False, True])
        second.transformer.set_attn_processor(ours)
        images.append(generate(second))
        fn.remove(second)
    assert torch.equal(*images)


# ---- weights and scales ------------------------------------------------------------------------


def add_lora(pipe: Any) -> None:
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = peft.LoraConfig(r=4, lora_alpha=16, init_lora_weights=False, target_modules=["to_k", "to_v"])
        denoiser(pipe).add_adapter(config, adapter_name="x")


@pytest.mark.parametrize("compiled", [False, True])
def test_the_scale_argument_of_adapters(compiled: bool) -> None:
    torch._dynamo.reset()
    h = house(prepare=lambda p: (add_lora(p), compiled and p.unet.compile(backend="eager")))
    given = negated(h.pipe, h.engine, cross_attention_kwargs={"scale": 0.0})
    h.pipe.unet.set_adapters(["x"], [0.0])
    torch.testing.assert_close(given, negated(h.pipe, h.engine))
    assert not torch.allclose(given, h.dog)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_scale_of_adapters_changed_by_a_callback(compiled: bool) -> None:
    """As if its weights had changed instead."""
    torch._dynamo.reset()
    h = house(prepare=lambda p: (add_lora(p), compiled and p.unet.compile(backend="eager")))
    reference = house(prepare=add_lora)

    def change(pipe: Any, i: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipe.unet.set_adapters(["x"], [0.0 if i == 0 else 1.0])
        return given

    def change_weights(pipe: Any, i: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        factor = 0.0 if i == 0 else 1.0
        for name, weight in pipe.unet.named_parameters():
            if "lora_B" in name:
                weight.data = factor * originals[name]
        return given

    originals = {n: w.detach().clone() for n, w in reference.pipe.unet.named_parameters() if "lora_B" in n}
    got = negated(h.pipe, h.engine, callback_on_step_end=change)
    want = negated(reference.pipe, reference.engine, callback_on_step_end=change_weights)
    torch.testing.assert_close(got, want)
    assert not torch.allclose(got, h.dog)
    torch._dynamo.reset()


def test_weights_changed_in_place_by_a_callback() -> None:
    """`.data` leaves no trace in the version of a parameter. The reference projects at every step."""

    def change(pipe: Any, i: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        for attn in attentions(pipe).values():
            for part in (attn.to_k, attn.to_v):
                part.weight.data.mul_(1.5)
        return given

    first, reference = house(), house()
    for attn in attentions(reference.pipe).values():  # somebody's hook: nothing may be kept
        attn.to_k.register_forward_hook(lambda *_: None)
    images = [negated(h.pipe, h.engine, callback_on_step_end=change) for h in (first, reference)]
    assert torch.equal(*images)


def test_fused_adapters() -> None:
    h = house(prepare=add_lora)
    h.pipe.unet.fuse_lora()
    assert h.near(negated(h.pipe, h.engine), h.dog)
    h.pipe.unet.unfuse_lora()
    assert h.near(negated(h.pipe, h.engine), h.dog)


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "pixart_alpha"])
@pytest.mark.parametrize("way", ["group", "leaves", "sequential", "model", "casting"])
def test_offload(kind: str, way: str, tmp_path: Any) -> None:
    pipe, reference = build(kind), house(kind)
    concepts, cpu = bank_of(pipe), torch.device("cpu")
    model = denoiser(pipe)
    if way in ("group", "leaves"):
        level = {"offload_type": "block_level", "num_blocks_per_group": 1}
        level = level if way == "group" else {"offload_type": "leaf_level"}
        model.enable_group_offload(
            onload_device=cpu, offload_device=cpu, offload_to_disk_path=str(tmp_path), **level
        )
    elif way == "casting":
        model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    else:
        accelerate = pytest.importorskip("accelerate")
        if way == "sequential":
            accelerate.cpu_offload(model, cpu)
        else:
            accelerate.cpu_offload_with_hook(model, cpu)
    plain = generate(pipe)
    with fn.negate(pipe, concepts, "nag"):
        image = generate(pipe)
    assert image.isfinite().all() and not torch.allclose(image, plain)
    if way != "casting":
        reference.engine.set_requests([fn.Policy({"dog": 1.0, "cat": 1.0})])
        torch.testing.assert_close(image, reference())


# ---- steps -------------------------------------------------------------------------------------

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "pndm with prk": ("PNDMScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "heun karras": ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
    "euler exponential": ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}),
    "euler karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpm lu": ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
    "dpm exponential": ("DPMSolverMultistepScheduler", {"use_exponential_sigmas": True}),
    "single step": ("DPMSolverSinglestepScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("img2img", [False, True])
def test_every_scheduler_counts_one_call_and_its_own_steps(name: str, img2img: bool) -> None:
    pipe = build("sd15")
    class_name, options = SCHEDULERS[name]
    pipe.scheduler = getattr(diffusers, class_name).from_config(pipe.scheduler.config, **options)
    engine = fn.install(pipe, bank_of(pipe), rule="nag")
    if img2img:
        pipe_2 = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
        pipe_2.set_progress_bar_config(disable=True)
    ran: list[int] = []
    model = pipe.unet

    def run(policy: fn.Policy) -> Any:
        with engine.batch([policy]):
            if img2img:
                image = torch.zeros(1, 3, 32, 32)
                return pipe_2("a cat", image=image, num_inference_steps=8, strength=0.5, output_type="latent",
                              generator=torch.Generator().manual_seed(0))  # fmt: skip
            return generate(pipe, steps=8)

    handle = model.register_forward_hook(lambda *_: ran.append(1))
    acted: list[Any] = []
    engine.observer = lambda record: acted.append((record.call, record.step)) if record.entries else None
    run(DOG)
    handle.remove()
    count = len(ran)
    assert len({call for call, _ in acted}) == 1
    assert len(dict.fromkeys(acted)) == count
    everything = [step for _, step in dict.fromkeys(acted)]
    assert everything == list(range(everything[0], everything[0] + count))
    total = len(pipe.scheduler.timesteps)
    assert everything[-1] == total - 1
    acted.clear()
    run(fn.Policy({"dog": 1.0}, start=0.75))
    late = [step for _, step in dict.fromkeys(acted)]
    assert late == [i for i in everything if i / total >= 0.75] and late
    if img2img:
        with fails(match="could never act"):
            run(fn.Policy({"dog": 1.0}, stop=0.2))


def test_windows_without_a_step(sd: House) -> None:
    with fails(match="could never act"):
        negated(sd.pipe, sd.engine, fn.Policy({"dog": 1.0}, start=0.1), steps=1, guidance=1.0)
    negated(sd.pipe, sd.engine, steps=1, guidance=1.0)
    xl = house("sdxl")
    with fails(match="could never act"):
        negated(xl.pipe, xl.engine, fn.Policy({"dog": 1.0}, start=0.6), steps=10, denoising_end=0.5)


def test_base_and_refiner_share_one_schedule() -> None:
    pipe = build("sdxl")
    engine = fn.install(pipe, bank_of(pipe), rule="nag")
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline(**pipe.components)
    refiner.set_progress_bar_config(disable=True)
    steps: list[Any] = []
    engine.observer = lambda record: steps.append(record.step) if record.entries else None
    policy = fn.Policy({"dog": 1.0}, start=0.3, stop=0.7)
    with engine.batch([policy]):
        latents = generate(pipe, steps=10, denoising_end=0.5)
        assert sorted(set(steps)) == [3, 4]
        steps.clear()
        refiner("a cat", image=latents, num_inference_steps=10, denoising_start=0.5, output_type="latent",
                generator=torch.Generator().manual_seed(0))  # fmt: skip
        assert sorted(set(steps)) == [5, 6]


def test_timesteps_and_sigmas_of_ones_own(sd: House) -> None:
    steps: list[Any] = []
    sd.engine.observer = lambda record: steps.append(record.step) if record.entries else None
    late = fn.Policy({"dog": 1.0}, start=0.5)
    sd.pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(sd.pipe.scheduler.config)
    negated(sd.pipe, sd.engine, late, timesteps=[900, 600, 300, 10])
    assert sorted(set(steps)) == [2, 3]
    steps.clear()
    negated(sd.pipe, sd.engine, late, sigmas=[10.0, 5.0, 1.0, 0.5, 0.0])
    assert sorted(set(steps)) == [2, 3]


def test_embeddings_instead_of_prompts(sd: House) -> None:
    positive, negative = sd.pipe.encode_prompt("a cat", "cpu", 1, True, negative_prompt="red")
    with sd.engine.batch([DOG]):
        image = sd.pipe(
            prompt_embeds=positive, negative_prompt_embeds=negative, num_inference_steps=3,
            guidance_scale=5.0, generator=torch.Generator().manual_seed(0), height=32, width=32,
            output_type="latent",
        ).images  # fmt: skip
    assert torch.equal(image, sd.dog)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_several_images_of_several_prompts(sd: House, guidance: float) -> None:
    rows: set[Any] = set()
    sd.engine.observer = lambda record: rows.add(record.requests)
    with sd.engine.batch([DOG, None, CAT]):
        sd(prompts=["a cat", "a dog", "a"], images=2, guidance=guidance)
    assert rows == {((None,) * 6 if guidance > 1 else ()) + (0, 0, 1, 1, 2, 2)}


# ---- training ----------------------------------------------------------------------------------


def _loss(model: Any, text: Tensor) -> Tensor:
    sample = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return model(sample, torch.tensor(500), text).sample.square().mean()


def _gradients(model: Any, *losses: Tensor) -> list[Tensor]:
    model.zero_grad()
    sum(losses).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def _text() -> Tensor:
    return torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("backward", ["within", "after"])
def test_checkpointing_recomputes_right(backward: str) -> None:
    h = house()
    model = h.pipe.unet
    model.train()

    def gradients() -> list[Tensor]:
        h.engine.set_rows([DOG])
        loss = _loss(model, _text())
        if backward == "after":
            h.engine.clear()
        made = _gradients(model, loss)
        h.engine.clear()
        return made

    want = gradients()
    model.enable_gradient_checkpointing()
    assert all(map(torch.allclose, gradients(), want))


def test_checkpointing_with_reentrant_calls_is_refused_by_name() -> None:
    h = house()
    h.pipe.unet.train()
    h.pipe.unet.enable_gradient_checkpointing(
        lambda f, *a: torch.utils.checkpoint.checkpoint(f, *a, use_reentrant=True)
    )
    h.engine.set_rows([DOG])
    loss = _loss(h.pipe.unet, _text().requires_grad_())
    with fails(fn.NegationNotAppliedError, match="use_reentrant=True"):
        loss.backward()


def test_gradients_at_strength_zero_are_those_without_an_engine() -> None:
    h = house()
    model = h.pipe.unet
    h.engine.set_rows([fn.Policy({"dog": 0.0})])
    got = _gradients(model, _loss(model, _text()))
    h.engine.remove()
    assert all(map(torch.equal, got, _gradients(model, _loss(model, _text()))))


# ---- audit, banks, memory ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pndm", "heun"])
def test_audit_knows_one_image_from_repeated_timesteps(name: str) -> None:
    pipe = build("sd15")
    class_name, options = SCHEDULERS[name]
    pipe.scheduler = getattr(diffusers, class_name).from_config(pipe.scheduler.config, **options)
    engine = fn.install(pipe, bank_of(pipe), rule="nag")
    with fn.audit(pipe) as audit:
        negated(pipe, engine, steps=4)
    assert {line["image"] for line in audit.report()} == {0}
    with fn.audit(pipe) as audit, engine.batch([DOG, fn.Policy({"cat": 1.0}, start=0.5)]):
        generate(pipe, ["a cat", "a dog"], steps=6)
    audit.verify()


def test_audit_of_concurrent_calls(sd: House) -> None:
    second = diffusers.StableDiffusionPipeline(
        **{**sd.pipe.components, "scheduler": copy.deepcopy(sd.pipe.scheduler)}, requires_safety_checker=False
    )
    second.set_progress_bar_config(disable=True)
    barrier = threading.Barrier(2)

    def step(pipe: Any, i: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        barrier.wait(30)
        return given

    with ThreadPoolExecutor(2) as pool, fn.audit(sd.pipe) as audit:
        calls = [
            pool.submit(negated, p, sd.engine, policy, callback_on_step_end=step)
            for p, policy in ((sd.pipe, DOG), (second, CAT))
        ]
        for call in calls:
            call.result()
    audit.verify()
    layers = len(sd.engine.layers)
    assert sorted((line["concept"], line["calls"]) for line in audit.report()) == [
        ("cat", 3 * layers), ("dog", 3 * layers)
    ]  # fmt: skip


def test_more_members_than_one_prompt_holds() -> None:
    pipe = build("sd15")
    words = ("cat", "dog", "red", "photo", "picture", "painting")
    members = [f"{a} {b}" for a in (*words, "in") for b in words]
    bank = fn.ConceptBank.from_prompts(pipe, {"characters": members}, templates=["{}"])
    with fn.negate(pipe, bank, fn.Rule.preset("protore", threshold=-1.0)):
        assert generate(pipe).isfinite().all()


@pytest.mark.parametrize("way", ["freed", "offloaded"])
def test_the_text_encoder_may_be_away(way: str) -> None:
    pipe = build("sd15")
    concepts = bank_of(pipe)
    if way == "freed":
        pipe.text_encoder = None
    else:
        accelerate = pytest.importorskip("accelerate")
        accelerate.cpu_offload(pipe.text_encoder, torch.device("cpu"))
    fn.install(pipe, concepts)


def test_an_installed_pipeline_is_freed() -> None:
    def live() -> list[Any]:
        h = house()
        with h.engine.batch([DOG]) as batch:
            batch.run(h)
        return [weakref.ref(x) for x in (h.pipe, h.pipe.unet, h.engine, batch)]

    refs = live()
    gc.collect()
    assert [ref() for ref in refs] == [None] * len(refs)
