# SPDX-License-Identifier: Apache-2.0
"""`negated_attention`: the public operator, and `combine`, the same where all attention is done already.

A call like an earlier one is a look-up and the run of its plan. Any other is checked and planned first. One
that torch has to see, because it traces or transforms what is called, goes through the registered operator.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from . import checks, choice, reference, registration
from .backends import load
from .choice import backends as backends
from .choice import check_backend as check_backend
from .choice import explain as explain
from .plan import plans
from .problem import Partial, Slots, located, signature
from .rule import Rule
from .statistics import Statistics, Tables
from .tokens import COLUMNS, NUMBERS, ConceptTokens, check_entry_number


def negated_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    concepts: ConceptTokens | None = None,
    rule: Rule | str = "protore",
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    shared: Partial | None = None,
    prompt: Partial | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cross-attention that measures negative concepts and suppresses them before the output.

    `O = a Z + sum_e b_e X_e`: Z is the attention to the prompt, X_e a feature of concept e (for most
    rules the attention to its tokens), a and b_e are scalars per query that the rule derives from
    log-sum-exps, inner products and norms.

    Args:
        query: [B, H, N, D], float32, bfloat16, float16 (float64: reference only). Any strides
            with D contiguous; the same for `key` and `value`.
        key, value: [B, H, M, D] of the prompt, dtype and device of the query; None with `prompt`.
        concepts: what each batch row negates, or None for plain attention.
        rule: a `Rule` or the name of a preset.
        scale: softmax scale; default D ** -0.5.
        key_bias: added to the prompt's logits, [B or 1, H or 1, 1 or N, M], floating point; -inf
            masks a key (even NaN in a key masked for all queries does not reach the output).
        shared: attention of the same queries, with the same scale, to keys that belong to the prompt and to
            every concept alike, as the image in joint attention (docs/semantics.md, section 9);
            `partial_attention` makes it. `Rule.shared` says which segments hold it.
        prompt: the attention to the prompt, in place of `key`, `value` and `key_bias`.
        backend: `auto`, `reference`, `cpu`, `cuda` or `triton`. A named backend never falls back.

    Returns:
        [B, H, N, D] in the dtype of the query, a view of [B, N, H, D] memory. A row without an
        existing entry is the backend's plain attention, bit for bit.

    Raises:
        ValueError: shapes, dtypes, devices, strides or numbers that the operator does not define; a
            partial without gradient beside inputs that require it.
        TypeError: an argument of the wrong type.
        BackendError: the named backend cannot run this call; the message says why.
    """
    if prompt is not None or key is None or value is None:
        key, value = checks.keys(query, key, value, key_bias, prompt)
    return _call(query, key, value, key_bias, concepts, rule, scale, shared, prompt, None, backend, False)[0]


def negated_attention_with_statistics(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    concepts: ConceptTokens | None = None,
    rule: Rule | str = "protore",
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    shared: Partial | None = None,
    prompt: Partial | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Statistics]:
    """`negated_attention` and what it did; arguments, first result and errors as there."""
    if prompt is not None or key is None or value is None:
        key, value = checks.keys(query, key, value, key_bias, prompt)
    output, tables = _call(
        query, key, value, key_bias, concepts, rule, scale, shared, prompt, None, backend, True
    )
    assert tables is not None
    return output, tables.named


