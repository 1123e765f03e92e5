# SPDX-License-Identifier: Apache-2.0
"""Put an `Engine` into a pipeline and take it out again: processors, a hook on the denoiser that
prepares each call, and a watchdog that notices displaced processors."""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...engine.bank import ConceptBank
from ...engine.concepts import Templates
from ...engine.engine import Engine
from ...engine.errors import DisplacedProcessorError, NegationNotAppliedError
from ...engine.policy import Policy
from ...operator.attention import check_backend
from ...operator.rule import Rule
from .families import (
    call_in_progress,
    cross_attention_layers,
    denoiser,
    family,
    guided,
    project_context,
)
from .processor import NegationAttnProcessor

log = logging.getLogger("fastnegate")
MOST_IMAGES = 64  # of one call under `negate`, which is not told how many there will be
ON_DISPLACED = ("raise", "warn", "reinstall")

# Weak on both sides: the processors on the model own the engine.
_installed: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Engine]] = weakref.WeakKeyDictionary()


def engine_of(pipe: Any) -> Engine | None:
    """The engine installed in the pipeline, or None."""
    reference = _installed.get(_bare(denoiser(pipe)))
    return reference() if reference is not None else None


def processors_for(pipe: Any, engine: Engine, backend: str = "auto") -> dict[str, Any]:
    """A complete dict for `set_attn_processor`: cross-attention layers wrapped, the rest as it is.

    Raises:
        UnsupportedModelError: a layer has a processor that cannot be wrapped.
    """
    processors = dict(_bare(denoiser(pipe)).attn_processors)
    for name, layer in engine.layers.items():
        key = f"{name}.processor"
        processors[key] = NegationAttnProcessor.bound(engine, layer, processors[key], backend)
    return processors


def install(
    pipe: Any,
    bank: ConceptBank,
    max_batch: int = 8,
    on_displaced: str = "raise",
    *,
    rule: Rule | str = "protore",
    backend: str = "auto",
) -> Engine:
    """Install per-request concept negation in a pipeline.

    Compile the denoiser before, not after: the hook must stay outside the compiled code.

    Args:
        pipe: a supported diffusers pipeline.
        bank: concepts made with this pipeline's text encoders.
        max_batch: the most images (requests x images per prompt) in one call.
        on_displaced: what to do when something else has replaced an installed processor: `raise`
            (default), `warn`, or `reinstall`.
        rule: `Rule` or preset name; presets take the constants of the pipeline's family.
        backend: as for `negated_attention`; a named backend never falls back.

    Returns:
        The engine: `with engine.batch(policies): pipe(prompts)`, and `engine.remove()`.

    Raises:
        UnsupportedModelError: unknown pipeline, or a processor that cannot be wrapped.
        BankMismatchError: the bank belongs to another text encoder.
        ValueError: bad arguments, an empty bank, or an engine is installed already.
    """
    if on_displaced not in ON_DISPLACED:
        raise ValueError(f"on_displaced={on_displaced!r}: allowed are {', '.join(ON_DISPLACED)}")
    if not isinstance(bank, ConceptBank):
        raise TypeError(f"bank is a {type(bank).__name__}: must be a ConceptBank")
    check_backend(backend)
    entry = family(pipe)
    model = denoiser(pipe)
    if engine_of(pipe) is not None:
        raise ValueError("pipe has an engine already: call its remove() first")
    bank.check(pipe)
    if isinstance(rule, str):
        rule = Rule.preset(rule, family=entry.constants(pipe))
    if not isinstance(rule, Rule):
        raise TypeError(f"rule is a {type(rule).__name__}: must be a Rule or the name of a preset")
    layers = cross_attention_layers(model)
    engine = Engine(bank, rule, list(layers), max_batch=max_batch)
    bare = _bare(model)
    before = dict(bare.attn_processors)
    processors = processors_for(pipe, engine, backend)
    hook = _Hook(pipe, engine, layers, processors, on_displaced)

    bare.set_attn_processor(dict(processors))
    handles = [
        model.register_forward_pre_hook(hook.before, with_kwargs=True),
        model.register_forward_hook(hook.after, always_call=True),
    ]
    _installed[bare] = weakref.ref(engine)

    def remove() -> None:
        for handle in handles:
            handle.remove()
        current = dict(bare.attn_processors)
        # What somebody else has put in our place stays theirs.
        bare.set_attn_processor(
            {n: before[n] if current[n] is processors.get(n) else current[n] for n in current}
        )
        del _installed[bare]

    engine.on_remove(remove)
    return engine


