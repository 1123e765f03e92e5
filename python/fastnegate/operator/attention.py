# SPDX-License-Identifier: Apache-2.0
"""`negated_attention`: the public operator. Checks metadata, chooses a backend, calls it."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from . import reference
from . import registration as ops
from .backends import AUTO, NAMES, BackendError, load, unavailable
from .problem import Problem, Statistics
from .rule import Rule, check_number
from .tokens import COLUMNS, ConceptTokens

log = logging.getLogger("fastnegate")


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
    problem = _problem(query, key, value, concepts, rule, scale, key_bias)
    chosen = _choose(problem, backend)
    if _direct(problem, chosen):
        return reference.run(problem)
    return ops.run(problem, chosen)


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
    problem = _problem(query, key, value, concepts, rule, scale, key_bias)
    chosen = _choose(problem, backend)
    if _direct(problem, chosen):
        output, tables = reference.run_with_statistics(problem)
    else:
        output, tables = ops.run_with_statistics(problem, chosen)
    return output, tables.named


def check_backend(backend: str) -> None:
    """Raise ValueError for an unknown name, BackendError for one this machine cannot use."""
    if backend == "auto":
        return
    if backend not in NAMES:
        raise ValueError(f"backend={backend!r}: allowed are auto, {', '.join(NAMES)}")
    reason = unavailable(backend)
    if reason is not None:
        raise BackendError(f"backend={backend!r} cannot be used here: {reason}")


def backends() -> dict[str, str | None]:
    """Every backend by name: None if it can be used on this machine, else why not."""
    return {name: unavailable(name) for name in NAMES}


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    concepts: ConceptTokens | None = None,
    rule: Rule | str = "protore",
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
) -> str:
    """Which backend `auto` would choose for this call, and why each other one is not chosen."""
    problem = _problem(query, key, value, concepts, rule, scale, key_bias)
    batch, heads, queries, keys, dim = problem.sizes
    lines = [
        f"negated_attention B={batch} H={heads} N={queries} M={keys} D={dim} "
        f"{str(query.dtype).removeprefix('torch.')} rule={problem.rule.name} "
        f"entries={0 if concepts is None else concepts.entries}"
    ]
    chosen = _auto(problem)
    for name in AUTO:
        reason = _refusal(problem, name)
        if name == chosen:
            module = load(name)
            detail = f": {module.describe(problem)}" if hasattr(module, "describe") else ""
            lines.append(f"  {name}: chosen{detail}")
        else:
            lines.append(f"  {name}: {reason or 'could run; another comes first'}")
    return "\n".join(lines)


def _problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    concepts: ConceptTokens | None,
    rule: Rule | str,
    scale: float | None,
    key_bias: Tensor | None,
) -> Problem:
    """Fill in defaults, apply autocast and validate metadata: no data is read, nothing syncs."""
    if isinstance(rule, str):
        rule = Rule.preset(rule)
    if not isinstance(rule, Rule):
        raise TypeError(f"rule is a {type(rule).__name__}: must be a Rule or the name of a preset")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}: must be a tensor")
        if tensor.dim() != 4:
            raise ValueError(f"{name} has shape {list(tensor.shape)}: must be [B, H, N, D]")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}: must be floating point")
    if concepts is not None and not isinstance(concepts, ConceptTokens):
        raise TypeError(f"concepts is a {type(concepts).__name__}: must be ConceptTokens or None")
    device = query.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        # The rule of scaled_dot_product_attention: compute in the autocast dtype, but leave float64.
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        concepts = concepts.cast(dtype) if concepts is not None else None
    _check_prompt(query, key, value, key_bias)
    if scale is None:
        scale = query.shape[3] ** -0.5 if query.shape[3] else 1.0
    else:
        check_number("scale", scale)
    if concepts is not None:
        _check_concepts(query, concepts)
        if concepts.entries == 0:
            concepts = None
    return Problem(query, key, value, key_bias, concepts, rule, float(scale))


def _check_prompt(query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None) -> None:
    batch, heads, queries, dim = query.shape
    for name, tensor in (("key", key), ("value", value)):
        b, h, m, d = tensor.shape
        if h != heads and heads % max(h, 1) == 0:
            raise ValueError(
                f"{name} has {h} heads, query has {heads}: grouped-query attention is not "
                "supported; repeat the heads"
            )
        if (b, h, d) != (batch, heads, dim) or m != key.shape[2]:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}: must be "
                f"[{batch}, {heads}, {key.shape[2]}, {dim}] to go with query and key"
            )
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}: must be {query.dtype} as the query")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}: must be on {query.device} as the query")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if dim > 1 and tensor.stride(3) != 1 and tensor.numel():
            raise ValueError(f"{name} has strides {list(tensor.stride())}: the last must be 1")
    if key_bias is None:
        return
    shape = key_bias.shape
    if (
        key_bias.dim() != 4
        or shape[0] not in (1, batch)
        or shape[1] not in (1, heads)
        or shape[2] not in (1, queries)
        or shape[3] != key.shape[2]
    ):
        raise ValueError(
            f"key_bias has shape {list(shape)}: must be [{batch} or 1, {heads} or 1, "
            f"1 or {queries}, {key.shape[2]}]"
        )
    if not key_bias.is_floating_point():
        raise ValueError(f"key_bias has dtype {key_bias.dtype}: must be floating point (0 keeps, -inf masks)")
    if key_bias.device != query.device:
        raise ValueError(f"key_bias is on {key_bias.device}: must be on {query.device} as the query")


def _check_concepts(query: Tensor, concepts: ConceptTokens) -> None:
    if concepts.batch != query.shape[0]:
        raise ValueError(f"concepts hold {concepts.batch} rows, query has {query.shape[0]}")
    if concepts.entries == 0:
        return
    heads, dim = query.shape[1], query.shape[3]
    for name in ("key", "value"):
        tensor = getattr(concepts, name)
        if tensor.dim() != 3 or tensor.shape[1:] != (heads, dim):
            raise ValueError(f"concepts.{name} has shape {list(tensor.shape)}: must be [T, {heads}, {dim}]")
        if len(tensor) != concepts.tokens:
            raise ValueError(
                f"concepts.{name} has shape {list(tensor.shape)}: must have {concepts.tokens} tokens "
                "as concepts.key"
            )
        if dim > 1 and tensor.stride(2) != 1 and tensor.numel():
            raise ValueError(f"concepts.{name} has strides {list(tensor.stride())}: last must be 1")
    shapes = {
        "numbers": (concepts.entries, COLUMNS),
        "token_bias": (concepts.tokens,),
        "token_weight": (concepts.tokens,),
        "direction": (concepts.concepts, heads, dim),
        "update": (concepts.concepts, heads, dim),
        "offset": (concepts.concepts,),
    }
    for name in ("key", "value", "index", *shapes):
        tensor = getattr(concepts, name)
        if tensor is None:
            continue
        if tensor.device != query.device:
            raise ValueError(f"concepts.{name} is on {tensor.device}: must be on {query.device}")
        if name in shapes and tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"concepts.{name} has shape {list(tensor.shape)}: must be {list(shapes[name])}")
        dtype = query.dtype if name in ("key", "value") else torch.float32
        dtype = torch.int32 if name == "index" else dtype
        if tensor.dtype != dtype:
            raise ValueError(f"concepts.{name} has dtype {tensor.dtype}: must be {dtype}")


def _choose(problem: Problem, backend: str) -> str:
    if backend == "auto":
        return _auto(problem)
    check_backend(backend)
    reason = _refusal(problem, backend)
    if reason is not None:
        raise BackendError(f"backend={backend!r} cannot run this call: {reason}")
    return backend


def _direct(problem: Problem, chosen: str) -> bool:
    """Whether to bypass the registered operator: gradients must flow through the reference. Meta
    tensors have no data to read and take the operator's fake."""
    return chosen == "reference" and problem.query.device.type != "meta"


