# SPDX-License-Identifier: Apache-2.0
"""The attention function of joint models: who sees whom."""

from __future__ import annotations

import torch
from torch import Tensor

from ....engine.engine import Engine
from ....engine.session.call import Running
from ....operator.attention import negated_attention, negated_attention_with_statistics
from ....operator.partials import partial_attention
from ....operator.problem import Partial
from .riders import Joint


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    joint: Joint,
    engine: Engine,
    running: Running | None,
    *,
    layer: str,
    partials: str,
    backend: str,
) -> Tensor:
    """Attention of the joint sequence, [B, S, H, D] each: image queries by the rule, the prompt and what is
    beside the image without concepts, riders to the image and to their own entry.

    `mask`, bool [B, 1, 1, M] or none, says which tokens of the prompt are attended to. `running` is None in
    compiled code, which tells no statistics. `partials` and `backend` name what computes the attention to
    keys, and the rule.
    """
    # Partials are as large as what is put together of them, and have been let go by then.
    made = _attended(query, key, value, mask, joint, engine, running, layer, partials, backend)
    return torch.cat([part.transpose(1, 2) for part in made], 1)


def _attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    joint: Joint,
    engine: Engine,
    running: Running | None,
    layer: str,
    partials: str,
    backend: str,
) -> list[Tensor]:
    """The parts of the sequence in their order, [B, H, length, D] each."""
    parts, riders = joint.layout.parts, joint.riders
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))  # views [B, H, S, D]
    # What the image's keys give is the same for the prompt and for every concept.
    seen = partial_attention(q, k[:, :, parts.seen], v[:, :, parts.seen], backend=partials)
    # Text is short, and may be masked, which not every kernel that the user may choose can do.
    told = partial_attention(
        q,
        k[:, :, parts.prompt],
        v[:, :, parts.prompt],
        key_bias=None if mask is None else mask.to(q.dtype).log(),  # 0, and -inf where it is False
        backend="auto" if mask is not None else partials,
    )
    of = parts.riders
    mates = slice(of.start, of.start + riders.longest) if riders.alone else of
    own = partial_attention(
        q[:, :, of], k[:, :, mates], v[:, :, mates], key_bias=None if riders.alone else riders.bias
    )

    def unguided(of: slice, text: Partial) -> Tensor:
        shared = _part(seen, of)
        return negated_attention(q[:, :, of], None, None, shared=shared, prompt=text, backend=backend)

    texts = [unguided(parts.prompt, _part(told, parts.prompt)), unguided(parts.riders, own)]
    beside = [unguided(parts.beside, _part(told, parts.beside))] if joint.layout.beside else []
    of = parts.image
    tokens = riders.tokens(key[:, parts.riders], value[:, parts.riders], joint.numbers)
    shared, text = _part(seen, of), _part(told, of)
    if running is not None:
        running.negated = True
    if running is None or not (running.sampled or running.observed):
        guided = negated_attention(
            q[:, :, of], None, None, tokens, engine.rule, shared=shared, prompt=text, backend=backend
        )
    else:
        guided, statistics = negated_attention_with_statistics(
            q[:, :, of], None, None, tokens, engine.rule, shared=shared, prompt=text, backend=backend
        )
        engine.observe(running, layer, statistics)
    images = [guided, *beside]
    return images + texts if joint.layout.image_first else texts + images


def _part(partial: Partial, of: slice) -> Partial:
    return Partial(partial.out[:, :, of], partial.lse[:, :, of])
