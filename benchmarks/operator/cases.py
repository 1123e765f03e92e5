# SPDX-License-Identifier: Apache-2.0
"""Named cases: the cross-attention layers of real models, with concepts whose gates are open.

Tensors lie in memory as the models make them: [B, N, H, D], viewed as [B, H, N, D].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastnegate import ConceptTokens, Rule


@dataclass(frozen=True)
class Layer:
    """Sizes of one cross-attention layer at classifier-free guidance (batch 2)."""

    name: str
    heads: int
    queries: int
    dim: int
    keys: int = 77
    batch: int = 2


# SD1.5 512x512: 5, 5, 5 and 1 layers of each size; SDXL 1024x1024: 10 and 60; PixArt 1024x1024: 28;
# Wan 2.1 1.3B 480p: 30, with 4096 of its 32,760 queries.
LAYERS = {
    layer.name: layer
    for layer in (
        Layer("sd15-64", 8, 4096, 40),
        Layer("sd15-32", 8, 1024, 80),
        Layer("sd15-16", 8, 256, 160),
        Layer("sd15-8", 8, 64, 160),
        Layer("sdxl-64", 10, 4096, 64),
        Layer("sdxl-32", 20, 1024, 64),
        Layer("pixart-64", 16, 4096, 72, keys=120),
        Layer("wan-480p", 12, 4096, 128, keys=512),
    )
}


@dataclass(frozen=True)
class Concepts:
    """How many concepts, of how many tokens; every batch row negates all of them."""

    name: str
    count: int
    tokens: int


CONCEPTS = {c.name: c for c in (Concepts("none", 0, 0), Concepts("1x8", 1, 8), Concepts("4x8", 4, 8),
                                Concepts("8x16", 8, 16), Concepts("1x77", 1, 77))}  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
METHODS = ("protore", "nag", "vsf", "eiup")


@dataclass(frozen=True, eq=False)
class Case:
    """Tensors of one call. `tokens` is None without concepts."""

    name: str
    query: Tensor
    key: Tensor
    value: Tensor
    tokens: ConceptTokens | None
    rule: Rule

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """B, H, N, M, D."""
        batch, heads, queries, dim = self.query.shape
        return batch, heads, queries, self.key.shape[2], dim


def make(
    layer: Layer,
    concepts: Concepts,
    method: str = "protore",
    dtype: torch.dtype = torch.float32,
    **rule: object,
) -> Case:
    """A *dense* case: concept values are .7 of prompt values and .3 noise, and the threshold is -1, so
    that (nearly) every gate is open and nothing can be skipped."""
    generator = torch.Generator().manual_seed(0)

    def normal(batch: int, rows: int) -> Tensor:
        memory = torch.randn(batch, rows, layer.heads, layer.dim, generator=generator)
        return memory.to(dtype).transpose(1, 2)

    query, key, value = (normal(layer.batch, n) for n in (layer.queries, layer.keys, layer.keys))
    keys, values = [], []
    for c in range(concepts.count):
        near = [(c * concepts.tokens + t) % layer.keys for t in range(concepts.tokens)]
        noise = normal(1, concepts.tokens)[0].transpose(0, 1)
        keys.append(normal(1, concepts.tokens)[0].transpose(0, 1))
        values.append((0.7 * value[0][:, near].transpose(0, 1) + 0.3 * noise).to(dtype))
    tokens = ConceptTokens.uniform(keys, values, layer.batch, threshold=-1.0) if concepts.count else None
    chosen = Rule.preset(method, **rule)
    name = f"{layer.name} {concepts.name} {chosen.name} {str(dtype).removeprefix('torch.')}"
    return Case(name, query, key, value, tokens, chosen)
