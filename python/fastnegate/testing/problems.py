# SPDX-License-Identifier: Apache-2.0
"""Problems that are hard to get right, in every layout of memory, and how to bring one to a device.

Notation as in docs/semantics.md: Z is the attention to the prompt, F to a concept, u' what `fixed` adds.
"""

from __future__ import annotations

import collections
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..operator import reference
from ..operator.problem import Partial, Problem
from ..operator.rule import Rule
from ..operator.tokens import ConceptTokens
from .judge import MANY_ROWS

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Holder = TypeVar("Holder", bound="DataclassInstance")

NEUTRAL_TOKENS = 4
LAYOUTS = ("contiguous", "bnhd", "broadcast", "odd")
MASKS = ("none", "padding", "additive", "per_query", "per_head_and_query")
PARTIALS = ("shared", "prompt", "both", "combine")
ROWS = ("none", "same", "mixed", "zero_tokens", "inactive")


def make_problem(
    batch: int = 3,
    heads: int = 2,
    queries: int = 37,
    keys: int = 21,
    dim: int = 40,
    dtype: torch.dtype = torch.float32,
    *,
    rule: Rule | str = "protore",
    rows: str | Sequence[Sequence[int | Mapping[str, Any]]] = "mixed",
    concept_lengths: Sequence[int] = (8, 3, 12),
    layout: str = "contiguous",
    mask: str = "none",
    extras: bool = True,
    sharpness: float | None = None,
    seed: int = 0,
) -> Problem:
    """A problem in which each query looks at a part of the prompt that resembles one concept.

    Query i and prompt token j belong to group i or j mod C + 1, the last group to no concept. The
    values of group c are built on the vector of concept c and point away from the others, so gates
    are open for some queries, partly open for more, and closed for the rest. A ground common to the
    prompt keeps Z from cancelling, where no arithmetic is exact relative to it. For a rule that centres
    there is one concept more, of this ground, which is the neutral one of all rows.

    Args:
        rows: what each batch row negates, or one of ROWS.
        layout: one of LAYOUTS, the memory of the tensors.
        mask: one of MASKS, the form of `key_bias`.
        sharpness: size of the logits; by default smaller where the budget is a few float32 roundings
            (see `Judge`), which no arithmetic keeps for large logits.
        extras: whether concepts carry token biases (one of them -inf), weights, u' and an offset.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    rule = Rule.preset(rule) if isinstance(rule, str) else rule
    if rows == "zero_tokens":
        concept_lengths = (concept_lengths[0], 0, *concept_lengths[2:])
    count = len(concept_lengths)
    places = normal(count + 1, heads, dim)
    looks = torch.nn.functional.normalize(normal(count + 1, heads, dim), dim=-1)

    def keys_of(group: Tensor) -> Tensor:  # [tokens, H, D]
        return places[group] + normal(len(group), heads, dim)

    def values_of(group: Tensor, purity: Tensor, ground: float) -> Tensor:
        others = looks[:count].sum(0) - looks[group] * (group < count)[:, None, None]
        noise = normal(len(group), heads, dim) * (0.4 * dim**-0.5)
        look = purity[:, None, None] * looks[group] - 0.3 * others + ground * looks[count]
        made: Tensor = 4 * (look + noise)
        return made

    def batched(make: Callable[[], Tensor]) -> Tensor:  # -> [B, H, tokens, D]
        shared = 1 if layout == "broadcast" else batch
        made = [make().transpose(0, 1) for _ in range(shared)]
        return torch.stack(made) if made else torch.empty(0, heads, len(token_groups), dim)

    token_groups = torch.arange(keys) % (count + 1)
    query_groups = torch.arange(queries) % (count + 1)
    if sharpness is None:
        constant = dtype == torch.float32 and batch * heads * queries < MANY_ROWS
        sharpness = 0.5 if constant else 1.5
    pointed = 3 * dim**-0.5 * places[query_groups].transpose(0, 1)
    query = sharpness * (normal(batch, heads, queries, dim) + pointed)
    key = batched(lambda: keys_of(token_groups))
    value = batched(lambda: values_of(token_groups, 0.5 + 0.5 * uniform(keys), 0.6))
    groups = [torch.full((n,), c) for c, n in enumerate(concept_lengths)]
    neutral = count if rule.center == "neutral" else None
    if neutral is not None:
        groups.append(torch.full((NEUTRAL_TOKENS,), neutral))
    concepts_made = len(groups)
    direction = looks[:concepts_made] * heads**-0.5 if heads else looks[:concepts_made]  # unit norm over H, D
    tokens = sum(map(len, groups))
    bias = 0.5 * normal(tokens)
    bias[1:2] = -torch.inf  # never the only token of a concept in these tests
    optional = {
        "token_bias": bias,
        "token_weight": (uniform(tokens) > 0.2) * (0.5 + uniform(tokens)),
        "update": direction + 0.1 * dim**-0.5 * normal(concepts_made, heads, dim),
        "offset": 0.2 + 0.05 * uniform(concepts_made),
    }
    concepts = ConceptTokens.pack(
        [keys_of(g).to(dtype) for g in groups],
        [values_of(g, 0.6 + 0.2 * uniform(len(g)), 0.0).to(dtype) for g in groups],
        _rows(rows, batch, count) if isinstance(rows, str) else rows,
        direction=direction,
        neutral=neutral,
        **(optional if extras else {}),
    )
    query, key, value = (
        _lay_out(t.to(dtype), layout, batch, name == "query")
        for name, t in (("query", query), ("key", key), ("value", value))
    )
    if layout == "odd":
        concepts = replace(concepts, key=_odd(concepts.key), value=_odd(concepts.value))
    key_bias = _key_bias(mask, batch, heads, queries, keys, uniform)
    return Problem(query, key, value, key_bias, concepts, rule, dim**-0.5 if dim else 1.0)


def with_partials(problem: Problem, which: str, *, image: int = 30, seed: int = 0) -> Problem:
    """The problem with attention that is done already, as docs/semantics.md, section 9, has it.

    Args:
        problem: of `make_problem`.
        which: one of PARTIALS: `shared` keys, the `prompt` as a partial, `both`, or `combine`, where every
            segment is one.
        image: number of shared keys.

    Partials are float64 attention, rounded to storage. Some queries have no keys in one of them; what it
    holds there is NaN.
    """
    batch, heads, queries, _, dim = problem.sizes
    generator = torch.Generator().manual_seed(seed)
    dtype, tokens, query = problem.query.dtype, problem.concepts, problem.query.double()

    def partial(key: Tensor, value: Tensor, bias: Tensor | None, empty: int) -> Partial:
        """Without keys where the row and the query are `empty` modulo 3 and 5."""
        done = reference.partial(query, key.double(), value.double(), bias, problem.scale)
        row, column = torch.arange(batch) % 3 == empty, torch.arange(queries) % 5 == empty
        away = (row[:, None] & column)[:, None]
        lse = done.lse.float().masked_fill(away, -torch.inf)
        return Partial(done.out.to(dtype).masked_fill(lse.isneginf()[..., None], torch.nan), lse)

    def normal() -> Tensor:
        return 1.5 * torch.randn(batch, heads, image, dim, generator=generator, dtype=torch.float64)

    if which in ("shared", "both", "combine"):
        problem = replace(problem, shared=partial(normal(), normal(), None, 0))
    if which in ("prompt", "both", "combine"):
        prompt = partial(problem.key, problem.value, problem.key_bias, 1)
        none = problem.query[:, :, :0]
        problem = replace(problem, key=none, value=none, key_bias=None, prompt=prompt)
    if which == "combine" and tokens is not None:
        index, entries, slots = tokens.index.tolist(), tokens.entries, []
        for c in range(tokens.concepts):
            begin, length = index[entries + c], index[entries + tokens.concepts + c]
            span = slice(begin, begin + length)
            key, value = (
                t[span].double().transpose(0, 1).expand(batch, -1, -1, -1) for t in (tokens.key, tokens.value)
            )
            if tokens.token_weight is not None:
                value = value * tokens.token_weight[span, None].double()
            bias = None if tokens.token_bias is None else tokens.token_bias[None, None, None, span]
            slots.append(partial(key, value, bias, 2 - c % 3))
        none = tokens.key[:0]
        tokens = replace(tokens, key=none, value=none, token_bias=None, token_weight=None, longest=0)
        problem = replace(problem, slots=tuple(slots), concepts=tokens)
    return problem


def _rows(kind: str, batch: int, count: int) -> list[list[Any]]:
    """Per batch row what it negates; concepts are named at most once, so that gates do not tie."""
    last = count - 1
    full = {"strength": 1.25, "logit_bias": 0.2, "threshold": 0.1, "width": 0.75, "cap": 0.95, "active": 0.8}
    numbers: list[Any] = [{"concept": 0, **full}, {"concept": last, "strength": 0.5}]
    kinds: dict[str, list[list[Any]]] = {
        "none": [[]],
        "same": [list(range(count))],
        "mixed": [numbers, [], [last], list(range(count))],
        "zero_tokens": [[min(1, last)], [0, min(1, last)]],
        "inactive": [[{"concept": 0, "active": 0.0}], [{"concept": 0, "active": 0.0}, last]],
    }
    rows = kinds[kind]
    return [rows[b % len(rows)] for b in range(batch)]


def _lay_out(t: Tensor, layout: str, batch: int, is_query: bool) -> Tensor:
    if layout == "bnhd":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "broadcast" and not is_query:
        return t.expand(batch, *t.shape[1:]) if batch else t[:0]
    return _odd(t) if layout == "odd" else t


def _odd(t: Tensor) -> Tensor:
    """The same values, unaligned, with a gap after every last dimension."""
    gap = t.new_full((*t.shape[:-1], t.shape[-1] + 3), torch.nan)[..., 1:-2]
    return gap.copy_(t)


def _key_bias(
    mask: str, batch: int, heads: int, queries: int, keys: int, uniform: Callable[..., Tensor]
) -> Tensor | None:
    if mask == "none":
        return None
    if mask == "padding":  # one row keeps nothing
        kept = torch.arange(batch) * max(keys // 2, 1) % (keys + 1)
        return torch.where(torch.arange(keys) < kept[:, None], 0.0, -torch.inf)[:, None, None]
    if mask == "additive":
        away = (uniform(1, heads, 1, keys) < 0.3) & (torch.arange(keys) > 0)
        return torch.where(away, -10000.0, uniform(1, heads, 1, keys))
    shape = (batch, 1, queries, keys) if mask == "per_query" else (1, heads, queries, keys)
    return torch.where(uniform(*shape) < 0.2, -torch.inf, uniform(*shape))


def pairwise(factors: Mapping[str, Sequence[Any]], repeats: int = 1) -> Iterator[dict[str, Any]]:
    """Cases in which every pair of values of two factors meets at least `repeats` times.

    Greedy: each case takes the best of a few random ones that hold a pair still to be covered.
    """
    rng = random.Random(0)
    names = list(factors)
    missing = collections.Counter(
        {
            ((a, i), (b, j)): repeats
            for a, b in itertools.combinations(names, 2)
            for i in range(len(factors[a]))
            for j in range(len(factors[b]))
        }
    )
    while missing:
        must = max(missing, key=missing.__getitem__)
        candidates: list[tuple[int, int, dict[str, int], list[Any]]] = []
        for _ in range(30):
            case = {name: rng.randrange(len(factors[name])) for name in names} | dict(must)
            pairs = list(itertools.combinations(case.items(), 2))
            candidates.append((sum(pair in missing for pair in pairs), len(candidates), case, pairs))
        *_, case, pairs = max(candidates)
        missing.subtract(pair for pair in pairs if pair in missing)
        missing = +missing
        yield {name: factors[name][i] for name, i in case.items()}


def moved(holder: Holder, device: str) -> Holder:
    """A problem, or another dataclass, with every tensor in it, those of its concepts too, on a device; each
    lies in memory as it did: the same strides, offset, gaps and alignment."""
    changes: dict[str, Any] = {}
    for field in fields(holder):
        item = getattr(holder, field.name)
        if isinstance(item, Tensor):
            changes[field.name] = _moved(item, device)
        elif isinstance(item, ConceptTokens):
            changes[field.name] = moved(item, device)
        elif isinstance(item, Partial):
            changes[field.name] = Partial(*(_moved(tensor, device) for tensor in item))
        elif field.name == "slots" and item is not None:
            changes[field.name] = tuple(Partial(*(_moved(t, device) for t in slot)) for slot in item)
    return replace(holder, **changes)


def _moved(tensor: Tensor, device: str) -> Tensor:
    """`to(device)` makes a tensor dense. Here all of its memory is copied, what lies in gaps as well, so that
    strides, where it begins and so what its rows are aligned to stay."""
    memory = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    copied = memory.to(device, copy=True).untyped_storage()
    there = torch.empty(0, dtype=tensor.dtype, device=device)
    return there.set_(copied, tensor.storage_offset(), tensor.shape, tensor.stride())
