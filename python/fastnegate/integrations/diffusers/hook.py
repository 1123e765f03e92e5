# SPDX-License-Identifier: Apache-2.0
"""What `install` puts around an engine's pipeline and denoisers: each denoiser call is prepared, and whatever
took our place (processors, attention modules, the denoiser itself) is noticed before it runs."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ...engine.engine import Engine
from ...engine.errors import DisplacedProcessorError, NegationNotAppliedError, UnsupportedModelError
from ...engine.session.call import Call, Loop, PipelineCall, Running
from ...engine.session.rows import Step
from .around import put_around, take_away
from .calls import WATCHED, Calls, Watched
from .contract import InProgress, bare, denoisers, family, in_progress, project_context
from .joint.hook import Boarding
from .layers.held import Held
from .layers.ltx2 import board

log = logging.getLogger("fastnegate")
# Weak on both sides: the processors on the model own the engine.
INSTALLED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Engine]] = weakref.WeakKeyDictionary()
# Arguments of denoisers, by what they are: a list where a model takes one for each row.
SAMPLE, TEXT, TIME = (
    ("sample", "hidden_states", "x"),
    ("encoder_hidden_states", "cap_feats"),
    ("timestep", "t"),
)
COMPILE_BEFORE = "compile the denoiser before fastnegate.install, not after"


class Hook:
    """Around one pipeline and its denoisers."""

    def __init__(
        self,
        pipe: Any,
        engine: Engine,
        on_displaced: str,
        backend: str,
        max_tokens: int | None,
        sound: bool,
    ) -> None:
        self.engine, self._backend, self._sound = engine, backend, sound
        self._pipe = weakref.ref(pipe)
        self._family = family(pipe)
        self._on_displaced = on_displaced
        self._calls = Calls(engine)
        joint = self._family.joint
        self._boarding = None if joint is None else Boarding(joint, engine, max_tokens)
        self._siblings: weakref.WeakSet[Any] = weakref.WeakSet()  # pipelines around the same denoisers
        self._held: dict[str, Held] = {}  # by the pipeline's attribute
        self._hold(denoisers(pipe))

    def _hold(self, models: dict[str, nn.Module]) -> None:
        """Have processors for the layers of these models, and no others."""
        self._held = {
            # Layers of a second denoiser have the names of the first one's.
            name: Held(
                model, self.engine, self._backend, f"{name}." if i else "", self._family.joint, self._sound
            )
            for i, (name, model) in enumerate(models.items())
        }
        self._name_layers()

    def _name_layers(self) -> None:
        self.engine.name_layers(*(held.names for held in self._held.values()))

    def put(self) -> None:
        pipe = self._pipe()
        assert pipe is not None
        for held in self._held.values():
            model = held.model()
            assert model is not None
            held.put()
            if self._boarding is not None:
                self._boarding.put(bare(model))
            # Edits are outside: what they change, or ask besides, is not about the rows that are prepared.
            put_around(model, self.denoise, innermost=True)
            INSTALLED[bare(model)] = weakref.ref(self.engine)
        put_around(pipe, self.generate)

    def remove(self) -> None:
        """What somebody else has put in our place stays theirs."""
        if (pipe := self._pipe()) is not None:
            take_away(pipe, self.generate)
        for sibling in list(self._siblings):
            take_away(sibling, self.generate)
        self._siblings.clear()  # each is watched again when it comes by
        for held in self._held.values():
            if (model := held.model()) is not None:
                take_away(model, self.denoise)
                if self._boarding is not None:
                    self._boarding.remove(bare(model))
                INSTALLED.pop(bare(model), None)
            held.restore()

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

    def _exchanged(self, pipe: Any) -> dict[str, tuple[Any, Any]]:
        """Denoisers of the pipeline that are not those we hold, by attribute: ours, and what is there."""
        held = {
            name: self._held[name].model() if name in self._held else None for name in self._family.denoisers
        }
        now = {name: getattr(pipe, name, None) for name in held}
        return {name: (held[name], now[name]) for name in held if held[name] is not now[name]}

    def _compiled_since(self, pipe: Any) -> bool:
        """Whether a denoiser is the one that we hold, within compiled code around it."""
        return any(bare(now) is bare(held) for held, now in self._exchanged(pipe).values())

    def _check_denoiser(self, pipe: Any, asks: bool) -> None:
        exchanged = self._exchanged(pipe)
        if self._compiled_since(pipe):
            raise NegationNotAppliedError(COMPILE_BEFORE)
        if not exchanged or not asks:
            return
        message = f"the pipeline's {' and '.join(exchanged)} is another one than the engine was installed in"
        if self._on_displaced == "raise":
            raise DisplacedProcessorError(message + "; negation would not be applied")
        log.warning("%s", message)
        if self._on_displaced == "reinstall":
            self.remove()
            self._hold(denoisers(pipe))
            self.put()

    def _check_seen(self, pipe: Any, watched: Watched) -> None:
        missing = sum(call.missing for call in watched.calls)
        if self._on_displaced == "warn" and not self.engine.removed:
            return
        if getattr(pipe, "_interrupt", False) and not self._exchanged(pipe):
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
        held = next(held for held in self._held.values() if held.model() is model)
        self._watch(held, bare(model))
        given = {**dict(zip(held.parameters, args)), **kwargs}
        progress = in_progress(model, frame, given)
        with self.engine.running(self._facts(held, model, given, progress)) as running:
            running.negated = self._on_displaced == "warn"  # else a layer has to say that it was
            held.parallel.heed(bare(model), held.layers, running)
            held.caches.heed(bare(model), running)
            image = None if progress is None or not progress.own else progress.image
            try:
                with self._aboard(model, given, running, image) as boarded:
                    result = call(*args, **kwargs) if boarded is None else call(**boarded)
            except Exception as error:
                self._check_undisturbed(held, model, running, error)
                raise
            self._check_undisturbed(held, model, running)
            return result

    @contextlib.contextmanager
    def _aboard(
        self, model: Any, given: dict[str, Any], running: Running, image: int | None
    ) -> Iterator[dict[str, Any] | None]:
        """The arguments of the call by name, where concepts ride in its text; None: as they are."""
        if self._boarding is not None and running.asks:
            with self._boarding.aboard(bare(model), given, running, image) as boarded:
                yield boarded
        elif self._family.rides and (running.live or running.call.compiled or _captures(running)):
            running.joint = running.context.shape[1]
            yield board(bare(model), given, running.context, self._sound)
        else:
            yield None

    def _check_undisturbed(
        self, held: Held, model: Any, running: Running, error: Exception | None = None
    ) -> None:
        """After a call of the denoiser: its layers were ours from the first to the last.

        Raises:
            NegationNotAppliedError: the engine was removed meanwhile.
            DisplacedProcessorError: processors were replaced meanwhile.
        """
        if running.asks and self.engine.removed:
            raise NegationNotAppliedError("the engine was removed while the denoiser ran") from error
        if running.live and self._on_displaced == "raise" and (message := held.displaced(bare(model))):
            raise DisplacedProcessorError(message + "; while the denoiser ran") from error

    def _facts(self, held: Held, model: Any, given: dict[str, Any], progress: InProgress | None) -> Call:
        sample, text = _first(given, SAMPLE), _first(given, TEXT)
        if sample is None:
            raise UnsupportedModelError(
                f"{type(model).__name__} was called without {', '.join(SAMPLE[:-1])} or {SAMPLE[-1]}: what it"
                f" got is {', '.join(given) or 'nothing'}"
            )
        batch = len(sample)
        while not isinstance(sample, Tensor):  # a list of rows, which may be lists of pictures
            sample = sample[0]
        entry, compiled = self._family, held.compiled(model)
        of: PipelineCall
        step: Step | None
        if progress is not None:
            of = own = self._calls.own(progress)
            step = own.step(progress.at)
            if progress.own:
                own.seen.add((progress.at, progress.part))
                self._adopt(progress.pipe)
        else:
            of, step = self._calls.loop(self._pipe(), _first(given, TIME), entry.clock)
        return Call(
            batch=batch,
            device=sample.device,
            guided=lambda: _guided(progress),
            conditional_first=entry.conditional_first,
            dtype=text.dtype if isinstance(text, Tensor) else sample.dtype,
            of=of,
            step=step,
            prompts=progress.prompts if progress is not None and progress.own else None,
            unconditional=lambda: unconditional(progress),
            keep=self._quiet(model, progress, of),
            # Layers that are computed again for gradients need rows that no later call writes over.
            fixed=compiled
            or (self._boarding is None and sample.device.type == "cuda" and not torch.is_grad_enabled()),
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
        if self._family.projection or self._family.rides:
            return False
        if progress is None:
            return isinstance(of, Loop)
        scheduler = progress.pipe.scheduler
        ours = type(scheduler).__module__.startswith("diffusers.") and "step" not in vars(scheduler)
        hooks = [h for part in (model, bare(model)) for h in (part._forward_hooks, part._forward_pre_hooks)]
        return ours and not progress.callback and not any(hooks)

    def _watch(self, held: Held, model: nn.Module) -> None:
        """Notice what has replaced our processors, or the modules that have them."""
        layers, message = held.layers, held.displaced(model)
        if message is not None:
            if self._on_displaced == "raise":
                raise DisplacedProcessorError(message + "; negation would not be applied")
            log.warning("%s", message)
            if self._on_displaced == "reinstall":
                held.look(model)
                held.put()
        if held.layers is not layers:
            self._name_layers()


def _first(given: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((given[name] for name in names if name in given), None)


def _captures(running: Running) -> bool:
    """Whether a graph is captured: its layers always negate."""
    return running.call.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


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


def unconditional(progress: InProgress | None) -> bool:
    """Whether all rows are unconditional: pipelines may make a call of its own for those.

    Raises:
        UnsupportedModelError: the text is neither the prompt's alone nor the negative prompt's alone.
    """
    if progress is None:
        return False
    if progress.unconditional is None:
        raise UnsupportedModelError(
            f"cannot tell whether a call of the denoiser of {type(progress.pipe).__name__} is conditional: "
            "its text must be either the prompt_embeds of the pipeline's call or its negative_prompt_embeds"
        )
    return progress.unconditional
