# SPDX-License-Identifier: Apache-2.0
"""The attention function of joint models: who sees whom."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ....engine.session.call import Running
from ....operator.attention import negated_attention, negated_attention_with_statistics
from ....operator.partials import partial_attention
from ....operator.problem import Partial

if TYPE_CHECKING:
    from .seam import Joint, Layer


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    joint: Joint,
    layer: Layer,
    running: Running | None,
) -> Tensor:
    """Attention of the joint sequence, [B, S, H, D] each: image queries by the rule, the prompt and what is
    beside the image without concepts, riders to the image and to their own entry.

    `mask`, bool [B, 1, 1, M] or none, says which tokens of the prompt are attended to. `running` is None in
    compiled code, which tells no statistics.
    """
    parts, riders = joint.layout.parts, joint.riders
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))  # views [B, H, S, D]
    out = torch.empty_like(query)
    chosen, backend, rule = layer.partials, layer.backend, layer.engine.rule
    # What the image's keys give is the same for the prompt and for every concept.
    seen = partial_attention(q, k[:, :, parts.seen], v[:, :, parts.seen], backend=chosen)
    # Text is short, and may be masked, which not every kernel that the user may choose can do.
    bias = None if mask is None else torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    told = partial_attention(
        q,
        k[:, :, parts.prompt],
        v[:, :, parts.prompt],
        key_bias=bias,
        backend="auto" if mask is not None else chosen,
    )
    of = parts.riders
    own = partial_attention(q[:, :, of], k[:, :, of], v[:, :, of], key_bias=riders.bias)

    def write(of: slice, attended: Tensor) -> None:
        out[:, of] = attended.transpose(1, 2)

    unguided = [(parts.prompt, _part(told, parts.prompt)), (parts.riders, own)]
    if joint.layout.beside:
        unguided.append((parts.beside, _part(told, parts.beside)))
    for of, text in unguided:
        shared = _part(seen, of)
        write(of, negated_attention(q[:, :, of], None, None, shared=shared, prompt=text, backend=backend))
    of = parts.image
    tokens = riders.tokens(key[:, parts.riders], value[:, parts.riders], joint.numbers)
    shared, text = _part(seen, of), _part(told, of)
    if running is not None:
        running.negated = True
    if running is None or not (running.sampled or running.observed):
        write(of, negated_attention(
            q[:, :, of], None, None, tokens, rule, shared=shared, prompt=text, backend=backend
        ))  # fmt: skip
        return out
    guided, statistics = negated_attention_with_statistics(
        q[:, :, of], None, None, tokens, rule, shared=shared, prompt=text, backend=backend
    )
    write(of, guided)
    layer.engine.observe(running, layer.name, statistics)
    return out


def _part(partial: Partial, of: slice) -> Partial:
    return Partial(partial.out[:, :, of], partial.lse[:, :, of])
