# SPDX-License-Identifier: Apache-2.0
"""What the hook around a denoiser does more for a joint model: it lets concept tokens board."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ....engine.engine import Engine
from ....engine.errors import UnsupportedModelError
from ....engine.session.call import Running
from ....engine.session.rows import Rows
from ..around import override
from ..processor import NegationAttnProcessor
from .families import Given, JointFamily
from .riders import Joint, Riders
from .seam import seam_of, traced


def wrap(family: JointFamily | None, engine: Engine, name: str, processor: Any, backend: str) -> Any:
    """The processor of a layer, with negation.

    Raises:
        UnsupportedModelError: it cannot be wrapped.
    """
    if family is None:
        return NegationAttnProcessor.bound(engine, name, processor, backend)
    if type(processor) not in family.processors:
        raise UnsupportedModelError(
            f"processor {type(processor).__name__} of {name} cannot be wrapped: supported are "
            f"{', '.join(known.__name__ for known in family.processors)}"
        )
    return family.wrap(processor, engine, name, backend)


class Boarding:
    """Of one engine. Riders of the same rows are made once.

    Args:
        most: tokens that the concepts of a row may have; None: as many as they have.
    """

    def __init__(self, family: JointFamily, engine: Engine, most: int | None) -> None:
        self._family, self._engine, self._most = family, engine, most
        self._seam = seam_of(engine)
        self._last: Riders | None = None
        self._room = 0  # tokens that compiled code is made for
        self._counting = threading.Lock()

    def put(self, model: nn.Module) -> None:
        for part, methods in self._family.overrides(model, self._seam):
            override(part, methods)

    def remove(self, model: nn.Module) -> None:
        for part, _ in self._family.overrides(model, self._seam):
            override(part, {})

    @contextlib.contextmanager
    def aboard(
        self, model: nn.Module, given: Given, running: Running, image: int | None
    ) -> Iterator[dict[str, Any]]:
        """The arguments of a denoiser call that somebody wants negated; as they are where no entry acts at
        this step: then the model does what it does. `image`: tokens of the image, if known.

        Raises:
            UnsupportedModelError: gradient checkpointing, a graph that is captured, or unknown arguments.
            NegationNotAppliedError: concepts of a row have more tokens than there is room for.
        """
        call, rows = running.call, running.rows
        assert rows is not None
        if running.gradients and getattr(model, "is_gradient_checkpointing", False):
            raise UnsupportedModelError("a joint model with gradient checkpointing cannot be negated")
        if call.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise UnsupportedModelError("a joint model cannot be negated in a graph that is captured")
        riders = self._riders(rows, call.device, call.compiled)
        if not running.live:
            yield dict(given)
            return
        tokens = riders.embeddings(running.context)
        boarded, layout = self._family.board(model, given, riders, tokens, image)
        joint = running.joint = Joint(layout, riders, riders.numbers(running.active), tokens, self._seam)
        with self._counting:
            self._engine.riding += 1
        try:
            if call.compiled:  # whose calls take turns
                self._seam.compiled = joint
            yield boarded
        finally:
            if call.compiled:
                self._seam.compiled = traced.layer = None
            with self._counting:
                self._engine.riding -= 1

    def _riders(self, rows: Rows, device: torch.device, compiled: bool) -> Riders:
        last = self._last
        if last is not None and (last.rows, last.pick.device, last.fixed) == (rows, device, compiled):
            return last
        made = Riders(rows, device, self._most)
        if compiled:  # one size for as many policies as can be
            self._room = max(self._room, made.count, self._most or 0)
            made = Riders(rows, device, self._room, fixed=True)
        self._last = made
        return made
