# SPDX-License-Identifier: Apache-2.0
"""What a pipeline's tokenizers know about a text before anything is encoded: how many tokens it has, where a
phrase stands in it, and whether the text encoders can read it at all.
"""

from __future__ import annotations

import copy
import inspect
import threading
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....engine.concepts import Role, Templates
from ....engine.errors import UnsupportedModelError
from ....engine.prototypes import DEFAULT_TEMPLATES, Caption
from ..contract import encoders_of, family, frame, text_tokenizer

# A tokenizer remembers the padding and truncation of its last call and reads them when it works. Two threads
# that share one therefore pad each other's texts. The pipeline's may be in use, so ours are copies, one
# thread at a time.
turn = threading.RLock()
_copies: weakref.WeakKeyDictionary[Any, tuple[object, Any]] = weakref.WeakKeyDictionary()


def beside(pipe: Any) -> Any:
    """The same pipeline with tokenizers of its own; to be used within `turn`."""
    twin = copy.copy(pipe)
    for name, _ in encoders_of(pipe):
        tokenizer = getattr(pipe, name)
        with turn:
            words = text_tokenizer(tokenizer)
            state = (len(words), words.model_max_length, str(words.special_tokens_map))
            if _copies.get(tokenizer, (None,))[0] != state:  # new, or words were added since
                _copies[tokenizer] = state, copy.deepcopy(tokenizer)
            vars(twin)[name] = _copies[tokenizer][1]
    return twin


class Span(NamedTuple):
    """Tokens `first` to `last` of `text`, special ones before it counted; and of its encoding by another
    encoder, which follows, the `tail`."""

    text: str
    first: int
    last: int
    tail: tuple[int, int] | None = None

    @property
    def length(self) -> int:
        return self.last - self.first + (0 if self.tail is None else self.tail[1] - self.tail[0])


