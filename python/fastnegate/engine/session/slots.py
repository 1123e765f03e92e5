# SPDX-License-Identifier: Apache-2.0
"""`Slots`: a bank, and the negative prompts of a call, on one token axis."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...operator.rule import Rule
from ..bank import ConceptBank
from ..concepts import Concept, Snapshot
from ..errors import NegationNotAppliedError
from ..files import directions_of
from ..policy import Policy

MOST_TEXTS = 256  # negative prompts whose encodings are kept


@dataclass(frozen=True)
class Slot:
    """One entry's worth of concept tokens: a prototype, or a whole prompt.

    `concept` is the name in the bank, or the text of a negative prompt (`text`); `first` is where its tokens
    begin in that text, None if they are of none.
    """

    concept: str
    begin: int
    length: int
    text: bool = False
    first: int | None = 0


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


NO_ROOM = Room()


def check_neutral(rule: Rule, neutral: Tensor | None) -> None:
    """Raise ValueError for a rule that centres without neutral tokens."""
    if rule.center == "neutral" and neutral is None:
        raise ValueError(
            f"rule {rule.name!r} has center='neutral', and the bank no neutral tokens: make it with "
            "ConceptBank.from_prompts(..., neutral='empty'), or another kind, or set bank.neutral"
        )


class Slots:
    """Embeddings [T, C] of all tokens, and the slots in them.

    `bank` is what they were made of. `neutral` is the slot of the neutral tokens, for a rule that centres;
    else None. Nobody negates it.

    Compiled code is made for sizes: `room` is what negative prompts shall take at least, so that another
    text of another length changes no size. What is not taken are slots of length 0 and tokens of zeros.
    """

    def __init__(
        self,
        bank: Snapshot,
        rule: Rule,
        width: int,
        texts: Mapping[str, Concept] | None = None,
        room: Room = NO_ROOM,
    ) -> None:
        concepts, neutral = bank.concepts, bank.neutral
        check_neutral(rule, neutral)
        self.bank, self.names = bank, frozenset(concepts)
        self.slots: list[Slot] = []
        parts: list[Tensor] = []
        weights: list[Tensor] = []
        directions: list[Mapping[str, Tensor]] = []
        count = 0
        self.neutral: int | None = None
        if rule.center == "neutral" and neutral is not None:
            self.neutral, count = 0, len(neutral)  # the first, so that it stays where it is
            self.slots.append(Slot("", 0, count, first=None))
            parts.append(neutral)
            weights.append(torch.ones(count))
        for name, concept, text in _named(concepts, texts or {}):
            for group in concept.groups(rule):
                self.slots.append(Slot(name, count, len(group.embeddings), text, group.first))
                parts.append(group.embeddings)
                weights.append(torch.ones(len(group.embeddings)) if group.weight is None else group.weight)
                count += len(group.embeddings)
                if group.directions is not None:
                    directions.append(group.directions.layers)
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
        # By layer, [slots, H, D]; for rules that read no direction there are none. A bank's have one model.
        layers = directions[0] if directions else ()
        if self.neutral is not None and layers:  # nobody negates it, so its direction is never read
            directions.insert(0, {layer: torch.zeros_like(u) for layer, u in directions[0].items()})
        self.directions = {layer: torch.stack([of[layer] for of in directions]) for layer in layers}
        self._on: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._there: dict[torch.device, dict[str, Tensor]] = {}

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

    def directions_on(self, device: torch.device) -> dict[str, Tensor]:
        """The directions there; the same tensors each time."""
        if not self.directions:
            return self.directions  # nothing to keep: traced code would be traced again
        there = self._there.get(device)
        if there is None:
            with torch.inference_mode(False):  # as above
                there = {layer: u.to(device) for layer, u in self.directions.items()}
            self._there[device] = there
        return there


def _named(
    concepts: Mapping[str, Concept], texts: Mapping[str, Concept]
) -> Iterator[tuple[str, Concept, bool]]:
    for name, concept in concepts.items():
        yield name, concept, False
    for text, concept in texts.items():
        yield text, concept, True


Texts = tuple[tuple[str, Concept], ...]


class Shelf:
    """Slots of a bank as it is, and of negative prompts, each made once.

    Args:
        bank, rule: of the engine.
        encode: makes the concept of a negative prompt; None: there are none.
        check_text: raises ValueError for one that could not be encoded.
        state: what encodings depend on besides the text: the text encoder as it is; None if not known.
        prompts: how many negative prompts compiled code is to have room for.
    """

    def __init__(
        self,
        bank: ConceptBank,
        rule: Rule,
        encode: Callable[[str], Concept] | None,
        check_text: Callable[[str], None],
        state: Callable[[], Hashable],
        prompts: int,
    ) -> None:
        self._bank, self._rule, self._encode, self._state = bank, rule, encode, state
        self._check_text, self._prompts = check_text, prompts
        self._texts: OrderedDict[tuple[str, Hashable], Concept] = OrderedDict()
        self._slots: dict[tuple[int, Texts, Room], Slots] = {}
        self._room = NO_ROOM
        self._directions = directions_of(bank.snapshot().concepts)  # those that `install` has checked
        self._changing = threading.Lock()

    def check_text(self, policy: Policy) -> None:
        """Raise ValueError for a negative prompt that could not be encoded."""
        if (text := policy.text) is None:
            return
        self._check_read(text)
        if self._known(text, self._state()) is None:
            self._check_text(text)

    def check_bank(self, bank: ConceptBank) -> None:
        """Raise ValueError for a bank that the rule cannot read."""
        Slots(bank.snapshot(), self._rule, bank.width)

    def encode(self, policies: Iterable[Policy | None]) -> Texts:
        """The negative prompts of policies, each once; only new ones are encoded.

        Raises:
            ValueError: nobody can encode, or a text without the tokens that the rule reads.
        """
        texts = dict.fromkeys(p.text for p in policies if p is not None and p.text is not None)
        state = self._state() if texts else None
        return tuple((text, self._known(text, state) or self._encoded(text, state)) for text in texts)

    def slots(self, texts: Texts, fixed: bool) -> Slots:
        """The bank as it is now, and these negative prompts; `fixed`: in the room that they have there."""
        bank = self._bank.snapshot()
        room = self._room if fixed else NO_ROOM
        with self._changing:
            slots = self._slots.get((bank.version, texts, room))
        if slots is not None:
            return slots
        now = directions_of(bank.concepts)
        if self._rule.reads.direction and now is not None and self._directions is not None:
            if (difference := self._directions.model.difference(now.model)) is not None:
                raise NegationNotAppliedError(f"the bank has directions of another denoiser: {difference}")
        slots = Slots(bank, self._rule, self._bank.width, dict(texts), room)
        if fixed and not all(has >= needs for has, needs in zip(room, slots.text_room)):
            self._room = room = room.enlarged(slots.text_room, self._prompts)
            slots = Slots(bank, self._rule, self._bank.width, dict(texts), room)
        with self._changing:
            if any(old[0] != bank.version for old in self._slots) or len(self._slots) >= MOST_TEXTS:
                self._slots.clear()
            self._slots[bank.version, texts, room] = slots
        return slots

    def _known(self, text: str, state: Hashable) -> Concept | None:
        with self._changing:
            if state is None:  # not known: the encoder was freed, say, so what it said last stays
                return next((c for (known, _), c in reversed(self._texts.items()) if known == text), None)
            if (text, state) in self._texts:
                self._texts.move_to_end((text, state))
            return self._texts.get((text, state))

    def _encoded(self, text: str, state: Hashable) -> Concept:
        self._check_read(text)
        assert self._encode is not None
        concept = self._encode(text)
        concept.groups(self._rule)  # refuses one without the tokens that the rule reads
        with self._changing:
            self._texts[text, state] = concept
            while len(self._texts) > MOST_TEXTS:
                self._texts.popitem(last=False)
        return concept

    def _check_read(self, text: str) -> None:
        """Raise ValueError where no negative prompt can be encoded, or be read by the rule."""
        if self._encode is None:
            raise ValueError(f"negative_prompt={text!r}: this engine has no text encoder to ask")
        if self._rule.reads.direction:
            raise ValueError(
                f"negative_prompt={text!r}: rule {self._rule.name!r} reads a steering direction per layer, "
                "which a text does not have"
            )
