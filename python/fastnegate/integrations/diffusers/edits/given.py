# SPDX-License-Identifier: Apache-2.0
"""What edits are given: concepts as words, embeddings or a bank; and which of their tokens a method reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ....engine.bank import ConceptBank
from ....engine.concepts import Concept, Role
from ....engine.errors import UnsupportedModelError
from ..contract import bare, cross_attention_layers, denoisers, family, project_context
from ..text.encode import empty, encode

# One concept: its words, embeddings [T, C], or both at once as banks hold them.
One = str | Tensor | Concept
# Several: each its own concept. A mapping gives them names, and several phrases to a name.
Several = One | ConceptBank | Sequence[One] | Mapping[str, One | Sequence[str]]

TOKENS = ("prompt", "prototype")


def concepts_of(pipe: Any, given: Several, called: str = "concepts") -> dict[str, Concept]:
    """Concepts by name, all of one width; words are encoded together, with the pipeline's own encoders.

    Raises:
        ValueError, UnsupportedModelError, BankMismatchError: as `ConceptBank.from_prompts` and
            `ConceptBank.check`; or embeddings of another shape or width than the pipeline's text has.
    """
    if isinstance(given, ConceptBank):
        given.check(pipe)
        items: dict[str, Any] = dict(given.snapshot().concepts)
    elif isinstance(given, Mapping):
        items = dict(given)
    elif isinstance(given, (str, Tensor, Concept)):
        items = {given if isinstance(given, str) else "#1": given}
    else:
        items = {one if isinstance(one, str) else f"#{i}": one for i, one in enumerate(given, 1)}
    if not items:
        raise ValueError(f"{called}={given!r}: must name at least one concept")
    found, words, width = {}, {}, empty(pipe).shape[1]
    for name, one in items.items():
        if isinstance(one, Tensor):
            if one.dim() != 2 or not len(one):
                raise ValueError(
                    f"{called}[{name!r}] has shape {list(one.shape)}: must be [T, {width}], T > 0"
                )
            one = Concept.from_embeddings(one)
        if not isinstance(one, Concept):
            words[name] = one
        elif one.width != width:
            raise ValueError(f"{called}[{name!r}] has width {one.width}: the pipeline's text has {width}")
        else:
            found[name] = one
    if words:
        found |= encode(pipe, words, None, called)
    return {name: found[name] for name in items}


def text_of(concept: Concept, name: str) -> Tensor:
    """The concept as a text of its own [L, C], as a negative prompt is.

    Raises:
        ValueError: one prompt does not hold its members.
    """
    if not len(concept.prompt):
        raise ValueError(f"concept {name!r} has more members than one prompt holds: give it fewer")
    return concept.prompt


def check_tokens(tokens: str) -> None:
    """Raise ValueError unless it is one of TOKENS."""
    if tokens not in TOKENS:
        raise ValueError(f"tokens={tokens!r}: allowed are {', '.join(TOKENS)}")


def subject(concept: Concept, tokens: str, name: str) -> Tensor:
    """What stands for a concept in a text [N, C]: the last token of its words, or its prototypes; learned
    embeddings whole.

    Raises:
        ValueError: it has several members, of which the last word speaks of one.
    """
    if (roles := _learned(concept)) is None:
        return concept.prompt
    if tokens == "prototype":
        return torch.cat(concept.prototypes)
    if len(concept.members) > 1:
        raise ValueError(
            f"tokens='prompt': concept {name!r} has {len(concept.members)} members, and the last word of its "
            "prompt speaks of one: use tokens='prototype', or a concept for each"
        )
    return concept.prompt[roles == Role.CONTENT][-1:]


def tail(concept: Concept, tokens: str, name: str) -> Tensor:
    """What a text says once the concept was named [N, C]: the last token of its words and all that follow it,
    or its prototypes; learned embeddings whole."""
    if (roles := _learned(concept)) is None:
        return concept.prompt
    if tokens == "prototype":
        return torch.cat(concept.prototypes)
    return text_of(concept, name)[int((roles == Role.CONTENT).nonzero().max()) :]


def pooled(concept: Concept, name: str) -> Tensor:
    """What the encoder pools of a text [1, C], which with CLIP is the token that ends it; learned embeddings
    whole."""
    if (roles := _learned(concept)) is None:
        return concept.prompt
    return text_of(concept, name)[roles == Role.EOT][:1]


def _learned(concept: Concept) -> Tensor | None:
    """Its roles; None if it was learned, and has no text."""
    return None if (concept.roles == Role.CONTENT).all() and len(concept.roles) else concept.roles


def text_hosts(pipe: Any, method: str, modules: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The cross-attention layers by name, of each denoiser by attribute.

    Raises:
        UnsupportedModelError: image and text share one softmax, or text changes within the model, or a layer
            has not these `modules` of its own for a text as it comes in.
    """
    entry = family(pipe)
    if entry.joint is not None or entry.rides:
        raise UnsupportedModelError(
            f"{method} needs layers that read the prompt as it was encoded: in {type(pipe).__name__} text "
            "changes from layer to layer"
        )
    hosts = {name: cross_attention_layers(model) for name, model in denoisers(pipe).items()}
    for attribute, layers in hosts.items():
        for name, attn in layers.items():
            if getattr(attn, "fused_projections", False) or not all(hasattr(attn, m) for m in modules):
                raise UnsupportedModelError(
                    f"{method} needs {' and '.join(modules)} of each layer: {attribute}.{name} has fused "
                    "projections (call unfuse_qkv_projections())"
                )
            if getattr(attn, "norm_cross", None):
                raise UnsupportedModelError(
                    f"{method} needs layers that read text as it is: {attribute}.{name} norms it first"
                )
    if not any(hosts.values()):
        raise UnsupportedModelError(f"{method}: no layer of {type(pipe).__name__} attends to text")
    return hosts


@torch.no_grad()
def as_received(pipe: Any, attribute: str, embeddings: Tensor) -> Tensor:
    """Text embeddings [N, C] as the layers of a denoiser receive them."""
    model = bare(getattr(pipe, attribute))
    weight = next(p for p in model.parameters() if p.is_floating_point())
    there = embeddings.to(device=weight.device, dtype=weight.dtype).unsqueeze(0)
    return project_context(family(pipe), model, there)[0]