class Words:
    """The words of one pipeline.

    Attributes:
        pipe: the pipeline, with tokenizers of its own (`beside`).
        starts, ends: how many special tokens come before and after a text.
        room: the most tokens of a text that is encoded whole.
        left_out: default templates that these tokenizers did not take.

    Raises:
        UnsupportedModelError: the pipeline is not a supported one, or lacks a tokenizer or text encoder.
    """

    def __init__(self, pipe: Any) -> None:
        self._family = family(pipe)
        encoders = encoders_of(pipe)
        for name in (name for names in encoders for name in names):
            if getattr(pipe, name) is None:
                raise UnsupportedModelError(
                    f"pipe.{name} is None, so nothing can be encoded: make the concepts before freeing it, "
                    "or load a bank that was saved"
                )
        self._offers = getattr(getattr(pipe, encoders[0][0]), "concept_templates", None)
        self.pipe = beside(pipe)
        self.tokenizers = [text_tokenizer(getattr(self.pipe, tokenizer)) for tokenizer, _ in encoders]
        behind = self._family.tail and len(encoders) == len(self._family.encoders)
        self._tail = self.tokenizers.pop() if behind else None
        with turn:
            self.starts, self.ends = self._around()
        length = inspect.signature(pipe.encode_prompt).parameters.get("max_sequence_length")
        longest = (length.default if length else None) or self.tokenizers[0].model_max_length
        self.room: int = self._family.encoding.get("max_sequence_length", longest) - self.starts - self.ends
        self.left_out: dict[str, None] = {}
        self._known: dict[str, list[list[int]]] = {}

    def _around(self) -> tuple[int, int]:
        """How many tokens come before and after a text."""
        tokenizer = self.tokenizers[0]

        def ids(text: str, special: bool = True) -> list[int]:
            special &= self._family.framed is None  # a frame has them all
            made: list[int] = tokenizer(text, add_special_tokens=special).input_ids
            return made

        if self._family.framed is None:
            starts = ids("a").index(ids("a", False)[0])  # CLIP and Gemma begin a text, CLIP and T5 end it
            return starts, len(ids("")) - starts
        before, after = frame(self.pipe)
        starts = len(ids(before)) - self._family.dropped(self.pipe)
        if starts < 0:
            raise UnsupportedModelError(
                f"{type(self.pipe).__name__} drops tokens behind the {before!r} that it puts before a text"
            )
        return starts, len(ids(after))

    def _keeps_apart(self, text: str) -> bool:
        """Whether a text has the tokens of its own also within its frame."""
        if self._family.framed is None:
            return True
        with turn:
            whole, *parts = (
                self.tokenizers[0](part, add_special_tokens=False).input_ids
                for part in (self._family.framed(self.pipe, text), *frame(self.pipe))
            )
        return bool(whole == parts[0] + self.ids(text)[0] + parts[1])

    def ids(self, text: str) -> list[list[int]]:
        """What each tokenizer makes of a text, without special tokens.

        Raises:
            ValueError: unknown characters or words, or tokenizers that do not agree where words are.
        """
        if text not in self._known:
            with turn:
                made = [self._ids(text, tokenizer) for tokenizer in self.tokenizers]
            if len({len(ids) for ids in made}) > 1:
                counts = " and ".join(str(len(ids)) for ids in made)
                raise ValueError(f"{text!r} has {counts} tokens: the pipeline's tokenizers must agree")
            self._known[text] = made
        return self._known[text]

    def _ids(self, text: str, tokenizer: Any) -> list[int]:
        text = self._family.cleaned(text.strip())
        if not text:
            return []
        # What the pipeline tokenizes: PixArt lower-cases prompts, the Stable Diffusion pipelines expand
        # learned tokens of several vectors.
        if hasattr(self.pipe, "_text_preprocessing"):
            text = self.pipe._text_preprocessing(text)[0]
        if hasattr(self.pipe, "maybe_convert_prompt"):
            text = self.pipe.maybe_convert_prompt(text, tokenizer)
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if tokenizer.unk_token_id in ids:
            raise ValueError(f"{text!r} has characters or words that the tokenizer does not know")
        return ids

    def count(self, text: str) -> int:
        """How many tokens a text has, not counting special ones."""
        return len(self.ids(text)[0])

    def check(self, called: str, text: str) -> None:
        """Raise ValueError, which names `called`, unless `text` can be encoded whole."""
        try:
            tokens = self.count(text)
        except ValueError as error:
            raise ValueError(f"{called}: {error}") from error
        if not tokens:
            raise ValueError(f"{called}: {text!r} has no tokens")
        if not self._keeps_apart(text):
            raise ValueError(
                f"{called}: {text!r} mixes with what {type(self.pipe).__name__} puts around a text"
            )
        if tokens > self.room:
            raise ValueError(f"{called}: {text!r} has {tokens} tokens: the encoder takes {self.room}")

    def fit(self, members: Sequence[str]) -> bool:
        """Whether one prompt holds them all."""
        return sum(self.count(member) for member in members) <= self.room

    def spans(self, member: str, templates: Templates | None = None) -> list[Span]:
        """Where `member` stands in each of its captions.

        Raises:
            ValueError: a template or the caption it makes is wrong, or the spans differ in length.
        """
        if templates is None:
            spans = self._default_spans(member)
        else:
            given = templates(member) if callable(templates) else templates
            spans = [self._span(template, member) for template in given]
        lengths = {span.length for span in spans}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(
                f"templates: {member!r} has {sorted(lengths)} tokens in the marked spans: must be one length"
            )
        return spans

    def _default_spans(self, member: str) -> list[Span]:
        """In the captions that the tokenizer itself offers for this member, else in the default ones: those
        whose words it knows, that are not too long, and where the member has as many tokens as in most (a
        word that begins a text may have others)."""
        if self._offers is not None and (offered := self._offers(member)):
            return [self._span(template, member) for template in offered]
        spans = []
        for template in DEFAULT_TEMPLATES:
            try:
                spans.append(self._span(template, member))
            except ValueError:
                self.left_out[template] = None
        usual = Counter(span.length for span in spans).most_common(1)[0][0]
        return [span for span in spans if span.length == usual]

    def _span(self, template: str, member: str) -> Span:
        caption = Caption.of(template.strip() if isinstance(template, str) else template, member)
        begin, end = caption.before, caption.before + caption.span
        self.check("templates", caption.text)
        for whole, before, until in zip(self.ids(caption.text), self.ids(begin), self.ids(end)):
            if whole[: len(before)] != before or whole[: len(until)] != until:
                raise ValueError(f"templates: {caption.span!r} in {caption.text!r} must be whole tokens")
        first, last = (self.starts + self.count(part) for part in (begin, end))
        if self._tail is None:
            return Span(caption.text, first, last)
        with turn:
            whole, before, until = (self._ids(part, self._tail) for part in (caption.text, begin, end))
        if whole[: len(before)] != before or whole[: len(until)] != until:
            raise ValueError(f"templates: {caption.span!r} in {caption.text!r} must be whole tokens")
        return Span(caption.text, first, last, (self._behind + len(before), self._behind + len(until)))

    @property
    def _behind(self) -> int:
        """Where the tail begins."""
        return int(self.tokenizers[0].model_max_length)

    def begin(self, text: str, length: int) -> int:
        """Where a text begins in its encoding."""
        if not self._family.left(self.pipe):
            return 0
        return int(length - self.starts - self.count(text) - self.ends)

    def roles(self, text: str, begin: int, length: int) -> Tensor:
        """int8 [length], the `Role` of each token of an encoded text."""
        start = begin + self.starts
        end = start + self.count(text)
        roles = torch.full((length,), Role.PADDING, dtype=torch.int8)
        roles[begin:start] = Role.SOT
        roles[start:end] = Role.CONTENT
        roles[end : end + self.ends] = Role.EOT
        if self._tail is not None:
            with turn:
                end = self._behind + len(self._ids(text, self._tail))
            roles[self._behind : end] = Role.CONTENT
            roles[end : end + 1] = Role.EOT
        return roles
