# SPDX-License-Identifier: Apache-2.0
"""Concept phrases -> `ConceptBank`, with a pipeline's own text encoders."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...engine.concepts import Concept, ConceptBank, Fingerprint, Role, Templates
from .families import UnsupportedModelError, family

# A member's prototype is the mean of its contextual token embeddings over these captions.
DEFAULT_TEMPLATES = ("{}", "a photo of {}", "a painting of {}", "a picture with {} in it", "{} and a tree")

_SPAN = re.compile(r"^(?P<before>[^\[\]]*)\[(?P<span>[^\[\]]*\{\}[^\[\]]*)\](?P<after>[^\[\]]*)$")


def bank_from_prompts(
    pipe: Any, prompts: Mapping[str, str | Sequence[str]], templates: Templates | None
) -> ConceptBank:
    """See `ConceptBank.from_prompts`."""
    family(pipe)
    if not isinstance(prompts, Mapping) or not prompts:
        raise ValueError(f"prompts={prompts!r}: must map concept names to member phrases")
    concepts = {}
    for name, members in prompts.items():
        members = [members] if isinstance(members, str) else list(members)
        if not members or not all(isinstance(m, str) and m.strip() for m in members):
            raise ValueError(f"prompts[{name!r}]={members!r}: must be phrases that are not empty")
        embeddings, roles = _encode(pipe, " ".join(members))  # one negative prompt, as GIE joins it
        captions = templates if callable(templates) else lambda _: templates or DEFAULT_TEMPLATES
        prototypes = tuple(_prototype(pipe, member, captions(member)) for member in members)
        concepts[name] = Concept(embeddings, roles, prototypes, tuple(members))
    return ConceptBank(concepts, fingerprint(pipe), pipe)


def fingerprint(pipe: Any) -> Fingerprint:
    """Identity of the text encoders of `pipe`.

    Raises:
        UnsupportedModelError: the weights are offloaded, so they cannot be sampled.
    """
    facts: dict[str, Any] = {}
    samples = []
    for tokenizer_name, encoder_name in family(pipe).encoders:
        tokenizer, encoder = getattr(pipe, tokenizer_name), getattr(pipe, encoder_name)
        vocabulary = "\n".join(f"{i} {t}" for t, i in sorted(tokenizer.get_vocab().items()))
        facts[encoder_name] = type(encoder).__name__
        facts[tokenizer_name] = hashlib.sha256(vocabulary.encode()).hexdigest()[:16]
        for name, parameter in encoder.named_parameters():
            if parameter.device.type == "meta":
                raise UnsupportedModelError(
                    f"{encoder_name}.{name} is offloaded: make or load the bank before enabling offload"
                )
            flat = parameter.detach().flatten()
            where = torch.linspace(0, flat.numel() - 1, 4).long().to(flat.device)
            samples.append(flat[where].float().cpu())
    sample = torch.cat(samples)
    facts["sampled"] = len(sample)
    return Fingerprint(facts, sample)


def _encode(pipe: Any, text: str) -> tuple[Tensor, Tensor]:
    """Embeddings [L, C] and roles [L] of one caption; padding the model masks is left out."""
    entry = family(pipe)
    device = pipe._execution_device
    with torch.no_grad():
        if entry.masked_padding:
            embeddings, mask, _, _ = pipe.encode_prompt(
                text, do_classifier_free_guidance=False, device=device
            )
            kept = mask[0].bool().cpu()
        else:
            embeddings = pipe.encode_prompt(
                prompt=text, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )[0]
            kept = torch.ones(embeddings.shape[1], dtype=torch.bool)
    embeddings = embeddings[0].float().cpu()
    tokenizer = getattr(pipe, entry.encoders[0][0])
    content = _count(pipe, text)
    starts = int(_starts(tokenizer))
    roles = torch.full((len(embeddings),), Role.PADDING, dtype=torch.int8)
    roles[:starts] = Role.SOT
    roles[starts : starts + content] = Role.CONTENT
    roles[starts + content : starts + content + 1] = Role.EOT
    if starts + content + 1 > len(embeddings):
        raise ValueError(f"{text!r} has {content} tokens: the encoder takes {len(embeddings) - starts - 1}")
    return embeddings[kept], roles[kept]


def _count(pipe: Any, text: str) -> int:
    """How many tokens the pipeline makes of a text, not counting special ones."""
    tokenizer = getattr(pipe, family(pipe).encoders[0][0])
    text = _as_encoded(pipe, text.strip()) if text.strip() else ""
    return len(tokenizer(text, add_special_tokens=False).input_ids) if text else 0


def _as_encoded(pipe: Any, text: str) -> str:
    """The text that the pipeline tokenizes: PixArt lower-cases prompts, the Stable Diffusion pipelines
    expand learned tokens of several vectors."""
    if hasattr(pipe, "_text_preprocessing"):
        text = pipe._text_preprocessing(text)[0]
    if hasattr(pipe, "maybe_convert_prompt"):
        text = pipe.maybe_convert_prompt(text, getattr(pipe, family(pipe).encoders[0][0]))
    return text


def _starts(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a start-of-text token first."""
    ids = tokenizer("").input_ids
    return len(ids) > 1 or (bool(ids) and ids[0] != tokenizer.eos_token_id)


def _prototype(pipe: Any, member: str, templates: Sequence[str]) -> Tensor:
    """Mean embeddings [T, C] of the member's tokens over captions, at the mean length of a token."""
    tokenizer = getattr(pipe, family(pipe).encoders[0][0])
    starts = int(_starts(tokenizer))
    spans = []
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"templates: {template!r} must contain {{}} exactly once")
        marked = template if "[" in template else template.replace("{}", "[{}]")
        parts = _SPAN.match(marked)
        if parts is None:
            raise ValueError(f"templates: {template!r} must have one pair of brackets around {{}}")
        before, span, after = (parts[name].replace("{}", member) for name in ("before", "span", "after"))
        embeddings, _ = _encode(pipe, before + span + after)
        first = starts + _count(pipe, before)
        last = starts + _count(pipe, before + span)
        spans.append(embeddings[first:last])
    lengths = {len(s) for s in spans}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"templates: {member!r} has {sorted(lengths)} tokens in the marked spans: must be one length"
        )
    stacked = torch.stack(spans)
    mean = stacked.mean(0)
    length = stacked.norm(dim=-1).mean()
    rescaled: Tensor = mean * (length / mean.norm(dim=-1, keepdim=True).clamp(min=1e-12))
    return rescaled
