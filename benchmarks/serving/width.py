# SPDX-License-Identifier: Apache-2.0
"""One denoising step of a Stable Diffusion 1.5 UNet at its full width, with the rows of a server's batch: its
own processors, an engine that nobody asks for anything, and one whose rows have unlike policies."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

import fastnegate as fn
from fastnegate.engine.concepts import Concept
from fastnegate.operator.rule import Rule

from ..operator.cases import DENSE
from ..operator.measure import Clock, interleave
from ..pipeline.models import MODELS, Model, normal, pipeline, random_unet, step, twin

CONCEPTS, TOKENS = 6, 8


def policies(batch: int, rule: Rule) -> list[fn.Policy | None]:
    """Six kinds and none, in turn, with gates that are open wherever the rule has them."""
    threshold = None if rule.gate == "open" else DENSE
    negated = [(0,), (1,), (2, 3), (4,), (5,), (0, 1, 2)]
    kinds = [fn.Policy({f"concept {i}": 1.0 for i in of}, threshold=threshold) for of in negated]
    return list(itertools.islice(itertools.cycle([None, *kinds]), batch))


def steps(model: Model, batch: int, rule: Rule) -> dict[str, Callable[[], Any]]:
    """By what is negated; all on the same weights."""
    unet = random_unet(model)
    made: dict[str, Callable[[], Any]] = {"own processors": step(pipeline(model, unet), unet, batch)}
    for name, asked in (("no negation", [None] * batch), ("mixed policies", policies(batch, rule))):
        other = twin(unet)
        pipe = pipeline(model, other)
        bank = fn.ConceptBank.from_prompts(pipe, {"concept 0": "a"})
        for i in range(CONCEPTS):
            bank.update(f"concept {i}", Concept.from_embeddings(normal(i, TOKENS, bank.width)))
        engine = fn.install(pipe, bank, batch, rule=rule)
        engine.set_rows(asked)
        made[name] = step(pipe, other, batch)
    return made


def run(batch: int, size: int, method: str, rounds: int, clock: Clock) -> dict[str, list[float]]:
    """Seconds of each step in each round; pictures of `size` pixels."""
    model = MODELS["sd15"]
    model = Model({**model.unet, "sample_size": size // 8}, model.encoders)
    with torch.inference_mode():
        return interleave(steps(model, batch, Rule.preset(method)), rounds, warm=1, clock=clock)
