# SPDX-License-Identifier: Apache-2.0
"""What a call did: `Statistics` for people, the `Tables` that backends fill, the `Trace` of a GPU kernel."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

GATE_REPORT_LEVEL = 0.5  # `Statistics.gate_fraction` counts gates above this


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


class Trace(NamedTuple):
    """What a GPU kernel writes for `Statistics`, float32 numbers of single queries.

    `entries` [3, E, H, N], cleared before: gate, similarity, mass. `rows` [4, B, H, N]: |O - Z|^2, |Z|^2,
    whether the norm was limited, values of O that are not finite.
    """

    entries: Tensor
    rows: Tensor

    @classmethod
    def empty(cls, sizes: tuple[int, int, int, int], device: torch.device) -> Trace:
        """For E, B, H, N."""
        entries, batch, heads, queries = sizes
        made: dict[str, Any] = {"dtype": torch.float32, "device": device}
        return cls(
            torch.zeros(3, entries, heads, queries, **made), torch.zeros(4, batch, heads, queries, **made)
        )

    def tables(self) -> Tables:
        gates, similarity, mass = self.entries
        if not self.rows.numel():
            count, _, queries = gates.shape
            shapes = ((count, 5), (count, queries), (self.rows.shape[1], 3))
            return Tables._make(gates.new_zeros(shape) for shape in shapes)
        both = (1, 2)
        above = (gates > GATE_REPORT_LEVEL).float()
        per_entry = [gates.amax(both), *(x.mean(both, dtype=torch.float64) for x in (gates, above, mass))]
        per_entry.append(similarity.amax(both))
        moved, energy, limited, nonfinite = self.rows.sum((2, 3), dtype=torch.float64)
        share = torch.where(energy < 1e-30, 0.0, moved / energy)
        per_row = [share, limited / self.rows[0, 0].numel(), nonfinite]
        return Tables(
            torch.stack([t.float() for t in per_entry], 1),
            gates.mean(1, dtype=torch.float64).float(),
            torch.stack([t.float() for t in per_row], 1),
        )


class Tables(NamedTuple):
    """What backends fill: `Statistics` with its columns per entry [E, 5] and per row [B, 3] together."""

    entries: Tensor
    heat: Tensor
    rows: Tensor

    @property
    def named(self) -> Statistics:
        return Statistics._make([*self.entries.unbind(1), self.heat, *self.rows.unbind(1)])
