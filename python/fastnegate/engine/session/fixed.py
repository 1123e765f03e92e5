# SPDX-License-Identifier: Apache-2.0
"""`Fixed`: rows at addresses that do not change, for compiled code and captured graphs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...operator.tokens import ConceptTokens
from ..errors import NegationNotAppliedError
from .call import Running, concept_tokens, direction_of


class Fixed:
    """Rows at fixed addresses, for compiled code and captured graphs, while sizes stay.

    Whoever writes them holds the engine's turn over the denoiser's forward, and waits, on the device, for the
    last reader, which may have been on another stream.
    """

    def __init__(self) -> None:
        self.ready = False  # a denoiser call that was prepared for compiled code is running
        self.captured = False  # a graph that was captured reads these addresses
        self.owner: int | None = None  # the thread whose call that is
        self._turn = threading.Lock()
        self.embeddings: Tensor | None = None
        self.context: Tensor | None = None  # what the layers receive of them: compiled ones
        self.index: Tensor | None = None  # of the rows at hand: a view
        self.numbers: Tensor | None = None
        self.weight: Tensor | None = None
        self.directions: dict[str, Tensor] = {}
        self.neutral: Tensor | None = None  # a view, too
        self.concepts = self.longest = 0
        self._all: Tensor | None = None  # the index with room for all rows
        self._all_neutral: Tensor | None = None
        self._read: Any = None  # event of the last reader

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Over a denoiser's forward: calls that read these rows take turns.

        Raises:
            NegationNotAppliedError: this thread has the turn already.
        """
        if self.owner == threading.get_ident():
            raise NegationNotAppliedError(
                "the denoiser is called within its own forward, which reads its rows"
            )
        with self._turn:
            self.owner = threading.get_ident()
            try:
                yield
            finally:
                self.owner = None

    def fill(self, running: Running, most: int) -> None:
        """Copy what `running` has; `most` rows fit."""
        slots, rows = running.slots, running.rows
        assert slots is not None and rows is not None
        device = running.call.device
        if self._read is not None and device.type == "cuda":
            torch.cuda.current_stream(device).wait_event(self._read)
        entries = most * len(slots.slots)
        index = rows.index(entries, most)
        with torch.no_grad():
            self._all = self._copied(self._all, index, device)
            self.numbers = self._copied(self.numbers, rows.numbers(running.active, entries), device)
            self.weight = None if slots.weight is None else self._copied(self.weight, slots.weight, device)
            self.directions = {
                layer: self._copied(self.directions.get(layer), u, device)
                for layer, u in slots.directions.items()
            }
            neutral = rows.neutral(most)
            self._all_neutral = None if neutral is None else self._copied(self._all_neutral, neutral, device)
            embeddings = slots.context(device, running.call.dtype)
            running.embeddings = self.embeddings = self._copied(self.embeddings, embeddings, device)
            if running.call.compiled:
                self.context = self._copied(self.context, running.call.project(self.embeddings), device)
        self.index = self._all[: len(index) - most + running.call.batch]
        self.neutral = None if self._all_neutral is None else self._all_neutral[: running.call.batch]
        self.concepts, self.longest = len(slots.slots), slots.longest
        running.read((self.index, self.numbers, self.weight, self.neutral))
        running.directions = self.directions
        self.ready = running.call.compiled

    def _copied(self, old: Tensor | None, new: Tensor, device: torch.device) -> Tensor:
        """`new` in the place of `old` where it fits, else in a place of its own.

        Raises:
            NegationNotAppliedError: it does not fit, and a captured graph reads the old place.
        """
        if old is not None and (old.shape, old.dtype, old.device) == (new.shape, new.dtype, device):
            return old.copy_(new)
        if old is not None and self.captured:
            raise NegationNotAppliedError(
                f"a captured graph reads rows of shape {list(old.shape)}, now {list(new.shape)}: the "
                "bank or the negative prompts have other sizes; install anew, and capture again"
            )
        with torch.inference_mode(False):  # later calls may be outside of it
            return new.detach().to(device, copy=True)

    def release(self, device: torch.device) -> None:
        """The call is over: an unprepared one must not read the rows of another."""
        self.ready = False
        if device.type == "cuda":
            self._read = torch.cuda.Event()
            self._read.record(torch.cuda.current_stream(device))

    def tokens(self, key: Tensor, value: Tensor, layer: str = "") -> ConceptTokens:
        """As `Running.tokens`, for compiled code."""
        assert self.index is not None and self.numbers is not None
        return concept_tokens(
            key, value, self.index, self.numbers, self.weight, direction_of(self.directions, layer),
            self.neutral, self.concepts, self.longest,
        )  # fmt: skip
