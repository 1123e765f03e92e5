# SPDX-License-Identifier: Apache-2.0
"""What a user would do without this package: the same formulas in torch operators.

Written as one would write them for speed: all rows at once, scaled_dot_product_attention where it
fits, no loop over queries. Each row of the benchmark cases negates the same concepts.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .cases import Case

Call = Callable[[], Tensor]


def concept_tensors(case: Case) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [B, H, T, D] of each concept, expanded over the batch."""
    tokens, batch = case.tokens, case.query.shape[0]
    if tokens is None:
        return []
    index = tokens.index.tolist()
    e, c = tokens.entries, tokens.concepts
    spans = [(b, b + n) for b, n in zip(index[e : e + c], index[e + c : e + 2 * c])]

    def split(x: Tensor) -> list[Tensor]:
        return [x[a:b].transpose(0, 1).unsqueeze(0).expand(batch, -1, -1, -1) for a, b in spans]

    return list(zip(split(tokens.key), split(tokens.value)))


def sdpa(case: Case) -> Call:
    """Plain attention without any negation: the floor that users know."""
    return lambda: F.scaled_dot_product_attention(case.query, case.key, case.value)


def attentions(case: Case) -> dict[str, Call]:
    """The same floor by each kernel that torch has for GPUs, and by xformers where it is installed. One
    that cannot run the case says so when it is called."""

    def torch_with(kernel: SDPBackend) -> Call:
        def call() -> Tensor:
            with sdpa_kernel(kernel):
                return F.scaled_dot_product_attention(case.query, case.key, case.value)

        return call

    def xformers() -> Tensor:
        from xformers.ops import memory_efficient_attention

        # It wants [B, N, H, D].
        q, k, v = (x.transpose(1, 2) for x in (case.query, case.key, case.value))
        return memory_efficient_attention(q, k, v).transpose(1, 2)

    found = {
        "sdpa flash": torch_with(SDPBackend.FLASH_ATTENTION),
        "sdpa cuDNN": torch_with(SDPBackend.CUDNN_ATTENTION),
        "sdpa efficient": torch_with(SDPBackend.EFFICIENT_ATTENTION),
    }
    return found | ({"xformers": xformers} if importlib.util.find_spec("xformers") else {})


def _tail(case: Case, z: Tensor, features: list[Tensor]) -> Tensor:
    """From attention outputs to the negated output, float32 inside."""
    rule = case.rule
    method = rule.name.split("[")[0]
    z = z.float()
    features = [f.float() for f in features]
    if method == "protore":
        threshold = case.threshold
        gates, pulls = [], []
        for f in features:
            zf, ff = (z * f).sum(-1, keepdim=True), (f * f).sum(-1, keepdim=True)
            r = zf / (z.norm(dim=-1, keepdim=True) * ff.sqrt())
            gates.append(((r - threshold) / (1 - threshold)).clamp(0, 1))
            pulls.append(zf / ff)
        best = torch.stack(gates).amax(0)
        y = z
        for g, pull, f in zip(gates, pulls, features):
            y = y - rule.strength * torch.where(g == best, g, 0.0) * pull * f
        limit = z.norm(dim=-1, keepdim=True) / y.norm(dim=-1, keepdim=True)
        return (y * limit.clamp(max=1)).to(case.query.dtype)
    if method == "nag":
        y = z
        for f in features:
            y = y + rule.strength * (z - f)
        if rule.scope == "head":
            norm_y, norm_z = y.abs().sum(-1, keepdim=True), z.abs().sum(-1, keepdim=True)
        else:
            norm_y, norm_z = y.abs().sum((1, 3), keepdim=True), z.abs().sum((1, 3), keepdim=True)
        y = y * (rule.norm_limit * norm_z / norm_y).clamp(max=1)
        return (rule.blend * y + (1 - rule.blend) * z).to(case.query.dtype)
    if method == "eiup":
        for f in features:
            z = z - rule.strength * f
        return z.to(case.query.dtype)
    raise ValueError(f"method={method!r} has no tail of this kind")


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    logits = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    return (logits if bias is None else logits + bias).softmax(-1).to(v.dtype) @ v


def eager(case: Case) -> Call:
    """Attention with matmul and softmax, then the formula: plain torch."""
    return (_joint if case.rule.combine == "joint" else _separate)(case, _attend)


def by_sdpa(case: Case) -> Call:
    """The same on scaled_dot_product_attention: one per segment, or one over all tokens (`vsf`)."""
    attend = F.scaled_dot_product_attention
    return (_joint if case.rule.combine == "joint" else _separate)(case, attend)


def _separate(case: Case, attend: Callable[..., Tensor]) -> Call:
    concepts = concept_tensors(case)
    return lambda: negated(case, attend, case.query, case.key, case.value, concepts)


def negated(
    case: Case,
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    concepts: list[tuple[Tensor, Tensor]],
) -> Tensor:
    """What the case computes, of other tensors: one attention per segment, then the formula."""
    return _tail(case, attend(query, key, value), [attend(query, k, v) for k, v in concepts])


def _joint(case: Case, attend: Callable[..., Tensor]) -> Call:
    """`vsf` as published: one attention over prompt and negative tokens, values flipped. The tokens
    are joined beforehand, as a pipeline would once per request."""
    concepts = concept_tensors(case)
    key = torch.cat([case.key, *(k for k, _ in concepts)], 2)
    value = torch.cat([case.value, *(-case.rule.strength * v for _, v in concepts)], 2)
    bias = torch.zeros(key.shape[2], dtype=key.dtype, device=key.device)
    bias[case.key.shape[2] :] = -case.rule.logit_bias
    return lambda: attend(case.query, key, value, bias.expand(1, 1, 1, -1))


def baselines(case: Case, *, with_compile: bool) -> dict[str, Call]:
    """The baselines that compute what the case asks for, by name; `sdpa` negates nothing."""
    found = {"sdpa": sdpa(case)}
    if case.tokens is None:
        return found
    name = "sdpa concatenated" if case.rule.combine == "joint" else "sdpa + tail"
    found |= {"eager": eager(case), name: by_sdpa(case)}
    if with_compile:
        torch._dynamo.reset()  # each case is compiled for its own shapes
        found |= {f"{n}, compiled": torch.compile(found[n], fullgraph=True, dynamic=False)
                  for n in ("eager", name)}  # fmt: skip
    return found
