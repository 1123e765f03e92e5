# SPDX-License-Identifier: Apache-2.0
"""When a layer's concept keys and values may be kept from step to step: while its modules are plain and
untouched. Whatever is around them (adapters, quantization, offload, hooks) is asked at every step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...engine.session.call import PipelineCall
from ...engine.session.slots import Slots

_PLAIN = (nn.Linear, nn.LayerNorm, nn.GroupNorm)
_module = torch.nn.modules.module


class State(NamedTuple):
    """What projections of a layer depend on, besides the text."""

    facts: list[Any]
    parameters: list[nn.Parameter]  # held, so that no other tensor can come to have the identity of one


class Kept(NamedTuple):
    """Concept keys and values [T, H, D] of a layer, and what they were made with."""

    state: State
    of: PipelineCall
    slots: Slots
    key: Tensor
    value: Tensor

    def fits(self, state: State, of: PipelineCall, slots: Slots) -> bool:
        """Whether they would be made again with the same result."""
        return self.of is of and self.slots is slots and self.state.facts == state.facts


def state_of(attn: Any, query: Tensor) -> State | None:
    """The state of a layer; None where that cannot be told."""
    if torch.is_grad_enabled() or _module._global_forward_hooks or _module._global_forward_pre_hooks:
        return None
    parts = [attn._modules["to_k"], attn._modules["to_v"]]
    if attn.norm_cross:
        parts.append(attn.norm_encoder_hidden_states)
    if attn.norm_k is not None:
        parts.append(attn.norm_k)
    state: list[Any] = []
    parameters: list[nn.Parameter] = []
    try:
        for part in parts:
            facts = part.__dict__
            if type(part) not in _PLAIN or facts["_forward_hooks"] or facts["_forward_pre_hooks"]:
                return None
            if "forward" in facts:
                return None
            for tensor in facts["_parameters"].values():
                if tensor is not None:
                    if type(tensor) is not nn.Parameter:
                        return None
                    state += (id(tensor), tensor.data_ptr(), tensor._version)
                    parameters.append(tensor)
    except RuntimeError:  # tensors of inference mode have no version
        return None
    device = query.device.type
    if torch.is_autocast_enabled(device):
        state.append(torch.get_autocast_dtype(device))
    if device == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return None  # what is made there belongs to the graph
        state.append(torch.cuda.current_stream(query.device).cuda_stream)
    return State(state, parameters)
