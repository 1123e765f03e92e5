# SPDX-License-Identifier: Apache-2.0
"""What the arguments of the operator must be. Metadata alone is looked at: no data is read, nothing syncs."""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import Partial, Problem, Slots
from .rule import Rule, check_number
from .tokens import COLUMNS, ConceptTokens


def direct(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    concepts: ConceptTokens | None,
    rule: Rule | str,
    scale: float | None,
    shared: Partial | None,
    prompt: Partial | None,
    slots: Slots | None,
    backend: str,
) -> bool:
    """Whether a call may be looked up by its signature, and read memory at once. Else either torch has to see
    the registered operator: something traces, records, transforms or differentiates what is called, or memory
    is not what a tensor says. Or an argument is of a type that `problem` converts or refuses."""
    return (
        not torch.compiler.is_dynamo_compiling()
        and type(query) is type(key) is type(value) is Tensor
        and (key_bias is None or (type(key_bias) is Tensor and not key_bias.is_neg()))
        and (concepts is None or type(concepts) is ConceptTokens)
        and (shared is None or _plain(shared))
        and (prompt is None or _plain(prompt))
        and (slots is None or all(map(_plain, slots)))
        and isinstance(rule, (Rule, str))
        and (scale is None or isinstance(scale, float))
        and isinstance(backend, str)
        and query.layout is key.layout is value.layout is torch.strided
        and not (query.is_neg() or key.is_neg() or value.is_neg())
        and torch._C._len_torch_dispatch_stack() == 0  # fake tensors, export, whoever records operations
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None  # vmap and its kin
        and torch._C._get_tracing_state() is None  # torch.jit.trace
        and not torch._C._autograd._profiler_enabled()  # which shows operators by name
        and not query.is_meta  # which has no memory
        and not torch.is_autocast_enabled(query.device.type)
        and not (
            torch.is_grad_enabled()
            and requires_grad(query, key, value, key_bias, concepts, shared, prompt, slots)
        )
    )


def _plain(partial: object) -> bool:
    """Whether memory is what the tensors say."""
    return type(partial) is Partial and all(
        type(t) is Tensor and t.layout is torch.strided and not t.is_neg() for t in partial
    )


def requires_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    concepts: ConceptTokens | None,
    shared: Partial | None = None,
    prompt: Partial | None = None,
    slots: Slots | None = None,
) -> bool:
    """Whether an input requires grad."""
    return (
        query.requires_grad
        or key.requires_grad
        or value.requires_grad
        or (key_bias is not None and key_bias.requires_grad)
        or (concepts is not None and concepts.requires_grad)
        or (shared is not None and (shared.out.requires_grad or shared.lse.requires_grad))
        or (prompt is not None and (prompt.out.requires_grad or prompt.lse.requires_grad))
        or (slots is not None and any(t.requires_grad for slot in slots for t in slot))
    )


def keys(
    query: Tensor, key: Tensor | None, value: Tensor | None, key_bias: Tensor | None, prompt: Partial | None
) -> tuple[Tensor, Tensor]:
    """`key` and `value`, or those of no keys where `prompt` is in their place."""
    if prompt is None:
        if key is None or value is None:
            name = "key" if key is None else "value"
            raise TypeError(f"{name} is a NoneType: must be a tensor unless prompt is given")
        return key, value
    for name, tensor in (("key", key), ("value", value), ("key_bias", key_bias)):
        if tensor is not None:
            raise ValueError(f"{name} is a {type(tensor).__name__}: must be None beside prompt")
    query = as_query("query", query)
    none = query.new_empty(*query.shape[:2], 0, query.shape[3])
    return none, none


