# SPDX-License-Identifier: Apache-2.0
"""Phrases -> `Concept`s, with a pipeline's own tokenizers and text encoders.

First everything is asked of the tokenizers, which refuse what cannot be encoded; then each text is encoded
once, in batches, by the pipeline's own `encode_prompt`, and only what the concepts need of it is kept.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ...engine.concepts import Concept, Role, Templates
from ...engine.errors import UnsupportedModelError
from ...engine.prototypes import DEFAULT_TEMPLATES, Caption, prototype
from .families import family

log = logging.getLogger("fastnegate")
BATCH = 32  # texts in one call of the text encoders


class Span(NamedTuple):
    """Tokens `first` to `last` of the encoding of `text`."""

    text: str
    first: int
    last: int


class Plan(NamedTuple):
    """What is to be encoded for one concept.

    Attributes:
        prompt: the joint prompt; "" where one prompt cannot hold all members.
        members: the phrases.
        spans: for each member, where it stands in its captions.
    """

    prompt: str
    members: tuple[str, ...]
    spans: list[list[Span]]


def encode(
    pipe: Any,
    prompts: Mapping[str, str | Sequence[str]],
    templates: Templates | None = None,
    called: str = "prompts",
) -> dict[str, Concept]:
    """Concepts by name; see `ConceptBank.from_prompts`."""
    words = Words(pipe)
    if not isinstance(prompts, Mapping) or not prompts:
        raise ValueError(f"{called}={prompts!r}: must map concept names to member phrases")
    if isinstance(templates, str):
        raise ValueError(f"templates={templates!r}: must be several captions, or a function of the member")
    plans = {}
    for name, phrases in prompts.items():
        members = (phrases,) if isinstance(phrases, str) else tuple(phrases)
        if not members or not all(isinstance(m, str) and m.strip() for m in members):
            raise ValueError(f"{called}[{name!r}]={phrases!r}: must be phrases that are not empty")
        for member in members:
            words.check(f"{called}[{name!r}]", member)
        joint = " ".join(members)  # one negative prompt, as GIE joins it
        spans = [words.spans(member, templates) for member in members]
        plans[name] = Plan(joint if words.fit(members) else "", members, spans)
    return dict(zip(plans, _carry_out(words, list(plans.values()))))


def negative_prompt(pipe: Any, text: str) -> Concept:
    """A negative prompt as the pipeline encodes it; its comma-separated parts are the members.

    Raises:
        UnsupportedModelError: the pipeline is not a supported one, or has no text encoder.
        ValueError: not a str, blank, too long for the encoder, or characters that it does not know.
    """
    words = Words(pipe)
    parts = tuple(p.strip() for p in text.split(",") if p.strip()) if isinstance(text, str) else ()
    if not parts:
        raise ValueError(f"negative_prompt={text!r}: must be a text that is not blank")
    words.check("negative_prompt", text)
    for part in parts:
        words.check("negative_prompt", part)
    (concept,) = _carry_out(words, [Plan(text, parts, [words.spans(part) for part in parts])])
    return concept


class Words:
    """A pipeline's tokenizers: how many tokens a text has, and where, known before anything is encoded."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.family = pipe, family(pipe)
        for name in (name for names in self.family.encoders for name in names):
            if getattr(pipe, name) is None:
                raise UnsupportedModelError(
                    f"pipe.{name} is None, so nothing can be encoded: make the concepts before freeing it, "
                    "or load a bank that was saved"
                )
        self.tokenizers = [getattr(pipe, tokenizer) for tokenizer, _ in self.family.encoders]
        special = self.tokenizers[0]("").input_ids
        self.starts = len(special) - 1  # T5 ends a text, CLIP also begins it
        length = inspect.signature(pipe.encode_prompt).parameters.get("max_sequence_length")
        longest: int = length.default if length else self.tokenizers[0].model_max_length
        self.room = longest - len(special)
        self.left_out: dict[str, None] = {}  # default templates that this tokenizer does not take
        self._known: dict[str, list[list[int]]] = {}

    def ids(self, text: str) -> list[list[int]]:
        """What each tokenizer makes of a text, without special tokens.

        Raises:
            ValueError: unknown characters or words, or tokenizers that do not agree where words are.
        """
        if text not in self._known:
            made = [self._ids(text, tokenizer) for tokenizer in self.tokenizers]
            if len({len(ids) for ids in made}) > 1:
                counts = " and ".join(str(len(ids)) for ids in made)
                raise ValueError(f"{text!r} has {counts} tokens: the pipeline's tokenizers must agree")
            self._known[text] = made
        return self._known[text]

    def _ids(self, text: str, tokenizer: Any) -> list[int]:
        text = text.strip()
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
        lengths = {span.last - span.first for span in spans}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(
                f"templates: {member!r} has {sorted(lengths)} tokens in the marked spans: must be one length"
            )
        return spans

    def _default_spans(self, member: str) -> list[Span]:
        """In the captions that the tokenizer itself offers for this member, else in the default ones: those
        whose words it knows and that are not too long. The member alone always is one of them."""
        offers = getattr(self.tokenizers[0], "concept_templates", None)
        if offers is not None and (offered := offers(member)):
            return [self._span(template, member) for template in offered]
        spans = []
        for template in DEFAULT_TEMPLATES:
            try:
                spans.append(self._span(template, member))
            except ValueError:
                self.left_out[template] = None
        return spans

    def _span(self, template: str, member: str) -> Span:
        caption = Caption.of(template, member)
        begin, end = caption.before, caption.before + caption.span
        self.check("templates", caption.text)
        for whole, before, until in zip(self.ids(caption.text), self.ids(begin), self.ids(end)):
            if whole[: len(before)] != before or whole[: len(until)] != until:
                raise ValueError(f"templates: {caption.span!r} in {caption.text!r} must be whole tokens")
        return Span(caption.text, self.starts + self.count(begin), self.starts + self.count(end))

    def roles(self, text: str, length: int) -> Tensor:
        """int8 [length], the `Role` of each token of an encoded text."""
        end = self.starts + self.count(text)
        roles = torch.full((length,), Role.PADDING, dtype=torch.int8)
        roles[: self.starts] = Role.SOT
        roles[self.starts : end] = Role.CONTENT
        roles[end] = Role.EOT
        return roles


