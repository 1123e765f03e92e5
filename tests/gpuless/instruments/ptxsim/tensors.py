# SPDX-License-Identifier: Apache-2.0
"""Tensors of the CPU as global memory."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .memory import Buffer, GlobalMemory


class Tensors(GlobalMemory):
    """Of each tensor a kernel may touch the elements and nothing between or around them."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[torch.UntypedStorage, Buffer]] = {}

    def address(self, name: str, tensor: Tensor, *, writable: bool = False, defined: bool = True) -> int:
        """Of the first element on the device. Views of one tensor count as the first of them, and are what
        that is; arguments as of `add`."""
        storage = tensor.untyped_storage()
        base = storage.data_ptr()
        allowed = _elements(tensor)
        if base not in self._storages:
            array = np.frombuffer(_bytes(storage), np.uint8) if len(storage) else np.zeros(1, np.uint8)
            buffer = self.add(name, array, writable=writable, defined=defined, allowed=allowed)
            self._storages[base] = storage, buffer
        buffer = self._storages[base][1]
        buffer.allowed |= allowed  # two arguments may be views of one tensor
        return buffer + (tensor.data_ptr() - base)


def _bytes(storage: torch.UntypedStorage) -> memoryview:
    return memoryview(torch.tensor([], dtype=torch.uint8).set_(storage).numpy())


def _elements(tensor: Tensor) -> np.ndarray:
    """Which bytes of a tensor's storage are its elements."""
    size = tensor.element_size()
    inside = torch.zeros(max(len(tensor.untyped_storage()) // size, 1), dtype=torch.bool)
    inside.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
    return inside.repeat_interleave(size).numpy()
