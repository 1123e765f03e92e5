# SPDX-License-Identifier: Apache-2.0
"""The watchdog of processors that are set with `set_attn_processor` rather than `install`.

A processor is told neither that it is set nor that it is displaced. So `Attention.set_processor` notes where
one of ours comes to be, and each call of that model checks that it is still there.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from types import FrameType
from typing import Any

import torch
from diffusers.models.attention_processor import (
    Attention,
    IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0,
    IPAdapterXFormersAttnProcessor,
    SanaLinearAttnProcessor2_0,
)
from torch import Tensor, nn

from ...engine.bank import ConceptBank
from ...engine.errors import DisplacedProcessorError, NegationNotAppliedError, UnsupportedModelError
from ...engine.session.call import direction_of
from ...engine.session.slots import Slots
from ...operator.rule import Rule, check_number
from ...operator.tokens import ConceptTokens
from .around import put_around, take_away
from .contract import InProgress, bare, denoisers, in_progress, project_for
from .features.caches import check, stateful
from .features.parallel import refuse
from .layers.places import Places

_ADAPTERS = (IPAdapterAttnProcessor, IPAdapterAttnProcessor2_0, IPAdapterXFormersAttnProcessor)
# The pipeline call that a watched model is called in.
PROGRESS: ContextVar[InProgress | None] = ContextVar("fastnegate_by_hand", default=None)


class Watch:
    """The layers of one model that have processors of ours, with what each had before."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._layers: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Any]] = weakref.WeakKeyDictionary()
        self._count = 0  # layers that were freed before the first call are gone, too
        self._places: Places | None = None  # of the layers, from the first call on

    def __call__(
        self,
        thing: Any,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        frame: FrameType,
    ) -> Any:
        displaced = [ours for attn, (ours, _) in self._layers.items() if attn.processor is not ours]
        if displaced or (not torch.compiler.is_compiling() and self._gone()):
            raise DisplacedProcessorError(
                f"{max(len(displaced), 1)} attention processors, or modules, that fastnegate was set on by "
                "hand were replaced; negation would not be applied. If that was meant, take it out with "
                "fastnegate.remove(pipe)"
            )
        if torch.compiler.is_compiling():
            return call(*args, **kwargs)
        refuse(bare(thing), self._layers, "processors set by hand")
        for hook in stateful(bare(thing)):
            check(hook)  # it may hand on other rows than it gets
        before = PROGRESS.set(in_progress(thing, frame))
        try:
            return call(*args, **kwargs)
        finally:
            PROGRESS.reset(before)

    def add(self, attn: nn.Module, processor: Any, before: Any) -> None:
        known = self._layers.get(attn)
        self._layers[attn] = (processor, before if known is None else known[1])
        self._count, self._places = len(self._layers), None

    def restored(self, attn: nn.Module, processor: Any) -> bool:
        """Whether `processor` is what the layer had before ours: that is how one takes ours out."""
        if self._layers[attn][1] is not processor:
            return False
        del self._layers[attn]
        _of_layer.pop(attn, None)
        self._count, self._places = len(self._layers), None
        return True

    def release(self) -> None:
        """Put back what was there; what somebody else has put in our place stays theirs."""
        for attn, (ours, before) in list(self._layers.items()):
            if attn.processor is ours:
                attn.set_processor(before)  # type: ignore[operator]
            _of_layer.pop(attn, None)
        self._layers.clear()
        self._count = 0

    def _gone(self) -> bool:
        """Whether a layer is no longer part of the model."""
        model = self._model()
        assert model is not None
        if self._places is None:
            names = {id(module): name for name, module in model.named_modules()}
            if len(self._layers) < self._count or any(id(attn) not in names for attn in self._layers):
                return True
            self._places = Places(model, [names[id(attn)] for attn in self._layers])
        return self._places.changed


_watches: weakref.WeakKeyDictionary[nn.Module, Watch] = weakref.WeakKeyDictionary()  # by model
_names: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()  # of modules in their model
_of_layer: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()


def release(model: nn.Module) -> None:
    """Take processors that were set by hand out of a model."""
    watch = _watches.pop(model, None)
    if watch is not None:
        watch.release()
        take_away(model, watch)
    for module in model.modules():  # of a copy nobody knows what was there before
        processor = getattr(module, "processor", None)
        if getattr(processor, "by_hand", False):
            module.set_processor(processor.inner)  # type: ignore[operator, union-attr]


def model_of(attn: nn.Module, pipe: Any) -> Any:
    """The model of a layer: where its processor was set, or the denoiser of `pipe`; else None."""
    known = _of_layer.get(attn)
    if known is None and pipe is not None:
        for model in map(bare, denoisers(pipe).values()):
            if any(module is attn for module in model.modules()):
                return model
    return None if known is None else known()


def called(attn: Any, processor: Any) -> None:
    """A processor of ours runs: where it was put into the layer without `set_attn_processor`, this is when
    its model is found, on the stack."""
    if attn in _of_layer:
        return
    frame, model = sys._getframe(1), None
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and hasattr(module, "attn_processors"):
            model = module
        frame = frame.f_back  # type: ignore[assignment]
    if model is not None:
        _watch(model, attn, processor, processor.inner)


