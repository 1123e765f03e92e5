# SPDX-License-Identifier: Apache-2.0
"""Problem -> everything of a launch but its tensors. As in tiles.py, nothing here imports Triton or asks a
device."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from ..operator.problem import Partial, Problem, Slots
from ..operator.rule import DIRECTIONS, GATES, NORMS, SHARED, SIMILARITIES, Rule
from ..operator.tokens import ConceptTokens
from . import tiles as sizing


class Launch(NamedTuple):
    """What stays while shapes, strides and rule stay."""

    kernel: str  # "attention" or "combine"
    device: torch.device
    tiles: Any
    table: str  # that has these tiles; empty: none has
    grid: tuple[int, int, int]
    goals: tuple[str, ...]  # one kernel each
    scalars: tuple[int | float | None, ...]
    constants: dict[str, Any]  # but GOAL
    text: tuple[bool, ...]  # which tensors of the concepts are read
    copied: bool  # whether slots are, to lie alike
    compiled: dict[str, Any]  # by goal, from the first call on


def of_attention(problem: Problem, tile: sizing.Tiles, table: str, programs: int) -> Launch:
    """`table` has these tiles, or none."""
    batch, heads, queries, keys, dim = problem.sizes
    tokens, rule = existing(problem), problem.rule
    strides = [s for x in (problem.query, problem.key, problem.value) for s in x.stride()[:3]]
    strides += out_strides(problem)
    bias, sizes = [0, 0, 0], [0, 0, 0, 0]
    text: list[int | None] = [None, 0, 0] * 2
    if problem.key_bias is not None:
        bias = [problem.key_bias.expand(batch, heads, 1, keys).stride(i) for i in (0, 1, 3)]
    if tokens is not None:
        text = []
        for x in (tokens.key, tokens.value):
            text += [x.stride(0) if x.dim() == 4 else None, x.stride(-2), x.stride(-3)]
        sizes = [tokens.entries, tokens.concepts, tokens.tokens, tokens.longest]
    shared, prompt = of_partial(problem.shared), of_partial(problem.prompt)
    aligned = alignment(problem, [*strides, *text, *shared[:3], *prompt[:3]])
    return Launch(
        kernel="attention",
        device=problem.query.device,
        tiles=tile,
        table=table,
        grid=(programs, 1, 1),
        goals=(*(rule.sums_over_heads if tokens is not None else ()), "output"),
        scalars=(
            *in_units(strides, aligned), *bias, *in_units(text, aligned),
            *in_units(shared[:3], aligned), *shared[3:], *in_units(prompt[:3], aligned), *prompt[3:],
            batch, heads, queries, keys, *sizes, *numbers(rule), problem.scale * math.log2(math.e),
        ),
        constants={
            "HEAD_DIM": dim, "CHANNELS": tile.channels, "FEATURES": tile.features, "ALIGNED": aligned,
            "ROWS": tile.rows, "KEYS": tile.keys, "KEPT": tile.kept, "TOKENS": tile.tokens,
            "STREAMED": tile.streamed, "HELD": tile.held if tokens is not None else 0,
        },
        text=read(problem),
        copied=False,
        compiled={},
    )  # fmt: skip


def of_combine(problem: Problem) -> Launch:
    """There are slots, and entries that may exist."""
    batch, heads, queries, _, dim = problem.sizes
    tokens, rule = problem.concepts, problem.rule
    assert tokens is not None and problem.slots is not None and problem.prompt is not None
    tile = sizing.combined(heads, dim, rule.scope == "feature")
    slot, copied = of_slots(problem, problem.slots)
    strides = [of_partial(problem.shared), of_partial(problem.prompt), slot]
    out = out_strides(problem)
    aligned = alignment(problem, [*out, *(s for partial in strides for s in partial[:3])])
    return Launch(
        kernel="combine",
        device=problem.query.device,
        tiles=tile,
        table="",
        grid=(batch * -(-heads // tile.heads) * -(-queries // tile.queries), 1, 1),
        goals=("output",),
        scalars=(
            *(s for partial in strides for s in (*in_units(partial[:3], aligned), *partial[3:])),
            *in_units(out, aligned), batch, heads, queries, tokens.entries, tokens.concepts, *numbers(rule),
        ),
        constants={
            "HEAD_DIM": dim, "FEATURES": tile.features, "ALIGNED": aligned, "QUERIES": tile.queries,
            "HEADS": tile.heads,
        },
        text=read(problem),
        copied=copied,
        compiled={},
    )  # fmt: skip


def existing(problem: Problem) -> ConceptTokens | None:
    """The concepts, if an entry of them can exist."""
    tokens = problem.concepts
    if tokens is None or tokens.concepts == 0 or (problem.rule.reads.direction and tokens.direction is None):
        return None
    return tokens


def read(problem: Problem) -> tuple[bool, ...]:
    """Which tensors of the concepts are, in the order of `fastnegate.operator.tokens.TENSORS`."""
    direction = problem.rule.reads.direction
    flags = (*[True] * 6, direction, problem.rule.direction == "fixed", direction)
    return tuple(existing(problem) is not None and flag for flag in flags)


def of_slots(problem: Problem, slots: Slots) -> tuple[tuple[int, ...], bool]:
    """Strides of each, and whether that is so only once those that are not contiguous have been copied."""
    _, heads, queries, _, dim = problem.sizes
    found = {of_partial(slot) for slot in slots} or {of_partial(None)}
    if len(found) == 1:
        return found.pop(), False
    return (heads * queries * dim, queries * dim, dim, heads * queries, queries, 1), True


def out_strides(problem: Problem) -> list[int]:
    _, heads, queries, _, dim = problem.sizes
    return [queries * heads * dim, dim, heads * dim]


def of_partial(partial: Partial | None) -> tuple[int, ...]:
    """Strides of the rows of its output, then of its log-sum-exp."""
    return (0,) * 6 if partial is None else (*partial.out.stride()[:3], *partial.lse.stride())


def alignment(problem: Problem, strides: list[int | None]) -> int:
    """The unit of strides, in elements. In units of 16 bytes the compiler knows where rows begin, and reads
    16 bytes at a time."""
    unit = 16 // problem.query.element_size()
    return unit if all(s % unit == 0 for s in strides if s is not None) else 1


def in_units(strides: Any, unit: int) -> list[int | None]:
    return [None if s is None else s // unit for s in strides]


def numbers(rule: Rule) -> tuple[float, ...]:
    """`Rule` of the kernels, which know its words. Floats: Triton would compile an integer 0, 1 or 16 in as a
    constant."""
    return (
        float(SIMILARITIES.index(rule.similarity)),
        float(GATES.index(rule.gate)),
        float(DIRECTIONS.index(rule.direction)),
        float(rule.combine == "joint"),
        float(rule.select == "max"),
        float(NORMS.index(rule.norm)),
        float(rule.norm_order),
        float(SHARED.index(rule.shared)),
        float(rule.reads.tokens),
        rule.norm_limit,
        rule.blend,
        rule.strength,
        rule.logit_bias,
        rule.threshold,
        rule.width or 0.0,
        rule.cap,
    )
