# SPDX-License-Identifier: Apache-2.0
"""Named cases: the cross-attention layers of real models, with concepts whose gates are open (dense) or
open in one region (sparse).

Tensors lie in memory as the models make them: [B, N, H, D], viewed as [B, H, N, D].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

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


# SD1.5 512x512: 5, 5, 5 and 1 layers of each size, and one size of 1024x1024; SDXL 1024x1024: 10 and 60;
# PixArt 1024x1024: 28; Wan 2.1 1.3B 480p: 30, with 4096 of its 32,760 queries.
LAYERS = {
    layer.name: layer
    for layer in (
        Layer("sd15-64", 8, 4096, 40),
        Layer("sd15-32", 8, 1024, 80),
        Layer("sd15-16", 8, 256, 160),
        Layer("sd15-8", 8, 64, 160),
        Layer("sd15-1k-32", 8, 1024, 160),
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
METHODS = {
    "protore": Rule.preset("protore"),
    "nag": Rule.preset("nag"),
    "nag-head": Rule.preset("nag", scope="head"),  # what NAG's norm over all heads costs
    "vsf": Rule.preset("vsf"),
    "eiup": Rule.preset("eiup"),
}
DENSE = -1.0  # a threshold below every cosine: each gate is open and nothing can be skipped


@dataclass(frozen=True, eq=False)
class Case:
    """Tensors of one call. `tokens` is None without concepts; `threshold` is that of all entries."""

    name: str
    query: Tensor
    key: Tensor
    value: Tensor
    tokens: ConceptTokens | None
    rule: Rule
    threshold: float = DENSE

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """B, H, N, M, D."""
        batch, heads, queries, dim = self.query.shape
        return batch, heads, queries, self.key.shape[2], dim

    @property
    def rows(self) -> list[range]:
        """The entries of each batch row."""
        if self.tokens is None:
            return [range(0)] * self.query.shape[0]
        offsets = self.tokens.index[-self.tokens.batch - 1 :].tolist()
        return [range(a, b) for a, b in pairwise(offsets)]

    @property
    def lengths(self) -> list[list[int]]:
        """How many tokens each entry of each batch row has."""
        if self.tokens is None:
            return [[] for _ in self.rows]
        tokens = self.tokens
        index = tokens.index.tolist()
        of_concept = index[tokens.entries + tokens.concepts :]
        return [[of_concept[index[e]] for e in row] for row in self.rows]


def make(
    layer: Layer,
    concepts: Concepts,
    rule: Rule,
    dtype: torch.dtype = torch.float32,
    *,
    sparse: bool = False,
    device: str = "cpu",
    seed: int = 0,
) -> Case:
    """A case on `noise`: the same numbers on every device. Cases of one layer, dtype and seed share the
    prompt's tensors.

    Dense: concept values are .7 of prompt values and .3 noise, and the threshold is -1, so that every
    gate is open. Sparse: the last eighth of the queries, which is a band of the image, looks at prompt
    tokens that the concepts resemble, the others at other tokens; the threshold is the rule's. Concepts
    are made from the prompt of the first batch row, so in the others hardly a gate is open.
    """
    query, key, value = _prompt(layer, dtype, device, seed)
    resembled = layer.keys // 4 if sparse else layer.keys  # prompt tokens that concepts are made from
    keys, values = [], []
    for c in range(concepts.count):
        near = [(c * concepts.tokens + t) % resembled for t in range(concepts.tokens)]
        shape = (concepts.tokens, layer.heads, layer.dim)
        of_key, of_value = (noise(1000 * seed + 2 * c + i + 3, *shape, device=device) for i in range(2))
        like = [0.7 * x[0][:, near].transpose(0, 1) for x in (key, value)]
        keys.append(((like[0] if sparse else 0.0) + (0.3 if sparse else 1.0) * of_key).to(dtype))
        values.append((like[1] + 0.3 * of_value).to(dtype))
    if sparse:
        query = _pointed(layer, query, key, resembled)
    threshold = rule.threshold if sparse else DENSE
    tokens = ConceptTokens.uniform(keys, values, layer.batch, threshold=threshold) if keys else None
    kind = "sparse " if sparse else ""
    name = f"{layer.name} {concepts.name} {kind}{rule.name} {str(dtype).removeprefix('torch.')}"
    return Case(name, query, key, value, tokens, rule, threshold)


def noise(seed: int, *shape: int, device: str = "cpu") -> Tensor:
    """float32 numbers of mean 0 and variance 1, the same to the last bit on every device and with every
    version of torch: sums of four uniform integers, from a hash (the finalizer of MurmurHash3) of their
    places. They are within 3.5 of zero."""
    place = torch.arange(math.prod(shape), device=device)
    sums = torch.zeros_like(place)
    for part in range(2):
        word = (place * 2 + part + seed * 0x9E3779B1) & 0xFFFFFFFF
        for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13), (1, 16)):
            word = (word ^ word >> shift) * factor & 0xFFFFFFFF
        sums += (word & 0xFFFF) + (word >> 16)
    middle, deviation = 2 * 0xFFFF, (4 * (2**32 - 1) / 12) ** 0.5
    return ((sums - middle).float() * (1 / deviation)).reshape(shape)


@lru_cache(maxsize=1)
def _prompt(layer: Layer, dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    def normal(number: int, rows: int) -> Tensor:
        memory = noise(1000 * seed + number, layer.batch, rows, layer.heads, layer.dim, device=device)
        return memory.to(dtype).transpose(1, 2)

    return normal(0, layer.queries), normal(1, layer.keys), normal(2, layer.keys)


def _pointed(layer: Layer, query: Tensor, key: Tensor, resembled: int) -> Tensor:
    """Queries that put nearly all their weight on one token: of the resembled ones in the last eighth,
    of the others elsewhere."""
    inside, generator = layer.queries // 8, torch.Generator().manual_seed(1)
    targets = torch.cat(
        [
            torch.randint(resembled, layer.keys, (layer.queries - inside,), generator=generator),
            torch.randint(resembled, (inside,), generator=generator),
        ]
    )
    sharp = 8 * layer.dim**-0.5  # a logit of 8 against noise of size 1
    pointed = query + sharp * key[:, :, targets]
    return pointed.transpose(1, 2).contiguous().transpose(1, 2)
