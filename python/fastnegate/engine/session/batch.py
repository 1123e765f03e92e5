# SPDX-License-Identifier: Apache-2.0
"""`Batch`: the requests of one context. It is seen by the code within it, by tasks and threads that copy the
context, and by what is carried into other threads with `run` or `bind`; by nobody else."""

from __future__ import annotations

import contextvars
import functools
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any, TypeVar

from ...operator.rule import Rule
from ..errors import NegationNotAppliedError
from .ledger import Ledger
from .proof import Proof
from .rows import Assignment

T = TypeVar("T")


class Batch:
    """Made by `Engine.batch`; a context manager that is entered once."""

    def __init__(self, engine: object, rule: Rule, assignment: Assignment) -> None:
        self.engine, self.rule = engine, rule
        self.ledger = Ledger(assignment, ends=True)
        self._state = "new"  # "open", "closed"
        self._entry: _Entry | None = None

    def __enter__(self) -> Batch:
        if self._state != "new":
            raise NegationNotAppliedError(f"this batch is {self._state}: engine.batch(...) makes a new one")
        self._state = "open"
        self._entry = _enter(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        # The context may be another one than was entered (web frameworks do that with what a handler
        # depends on): then this batch stays in that one, closed, until somebody looks.
        self._state = "closed"
        assert self._entry is not None
        _leave(self._entry)
        if kind is None:
            self.ledger.settle(self.rule)

    @property
    def proofs(self) -> tuple[Proof, ...]:
        """What negation did for each request, in order; also once the batch is closed."""
        return self.ledger.proofs(self.rule)

    def run(self, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
        """Call a function within this batch, from whatever thread.

        Raises:
            NegationNotAppliedError: the batch is not open.
            TypeError: what is called, or what it returns, would run later, outside of this call: a generator,
                an iterator, a future, something to await. For a coroutine function use `bind`.
        """
        if _runs_later(function):
            raise TypeError(f"{_name(function)} would run after this call: bind a coroutine function instead")
        result = contextvars.copy_context().run(self._within, function, args, kwargs)
        if inspect.isawaitable(result) or isinstance(result, (Iterator, AsyncIterator, Future)):
            if inspect.iscoroutine(result):
                result.close()
            raise TypeError(
                f"{_name(function)} returned a {type(result).__name__}, something to await or to iterate "
                "over: that would run outside the batch"
            )
        return result

    def bind(self, function: Callable[..., T]) -> Callable[..., T]:
        """The function, to be called within this batch from whatever thread: for `Executor.submit`,
        `loop.run_in_executor` and `threading.Thread`, which do not copy the context. A coroutine function
        stays one."""
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def bound(*args: Any, **kwargs: Any) -> Any:
                entry = _enter(self._opened())
                try:
                    return await function(*args, **kwargs)
                finally:
                    _leave(entry)  # of whatever context this is: an abandoned coroutine ends in any

            return bound  # type: ignore[return-value]
        if _runs_later(function):
            raise TypeError(f"{_name(function)} is a generator function, whose body runs outside the batch")
        self._opened()
        return functools.partial(self.run, function)

    def _within(self, function: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
        _enter(self._opened())
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


@dataclass(eq=False)
class _Entry:
    """A batch is of a context. `token` tells that context from its copies, which see the entry too."""

    batch: Batch
    token: Token[Any] | None = None


_ENTRIES: ContextVar[tuple[_Entry, ...]] = ContextVar("fastnegate_batches", default=())
_MARK: ContextVar[Any] = ContextVar("fastnegate_mark", default=None)  # what it holds does not matter


def _enter(batch: Batch) -> _Entry:
    entry = _Entry(batch)
    # What was left elsewhere need not be remembered any longer.
    known = [e for e in _ENTRIES.get() if e.batch._state == "open" or not _entered_here(e)]
    entry.token = _MARK.set(entry)
    _ENTRIES.set((*known, entry))
    return entry


def _leave(entry: _Entry) -> None:
    """Of this context; the one that was entered may be another one."""
    _entered_here(entry)
    _ENTRIES.set(tuple(e for e in _ENTRIES.get() if e is not entry))


def _entered_here(entry: _Entry) -> bool:
    """Whether this very context was entered, not one that was copied since. True once: the token is used."""
    token, entry.token = entry.token, None
    if token is None:
        return False
    try:
        _MARK.reset(token)
    except ValueError:  # made in another context
        entry.token = token
        return False
    return True


def current(engine: object) -> Batch | None:
    """The innermost batch of `engine` that is open in this context, or None.

    Raises:
        NegationNotAppliedError: this context was copied within a batch that has ended since, as that of a
            task that outlives it: what it asked for must not run as if it had asked for nothing.
    """
    for entry in reversed(_ENTRIES.get()):
        if entry.batch.engine is not engine:
            continue
        if entry.batch._state == "open":
            return entry.batch
        if not _entered_here(entry):
            raise NegationNotAppliedError(
                "the batch that this task or thread was started in has ended: wait for it within the batch"
            )
        _ENTRIES.set(tuple(e for e in _ENTRIES.get() if e is not entry))  # it was left elsewhere
    return None


def _runs_later(function: Any) -> bool:
    later = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
    return any(is_(function) for is_ in later)


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", repr(function))
