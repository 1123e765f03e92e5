# SPDX-License-Identifier: Apache-2.0
"""`Concept`: text embeddings of a negative concept, with the role of every token, and perhaps `Directions`;
`Fingerprint`: whose embeddings they are; `Snapshot`: named concepts of one moment.

A concept holds what the text encoder said, not what a layer makes of it, so one concept serves every layer,
every step and every rule; but for rules that read a direction, which is a layer's own.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..operator.rule import Rule
from .prototypes import condense

# Captions in which a member is encoded for its prototype, or a function from member to captions.
Templates = Sequence[str] | Callable[[str], Sequence[str]]


class Role(enum.IntEnum):
    """What a token of an encoded prompt is."""

    SOT = 0
    CONTENT = 1
    EOT = 2
    PADDING = 3


@dataclass(frozen=True, eq=False)
class Directions:
    """What a concept adds to what the attention layers of one denoiser give, before the output projection.

    Attributes:
        layers: name of a layer, as the engine has it -> float32 [H, D], of length 1 over all H * D channels.
        model: identity of the denoiser.
    """

    layers: Mapping[str, Tensor]
    model: Fingerprint

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("directions has no layer")
        for name, direction in self.layers.items():
            if direction.dim() != 2 or direction.dtype != torch.float32:
                raise ValueError(
                    f"directions[{name!r}] is {direction.dtype} of shape {list(direction.shape)}: must be "
                    "float32 [H, D]"
                )
            if not abs(float(direction.norm()) - 1) < 1e-3:  # nan, too
                raise ValueError(f"directions[{name!r}] has length {float(direction.norm()):g}: must be 1")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(direction.shape) for name, direction in self.layers.items()}


@dataclass(frozen=True)
class Group:
    """Tokens that share one softmax: embeddings [T, C] and value weights [T] (None: all 1). In the text that
    they are of they begin at token `first`; None: there is none. `directions` where the rule reads one."""

    embeddings: Tensor
    weight: Tensor | None = None
    first: int | None = 0
    directions: Directions | None = None


@dataclass(frozen=True, eq=False)
class Concept:
    """One concept as the text encoder sees it; C is the encoder's width.

    Attributes:
        prompt: float32 [L, C], the encoding of all members as one negative prompt; tokens that the
            model does not attend to are left out. L = 0 where one prompt cannot hold all members: rules
            that read prototypes do not miss it, the others refuse the concept.
        roles: int8 [L], the `Role` of each.
        prototypes: one float32 [T_i, C] per member: a few tokens that stand for the member in any
            context. Each becomes an entry with its own softmax and gate.
        members: the phrases, for the reader.
        directions: for rules that read one (`casteer`); see `ConceptBank.add_directions`.
    """

    prompt: Tensor
    roles: Tensor
    prototypes: tuple[Tensor, ...]
    members: tuple[str, ...] = ()
    directions: Directions | None = None

    def __post_init__(self) -> None:
        if self.prompt.dim() != 2 or self.roles.shape != self.prompt.shape[:1]:
            raise ValueError(
                f"prompt has shape {list(self.prompt.shape)}, roles {list(self.roles.shape)}: "
                "must be [L, C] and [L]"
            )
        if self.roles.dtype != torch.int8 or not set(self.roles.tolist()) <= {*Role}:
            raise ValueError(
                f"roles is {self.roles.dtype} {self.roles.tolist()}: must be int8, of {[*map(int, Role)]}"
            )
        if isinstance(self.members, str) or not all(isinstance(member, str) for member in self.members):
            raise ValueError(f"members={self.members!r}: must be a tuple of phrases")
        for i, tokens in enumerate(self.prototypes):
            if tokens.dim() != 2 or tokens.shape[1] != self.width or not len(tokens):
                raise ValueError(
                    f"prototypes[{i}] has shape {list(tokens.shape)}: must be [T, {self.width}], T > 0"
                )
        for name, tensor in (
            ("prompt", self.prompt),
            *((f"prototypes[{i}]", t) for i, t in enumerate(self.prototypes)),
        ):
            if not tensor.isfinite().all():
                raise ValueError(f"{name} holds nan or inf")

    @classmethod
    def from_embeddings(cls, embeddings: Tensor | Sequence[Tensor], members: Sequence[str] = ()) -> Concept:
        """A concept of given embeddings ([T, C], or several), e.g. learned by textual inversion:
        each tensor is a prototype, and all of them together are the content of the prompt."""
        parts = [embeddings] if isinstance(embeddings, Tensor) else list(embeddings)
        if not parts:
            raise ValueError("embeddings is empty: a concept needs at least one [T, C] tensor")
        with torch.inference_mode(False):  # our own: not what the caller may write to, or could not save
            parts = [p.detach().float().cpu().clone() for p in parts]
            prompt = torch.cat(parts)
        return cls(
            prompt, torch.full((len(prompt),), Role.CONTENT, dtype=torch.int8), tuple(parts), tuple(members)
        )

    @property
    def width(self) -> int:
        return self.prompt.shape[1]

    def groups(self, rule: Rule) -> list[Group]:
        """The tokens that `rule` uses, one group per softmax.

        Raises:
            ValueError: the concept has none of them, so it could not be negated.
        """
        content = self.roles == Role.CONTENT
        first = None if content.all() else int(content.int().argmax())
        if rule.tokens in ("full", "content", "weighted") and not len(self.prompt) and self.prototypes:
            raise ValueError(
                f"{self!r} has more members than one prompt holds, and rule {rule.name!r} reads that prompt: "
                "give it fewer members, or use a rule that reads prototypes, such as 'protore'"
            )
        if rule.tokens == "prototype":
            groups = [Group(p, first=first) for p in self.prototypes]
        elif rule.tokens == "content":
            groups = [Group(self.prompt[content], first=first)]
        elif rule.tokens == "weighted":
            groups = [Group(self.prompt, content.float())]
        elif rule.tokens == "full":
            groups = [Group(self.prompt)]
        else:  # it reads none: a token of zeros holds the place of an entry
            groups = [Group(torch.zeros(1, self.width), first=None)]
        needs_content = rule.tokens in ("content", "weighted")
        if not groups or not len(groups[0].embeddings) or (needs_content and not content.any()):
            raise ValueError(
                f"members {list(self.members)} have no {rule.tokens} tokens for rule {rule.name!r}"
            )
        if not rule.reads.direction:
            return groups
        if self.directions is None:
            raise ValueError(
                f"rule {rule.name!r} reads a steering direction per layer, which {self!r} does not have: "
                "ConceptBank.add_directions collects them"
            )
        return [replace(group, directions=self.directions) for group in groups]

    def condensed(self, clusters: int, seed: int = 0) -> Concept:
        """The same concept with so many prototypes of one token each, in place of one for each member:
        centroids of their mean tokens by spherical k-means (`prototypes.spherical_kmeans`). Each prototype is
        an entry, and entries cost alike, so a concept of many phrases gets cheaper, and coarser.

        Raises:
            ValueError: fewer than 1, or more than there are prototypes.
        """
        if isinstance(clusters, bool) or not isinstance(clusters, int) or clusters < 1:
            raise ValueError(f"clusters={clusters!r}: must be a whole number >= 1")
        if clusters > len(self.prototypes):
            raise ValueError(f"clusters={clusters!r}: {self!r} has fewer")
        return replace(self, prototypes=condense(self.prototypes, clusters, seed))

    def __repr__(self) -> str:
        shown = [repr(member) for member in self.members[:3]]
        if len(self.members) > 3:
            shown.append(f"{len(self.members) - 3} more")
        return (
            f"Concept({', '.join(shown) or 'of embeddings'}: prompt {list(self.prompt.shape)}, "
            f"{counted(len(self.prototypes), 'prototype')}{', directions' if self.directions else ''})"
        )


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """Identity of a text encoder: class names, sizes and vocabulary exactly, weights by a sample.

    The sample is compared with a tolerance, because the same encoder may be loaded in 16 bit.
    """

    facts: Mapping[str, Any]
    sample: Tensor

    def difference(self, other: Fingerprint) -> str | None:
        """What differs, or None."""
        for name in sorted({*self.facts, *other.facts}):
            ours, theirs = self.facts.get(name), other.facts.get(name)
            if ours != theirs:
                return f"{name} is {theirs!r}, not {ours!r}"
        if self.sample.shape != other.sample.shape or not torch.allclose(
            self.sample, other.sample, rtol=2e-2, atol=1e-3
        ):
            return "the weights differ"
        return None

    def __repr__(self) -> str:
        facts = ", ".join(f"{name}={fact}" for name, fact in self.facts.items())
        return f"Fingerprint({facts})"


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A bank at one moment; what it holds never changes.

    Attributes:
        version: grows with every change, so that equal versions of a bank are the same concepts.
        concepts: by name, in the order in which they were added.
        neutral: float32 [T, C], the neutral tokens, or None.
    """

    version: int
    concepts: Mapping[str, Concept]
    neutral: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "concepts", MappingProxyType(dict(self.concepts)))

    def __reduce__(self) -> Any:  # views do not pickle
        return Snapshot, (self.version, dict(self.concepts), self.neutral)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256, 64 hexadecimal digits, of the names and numbers of concepts and neutral tokens: the same
        in every process, and of a file that they are written to."""
        digest = hashlib.sha256()

        def add(what: str, name: str, tensor: Tensor) -> None:
            digest.update(json.dumps([what, name, str(tensor.dtype), *tensor.shape]).encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())

        for name, concept in sorted(self.concepts.items()):
            add("prompt", name, concept.prompt)
            add("roles", name, concept.roles)
            for prototype in concept.prototypes:
                add("prototype", name, prototype)
            if concept.directions is not None:
                for layer, direction in sorted(concept.directions.layers.items()):
                    add("direction", layer, direction)
        if self.neutral is not None:
            add("neutral", "", self.neutral)
        return digest.hexdigest()


def counted(number: int, thing: str) -> str:
    """ "1 member", "2 members"."""
    return f"{number} {thing}" + "s" * (number != 1)
