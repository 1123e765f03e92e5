# SPDX-License-Identifier: Apache-2.0
"""Whose words a bank holds: the fingerprint of a pipeline's tokenizers and text encoders.

Text encoders are often freed, or their weights offloaded, once everything is encoded. What was seen of one
before stays known: of an encoder whose weights are away, as long as it lives; of a pipeline that has none any
more, from the last one seen in it. An encoder that was never seen is refused.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ....engine.concepts import Fingerprint
from ....engine.errors import UnsupportedModelError
from ..contract import encoder_of, encoders_of, family, frame, text_tokenizer

Seen = TypeVar("Seen")

# Names and shapes of the parameters, and a sample of them: adapters that came later are noticed.
_encoders: weakref.WeakKeyDictionary[nn.Module, tuple[object, Tensor]] = weakref.WeakKeyDictionary()
# Pipeline -> attribute -> what was seen there last.
_pipelines: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()


def fingerprint(pipe: Any) -> Fingerprint:
    """Identity of the text encoders of `pipe`.

    Raises:
        UnsupportedModelError: an encoder is freed or offloaded and was never seen before.
    """
    facts: dict[str, Any] = {}
    samples = []
    for tokenizer, encoder in encoders_of(pipe, seen=_pipelines.get(pipe, {})):
        facts[encoder], sample = _look(pipe, encoder, _encoder)
        facts[tokenizer] = _look(pipe, tokenizer, _vocabulary)
        samples.append(sample)
    if family(pipe).framed is not None:
        seen = _pipelines[pipe]
        if getattr(pipe, family(pipe).encoders[0][0]) is not None:
            seen["frame"] = _frame(encoder_of(pipe))
        facts["frame"] = seen["frame"]
    sample = torch.cat(samples)
    facts["sampled"] = len(sample)
    return Fingerprint(facts, sample)


def _look(pipe: Any, name: str, describe: Callable[[Any, str], Seen]) -> Seen:
    """What `describe` says of a component; of one that was freed, what it said last."""
    seen = _pipelines.setdefault(pipe, {})
    component = getattr(pipe, name)
    if component is not None:
        seen[name] = describe(component, name)
    elif name not in seen:
        raise UnsupportedModelError(
            f"pipe.{name} is None, so nobody can tell which one a bank belongs to: make or load the bank "
            "before freeing it"
        )
    known: Seen = seen[name]
    return known


def _frame(pipe: Any) -> str:
    """What a text stands in, and which pipeline reads the encoder's layers: two may read the same one."""
    return hashlib.sha256(repr((type(pipe).__name__, frame(pipe))).encode()).hexdigest()[:16]


def _vocabulary(tokenizer: Any, name: str) -> str:
    words = "\n".join(f"{i} {word}" for word, i in sorted(text_tokenizer(tokenizer).get_vocab().items()))
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def _encoder(model: Any, name: str) -> tuple[str, Tensor]:
    model = getattr(model, "_orig_mod", model)  # compiled or not
    parameters = dict(model.named_parameters())
    # Offloading unties weights that are shared, so each name counts.
    shapes = sorted((at, tuple(p.shape)) for at, p in model.named_parameters(remove_duplicate=False))
    if not any(p.device.type == "meta" for p in parameters.values()):
        sample = torch.cat([sample_of(p.detach()) for p in parameters.values()])
        _encoders[model] = shapes, sample
    elif _encoders.get(model, (None,))[0] != shapes:
        raise UnsupportedModelError(
            f"the weights of pipe.{name} are offloaded, so nobody can tell which bank belongs to them: make "
            "or load the bank before enabling offload"
        )
    return type(model).__name__, _encoders[model][1]


def sample_of(parameter: Tensor) -> Tensor:
    """Four numbers, float32 on the CPU."""
    flat = parameter.flatten()
    return flat[torch.linspace(0, flat.numel() - 1, 4).long().to(flat.device)].float().cpu()
