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

    Of a call with `shared`: per entry `concept_share`, per row `text_share`, the mean softmax mass of
    the concept, and of the prompt, against the shared keys; else 0. There the heat of a rule with
    similarity `one`, whose gate says nothing, is the head mean of gate times share; and Z is the attention
    to shared keys and prompt.
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
    concept_share: Tensor
    text_share: Tensor


class Trace(NamedTuple):
    """What a GPU kernel writes for `Statistics`, float32 numbers of single queries.

    `entries` [4, E, H, N], cleared before: gate, similarity, mass, share against shared keys. `rows` [5, B,
    H, N]: |O - Z|^2, |Z|^2, whether the norm was limited, values of O that are not finite, the prompt's
    share against shared keys. Shares are there in calls with `shared`: [3, ...] and [4, ...] otherwise.
    """

    entries: Tensor
    rows: Tensor

    @classmethod
    def empty(cls, sizes: tuple[int, int, int, int], device: torch.device, shared: bool = False) -> Trace:
        """For E, B, H, N."""
        entries, batch, heads, queries = sizes
        made: dict[str, Any] = {"dtype": torch.float32, "device": device}
        return cls(
            torch.zeros(3 + shared, entries, heads, queries, **made),
            torch.zeros(4 + shared, batch, heads, queries, **made),
        )

    def tables(self, heat_of_shares: bool = False) -> Tables:
        """The sums. `heat_of_shares`: the heat is of gate times share."""
        gates, similarity, mass, *shares = self.entries
        count, _, queries = gates.shape
        if not self.rows.numel():
            return Tables.zeros(count, self.rows.shape[1], queries, gates.device)
        both = (1, 2)
        above = (gates > GATE_REPORT_LEVEL).float()
        none = gates.new_zeros(count), gates.new_zeros(self.rows.shape[1])
        per_entry = [gates.amax(both), *(x.mean(both, dtype=torch.float64) for x in (gates, above, mass))]
        per_entry += [similarity.amax(both), shares[0].mean(both, dtype=torch.float64) if shares else none[0]]
        moved, energy, limited, nonfinite, *text = self.rows.sum((2, 3), dtype=torch.float64)
        change = torch.where(energy < 1e-30, 0.0, moved / energy)
        size = self.rows[0, 0].numel()
        per_row = [change, limited / size, nonfinite, text[0] / size if text else none[1]]
        heat = gates * shares[0] if heat_of_shares else gates
        return Tables(
            torch.stack([t.float() for t in per_entry], 1),
            heat.mean(1, dtype=torch.float64).float(),
            torch.stack([t.float() for t in per_row], 1),
        )


class Tables(NamedTuple):
    """What backends fill: `Statistics` with its columns per entry [E, 6] and per row [B, 4] together."""

    entries: Tensor
    heat: Tensor
    rows: Tensor

    @classmethod
    def shapes(cls, entries: int, batch: int, queries: int) -> tuple[tuple[int, int], ...]:
        return (entries, 6), (entries, queries), (batch, 4)

    @classmethod
    def zeros(cls, entries: int, batch: int, queries: int, device: torch.device) -> Tables:
        made: dict[str, Any] = {"dtype": torch.float32, "device": device}
        return cls._make(torch.zeros(shape, **made) for shape in cls.shapes(entries, batch, queries))

    @property
    def named(self) -> Statistics:
        *per_entry, concept_share = self.entries.unbind(1)
        *per_row, text_share = self.rows.unbind(1)
        return Statistics._make([*per_entry, self.heat, *per_row, concept_share, text_share])