class Concepts:
    """What a processor negates that was made by hand: all of its bank, in every conditional row.

    Raises:
        ValueError: unknown concept or strength.
    """

    def __init__(self, bank: ConceptBank, rule: Rule, strengths: Mapping[str, float] | None) -> None:
        self._bank, self._rule = bank, rule
        self._strengths = None if strengths is None else dict(strengths)
        for name, strength in (self._strengths or {}).items():
            bank[name]
            check_number(f"strength of {name!r}", strength, low=0.0)
        self._look()

    def _look(self) -> None:
        if self._rule.reads.direction and (pipe := self._bank.pipe) is not None:
            self._bank.check(pipe)  # another denoiser's directions would steer elsewhere
        self._slots = Slots(self._bank.snapshot(), self._rule, self._bank.width)

    def context(self, attn: Any, query: Tensor) -> Tensor:
        """The bank as it is now, [1, T, C] as the layer receives text."""
        if self._slots.bank is not self._bank.snapshot():
            self._look()
        embeddings = self._slots.embeddings.to(device=query.device, dtype=query.dtype).unsqueeze(0)
        return project_for(model_of(attn, self._bank.pipe), embeddings)

    def tokens(self, attn: Any, key: Tensor, value: Tensor, conditional: Sequence[bool]) -> ConceptTokens:
        """Of the layer `attn`, from keys and values [T, H, D] of the context."""
        given, slots = self._strengths, self._slots.slots
        for name in given or ():
            if name not in self._bank:
                raise NegationNotAppliedError(f"concept {name!r} was removed from the bank")
        strengths = [1.0 if given is None else given.get(slot.concept, 0.0) for slot in slots]
        entries = [
            {"concept": i, "strength": relative * self._rule.strength}
            for i, relative in enumerate(strengths)
            if relative and i != self._slots.neutral
        ]
        spans = [slice(slot.begin, slot.begin + slot.length) for slot in slots]
        return ConceptTokens.pack(
            [key[span] for span in spans],
            [value[span] for span in spans],
            [entries if negated else [] for negated in conditional],
            token_weight=self._slots.weight,
            direction=self._direction(attn, key.device),
            neutral=self._slots.neutral,
        )

    def _direction(self, attn: Any, device: torch.device) -> Tensor | None:
        """[slots, H, D] where the rule reads one: the processor is not told which layer it is in."""
        directions = self._slots.directions_on(device)
        if not directions:
            return None
        if attn not in _names and (model := model_of(attn, self._bank.pipe)) is not None:
            _names.update({module: name for name, module in model.named_modules()})
        return direction_of(directions, _names.get(attn, f"of no known model ({type(attn).__name__})"))


def conditional_rows(processor: Any, attn: Any, batch: int) -> list[bool]:
    """Which of the rows at hand a processor negates.

    Raises:
        ValueError: it was told of another number of rows.
        NegationNotAppliedError: it was told of none, and no pipeline call is in progress that can tell.
    """
    if processor.conditional == "all":
        return [True] * batch
    if processor.conditional is not None:
        rows = [bool(c) for c in processor.conditional]
        if len(rows) != batch:
            raise ValueError(f"conditional has {len(rows)} rows, the batch has {batch}")
        return rows
    pipe = processor.bank.pipe if processor.bank is not None else None
    progress = PROGRESS.get()
    if progress is None and (around := in_progress(model_of(attn, pipe), sys._getframe(1))):
        progress = around._replace(own=True)  # who calls a model that is not watched is not known
    if progress is None:
        raise NegationNotAppliedError(
            "cannot tell which batch rows are conditional outside a pipeline call: pass conditional="
        )
    if progress.unconditional or not (progress.own and progress.guided):
        return [not progress.unconditional] * batch
    if batch % 2:
        raise NegationNotAppliedError(f"{batch} rows are not [unconditional, conditional] halves")
    return [False] * (batch // 2) + [True] * (batch // 2)


def watch_processors() -> None:
    """Have `Attention.set_processor` tell us."""
    set_processor = Attention.set_processor

    @functools.wraps(set_processor)
    def told(attn: Any, processor: Any, *args: Any, **kwargs: Any) -> None:
        before = getattr(attn, "processor", None)
        if getattr(processor, "by_hand", False):
            _check_place(processor, before)
        set_processor(attn, processor, *args, **kwargs)
        _was_set(attn, processor, before)

    Attention.set_processor = told


def _check_place(processor: Any, before: Any) -> None:
    """Raise UnsupportedModelError where a processor of ours would drop what is computed `before` it."""
    lost = "linear attention" if isinstance(before, SanaLinearAttnProcessor2_0) else None
    if isinstance(before, _ADAPTERS) and not isinstance(processor, _ADAPTERS):
        lost = "an IP-Adapter's (wrap that, layer by layer: inner=)"
    if lost is not None:
        raise UnsupportedModelError(
            f"a NegationAttnProcessor set by hand would take the place of {lost}: use fastnegate.install or "
            "fastnegate.negate"
        )


def _was_set(attn: Any, processor: Any, before: Any) -> None:
    if getattr(processor, "by_hand", False):
        model = _model_above(attn)
        if model is not None:
            _watch(model, attn, processor, before)
        return
    for model, watch in list(_watches.items()):
        if attn in watch._layers and watch.restored(attn, processor) and not watch._layers:
            del _watches[model]
            take_away(model, watch)


def _watch(model: nn.Module, attn: Any, processor: Any, before: Any) -> None:
    refuse(model, [attn], "processors set by hand")
    watch = _watches.get(model)
    if watch is None:
        watch = _watches[model] = Watch(model)
        put_around(model, watch)
    watch.add(attn, processor, before)
    _of_layer[attn] = weakref.ref(model)


def _model_above(attn: Any) -> Any:
    """The model whose `set_attn_processor` is at work on the stack, around this layer."""
    frame: FrameType | None = sys._getframe(1)
    found = None
    while frame is not None:
        model = frame.f_locals.get("self")
        if frame.f_code.co_name == "set_attn_processor" and isinstance(model, nn.Module):
            found = model if any(module is attn for module in model.modules()) else found
        frame = frame.f_back
    return found
