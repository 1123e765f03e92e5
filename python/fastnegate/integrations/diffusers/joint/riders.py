# SPDX-License-Identifier: Apache-2.0
"""Which concept tokens ride in which row, and where in the joint sequence everybody sits."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from ....engine.session.rows import Rows
from ....operator.tokens import ConceptTokens

STEP = 8  # the number of riders is rounded up to it: one more word then changes no size


class Layout(NamedTuple):
    """Lengths of the joint sequence of one denoiser call, in its order.

    Attributes:
        prompt: tokens of the prompt, with its padding.
        riders: concept tokens, a capacity: rows may have fewer.
        image: tokens of the image.
    """

    prompt: int
    riders: int
    image: int

    @property
    def spans(self) -> tuple[slice, slice, slice]:
        """Of prompt, riders and image."""
        text = self.prompt + self.riders
        return slice(0, self.prompt), slice(self.prompt, text), slice(text, text + self.image)


class Riders:
    """The concept tokens of the rows of one batch. Nobody changes it.

    Attributes:
        count: T, tokens a row has room for.
        pick: int64 [B, T], which token of the slots rides there; where none does, the number of tokens.
        bias: [B, 1, T, T], 0 between tokens of the same entry and -inf between others: riders see the image
            and their own entry, not the prompt and not each other.
        index, weight: of `ConceptTokens`, in which each entry is a concept of its own: the tokens of its row.
    """

    def __init__(self, rows: Rows, device: torch.device) -> None:
        slots, batch, entries = rows.slots.slots, len(rows.requests), rows.entries
        used = [0] * batch
        begins, lengths = [], []
        for entry in entries:
            begins.append(used[entry.row])
            lengths.append(slots[entry.slot].length)
            used[entry.row] += lengths[-1]
        self.rows, self.count = rows, -(-max(used, default=0) // STEP) * STEP
        nothing = len(rows.slots.embeddings)
        pick = torch.full((batch, self.count), nothing)
        owner = torch.full((batch, self.count), -1)
        weight = torch.ones(batch, self.count)
        for i, entry in enumerate(entries):
            span, slot = slice(begins[i], begins[i] + lengths[i]), slots[entry.slot]
            pick[entry.row, span] = torch.arange(slot.begin, slot.begin + slot.length)
            owner[entry.row, span] = i
            if rows.slots.weight is not None:
                weight[entry.row, span] = rows.slots.weight[slot.begin : slot.begin + slot.length]
        alike = (owner[:, :, None] == owner[:, None, :]) & (owner >= 0)[:, None, :]
        bias = torch.zeros(alike.shape).masked_fill(~alike, -torch.inf).unsqueeze(1)
        # Weights are per token, not per row: tokens of all rows lie behind each other then.
        self.flat = rows.slots.weight is not None
        if self.flat:
            begins = [begin + entry.row * self.count for begin, entry in zip(begins, entries)]
        index = [*range(len(entries)), *begins, *lengths, *rows.offsets]
        self.longest = max(lengths, default=0)
        self.busiest = max((b - a for a, b in itertools.pairwise(rows.offsets)), default=0)
        with torch.inference_mode(False):  # later calls may be outside of it
            self.pick, self.bias = pick.to(device), bias.to(device)
            self.index = torch.tensor(index, dtype=torch.int32, device=device)
            self.weight = weight.flatten().to(device) if self.flat else None
        self._numbers: dict[tuple[float, ...], Tensor] = {}

    def embeddings(self, context: Tensor) -> Tensor:
        """[B, T, C] of the slots' embeddings [1, all tokens, C]; zeros where nobody rides."""
        known = torch.cat([context[0], context.new_zeros(1, context.shape[2])])
        return known[self.pick]

    def numbers(self, active: tuple[float, ...]) -> Tensor:
        """`ConceptTokens.numbers` at this step."""
        made = self._numbers.get(active)
        if made is None:
            with torch.inference_mode(False):
                made = self.rows.numbers(active, len(self.rows.entries)).to(self.index.device)
            self._numbers[active] = made
        return made

    def tokens(self, key: Tensor, value: Tensor, numbers: Tensor) -> ConceptTokens:
        """Concepts of a layer, from the riders' keys and values [B, T, H, D]."""
        if self.flat:
            key, value = key.flatten(0, 1), value.flatten(0, 1)
        return ConceptTokens(
            key, value, self.index, numbers, len(numbers), len(numbers), self.longest, self.busiest,
            token_weight=self.weight,
        )  # fmt: skip
