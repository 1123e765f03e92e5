# SPDX-License-Identifier: Apache-2.0
"""The tensors that the embedded model's cross-attention layers get while it draws."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastnegate import Policy, install, negated_attention
from fastnegate.integrations.diffusers import processor
from fastnegate.operator.rule import Rule
from fastnegate.operator.tokens import ConceptTokens
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

    def record(
        query: Tensor, key: Tensor, value: Tensor, tokens: ConceptTokens, rule: Rule, **options: Any
    ) -> Tensor:
        if engine.step in QUARTERS:
            layer = next(n for n, layer in engine.layers.items() if layer.tokens is tokens)
            place = layer.split(".transformer_blocks")[0]
            found.append(
                Case(
                    f"embedded {name} {place} step {engine.step}",
                    query.clone(),
                    key.clone(),
                    value.clone(),
                    dataclasses.replace(tokens, numbers=tokens.numbers.clone(), index=tokens.index.clone()),
                    rule,
                    rule.threshold,
                )
            )
        return negated_attention(query, key, value, tokens, rule, **options)

    # The tensors of the tokens are static: what changes from step to step is copied above.
    with (
        mock.patch.object(processor, "negated_attention", record),
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
