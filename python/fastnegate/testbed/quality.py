# SPDX-License-Identifier: Apache-2.0
"""How well a method negates on the embedded model: the suites, judged by the detector."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..engine.bank import ConceptBank
from ..engine.policy import Policy
from ..integrations.diffusers.install import install
from .concepts import CONCEPTS, members, templates
from .detector import LOOSE, STRICT, detect, kept, shows
from .model import DEFAULT_GUIDANCE, DEFAULT_STEPS
from .suites import SUITES, Case, suite

BATCH = 32


@dataclass(frozen=True)
class Score:
    """Shares of a suite's cases, in [0, 1]; for `benign`, `gone` does not count.

    Attributes:
        gone: the loose detector does not find the concept.
        kept: the strict detector finds the object that the concept does not cover.
        right: both; for `benign`: both objects are found.
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
    methods: tuple[str, ...] = ("none", "protore"),
    suites: tuple[str, ...] = SUITES,
    cases: int = 64,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Iterator[Score]:
    """Score methods (`none`, `negative prompt`, or preset names) on suites, case by case in batches
    in which every request has its own policy."""
    bank = bank_of(pipe)
    for method in methods:
        for name in suites:
            progress(f"{method} on {name}")
            todo = suite(name, cases, seed)
            images = np.concatenate(
                [_draw(pipe, bank, method, todo[i : i + BATCH], seed + i) for i in range(0, cases, BATCH)]
            )
            verdicts = np.array([_judge(image, case, name) for image, case in zip(images, todo)])
            yield Score(method, name, cases, *verdicts.mean(0).tolist())


def _draw(pipe: Any, bank: ConceptBank, method: str, cases: list[Case], seed: int) -> np.ndarray[Any, Any]:
    arguments: dict[str, Any] = {
        "prompt": [case.prompt for case in cases],
        "num_inference_steps": DEFAULT_STEPS,
        "guidance_scale": DEFAULT_GUIDANCE,
        "generator": [torch.Generator().manual_seed(seed + i) for i in range(len(cases))],
        "output_type": "np",
    }
    if method == "negative prompt":
        arguments["negative_prompt"] = [case.concept for case in cases]
    if method in ("none", "negative prompt"):
        return np.asarray(pipe(**arguments).images)
    engine = install(pipe, bank, max_batch=BATCH, rule=method)
    try:
        with engine.batch([Policy({case.concept: 1.0}) for case in cases]):
            return np.asarray(pipe(**arguments).images)
    finally:
        engine.remove()


def _judge(image: np.ndarray[Any, Any], case: Case, name: str) -> tuple[bool, bool, bool]:
    gone = not shows(detect(image, LOOSE), case.concept)
    found = detect(image, STRICT)
    stays = kept(found, [case.other], case.concept)
    if name == "benign":
        return gone, stays, kept(found, [case.target, case.other], case.concept)
    return gone, stays, gone and stays
