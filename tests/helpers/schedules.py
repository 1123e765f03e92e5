# SPDX-License-Identifier: Apache-2.0
"""A tiny pipeline under an engine with the images that it should make, and what is allowed instead."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pipelines
import torch
from torch import Tensor

import fastnegate as fn

DOG, CAT, NONE = fn.Policy({"dog": 1.0}), fn.Policy({"cat": 1.0}), None
# What may be raised instead of an image: everything else is an accident.
NAMED = (fn.NegationNotAppliedError, fn.RowMapError, fn.UnsupportedModelError)


def bank_of(pipe: Any) -> fn.ConceptBank:
    return fn.ConceptBank.from_prompts(pipe, {"dog": "dog", "cat": "cat"}, templates=["{}"])


def negated(pipe: Any, engine: fn.Engine, policy: fn.Policy | None = DOG, **options: Any) -> Tensor:
    with engine.batch([policy]):
        return pipelines.generate(pipe, **options)


def outcome(make: Callable[[], Any]) -> Any:
    """What it returns, or the error with a name that it raises."""
    try:
        return make()
    except NAMED as error:
        return error


def fair(got: Any, *wanted: Tensor) -> bool:
    """An error with a name, or one of the images that are right."""
    return isinstance(got, NAMED) or any(torch.equal(got, want) for want in wanted)


@dataclass
class House:
    """A pipeline with an engine, and its images of "a cat" (seed 0, 3 steps) under each policy."""

    pipe: Any
    engine: fn.Engine
    plain: Tensor
    dog: Tensor
    cat: Tensor

    def near(self, got: Tensor, want: Tensor) -> bool:
        """The same but for rounding: a hundredth of what negation changes is more than that."""
        return bool((got - want).abs().max() < 0.01 * (self.dog - self.plain).abs().max())

    def __call__(self, **options: Any) -> Tensor:
        return pipelines.generate(self.pipe, **options)


def house(kind: str = "sd15", prepare: Callable[[Any], object] = lambda pipe: None, **options: Any) -> House:
    """`prepare` is done to the pipeline before the engine is installed."""
    pipe = pipelines.build(kind)
    prepare(pipe)
    plain = pipelines.generate(pipe)
    engine = fn.install(pipe, bank_of(pipe), **{"rule": "nag", **options})
    dog, cat = negated(pipe, engine, DOG), negated(pipe, engine, CAT)
    assert not any(torch.allclose(a, b) for a, b in ((plain, dog), (plain, cat), (dog, cat)))
    return House(pipe, engine, plain, dog, cat)


# ---- the four ways into another thread ---------------------------------------------------------


def _executor(make: Callable[[], Any]) -> Any:
    async def main() -> Any:
        return await asyncio.get_running_loop().run_in_executor(None, make)

    return asyncio.run(main())


def _submit(make: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(make).result()


def _thread(make: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(outcome(make)))
    thread.start()
    thread.join()
    assert results, "the thread raised an error without a name"
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]


def _to_thread(make: Callable[[], Any]) -> Any:
    async def main() -> Any:
        return await asyncio.to_thread(make)

    return asyncio.run(main())


COPYING = {"to_thread": _to_thread}  # copies the context
BARE = {"run_in_executor": _executor, "submit": _submit, "Thread": _thread}  # do not
THREADS = {**COPYING, **BARE}
