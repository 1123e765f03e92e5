# SPDX-License-Identifier: Apache-2.0
"""Gradient checkpointing: layers are computed again in the backward pass, after the denoiser call, and have
to find the rows that they had. They get the text tensor that they had: rows are found by that."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...engine.engine import Engine
from ...engine.errors import NegationNotAppliedError
from ...engine.session.call import Running

_calls: Any = WeakTensorKeyDictionary()  # text -> references to the calls that had it


def remember(text: Tensor, running: Running) -> None:
    """A layer of a call with gradients has this text."""
    known = [ref for ref in _calls.get(text, ()) if ref() is not None]
    if not any(ref() is running for ref in known):
        _calls[text] = [*known, weakref.ref(running)]


def hold(output: Tensor, running: Running) -> None:
    """Have the graph of a layer's output keep the call for as long as the layer may be computed again."""
    if output.grad_fn is not None:
        metadata: Any = output.grad_fn.metadata
        metadata["fastnegate"] = running


def in_backward() -> bool:
    """Whether autograd runs here, so that a layer is computed again rather than called."""
    return torch._C._current_graph_task_id() != -1


def running_of(text: Tensor | None, engine: Engine, layer: str) -> Running | None:
    """The call that a layer is computed again for; None if no call with gradients ever asked for negation.

    Raises:
        NegationNotAppliedError: it cannot be told, though some call asked for negation.
    """
    if text is None or not engine.taught:
        return None
    known = [ref() for ref in _calls.get(text, ())]
    calls: list[Running] = [call for call in known if call is not None and call.engine is engine]
    if calls and all(c.rows is calls[0].rows and c.active == calls[0].active for c in calls):
        return calls[0]
    reason = "its text is another tensor than it was (torch.utils.checkpoint with use_reentrant=True)"
    if calls:
        reason = "calls that ask for different things had the same text tensor: give each a clone of its own"
    raise NegationNotAppliedError(f"layer {layer}: gradient checkpointing computes it again, and {reason}")
