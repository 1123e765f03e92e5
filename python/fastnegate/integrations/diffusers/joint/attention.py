# SPDX-License-Identifier: Apache-2.0
"""The attention function of joint models, and the place where diffusers calls it.

The model's own processors stay. They hand query, key and value to diffusers' dispatcher together with the
name of a backend, and of these names one is ours: what a processor says while an entry acts.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor

from ....engine.engine import Engine
from ....engine.errors import NegationNotAppliedError, UnsupportedModelError
from ....engine.session.call import RUNNING, Running
from ....operator.attention import negated_attention, negated_attention_with_statistics
from ....operator.partials import partial_attention
from ....operator.problem import Partial
from .riders import Layout, Riders


class Joint(NamedTuple):
    """What the layers of one denoiser call need to know; `Running.joint`."""

    layout: Layout
    riders: Riders
    numbers: Tensor


def attend(
    query: Tensor, key: Tensor, value: Tensor, joint: Joint, engine: Engine, running: Running, layer: Layer
) -> Tensor:
    """Attention of the joint sequence, [B, S, H, D] each: image queries by the rule, the prompt without
    concepts, riders to the image and to their own entry."""
    prompt, riders, image = joint.layout.spans
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))  # views [B, H, S, D]
    out = torch.empty_like(query)
    chosen, backend = layer.partials, layer.backend
    seen = partial_attention(
        q, k[:, :, image], v[:, :, image], backend=chosen
    )  # for prompt and concepts alike
    told = partial_attention(q, k[:, :, prompt], v[:, :, prompt], backend=chosen)
    # Few tokens, and masked, which not every kernel that the user may choose can do.
    between = joint.riders.bias
    own = partial_attention(q[:, :, riders], k[:, :, riders], v[:, :, riders], key_bias=between)

    def write(of: slice, attended: Tensor) -> None:
        out[:, of] = attended.transpose(1, 2)

    for of, text in ((prompt, _part(told, prompt)), (riders, own)):
        shared = _part(seen, of)
        write(of, negated_attention(q[:, :, of], None, None, shared=shared, prompt=text, backend=backend))
    tokens = joint.riders.tokens(key[:, riders], value[:, riders], joint.numbers)
    running.negated = True
    watched = running.sampled or running.observed
    shared, text = _part(seen, image), _part(told, image)
    if not watched:
        write(image, negated_attention(
            q[:, :, image], None, None, tokens, engine.rule, shared=shared, prompt=text, backend=backend
        ))  # fmt: skip
        return out
    guided, statistics = negated_attention_with_statistics(
        q[:, :, image], None, None, tokens, engine.rule, shared=shared, prompt=text, backend=backend
    )
    write(image, guided)
    engine.observe(running, layer.name, statistics)
    return out


def _part(partial: Partial, of: slice) -> Partial:
    return Partial(partial.out[:, :, of], partial.lse[:, :, of])


# ---- the seam ---------------------------------------------------------------------------------------


class Layer:
    """Of one attention module: what its processor is asked at each call.

    Attributes:
        name: of the module.
        chosen: the backend that the user has set (`set_attention_backend`), None for diffusers' own choice.
        partials, backend: what computes the attention to keys, and the rule.
    """

    def __init__(self, engine: Engine, name: str, chosen: Any, backend: str) -> None:
        self.engine, self.name, self.chosen, self.backend = engine, name, chosen, backend

    def check_unprepared(self) -> None:
        """No denoiser call of the engine is around this one: it got past the hook, or runs in a thread that
        does not know of it, where concepts may be in the text already.

        Raises:
            NegationNotAppliedError: somebody asks for negation, or may.
        """
        if self.engine.armed or self.engine.riding:
            raise NegationNotAppliedError(
                f"layer {self.name}: the denoiser runs without the hook that prepares its rows"
            )
        self.engine.check_spoken(self.engine.ledger())

    @property
    def partials(self) -> str:
        """By the user's choice, where that kernel tells its log-sum-exp."""
        return _PARTIALS.get(str(getattr(self.chosen, "value", self.chosen)), "auto")


# diffusers' names -> those of `partial_attention`.
_PARTIALS = {
    "flash": "flash_attn_2", "_flash_3": "flash_attn_3", "_native_flash": "flash", "_native_cudnn": "cudnn",
    "_native_efficient": "efficient", "flex": "flex", "sage": "sage",
}  # fmt: skip


