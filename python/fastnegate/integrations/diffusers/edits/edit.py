# SPDX-License-Identifier: Apache-2.0
"""`Edit`: what is on from a call on, and undone by leaving a `with`."""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from types import FrameType
from typing import Any

import diffusers.hooks.group_offloading as offloading
import torch
from torch import nn

from ....engine.errors import NegationNotAppliedError, UnsupportedModelError
from ....engine.session.call import RUNNING, Call, Running
from ..around import base_class, put_around, take_away
from ..by_hand import PROGRESS
from ..contract import InProgress, bare, cross_attention_layers, denoisers, family
from ..features.caches import remembering
from ..features.parallel import refuse
from ..hook import INSTALLED

# Whether the denoiser runs for a concept alone, which no other edit and no negation may touch.
ALONE: ContextVar[bool] = ContextVar("fastnegate_alone", default=False)


class Edit:
    """A method that is on in a pipeline, until `remove()`, or the end of a `with`.

    It composes with `negate`, `install` and other edits, put on before or after it. Undone, everything has
    the bits that it had before.

    Attributes:
        method: its name.
        extra_passes: rows of the denoiser per image and step that it adds to the pipeline's own.
    """

    extra_passes = 0

    def __init__(self, pipe: Any, method: str) -> None:
        self.pipe, self.method = pipe, method
        self.removed = False
        self._models = denoisers(pipe)

    def _put(self) -> None:
        put_around(self.pipe, self._generate)

    def remove(self) -> None:
        """Undo it. A second time does nothing."""
        if not self.removed:
            self._undo()
            take_away(self.pipe, self._generate)
            self.removed = True

    def _undo(self) -> None:
        raise NotImplementedError

    def _generate(
        self, pipe: Any, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType
    ) -> Any:
        """A call of the pipeline: its denoisers are still those that were edited."""
        for name, model in self._models.items():
            if bare(getattr(pipe, name)) is not bare(model):
                raise NegationNotAppliedError(
                    f"{self.method}: pipe.{name} is another model than the one that was edited"
                )
        return call(*args, **kwargs)

    def __enter__(self) -> Edit:
        if self.removed:
            raise NegationNotAppliedError(f"this {self.method} was removed: call it again")
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "removed" if self.removed else type(self.pipe).__name__
        return f"Edit({self.method}, {state}, {self.extra_passes} extra passes)"


class AroundDenoiser(Edit):
    """An edit that is at work in each call of a denoiser, and changes no weights."""

    def _put(self) -> None:
        super()._put()
        for model in self._models.values():
            put_around(model, self._denoise)

    def _undo(self) -> None:
        for model in self._models.values():
            take_away(model, self._denoise)

    def _generate(
        self, pipe: Any, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType
    ) -> Any:
        check_plain(pipe, self.method)  # it may have been compiled since
        return super()._generate(pipe, call, args, kwargs, frame)

    def _denoise(
        self, model: Any, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType
    ) -> Any:
        raise NotImplementedError

    def _arguments(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """What the denoiser is given, by name."""
        if torch.compiler.is_compiling():
            raise NegationNotAppliedError(f"{self.method} cannot be put into compiled code")
        _self, *names = inspect.signature(base_class(model).forward).parameters  # type: ignore[attr-defined]
        return {**dict(zip(names, args)), **kwargs}


def check_plain(pipe: Any, method: str) -> None:
    """Raise UnsupportedModelError where the denoisers are compiled, or cached from step to step (Python that
    is put around them, or between their layers, would be left out), or computed by several processes."""
    for attribute, model in denoisers(pipe).items():
        refuse(bare(model), cross_attention_layers(model).values(), method)
        compiled = model is not bare(model) or any("_compiled_call_impl" in vars(m) for m in model.modules())
        if compiled:
            raise UnsupportedModelError(f"{method} cannot be put into compiled code: pipe.{attribute}")
        for cache in remembering(bare(model)):
            raise UnsupportedModelError(f"{method} cannot be combined with {type(cache).__name__}")


def offloaded_by_groups(model: nn.Module) -> bool:
    """Whether weights come and go by groups, so that what is written into them would be lost."""
    return bool(offloading._is_group_offload_enabled(bare(model)))


def conditional_rows(progress: InProgress | None, pipe: Any, batch: int, method: str) -> list[bool]:
    """Which rows of a denoiser call have the prompt for a text.

    Raises:
        NegationNotAppliedError: no pipeline call is in progress, so nobody can tell, or the rows are no
            halves.
    """
    if progress is None or progress.unconditional is None:
        raise NegationNotAppliedError(
            f"{method}: cannot tell which rows are conditional outside a call of a pipeline"
        )
    if not (progress.own and progress.guided):
        return [not progress.unconditional] * batch
    if batch % 2:
        raise NegationNotAppliedError(f"{method}: {batch} rows are not [unconditional, conditional] halves")
    first = family(pipe).conditional_first
    return [first] * (batch // 2) + [not first] * (batch // 2)


def alone(model: Any, progress: InProgress, batch: int, device: Any, **given: Any) -> Any:
    """The model's own call with these arguments: nothing of this package acts in it. It is about a concept
    alone, so it is neither negated nor one of the steps of the pipeline that an engine counts."""
    reference = INSTALLED.get(bare(model))
    idle = Running(reference() if reference is not None else None, Call(batch, device, lambda: False))
    tokens = [(ALONE, ALONE.set(True)), (PROGRESS, PROGRESS.set(progress._replace(unconditional=True)))]
    tokens.append((RUNNING, RUNNING.set(idle)))
    try:
        return base_class(model).__call__(model, **given)  # type: ignore[operator]
    finally:
        for variable, token in reversed(tokens):
            variable.reset(token)