def combine(
    shared: Partial | None,
    prompt: Partial,
    concepts: Sequence[Partial],
    rule: Rule | str = "nag",
    numbers: Mapping[str, float | Tensor] | None = None,
    *,
    direction: Tensor | None = None,
    update: Tensor | None = None,
    offset: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """What `negated_attention` does after the attention, where all of that is done already: by kernels for
    long concepts, by a ring of devices, by quantised or sparse attention.

    Args:
        shared: as in `negated_attention`, or None.
        prompt: attention to the prompt, [B, H, N, D].
        concepts: attention to each concept, one partial per slot; lse -inf for queries of rows that do not
            negate it. May be empty for a rule that reads no tokens (`casteer`).
        rule: a `Rule` or the name of a preset; not one with direction `retrieve`.
        numbers: strength, logit_bias, threshold, width, cap and active where the rule's own do not hold:
            each a number, or a float32 tensor that broadcasts to [B, slots]; what it holds is not checked,
            and NaN in it means the rule's.
        direction, update: float32 [slots, H, D]; offset: float32 [slots]: as in `ConceptTokens`.
        backend: as in `negated_attention`.

    Returns:
        [B, H, N, D] in the dtype of the prompt, a view of [B, N, H, D] memory. A query without a concept gets
        the merge of `shared` and `prompt`, bit for bit.

    Raises:
        ValueError, TypeError, BackendError: as `negated_attention`.
    """
    if not isinstance(prompt, Partial):
        raise TypeError(f"prompt is a {type(prompt).__name__}: must be a Partial")
    slots = tuple(concepts)
    for i, slot in enumerate(slots):
        if not isinstance(slot, Partial):
            raise TypeError(f"concepts[{i}] is a {type(slot).__name__}: must be a Partial")
    query = checks.as_query("prompt.out", prompt.out)
    rule = Rule.preset(rule) if isinstance(rule, str) else rule
    needs = isinstance(rule, Rule) and rule.reads.direction
    if direction is None and (needs or update is not None or offset is not None):
        raise ValueError(
            "direction is None: must be given for a rule that reads it, and beside update or offset"
        )
    tokens = _table(query, slots, numbers or {}, direction, update, offset)
    if not slots and tokens.concepts and isinstance(rule, Rule) and rule.reads.tokens:
        raise ValueError("concepts is empty: must have a partial per slot for a rule that reads tokens")
    keys = query.new_empty(*query.shape[:2], 0, query.shape[3])
    return _call(query, keys, keys, None, tokens, rule, None, shared, prompt, slots, backend, False)[0]


def _call(
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
    statistics: bool,
) -> tuple[Tensor, Tables | None]:
    """The output, and statistics if they are wanted."""
    call: Hashable = None
    if checks.direct(query, key, value, key_bias, concepts, rule, scale, shared, prompt, slots, backend):
        described = signature(query, key, value, key_bias, concepts, rule, scale, shared, prompt, slots)
        call = backend, statistics, described
        plan = plans.get(call)
        if plan is not None:
            return plan.run(query, key, value, key_bias, concepts, shared, prompt, slots)
    problem = checks.problem(query, key, value, key_bias, concepts, rule, scale, shared, prompt, slots)
    chosen = choice.choose(problem, backend)
    learns = torch.is_grad_enabled() and checks.requires_grad(*problem.operands)
    # Gradients flow through the reference, not through the operator; compilers see the operator alone.
    if chosen == "reference" and not query.is_meta and (learns or not torch.compiler.is_compiling()):
        return reference.plan(problem, statistics).run(*problem.operands)
    if call is None or not (concepts is None or located(concepts).plain):
        return registration.run(problem, chosen, statistics)
    plan = load(chosen).plan(problem, statistics)
    plans.add(call, plan)
    return plan.run(*problem.operands)


def _table(
    query: Tensor,
    slots: Slots,
    numbers: Mapping[str, float | Tensor],
    direction: Tensor | None,
    update: Tensor | None,
    offset: Tensor | None,
) -> ConceptTokens:
    """Every row negates every slot; a partial says for which queries."""
    sizes = query.shape[0], len(slots) if slots or direction is None else len(direction)
    for name, given in numbers.items():
        _check_numbers(name, given, sizes, query.device)
    plain = direction is update is offset is None and not any(isinstance(n, Tensor) for n in numbers.values())
    if plain and not _traced():
        batch, heads, _, dim = query.shape
        return _kept_table(len(slots), batch, heads, dim, query.dtype, query.device, tuple(numbers.items()))
    return _made_table(query, slots, numbers, direction, update, offset)


def _check_numbers(name: str, given: float | Tensor, sizes: tuple[int, int], device: torch.device) -> None:
    if name not in NUMBERS:
        raise TypeError(f"numbers has {name!r}: allowed are {', '.join(NUMBERS)}")
    where = f"numbers[{name!r}]"
    if not isinstance(given, Tensor):
        return check_entry_number(where, name, given)
    if given.dtype != torch.float32 or given.device != device:
        raise ValueError(f"{where} is {given.dtype} on {given.device}: must be torch.float32 on {device}")
    if given.dim() > 2 or any(n not in (1, m) for n, m in zip(given.shape[::-1], sizes[::-1])):
        raise ValueError(f"{where} has shape {list(given.shape)}: must broadcast to {list(sizes)}")


def _traced() -> bool:
    """Whether tensors made here belong to somebody who traces, transforms, records or captures."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
    )


@functools.lru_cache(maxsize=64)
def _kept_table(
    count: int,
    batch: int,
    heads: int,
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
    numbers: tuple[tuple[str, float | Tensor], ...],
) -> ConceptTokens:
    """The same for all calls of one kind: nobody writes to it."""
    with torch.inference_mode(False):
        query = torch.empty(batch, heads, 0, dim, dtype=dtype, device=device)
        slots = (Partial(query, query),) * count
        return _made_table(query, slots, dict(numbers), None, None, None)


def _made_table(
    query: Tensor,
    slots: Slots,
    numbers: Mapping[str, float | Tensor],
    direction: Tensor | None,
    update: Tensor | None,
    offset: Tensor | None,
) -> ConceptTokens:
    batch, count = query.shape[0], len(slots) if slots or direction is None else len(direction)
    table = torch.full((batch, count, COLUMNS), torch.nan, dtype=torch.float32, device=query.device)
    for name, given in numbers.items():
        table = _with_column(table, NUMBERS.index(name), given)
    none = query.new_empty(0, query.shape[1], query.shape[3])
    index = (_every_slot if _traced() else _kept_slots)(batch, count, query.device)
    return ConceptTokens(
        none, none, index, table.flatten(0, 1), batch * count, count, 0, count,
        direction=direction, update=update, offset=offset,
    )  # fmt: skip


def _with_column(table: Tensor, column: int, given: float | Tensor) -> Tensor:
    """`given` may require grad, so nothing is written in place where it does."""
    if not (isinstance(given, Tensor) and given.requires_grad):
        table[:, :, column] = given
        return table
    columns = [*table.unbind(2)]
    columns[column] = given.expand(columns[column].shape)
    return torch.stack(columns, 2)


def _every_slot(batch: int, count: int, device: torch.device) -> Tensor:
    """`ConceptTokens.index`: row b has the entries b * count to (b + 1) * count, each of another concept."""
    index = [*range(count)] * batch + [0] * (2 * count) + [b * count for b in range(batch + 1)]
    return torch.tensor(index, dtype=torch.int32, device=device)


_kept_slots = functools.lru_cache(maxsize=64)(_every_slot)