def _auto(problem: Problem) -> str:
    reasons = []
    for name in AUTO:
        reason = _refusal(problem, name)
        if reason is None:
            break
        reasons.append(f"{name}: {reason}")
    if name == "reference" and not torch.compiler.is_compiling() and problem.query.device.type != "meta":
        _log_once("using the slow reference (" + "; ".join(reasons) + ")")
    return name


def _refusal(problem: Problem, name: str) -> str | None:
    """Why the backend cannot run the call, or None."""
    if name == "reference":
        return None
    missing = unavailable(name)
    if missing is not None:
        return missing
    if torch.is_grad_enabled() and any(t.requires_grad for t in _inputs(problem)):
        return "an input requires grad, and fused backends have no gradient"
    reason: str | None = load(name).supports(problem)
    return reason


def _inputs(problem: Problem) -> list[Tensor]:
    tensors = [problem.query, problem.key, problem.value, problem.key_bias]
    if (tokens := problem.concepts) is not None:  # named one by one: compilers cannot always trace `vars`
        tensors += [tokens.key, tokens.value, tokens.numbers, tokens.token_bias, tokens.token_weight]
        tensors += [tokens.direction, tokens.update, tokens.offset]
    return [tensor for tensor in tensors if tensor is not None]


@functools.cache
def _log_once(message: str) -> None:
    log.warning(message)
