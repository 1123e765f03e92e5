# SPDX-License-Identifier: Apache-2.0
"""A problem that is moved to a device lies in memory as it did: the kernels of a GPU must meet the layouts
that tests make."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from support import LAYOUTS, every_dtype, make_problem, with_concepts
from torch import Tensor

from fastnegate.operator.problem import Problem
from fastnegate.testing import moved

ELSEWHERE = ("cpu", "meta")


def tensors(problem: Problem) -> Iterator[tuple[str, Tensor]]:
    for holder in (problem, problem.concepts):
        for field in dataclasses.fields(holder):
            if isinstance(item := getattr(holder, field.name), Tensor):
                yield field.name, item


def memory(tensor: Tensor) -> Tensor:
    """All bytes of its storage."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


@pytest.mark.parametrize("device", ELSEWHERE)
@pytest.mark.parametrize("layout", LAYOUTS)
@every_dtype
def test_layouts_survive(layout: str, dtype: torch.dtype, device: str) -> None:
    problem = make_problem(dtype=dtype, layout=layout, mask="additive")
    pairs = [*zip(tensors(problem), tensors(moved(problem, device)))]
    assert len(pairs) == 13
    for (name, old), (_, new) in pairs:
        assert new.device.type == device, name
        assert (new.dtype, new.shape, new.stride()) == (old.dtype, old.shape, old.stride()), name
        assert new.storage_offset() == old.storage_offset(), name
        assert new.untyped_storage().nbytes() == old.untyped_storage().nbytes(), name
        if device == "cpu":
            assert torch.equal(memory(new), memory(old)), f"{name}, or what lies in its gaps"
            assert new.data_ptr() % 16 == old.data_ptr() % 16, name
            assert new.untyped_storage().data_ptr() != old.untyped_storage().data_ptr(), name


def test_what_the_layouts_are() -> None:
    """The test above would pass on dense tensors too."""
    odd = moved(make_problem(dtype=torch.float16, layout="odd"), "cpu")
    assert odd.query.stride(2) == odd.query.shape[3] + 3 and odd.query.data_ptr() % 16 == 2
    assert odd.concepts.key.stride(1) == odd.concepts.key.shape[2] + 3
    gaps = memory(odd.query).view(torch.float16).isnan().sum()
    assert gaps == 3 * odd.query.numel() // odd.query.shape[3]
    assert moved(make_problem(layout="broadcast"), "cpu").key.stride(0) == 0
    assert not moved(make_problem(layout="bnhd"), "cpu").query.is_contiguous()


@pytest.mark.parametrize("device", ELSEWHERE)
def test_views(device: str) -> None:
    """One row of a batch, and every second number of an array."""
    problem = make_problem()
    spread = torch.stack([problem.concepts.offset] * 2, 1)[:, 1]
    problem = with_concepts(dataclasses.replace(problem, query=problem.query[1:2]), offset=spread)
    there = moved(problem, device)
    assert there.query.storage_offset() == problem.query[0].numel()
    assert (there.concepts.offset.stride(), there.concepts.offset.storage_offset()) == ((2,), 1)
    if device == "cpu":
        assert torch.equal(there.query, problem.query) and torch.equal(there.concepts.offset, spread)


def test_inference_mode() -> None:
    with torch.inference_mode():
        problem = make_problem(layout="odd")
        assert torch.equal(moved(problem, "cpu").key, problem.key)
    assert torch.equal(moved(problem, "cpu").key, problem.key)
