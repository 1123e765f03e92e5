# SPDX-License-Identifier: Apache-2.0
"""`Batch`: seen by its own context and what copies it, carried into other threads, and by nobody else."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import fastnegate as fn
from fastnegate import Policy, Rule
from fastnegate.engine.bank import ConceptBank
from fastnegate.engine.concepts import Concept, Fingerprint
from fastnegate.engine.engine import Engine
from fastnegate.engine.errors import NegationNotAppliedError
from fastnegate.engine.session.batch import _ENTRIES
from fastnegate.engine.session.call import Call
from fastnegate.engine.session.rows import Step

A, B = Policy({"a": 1.0}), Policy({"b": 1.0})


@pytest.fixture
def engine() -> Engine:
    concepts = {name: Concept.from_embeddings(torch.ones(1, 4)) for name in "ab"}
    return Engine(ConceptBank(concepts, Fingerprint({}, torch.zeros(1))), Rule.preset("nasa"), ["layer"])


def names(engine: Engine) -> str:
    """What a denoiser call made here negates: its concepts, or "" for nothing."""
    with engine.running(Call(1, torch.device("cpu"), lambda: False)) as running:
        running.negated = running.live  # as a layer says that runs
        return "" if running.rows is None else "".join(entry.concept for entry in running.rows.entries)


def in_thread(function: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join(60)
    return found[0]


# Who sees it.


@pytest.mark.parametrize("carried", ["run", "bind"])
def test_threads_see_it_if_it_is_carried(engine: Engine, carried: str) -> None:
    ask = functools.partial(names, engine)
    with engine.batch([A]) as batch, ThreadPoolExecutor(1) as pool:
        bound = batch.bind(ask) if carried == "bind" else functools.partial(batch.run, ask)
        assert [in_thread(ask), pool.submit(ask).result(60)] == ["", ""]  # nobody spoke for them
        assert [in_thread(bound), pool.submit(bound).result(60), bound()] == ["a"] * 3
        assert pool.submit(ask).result(60) == ""  # the worker keeps nothing of it
    assert names(engine) == ""


def test_tasks_see_the_batch_that_they_were_made_in(engine: Engine) -> None:
    async def request(policy: Policy | None) -> list[str]:
        with engine.batch([policy]) as batch:
            seen = [names(engine)]
            await asyncio.sleep(0)  # the others are in their batches now
            loop = asyncio.get_running_loop()
            seen.append(await asyncio.to_thread(names, engine))
            seen.append(await loop.run_in_executor(None, batch.bind(names), engine))
            seen.append(await asyncio.create_task(batch.bind(later)()))
            return seen

    async def later() -> str:
        await asyncio.sleep(0)
        return names(engine)

    async def main() -> list[list[str]]:
        return await asyncio.gather(*(request(policy) for policy in (A, None, B, A)))

    assert asyncio.run(main()) == [["a"] * 4, [""] * 4, ["b"] * 4, ["a"] * 4]
    assert _ENTRIES.get() == ()


def test_batches_end_in_any_order(engine: Engine) -> None:
    outer, inner = engine.batch([A]), engine.batch([B])
    with outer:
        assert names(engine) == "a"
        inner.__enter__()
        assert names(engine) == "b"
    assert names(engine) == "b"
    inner.__exit__(None)
    assert names(engine) == "" and _ENTRIES.get() == ()


def test_a_batch_goes_before_what_is_set_for_everybody(engine: Engine) -> None:
    engine.set_requests([B])
    with engine.batch([A]):
        assert names(engine) == "a" and in_thread(lambda: names(engine)) == "b"
        with engine.batch([None]):
            assert names(engine) == ""
    assert names(engine) == "b"


def test_engines_do_not_see_batches_of_each_other(engine: Engine) -> None:
    other = Engine(engine.bank, engine.rule, ["layer"])
    with engine.batch([A]), other.batch([B]):
        assert names(engine) == "a" and names(other) == "b"


# Where it ends.


def test_it_may_end_in_another_context(engine: Engine) -> None:
    """As frameworks do with what a handler depends on."""

    def dependency() -> Iterator[Any]:
        with engine.batch([A]) as batch:
            yield batch

    entered, left = contextvars.copy_context(), contextvars.copy_context()
    depends = dependency()
    batch = entered.run(next, depends)
    assert entered.run(names, engine) == "a" and names(engine) == "" and batch.run(names, engine) == "a"
    assert left.run(next, depends, "end") == "end"
    assert entered.run(names, engine) == "" and left.run(names, engine) == ""
    assert engine.armed is False


def test_what_outlives_it_is_stopped(engine: Engine) -> None:
    async def main() -> None:
        with engine.batch([A]):
            assert names(engine) == "a"
            task = asyncio.create_task(later())
        with pytest.raises(NegationNotAppliedError, match="has ended"):
            await task

    async def later() -> str:
        await asyncio.sleep(0.01)
        return names(engine)

    asyncio.run(main())
    with engine.batch([A]) as batch:
        names(engine)
        bound, copied = batch.bind(names), contextvars.copy_context()
    for outlives in (lambda: bound(engine), lambda: batch.run(names, engine), lambda: batch.bind(names)):
        with pytest.raises(NegationNotAppliedError, match="batch is closed"):
            outlives()
    with pytest.raises(NegationNotAppliedError, match="has ended"):
        in_thread_raising(lambda: copied.run(names, engine))
    assert names(engine) == ""


def in_thread_raising(function: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(60)


def test_it_is_entered_once(engine: Engine) -> None:
    batch = engine.batch([A])
    with pytest.raises(NegationNotAppliedError, match="batch is new"):
        batch.run(names, engine)
    with batch:
        names(engine)
        with pytest.raises(NegationNotAppliedError, match="batch is open"), batch:
            pass
    with pytest.raises(NegationNotAppliedError, match="batch is closed"), batch:
        pass
    with pytest.raises(TypeError, match="belongs to its process"):
        copy.deepcopy(batch)


# What cannot be carried.


def test_what_would_run_later_is_refused(engine: Engine) -> None:
    def generator() -> Iterator[int]:
        yield 1

    async def coroutine() -> str:
        return names(engine)

    async def generators() -> Any:
        yield 1

    with engine.batch([A]) as batch:
        names(engine)
        for later in (generator, generators):
            with pytest.raises(TypeError, match="generator"):
                batch.bind(later)
            with pytest.raises(TypeError, match="would run after"):
                batch.run(later)
        with pytest.raises(TypeError, match="coroutine"):
            batch.run(coroutine)
        with pytest.raises(TypeError, match="something to await"):
            batch.run(lambda: coroutine())
        assert asyncio.run(batch.bind(coroutine)()) == "a"


# What became of it.


def test_requests_that_got_nothing_are_told(engine: Engine) -> None:
    def at(progress: float, layers: bool = True) -> None:
        step = Step(round(progress * 10), 10)
        with engine.running(Call(2, torch.device("cpu"), lambda: False, step=step)) as running:
            running.negated = layers and running.live

    late = Policy({"a": 1.0}, start=0.5)
    with pytest.raises(NegationNotAppliedError, match="no denoiser call"), engine.batch([A]):
        pass
    with pytest.raises(NegationNotAppliedError, match=r"policies\[1\] never acted.*0.5 to 1"):
        with engine.batch([A, late]):
            at(0.0)
    with engine.batch([A, late]):
        at(0.0)
        at(0.7)
    with pytest.raises(NegationNotAppliedError, match=r"policies\[0\] never acted.*no attention layer ran"):
        with engine.batch([A, None]):
            at(0.0, layers=False)
    with (
        pytest.raises(ZeroDivisionError),
        engine.batch([A]),
    ):  # the error that is on its way is the one to tell
        raise ZeroDivisionError
    with engine.batch([None]):
        pass


def test_calls_that_nobody_spoke_for(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        assert names(engine) == ""
    assert caplog.text.count("nobody") + caplog.text.count("no policy speaks for") == 1
    strict = Engine(engine.bank, engine.rule, ["layer"], unasked="raise")
    with pytest.raises(NegationNotAppliedError, match="nobody said"):
        names(strict)
    with strict.batch([None]):
        assert names(strict) == ""
        with pytest.raises(NegationNotAppliedError, match="nobody said"):
            in_thread_raising(lambda: names(strict))
    strict.set_requests([None])
    assert names(strict) == ""
    with pytest.raises(ValueError, match="unasked='ignore': allowed are plain, raise"):
        Engine(engine.bank, engine.rule, ["layer"], unasked="ignore")


def test_ten_thousand_batches_leave_nothing(engine: Engine) -> None:
    for _ in range(10_000):
        with engine.batch([None]):
            pass
    assert _ENTRIES.get() == ()
    assert isinstance(engine.batch([A]), fn.Batch)
