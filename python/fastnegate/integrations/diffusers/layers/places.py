# SPDX-License-Identifier: Apache-2.0
"""Where layers are in their model: a replaced layer, or a block around it, is noticed at each call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn


class _Edge(NamedTuple):
    parent: nn.Module
    key: str
    child: nn.Module


class Places:
    """The ways from a model to some of its layers, by name. Far fewer than the model has modules."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        # How many parts each module on the way has, too: a new one may be another layer.
        self._edges: dict[_Edge, int] = {}
        for name in names:
            parent = model
            for key in name.split("."):
                child = parent._modules[key]
                assert child is not None
                self._edges[_Edge(parent, key, child)] = len(parent._modules)
                parent = child
        self.modules = [model, *{id(edge.child): edge.child for edge in self._edges}.values()]
        self.compiled = any(edge.key == "_orig_mod" for edge in self._edges)  # by torch.compile(block)

    @property
    def changed(self) -> bool:
        """Whether a way does not lead to its layer any longer, or something is new beside it."""
        return any(
            len(parent._modules) != count or parent._modules.get(key) is not child
            for (parent, key, child), count in self._edges.items()
        )
