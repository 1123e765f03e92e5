# SPDX-License-Identifier: Apache-2.0
"""Offloading without an accelerator: weights that are away are NaN."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import accelerate
import pytest
import torch
from diffusers.hooks import group_offloading
from torch import Tensor, nn


class Parked:
    """Who computes with weights that are away is found out."""

    def __init__(self) -> None:
        self._away: dict[Tensor, Tensor] = {}

    def park(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if tensor.is_floating_point() and tensor not in self._away:
                self._away[tensor] = tensor.data
                tensor.data = torch.full_like(tensor, torch.nan)

    def bring(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            tensor.data = self._away.pop(tensor, tensor.data)


def _of_module(module: nn.Module) -> Iterator[Tensor]:
    yield from itertools.chain(module.parameters(), module.buffers())


def _of_group(group: Any) -> Iterator[Tensor]:
    yield from itertools.chain(*map(_of_module, group.modules), group.parameters, group.buffers)


@pytest.fixture
def parked(monkeypatch: pytest.MonkeyPatch) -> Parked:
    """What moves weights between devices parks them and brings them back."""
    away, groups, whole = Parked(), group_offloading.ModuleGroup, accelerate.hooks.CpuOffload

    def init_hook(_hook: Any, model: nn.Module) -> nn.Module:
        if hasattr(model, "attn_processors"):  # of text encoders it is asked whether a bank is theirs
            away.park(model.parameters())  # pipelines read statistics of a VAE, which stay where they are
        return model

    def pre_forward(hook: Any, model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if hook.prev_module_hook is not None:
            hook.prev_module_hook.offload()
        away.bring(_of_module(model))
        return args, kwargs

    monkeypatch.setattr(groups, "_offload_to_memory", lambda group: away.park(_of_group(group)))
    monkeypatch.setattr(groups, "_onload_from_memory", lambda group: away.bring(_of_group(group)))
    monkeypatch.setattr(whole, "init_hook", init_hook)
    monkeypatch.setattr(whole, "pre_forward", pre_forward)
    return away
