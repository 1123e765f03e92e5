# SPDX-License-Identifier: Apache-2.0
"""NAG as published, on models of diffusers: two passes, in plain torch. The text has two rows, the prompt and
the concept; how often the image runs is what it costs.

Each function here changes a model for good. One request at a time: the image comes in as one row. `text` is
how many tokens each row of it has.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from fastnegate.operator.rule import Rule


def guided(z: Tensor, f: Tensor, rule: Rule) -> Tensor:
    """What the image gets of two attention outputs [B, N, H * D]."""
    y = z + rule.strength * (z - f)
    larger = y.norm(p=1, dim=-1, keepdim=True) / z.norm(p=1, dim=-1, keepdim=True)
    y = y * (larger.clamp(max=rule.norm_limit) / larger)
    return rule.blend * y + (1 - rule.blend) * z


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Of [B, S, H, D] each; [B, S, H * D]."""
    seen = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (query, key, value)))
    return seen.transpose(1, 2).flatten(2)


# ---- FLUX.1 ---------------------------------------------------------------------------------------------


def flux(model: Any, rule: Rule, text: int) -> None:
    """Double blocks have one image, which attends with each text. Single blocks have joint rows, so the image
    is doubled before the first of them: from there on all layers run twice. The second one is dropped at the
    end.

    Published code modulates the second row by the concept's pooled vector; here both have the prompt's.
    """
    for block in model.transformer_blocks:
        block.attn.set_processor(_Double(rule))
    for block in model.single_transformer_blocks:
        block.attn.set_processor(_Single(rule, text))

    def doubled(_: nn.Module, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**given, "hidden_states": given["hidden_states"].repeat(2, 1, 1)}

    def dropped(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
        return args[0][:1], *args[1:]

    if model.single_transformer_blocks:
        model.single_transformer_blocks[0].register_forward_pre_hook(doubled, with_kwargs=True)
    model.norm_out.register_forward_pre_hook(dropped)


class _Double:
    """Of blocks with weights of their own for text [2, M, C] and image [1, N, C]."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        image = _projected(attn, hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
        text = _projected(
            attn, encoder_hidden_states, (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
            (attn.norm_added_q, attn.norm_added_k),
        )  # fmt: skip
        count, passes = encoder_hidden_states.shape[1], []
        for row in range(2):
            q, k, v = (torch.cat([t[row : row + 1], i], 1) for t, i in zip(text, image))
            q, k = (apply_rotary_emb(t, image_rotary_emb, sequence_dim=1) for t in (q, k))
            passes.append(_attention(q, k, v))
        of_image = guided(passes[0][:, count:], passes[1][:, count:], self.rule)
        of_text = torch.cat([seen[:, :count] for seen in passes])
        return attn.to_out[1](attn.to_out[0](of_image)), attn.to_add_out(of_text)


class _Single:
    """Of blocks with joint rows [2, M + N, C]. The image is guided in both."""

    def __init__(self, rule: Rule, text: int) -> None:
        self.rule, self.text = rule, text

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        q, k, v = _projected(
            attn, hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k)
        )
        q, k = (apply_rotary_emb(t, image_rotary_emb, sequence_dim=1) for t in (q, k))
        passes = [_attention(*(t[row : row + 1] for t in (q, k, v))) for row in range(2)]
        text = self.text
        of_image = guided(passes[0][:, text:], passes[1][:, text:], self.rule)
        return torch.cat([torch.cat([seen[:, :text], of_image], 1) for seen in passes])


def _projected(attn: Any, states: Tensor, layers: Any, norms: Any) -> list[Tensor]:
    """Query, key and value [B, S, H, D]."""
    q, k, v = (layer(states).unflatten(-1, (attn.heads, -1)) for layer in layers)
    return [norms[0](q), norms[1](k), v]


# ---- Stable Diffusion 3 ---------------------------------------------------------------------------------


def sd3(model: Any, rule: Rule, text: int) -> None:
    """One image everywhere, which attends with each text."""
    for block in model.transformer_blocks:
        block.attn.set_processor(_Joint(rule))


class _Joint:
    """Image [1, N, C] before text [2, M, C]."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        norms = (attn.norm_q, attn.norm_k), (attn.norm_added_q, attn.norm_added_k)
        image = _projected(attn, hidden_states, (attn.to_q, attn.to_k, attn.to_v), norms[0])
        layers = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
        text = _projected(attn, encoder_hidden_states, layers, norms[1])
        count, passes = hidden_states.shape[1], []
        for row in range(2):
            passes.append(_attention(*(torch.cat([i, t[row : row + 1]], 1) for i, t in zip(image, text))))
        of_image = guided(passes[0][:, :count], passes[1][:, :count], self.rule)
        of_text = torch.cat([seen[:, count:] for seen in passes])
        if not attn.context_pre_only:
            of_text = attn.to_add_out(of_text)
        return attn.to_out[1](attn.to_out[0](of_image)), of_text


# ---- attention to text ----------------------------------------------------------------------------------


def cross(model: Any, rule: Rule, text: int) -> None:
    """Models whose image attends to text in layers of its own, `attn2`: once to the prompt and once to the
    concept. Everything else runs once."""
    for name, module in model.named_modules():
        if name.endswith(".attn2"):
            module.set_processor(CrossPasses(rule))


class CrossPasses:
    """Image [1, N, C], text [2, M, C]."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any
    ) -> Tensor:
        def heads(projected: Tensor, norm: Any = None) -> Tensor:
            projected = projected if norm is None else norm(projected)
            return projected.unflatten(-1, (attn.heads, -1))

        query = heads(attn.to_q(hidden_states), attn.norm_q)
        key = heads(attn.to_k(encoder_hidden_states), attn.norm_k)
        value = heads(attn.to_v(encoder_hidden_states))
        passes = [_attention(query, key[row : row + 1], value[row : row + 1]) for row in range(2)]
        seen = guided(*passes, self.rule)
        if getattr(attn, "to_gate_logits", None) is not None:  # LTX-2 gates each head, last of all
            gates = 2 * torch.sigmoid(attn.to_gate_logits(hidden_states))
            seen = (seen.unflatten(-1, (attn.heads, -1)) * gates.unsqueeze(-1)).flatten(2)
        output: Tensor = attn.to_out[1](attn.to_out[0](seen))
        return output
