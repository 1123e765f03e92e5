# SPDX-License-Identifier: Apache-2.0
"""`Slots`: a bank, and the negative prompts of a call, on one token axis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..operator.rule import Rule
from .concepts import Concept


@dataclass(frozen=True)
class Slot:
    """One entry's worth of concept tokens: a prototype, or a whole prompt.

    `concept` is the name in the bank, or the text of a negative prompt (`text`).
    """

    concept: str
    begin: int
    length: int
    text: bool = False


class Room(NamedTuple):
    """Capacities: slots, tokens, and tokens of the longest slot."""

    slots: int = 0
    tokens: int = 0
    longest: int = 0

    def enlarged(self, needed: Room, prompts: int) -> Room:
        """Room for what is needed and for more like it: `prompts` of them, rounded up."""
        slots = max(self.slots, 1 << (max(needed.slots, prompts) - 1).bit_length())
        longest = max(self.longest, -(-needed.longest // 16) * 16)
        return Room(slots, max(self.tokens, needed.tokens, slots * longest), longest)


class Slots:
    """Embeddings [T, C] of all tokens, and the slots in them.

    Compiled code is made for sizes: `room` is what negative prompts shall take at least, so that another
    text of another length changes no size. What is not taken are slots of length 0 and tokens of zeros.
    """

    def __init__(
        self,
        concepts: Mapping[str, Concept],
        rule: Rule,
        width: int,
        texts: Mapping[str, Concept] | None = None,
        room: Room = Room(),
    ) -> None:
        self.slots: list[Slot] = []
        parts: list[Tensor] = []
        weights: list[Tensor] = []
        count = 0
        for name, concept, text in _named(concepts, texts or {}):
            for group in concept.groups(rule):
                self.slots.append(Slot(name, count, len(group.embeddings), text))
                parts.append(group.embeddings)
                weights.append(torch.ones(len(group.embeddings)) if group.weight is None else group.weight)
                count += len(group.embeddings)
        width = parts[0].shape[1] if parts else width
        longest = max((s.length for s in self.slots), default=0)
        of_texts = [s for s in self.slots if s.text]
        self.text_room = Room(
            len(of_texts), sum(s.length for s in of_texts), max((s.length for s in of_texts), default=0)
        )
        spare = Room(*(max(most - taken, 0) for most, taken in zip(room, self.text_room)))
        self.slots += [Slot("", count, 0, True)] * spare.slots
        self.longest = max(longest, room.longest)
        # A bank may be empty for a while (remove, then update): no slots, no entries.
        self.embeddings = torch.cat([*parts, torch.zeros(spare.tokens, width)])
        self.weight = None
        if rule.tokens == "weighted" and self.slots:
            self.weight = torch.cat([*weights, torch.zeros(spare.tokens)])
        self._on: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @property
    def shape(self) -> tuple[int, int, int, bool]:
        """All sizes that a compiled graph is made for."""
        return len(self.slots), len(self.embeddings), self.longest, self.weight is not None

    def context(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The embeddings [1, T, C] there; the same tensor each time."""
        context = self._on.get((device, dtype))
        if context is None:
            with torch.inference_mode(False):  # later calls may be outside of it
                context = self.embeddings.to(device=device, dtype=dtype).unsqueeze(0)
            self._on[device, dtype] = context
        return context


def _named(
    concepts: Mapping[str, Concept], texts: Mapping[str, Concept]
) -> Iterator[tuple[str, Concept, bool]]:
    for name, concept in concepts.items():
        yield name, concept, False
    for text, concept in texts.items():
        yield text, concept, True
