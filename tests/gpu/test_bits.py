# SPDX-License-Identifier: Apache-2.0
"""What may not change a bit of the output, and what a kernel may read and write."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from card import (
    BACKENDS,
    DTYPES_OF,
    FEATURE_MAX,
    call,
    call_with_statistics,
    every_rule,
    on_card,
    run,
    same,
)
from support import Judge, make_problem, plain, with_concepts
from torch import Tensor

from fastnegate.operator.problem import Problem
from fastnegate.operator.rule import Rule

pytestmark = pytest.mark.usefixtures("one_thread")
# Kernels of 16 bit differ from those of float32; the CUDA ones are compiled for each dtype.
KINDS = [(b, t) for b in BACKENDS for t in DTYPES_OF[b] if b == "cuda" or t != torch.bfloat16]
every_kind = pytest.mark.parametrize(
    "backend, dtype", KINDS, ids=[f"{b}-{str(t).removeprefix('torch.')}" for b, t in KINDS]
)


def tensors(holder: Any) -> dict[str, Tensor]:
    """Of a problem without those of its concepts, or of concepts."""
    return {name: t for name, t in vars(holder).items() if isinstance(t, Tensor)}


def memory(tensor: Tensor) -> Tensor:
    """All bytes of its storage."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


# ---- rows -------------------------------------------------------------------------------------


@every_kind
@every_rule
def test_rows_that_negate_nothing(rule: Rule, backend: str, dtype: torch.dtype) -> None:
    """A row without entries in a live batch, entries that are inactive, none at all: plain attention."""
    problem = make_problem(dtype=dtype, rule=rule, rows=[[0, 2], [], [1]], mask="padding")
    expected = run(plain(problem), backend)
    output = run(problem, backend)
    assert same(output[1], expected[1]) and not same(output[2], expected[2])
    inactive = with_concepts(problem, numbers=problem.concepts.numbers.clone())
    inactive.concepts.active.zero_()
    assert same(run(inactive, backend), expected)
    none = make_problem(dtype=dtype, rule=rule, rows="none").concepts
    assert same(run(dataclasses.replace(problem, concepts=none), backend), expected)


@every_kind
@every_rule
def test_a_row_depends_on_itself_alone(rule: Rule, backend: str, dtype: torch.dtype) -> None:
    """Not on how many others there are, nor on what they hold: other numbers, NaN."""
    rows = [[0, 2], [1], [2, 1, 0], []]
    problem = make_problem(4, queries=83, dtype=dtype, rule=rule, rows=rows, mask="padding")
    other = make_problem(4, queries=83, dtype=dtype, rule=rule, rows=rows, seed=99)
    tokens = problem.concepts
    expected = run(problem, backend)
    assert expected.isfinite().all()
    offsets = tokens.index[-5:].tolist()
    for b, (begin, end) in enumerate(pairwise(offsets)):
        index = torch.cat([tokens.index[:-5], torch.tensor([begin, end], dtype=torch.int32)])
        mine = slice(b, b + 1)
        alone = dataclasses.replace(
            with_concepts(problem, index=index),
            **{name: getattr(problem, name)[mine] for name in ("query", "key", "value", "key_bias")},
        )
        assert same(run(alone, backend)[0], expected[b]), f"row {b} alone"
        keep = (torch.arange(4) == b)[:, None, None, None]
        numbers = tokens.numbers * 0.5
        numbers[begin:end] = tokens.numbers[begin:end]
        crowd = dataclasses.replace(
            with_concepts(problem, numbers=numbers),
            query=torch.where(keep, problem.query, other.query * 100),
            key=torch.where(keep, problem.key, other.key),
            value=torch.where(keep, problem.value, torch.nan),
        )
        assert same(run(crowd, backend)[b], expected[b]), f"row {b} among others"


@every_kind
@every_rule
def test_what_is_masked_is_not_there(rule: Rule, backend: str, dtype: torch.dtype) -> None:
    """NaN and inf in masked keys and tokens change nothing."""
    problem = make_problem(dtype=dtype, rule=rule, rows="same", mask="padding")
    tokens = problem.concepts
    away = tokens.token_bias.clone()
    away[[0, 5, 8, 22]] = -torch.inf  # of 8, 3 and 12 tokens
    problem = with_concepts(problem, token_bias=away)
    expected = run(problem, backend)
    assert expected.isfinite().all()
    gone = (problem.key_bias == -torch.inf).expand(3, 2, 1, -1).transpose(2, 3)
    hidden = (away == -torch.inf)[:, None, None]
    spoiled = dataclasses.replace(
        with_concepts(
            problem,
            key=tokens.key.masked_fill(hidden, torch.inf),
            value=tokens.value.masked_fill(hidden, torch.nan),
        ),
        key=problem.key.masked_fill(gone, torch.nan),
        value=problem.value.masked_fill(gone, torch.inf),
    )
    assert same(run(spoiled, backend), expected)


# ---- repetition -------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize(
    "rule", ("protore", "nag", "vsf", "casteer", FEATURE_MAX), ids=lambda r: getattr(r, "name", r)
)
def test_a_hundred_calls_give_the_same_bits(rule: Rule | str, backend: str, dtype: torch.dtype) -> None:
    """Of outputs and statistics, on as many queries as keep all of a GPU busy."""
    problem = on_card(make_problem(4, 4, 1000, 77, 64, dtype, rule=rule, layout="bnhd"))
    first = call(problem, backend)
    others = [call(problem, backend) for _ in range(100)]
    assert all(same(other, first) for other in others)
    del others
    _, statistics = call_with_statistics(problem, backend)
    for _ in range(10):
        output, again = call_with_statistics(problem, backend)
        assert same(output, first)
        assert all(map(same, again, statistics))