def as_query(name: str, tensor: Tensor) -> Tensor:
    """The tensor, if it has the form of queries."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}: must be a tensor")
    if tensor.dim() != 4:
        raise ValueError(f"{name} has shape {list(tensor.shape)}: must be [B, H, N, D]")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} has dtype {tensor.dtype}: must be floating point")
    return tensor


def problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    concepts: ConceptTokens | None,
    rule: Rule | str,
    scale: float | None,
    shared: Partial | None = None,
    prompt: Partial | None = None,
    slots: Slots | None = None,
) -> Problem:
    """The call with defaults filled in and autocast applied.

    Raises:
        ValueError, TypeError: as `negated_attention` says.
    """
    if isinstance(rule, str):
        rule = Rule.preset(rule)
    if not isinstance(rule, Rule):
        raise TypeError(f"rule is a {type(rule).__name__}: must be a Rule or the name of a preset")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        as_query(name, tensor)
    if key_bias is not None and not isinstance(key_bias, Tensor):
        raise TypeError(f"key_bias is a {type(key_bias).__name__}: must be a tensor or None")
    if concepts is not None and not isinstance(concepts, ConceptTokens):
        raise TypeError(f"concepts is a {type(concepts).__name__}: must be ConceptTokens or None")
    for name, partial in (("shared", shared), ("prompt", prompt)):
        if partial is not None and not isinstance(partial, Partial):
            raise TypeError(f"{name} is a {type(partial).__name__}: must be a Partial or None")
    device = query.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        # The rule of scaled_dot_product_attention: compute in the autocast dtype, but leave float64.
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        concepts = concepts.cast(dtype) if concepts is not None else None
        shared, prompt = _cast(shared, dtype), _cast(prompt, dtype)
        slots = None if slots is None else tuple(slot._replace(out=slot.out.to(dtype)) for slot in slots)
    if scale is None:
        scale = query.shape[3] ** -0.5 if query.shape[3] else 1.0
    else:
        check_number("scale", scale)
    if concepts is not None and concepts.entries == 0:
        _check_concepts(query, concepts)
        concepts = slots = None
    made = Problem(query, key, value, key_bias, concepts, rule, float(scale), shared, prompt, slots)
    check(made)
    return made


def _cast(partial: Partial | None, dtype: torch.dtype) -> Partial | None:
    return None if partial is None else partial._replace(out=partial.out.to(dtype))


def check(problem: Problem) -> None:
    """Raise a ValueError unless the tensors go together."""
    _check_prompt(problem.query, problem.key, problem.value, problem.key_bias)
    if problem.concepts is not None:
        _check_concepts(problem.query, problem.concepts)
    partials = problem.partials
    for name, partial in partials:
        _check_partial(name, partial, problem.query)
    if problem.slots:
        count = 0 if problem.concepts is None else problem.concepts.concepts
        if problem.prompt is None or len(problem.slots) != count:
            raise ValueError(
                f"{len(problem.slots)} slots: must go with a prompt, one for each of {count} concepts"
            )
    tokens = problem.concepts
    if problem.rule.center == "neutral" and tokens is not None and tokens.entries and tokens.neutral is None:
        how = (
            "combine takes none"
            if problem.slots is not None
            else "ConceptTokens.pack(..., neutral=) has them"
        )
        raise ValueError(f"center='neutral': concepts have no neutral tokens; {how}")
    if problem.rule.direction == "retrieve" and (problem.prompt is not None or problem.slots is not None):
        of = "prompt" if problem.slots is None else "concepts"
        raise ValueError(f"direction='retrieve' reads tokens, and {of} is a partial, which has none")
    if partials and torch.is_grad_enabled() and requires_grad(*problem.operands):
        for name, partial in partials:
            if not partial.lse.requires_grad:
                raise ValueError(
                    f"{name}.lse does not require grad, and other inputs do: gradients would be wrong in "
                    "silence; fastnegate.partial_attention makes a partial that has them"
                )


def _check_partial(name: str, partial: Partial, query: Tensor) -> None:
    shape = tuple(query.shape)
    lse_dtypes = (torch.float32, torch.float64) if query.dtype == torch.float64 else (torch.float32,)
    for part, tensor, wanted, dtypes in (
        ("out", partial.out, shape, (query.dtype,)),
        ("lse", partial.lse, shape[:3], lse_dtypes),
    ):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}.{part} is a {type(tensor).__name__}: must be a tensor")
        if tuple(tensor.shape) != wanted:
            raise ValueError(f"{name}.{part} has shape {list(tensor.shape)}: must be {list(wanted)}")
        if tensor.dtype not in dtypes:
            raise ValueError(f"{name}.{part} has dtype {tensor.dtype}: must be {dtypes[0]}")
        if tensor.device != query.device:
            raise ValueError(f"{name}.{part} is on {tensor.device}: must be on {query.device} as the query")
        if tensor.layout != torch.strided:
            raise ValueError(f"{name}.{part} has layout {tensor.layout}: must be torch.strided")
    if shape[3] > 1 and partial.out.stride(3) != 1 and partial.out.numel():
        raise ValueError(f"{name}.out has strides {list(partial.out.stride())}: the last must be 1")


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
        if tensor.layout != torch.strided:
            raise ValueError(f"{name} has layout {tensor.layout}: must be torch.strided")
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
        rows = tuple(query.shape[:1]) if tensor.dim() == 4 else ()
        if tensor.dim() not in (3, 4) or tensor.shape != (*rows, tensor.shape[-3], heads, dim):
            raise ValueError(
                f"concepts.{name} has shape {list(tensor.shape)}: must be [T, {heads}, {dim}], or "
                f"[{query.shape[0]}, T, {heads}, {dim}] where each row has its own"
            )
        if tensor.dim() != concepts.key.dim() or tensor.shape[-3] != concepts.tokens:
            raise ValueError(
                f"concepts.{name} has shape {list(tensor.shape)}: must have {concepts.tokens} tokens "
                "as concepts.key"
            )
        if dim > 1 and tensor.stride(-1) != 1 and tensor.numel():
            raise ValueError(f"concepts.{name} has strides {list(tensor.stride())}: last must be 1")
    shapes = {
        "numbers": (concepts.entries, COLUMNS),
        "token_bias": (concepts.tokens,),
        "token_weight": (concepts.tokens,),
        "direction": (concepts.concepts, heads, dim),
        "update": (concepts.concepts, heads, dim),
        "offset": (concepts.concepts,),
        "neutral": (concepts.batch,),
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
        dtype = torch.int32 if name in ("index", "neutral") else dtype
        if tensor.dtype != dtype:
            raise ValueError(f"concepts.{name} has dtype {tensor.dtype}: must be {dtype}")
