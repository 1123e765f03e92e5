# SPDX-License-Identifier: Apache-2.0
"""The place where joint models call us: diffusers' attention dispatcher.

The model's own processors stay. They hand query, key and value to the dispatcher together with the name of a
backend, and of these names one is ours: what a processor says while an entry acts.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Hashable
from typing import Any

import torch
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor

from ....engine.engine import Engine
from ....engine.errors import NegationNotAppliedError, UnsupportedModelError
from ....engine.session.call import RUNNING
from .attention import attend
from .riders import Joint


class Seam:
    """Of one engine, while it is installed.

    Attributes:
        compiled: the call at work in compiled code, which knows no context; calls of it take turns.
    """

    def __init__(self) -> None:
        self.compiled: Joint | None = None

    @property
    def joint(self) -> Joint | None:
        """Of the denoiser call at hand, if concepts ride in it."""
        if torch.compiler.is_compiling():
            return self.compiled
        running = RUNNING.get()
        joint = None if running is None else running.joint
        return joint if isinstance(joint, Joint) and joint.seam is self else None


class Layer:
    """Of one attention module: what its processor is asked at each call.

    Attributes:
        name: of the module.
        chosen: the backend that the user has set (`set_attention_backend`), None for diffusers' own choice.
        partials, backend: what computes the attention to keys, and the rule.
    """

    def __init__(self, engine: Engine, seam: Seam, name: str, chosen: Any, backend: str) -> None:
        self.engine, self.seam, self.name, self.backend = engine, seam, name, backend
        self.chosen = chosen

    def riding(self) -> bool:
        """Whether concepts ride in the denoiser call at hand, so that its attention is ours.

        Raises:
            NegationNotAppliedError: no denoiser call of the engine is around this one (it got past the hook,
                or runs in a thread that does not know of it, where concepts may be in the text already), and
                somebody asks for negation, or may.
        """
        if torch.compiler.is_compiling():
            if not self.engine.fixed.ready:
                self._unprepared()
            traced.layer = self
            return self.seam.compiled is not None
        running = RUNNING.get()
        if running is None or running.engine is not self.engine:
            if self.engine.armed or self.engine.riding:
                self._unprepared()
            self.engine.check_spoken(self.engine.ledger())
            return False
        running.layer = self
        return running.joint is not None

    def _unprepared(self) -> None:
        raise NegationNotAppliedError(
            f"layer {self.name}: the denoiser runs without the hook that prepares its rows"
        )

    @property
    def partials(self) -> str:
        """By the user's choice, where that kernel tells its log-sum-exp."""
        return _PARTIALS.get(str(getattr(self.chosen, "value", self.chosen)), "auto")


# diffusers' names -> those of `partial_attention`.
_PARTIALS = {
    "flash": "flash_attn_2", "_flash_3": "flash_attn_3", "_native_flash": "flash", "_native_cudnn": "cudnn",
    "_native_efficient": "efficient", "flex": "flex", "sage": "sage",
}  # fmt: skip


class _Traced:
    """The layer whose processor was asked last, while code is traced: what follows is its attention."""

    layer: Layer | None = None


traced = _Traced()


