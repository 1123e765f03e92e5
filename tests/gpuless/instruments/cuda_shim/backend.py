# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend on the shim: the module that `make` builds from csrc/cuda in place of the compiled one."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.machinery
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from cuda_shim.build import CSRC, build

from fastnegate.operator.backends import cuda
from fastnegate.operator.plan import plans

HEAD_DIMS = (32, 40, 64, 72, 80, 88, 96, 112, 128, 160)
COUNTS = ("mma_k16", "mma_k8", "copied", "exp2", "barriers", "ldmatrix_conflicts", "copy_conflicts")


def dims_flag(dims: Sequence[int]) -> str:
    """The head_dims of a build, as its sources want to know them."""
    return "-DFASTNEGATE_CUDA_DIMS(X)=" + " ".join(f"X({dim})" for dim in dims)


def make(folder: Path, dims: Sequence[int] = HEAD_DIMS, sanitize: str | None = None) -> Path:
    """The module `_cuda`, with kernels for the head_dims."""
    sources = [CSRC / "cuda" / name for name in ("float16.cu", "bfloat16.cu", "run.cu", "bindings.cpp")]
    flags = [dims_flag(dims), '-DFASTNEGATE_CUDA_ARCHS="80-real"']
    return build(sources, folder / "_cuda.so", sanitize=sanitize, flags=flags, python=True)


class Shim:
    """The simulated GPU of a module."""

    def __init__(self, path: Path) -> None:
        name = f"{path.parent.name}._cuda"  # pybind11 keeps modules by name
        loader = importlib.machinery.ExtensionFileLoader(name, str(path))
        spec = importlib.util.spec_from_file_location(name, path, loader=loader)
        assert spec is not None
        self.module = importlib.util.module_from_spec(spec)
        loader.exec_module(self.module)
        self._library = ctypes.CDLL(str(path))
        self._library.fastnegate_shim_count.restype = ctypes.c_int64
        self._library.fastnegate_shim_launches.restype = ctypes.c_int64

    def reset(self, **device: int) -> None:
        """No launches, and an A100 but for `device` (fields of `Device` in shim.h)."""
        self.forget()
        self._library.fastnegate_shim_reset()
        for name, value in device.items():
            assert self._library.fastnegate_shim_set(name.encode(), ctypes.c_int64(value)) == 0, name

    def fail_next(self, function: str, error: int) -> None:
        assert self._library.fastnegate_shim_fail_next(function.encode(), error) == 0, function

    @property
    def launches(self) -> list[dict[str, int]]:
        """The counts of each."""
        count = self._library.fastnegate_shim_count
        number = range(self._library.fastnegate_shim_launches())
        return [{name: count(ctypes.c_int64(i), name.encode()) for name in COUNTS} for i in number]

    @contextlib.contextmanager
    def installed(self) -> Iterator[Shim]:
        """As the module of the backend, which takes tensors of the CPU meanwhile."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda, "_cuda", self.module)
            patch.setattr(cuda, "_MISSING", None)
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(cuda, "_refused_device", lambda query: None)
            patch.setattr(cuda, "_device", lambda query: 0)
            patch.setattr(cuda, "_stream", lambda device: 0)
            self.forget()
            yield self
        self.forget()

    @staticmethod
    def forget() -> None:
        """What was found out about a machine, and plans for it."""
        cuda._unavailable.cache_clear()
        plans.clear()
