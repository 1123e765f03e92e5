# SPDX-License-Identifier: Apache-2.0
"""When a layer's concept keys and values may be kept from step to step: while its modules are plain and
untouched. Whatever is around them (adapters, quantization, offload, hooks) is asked at every step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ....engine.session.call import PipelineCall
from ....engine.session.slots import Slots

_PLAIN = (nn.Linear, nn.LayerNorm, nn.GroupNorm)
_module = torch.nn.modules.module


class Part(NamedTuple):
    """A plain module, and its parameters as they were: tensor, address, version."""

    name: str  # in its layer
    module: nn.Module
    facts: dict[str, Any]
    parameters: list[tuple[str, nn.Parameter, int, int]]

    @classmethod
    def of(cls, name: str, module: nn.Module) -> Part | None:
        """None if the module is not plain."""
        facts, parameters = module.__dict__, []
        hooked = "forward" in facts or facts["_forward_hooks"] or facts["_forward_pre_hooks"]
        if type(module) not in _PLAIN or hooked:
            return None
        for key, tensor in facts["_parameters"].items():
            if tensor is None:
                continue
            if type(tensor) is not nn.Parameter or tensor.is_inference():  # those have no version
                return None
            parameters.append((key, tensor, tensor.data_ptr(), tensor._version))
        return cls(name, module, facts, parameters)


class Kept(NamedTuple):
    """Concept keys and values [T, H, D] of a layer, and what they were made with."""

    parts: list[Part]
    of: PipelineCall
    slots: Slots
    stream: int | None
    key: Tensor
    value: Tensor

    @classmethod
    def made(
        cls, attn: Any, names: list[str], of: PipelineCall, slots: Slots, key: Tensor, value: Tensor
    ) -> Kept | None:
        """Of the modules `names` of a layer. None if they may not be kept: a module is not plain, all modules
        have hooks, gradients are to flow, or they belong to a graph that is captured."""
        if _module._global_forward_hooks or _module._global_forward_pre_hooks or torch.is_grad_enabled():
            return None
        if key.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        parts = [Part.of(name, attn._modules[name]) for name in names]
        known = [part for part in parts if part is not None]
        return cls(known, of, slots, _stream(key), key, value) if len(known) == len(parts) else None

    def fits(self, attn: Any, query: Tensor, of: PipelineCall, slots: Slots) -> bool:
        """Whether they would be made again with the same result. Asked by every layer: no calls."""
        if self.of is not of or self.slots is not slots or torch.is_grad_enabled():
            return False
        if _module._global_forward_hooks or _module._global_forward_pre_hooks:
            return False
        if self.key.dtype is not query.dtype:  # autocast was switched
            return False
        if query.is_cuda and (torch.cuda.is_current_stream_capturing() or _stream(query) != self.stream):
            return False
        layer = attn._modules
        for name, module, facts, parameters in self.parts:
            if layer.get(name) is not module or "forward" in facts:
                return False
            if facts["_forward_hooks"] or facts["_forward_pre_hooks"]:
                return False
            now = facts["_parameters"]
            for key, tensor, address, version in parameters:
                if now[key] is not tensor or tensor.data_ptr() != address or tensor._version != version:
                    return False
        return True


def _stream(tensor: Tensor) -> int | None:
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else None
