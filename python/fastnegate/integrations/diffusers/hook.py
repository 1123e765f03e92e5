# SPDX-License-Identifier: Apache-2.0
"""What `install` puts around an engine's pipeline and denoiser: each denoiser call is prepared, and whatever
took our place (processors, attention modules, the denoiser itself) is noticed before it runs."""

from __future__ import annotations

import inspect
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...engine.engine import Engine
from ...engine.errors import DisplacedProcessorError, NegationNotAppliedError, UnsupportedModelError
from ...engine.session.call import Call, PipelineCall
from ...engine.session.rows import Step
from .around import put_around, take_away
from .contract import InProgress, bare, cross_attention_layers, denoiser, family, in_progress, project_context
from .processor import NegationAttnProcessor

log = logging.getLogger("fastnegate")
MOST_CALLS = 256  # pipeline calls in progress that are told apart


class Seen:
    """What came by of the pipeline calls that one call of the installed pipeline made."""

    def __init__(self) -> None:
        self.calls: list[OwnCall] = []


class OwnCall(PipelineCall):
    """A pipeline call: the schedule steps that it runs, and those that came by."""

    def __init__(self, timesteps: Any, schedule: Any) -> None:
        super().__init__()
        self.timesteps = timesteps  # kept: its identity is this call's
        everything, these = _listed(schedule), _listed(timesteps)
        self.count = len(everything)
        # A part of the schedule: img2img drops its beginning, `denoising_end` its end. PNDM and Heun repeat
        # timesteps, so the whole part has to match.
        first = next(
            (i for i in _from_both_ends(self.count - len(these)) if everything[i : i + len(these)] == these),
            None,
        )
        if first is None:  # a schedule of its own
            first, self.count = 0, len(these)
        self.run = range(first, first + len(these))
        self.seen: set[tuple[int, int]] = set()  # which timestep, and which part of its denoiser calls

    def step(self, index: int) -> Step:
        return Step(self.run.start + index, self.count, self.run)


_SEEN: ContextVar[Seen | None] = ContextVar("fastnegate_seen", default=None)


