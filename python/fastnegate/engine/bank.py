# SPDX-License-Identifier: Apache-2.0
"""`ConceptBank`: named concepts of one text encoder."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from . import host
from .concepts import Concept, Directions, Fingerprint, Snapshot, Templates, counted
from .errors import BankMismatchError
from .files import Contents, contents, directions_of, write
from .prototypes import contrast, orthogonal


class ConceptBank:
    """Named concepts of one text encoder.

    `bank["disney"]` is a `Concept`; iteration gives names. Changing a bank that is installed takes
    effect at the next call of the pipeline. Any thread may change it while others read: a change is made
    beside what they read and takes its place at once, and `snapshot()` gives several looks the same view.

    Args:
        concepts: by name; all of one width.
        fingerprint: of the text encoder that they come from.
        pipe: the pipeline that has it, held weakly.
        neutral: see the attribute.

    Raises:
        ValueError: concepts or neutral tokens of different widths.
    """

    def __init__(
        self,
        concepts: Mapping[str, Concept],
        fingerprint: Fingerprint,
        pipe: Any = None,
        neutral: Tensor | None = None,
    ) -> None:
        self.fingerprint = fingerprint
        self._changing = threading.Lock()
        self._now = Snapshot(0, {})
        self._width = 0
        self._pipe = weakref.ref(pipe) if pipe is not None else None
        for name, concept in concepts.items():
            self.update(name, concept)
        if neutral is not None:
            self.neutral = neutral

    @classmethod
    def from_prompts(
        cls,
        pipe: Any,
        prompts: Mapping[str, str | Sequence[str]],
        *,
        templates: Templates | None = None,
        neutral: str | Sequence[str] | Tensor | None = None,
        called: str = "prompts",
    ) -> ConceptBank:
        """Encode concepts with a pipeline's own text encoder.

        Everything is checked before the first encoding. A progress bar appears after two seconds, unless
        `pipe.set_progress_bar_config(disable=True)`.

        Args:
            pipe: a supported pipeline.
            prompts: concept name -> its member phrases ("warm": ["red", "orange", "yellow"]). A concept
                may have more members than one prompt holds: rules that read prototypes do not mind,
                the others refuse it.
            templates: captions in which a member is encoded for its prototype, or a function from
                member to captions. `{}` stands for the member; square brackets may mark a longer span
                to average, e.g. "a [{} dress] on a chair". Default: a few plain captions, as far as the
                tokenizer knows their words; or what the tokenizer's own `concept_templates(member)`
                offers, if it has that.
            neutral: tokens that say nothing in particular, for rules that centre: `empty`, the end of the
                encoder's empty caption; `padding`, the mean of what fills it; `mean`, the mean token of many
                common words, or of phrases given as a list; or embeddings [T, C].
            called: what error messages call `prompts`.

        Raises:
            UnsupportedModelError: the pipeline is not a supported one, or has no text encoder.
            ValueError: an empty concept, a member that is too long or has characters that the tokenizer
                does not know, a template without `{}` or whose spans have different numbers of tokens, or
                neutral tokens that the encoder does not have.
        """
        owner = host.of(pipe)
        fingerprint = owner.fingerprint(pipe)  # first: it is quick, and may refuse
        if neutral is not None and not isinstance(neutral, Tensor):
            neutral = owner.neutral(pipe, neutral, templates)
        return cls(owner.encode(pipe, prompts, templates, called), fingerprint, pipe, neutral)

    @classmethod
    def load(cls, path: str | Path, pipe: Any) -> ConceptBank:
        """Read a bank file for `pipe`.

        Raises:
            ValueError: not a bank file (pickles are refused unread).
            BankMismatchError: made for another text encoder, or its directions for another denoiser.
            UnsupportedModelError: the pipeline's text encoder is away and was never seen.
        """
        theirs, concepts, neutral = contents(path)
        ours = host.of(pipe).fingerprint(pipe)
        if (difference := ours.difference(theirs)) is not None:
            raise BankMismatchError(f"path={str(path)!r} was made for another text encoder: {difference}")
        bank = cls(concepts, ours, pipe, neutral)
        bank._check_directions(pipe, f"path={str(path)!r}")
        return bank

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; the same bank gives the same bytes."""
        now = self.snapshot()
        write(path, Contents(self.fingerprint, now.concepts, now.neutral))

    def update(self, name: str, embeddings: Concept | Tensor | Sequence[Tensor]) -> None:
        """Add or replace a concept: a `Concept`, or embeddings as in `Concept.from_embeddings`.

        Raises:
            ValueError: no concept can be made of it, it has another width than the bank, or directions of
                another denoiser or of other layers than those in the bank. The bank is as it was.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"name={name!r}: must be a str that is not empty")
        concept = embeddings if isinstance(embeddings, Concept) else Concept.from_embeddings(embeddings)
        self._put({name: concept})

    def _put(self, new: Mapping[str, Concept]) -> None:
        """Add or replace all of them, or none."""
        with self._changing:
            known = directions_of({n: other for n, other in self._now.concepts.items() if n not in new})
            for name, concept in new.items():
                if (width := self._width) and concept.width != width:
                    raise ValueError(f"concept {name!r} has width {concept.width}: this bank has {width}")
                if (difference := _differ(known, concept.directions)) is not None:
                    raise ValueError(
                        f"concept {name!r} has directions of another denoiser than the bank's: {difference}"
                    )
            self._width = concept.width
            self._become({**self._now.concepts, **new})

    def add_directions(
        self,
        pipe: Any,
        pairs: Mapping[str, Sequence[tuple[str, str]]],
        *,
        make_orthogonal: bool = False,
        seed: int = 0,
        batch: int = 8,
        on_call: Callable[[], None] = lambda: None,
        **call: Any,
    ) -> None:
        """Collect steering directions of concepts, for rules that read one (`casteer`).

        The pipeline runs on each pair of prompts, with the concept and without it, from the same noise. What
        a cross-attention layer gives is averaged over conditional rows, pixels, steps and prompts; the
        direction of a layer is the difference of both means, at length 1 (CASteer, arXiv 2503.09630). Two
        things differ from the publication: its vectors are of what comes out of the output projection, these
        of what goes into it, where the rule acts; and it has a vector for each step of Stable Diffusion 1.4,
        here one serves all steps, as there for few-step models.

        Args:
            pipe: the pipeline that the bank is of; no engine may be installed in it.
            pairs: name of a concept of the bank -> (prompt with it, prompt without it); 50 are many.
            make_orthogonal: take from each concept's directions what those before it in `pairs` have of them
                (Gram-Schmidt): together they remove what they share once, a later one alone leaves it.
            seed: of the noise; pair j of a concept begins from noise `seed + j`.
            batch: prompts in one call of the pipeline.
            on_call: called after each; there are `calls_for(pairs, batch)`.
            call: further arguments of these calls, e.g. `num_inference_steps`.

        Raises:
            UnsupportedModelError: the denoiser has no layers in which text is apart: a joint model's.
            ValueError: a name that the bank does not have, pairs that are none, a layer in which both prompts
                give the same, or an engine in the pipeline. The bank is as it was.
        """
        if not pairs:
            raise ValueError("pairs is empty: there is nothing to collect")
        for name, prompts in pairs.items():
            self[name]
            texts = [text for pair in prompts for text in pair] if not isinstance(prompts, str) else [None]
            alike = all(len(pair) == 2 and pair[0] != pair[1] for pair in prompts)
            if not texts or not alike or not all(isinstance(text, str) for text in texts):
                raise ValueError(
                    f"pairs[{name!r}]={prompts!r}: must be pairs of prompts, with the concept and without"
                )
        owner = host.of(pipe)
        model, made = owner.denoiser_fingerprint(pipe), []
        for prompts in pairs.values():
            means = [
                owner.attention_means(pipe, [pair[i] for pair in prompts], seed, batch, on_call, call)
                for i in (0, 1)
            ]
            made.append(contrast(*means))
        if make_orthogonal:
            made = orthogonal(made)
        new = {name: Directions(u, model) for name, u in zip(pairs, made)}
        self._put({name: dataclasses.replace(self[name], directions=u) for name, u in new.items()})

    def remove(self, name: str) -> None:
        """Forget a concept. Raises ValueError if there is none of that name."""
        with self._changing:
            self[name]
            self._become({n: concept for n, concept in self._now.concepts.items() if n != name})

    def replace(self, other: ConceptBank) -> None:
        """Become what `other` is now, all concepts and neutral tokens at once: who reads meanwhile has the
        old ones or the new ones, and a call of the pipeline that runs keeps what it began with.

        Raises:
            TypeError: no bank.
            BankMismatchError: `other` is of another text encoder, or has directions of another denoiser. The
                bank is as it was.
        """
        if not isinstance(other, ConceptBank):
            raise TypeError(f"other is a {type(other).__name__}: must be a ConceptBank")
        if (difference := self.fingerprint.difference(other.fingerprint)) is not None:
            raise BankMismatchError(f"other was made for another text encoder: {difference}")
        new = other.snapshot()
        with self._changing:
            difference = _differ(directions_of(self._now.concepts), directions_of(new.concepts))
            if difference is not None:
                raise BankMismatchError(f"other has directions of another denoiser: {difference}")
            self._width = other.width or self._width
            self._now = dataclasses.replace(new, version=self._now.version + 1)

    def snapshot(self) -> Snapshot:
        """The version and the concepts of one moment, together."""
        return self._now

    def _become(self, concepts: dict[str, Concept]) -> None:
        self._now = Snapshot(self._now.version + 1, concepts, self._now.neutral)

    def check(self, pipe: Any) -> None:
        """Raise BankMismatchError unless this bank was made for the text encoder of `pipe`, and its
        directions for its denoiser; UnsupportedModelError where one is away and was never seen."""
        if (difference := host.of(pipe).fingerprint(pipe).difference(self.fingerprint)) is not None:
            raise BankMismatchError(f"the bank was made for another text encoder: {difference}")
        self._check_directions(pipe, "the bank")

    def _check_directions(self, pipe: Any, called: str) -> None:
        directions = directions_of(self.snapshot().concepts)
        if directions is None:
            return
        difference = host.of(pipe).denoiser_fingerprint(pipe).difference(directions.model)
        if difference is not None:
            raise BankMismatchError(f"{called} has directions of another denoiser: {difference}")

    @property
    def neutral(self) -> Tensor | None:
        """float32 [T, C], T > 0: tokens that say nothing in particular, for rules that centre. May be set,
        None for none: ValueError for embeddings that are none, or of another width than the bank."""
        return self._now.neutral

    @neutral.setter
    def neutral(self, embeddings: Tensor | None) -> None:
        if embeddings is None:
            with self._changing:
                self._now = Snapshot(self._now.version + 1, self._now.concepts)
            return
        tokens = Concept.from_embeddings(embeddings).prompt
        with self._changing:
            if not len(tokens) or self._width not in (0, tokens.shape[1]):
                raise ValueError(
                    f"neutral has shape {list(tokens.shape)}: must be [T, {self._width or 'C'}], T > 0"
                )
            self._width = tokens.shape[1]
            self._now = Snapshot(self._now.version + 1, self._now.concepts, tokens)

    @property
    def version(self) -> int:
        """Grows with every change."""
        return self._now.version

    @property
    def digest(self) -> str:
        """Of what is in it now: `Snapshot.digest`."""
        return self._now.digest

    @property
    def width(self) -> int:
        """C, the width of the embeddings; 0 before the first concept."""
        return self._width

    @property
    def pipe(self) -> Any:
        """The pipeline it was made with, while that lives; else None."""
        return self._pipe() if self._pipe is not None else None

    def __getitem__(self, name: str) -> Concept:
        concepts = self._now.concepts
        if name not in concepts:
            raise ValueError(f"concept {name!r}: the bank has {', '.join(concepts) or 'none'}")
        return concepts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._now.concepts)

    def __len__(self) -> int:
        return len(self._now.concepts)

    def __contains__(self, name: object) -> bool:
        return name in self._now.concepts

    def __repr__(self) -> str:
        concepts = self._now.concepts
        shown = [f"{name} ({counted(len(c.members), 'member')})" for name, c in concepts.items()]
        if len(shown) > 5:
            shown[4:] = [f"{len(shown) - 4} more"]
        listed = f": {', '.join(shown)}" if shown else ""
        return f"ConceptBank({counted(len(concepts), 'concept')}{listed}; width {self._width})"

    def __getstate__(self) -> dict[str, Any]:  # weak references and locks do not pickle
        state = {**self.__dict__, "_pipe": None}
        del state["_changing"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._changing = threading.Lock()


def _differ(ours: Directions | None, theirs: Directions | None) -> str | None:
    """How the denoisers differ that directions are of, or None."""
    if ours is None or theirs is None:
        return None
    difference = ours.model.difference(theirs.model)
    return difference or (None if ours.shapes == theirs.shapes else "other layers")


def calls_for(pairs: Mapping[str, Sequence[tuple[str, str]]], batch: int = 8) -> int:
    """How many calls of a pipeline `ConceptBank.add_directions` makes."""
    return sum(2 * -(-len(prompts) // batch) for prompts in pairs.values())
