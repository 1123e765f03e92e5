# SPDX-License-Identifier: Apache-2.0
"""`Concept` and `ConceptBank`: text embeddings of negative concepts, with the role of every token.

A bank holds what the text encoder said about a concept, not what a layer makes of it, so one bank
serves every layer, every step and every rule. Files are safetensors with JSON metadata, bound to the
fingerprint of the text encoder.
"""

from __future__ import annotations

import enum
import json
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..operator.rule import Rule

FORMAT = 1  # of the file


class Role(enum.IntEnum):
    """What a token of an encoded prompt is."""

    SOT = 0
    CONTENT = 1
    EOT = 2
    PADDING = 3


class BankMismatchError(ValueError):
    """A bank or file does not belong to this text encoder."""


@dataclass(frozen=True)
class Group:
    """Tokens that share one softmax: embeddings [T, C] and value weights [T] (None: all 1)."""

    embeddings: Tensor
    weight: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Concept:
    """One concept as the text encoder sees it; C is the encoder's width.

    Attributes:
        prompt: float32 [L, C], the encoding of all members as one negative prompt; tokens that the
            model does not attend to are left out.
        roles: int8 [L], the `Role` of each.
        prototypes: one float32 [T_i, C] per member: a few tokens that stand for the member in any
            context. Each becomes an entry with its own softmax and gate.
        members: the phrases, for the reader.
    """

    prompt: Tensor
    roles: Tensor
    prototypes: tuple[Tensor, ...]
    members: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.prompt.dim() != 2 or self.roles.shape != self.prompt.shape[:1]:
            raise ValueError(
                f"prompt has shape {list(self.prompt.shape)}, roles {list(self.roles.shape)}: "
                "must be [L, C] and [L]"
            )
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
        parts = [p.detach().float().cpu() for p in parts]
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
        if rule.tokens == "prototype":
            groups = [Group(p) for p in self.prototypes]
        elif rule.tokens == "content":
            groups = [Group(self.prompt[content])]
        elif rule.tokens == "weighted":
            groups = [Group(self.prompt, content.float())]
        elif rule.tokens == "full":
            groups = [Group(self.prompt)]
        else:
            raise ValueError(
                f"rule {rule.name!r} reads a steering direction per layer, which a bank of text "
                "embeddings does not have; pass ConceptTokens with `direction` to the operator"
            )
        needs_content = rule.tokens in ("content", "weighted")
        if not groups or not len(groups[0].embeddings) or (needs_content and not content.any()):
            raise ValueError(
                f"members {list(self.members)} have no {rule.tokens} tokens for rule {rule.name!r}"
            )
        return groups


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


Templates = Sequence[str] | Callable[[str], Sequence[str]]


