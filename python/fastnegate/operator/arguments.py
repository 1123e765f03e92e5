# SPDX-License-Identifier: Apache-2.0
"""A `Problem` as the compiled backends take it: addresses, sizes and strides (csrc/arguments.h)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .problem import Problem

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Arguments(NamedTuple):
    """In the order of csrc/arguments.h; `held` are the tensors, to be kept until the call has ended."""

    held: list[Tensor | None]
    values: tuple[Any, ...]


def arguments(problem: Problem, out: Tensor) -> Arguments:
    """Arguments of a call that writes `out`. Tensors of concepts are made contiguous and aligned, key_bias
    float32."""
    tokens, rule = problem.concepts, problem.rule
    batch, heads, queries, keys, dim = problem.sizes
    key_bias, bias_strides = None, [0, 0, 0, 0]
    if problem.key_bias is not None:
        key_bias = problem.key_bias.float()
        shape = (batch, heads, key_bias.shape[2], keys)
        bias_strides = list(key_bias.expand(shape).stride())
        if not problem.bias_per_query:
            bias_strides[2] = 0
        elif queries > 1 and bias_strides[2] == 0:
            key_bias = key_bias.contiguous()
            bias_strides = list(key_bias.expand(shape).stride())
    held: list[Tensor | None] = [problem.query, problem.key, problem.value, out]
    if tokens is None:
        held += [None, None, key_bias] + [None] * 7
        counts = [0] * 5
    else:
        flat = [tokens.token_bias, tokens.token_weight, tokens.direction, tokens.update, tokens.offset]
        flat += [tokens.index, tokens.numbers]
        held += [tokens.key, tokens.value, key_bias]
        held += [None if t is None else _aligned(t.contiguous()) for t in flat]
        counts = [tokens.tokens, tokens.concepts, tokens.entries, tokens.longest, tokens.busiest]
    values = (
        addresses(held),
        [batch, heads, queries, keys, dim, *counts],
        [_strides(t) for t in held[:6]],
        bias_strides,
        DTYPES[problem.query.dtype],
        problem.scale,
        rule.codes,
        rule.numbers,
    )
    return Arguments(held, values)


def addresses(tensors: Any) -> list[int]:
    """Of each tensor, 0 for None."""
    return [0 if t is None else t.data_ptr() for t in tensors]


def _aligned(tensor: Tensor) -> Tensor:
    """Kernels read two numbers at a time. Only a view into another tensor begins elsewhere."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _strides(tensor: Any) -> list[int]:
    """(batch, head, row) in elements; concept tensors are [T, H, D], the others [B, H, N, D]."""
    if tensor is None:
        return [0, 0, 0]
    if tensor.dim() == 3:
        return [0, tensor.stride(1), tensor.stride(0)]
    return list(tensor.stride()[:3])
