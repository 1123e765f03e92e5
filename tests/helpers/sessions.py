# SPDX-License-Identifier: Apache-2.0
"""Schedules of overlapping pipeline calls, run one thread at a time in the order that a schedule says: calls
stop within the denoiser's forward and between steps, and go on when it is their turn. So what overlaps is
decided by the schedule, never by luck."""

from __future__ import annotations

import asyncio
import copy
import functools
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from contextvars import Context, copy_context
from dataclasses import dataclass
from typing import Any

import diffusers
import pipelines
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from schedules import NAMED, fair, house, outcome
from torch import Tensor, nn

import fastnegate as fn
from fastnegate.engine.session.batch import _ENTRIES

STEPS = 2
SEATS = 4  # calls of a round, each with a pipeline of its own around the same components
PATIENCE = 60.0  # seconds until a call counts as stuck
POLICIES: dict[str, fn.Policy | None] = {
    "dog": fn.Policy({"dog": 1.0}),
    "cat": fn.Policy({"cat": 1.0}),
    "both": fn.Policy({"cat": 0.5, "dog": 1.5}),
    "late": fn.Policy({"dog": 1.0}, start=0.5),
    "nothing": None,
}
WAYS = ("coroutine", "run_in_executor", "submit", "Thread", "own thread", "alone")  # the last opens no batch
TROUBLES = (
    *("none",) * 8, "nested", "nested", "error in the scheduler", "error in the denoiser", "left elsewhere",
    "concept comes and goes", *("denoiser swapped",) * 4,
    "processor displaced",
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """One pipeline call: how it gets into its thread, what it asks for, and what goes wrong at which step."""

    way: str
    policy: str
    trouble: str = "none"
    at: int = 0


@dataclass(frozen=True)
class Round:
    """Calls that overlap. Between rounds the model and the bank may change."""

    requests: tuple[Request, ...]
    turns: tuple[int, ...]  # which of the calls that wait goes on
    leave: int = 0  # in which order batches of one context are left
    everybody: str | None = None
    scale: float = 1.0  # of the adapters
    dog: str = "dog"  # what the concept is made of


class Broken(Exception):
    """What goes wrong in the user's code."""


class Scaled(nn.Module):
    """An adapter around a projection; its strength is for everybody."""

    scale = 1.0

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * Scaled.scale


def _adapt(pipe: Any) -> None:
    attn = next(iter(pipelines.attentions(pipe).values()))  # the other layers may keep their keys and values
    attn.to_k, attn.to_v = Scaled(attn.to_k), Scaled(attn.to_v)


class Stage:
    """One call goes on at a time; `turns` say which."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: set[int] = set()
        self._running: set[int] = set()
        self._turn: int | None = None
        self._off = False  # somebody is stuck: let everybody go

    def enter(self, who: int) -> None:
        with self._changed:
            self._running.add(who)
        self.pause(who)

    def pause(self, who: int) -> None:
        with self._changed:
            if self._off:
                return
            self._waiting.add(who)
            self._turn = None
            self._changed.notify_all()
            came = self._changed.wait_for(lambda: self._turn == who or self._off, PATIENCE)
            self._waiting.discard(who)
            assert came, "nobody gave it a turn"

    def leave(self, who: int) -> None:
        with self._changed:
            self._running.discard(who)
            self._turn = None
            self._changed.notify_all()

    def conduct(self, calls: int, turns: Sequence[int]) -> None:
        """Until `calls` of them have come and gone."""
        order = itertools.chain(turns, itertools.repeat(0))
        with self._changed:
            self._wait(lambda: len(self._waiting) == calls)
            while self._running:
                waiting = sorted(self._waiting)
                self._turn = waiting[next(order) % len(waiting)]
                self._changed.notify_all()
                self._wait(lambda: self._turn is None)

    def _wait(self, condition: Callable[[], bool]) -> None:
        if not self._changed.wait_for(condition, PATIENCE):
            self._off = True
            self._changed.notify_all()
            raise AssertionError("a call is stuck")


class Theatre:
    """A model under an engine with its pipelines, and the same alone, for what each image should be."""

    def __init__(self, **options: Any) -> None:
        self.house = house(prepare=_adapt, **options)
        self._alone = house(prepare=_adapt)
        self.tally: Counter[str] = Counter()
        self._right: dict[Any, Tensor] = {}
        self._local = threading.local()
        self._dogs = {name: self._concept(name) for name in ("dog", "red")}
        self._cat = self.house.engine.bank["cat"]
        self._unet = self.house.pipe.unet
        self._ours = {attn: attn.processor for attn in pipelines.attentions(self.house.pipe).values()}
        self._other = copy.deepcopy(self._unet)
        self.pipes = [self.house.pipe, *(self._another() for _ in range(2 * SEATS - 1))]
        for pipe in self.pipes:
            pipe.scheduler.step = functools.partial(self._step, pipe.scheduler.step)
        self._unet.mid_block.register_forward_pre_hook(lambda *_: self._within())

    def _concept(self, member: str) -> Any:
        return fn.ConceptBank.from_prompts(self.house.pipe, {"dog": member}, templates=["{}"])["dog"]

    def _another(self) -> Any:
        parts = {**self.house.pipe.components, "scheduler": copy.deepcopy(self.house.pipe.scheduler)}
        pipe = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    # ---- what is right ----------------------------------------------------------------------

    def right(self, policy: str, seed: int, round: Round) -> Tensor:
        """The image made alone, by an engine that has made no other."""
        key = policy, seed, round.scale, round.dog
        if key not in self._right:
            scale, Scaled.scale = Scaled.scale, round.scale
            self._alone.engine.remove()
            bank = self._alone.engine.bank
            bank.update("dog", self._dogs[round.dog])
            self._alone.engine = fn.install(self._alone.pipe, bank, rule="nag")
            with self._alone.engine.batch([POLICIES[policy]]):
                self._right[key] = pipelines.generate(self._alone.pipe, seeds=[seed], steps=STEPS)
            Scaled.scale = scale
        return self._right[key]

    # ---- a round ----------------------------------------------------------------------------

    def play(self, round: Round) -> None:
        """Run a round, and look at what came of it.

        Raises:
            AssertionError: an image that is neither right nor an error with a name; or what was left behind.
        """
        engine = self.house.engine
        Scaled.scale = round.scale
        engine.bank.update("dog", self._dogs[round.dog])
        if round.everybody is not None:
            engine.set_requests([POLICIES[round.everybody]])
        self._stage = Stage()
        self._inner: list[tuple[Request, Any, Tensor]] = []
        self._round = round
        results = Context().run(self._run, round)
        engine.clear()
        self.house.pipe.unet = self._unet
        for attn, processor in self._ours.items():
            attn.processor = processor
        for seat, (request, got) in enumerate(zip(round.requests, results)):
            self._check(request, got, self._wanted(request, seat, round))
        for request, got, want in self._inner:
            self._check(request, got, want)
        self._check_rest(round)

    def _wanted(self, request: Request, seat: int, round: Round) -> Tensor:
        if request.way != "alone":
            return self.right(request.policy, seat, round)
        return self.right(round.everybody or "nothing", seat, round)

    def _check(self, request: Request, got: Any, want: Tensor) -> None:
        kind = "image" if isinstance(got, Tensor) else type(got).__name__
        self.tally[kind] += 1
        if isinstance(got, Broken):
            assert "error" in request.trouble, request
        elif isinstance(got, ValueError) and not isinstance(got, NAMED):  # a batch that names what is away
            assert any(r.trouble == "concept comes and goes" for r in self._round.requests), got
        else:
            assert isinstance(got, (*NAMED, Tensor)), got
            assert fair(got, want), (request, kind)

    def _check_rest(self, round: Round) -> None:
        """Nothing is stuck, and no policy outlives its batch."""
        assert not self.house.engine.armed
        results: list[Any] = []

        def plain() -> None:
            assert not _ENTRIES.get()
            results.append(pipelines.generate(self.house.pipe, seeds=[0], steps=STEPS))
            with self.house.engine.batch([POLICIES["cat"]]):
                results.append(pipelines.generate(self.house.pipe, seeds=[0], steps=STEPS))

        thread = threading.Thread(target=plain, daemon=True)
        thread.start()
        thread.join(PATIENCE)
        assert len(results) == 2, "the engine is stuck"
        assert torch.equal(results[0], self.right("nothing", 0, round))
        assert torch.equal(results[1], self.right("cat", 0, round))

    def _run(self, round: Round) -> list[Any]:
        """Start all calls, conduct them, leave their batches; what came of each."""
        engine, requests = self.house.engine, round.requests
        futures: list[Future[Any]] = [Future() for _ in requests]
        self._batches: dict[int, Any] = {}
        opened: list[Any] = []
        with ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(SEATS))
            coroutines = []
            for seat, request in enumerate(requests):
                make = functools.partial(self._make, seat, request)
                if request.way in ("coroutine", "run_in_executor"):
                    coroutines.append((seat, request, make))
                    continue
                if request.way in ("submit", "Thread"):
                    batch = self._batches[seat] = engine.batch([POLICIES[request.policy]]).__enter__()
                    opened.append(batch)
                    make = batch.bind(make)
                elif request.way == "own thread":
                    make = functools.partial(self._in_batch, seat, request, make)
                if request.way == "submit":
                    pool.submit(_deliver, futures[seat], make)
                else:
                    threading.Thread(target=_deliver, args=(futures[seat], make), daemon=True).start()
            loop = threading.Thread(target=Context().run, args=(self._loop, coroutines, futures), daemon=True)
            loop.start()
            self._stage.conduct(len(requests), round.turns)
            loop.join(PATIENCE)
            for future in futures:
                with suppress(Exception):
                    future.result(PATIENCE)
            orders = list(itertools.permutations(opened))
            for batch in orders[round.leave % len(orders)]:
                outcome(lambda batch=batch: batch.__exit__(None, None, None))
            assert not _ENTRIES.get()
        return [future.exception(0) or future.result(0) for future in futures]

    def _loop(self, coroutines: Sequence[Any], futures: Sequence[Future[Any]]) -> None:
        """Coroutines of one event loop, all with their batches open at once."""

        async def request(seat: int, request: Request, make: Callable[[], Any]) -> Any:
            with self.house.engine.batch([POLICIES[request.policy]]) as batch:
                self._batches[seat] = batch
                if request.way == "coroutine":
                    return await asyncio.to_thread(make)
                return await asyncio.get_running_loop().run_in_executor(None, batch.bind(make))

        async def main() -> None:
            asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(SEATS))
            results = await asyncio.gather(*itertools.starmap(request, coroutines), return_exceptions=True)
            for (seat, *_), result in zip(coroutines, results):
                _deliver(futures[seat], functools.partial(_raise_or_return, result))

        asyncio.run(main())

    def _in_batch(self, seat: int, request: Request, make: Callable[[], Any]) -> Any:
        with self.house.engine.batch([POLICIES[request.policy]]):
            return make()

    # ---- a call -----------------------------------------------------------------------------

    def _make(self, seat: int, request: Request) -> Tensor:
        local = self._local
        local.seat, local.request, local.step = seat, request, 0
        self._stage.enter(seat)
        try:
            return pipelines.generate(self.pipes[seat], seeds=[seat], steps=STEPS)
        finally:
            local.seat = None
            self._stage.leave(seat)

    def _within(self) -> None:
        """In the denoiser's forward."""
        local = self._local
        if getattr(local, "seat", None) is None:
            return
        self._stage.pause(local.seat)
        if self._due("error in the denoiser"):
            raise Broken

    def _step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Between steps."""
        local = self._local
        if getattr(local, "seat", None) is not None:
            if self._due("error in the scheduler"):
                raise Broken
            self._trouble(local.request, local.seat)
            local.step += 1
            self._stage.pause(local.seat)
        return step(*args, **kwargs)

    def _due(self, trouble: str) -> bool:
        local = self._local
        return bool(local.request.trouble == trouble and local.request.at == local.step)

    def _trouble(self, request: Request, seat: int) -> None:
        engine = self.house.engine
        if self._due("nested"):
            self._nested(request, seat)
        elif self._due("left elsewhere") and seat in self._batches:
            outcome(lambda: copy_context().run(self._batches[seat].__exit__, None, None, None))
        elif self._due("concept comes and goes"):
            with suppress(ValueError):  # another call has taken it away
                engine.bank.remove("cat")
            self._stage.pause(seat)
            engine.bank.update("cat", self._cat)
        elif self._due("denoiser swapped"):
            self.house.pipe.unet = self._other
        elif self._due("processor displaced"):
            next(iter(self._ours)).processor = AttnProcessor2_0()

    def _nested(self, request: Request, seat: int) -> None:
        """Another call within this one, with a batch of its own, in the same thread."""
        names = list(POLICIES)
        policy = names[(names.index(request.policy) + 1) % len(names)]
        local = self._local
        step, local.request = local.step, Request(request.way, policy)

        def make() -> Tensor:
            with self.house.engine.batch([POLICIES[policy]]):
                return pipelines.generate(self.pipes[SEATS + seat], seeds=[seat], steps=STEPS)

        try:
            got: Any = make()
        except (*NAMED, ValueError) as error:
            got = error
        local.step, local.request = step, request
        self._inner.append((request, got, self.right(policy, seat, self._round)))


def _deliver(future: Future[Any], make: Callable[[], Any]) -> None:
    try:
        future.set_result(make())
    except BaseException as error:
        future.set_exception(error)


def _raise_or_return(result: Any) -> Any:
    if isinstance(result, BaseException):
        raise result
    return result
