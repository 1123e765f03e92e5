# SPDX-License-Identifier: Apache-2.0
"""Which concept tokens ride in which row, and where in the joint sequence everybody sits."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....engine.errors import NegationNotAppliedError
from ....engine.session.rows import Rows
from ....operator.tokens import ConceptTokens

STEP = 8  # the number of riders is rounded up to it: one more word then changes no size


class Parts(NamedTuple):
    """Where in the joint sequence they are: `seen` is what prompt and concepts alike attend to, the image and
    what comes with it."""

    prompt: slice
    riders: slice
    image: slice
    beside: slice
    seen: slice


class Layout(NamedTuple):
    """Lengths of the joint sequence of one denoiser call.

    Attributes:
        prompt: tokens of the prompt, with its padding.
        riders: concept tokens, a capacity: rows may have fewer.
        image: tokens of the image that is made.
        beside: tokens behind the image that are attended to as it is, and not guided: padding, or pictures to
            go by.
        image_first: whether the image comes before the text.
    """

    prompt: int
    riders: int
    image: int
    beside: int = 0
    image_first: bool = False

    @property
    def total(self) -> int:
        return self.prompt + self.riders + self.image + self.beside

    @property
    def parts(self) -> Parts:
        seen, text = self.image + self.beside, self.prompt + self.riders
        at, first = (0, seen) if self.image_first else (text, 0)  # of the image, and of the prompt
        told, end = first + self.prompt, at + self.image
        return Parts(
            slice(first, told),
            slice(told, first + text),
            slice(at, end),
            slice(end, at + seen),
            slice(at, at + seen),
        )


class Riders:
    """The concept tokens of the rows of one batch. Nobody changes it.

    The entries of a row sit in *lanes* behind each other, the longest first, and so do its neutral tokens,
    where the rule centres. A column of a lane is the same place of a text in every row, since models give one
    position to a column.

    Args:
        rows: who negates what.
        most: T, or the most that T may be.
        fixed: have T and the number of entries depend on no policy: code is compiled for them.

    Attributes:
        count: T, tokens a row has room for.
        pick: int64 [B, T], which token of the slots rides there; where none does, the number of tokens.
        place: int64 [T], where in its own text a rider of each column stands.
        reach: more than any of these.
        ends: int64 [B, T], where the tokens of that rider's entry end in their text; 0 where nobody rides.
        bias: [B, 1, T, T], 0 between tokens of the same entry, and -inf between others: riders see the image
            and their own entry, not the prompt and not each other. What rides for nobody sees its like.
        alone: whether no row has more than one of these, and each takes the first `longest` columns: they are
            what riders see then, and nothing need be masked.
        spans: of each entry, and of neutral tokens, its row and its columns.
        index, weight, neutral: of `ConceptTokens`, in which each entry is a concept of its own: the tokens of
            its row; so are the neutral tokens of each row, behind the entries.

    Raises:
        NegationNotAppliedError: a row has more than `most`.
    """

    def __init__(
        self, rows: Rows, device: torch.device, most: int | None = None, fixed: bool = False
    ) -> None:
        slots, batch = rows.slots.slots, len(rows.requests)
        of = [slots[entry.slot] for entry in rows.entries]  # each entry's
        row_of = [entry.row for entry in rows.entries]
        riding = [[*range(a, b)] for a, b in itertools.pairwise(rows.offsets)]
        nothing_said = None if rows.slots.neutral is None else slots[rows.slots.neutral]
        neutral = torch.full((batch,), -1, dtype=torch.int32)
        for row, mates in enumerate(riding):
            if nothing_said is not None and mates:
                neutral[row] = len(of)
                mates.append(len(of))
                of.append(nothing_said)
                row_of.append(row)
        begins, firsts = [0] * len(of), [0] * len(of)
        place: list[int] = []
        longest_first = [sorted(mates, key=lambda i: -of[i].length) for mates in riding]
        for lane in itertools.zip_longest(*longest_first):
            taken = [i for i in lane if i is not None]
            known = [first for i in taken if (first := of[i].first) is not None]
            base, at = min(known, default=0), len(place)
            for i in taken:
                first = of[i].first
                firsts[i] = base if first is None else first
                begins[i] = at + firsts[i] - base
            place += range(base, max(firsts[i] + of[i].length for i in taken))
        if most is not None and len(place) > most:
            raise NegationNotAppliedError(
                f"the concepts of a row take {len(place)} tokens: the engine was installed with "
                f"max_tokens={most}"
            )
        wanted = most if fixed and most is not None else len(place)
        self.rows, self.count, self.fixed = rows, -(-wanted // STEP) * STEP, fixed
        nothing = len(rows.slots.embeddings)
        pick = torch.full((batch, self.count), nothing)
        owner, ends = torch.full_like(pick, -1), torch.zeros_like(pick)
        weight = torch.ones(batch, self.count)
        self.spans: list[tuple[int, slice]] = []
        for i, (row, slot, begin, first) in enumerate(zip(row_of, of, begins, firsts)):
            span, tokens = slice(begin, begin + slot.length), slice(slot.begin, slot.begin + slot.length)
            self.spans.append((row, span))
            pick[row, span] = torch.arange(tokens.start, tokens.stop)
            owner[row, span] = i
            ends[row, span] = first + slot.length
            if rows.slots.weight is not None:
                weight[row, span] = rows.slots.weight[tokens]
        alike = owner[:, :, None] == owner[:, None, :]
        bias = torch.zeros(alike.shape).masked_fill(~alike, -torch.inf).unsqueeze(1)
        self.longest = self.count if fixed else max((slot.length for slot in of), default=0)
        self.busiest = (
            len(slots) if fixed else max((b - a for a, b in itertools.pairwise(rows.offsets)), default=0)
        )
        spans = {(begin, slot.length) for begin, slot in zip(begins, of)}
        fullest = max(map(len, riding), default=0)
        self.alone = not fixed and fullest == 1 and spans == {(0, self.longest)}
        # Weights are per token, not per row: tokens of all rows lie behind each other then.
        self.flat = rows.slots.weight is not None
        if self.flat:
            begins = [begin + row * self.count for begin, row in zip(begins, row_of)]
        self.entries = batch * len(slots) if fixed else len(rows.entries)
        self.concepts = self.entries + batch * (nothing_said is not None) if fixed else len(of)
        spare = [0] * (self.concepts - len(of))
        index = [*range(self.entries), *begins, *spare, *(slot.length for slot in of), *spare, *rows.offsets]
        place += [0] * (self.count - len(place))  # a place that every model has; nobody is there
        self.reach = self.count + max(firsts, default=0)
        with torch.inference_mode(False):  # later calls may be outside of it
            self.pick, self.ends, self.bias = pick.to(device), ends.to(device), bias.to(device)
            self.place = torch.tensor(place, dtype=torch.int64, device=device)
            self.index = torch.tensor(index, dtype=torch.int32, device=device)
            self.neutral = None if nothing_said is None else neutral.to(device)
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
                made = self.rows.numbers(active, self.entries).to(self.index.device)
            self._numbers[active] = made
        return made

    def tokens(self, key: Tensor, value: Tensor, numbers: Tensor) -> ConceptTokens:
        """Concepts of a layer, from the riders' keys and values [B, T, H, D]."""
        if self.flat:
            key, value = key.flatten(0, 1), value.flatten(0, 1)
        return ConceptTokens(
            key, value, self.index, numbers, self.entries, self.concepts, self.longest, self.busiest,
            token_weight=self.weight, neutral=self.neutral,
        )  # fmt: skip


@dataclass(eq=False)
class Joint:
    """What the layers of one denoiser call need to know; `Running.joint`.

    Attributes:
        layout, riders: where everybody sits, and who the riders are.
        numbers: of `ConceptTokens`, at this step.
        embeddings: of the riders [B, T, C], as text enters the model.
        seam: of the engine whose call it is.
    """

    layout: Layout
    riders: Riders
    numbers: Tensor
    embeddings: Tensor
    seam: Any