class ConceptBank:
    """Named concepts of one text encoder.

    `bank["disney"]` is a `Concept`; iteration gives names. Changing a bank that is installed takes
    effect at the next denoising step.
    """

    def __init__(self, concepts: Mapping[str, Concept], fingerprint: Fingerprint, pipe: Any = None) -> None:
        self._concepts: dict[str, Concept] = {}
        self.fingerprint = fingerprint
        self.version = 0
        self._width = 0
        self._pipe = weakref.ref(pipe) if pipe is not None else None
        for name, concept in concepts.items():
            self._set(name, concept)

    @classmethod
    def from_prompts(
        cls, pipe: Any, prompts: Mapping[str, str | Sequence[str]], *, templates: Templates | None = None
    ) -> ConceptBank:
        """Encode concepts with a diffusers pipeline's text encoder.

        Args:
            pipe: a supported pipeline.
            prompts: concept name -> its member phrases ("warm": ["red", "orange", "yellow"]).
            templates: captions in which a member is encoded for its prototype, or a function from
                member to captions. `{}` stands for the member; square brackets may mark a longer span
                to average, e.g. "a [{} dress] on a chair". Default: `DEFAULT_TEMPLATES`.

        Raises:
            UnsupportedModelError: the pipeline is not in the families table.
            ValueError: an empty concept, or a template without `{}` or whose spans have different
                numbers of tokens.
        """
        from ..integrations.diffusers import encode  # the one import against the arrows

        return encode.bank_from_prompts(pipe, prompts, templates)

    @classmethod
    def load(cls, path: str | Path, pipe: Any) -> ConceptBank:
        """Read a bank file for `pipe`.

        Raises:
            ValueError: not a bank file (pickles are refused unread).
            BankMismatchError: made for another text encoder.
        """
        from safetensors import SafetensorError, safe_open

        from ..integrations.diffusers import encode

        try:
            with safe_open(str(path), framework="pt") as file:
                header = json.loads((file.metadata() or {})["fastnegate"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            if header["format"] != FORMAT:
                raise ValueError(f"format {header['format']!r}: this version reads {FORMAT}")
            theirs = Fingerprint(header["encoder"], tensors["fingerprint"])
            concepts = {}
            for i, item in enumerate(header["concepts"]):
                prototypes = tuple(tensors[f"{i}.prototype.{j}"] for j in range(item["prototypes"]))
                concepts[item["name"]] = Concept(
                    tensors[f"{i}.prompt"], tensors[f"{i}.roles"], prototypes, tuple(item["members"])
                )
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"path={str(path)!r} is not a concept bank: {error!r}") from error
        ours = encode.fingerprint(pipe)
        if (difference := ours.difference(theirs)) is not None:
            raise BankMismatchError(f"path={str(path)!r} was made for another text encoder: {difference}")
        return cls(concepts, ours, pipe)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; the same bank gives the same bytes."""
        from safetensors.torch import save_file

        tensors = {"fingerprint": self.fingerprint.sample}
        items = []
        for i, (name, concept) in enumerate(self._concepts.items()):
            tensors[f"{i}.prompt"], tensors[f"{i}.roles"] = concept.prompt, concept.roles
            tensors.update({f"{i}.prototype.{j}": p for j, p in enumerate(concept.prototypes)})
            items.append({"name": name, "members": concept.members, "prototypes": len(concept.prototypes)})
        header = {"format": FORMAT, "encoder": dict(self.fingerprint.facts), "concepts": items}
        tensors = {name: t.clone().contiguous() for name, t in tensors.items()}
        save_file(tensors, str(path), metadata={"fastnegate": json.dumps(header, sort_keys=True)})

    def update(self, name: str, embeddings: Concept | Tensor | Sequence[Tensor]) -> None:
        """Add or replace a concept: a `Concept`, or embeddings as in `Concept.from_embeddings`."""
        self._set(
            name, embeddings if isinstance(embeddings, Concept) else Concept.from_embeddings(embeddings)
        )

    def remove(self, name: str) -> None:
        """Forget a concept. Raises ValueError if there is none of that name."""
        self[name]
        del self._concepts[name]
        self.version += 1

    def _set(self, name: str, concept: Concept) -> None:
        self._width = self._width or concept.width
        if concept.width != self._width:
            raise ValueError(f"concept {name!r} has width {concept.width}: this bank has {self._width}")
        self._concepts[name] = concept
        self.version += 1

    def check(self, pipe: Any) -> None:
        """Raise BankMismatchError unless this bank was made for the text encoder of `pipe`."""
        from ..integrations.diffusers import encode

        if (difference := encode.fingerprint(pipe).difference(self.fingerprint)) is not None:
            raise BankMismatchError(f"the bank was made for another text encoder: {difference}")

    @property
    def width(self) -> int:
        """C, the width of the embeddings."""
        return self._width

    @property
    def pipe(self) -> Any:
        """The pipeline it was made with, while that lives; else None."""
        return self._pipe() if self._pipe is not None else None

    def __getitem__(self, name: str) -> Concept:
        if name not in self._concepts:
            raise ValueError(f"concept {name!r}: the bank has {', '.join(self._concepts) or 'none'}")
        return self._concepts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._concepts)

    def __len__(self) -> int:
        return len(self._concepts)

    def __contains__(self, name: object) -> bool:
        return name in self._concepts

    def __getstate__(self) -> dict[str, Any]:  # weak references do not pickle
        return {**self.__dict__, "_pipe": None}