def _slot() -> AttentionBackendName:
    """A name that diffusers' dispatcher takes for one of its own. Its names are a closed enumeration, but it
    looks at the type, and into tables."""
    made = str.__new__(AttentionBackendName, "fastnegate")
    made._name_ = made._value_ = "fastnegate"
    return made


SLOT = _slot()


def _backend(
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
    """What the dispatcher calls by our name."""
    running = RUNNING.get()
    joint = None if running is None else running.joint
    if running is None or joint is None:
        raise NegationNotAppliedError("joint attention outside of a denoiser call that was prepared")
    if attn_mask is not None or _parallel_config is not None or is_causal or dropout_p or enable_gqa or scale:
        raise UnsupportedModelError("joint attention that is masked, parallel, causal, dropped out or scaled")
    layer: Layer = running.layer
    layout = joint.layout
    if query.shape[1] == key.shape[1] == sum(layout):
        return attend(query, key, value, joint, layer.engine, running, layer)
    raise NegationNotAppliedError(
        f"layer {layer.name}: {query.shape[1]} queries, {key.shape[1]} keys are not the {layout.prompt} "
        f"prompt, {layout.riders} concept and {layout.image} image tokens of this call"
    )


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
        if registry._backends.get(SLOT) is _backend:
            return
        registry._constraints[SLOT] = []
        registry._supported_arg_names[SLOT] = set(registry._supported_arg_names[AttentionBackendName.NATIVE])
        registry._backends[SLOT] = probe
        one = torch.zeros(1, 1, 1, 8)
        dispatch_attention_fn(one, one, one, backend=SLOT)
        registry._backends[SLOT] = _backend
    except Exception as error:
        raise UnsupportedModelError("diffusers' attention dispatcher is not one that is known") from error
    if not called:
        del registry._backends[SLOT]
        raise UnsupportedModelError("diffusers' attention dispatcher did not call the backend it was told")


@functools.cache
def _negating(processor: Hashable) -> Any:
    """The processor's class, but for what it says about its backend."""

    def told(self: Any) -> Any:
        layer: Layer = self.__dict__["_layer"]
        if torch.compiler.is_compiling():
            return layer.chosen  # the hook refuses to negate what is compiled
        running = RUNNING.get()
        if running is None or running.engine is not layer.engine:
            layer.check_unprepared()
            return layer.chosen
        if running.joint is None:
            return layer.chosen
        running.layer = layer
        return SLOT

    def choose(self: Any, backend: Any) -> None:
        self._layer.chosen = self.inner._attention_backend = backend

    def restored(self: Any, protocol: Any) -> Any:
        ours = ("_layer", "inner")
        state = {name: item for name, item in self.__dict__.items() if name not in ours}
        return _plain, (processor, state, self._layer.chosen)

    assert isinstance(processor, type)
    members = {
        "_attention_backend": property(told, choose),
        "engine": property(lambda self: self._layer.engine),
        "layer": property(
            lambda self: self._layer.name, lambda self, name: setattr(self._layer, "name", name)
        ),
        "__reduce_ex__": restored,
        "__module__": processor.__module__,
    }
    return type(processor.__name__, (processor,), members)


def _plain(processor: Any, state: dict[str, Any], chosen: Any) -> Any:
    """A copy of an installed processor is not installed."""
    made = processor.__new__(processor)
    made.__dict__.update(state)
    made._attention_backend = chosen
    return made


def negating(inner: Any, engine: Engine, name: str, backend: str) -> Any:
    """The processor with our backend in place of its own while an entry acts.

    Raises:
        UnsupportedModelError: it does not ask the dispatcher.
    """
    if not hasattr(type(inner), "_attention_backend"):
        raise UnsupportedModelError(f"processor {type(inner).__name__} of {name} asks no dispatcher")
    of: Any = type(inner)
    kind = _negating(of)
    made = kind.__new__(kind)
    state = dict(inner.__dict__)
    chosen = state.pop("_attention_backend", type(inner)._attention_backend)
    made.__dict__.update(state, _layer=Layer(engine, name, chosen, backend), inner=inner)
    return made
