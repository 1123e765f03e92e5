# SPDX-License-Identifier: Apache-2.0
"""One denoiser of an engine: its text layers, our processors in them, and what has replaced either since."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

from torch import nn

from ....engine.engine import Engine
from ....engine.errors import UnsupportedModelError
from ..around import base_class
from ..contract import bare, cross_attention_layers
from ..features.caches import Caches
from ..features.parallel import Parallel
from ..joint.families import JointFamily
from ..joint.hook import wrap
from .known import SOUND
from .places import Places


class Held:
    """The layers of one model.

    Attributes:
        model: weak reference to it, as the pipeline holds it (perhaps compiled).
        parameters: names of what its forward takes.
        layers, processors: its text layers, and ours for each, by their names in the model.
        caches: what diffusers' caches of the model last kept, and for whom.
        parallel: what is dealt out to several processes.
    """

    def __init__(
        self,
        model: nn.Module,
        engine: Engine,
        backend: str,
        prefix: str = "",
        joint: JointFamily | None = None,
        sound: bool = False,
    ) -> None:
        self.model = weakref.ref(model)
        self.parameters = _parameters(bare(model))
        self._engine, self._backend, self._prefix, self._joint = engine, backend, prefix, joint
        self._sound = sound
        self.layers: dict[str, Any] = {}
        self.processors: dict[str, Any] = {}
        self.caches, self.parallel = Caches(), Parallel(engine.rule, joint is not None)
        self.look(bare(model))
        self.parallel.check(bare(model), self.layers)

    def look(self, model: nn.Module) -> None:
        """Look at the model's layers, and have a processor for each."""
        ours = {id(attn): self.processors[name] for name, attn in self.layers.items()}
        layers, processors = cross_attention_layers(model, self._sound), {}
        for name, attn in layers.items():
            processors[name] = self._around(name, attn.processor, ours.get(id(attn)))
            processors[name].layer = self._prefix + name  # a block that was wrapped has another name
        self.layers, self.processors = layers, processors
        self._places = Places(model, layers)

    def _around(self, name: str, processor: Any, known: Any) -> Any:
        """Ours for a layer: around the processor that it has now or, where that cannot be wrapped, the one
        that it is `known` to have had."""
        if getattr(processor, "engine", None) is self._engine:
            return processor if known is None else known
        try:
            return wrap(self._joint, self._engine, name, processor, self._backend)
        except UnsupportedModelError:
            if known is None:
                raise
            return known

    @property
    def names(self) -> list[str]:
        """The names of layers that make pictures, as the engine tells them."""
        return [processor.layer for name, processor in self.processors.items() if not name.endswith(SOUND)]

    def put(self) -> None:
        """Set our processors."""
        for name, attn in self.layers.items():
            if attn.processor is not self.processors[name]:
                attn.set_processor(self.processors[name])

    def restore(self) -> None:
        """Set those that were there; what somebody else has put in our place stays theirs."""
        for name, attn in self.layers.items():
            if attn.processor is self.processors[name]:
                attn.set_processor(self.processors[name].inner)

    def compiled(self, model: Any) -> bool:
        """Whether some of the code around our processors is compiled: all of it, or block by block."""
        if self._places.compiled or model is not bare(model):
            return True
        return any("_compiled_call_impl" in vars(module) for module in self._places.modules)

    def displaced(self, model: nn.Module) -> str | None:
        """What was replaced, in words: our processors (by slicing, IP-Adapter, fused QKV, ...), or attention
        modules, or blocks around them."""
        others = [n for n, attn in self.layers.items() if attn.processor is not self.processors[n]]
        if others:
            name = type(self.layers[others[0]].processor).__name__
            return f"{len(others)} of {len(self.layers)} processors were replaced, e.g. {others[0]} by {name}"
        if not self._places.changed:
            return None
        now, held = cross_attention_layers(model, self._sound), {id(attn) for attn in self.layers.values()}
        found = {id(attn) for attn in now.values()}
        others = [n for n, attn in self.layers.items() if id(attn) not in found]
        others += [n for n, attn in now.items() if id(attn) not in held and n not in others]
        if not others:  # what is around our layers changed, they did not
            self.look(model)
            return None
        return (
            f"{len(others)} of {len(self.layers)} attention modules, or blocks around them, were replaced, "
            f"e.g. {others[0]}"
        )


def _parameters(model: nn.Module) -> list[str]:
    """Names of what a model's forward takes, as its class has it: engines and caches put functions of `*args`
    and `**kwargs` in the place of an instance's."""
    kind: Any = base_class(model)
    _self, *names = inspect.signature(kind.forward).parameters
    return names
