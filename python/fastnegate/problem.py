# SPDX-License-Identifier: Apache-2.0
"""`Problem`: one call of the operator as a value. It is all that a backend sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .rule import Rule
from .tokens import ConceptTokens

GATE_REPORT_LEVEL = 0.5  # `Statistics.gate_fraction` counts gates above this


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
    def bias_per_query(self) -> bool:
        """Whether `key_bias` differs between queries ([.., N, M]) rather than [.., 1, M]."""
        return self.key_bias is not None and self.key_bias.shape[2] != 1


class Statistics(NamedTuple):
    """What the negation did, all float32.

    Per entry ([E], in the order of `ConceptTokens.index`): `gate_max`, `gate_mean` and
    `gate_fraction` (share of gates above 0.5) over queries (and heads, for scope `head`),
    `mass_mean` (mean softmax mass of the concept against the prompt), `similarity_max`; `heat`
    [E, N] is the head mean of the gate. An entry that does not exist has zeros.
    Per row ([B]): `removed_energy` = sum |O - Z|^2 / sum |Z|^2, `limited_fraction` (share of
    queries whose norm was limited), `nonfinite` (count of output values that are not finite).
    """

    gate_max: Tensor
    gate_mean: Tensor
    gate_fraction: Tensor
    mass_mean: Tensor
    similarity_max: Tensor
    heat: Tensor
    removed_energy: Tensor
    limited_fraction: Tensor
    nonfinite: Tensor


class Tables(NamedTuple):
    """What backends fill: `Statistics` with its columns per entry [E, 5] and per row [B, 3] together."""

    entries: Tensor
    heat: Tensor
    rows: Tensor

    @property
    def named(self) -> Statistics:
        return Statistics._make([*self.entries.unbind(1), self.heat, *self.rows.unbind(1)])
