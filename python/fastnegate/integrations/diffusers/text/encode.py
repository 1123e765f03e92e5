# SPDX-License-Identifier: Apache-2.0
"""Phrases -> `Concept`s, with a pipeline's own tokenizers and text encoders.

First everything is asked of the tokenizers, which refuse what cannot be encoded; then each text is encoded
once, in batches, by the pipeline's own `encode_prompt`, and only what the concepts need of it is kept.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from ....engine.concepts import Concept, Templates
from ....engine.prototypes import prototype
from ..contract import encoder_of, encoders_of, family
from .words import Span, Words, turn

log = logging.getLogger("fastnegate")


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
    words = Words(encoder_of(pipe))
    if not isinstance(prompts, Mapping) or not prompts:
        raise ValueError(f"{called}={prompts!r}: must map concept names to member phrases")
    if isinstance(templates, str):
        raise ValueError(f"templates={templates!r}: must be several captions, or a function of the member")
    plans = {}
    for name, phrases in prompts.items():
        members = (phrases,) if isinstance(phrases, str) else tuple(phrases or ())
        if not members or not all(isinstance(m, str) and m.strip() for m in members):
            raise ValueError(f"{called}[{name!r}]={phrases!r}: must be phrases that are not empty")
        if not isinstance(name, str) or not name:
            raise ValueError(f"{called} has the name {name!r}: must be a str that is not empty")
        members = tuple(member.strip() for member in members)
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
    words, plan = _planned(pipe, text)
    (concept,) = _carry_out(words, [plan])
    return concept


def check_negative_prompt(pipe: Any, text: str) -> None:
    """Raise what `negative_prompt` would, without encoding anything."""
    _planned(pipe, text)


def _planned(pipe: Any, text: str) -> tuple[Words, Plan]:
    """What is to be encoded of a negative prompt."""
    words = Words(encoder_of(pipe))
    parts = tuple(p.strip() for p in text.split(",") if p.strip()) if isinstance(text, str) else ()
    if not parts:
        raise ValueError(f"negative_prompt={text!r}: must be a text that is not blank")
    text = text.strip()
    words.check("negative_prompt", text)
    for part in parts:
        words.check("negative_prompt", part)
    return words, Plan(text, parts, [words.spans(part) for part in parts])


def with_roles(pipe: Any, text: str) -> tuple[Tensor, Tensor]:
    """A text, which may be empty, as the pipeline encodes it: float32 [L, C] and the roles, int8 [L], of what
    the model attends to."""
    words = Words(encoder_of(pipe))
    with torch.inference_mode(False):
        (embeddings,), (kept,) = _encode(words.pipe, [text])
    roles = words.roles(text, words.begin(text, len(embeddings)), len(embeddings))
    return embeddings[kept], roles[kept]


def _carry_out(words: Words, plans: Sequence[Plan]) -> list[Concept]:
    """Encode every text once, and make a concept of each plan."""
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
        at_once = family(words.pipe).at_once
        for i in range(0, len(texts), at_once):
            batch = texts[i : i + at_once]
            for text, embeddings, kept in zip(batch, *_encode(words.pipe, batch)):
                begin = words.begin(text, len(embeddings))
                if text in whole:
                    roles = words.roles(text, begin, len(embeddings))
                    prompts[text] = embeddings[kept], roles[kept]
                for span in wanted[text]:
                    within = [slice(begin + span.first, begin + span.last)]
                    within += [slice(*span.tail)] if span.tail is not None else []
                    parts[span] = torch.cat([embeddings[at] for at in within])  # the rest is let go
            bar.update(len(batch))
        concepts = []
        for plan in plans:
            prototypes = tuple(prototype([parts[span] for span in member]) for member in plan.spans)
            none = prototypes[0][:0], torch.empty(0, dtype=torch.int8)
            concepts.append(Concept(*prompts.get(plan.prompt, none), prototypes, plan.members))
    return concepts


def empty(pipe: Any) -> Tensor:
    """What the empty text says [L, C], as pipelines encode it for unconditional rows: without what the model
    does not attend to, and without the special tokens that begin a text, unless there is nothing else. L > 0.

    Raises:
        UnsupportedModelError: the pipeline is not a supported one, or lacks a tokenizer or text encoder.
    """
    words = Words(encoder_of(pipe))
    with torch.inference_mode(False):
        embeddings, kept = _encode(words.pipe, [""])
    text = embeddings[0][kept[0]] if kept.any() else embeddings[0][:1]
    return text[words.starts :] if len(text) > words.starts else text


@torch.no_grad()
def _encode(pipe: Any, texts: list[str]) -> tuple[Tensor, Tensor]:
    """float32 embeddings [texts, L, C] on the CPU, and bool [texts, L]: which the model does not mask."""
    entry = family(pipe)
    with turn, evaluating([getattr(pipe, encoder) for _, encoder in encoders_of(pipe)]):
        embeddings, mask, *_ = pipe.encode_prompt(
            list(texts), device=pipe._execution_device, **entry.encoding
        )
        if entry.connectors is not None:
            connectors, side = getattr(pipe, entry.connectors), pipe.tokenizer.padding_side
            embeddings, of_sound, mask = connectors(embeddings, mask, padding_side=side)
            embeddings = torch.cat([embeddings, of_sound], -1)  # which have the same tokens
    if isinstance(embeddings, list):  # one of its own length for each
        lengths = torch.tensor([len(part) + -len(part) % entry.multiple for part in embeddings])
        embeddings = pad_sequence(embeddings, batch_first=True)
        embeddings = F.pad(embeddings, (0, 0, 0, int(lengths.max()) - embeddings.shape[1]))
        mask = torch.arange(embeddings.shape[1]) < lengths.unsqueeze(1)
    if not entry.masked_padding or mask is None:
        mask = torch.ones(embeddings.shape[:2], dtype=torch.bool)
    return embeddings.float().cpu(), mask.bool().cpu()


class Encoded(NamedTuple):
    """One text as the pipeline encodes it for its denoiser.

    Attributes:
        embeddings: [L, C], special tokens and padding, too.
        at: the token before which `behind` begins.
        pooled: [1, P], a vector of the whole text, where the model has one.
    """

    embeddings: Tensor
    at: int
    pooled: Tensor | None


@torch.no_grad()
def encode_whole(pipe: Any, before: str, behind: str, called: str) -> Encoded:
    """Encode `before` and `behind` as one text.

    Raises:
        UnsupportedModelError: the pipeline is not a supported one, or has no text encoder.
        ValueError: too long for the encoder, or words that it does not know; named `called`.
    """
    words, text = Words(encoder_of(pipe)), f"{before.strip()} {behind.strip()}".strip()
    if text:
        words.check(called, text)
    with turn, evaluating([getattr(words.pipe, encoder) for _, encoder in encoders_of(words.pipe)]):
        embeddings, *rest = words.pipe.encode_prompt(
            [text], device=words.pipe._execution_device, **family(pipe).encoding
        )
    of_text = words.begin(text, embeddings.shape[1]) + words.starts
    vectors = (vector for vector in rest if isinstance(vector, Tensor) and vector.shape[:1] == (1,))
    pooled = next((vector for vector in vectors if vector.dim() == 2), None)
    return Encoded(embeddings[0], of_text + words.count(before), pooled)


@contextlib.contextmanager
def evaluating(models: Sequence[Any]) -> Iterator[None]:
    """Without dropout, which would make an encoding random and draw from the caller's generator."""
    training = [module for model in models for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
