# SPDX-License-Identifier: Apache-2.0
"""What is known of a kind of joint model: where text enters it, and where in its sequence that sits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ....engine.engine import Engine
from ....engine.errors import UnsupportedModelError
from .riders import Layout, Riders
from .seam import Seam, negating

Given = Mapping[str, Any]  # arguments of a denoiser call by name
Boarded = tuple[dict[str, Any], Layout]  # the arguments with riders, and the layout that follows
# The model, arguments of a call of it, riders, their embeddings [B, T, C], tokens of the image if known.
Board = Callable[[Any, Given, Riders, Tensor, "int | None"], Boarded]


@dataclass(frozen=True)
class JointFamily:
    """How riders board one kind of model.

    Attributes:
        processors: classes of the attention processors that it may have.
        board: puts riders behind the prompt, or says where the model's own code will find them.
        wrap: a processor with negation, from it, engine, name of the layer and backend.
        overrides: methods that the model, or parts of it, need besides while an engine is installed.
    """

    processors: tuple[type, ...]
    board: Board
    wrap: Callable[[Any, Engine, str, str], Any] = negating
    overrides: Callable[[Any, Seam], list[tuple[nn.Module, dict[str, Any]]]] = lambda _model, _seam: []


def no_words(given: Given, argument: str, *allowed: str) -> None:
    """Refuse attention arguments that we do not know how to honour.

    Raises:
        UnsupportedModelError: there are others than those allowed.
    """
    words = sorted((given.get(argument) or {}).keys() - set(allowed))
    if words:
        raise UnsupportedModelError(f"{argument}={words}: negation takes {' and '.join(allowed) or 'none'}")
