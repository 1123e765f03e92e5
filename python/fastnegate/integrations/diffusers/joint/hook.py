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
from ..processor import NegationAttnProcessor
from .attention import Joint, negating, open_seam
from .families import Given, JointFamily
from .riders import Riders


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
    open_seam()
    return negating(processor, engine, name, backend)


class Boarding:
    """Of one engine. Riders of the same rows are made once."""

    def __init__(self, family: JointFamily, engine: Engine) -> None:
        self._family, self._engine = family, engine
        self._last: Riders | None = None
        self._counting = threading.Lock()

    @contextlib.contextmanager
    def aboard(self, model: nn.Module, given: Given, running: Running) -> Iterator[dict[str, Any]]:
        """The arguments of a denoiser call that somebody wants negated; as they are where no entry acts at
        this step: then the model does what it does.

        Raises:
            UnsupportedModelError: compiled code, gradient checkpointing, or a graph that is captured.
        """
        call, rows = running.call, running.rows
        assert rows is not None
        if call.compiled:
            raise UnsupportedModelError("a compiled joint model cannot be negated yet: do not compile it")
        if running.gradients and getattr(model, "is_gradient_checkpointing", False):
            raise UnsupportedModelError("a joint model with gradient checkpointing cannot be negated")
        if call.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise UnsupportedModelError("a joint model cannot be negated in a graph that is captured")
        if not running.live:
            yield dict(given)
            return
        riders = self._riders(rows, call.device)
        tokens = riders.embeddings(running.context)
        boarded, layout = self._family.board(given, tokens)
        running.joint = Joint(layout, riders, riders.numbers(running.active))
        with self._counting:
            self._engine.riding += 1
        try:
            yield boarded
        finally:
            with self._counting:
                self._engine.riding -= 1

    def _riders(self, rows: Rows, device: torch.device) -> Riders:
        last = self._last
        if last is None or last.rows is not rows or last.pick.device != device:
            last = self._last = Riders(rows, device)
        return last