def _carry_out(words: Words, plans: Sequence[Plan]) -> list[Concept]:
    if words.left_out:
        log.info("captions that the tokenizer does not take are left out: %s", ", ".join(words.left_out))
    spans = [span for plan in plans for member in plan.spans for span in member]
    wanted: dict[str, list[Span]] = {plan.prompt: [] for plan in plans if plan.prompt}
    for span in dict.fromkeys(spans):
        wanted.setdefault(span.text, []).append(span)
    whole = {plan.prompt for plan in plans}
    texts = list(wanted)
    prompts: dict[str, tuple[Tensor, Tensor]] = {}
    parts: dict[Span, Tensor] = {}
    shown = {"delay": 2, "leave": False, "unit": "text", "desc": "encoding concepts"}
    shown.update(getattr(words.pipe, "_progress_bar_config", {}))
    with torch.inference_mode(False), tqdm(total=len(texts), **shown) as bar:
        for i in range(0, len(texts), BATCH):
            batch = texts[i : i + BATCH]
            for text, embeddings, kept in zip(batch, *_encode(words.pipe, batch)):
                if text in whole:
                    prompts[text] = embeddings[kept], words.roles(text, len(embeddings))[kept]
                for span in wanted[text]:
                    parts[span] = embeddings[span.first : span.last].clone()  # the rest is let go
            bar.update(len(batch))
        concepts = []
        for plan in plans:
            prototypes = tuple(prototype([parts[span] for span in member]) for member in plan.spans)
            none = prototypes[0][:0], torch.empty(0, dtype=torch.int8)
            concepts.append(Concept(*prompts.get(plan.prompt, none), prototypes, plan.members))
    return concepts


@torch.no_grad()
def _encode(pipe: Any, texts: list[str]) -> tuple[Tensor, Tensor]:
    """float32 embeddings [texts, L, C] on the CPU, and bool [texts, L]: which the model does not mask."""
    entry = family(pipe)
    with _evaluating([getattr(pipe, encoder) for _, encoder in entry.encoders]):
        embeddings, mask, *_ = pipe.encode_prompt(
            texts,
            device=pipe._execution_device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
    kept = mask.bool().cpu() if entry.masked_padding else torch.ones(embeddings.shape[:2], dtype=torch.bool)
    return embeddings.float().cpu(), kept


@contextlib.contextmanager
def _evaluating(models: Sequence[Any]) -> Iterator[None]:
    """Without dropout, which would make an encoding random and draw from the caller's generator."""
    training = [module for model in models for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