# ---- memory -----------------------------------------------------------------------------------

BAND = 4096  # elements
Shape = tuple[int, ...]


def between(t: Tensor, gap: int = 0) -> Tensor:
    """The same values with a gap after every last dimension, between bands, all of NaN or of a large number.
    Rows stay aligned."""
    poison = torch.nan if t.is_floating_point() else 1 << 30
    shape = (*t.shape[:-1], t.shape[-1] + gap)
    room = t.new_full((math.prod(shape) + 2 * BAND,), poison)
    return room[BAND:-BAND].view(shape)[..., : t.shape[-1]].copy_(t)


def surrounded(problem: Problem) -> Problem:
    def around(holder: Any) -> dict[str, Tensor]:
        gaps = {"query": 8, "key": 8, "value": 8}
        return {name: between(t, gaps.get(name, 0)) for name, t in tensors(holder).items()}

    return dataclasses.replace(with_concepts(problem, **around(problem.concepts)), **around(problem))


class Bands:
    """Memory that the backend asks torch for, while entered: full of NaN unless it is to be cleared, between
    bands that nothing may write."""

    def __init__(self) -> None:
        self.tables: list[tuple[Tensor, Tensor]] = []  # all of the memory, and what was asked for
        self.outputs: list[tuple[Tensor, Tensor]] = []  # the same; strided as the caller's heads lie
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> Bands:
        def room(kept: list[tuple[Tensor, Tensor]], shape: Shape, **options: Any) -> Tensor:
            size = math.prod(shape)
            memory = torch.empty(size + 2 * BAND, **options)
            memory.view(torch.uint8).fill_(255)
            kept.append((memory, memory[BAND : BAND + size].view(shape)))
            return kept[-1][1]

        def zeros(*shape: Any, **options: Any) -> Tensor:
            return room(self.tables, shape if isinstance(shape[0], int) else shape[0], **options).zero_()

        def new_empty(like: Tensor, shape: Shape, dtype: torch.dtype) -> Tensor:
            return room(self.tables, shape, dtype=dtype, device=like.device)

        def new_empty_strided(like: Tensor, shape: Shape, strides: Shape) -> Tensor:
            flat = room(self.outputs, (math.prod(shape),), dtype=like.dtype, device=like.device)
            return flat.as_strided(shape, strides)

        self._patch.setattr(torch, "zeros", zeros)
        self._patch.setattr(torch.Tensor, "new_empty", new_empty)
        self._patch.setattr(torch.Tensor, "new_empty_strided", new_empty_strided)
        return self

    def __exit__(self, *error: object) -> None:
        self._patch.undo()

    def check(self) -> None:
        assert all(inside.isfinite().all() for _, inside in self.outputs), "not all of an output was written"
        for room, inside in self.tables + self.outputs:
            bands = room[:BAND], room[BAND + inside.numel() :]
            assert all((band.view(torch.uint8) == 255).all() for band in bands), (
                "its surroundings were written"
            )


@every_kind
@every_rule
def test_reads_and_writes_what_it_should(rule: Rule, backend: str, dtype: torch.dtype) -> None:
    """All of the output is written and nothing around it; of the inputs nothing is written, and nothing that
    lies around them is used."""
    judge = Judge(make_problem(dtype=dtype, rule=rule, mask="additive", queries=67))
    problem = on_card(surrounded(judge.problem))
    inputs = [*tensors(problem).values(), *tensors(problem.concepts).values()]
    expected = call(problem, backend)
    judge.check(expected.cpu(), backend)
    call_with_statistics(problem, backend)  # compiles
    before = [memory(t).clone() for t in inputs]
    with Bands() as bands:
        output = call(problem, backend)
        both, statistics = call_with_statistics(problem, backend)
    assert len(bands.outputs) == 2 and len(bands.tables) >= 2
    bands.check()
    assert same(output, expected) and same(both, expected)
    judge.check_statistics(statistics, backend)
    assert len(inputs) == 13 and all(map(same, map(memory, inputs), before))


def test_what_the_test_above_would_find() -> None:
    with Bands() as bands:
        output, table = torch.ones(3).new_empty_strided((2, 3), (1, 2)), torch.zeros(5)
    with pytest.raises(AssertionError, match="not all of an output"):
        bands.check()
    output.zero_()
    bands.check()
    for written, at in ((output, BAND + 6), (output, BAND - 1), (table, BAND + 5)):
        numbers = memory(written).view(torch.float32)
        before = numbers[at].clone()
        numbers[at] = 1.0
        with pytest.raises(AssertionError, match="its surroundings"):
            bands.check()
        numbers.view(torch.int32)[at] = before.view(torch.int32)
    bands.check()
    there = surrounded(make_problem(dtype=torch.float16, mask="additive"))
    for name, gap in (("query", 8), ("key", 8), ("key_bias", 0)):
        t = tensors(there)[name]
        nans = memory(t).view(t.dtype).isnan().sum()
        assert nans == 2 * BAND + gap * t.numel() // t.shape[-1] and not t.isnan().any()
    assert there.concepts.index.storage_offset() == BAND
