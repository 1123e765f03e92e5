# SPDX-License-Identifier: Apache-2.0
"""Edits of weights, in place: what layers are, and who holds them, stays."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, MutableMapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ....engine.concepts import Concept
from ....engine.errors import NegationNotAppliedError, UnsupportedModelError
from ....engine.prologue.weights import ClosedForm, answers, evened, resurfacing
from ....operator.rule import check_number
from ..contract import bare
from ..text.encode import empty
from .edit import Edit, offloaded_by_groups
from .given import One, Several, as_received, check_tokens, concepts_of, tail, text_hosts

log = logging.getLogger("fastnegate")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# By denoiser, the last one last; weakly, since an edit has the pipeline, and so its own key.
_edits: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[Edit]]] = weakref.WeakKeyDictionary()
_written: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()  # version of a weight as we left it


class WeightEdit(Edit):
    """New values in a pipeline's weights; `remove` puts the old ones back.

    The tensors stay the ones that they were, and their versions grow: what is kept of a weight by its version
    is made anew, graphs that were captured or compiled read the new values.
    """

    def __init__(self, pipe: Any, method: str, new: Mapping[nn.Parameter, Tensor]) -> None:
        super().__init__(pipe, method)
        self._before = {weight: weight.detach().clone() for weight in new}
        try:
            for weight, value in new.items():
                _write(weight, value)
        except BaseException:
            self._restore()
            raise
        for model in self._models.values():
            _edits.setdefault(bare(model), []).append(weakref.ref(self))
        self._put()

    def _undo(self) -> None:
        models = [bare(model) for model in self._models.values()]
        if any(_edits[model][-1]() is not self for model in models):
            raise RuntimeError(f"{self.method}: weights were edited again since; remove the last edit first")
        if self._changed():
            log.warning("%s: weights were changed since, which is undone as well", self.method)
        self._restore()
        for model in models:
            _edits[model].pop()

    def _generate(
        self, pipe: Any, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType
    ) -> Any:
        if self._changed() or self._displaced():
            raise NegationNotAppliedError(
                f"{self.method}: weights that it wrote were changed since, so it may be undone: remove it, "
                "and edit them again"
            )
        return super()._generate(pipe, call, args, kwargs, frame)

    def _changed(self) -> bool:
        """Whether somebody else has written into the weights."""
        return any(weight._version != _written[weight] for weight in self._before)

    def _displaced(self) -> bool:
        """Whether the denoisers have other weights now. Offloading has placeholders for them, and puts them
        back."""
        now = {id(w): w for model in self._models.values() for w in model.parameters()}
        gone = any(id(weight) not in now for weight in self._before)
        return gone and not any(weight.is_meta for weight in now.values())

    def _restore(self) -> None:
        for weight, value in self._before.items():
            _write(weight, value)


@torch.no_grad()
def _write(weight: nn.Parameter, value: Tensor) -> None:
    weight.copy_(value)
    _written[weight] = weight._version


def checked(name: str, weight: Any, method: str) -> nn.Parameter:
    """The weight, if it is a plain floating-point parameter with its numbers at hand; else
    UnsupportedModelError."""
    why = None
    if not isinstance(weight, Tensor) or weight.is_meta:
        why = "is on the meta device: offloading has taken it away"
    elif type(weight) is not nn.Parameter or type(weight.data) is not Tensor or weight.dtype not in _DTYPES:
        why = f"is a {type(weight).__name__} of {weight.dtype}: it is quantized"
    elif weight.is_inference():
        why = "is an inference tensor: load the model outside of torch.inference_mode"
    if why is not None:
        raise UnsupportedModelError(f"{method} cannot write into weights: {name} {why}")
    assert isinstance(weight, nn.Parameter)
    return weight


def _projections(pipe: Any, method: str) -> dict[str, list[nn.Parameter]]:
    """Weights of to_k and to_v of all layers that read text, by the attribute of their denoiser."""
    found: dict[str, list[nn.Parameter]] = {}
    for attribute, layers in text_hosts(pipe, method, ("to_k", "to_v")).items():
        if offloaded_by_groups(getattr(pipe, attribute)):
            raise UnsupportedModelError(
                f"{method} cannot write into weights: {attribute} is offloaded by groups"
            )
        found[attribute] = []
        for name, attn in layers.items():
            for part in ("to_k", "to_v"):
                module, called = getattr(attn, part), f"{attribute}.{name}.{part}"
                if type(module) is not nn.Linear:
                    raise UnsupportedModelError(
                        f"{method} needs plain linear layers: {called} is a {type(module).__name__} (fuse "
                        "adapters, or unload them)"
                    )
                found[attribute].append(checked(called, module.weight, method))
    return found


class _Wanted:
    """What is to be erased, what it becomes, and what stays, checked."""

    def __init__(
        self,
        pipe: Any,
        concepts: Several,
        target: One,
        preserve: Several | None,
        tokens: str,
        scales: Mapping[str, float],
        method: str,
    ) -> None:
        check_tokens(tokens)
        for name, scale in scales.items():
            check_number(name, scale, above=0.0)
        self.weights = _projections(pipe, method)
        old = concepts_of(pipe, concepts)
        kept = {} if preserve is None else concepts_of(pipe, preserve, "preserve")
        new = empty(pipe)
        if not (isinstance(target, str) and not target.strip()):
            named = concepts_of(pipe, target, "target")
            if len(named) > 1:
                raise ValueError(f"target has {len(named)} concepts, {', '.join(named)}: must be one")
            (new,) = _tails(named, tokens)
        self._pipe = pipe
        self._pairs = evened(_tails(old, tokens), [new] * len(old))
        self._kept = torch.cat([*_tails(kept, tokens), new[:0]])

    def of(self, attribute: str) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings as a denoiser's layers receive them: erased [N, C], targets [N, C], kept [M, C]."""
        erased, targets = (as_received(self._pipe, attribute, part) for part in self._pairs)
        return erased, targets, as_received(self._pipe, attribute, self._kept)


