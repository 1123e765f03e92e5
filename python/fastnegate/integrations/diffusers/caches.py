# SPDX-License-Identifier: Apache-2.0
"""Caches of diffusers (`enable_cache`), which reuse at a step what blocks or attention made at an earlier one.

They do not know that what acts may change from step to step. So whatever they kept while other entries acted,
or for somebody else, is forgotten before a call that would reuse it: a step that is negated is made of negated
parts alone, and the first one after a window of none.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any

from diffusers.hooks.first_block_cache import FBCHeadBlockHook
from diffusers.hooks.mag_cache import MagCacheHeadHook
from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastHook
from diffusers.hooks.taylorseer_cache import TaylorSeerCacheHook
from torch import nn

from ...engine.errors import UnsupportedModelError
from ...engine.session.call import Running


def _forget_all(hook: Any) -> None:
    hook.state_manager._state_cache.pop(_context(hook), None)


def _forget_residual(hook: Any) -> None:
    """What else it has counts steps."""
    state = hook.state_manager._state_cache.get(_context(hook))
    if state is not None:
        state.previous_residual = None


def _forget_output(hook: Any) -> None:
    hook.state.cache = None


_FORGET: dict[type, Callable[[Any], None]] = {
    FBCHeadBlockHook: _forget_all,
    TaylorSeerCacheHook: _forget_all,
    MagCacheHeadHook: _forget_residual,
    PyramidAttentionBroadcastHook: _forget_output,
}


class Caches:
    """Those of one denoiser, and what acted when they were last used."""

    def __init__(self) -> None:
        self._last: weakref.WeakKeyDictionary[Any, dict[Hashable, Any]] = weakref.WeakKeyDictionary()
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
        acting = None
        if running.asks and running.rows is not None:
            rows = running.rows
            acting = running.call.of, rows.assignment, rows.slots, rows.requests, running.active
        for hook in self._found(model, running):
            if running.asks:
                check(hook)
            last = self._last.setdefault(hook, {})
            context = _context(hook)
            if last.get(context) != acting and type(hook) in _FORGET:
                _FORGET[type(hook)](hook)
            last[context] = acting

    def _found(self, model: nn.Module, running: Running) -> list[Any]:
        """All modules are looked at once per pipeline call, and where a cache was switched on or off."""
        of, config = running.call.of, getattr(model, "_cache_config", None)
        if self._of is not of or self._config is not config:
            self._of, self._config = of, config
            self._hooks = [hook for module in model.modules() for hook in stateful(module)]
        return self._hooks


def stateful(module: nn.Module) -> list[Any]:
    """Hooks of one module that remember something from call to call."""
    registry = vars(module).get("_diffusers_hook")
    return [] if registry is None else [hook for hook in registry.hooks.values() if hook._is_stateful]


def check(hook: Any) -> None:
    """Raise UnsupportedModelError for a cache that is not known: it may leave out rows (FasterCache drops the
    unconditional ones within the model), or keep what belongs to a prompt alone."""
    if type(hook) not in _FORGET:
        raise UnsupportedModelError(
            f"{type(hook).__name__} cannot be combined with negation: caches that can are First-Block, "
            "MagCache, TaylorSeer and Pyramid Attention Broadcast; call disable_cache()"
        )


def _context(hook: Any) -> Hashable:
    """Of the denoiser call, as the pipeline names it: caches keep conditional and unconditional ones apart."""
    context = getattr(getattr(hook, "state_manager", None), "_context", None)
    return "inference" if context is None else context.name  # MagCache's own name for none
