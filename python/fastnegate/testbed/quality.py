# SPDX-License-Identifier: Apache-2.0
"""How well a method negates on the embedded model: the suites, judged by the detector."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch

from ..engine.bank import ConceptBank
from ..engine.policy import Policy
from ..integrations.diffusers.install import install
from ..operator.rule import Rule, check_number
from .cases import Case
from .easy import CONCEPTS, SUITES, judge, members, suite, templates
from .model import DEFAULT_GUIDANCE, DEFAULT_STEPS

BATCH = 32
UNNEGATED = ("none", "negative prompt")


@dataclass(frozen=True)
class Score:
    """Shares of a suite's cases, in [0, 1]; where nothing should go, as in `benign`, `gone` does not count.

    Attributes:
        gone: the loose detector finds none of the concepts.
        kept: the strict detector finds every object that should stay.
        right: both; where nothing should go: `kept`.
    """

    method: str
    suite: str
    cases: int
    gone: float
    kept: float
    right: float


def bank_of(pipe: Any, concepts: tuple[str, ...] = CONCEPTS) -> ConceptBank:
    """Concepts of the embedded model's world, each member a prototype."""
    return ConceptBank.from_prompts(pipe, {c: members(c) for c in concepts}, templates=templates)


def measure(
    pipe: Any,
    methods: Sequence[str] = ("none", "protore"),
    suites: Sequence[str] = SUITES,
    cases: int = 64,
    seed: int = 0,
    strength: float = 1.0,
    on_step: Callable[[str], None] = lambda _: None,
) -> Iterator[Score]:
    """Score methods on suites, case by case in batches in which every request has its own policy.

    Args:
        methods: `none`, `negative prompt`, or presets.
        suites: some of `SUITES`.
        cases: of each suite, at least 1.
        seed: of the cases and of the noise, at least 0.
        strength: relative, above 0; 1.0 is each method's own.
        on_step: called after each denoising step, of which there are `steps(...)`, with what is going on.

    Raises:
        ValueError: a bad argument, before any work.
    """
    if not isinstance(cases, int) or cases < 1:
        raise ValueError(f"cases={cases!r}: must be a whole number >= 1")
    for method in methods:
        if method not in UNNEGATED and Rule.preset(method).tokens == "none":
            raise ValueError(f"methods: {method!r} needs directions, which the embedded model's bank lacks")
    check_number("strength", strength, above=0.0)
    drawn = {name: suite(name, cases, seed) for name in suites}
    return _measure(pipe, methods, drawn, seed, strength, on_step)


def steps(methods: Sequence[str], suites: Sequence[str], cases: int) -> int:
    """How many denoising steps `measure` takes."""
    return len(methods) * len(suites) * -(-cases // BATCH) * DEFAULT_STEPS


def _measure(
    pipe: Any,
    methods: Sequence[str],
    drawn: Mapping[str, list[Case[Any]]],
    seed: int,
    strength: float,
    on_step: Callable[[str], None],
) -> Iterator[Score]:
    wanted = {concept for todo in drawn.values() for case in todo for concept in case.concepts}
    negating = any(method not in UNNEGATED for method in methods)
    bank = bank_of(pipe, tuple(c for c in CONCEPTS if c in wanted)) if negating else None
    for method, (name, todo) in product(methods, drawn.items()):
        batches = [(i, todo[i : i + BATCH]) for i in range(0, len(todo), BATCH)]
        said = partial(on_step, f"{method} on {name}")
        images = np.concatenate(
            [_draw(pipe, bank, method, batch, seed + i, strength, said) for i, batch in batches]
        )
        verdicts = [judge(image, case) for image, case in zip(images, todo)]
        shares = np.mean([(found.gone, found.kept, found.right) for found in verdicts], axis=0)
        yield Score(method, name, len(todo), *shares.tolist())


def _draw(
    pipe: Any,
    bank: ConceptBank | None,
    method: str,
    cases: list[Case[Any]],
    seed: int,
    strength: float,
    on_step: Callable[[], None],
) -> np.ndarray[Any, Any]:
    def on_step_end(_pipe: Any, _i: int, _t: Any, values: dict[str, Any]) -> dict[str, Any]:
        on_step()
        return values

    arguments: dict[str, Any] = {
        "prompt": [case.prompt for case in cases],
        "num_inference_steps": DEFAULT_STEPS,
        "guidance_scale": DEFAULT_GUIDANCE,
        "generator": [torch.Generator().manual_seed(seed + i) for i in range(len(cases))],
        "output_type": "np",
        "callback_on_step_end": on_step_end,
    }
    if method == "negative prompt":
        arguments["negative_prompt"] = [" and ".join(case.concepts) for case in cases]
    if method in UNNEGATED:
        return np.asarray(pipe(**arguments).images)
    assert bank is not None
    engine = install(pipe, bank, max_batch=BATCH, rule=method)
    try:
        with engine.batch([Policy(dict.fromkeys(case.concepts, strength)) for case in cases]):
            return np.asarray(pipe(**arguments).images)
    finally:
        engine.remove()