class Hook:
    """Around one pipeline and its denoiser."""

    def __init__(self, pipe: Any, engine: Engine, on_displaced: str, backend: str) -> None:
        self.engine, self.backend = engine, backend
        self._pipe = weakref.ref(pipe)
        self._family = family(pipe)
        self._on_displaced = on_displaced
        self._model = weakref.ref(denoiser(pipe))
        self._parameters = list(inspect.signature(bare(denoiser(pipe)).forward).parameters)
        self._calls: OrderedDict[int, OwnCall] = OrderedDict()
        self._loops = threading.local()  # steps of denoiser calls outside of pipeline calls
        self._adding = threading.Lock()
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
        self.layers, self.processors = layers, processors
        self.engine.layers = tuple(layers)
        self._edges = _edges(model, layers)
        self._parts = [model, *{id(edge.child): edge.child for edge in self._edges}.values()]
        self._in_parts = any(edge.key == "_orig_mod" for edge in self._edges)

    def put(self) -> None:
        pipe, model = self._pipe(), self._model()
        assert pipe is not None and model is not None
        self._set_processors()
        put_around(model, self.denoise)
        put_around(pipe, self.generate)

    def _set_processors(self) -> None:
        for name, attn in self.layers.items():
            if attn.processor is not self.processors[name]:
                attn.set_processor(self.processors[name])

    def remove(self) -> None:
        """What somebody else has put in our place stays theirs."""
        if (pipe := self._pipe()) is not None:
            take_away(pipe, self.generate)
        if (model := self._model()) is not None:
            take_away(model, self.denoise)
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
        armed = self.engine.armed
        self._check_denoiser(pipe, armed)
        seen = Seen()
        before = _SEEN.set(seen)
        try:
            result = call(*args, **kwargs)
        finally:
            _SEEN.reset(before)
        if armed:
            self._check_seen(pipe, seen)
        return result

    def _check_denoiser(self, pipe: Any, armed: bool) -> None:
        held, now = self._model(), getattr(pipe, self._family.denoiser)
        if now is held:
            return
        if bare(now) is bare(held):
            raise NegationNotAppliedError("compile the denoiser before fastnegate.install, not after")
        if not armed:
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

    def _check_seen(self, pipe: Any, seen: Seen) -> None:
        if self._on_displaced == "warn" or getattr(pipe, "_interrupt", False):
            return
        missing = [len(c.run) - len({at for at, _ in c.seen}) for c in seen.calls]
        if self.engine.removed or not missing or any(missing):
            raise NegationNotAppliedError(
                f"negation was asked for, and {sum(missing) if missing else 'all'} steps of the pipeline "
                "call ran without it: the engine was removed, or the denoiser exchanged, while it ran"
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
            raise NegationNotAppliedError("compile the denoiser before fastnegate.install, not after")
        self._watch(bare(model))
        given = {**dict(zip(self._parameters, args)), **kwargs}
        with self.engine.running(self._facts(model, given, frame)):
            return call(*args, **kwargs)

    def _facts(self, model: Any, given: dict[str, Any], frame: FrameType) -> Call:
        sample: Tensor = given["sample"] if "sample" in given else given["hidden_states"]
        text, entry = given.get("encoder_hidden_states"), self._family
        progress, compiled = in_progress(model, frame), self._compiled(model)
        of: PipelineCall
        step: Step | None
        if progress is not None:
            of = own = self._own(progress)
            step = own.step(progress.at)
            if progress.own:
                own.seen.add((progress.at, progress.part))
        else:
            of, step = self._loop(given["timestep"])
        return Call(
            batch=sample.shape[0],
            device=sample.device,
            guided=lambda: _guided(progress),
            dtype=sample.dtype if text is None else text.dtype,
            of=of,
            step=step,
            prompts=progress.prompts if progress is not None and progress.own else None,
            unconditional=progress is not None and progress.unconditional,
            # The user's code may change weights between steps in ways that nobody can see.
            keep=entry.projection is None and (progress is None or not progress.callback),
            fixed=compiled or sample.device.type == "cuda",
            compiled=compiled,
            project=lambda embeddings: project_context(entry, model, embeddings),
        )

    def _own(self, progress: InProgress) -> OwnCall:
        """The pipeline call, known by the object that holds its timesteps."""
        key = id(progress.timesteps)
        with self._adding:
            known = self._calls.get(key)
            if known is not None and not (progress.own and (progress.at, progress.part) in known.seen):
                return known
            # New, or the same object in another call: a step comes once in a call.
            made = OwnCall(progress.timesteps, progress.pipe.scheduler.timesteps)
            self._calls[key] = made
            while len(self._calls) > MOST_CALLS:
                self._calls.popitem(last=False)
        if (seen := _SEEN.get()) is not None and progress.own:
            seen.calls.append(made)
        return made

    def _loop(self, timestep: Any) -> tuple[PipelineCall, Step | None]:
        """Of a denoiser call that no pipeline makes: a server's own loop, which the scheduler's timesteps
        tell about. Steps grow within a loop; rows at different timesteps have no common step."""
        pipe, loops = self._pipe(), self._loops
        timesteps = None if pipe is None else pipe.scheduler.timesteps
        if timesteps is None:
            return PipelineCall(), None
        if timesteps is not getattr(loops, "timesteps", None):
            loops.timesteps, loops.listed, loops.last, loops.of = timesteps, _listed(timesteps), -1, None
        rows = set(timestep.flatten().tolist()) if isinstance(timestep, Tensor) else {timestep}
        t = rows.pop()
        at = [i for i, known in enumerate(loops.listed) if known == t] if not rows else []
        if not at:
            return PipelineCall(), None
        later = [i for i in at if i >= loops.last]
        if loops.of is None or not later:
            loops.of = PipelineCall()
        loops.last = later[0] if later else at[0]
        return loops.of, Step(loops.last, len(loops.listed))

    def _compiled(self, model: Any) -> bool:
        """Whether some of the code around our processors is compiled: all of it, or block by block."""
        if self._in_parts or model is not bare(model):
            return True
        return any("_compiled_call_impl" in vars(part) for part in self._parts)

    # ---- the watchdog -----------------------------------------------------------------------

    def _watch(self, model: nn.Module) -> None:
        """Notice processors that something has replaced (slicing, IP-Adapter, fused QKV, ...), and attention
        modules, or blocks around them."""
        displaced = [n for n, attn in self.layers.items() if attn.processor is not self.processors[n]]
        moved = any(
            len(parent._modules) != count or parent._modules.get(key) is not child
            for (parent, key, child), count in self._edges.items()
        )
        if not displaced and not moved:
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


class _Edge(NamedTuple):
    parent: nn.Module
    key: str
    child: nn.Module


def _edges(model: nn.Module, layers: dict[str, Any]) -> dict[_Edge, int]:
    """The way from the model to each of its attention layers, and how many parts each module on it has."""
    edges: dict[_Edge, int] = {}
    for name in layers:
        parent: Any = model
        for key in name.split("."):
            child = parent._modules[key]
            edges[_Edge(parent, key, child)] = len(parent._modules)
            parent = child
    return edges


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


def _listed(timesteps: Any) -> list[float]:
    return timesteps.tolist() if hasattr(timesteps, "tolist") else list(timesteps)


def _from_both_ends(last: int) -> Iterator[int]:
    """0 and `last`, where parts of a schedule mostly begin, and then what is between."""
    yield from dict.fromkeys((0, last, *range(1, last))) if last >= 0 else ()