def dispatched(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    """What the dispatcher calls by our name, with [B, S, H, D] each and a mask [B, 1, 1, S] or none.

    Raises:
        UnsupportedModelError: attention that is parallel, causal, dropped out or scaled.
        NegationNotAppliedError: lengths other than those of this denoiser call.
    """
    running = None if torch.compiler.is_compiling() else RUNNING.get()
    layer: Layer | None = traced.layer if running is None else running.layer
    joint = None if layer is None else layer.seam.joint
    if joint is None or layer is None:
        raise NegationNotAppliedError("joint attention outside of a denoiser call that was prepared")
    if _parallel_config is not None or is_causal or dropout_p or enable_gqa or scale:
        raise UnsupportedModelError("joint attention that is parallel, causal, dropped out or scaled")
    if running is not None and _skips_scores():  # each token is given its own value: there is no text in it
        running.negated = True
        return value
    layout = joint.layout
    if not query.shape[1] == key.shape[1] == layout.total:
        raise NegationNotAppliedError(
            f"layer {layer.name}: {query.shape[1]} queries, {key.shape[1]} keys are not the "
            f"{layout.prompt} prompt, {layout.riders} concept, {layout.image} image and {layout.beside} "
            "other tokens of this call"
        )
    mask = None if attn_mask is None else attn_mask[..., layout.parts.prompt]
    return attend(
        query, key, value, mask, joint, layer.engine, running,
        layer=layer.name, partials=layer.partials, backend=layer.backend,
    )  # fmt: skip


def _skips_scores() -> bool:
    """Whether a guider perturbs this attention, which it does where torch's own is called."""
    modes = torch.overrides._get_current_function_mode_stack()
    return any(isinstance(mode, AttentionScoreSkipFunctionMode) for mode in modes)


def _name() -> AttentionBackendName:
    """A name that diffusers' dispatcher takes for one of its own. Its names are a closed enumeration, but it
    looks at the type, and into tables."""
    made = str.__new__(AttentionBackendName, "fastnegate")
    made._name_ = made._value_ = "fastnegate"
    return made


SLOT = _name()
_SEAMS: weakref.WeakKeyDictionary[Engine, Seam] = weakref.WeakKeyDictionary()


def seam_of(engine: Engine) -> Seam:
    """The seam of an engine."""
    return _SEAMS.setdefault(engine, Seam())


def open_seam() -> None:
    """Make diffusers call us by our name.

    Raises:
        UnsupportedModelError: this diffusers has another dispatcher: it did not.
    """
    registry: Any = getattr(attention_dispatch, "_AttentionBackendRegistry", None)
    called: list[bool] = []

    def probe(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        called.append(True)
        return query

    try:
        if registry._backends.get(SLOT) is dispatched:
            return
        registry._constraints[SLOT] = []
        registry._supported_arg_names[SLOT] = set(registry._supported_arg_names[AttentionBackendName.NATIVE])
        registry._backends[SLOT] = probe
        one = torch.zeros(1, 1, 1, 8)
        dispatch_attention_fn(one, one, one, backend=SLOT)
        registry._backends[SLOT] = dispatched
    except Exception as error:
        raise UnsupportedModelError("diffusers' attention dispatcher is not one that is known") from error
    if not called:
        del registry._backends[SLOT]
        raise UnsupportedModelError("diffusers' attention dispatcher did not call the backend it was told")


# ---- processors -------------------------------------------------------------------------------------


def members(processor: type) -> dict[str, Any]:
    """What a class of processors needs so that `install` knows it. Its objects have a `_layer`, and the
    processor that was there before, of class `processor`, as `inner`."""

    def restored(self: Any, protocol: Any) -> Any:
        state = {name: item for name, item in self.__dict__.items() if name not in ("_layer", "inner")}
        return _plain, (processor, state, self._layer.chosen)

    return {
        "engine": property(lambda self: self._layer.engine),
        "layer": property(
            lambda self: self._layer.name, lambda self, name: setattr(self._layer, "name", name)
        ),
        "__reduce_ex__": restored,
        "__module__": processor.__module__,
    }


def _plain(processor: Any, state: dict[str, Any], chosen: Any) -> Any:
    """A copy of an installed processor is not installed."""
    made = processor.__new__(processor)
    made.__dict__.update(state)
    if hasattr(processor, "_attention_backend"):
        made._attention_backend = chosen
    return made


@functools.cache
def _negating(processor: Hashable) -> Any:
    """The processor's class, but for what it says about its backend."""

    def told(self: Any) -> Any:
        layer: Layer = self.__dict__["_layer"]
        return SLOT if layer.riding() else layer.chosen

    def choose(self: Any, backend: Any) -> None:
        self._layer.chosen = self.inner._attention_backend = backend

    assert isinstance(processor, type)
    names = {"_attention_backend": property(told, choose), **members(processor)}
    made = type(processor.__name__, (processor,), names)
    with contextlib.suppress(ValueError):  # where guiders look for the class; not all are there
        AttentionProcessorRegistry.register(made, AttentionProcessorRegistry.get(processor))
    return made


def negating(inner: Any, engine: Engine, name: str, backend: str) -> Any:
    """The processor with our backend in place of its own while an entry acts.

    Raises:
        UnsupportedModelError: it does not ask the dispatcher.
    """
    if not hasattr(type(inner), "_attention_backend"):
        raise UnsupportedModelError(f"processor {type(inner).__name__} of {name} asks no dispatcher")
    open_seam()
    of: Any = type(inner)
    kind = _negating(of)
    made = kind.__new__(kind)
    state = dict(inner.__dict__)
    chosen = state.pop("_attention_backend", type(inner)._attention_backend)
    made.__dict__.update(state, _layer=Layer(engine, seam_of(engine), name, chosen, backend), inner=inner)
    return made
