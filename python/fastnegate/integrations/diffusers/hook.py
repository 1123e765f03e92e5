# SPDX-License-Identifier: Apache-2.0
"""What `install` puts around an engine's pipeline and denoiser: each denoiser call is prepared, and whatever
took our place (processors, attention modules, the denoiser itself) is noticed before it runs."""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ...engine.engine import Engine
from ...engine.errors import DisplacedProcessorError, NegationNotAppliedError, UnsupportedModelError
from ...engine.session.call import Call, Loop, PipelineCall
from ...engine.session.rows import Step
from .around import put_around, take_away
from .calls import WATCHED, Calls, Watched
from .contract import InProgress, bare, cross_attention_layers, denoiser, family, in_progress, project_context
from .layers.places import Places
from .processor import NegationAttnProcessor

log = logging.getLogger("fastnegate")
# Weak on both sides: the processors on the model own the engine.
INSTALLED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Engine]] = weakref.WeakKeyDictionary()
COMPILE_BEFORE = "compile the denoiser before fastnegate.install, not after"


class Hook:
    """Around one pipeline and its denoiser."""

    def __init__(self, pipe: Any, engine: Engine, on_displaced: str, backend: str) -> None:
        self.engine, self.backend = engine, backend
        self._pipe = weakref.ref(pipe)
        self._family = family(pipe)
        self._on_displaced = on_displaced
        self._model = weakref.ref(denoiser(pipe))
        self._parameters = list(inspect.signature(bare(denoiser(pipe)).forward).parameters)
        self._calls = Calls(engine)
        self._siblings: weakref.WeakSet[Any] = weakref.WeakSet()  # pipelines around the same denoiser
        self.layers: dict[str, Any] = {}
        self.processors: dict[str, NegationAttnProcessor] = {}
        self._hold(bare(denoiser(pipe)))

    def _hold(self, model: nn.Module) -> None:
        """Look at the model's layers, and have a processor for each."""
        ours = {id(attn): self.processors[name] for name, attn in self.layers.items()}
        layers, processors = cross_attention_layers(model), {}
        for name, attn in layers.items():
            processor, known = attn.processor, ours.get(id(attn))
            if known is None and getattr(processor, "engine", None) is not self.engine:
                processor = NegationAttnProcessor.bound(self.engine, name, processor, self.backend)
            processors[name] = processor if known is None else known
            processors[name].layer = name  # a block that was wrapped has another name
        self.layers, self.processors = layers, processors
        self.engine.layers = tuple(layers)
        self._places = Places(model, layers)

    def put(self) -> None:
        pipe, model = self._pipe(), self._model()
        assert pipe is not None and model is not None
        self._set_processors()
        put_around(model, self.denoise)
        put_around(pipe, self.generate)
        INSTALLED[bare(model)] = weakref.ref(self.engine)

    def _set_processors(self) -> None:
        for name, attn in self.layers.items():
            if attn.processor is not self.processors[name]:
                attn.set_processor(self.processors[name])

    def remove(self) -> None:
        """What somebody else has put in our place stays theirs."""
        if (pipe := self._pipe()) is not None:
            take_away(pipe, self.generate)
        for sibling in list(self._siblings):
            take_away(sibling, self.generate)
        self._siblings.clear()  # each is watched again when it comes by
        if (model := self._model()) is not None:
            take_away(model, self.denoise)
            INSTALLED.pop(bare(model), None)
        for name, attn in self.layers.items():
            if attn.processor is self.processors[name]:
                attn.set_processor(self.processors[name].inner)

    # ---- around the pipeline ----------------------------------------------------------------

    def generate(
        self,
        pipe: Any,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        frame: FrameType,
    ) -> Any:
        """A call of the pipeline: every step that it runs has to come by, if it was to be negated."""
        watched = Watched(pipe, self.engine.ledger())
        self.engine.check_spoken(watched.ledger)
        self._check_denoiser(pipe, watched.asks)
        before = WATCHED.set(watched)
        try:
            result = call(*args, **kwargs)
        except Exception as error:
            if self._compiled_since(pipe):
                raise NegationNotAppliedError(COMPILE_BEFORE) from error
            raise
        finally:
            WATCHED.reset(before)
        if watched.asks:
            self._check_seen(pipe, watched)
        return result

    def _compiled_since(self, pipe: Any) -> bool:
        """Whether the pipeline's denoiser is the one that we hold, within compiled code around it."""
        held, now = self._model(), getattr(pipe, self._family.denoiser)
        return now is not held and bare(now) is bare(held)

    def _check_denoiser(self, pipe: Any, asks: bool) -> None:
        held, now = self._model(), getattr(pipe, self._family.denoiser)
        if self._compiled_since(pipe):
            raise NegationNotAppliedError(COMPILE_BEFORE)
        if now is held or not asks:
            return
        message = f"the pipeline's {self._family.denoiser} is another one than the engine was installed in"
        if self._on_displaced == "raise":
            raise DisplacedProcessorError(message + "; negation would not be applied")
        log.warning("%s", message)
        if self._on_displaced == "reinstall":
            self.remove()
            self._model, self.layers, self.processors = weakref.ref(now), {}, {}
            self._hold(bare(now))
            self.put()

    def _check_seen(self, pipe: Any, watched: Watched) -> None:
        missing = sum(call.missing for call in watched.calls)
        if self._on_displaced == "warn" and not self.engine.removed:
            return
        if getattr(pipe, "_interrupt", False) and getattr(pipe, self._family.denoiser) is self._model():
            missing = 0  # the rest was not run at all
        if self.engine.removed or not watched.calls or missing:
            raise NegationNotAppliedError(
                f"negation was asked for, and {missing or 'all'} steps of the pipeline call ran without it: "
                "the engine was removed, or the denoiser exchanged, while it ran"
            )

    # ---- around the denoiser ----------------------------------------------------------------

    def denoise(
        self,
        model: Any,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        frame: FrameType,
    ) -> Any:
        """A call of the denoiser."""
        if torch.compiler.is_compiling():
            raise NegationNotAppliedError(COMPILE_BEFORE)
        self._watch(bare(model))
        given = {**dict(zip(self._parameters, args)), **kwargs}
        with self.engine.running(self._facts(model, given, frame)) as running:
            running.negated = self._on_displaced == "warn"  # else a layer has to say that it was
            return call(*args, **kwargs)

    def _facts(self, model: Any, given: dict[str, Any], frame: FrameType) -> Call:
        sample: Tensor = given["sample"] if "sample" in given else given["hidden_states"]
        text, entry = given.get("encoder_hidden_states"), self._family
        progress, compiled = in_progress(model, frame), self._compiled(model)
        of: PipelineCall
        step: Step | None
        if progress is not None:
            of = own = self._calls.own(progress)
            step = own.step(progress.at)
            if progress.own:
                own.seen.add((progress.at, progress.part))
                self._adopt(progress.pipe)
        else:
            of, step = self._calls.loop(self._pipe(), given["timestep"])
        return Call(
            batch=sample.shape[0],
            device=sample.device,
            guided=lambda: _guided(progress),
            dtype=sample.dtype if text is None else text.dtype,
            of=of,
            step=step,
            prompts=progress.prompts if progress is not None and progress.own else None,
            unconditional=progress is not None and progress.unconditional,
            keep=self._quiet(model, progress, of),
            # Layers that are computed again for gradients need rows that no later call writes over.
            fixed=compiled or (sample.device.type == "cuda" and not torch.is_grad_enabled()),
            compiled=compiled,
            project=lambda embeddings: project_context(entry, model, embeddings),
        )

    def _adopt(self, pipe: Any) -> None:
        """Another pipeline around this denoiser is watched from its next call on."""
        if pipe is not self._pipe() and pipe not in self._siblings:
            self._siblings.add(pipe)
            put_around(pipe, self.generate)

    def _quiet(self, model: Any, progress: InProgress | None, of: PipelineCall) -> bool:
        """Whether nobody's code runs between the steps of this pipeline call: it might change weights in ways
        that leave no trace."""
        if self._family.projection is not None:
            return False
        if progress is None:
            return isinstance(of, Loop)
        scheduler = progress.pipe.scheduler
        ours = type(scheduler).__module__.startswith("diffusers.") and "step" not in vars(scheduler)
        hooks = [h for part in (model, bare(model)) for h in (part._forward_hooks, part._forward_pre_hooks)]
        return ours and not progress.callback and not any(hooks)

    def _compiled(self, model: Any) -> bool:
        """Whether some of the code around our processors is compiled: all of it, or block by block."""
        if self._places.compiled or model is not bare(model):
            return True
        return any("_compiled_call_impl" in vars(module) for module in self._places.modules)

    # ---- the watchdog -----------------------------------------------------------------------

    def _watch(self, model: nn.Module) -> None:
        """Notice processors that something has replaced (slicing, IP-Adapter, fused QKV, ...), and attention
        modules, or blocks around them."""
        displaced = [n for n, attn in self.layers.items() if attn.processor is not self.processors[n]]
        if not displaced and not self._places.changed:
            return
        if displaced:
            name = type(self.layers[displaced[0]].processor).__name__
            message = (
                f"{len(displaced)} of {len(self.layers)} processors were replaced, e.g. {displaced[0]} "
                f"by {name}"
            )
        else:
            now, held = cross_attention_layers(model), {id(attn) for attn in self.layers.values()}
            found = {id(attn) for attn in now.values()}
            others = [n for n, attn in self.layers.items() if id(attn) not in found]
            others += [n for n, attn in now.items() if id(attn) not in held and n not in others]
            if not others:  # what is around our layers changed, they did not
                self._hold(model)
                return
            message = (
                f"{len(others)} of {len(self.layers)} attention modules, or blocks around them, were "
                f"replaced, e.g. {others[0]}"
            )
        if self._on_displaced == "raise":
            raise DisplacedProcessorError(message + "; negation would not be applied")
        log.warning("%s", message)
        if self._on_displaced == "reinstall":
            self._hold(model)
            self._set_processors()


def _guided(progress: InProgress | None) -> bool:
    """Whether the rows are [unconditional, conditional] halves.

    Raises:
        UnsupportedModelError: no pipeline call is in progress, so nobody can tell.
    """
    if progress is None:
        raise UnsupportedModelError(
            "cannot tell which batch rows are conditional outside a pipeline call: say so with "
            "engine.set_rows(..., conditional=...) or NegationAttnProcessor(..., conditional=...)"
        )
    return progress.own and progress.guided  # a callback's own rows are conditional, all of them
