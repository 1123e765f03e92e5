# SPDX-License-Identifier: Apache-2.0
"""`partial_attention`: which kernel attends, for calls like an earlier one known from it."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from .. import checks
from ..choice import log_once
from ..plan import require
from ..problem import Partial, Problem, signature
from ..rule import Rule
from . import kernels

_UNUSED = Rule()  # the checks are those of the operator
_known: dict[Hashable, tuple[str, float]] = {}  # calls like one that was checked: which kernel, and the scale
_MOST = 4096


def partial_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Partial:
    """Attention to some of the keys of a softmax, by a kernel of torch or of another package, with the
    log-sum-exp that other keys need to join (docs/semantics.md, section 9).

    Args:
        query: [B, H, N, D], float32, bfloat16, float16, float64. Any strides with D contiguous; the same for
            `key` and `value`. Under autocast its dtype counts, but for float64.
        key, value: [B, H, M, D], dtype and device of the query. M may be 0.
        key_bias: added to the logits, [B or 1, H or 1, 1 or N, M], floating point; -inf masks a key (even NaN
            in a key masked for all queries does not reach the output).
        scale: softmax scale; default D ** -0.5.
        backend: `auto`, or by name, which never falls back:

            - `reference`: torch in float64, any device. Slow: it makes all [B, H, N, M] logits.
            - `cpu`: torch's flash attention for CPUs.
            - `flash`, `cudnn`, `efficient`: those of `scaled_dot_product_attention` for GPUs. flash takes no
              `key_bias`, cudnn one in the dtype of the query; beside another, efficient computes in float32.
            - `flex`: torch's flex attention for GPUs, which compiles at the first call of a kind.
            - `flash_attn_2`, `flash_attn_3`, `flash_attn_4`, `sage`: the packages flash_attn,
              flash_attn_interface, flash_attn.cute and sageattention, where installed; no `key_bias`. The
              log-sum-exp of sage is that of logits rounded to 8 bit, and shares in a merge are as exact.

            `auto` takes the first of cpu, flash, cudnn, efficient and reference that can run the call.

    Returns:
        `out` [B, H, N, D], D contiguous, in the dtype of the query, and `lse` [B, H, N], float32 (float64 for
        float64). A row whose keys are all masked, or that has none, has lse -inf, and its `out` says nothing.

        With an input that requires grad both are differentiable: `auto` takes the reference then, and every
        other name is refused, for fused kernels have no gradient of the log-sum-exp.

    Raises:
        ValueError: shapes, dtypes, devices, strides or a scale that `negated_attention` would refuse; there
            is no backend of that name.
        TypeError: an argument of the wrong type.
        BackendError: the named backend cannot run this call; the message says why.

    The conventions of flash, cudnn, efficient and flex were checked on one GPU (H100, torch 2.11). No test
    runs them, nor the packages: tests have what they return as recorded, layout, shape and empty rows.
    """
    call: Hashable = None
    if checks.direct(query, key, value, key_bias, None, _UNUSED, scale, None, None, None, backend):
        call = backend, signature(query, key, value, key_bias, None, _UNUSED, scale)
        known = _known.get(call)
        if known is not None:
            name, scale = known
            return Partial(*kernels.run(name, Problem(query, key, value, key_bias, None, _UNUSED, scale)))
    problem = checks.problem(query, key, value, key_bias, None, _UNUSED, scale)
    if backend == "auto":
        backend = _first(problem)
    elif backend not in kernels.KERNELS:
        raise ValueError(f"backend={backend!r}: allowed are auto, {', '.join(kernels.KERNELS)}")
    else:
        require(backend, kernels.refusal(backend, problem))
    result = Partial(*kernels.run(backend, problem))
    if call is not None:
        if len(_known) >= _MOST:
            _known.clear()
        _known[call] = backend, problem.scale
    return result


def _first(problem: Problem) -> str:
    """The first kernel that can run the call; the reference can run all."""
    reasons: list[str] = []
    for name in kernels.AUTO:
        reason = kernels.refusal(name, problem)
        if reason is None:
            break
        reasons.append(f"{name}: {reason}")
    if name == "reference" and not torch.compiler.is_compiling() and not problem.query.is_meta:
        log_once("partial_attention uses the slow reference (" + "; ".join(reasons) + ")")
    return name
