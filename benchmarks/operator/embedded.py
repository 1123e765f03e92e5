# SPDX-License-Identifier: Apache-2.0
"""The tensors that the embedded model's cross-attention layers get while it draws."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastnegate import Policy, install
from fastnegate.integrations.diffusers import processor
from fastnegate.operator.rule import Rule
from fastnegate.testbed import DEFAULT_GUIDANCE, DEFAULT_STEPS, load, suite
from fastnegate.testbed.quality import bank_of

from .cases import Case

QUARTERS = tuple(DEFAULT_STEPS * i // 4 for i in (1, 2, 3))


def captured(name: str, rule: Rule, requests: int = 8) -> Iterator[Case]:
    """Calls of each layer at three steps, of a batch in which every prompt of suite `name` negates its
    concept: one that hides in the prompt (`implicit`), or one that is not in it (`benign`)."""
    pipe = load()
    prompts = suite(name, requests, seed=0)
    engine = install(pipe, bank_of(pipe, tuple({case.concept for case in prompts})), requests, rule=rule)
    found: list[Case] = []

    attend = processor.NegationAttnProcessor._attend

    def record(
        self: Any,
        attn: Any,
        running: Any,
        context: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
    ) -> Tensor:
        tokens = self._concepts(attn, query, running, context)
        if engine.step in QUARTERS:
            place = self.layer.split(".transformer_blocks")[0]
            name_of_case = f"embedded {name} {place} step {engine.step}"
            found.append(
                Case(name_of_case, query.clone(), key.clone(), value.clone(), tokens, rule, rule.threshold)
            )
        return attend(self, attn, running, context, query, key, value, mask)

    with (
        mock.patch.object(processor.NegationAttnProcessor, "_attend", record),
        engine.batch([Policy({case.concept: 1.0}) for case in prompts]),
    ):
        pipe(
            [case.prompt for case in prompts],
            num_inference_steps=DEFAULT_STEPS,
            guidance_scale=DEFAULT_GUIDANCE,
            generator=[torch.Generator().manual_seed(i) for i in range(requests)],
            output_type="latent",
        )
    engine.remove()
    yield from found
