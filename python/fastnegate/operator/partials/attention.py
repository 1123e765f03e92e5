# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch
from torch import Tensor

from ..mixing import attend
from ..problem import Partial


def partial_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Partial:
    """Attention of `query` to `key` and `value`, with its log-sum-exp."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    exact = torch.float64
    bias = None if key_bias is None else key_bias.to(exact)
    segment = attend(query.to(exact), key.to(exact), value.to(exact), scale, bias)
    lse_dtype = exact if query.dtype == exact else torch.float32
    return Partial(segment.output.to(query.dtype), (segment.top + segment.mass.log()).to(lse_dtype))
