# SPDX-License-Identifier: Apache-2.0
"""Tokens that say nothing in particular, for rules that centre (docs/semantics.md, section 11)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ....engine.concepts import Role, Templates
from ..contract import encoder_of
from .encode import encode, with_roles
from .words import Words

KINDS = ("empty", "padding", "mean")
# Things, beings, places, looks and colours: what their tokens have in common is nobody's.
COMMON = (
    "person", "woman", "child", "crowd", "animal", "dog", "bird", "fish", "horse", "tree", "flower", "grass",
    "food", "fruit", "bread", "cup", "table", "chair", "book", "clock", "car", "boat", "train", "bridge",
    "house", "street", "city", "room", "window", "mountain", "river", "beach", "sky", "cloud", "rain", "snow",
    "fire", "stone", "metal", "wood", "glass", "cloth", "red", "blue", "green", "yellow", "white", "black",
    "large", "small", "old", "new", "bright", "dark", "round", "square", "happy", "sad", "photo", "painting",
)  # fmt: skip


def neutral(pipe: Any, given: str | Sequence[str], templates: Templates | None = None) -> Tensor:
    """float32 [T, C]; see `ConceptBank.from_prompts`.

    Raises:
        UnsupportedModelError: the pipeline is not a supported one, or has no text encoder.
        ValueError: no such kind, or the text encoder has no such tokens.
    """
    if isinstance(given, str) and given not in KINDS:
        raise ValueError(
            f"neutral={given!r}: must be {', '.join(KINDS)}, a list of phrases, or embeddings [T, C]"
        )
    if given in ("empty", "padding"):
        embeddings, roles = with_roles(pipe, "")
        found = embeddings[roles == (Role.EOT if given == "empty" else Role.PADDING)]
        if not len(found):
            raise ValueError(f"neutral={given!r}: the text encoder has no such tokens; take another kind")
        return found if given == "empty" else found.mean(0, keepdim=True)
    phrases = given
    if isinstance(given, str):
        phrases, templates = _known(Words(encoder_of(pipe))), None
        if not phrases:
            raise ValueError("neutral='mean': the tokenizer knows none of the words; give a list of phrases")
    concepts = encode(pipe, {phrase: phrase for phrase in phrases}, templates, "neutral")
    # Not at the length of a token, as prototypes are: what is common to all is as long as it is.
    tokens = torch.cat([tokens for concept in concepts.values() for tokens in concept.prototypes])
    return tokens.mean(0, keepdim=True)


def _known(words: Words) -> list[str]:
    """Of the common words those that the tokenizer takes."""
    known = []
    for word in COMMON:
        try:
            words.check("neutral", word)
            words.spans(word)
        except ValueError:
            continue
        known.append(word)
    return known
