# SPDX-License-Identifier: Apache-2.0
"""`negated_attention`: the public operator.

A call like an earlier one is a look-up and the run of its plan. Any other is checked and planned first. One
that torch has to see, because it traces or transforms what is called, goes through the registered operator.
"""

from __future__ import annotations

from collections.abc import Hashable

from torch import Tensor

from . import checks, choice, reference, registration
from .backends import load
from .choice import backends as backends
from .choice import check_backend as check_backend
from .choice import explain as explain
from .plan import plans
from .problem import signature
from .rule import Rule
from .statistics import Statistics, Tables
from .tokens import ConceptTokens


def negated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    concepts: ConceptTokens | None = None,
    rule: Rule | str = "protore",
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cross-attention that measures negative concepts and suppresses them before the output.

    `O = a Z + sum_e b_e X_e`: Z is the attention to the prompt, X_e a feature of concept e (for most
    rules the attention to its tokens), a and b_e are scalars per query that the rule derives from
    log-sum-exps, inner products and norms.

    Args:
        query: [B, H, N, D], float32, bfloat16, float16 (float64: reference only). Any strides
            with D contiguous; the same for `key` and `value`.
        key, value: [B, H, M, D] of the prompt, dtype and device of the query.
        concepts: what each batch row negates, or None for plain attention.
        rule: a `Rule` or the name of a preset.
        scale: softmax scale; default D ** -0.5.
        key_bias: added to the prompt's logits, [B or 1, H or 1, 1 or N, M], floating point; -inf
            masks a key (even NaN in a key masked for all queries does not reach the output).
        backend: `auto`, `reference`, `cpu`, `cuda` or `triton`. A named backend never falls back.

    Returns:
        [B, H, N, D] in the dtype of the query, a view of [B, N, H, D] memory. A row without an
        existing entry is the backend's plain attention, bit for bit.

    Raises:
        ValueError: shapes, dtypes, devices, strides or numbers that the operator does not define.
        TypeError: an argument of the wrong type.
        BackendError: the named backend cannot run this call; the message says why.
    """
    output, _ = _call(query, key, value, key_bias, concepts, rule, scale, backend, False)
    return output


def negated_attention_with_statistics(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    concepts: ConceptTokens | None = None,
    rule: Rule | str = "protore",
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Statistics]:
    """`negated_attention` and what it did; arguments, first result and errors as there."""
    output, tables = _call(query, key, value, key_bias, concepts, rule, scale, backend, True)
    assert tables is not None
    return output, tables.named


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    concepts: ConceptTokens | None,
    rule: Rule | str,
    scale: float | None,
    backend: str,
    statistics: bool,
) -> tuple[Tensor, Tables | None]:
    """The output, and statistics if they are wanted."""
    call: Hashable = None
    if checks.direct(query, key, value, key_bias, concepts, rule, scale, backend):
        call = backend, statistics, signature(query, key, value, key_bias, concepts, rule, scale)
        plan = plans.get(call)
        if plan is not None:
            return plan.run(query, key, value, key_bias, concepts)
    problem = checks.problem(query, key, value, key_bias, concepts, rule, scale)
    chosen = choice.choose(problem, backend)
    if chosen == "reference" and not query.is_meta:  # gradients flow through it, not through the operator
        return reference.plan(problem, statistics).run(*problem.operands)
    if call is None or not (concepts is None or concepts.located().plain):
        return registration.run(problem, chosen, statistics)
    plan = load(chosen).plan(problem, statistics)
    plans.add(call, plan)
    return plan.run(*problem.operands)
