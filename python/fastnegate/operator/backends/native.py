# SPDX-License-Identifier: Apache-2.0
"""What the compiled backends share: a `Problem` as csrc/arguments.h takes it, and the words csrc knows."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..problem import Partial, Problem, Slots
from ..rule import CODES, Rule
from ..tokens import ConceptTokens

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Of csrc/include/fastnegate/problem.h, in its order: the code of a word is its place here.
WORDS = {
    "similarity": ("one", "cosine", "direction", "mass"),
    "gate": ("open", "step", "ramp", "sigmoid"),
    "direction": ("raw", "difference", "orthogonal", "projection", "fixed", "retrieve"),
    "combine": ("separate", "joint"),
    "select": ("all", "max"),
    "norm": ("none", "limit", "preserve"),
    "norm_order": (1, 2),
    "scope": ("head", "feature"),
    "shared": ("inside", "joint", "outside"),
    "center": ("none",),
}
ALIGNMENT = 16  # bytes that kernels read at a time
_READ_AS_THEY_ARE = 2  # of the tensors of concepts, key and value have strides, the others are contiguous


def extension(name: str) -> tuple[Any, str | None]:
    """A compiled module of this package, or None and why there is none."""
    try:
        return importlib.import_module(f"fastnegate.{name}"), None
    except ImportError as error:
        if importlib.util.find_spec(f"fastnegate.{name}") is None:
            return None, "not part of this install"
        return None, f"the compiled extension does not load: {error}"


class Layout(NamedTuple):
    """What stays of calls while shapes, strides and rule stay; holds no tensor."""

    arguments: tuple[Any, ...]  # in the order of `Arguments` in csrc/arguments.h
    out_shape: tuple[int, ...]
    out_strides: tuple[int, ...]  # those of [B, N, H, D] memory
    bias: Bias
    negates: bool  # whether there are entries
    copied: tuple[int, ...]  # which tensors of the concepts have to be contiguous and aligned first

    @property
    def as_it_is(self) -> bool:
        """Whether all tensors are read where they lie."""
        return self.bias.as_it_is and not self.copied

    def readable(
        self, key_bias: Tensor | None, concepts: ConceptTokens | None
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Of `key_bias` and of the concepts what kernels can read: copies of what they cannot."""
        if key_bias is not None and not self.bias.as_it_is:
            key_bias = key_bias.float()
            key_bias = key_bias.contiguous() if self.bias.copied else key_bias
        tensors = [*concepts.tensors] if self.negates and concepts is not None else []
        for i in self.copied:
            tensor = tensors[i]
            assert tensor is not None
            tensor = tensor.contiguous()
            tensors[i] = tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()
        return key_bias, tensors


class Bias(NamedTuple):
    """How `key_bias` is read."""

    strides: tuple[int, ...]
    as_it_is: bool
    copied: bool


def layout(problem: Problem) -> Layout:
    """Of calls like this one, by a backend that knows the words of the rule."""
    tokens = problem.concepts
    batch, heads, queries, keys, dim = problem.sizes
    shape = (batch, heads, queries, dim)
    strides = tuple(torch.empty(batch, queries, heads, dim, device="meta").transpose(1, 2).stride())
    bias = _bias(problem)
    negates = tokens is not None and tokens.entries > 0
    copied: tuple[int, ...] = ()
    capacities, count, text = (0, 0, 0, 0), 0, [(0, 0, 0)] * 2
    if negates and tokens is not None:
        capacities, count = tokens.capacities, tokens.tokens
        copied = tuple(i for i, t in enumerate(tokens.tensors) if i >= _READ_AS_THEY_ARE and not _simple(t))
        text = [
            (t.stride(0) if t.dim() == 4 else 0, t.stride(-2), t.stride(-3))
            for t in (tokens.key, tokens.value)
        ]
    prompt = [tuple(t.stride()[:3]) for t in (problem.query, problem.key, problem.value)]
    arguments = (
        (batch, heads, queries, keys, dim, *capacities, count),
        (*prompt, strides[:3], *text),
        bias.strides,
        DTYPES[problem.query.dtype],
        problem.scale,
        codes(problem.rule),
        problem.rule.numbers,
        problem.rule.reads,
        (
            _strides(problem.shared),
            _strides(problem.prompt),
            [*map(_strides, problem.slots or ())] if negates else [],
        ),
    )
    return Layout(arguments, shape, strides, bias, negates, copied)


def codes(rule: Rule) -> tuple[int, ...]:
    """The words by the numbers of `WORDS`, whatever their places in rule.py; csrc is not told of `center`, of
    which it knows one word."""
    told = (word for word in CODES if len(WORDS[word]) > 1)
    return tuple(
        rule.norm_order if word == "norm_order" else WORDS[word].index(getattr(rule, word)) for word in told
    )


def _strides(partial: Partial | None) -> tuple[int, ...]:
    """Of `out` and `lse`; none for None."""
    return () if partial is None else (*partial.out.stride()[:3], *partial.lse.stride())


def partial_addresses(shared: Partial | None, prompt: Partial | None, slots: Slots | None) -> tuple[int, ...]:
    """Of `out` and `lse` of each that there is."""
    return tuple(t.data_ptr() for p in (shared, prompt, *(slots or ())) if p is not None for t in p)


def addresses(tensors: Iterable[Tensor | None]) -> tuple[int, ...]:
    """Of each tensor, 0 for None."""
    return tuple(0 if t is None else t.data_ptr() for t in tensors)


def _bias(problem: Problem) -> Bias:
    key_bias = problem.key_bias
    if key_bias is None:
        return Bias((0, 0, 0, 0), True, False)
    batch, heads, queries, keys, _ = problem.sizes
    like = torch.empty_strided(key_bias.shape, key_bias.stride(), dtype=key_bias.dtype, device="meta").float()
    shape = (batch, heads, key_bias.shape[2], keys)
    strides = [*like.expand(shape).stride()]
    # Stride 0 says that a bias is the same for all queries.
    copied = problem.bias_per_query and queries > 1 and strides[2] == 0
    if copied:
        strides = [*like.contiguous().expand(shape).stride()]
    elif not problem.bias_per_query:
        strides[2] = 0
    return Bias(tuple(strides), key_bias.dtype == torch.float32 and not copied, copied)


def _simple(tensor: Tensor | None) -> bool:
    """Kernels read two numbers at a time. Only a view into another tensor begins elsewhere."""
    return tensor is None or (tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0)
