# SPDX-License-Identifier: Apache-2.0
"""Families whose attention layers are not diffusers' `Attention` with its usual processor, against the
equations of NAG written out in torch inside diffusers' own processors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fastnegate import Policy, Rule

pytest.importorskip("diffusers")

import pipelines
from pipelines import FAMILIES, generate, one_thread  # noqa: F401

import fastnegate as fn
from fastnegate.integrations.diffusers.contract import denoisers
from fastnegate.integrations.diffusers.install import engine_of

PROMPTS = ["a cat", "a photo of a dog", "red"]
NEGATIVES = ["red dog", None, "a painting"]  # one for each
POLICIES = [None if text is None else Policy(negative_prompt=text) for text in NEGATIVES]


@contextmanager
def installed(pipe: Any, rule: Rule | str = "nag", **options: Any) -> Iterator[fn.Engine]:
    bank = fn.ConceptBank.from_prompts(pipe, {"dog": ["dog", "a red dog"], "cat": "cat"})
    engine = fn.install(pipe, bank, rule=rule, **options)
    yield engine
    engine.remove()


def negated(pipe: Any, policies: Sequence[Policy | None], *arguments: Any, **options: Any) -> Tensor:
    engine = engine_of(pipe)
    assert engine is not None
    with engine.batch(policies):
        return generate(pipe, *arguments, **options)


@contextmanager
def literal_nag(pipe: Any, negatives: Sequence[str | None], rule: Rule) -> Iterator[None]:
    """diffusers' own processors, with NAG where they call torch's attention in a text layer: in the rows of a
    batch that belong to the conditional half, or in all rows of a call that is the first of its step."""
    video = "Wan" in type(pipe).__name__
    encoded = [None if text is None else _encoded(pipe, text) for text in negatives]
    attend = torch.nn.functional.scaled_dot_product_attention
    state: dict[str, Any] = {"layer": None, "model": None, "calls": 0}

    def nag(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        z = attend(query, key, value, *args, **kwargs)
        layer = state["layer"]
        if layer is None or key.shape[2] != state["text"] or (video and state["calls"] % 2 == 0):
            return z
        first = 0 if video else len(z) // 2
        out = z.clone()
        for row, concept in enumerate(encoded, first):
            if concept is None:
                continue
            text, mask = concept
            k, v = _keys_and_values(layer, _projected(state["model"], text))
            f = torch.softmax(query[row] @ k.mT * query.shape[-1] ** -0.5 + mask, -1) @ v
            whole = z[row].transpose(0, 1).flatten(1)  # features of all heads
            y = whole + rule.strength * (whole - f.transpose(0, 1).flatten(1))
            size, most = y.abs().sum(1, True), rule.norm_limit * whole.abs().sum(1, True)
            y = torch.where(size > most, y * most / size, y)
            y = rule.blend * y + (1 - rule.blend) * whole
            out[row] = y.view(y.shape[0], z.shape[1], -1).transpose(0, 1)
        return out

    def enter(layer: Any, args: Any, kwargs: Any) -> None:
        text = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
        images = pipelines.IMAGE_TOKENS if getattr(layer, "add_k_proj", None) is not None else 0
        state.update(layer=layer, text=text.shape[1] - images)

    def called(model: Any, _args: Any, _kwargs: Any) -> None:
        state.update(model=model, calls=state["calls"] + 1)

    handles = [m.register_forward_pre_hook(called, with_kwargs=True) for m in denoisers(pipe).values()]
    for layer in pipelines.attentions(pipe).values():
        handles.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(layer.register_forward_hook(lambda *_: state.update(layer=None)))
    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", nag):
        yield
    for handle in handles:
        handle.remove()


@torch.no_grad()
def _encoded(pipe: Any, text: str) -> tuple[Tensor, Tensor]:
    """Embeddings [1, M, C] as the pipeline makes them of a prompt, and what is added to their logits."""
    if "Wan" in type(pipe).__name__:
        embeddings, _ = pipe.encode_prompt(text, None, False, max_sequence_length=512)
        return embeddings, torch.zeros(embeddings.shape[1])
    embeddings, mask, *_ = pipe.encode_prompt(text, do_classifier_free_guidance=False)
    return embeddings, (1 - mask[0].float()) * -10000.0


def _projected(model: Any, text: Tensor) -> Tensor:
    if hasattr(model, "condition_embedder"):
        return model.condition_embedder.text_embedder(text)
    text = model.caption_projection(text)
    return model.caption_norm(text) if hasattr(model, "caption_norm") else text


def _keys_and_values(layer: Any, text: Tensor) -> tuple[Tensor, Tensor]:
    """[H, M, D]"""
    key, value = layer.norm_k(layer.to_k(text)), layer.to_v(text)
    return tuple(t[0].unflatten(1, (layer.heads, -1)).transpose(0, 1) for t in (key, value))


def error(actual: Tensor, wanted: Tensor) -> float:
    """Relative to the largest output."""
    return float((actual - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("kind", FAMILIES)
def test_rows_with_other_negative_prompts_are_literal_nag(kind: str) -> None:
    """Side by side, one of them with none; without a live entry the pipeline is untouched, to the bit."""
    pipe = pipelines.build(kind)
    call = {"prompts": PROMPTS, "steps": 2, "guidance": 2.0}
    untouched = generate(pipe, **call)
    before = [model.attn_processors for model in denoisers(pipe).values()]
    with installed(pipe) as engine:
        assert engine.rule == Rule.preset("nag", family="sana" if kind == "sana" else "wan")
        assert engine.layers == tuple(pipelines.attentions(pipe))
        assert torch.equal(generate(pipe, **call), untouched)
        assert torch.equal(negated(pipe, [None] * 3, **call), untouched)
        actual = negated(pipe, POLICIES, **call)
        assert torch.equal(generate(pipe, **call), untouched)
    assert [model.attn_processors for model in denoisers(pipe).values()] == before
    with literal_nag(pipe, NEGATIVES, engine.rule):
        wanted = generate(pipe, **call)
    assert error(actual, wanted) <= 5e-6
    changed = [error(a, b) > 1e-3 for a, b in zip(actual, untouched)]
    assert changed == [text is not None for text in NEGATIVES]
    assert error(actual[1], untouched[1]) <= 5e-6
