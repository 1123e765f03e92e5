# SPDX-License-Identifier: Apache-2.0
"""`Problem`: one call of the operator as a value, and the `signature` that says which calls are alike."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor

from .rule import Rule
from .statistics import Statistics as Statistics
from .statistics import Tables as Tables
from .tokens import ConceptTokens


@dataclass(frozen=True, eq=False)
class Problem:
    """`negated_attention` with every default filled in; shapes as in its docstring."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_bias: Tensor | None
    concepts: ConceptTokens | None
    rule: Rule
    scale: float

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
        return self.query, self.key, self.value, self.key_bias, self.concepts

    @property
    def signature(self) -> Hashable:
        """See the function."""
        return signature(*self.operands, self.rule, self.scale)


Operands = tuple[Tensor, Tensor, Tensor, Tensor | None, ConceptTokens | None]


def signature(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    concepts: ConceptTokens | None,
    rule: Rule | str,
    scale: float | None,
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
        None if concepts is None else concepts.located().layout,
        rule if isinstance(rule, str) else rule.flat,
        scale,
    )  # fmt: skip
