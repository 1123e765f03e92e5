# SPDX-License-Identifier: Apache-2.0
"""`Problem`: one call of the operator as a value, and the `signature` that says which calls are alike."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

from torch import Tensor

from .rule import Rule
from .statistics import Statistics as Statistics
from .statistics import Tables as Tables
from .tokens import ConceptTokens


class Partial(NamedTuple):
    """Attention to some of the keys of a softmax, which other keys may join (docs/semantics.md, section 9).

    Attributes:
        out: [B, H, N, D], attention to these keys alone, in the dtype of the query; D contiguous.
        lse: [B, H, N], the natural logarithm of the sum of exp(scaled logits), float32 (float64 beside
            float64); -inf where there are no keys: `out` is ignored there, even NaN. NaN and +inf are no
            log-sum-exps, and show as NaN wherever they are read.
    """

    out: Tensor
    lse: Tensor


Slots = tuple[Partial, ...]


@dataclass(frozen=True, eq=False)
class Problem:
    """`negated_attention` with every default filled in; shapes as in its docstring. With `prompt` there
    are no keys (M = 0).

    `combine` is the same with a partial per concept, `slots`: then `concepts` says which rows have which,
    with which numbers, and has no tokens; `query` says shapes and dtype alone.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_bias: Tensor | None
    concepts: ConceptTokens | None
    rule: Rule
    scale: float
    shared: Partial | None = None
    prompt: Partial | None = None
    slots: Slots | None = None

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """B, H, N, M, D."""
        batch, heads, queries, dim = self.query.shape
        return batch, heads, queries, self.key.shape[2], dim

    @property
    def entries(self) -> int:
        """E."""
        return 0 if self.concepts is None else self.concepts.entries

    @property
    def bias_per_query(self) -> bool:
        """Whether `key_bias` differs between queries ([.., N, M]) rather than [.., 1, M]."""
        return self.key_bias is not None and self.key_bias.shape[2] != 1

    @property
    def operands(self) -> Operands:
        """What differs between calls of the same signature, in the order that `Plan.run` takes."""
        return (
            self.query, self.key, self.value, self.key_bias, self.concepts,
            self.shared, self.prompt, self.slots,
        )  # fmt: skip

    @property
    def partials(self) -> list[tuple[str, Partial]]:
        """Those that there are, by the names of arguments."""
        named = [("shared", self.shared), ("prompt", self.prompt)]
        named += [(f"concepts[{i}]", slot) for i, slot in enumerate(self.slots or ())]
        return [(name, partial) for name, partial in named if partial is not None]

    @property
    def signature(self) -> Hashable:
        """See the function."""
        return signature(*self.operands[:5], self.rule, self.scale, *self.operands[5:])


Operands = tuple[
    Tensor, Tensor, Tensor, Tensor | None, ConceptTokens | None, Partial | None, Partial | None, Slots | None
]


def signature(
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
) -> Hashable:
    """Equal for calls that one plan serves: shapes, strides, dtypes, devices and alignment of all tensors,
    what the rule computes, the scale. What tensors hold is no part of it.

    `rule` and `scale` may be as the caller wrote them. Raises a RuntimeError for tensors without strides or
    memory.
    """
    return (
        query.shape, query.stride(), query.dtype, query.device, query.data_ptr() % 16,
        key.shape, key.stride(), key.dtype, key.device, key.data_ptr() % 16,
        value.shape, value.stride(), value.dtype, value.device, value.data_ptr() % 16,
        None if key_bias is None else (
            key_bias.shape, key_bias.stride(), key_bias.dtype, key_bias.device, key_bias.data_ptr() % 16
        ),
        None if concepts is None else located(concepts).layout,
        rule if isinstance(rule, str) else rule.flat,
        scale,
        None if shared is None else (*_described(shared.out), *_described(shared.lse)),
        None if prompt is None else (*_described(prompt.out), *_described(prompt.lse)),
        slots if slots is None else tuple((*_described(s.out), *_described(s.lse)) for s in slots),
    )  # fmt: skip


def _described(tensor: Tensor) -> tuple[Hashable, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr() % 16


class Located(NamedTuple):
    """What a call needs to know of `ConceptTokens`, found once for each: see `located`."""

    present: tuple[Tensor, ...]  # the tensors that there are
    found_at: tuple[int, ...]  # the addresses of these
    addresses: tuple[int, ...]  # of those in `ConceptTokens.tensors`, 0 for None
    plain: bool  # torch's own tensors, whose memory holds their values: others have no plan
    layout: int  # equal for concepts that no plan tells apart


_data_ptr = Tensor.data_ptr
_layouts: dict[Hashable, int] = {}
_numbering, _adding = count(), threading.Lock()
_MOST_LAYOUTS = 4096  # one that is forgotten gets another number, and its plans are made again


def located(tokens: ConceptTokens) -> Located:
    """Layout and addresses of concepts, found at the first call and again when memory has moved."""
    known: Located | None = tokens.__dict__.get("found")
    if known is None or tuple(map(_data_ptr, known.present)) != known.found_at:
        known = tokens.__dict__["found"] = _locate(tokens)
    return known


def _locate(tokens: ConceptTokens) -> Located:
    tensors = (*tokens.tensors, tokens.neutral)
    present = tuple(t for t in tensors if t is not None)
    addresses = tuple(0 if t is None else t.data_ptr() for t in tokens.tensors)
    of_tensors = tuple(None if t is None else _described(t) for t in tensors)
    plain = all(type(t) is Tensor and not t.is_neg() for t in present)
    described = plain, of_tensors, tokens.capacities
    with _adding:
        layout = _layouts.get(described)
        if layout is None:
            if len(_layouts) >= _MOST_LAYOUTS:
                del _layouts[next(iter(_layouts))]
            layout = _layouts[described] = next(_numbering)
    return Located(present, tuple(map(_data_ptr, present)), addresses, plain, layout)
