# SPDX-License-Identifier: Apache-2.0
"""Caches of diffusers (`enable_cache`), and cache-dit's: at a step they reuse what blocks, or attention, made
at another.

They do not know that what acts changes from step to step, and from call to call. So what they kept while
other entries acted is forgotten before a denoiser call that would reuse it: a step that is negated is made of
negated parts alone, and one that is not has none of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from diffusers.hooks.first_block_cache import FBCHeadBlockHook
from diffusers.hooks.mag_cache import MagCacheHeadHook
from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastHook
from diffusers.hooks.taylorseer_cache import TaylorSeerCacheHook
from torch import nn

from ....engine.errors import UnsupportedModelError
from ....engine.session.call import PipelineCall, Running
from .cache_dit import CacheDitContext, contexts


def _forget_everything(hook: Any) -> None:
    if isinstance(hook, CacheDitContext):
        hook.forget()
        return
    manager = getattr(hook, "state_manager", None)
    if manager is None:
        hook.state.reset()
    else:
        manager._state_cache.pop(_context(hook), None)


def _forget_residual(hook: Any) -> None:
    state = hook.state_manager._state_cache.get(_context(hook))
    if state is not None:
        state.previous_residual = None


def _forget_output(hook: Any) -> None:
    hook.state.cache = None


# What is done within a pipeline call; MagCache and Pyramid Attention Broadcast count its steps, too.
_FORGET: dict[type, Callable[[Any], None]] = {
    FBCHeadBlockHook: _forget_everything,
    TaylorSeerCacheHook: _forget_everything,
    CacheDitContext: _forget_everything,
    MagCacheHeadHook: _forget_residual,
    PyramidAttentionBroadcastHook: _forget_output,
}


class Acting(NamedTuple):
    """Whom a denoiser call is for, and what acts in it."""

    of: PipelineCall | None
    rows: tuple[Any, ...]


_NOTHING = Acting(None, ())


class Caches:
    """Those of one denoiser, and what acted when they were last used."""

    def __init__(self) -> None:
        self._last: weakref.WeakKeyDictionary[Any, dict[str, Acting]] = weakref.WeakKeyDictionary()
        self._of: Any = None
        self._config: Any = None
        self._hooks: list[Any] = []

    def heed(self, model: nn.Module, running: Running) -> None:
        """Before a call of the denoiser.

        Raises:
            UnsupportedModelError: the call is to be negated, and there is a cache whose state cannot be told.
        """
        if not running.asks and not self._last:
            return
        acting, rows = _NOTHING, running.rows
        if running.asks and rows is not None:
            acting = Acting(running.call.of, (rows.assignment, rows.slots, rows.requests, running.active))
        for hook in self._found(model, running):
            if running.asks:
                check(hook)
            contexts, context = self._last.setdefault(hook, {}), _context(hook)
            last, contexts[context] = contexts.get(context, _NOTHING), acting
            if type(hook) not in _FORGET:
                continue
            if last.of is not acting.of:  # diffusers does it at the end of a call, unless that has failed
                _forget_everything(hook)
            elif last.rows != acting.rows:
                _FORGET[type(hook)](hook)

    def _found(self, model: nn.Module, running: Running) -> list[Any]:
        """All modules are looked at once per pipeline call, and where a cache was switched on or off."""
        of, config = running.call.of, getattr(model, "_cache_config", None)
        if self._of is not of or self._config is not config:
            self._of, self._config = of, config
            self._hooks = remembering(model)
        return self._hooks


def remembering(model: nn.Module) -> list[Any]:
    """What in a model, or around it, remembers something from call to call."""
    return [*contexts(model), *(hook for module in model.modules() for hook in stateful(module))]


def stateful(module: nn.Module) -> list[Any]:
    """Hooks of one module that do."""
    registry = vars(module).get("_diffusers_hook")
    return [] if registry is None else [hook for hook in registry.hooks.values() if hook._is_stateful]


def check(hook: Any) -> None:
    """Raise UnsupportedModelError for a cache that is not known: it may leave out rows (FasterCache drops the
    unconditional ones within the model), or keep what belongs to a prompt alone."""
    if isinstance(hook, CacheDitContext):
        hook.check()
    elif type(hook) not in _FORGET:
        raise UnsupportedModelError(
            f"{type(hook).__name__} cannot be combined with negation: caches that can are First-Block, "
            "MagCache, TaylorSeer and Pyramid Attention Broadcast; call disable_cache()"
        )


def _context(hook: Any) -> str:
    """Of the denoiser call, as its pipeline names it: conditional and unconditional ones are kept apart."""
    if isinstance(hook, CacheDitContext):
        return hook.part
    manager = getattr(hook, "state_manager", None)
    # Before diffusers 0.42 a context was its name.
    context = getattr(manager, "_context", getattr(manager, "_current_context", None))
    name: str = "inference" if context is None else getattr(context, "name", context)  # MagCache's for none
    return name