def _tails(concepts: Mapping[str, Concept], tokens: str) -> list[Tensor]:
    return [tail(concept, tokens, name) for name, concept in concepts.items()]


def uce(
    pipe: Any,
    concepts: Several,
    target: One = "",
    *,
    preserve: Several | None = None,
    orthogonal: bool = False,
    erase_scale: float = 1.0,
    preserve_scale: float = 1.0,
    ridge: float = 0.5,
    tokens: str = "prompt",
) -> Edit:
    """Unified Concept Editing: every text key and value projection answers the concepts as it answers the
    target, in closed form (Gandikota et al., WACV 2024, arXiv 2308.14761):

        W' = (λ W + a Σ v* cᵀ + b Σ W c_p c_pᵀ) (λ I + a Σ c cᵀ + b Σ c_p c_pᵀ)⁻¹,   v* = W c_target

    Args:
        pipe: a pipeline whose layers read the prompt as it was encoded: UNets, PixArt, Sana, Wan, LTX-Video.
        concepts: words, embeddings [T, C], a mapping from names to either, several, or a `ConceptBank`.
        target: words or embeddings that they become; "" is the empty text.
        preserve: concepts whose answers stay.
        orthogonal: v* is the part of W c_target that is orthogonal to W c ("tensor" in the published code).
        erase_scale, preserve_scale, ridge: a, b, λ.
        tokens: which tokens are c: `prompt`, as published, the last of the concept's words and what follows
            it in the prompt; or `prototype`, what its members are in any context.

    Returns:
        The edit; leaving `with` restores all weights to the bit.

    Raises:
        UnsupportedModelError: image and text are one sequence; weights are quantized, on the meta device or
            offloaded by groups; a projection is not a plain linear layer.
        ValueError: a bad argument. Nothing is changed before everything is checked.
    """
    scales = {"erase_scale": erase_scale, "preserve_scale": preserve_scale, "ridge": ridge}
    wanted = _Wanted(pipe, concepts, target, preserve, tokens, scales, "uce")
    new: dict[nn.Parameter, Tensor] = {}
    for attribute, weights in wanted.weights.items():
        erased, targets, kept = wanted.of(attribute)
        form = ClosedForm(erased, kept, erase_scale=erase_scale, keep_scale=preserve_scale, ridge=ridge)
        for weight in weights:
            new[weight] = form.of(weight.detach(), answers(weight.detach(), erased, targets, orthogonal))
    return WeightEdit(pipe, "uce", new)


def rece(
    pipe: Any,
    concepts: Several,
    target: One = "",
    *,
    preserve: Several | None = None,
    epochs: int = 3,
    adversarial_ridge: float = 0.1,
    erase_scale: float = 0.1,
    preserve_scale: float = 0.1,
    ridge: float = 0.1,
    tokens: str = "prompt",
) -> Edit:
    """Reliable and Efficient Concept Erasure: `uce`, and then in each epoch the embeddings with which the
    edited layers come nearest to what the original ones said to the concepts are erased, too (Gong et al.,
    ECCV 2024, arXiv 2407.12383):

        c' = (λ' I + Σ_l W'ᵀ W')⁻¹ (Σ_l W'ᵀ W) c

    Args:
        pipe, concepts, target, preserve, tokens: as for `uce`.
        epochs: how often; 3 with 0.1 for nudity, 1 with 0.001 for styles in the paper.
        adversarial_ridge: λ'.
        erase_scale, preserve_scale, ridge: a, b, λ of each edit.

    Returns, Raises:
        As `uce`.
    """
    if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1:
        raise ValueError(f"epochs={epochs!r}: must be an int >= 1")
    scales = {"erase_scale": erase_scale, "preserve_scale": preserve_scale, "ridge": ridge}
    scales["adversarial_ridge"] = adversarial_ridge
    wanted = _Wanted(pipe, concepts, target, preserve, tokens, scales, "rece")
    new: dict[nn.Parameter, Tensor] = {}
    for attribute, weights in wanted.weights.items():
        concept, targets, kept = wanted.of(attribute)
        erased, now = concept, [weight.detach().double() for weight in weights]
        for epoch in range(epochs + 1):
            if epoch:
                pairs = zip(now, (weight.detach() for weight in weights))
                erased = resurfacing(pairs, concept, adversarial_ridge)
            form = ClosedForm(erased, kept, erase_scale=erase_scale, keep_scale=preserve_scale, ridge=ridge)
            now = [form.of(weight, answers(weight, erased, targets, False)) for weight in now]
        new |= dict(zip(weights, now))
    return WeightEdit(pipe, "rece", new)
