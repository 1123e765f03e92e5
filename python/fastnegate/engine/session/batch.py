# SPDX-License-Identifier: Apache-2.0
"""`Batch`: the requests of one context. It is seen by the code within it, by tasks and threads that copy the
context, and by what is carried into other threads with `run` or `bind`; by nobody else."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import threading
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar

from ...operator.rule import Rule
from ..errors import NegationNotAppliedError
from .ledger import Ledger
from .rows import Assignment

T = TypeVar("T")


class Batch:
    """Made by `Engine.batch`; a context manager that is entered once."""

    def __init__(self, engine: object, rule: Rule, assignment: Assignment) -> None:
        self.engine, self.rule = engine, rule
        self.ledger = Ledger(assignment)
        self._state = "new"  # "open", "closed"
        self._entered: tuple[int, Any] | None = None

    def __enter__(self) -> Batch:
        if self._state != "new":
            raise NegationNotAppliedError(f"this batch is {self._state}: engine.batch(...) makes a new one")
        self._state, self._entered = "open", _place()
        _BATCHES.set((*_BATCHES.get(), self))
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        # The context may be another one than was entered (web frameworks do that with what a handler
        # depends on): then this batch stays in that one, closed.
        self._state = "closed"
        _BATCHES.set(tuple(b for b in _BATCHES.get() if b is not self))
        if kind is None:
            self.ledger.settle(self.rule)

    def run(self, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
        """Call a function within this batch, from whatever thread.

        Raises:
            NegationNotAppliedError: the batch is not open.
            TypeError: what is called, or what it returns, would run later, outside of this call: a generator,
                or something to await. For a coroutine function use `bind`.
        """
        if _runs_later(function):
            raise TypeError(f"{_name(function)} would run after this call: bind a coroutine function instead")
        result = contextvars.copy_context().run(self._within, function, args, kwargs)
        if inspect.isawaitable(result):
            if inspect.iscoroutine(result):
                result.close()
            raise TypeError(
                f"{_name(function)} returned something to await, which would run outside the batch"
            )
        return result

    def bind(self, function: Callable[..., T]) -> Callable[..., T]:
        """The function, to be called within this batch from whatever thread: for `Executor.submit`,
        `loop.run_in_executor` and `threading.Thread`, which do not copy the context. A coroutine function
        stays one."""
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def bound(*args: Any, **kwargs: Any) -> Any:
                before = _BATCHES.get()
                _BATCHES.set((*before, self._opened()))
                try:
                    return await function(*args, **kwargs)
                finally:
                    _BATCHES.set(before)

            return bound  # type: ignore[return-value]
        if _runs_later(function):
            raise TypeError(f"{_name(function)} is a generator function, whose body runs outside the batch")
        self._opened()
        return functools.partial(self.run, function)

    def _within(self, function: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
        _BATCHES.set((*_BATCHES.get(), self._opened()))
        return function(*args, **kwargs)

    def _opened(self) -> Batch:
        if self._state != "open":
            raise NegationNotAppliedError(
                f"this batch is {self._state}, not open: its requests have no policy"
            )
        return self

    def __repr__(self) -> str:
        return f"Batch({list(self.ledger.assignment.policies)}, {self._state})"

    def __reduce__(self) -> Any:
        raise TypeError("a Batch belongs to its process: make one where the pipeline runs")


_BATCHES: ContextVar[tuple[Batch, ...]] = ContextVar("fastnegate_batches", default=())


def current(engine: object) -> Batch | None:
    """The innermost batch of `engine` that is open in this context, or None.

    Raises:
        NegationNotAppliedError: this context was copied within a batch that has ended since, as that of a
            task that outlives it: what it asked for must not run as if it had asked for nothing.
    """
    for batch in reversed(_BATCHES.get()):
        if batch.engine is not engine:
            continue
        if batch._state == "open":
            return batch
        if not _same(batch._entered, _place()):
            raise NegationNotAppliedError(
                "the batch that this task or thread was started in has ended: wait for it within the batch"
            )
    return None


def _place() -> tuple[int, Any]:
    """Thread and task that run."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop runs
        task = None
    return threading.get_ident(), None if task is None else weakref.ref(task)


def _same(entered: tuple[int, Any] | None, here: tuple[int, Any]) -> bool:
    return entered == here  # references to one living task are equal


def _runs_later(function: Any) -> bool:
    later = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
    return any(is_(function) for is_ in later)


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", repr(function))
