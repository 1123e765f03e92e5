# SPDX-License-Identifier: Apache-2.0
"""A model, the world that it draws, and how it is called: what a study of quality needs to know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fastnegate import testbed
from fastnegate.engine.bank import ConceptBank
from fastnegate.engine.policy import Policy
from fastnegate.integrations.diffusers.install import install
from fastnegate.operator.rule import Rule
from fastnegate.testbed import model
from fastnegate.testbed.quality import _judge as judged

BATCH = 32
Picture = NDArray[Any]


class Shares(NamedTuple):
    """Of the cases of a suite, in [0, 1]: the concept is gone; what it does not cover has stayed; both."""

    gone: float
    kept: float
    right: float


class World(Protocol):
    """Prompts with something to negate, and who tells what became of them."""

    @property
    def CONCEPTS(self) -> Sequence[str]: ...
    @property
    def SUITES(self) -> Sequence[str]: ...
    @property
    def PLAIN(self) -> Sequence[str]:
        """Words that lean to no concept more than to the others: their mean is neutral."""

    def members(self, concept: str) -> list[str]:
        """The words that make up a concept."""

    def templates(self, member: str) -> list[str]:
        """As `ConceptBank.from_prompts` takes them."""

    def suite(self, name: str, n: int, seed: int) -> Sequence[Any]:
        """Cases with a `prompt` and a `concept`."""

    def judge(self, image: Picture, case: Any, suite: str) -> tuple[bool, bool, bool]:
        """As `Shares` has them."""


class Easy:
    """The testbed's world of two coloured shapes."""

    CONCEPTS, SUITES = testbed.CONCEPTS, testbed.SUITES
    PLAIN = testbed.CONCEPTS[:12]  # colours and shapes
    members, templates = staticmethod(testbed.members), staticmethod(testbed.templates)
    suite, judge = staticmethod(testbed.suite), staticmethod(judged)


@dataclass(frozen=True)
class Host:
    """A pipeline, its world, and further arguments of its calls: steps, guidance."""

    pipe: Any
    world: World
    call: Mapping[str, Any]

    def bank(self) -> ConceptBank:
        """All concepts of the world, each member a prototype."""
        prompts = {concept: self.world.members(concept) for concept in self.world.CONCEPTS}
        return ConceptBank.from_prompts(self.pipe, prompts, templates=self.world.templates)

    def score(
        self, bank: ConceptBank, rule: Rule | None, suites: Sequence[str], cases: int, seed: int
    ) -> dict[str, Shares]:
        """Draw the first cases of suites, each under the negation of its concept, and judge them. The same
        seed draws from the same noise whatever the rule is; None negates nothing."""
        todo = [(name, case) for name in suites for case in self.world.suite(name, cases, seed)]
        found: dict[str, list[tuple[bool, bool, bool]]] = {name: [] for name in suites}
        for first in range(0, len(todo), BATCH):
            batch = todo[first : first + BATCH]
            noise = [seed + (first + i) % cases for i in range(len(batch))]
            for (name, case), image in zip(batch, self._drawn(bank, rule, [c for _, c in batch], noise)):
                found[name].append(self.world.judge(image, case, name))
        return {name: Shares(*np.mean(verdicts, 0).tolist()) for name, verdicts in found.items()}

    def _drawn(
        self, bank: ConceptBank, rule: Rule | None, cases: Sequence[Any], noise: Sequence[int]
    ) -> Picture:
        call = {
            "prompt": [case.prompt for case in cases],
            "generator": [torch.Generator().manual_seed(seed) for seed in noise],
            "output_type": "np",
            **self.call,
        }
        if rule is None:
            return np.asarray(self.pipe(**call).images)
        engine = install(self.pipe, bank, max_batch=BATCH, rule=rule)
        try:
            with engine.batch([Policy({case.concept: 1.0}) for case in cases]):
                return np.asarray(self.pipe(**call).images)
        finally:
            engine.remove()


def load(name: str) -> Host:
    """One of `HOSTS`.

    Raises:
        ValueError: another name.
    """
    if name not in HOSTS:
        raise ValueError(f"host={name!r}: allowed are {', '.join(HOSTS)}")
    return HOSTS[name]()


def _easy() -> Host:
    pipe = model.load()
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": model.DEFAULT_STEPS, "guidance_scale": model.DEFAULT_GUIDANCE}
    return Host(pipe, Easy(), call)


HOSTS = {"easy": _easy}
