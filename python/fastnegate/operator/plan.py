# SPDX-License-Identifier: Apache-2.0
"""How a call is computed, decided once: a `Backend` turns a problem into a `Plan`, which runs every call of
the same signature. A look-up and one call into compiled code are then all that is left of the host's work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Protocol

from torch import Tensor

from .problem import Partial, Problem, Slots
from .rule import CODES, Rule
from .statistics import Tables
from .tokens import ConceptTokens


class BackendError(RuntimeError):
    """The requested backend cannot run this call; the message says why."""


class Plan(Protocol):
    """One way of computing, for one signature, with statistics or without. It holds no tensor of a caller."""

    @property
    def backend(self) -> str:
        """Its name."""

    def describe(self) -> str:
        """How the work is cut, on one line, for `explain`."""

    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_bias: Tensor | None,
        concepts: ConceptTokens | None,
        shared: Partial | None = None,
        prompt: Partial | None = None,
        slots: Slots | None = None,
    ) -> tuple[Tensor, Tables | None]:
        """Output [B, H, N, D] in [B, N, H, D] memory, and the statistics where the plan makes them. The
        operands must have the plan's signature; only contents and addresses may differ."""


Words = Mapping[str, tuple[Any, ...]]  # by field of `Rule`, those of `CODES`


class Backend(Protocol):
    """A module that computes. It imports no other backend, nor those who choose between them."""

    @property
    def NAME(self) -> str: ...

    @property
    def WORDS(self) -> Words:
        """Those that it implements; whatever else a rule may say is refused."""

    def unavailable(self) -> str | None:
        """Why it cannot be used on this machine at all, or None."""

    def supports(self, problem: Problem) -> str | None:
        """Why it cannot run this call, or None. Metadata alone is read."""

    def plan(self, problem: Problem, statistics: bool) -> Plan:
        """How it runs calls of this signature, which it supports.

        Raises:
            BackendError: the rule has a word that is not in `WORDS`. This is asked whatever the caller has
                asked before: a kernel would take it for another word.
        """

    def run(self, problem: Problem) -> Tensor:
        """`negated_attention`, whatever the backend supports."""

    def run_with_statistics(self, problem: Problem) -> tuple[Tensor, Tables]:
        """The same, with statistics."""


def unknown_word(words: Words, rule: Rule) -> str | None:
    """The first word of the rule that a backend with these words does not implement, as a reason."""
    for word in CODES:
        if getattr(rule, word) not in words[word]:
            return f"{word}={getattr(rule, word)!r} is not implemented"
    return None


def partial(problem: Problem) -> str | None:
    """The first thing of docs/semantics.md, section 9, in the call, as a reason of a backend without it."""
    for name, _ in problem.partials:
        return f"{name} is a Partial, which is not implemented"
    if problem.concepts is not None and problem.concepts.key.dim() == 4:
        return "concept keys of each batch row's own are not implemented"
    return None


def require(backend: str, reason: str | None) -> None:
    """Raise BackendError for a reason not to run."""
    if reason is not None:
        raise BackendError(f"backend={backend!r} cannot run this call: {reason}")


class Plans:
    """Plans by what they are for. A server sees some hundred signatures; of callers with ever new shapes the
    oldest are forgotten, and made again when they come back. May be used by several threads."""

    def __init__(self, most: int = 4096) -> None:
        self.most = most
        self._plans: dict[Hashable, Plan] = {}
        self._adding = threading.Lock()
        self.get = self._plans.get  # at every call: not even a method of this class around it

    def add(self, key: Hashable, plan: Plan) -> None:
        with self._adding:
            while len(self._plans) >= self.most:
                del self._plans[next(iter(self._plans))]
            self._plans[key] = plan

    def clear(self) -> None:
        with self._adding:
            self._plans.clear()

    def __len__(self) -> int:
        return len(self._plans)

    def __iter__(self) -> Any:
        return iter([*self._plans.values()])


plans = Plans()


def planned(name: str, problem: Problem, statistics: bool, make: Callable[[Problem, bool], Plan]) -> Plan:
    """The plan of a backend for a problem, made if there is none."""
    key = (name, statistics, problem.signature)
    plan = plans.get(key)
    if plan is None:
        plan = make(problem, statistics)
        plans.add(key, plan)
    return plan