class _Hook:
    """Runs around each call of the denoiser, outside compiled code."""

    def __init__(
        self,
        pipe: Any,
        engine: Engine,
        layers: Mapping[str, Any],
        processors: Mapping[str, Any],
        on_displaced: str,
    ) -> None:
        self._pipe = weakref.ref(pipe)
        self._engine, self._layers, self._processors = engine, layers, processors
        self._on_displaced = on_displaced
        self._parameters = list(inspect.signature(_bare(denoiser(pipe)).forward).parameters)
        self._compiled = hasattr(denoiser(pipe), "_orig_mod")
        self._timesteps: Tensor | None = None
        self._steps: list[float] = []
        self._last_step: int | None = None
        self._filled: object = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            raise NegationNotAppliedError("compile the denoiser before fastnegate.install, not after")
        self._watch()
        engine = self._engine
        if not engine.armed and not self._compiled:
            return  # nothing is prepared, so every processor leaves the call to what it wraps
        given = {**dict(zip(self._parameters, args)), **kwargs}
        sample: Any = given.get("sample", given.get("hidden_states"))
        step, steps = self._step(given["timestep"]) if engine.armed else (None, 0)
        new_call = step is None or self._last_step is None or step <= self._last_step
        self._last_step = engine.step = step
        if engine.armed:
            engine.call += new_call
            if (call := call_in_progress(self._living_pipe())) is not None:
                engine.expect(call.prompts)
        progress = None if step is None else step / steps
        wanted = engine.prepare(sample.shape[0], sample.device, self._guided, progress)
        state = (engine.bank.version, sample.device, sample.dtype)
        if self._filled is None or (wanted and (new_call or state != self._filled)):
            self._fill(sample)
            self._filled = state
        engine.begin_call(sample.shape[0])

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        self._engine.end_call()

    def __getstate__(self) -> dict[str, Any]:  # a copy of the model does not belong to the pipeline
        return {**self.__dict__, "_pipe": _gone}

    def _living_pipe(self) -> Any:
        pipe = self._pipe()
        if pipe is None:
            raise NegationNotAppliedError("the pipeline that the engine was installed in is gone")
        return pipe

    def _guided(self) -> bool:
        return guided(self._living_pipe())

    def _fill(self, sample: Tensor) -> None:
        """Project concept keys and values, once per pipeline call."""
        pipe = self._living_pipe()
        with torch.no_grad():
            model = _bare(denoiser(pipe))
            if hasattr(model, "_hf_hook"):  # offloading brings the weights in, as it would next
                model._hf_hook.pre_forward(model)
            context = self._engine.embeddings.to(device=sample.device, dtype=model.dtype)
            context = project_context(pipe, context).unsqueeze(0)
            for name, layer in self._engine.layers.items():
                attn, processor = self._layers[name], self._processors[f"{name}.processor"]
                key, value = processor.project(attn, context)
                layer.fill(key[0].transpose(0, 1), value[0].transpose(0, 1))

    def _step(self, timestep: Any) -> tuple[int | None, int]:
        """Step i of n, from the scheduler's timesteps; i is None for a timestep it does not have.

        Steps grow within a pipeline call, so one that does not starts a new call. Reading the timestep
        costs one synchronization, which the host needs to know whether any entry is live. Rows at
        different timesteps have no common step.
        """
        timesteps = self._living_pipe().scheduler.timesteps
        if timesteps is not self._timesteps:
            self._timesteps, self._steps = timesteps, timesteps.tolist()
        rows = set(timestep.flatten().tolist()) if isinstance(timestep, Tensor) else {timestep}
        t = rows.pop()
        return (self._steps.index(t) if not rows and t in self._steps else None), len(self._steps)

    def _watch(self) -> None:
        """Notice processors that something else has replaced (slicing, IP-Adapter, fused QKV, ...)."""
        displaced = [
            name
            for name, attn in self._layers.items()
            if attn.processor is not self._processors[f"{name}.processor"]
        ]
        if not displaced:
            return
        found = type(self._layers[displaced[0]].processor).__name__
        message = (
            f"{len(displaced)} of {len(self._layers)} processors were replaced, "
            f"e.g. {displaced[0]} by {found}"
        )
        if self._on_displaced == "raise":
            raise DisplacedProcessorError(message + "; negation would not be applied")
        log.warning("%s", message)
        if self._on_displaced == "reinstall":
            for name in displaced:
                self._layers[name].set_processor(self._processors[f"{name}.processor"])


class Handle:
    """What `negate` returns: a context manager, and `remove()` for use without `with`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def remove(self) -> None:
        """Restore exactly what was there."""
        self.engine.remove()

    def __enter__(self) -> Handle:
        if self.engine.removed:
            raise NegationNotAppliedError("this handle was removed: call negate again")
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def negate(
    pipe: Any,
    concepts: str | Sequence[str] | Mapping[str, str | Sequence[str]] | ConceptBank,
    method: Rule | str = "protore",
    strength: float = 1.0,
    start: float = 0.0,
    stop: float | None = None,
    *,
    templates: Templates | None = None,
    backend: str = "auto",
) -> Handle:
    """Negate concepts in every call of a pipeline, until removed.

    Args:
        pipe: a supported diffusers pipeline.
        concepts: a phrase, several (each its own concept), a mapping from names to member phrases,
            or a `ConceptBank`.
        method: `Rule` or preset name.
        strength: relative; 1.0 is the method's own.
        start, stop: active window as fractions of the steps; `stop=None` is the method's own.
        templates: as for `ConceptBank.from_prompts`.
        backend: as for `negated_attention`.

    Raises:
        UnsupportedModelError, BankMismatchError, ValueError: as `install`.
    """
    check_backend(backend)
    if isinstance(method, str):
        method = Rule.preset(method, family=family(pipe).constants(pipe))
    if isinstance(concepts, ConceptBank):
        bank = concepts
    else:
        if isinstance(concepts, str):
            concepts = [concepts]
        named = concepts if isinstance(concepts, Mapping) else {c: [c] for c in concepts}
        Policy({name: strength for name in named}, start, stop).check(method)  # before any work
        bank = ConceptBank.from_prompts(pipe, named, templates=templates, called="concepts")
    policy = Policy({name: strength for name in bank}, start, stop)
    policy.check(method)
    engine = install(pipe, bank, MOST_IMAGES, rule=method, backend=backend)
    engine.set_requests([policy])
    return Handle(engine)


def _gone() -> None:
    """A dead reference that pickles."""


def _bare(model: Any) -> Any:
    return getattr(model, "_orig_mod", model)
