# SPDX-License-Identifier: Apache-2.0
"""A model of the testbed, the world that it draws, and how it is called: what a study of quality needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fastnegate.engine.bank import ConceptBank
from fastnegate.engine.policy import Policy
from fastnegate.integrations.diffusers.install import install
from fastnegate.operator.rule import Rule
from fastnegate.testbed import model
from fastnegate.testbed.world import World

BATCH = 32
Picture = NDArray[Any]


class Shares(NamedTuple):
    """Of the cases of a suite, in [0, 1]: the concepts are gone; what they do not cover has stayed; both."""

    gone: float
    kept: float
    right: float


@dataclass(frozen=True)
class Host:
    """A pipeline, its world, and further arguments of its calls: steps, guidance."""

    pipe: Any
    world: World
    call: Mapping[str, Any]

    def bank(self, suites: Sequence[str], cases: int, seed: int, split: str) -> ConceptBank:
        """The concepts of these cases, each of the words that the negation may know it by."""
        drawn = [case for name in suites for case in self.world.suite(name, cases, seed, split)]
        prompts = {" ".join(given): list(given) for case in drawn for given in case.given}
        return ConceptBank.from_prompts(self.pipe, prompts, templates=self.world.templates)

    def score(
        self,
        bank: ConceptBank,
        rule: Rule | None,
        suites: Sequence[str],
        cases: int,
        seed: int,
        split: str = "development",
    ) -> dict[str, Shares]:
        """Draw the first cases of suites, each under the negation of its concepts, and judge them. The same
        seed draws from the same noise whatever the rule is; None negates nothing."""
        todo = [(name, case) for name in suites for case in self.world.suite(name, cases, seed, split)]
        found: dict[str, list[tuple[bool, bool, bool]]] = {name: [] for name in suites}
        for first in range(0, len(todo), BATCH):
            batch = todo[first : first + BATCH]
            noise = [seed + (first + i) % cases for i in range(len(batch))]
            images = self._drawn(bank, rule, [case for _, case in batch], noise).clip(0, 1)
            for (name, case), image in zip(batch, images, strict=True):
                verdict = self.world.judge(image, case)
                found[name].append((verdict.gone, verdict.kept, verdict.right))
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
            policies = [Policy({" ".join(given): 1.0 for given in case.given}) for case in cases]
            with engine.batch(policies):
                return np.asarray(self.pipe(**call).images)
        finally:
            engine.remove()


def load(name: str, guided: bool = True) -> Host:
    """One of the testbed's hosts; `guided`: by two passes.

    Raises:
        ValueError: another name.
    """
    pipe: Any = model.load(name)
    call: dict[str, Any] = {"num_inference_steps": model.DEFAULT_STEPS}
    if hasattr(pipe, "unet"):
        call["guidance_scale"] = model.DEFAULT_GUIDANCE if guided else 1.0
    elif guided:
        call |= {"true_cfg_scale": model.DEFAULT_GUIDANCE, "negative_prompt": ""}
    return Host(pipe, pipe.tokenizer.world, call)
