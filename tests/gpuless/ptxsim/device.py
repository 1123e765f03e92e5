# SPDX-License-Identifier: Apache-2.0
"""Lets Triton launch kernels on the simulator: `with SimulatedDevice() as device: kernel[grid](...)`.

It takes the place of Triton's driver, so the kernel is specialised, compiled and given its arguments
as on a GPU of compute capability 8.0. Tensors live on the CPU. Of each one the kernel may touch the
elements and nothing between or around them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget

from .machine import Result, run
from .memory import Buffer, GlobalMemory
from .parse import Program, PtxError, parse


class Launched(NamedTuple):
    """A launch that took place."""

    program: Program
    grid: tuple[int, int, int]
    threads: int
    shared: int
    result: Result


class SimulatedDevice:
    """Triton's driver while it is entered.

    Args:
        outputs: names of arguments that the kernel may write ("out.data" of a tuple `out`), by default
            all. They must be written before they are read if they are in `undefined`. Arguments that
            are views of one tensor count as the first of them.
        change: applied to every program before it runs, for mutations.
        limit: as of `ptxsim.run`.
    """

    def __init__(
        self,
        outputs: Iterable[str] | None = None,
        undefined: Iterable[str] = (),
        change: Callable[[Program], Program] = lambda program: program,
        limit: int = 1_000_000,
    ) -> None:
        self.outputs = None if outputs is None else set(outputs)
        self.undefined = set(undefined)
        self.change = change
        self.limit = limit
        self.launches: list[Launched] = []
        self.memory = GlobalMemory()
        self.storages: dict[int, tuple[torch.UntypedStorage, Buffer]] = {}

    def __enter__(self) -> SimulatedDevice:
        self._before = triton.runtime.driver._active
        driver = _Driver(self)
        triton.runtime.driver.set_active(driver)
        self._hook = driver.will_load
        triton.knobs.runtime.kernel_load_start_hook.add(self._hook)
        return self

    def __exit__(self, *error: object) -> None:
        triton.knobs.runtime.kernel_load_start_hook.remove(self._hook)
        triton.runtime.driver._active = self._before

    def launch(
        self, program: Program, grid: tuple, threads: int, shared: int, arguments: list[tuple[str, Any]]
    ) -> None:
        packed = [self._address(n, x) if isinstance(x, torch.Tensor) else x for n, x in arguments]
        packed += [0] * (len(program.parameters) - len(packed))  # scratch memory, which nobody asked for
        program = self.change(program)
        result = run(program, grid, threads, packed, self.memory, shared, self.limit)
        self.launches.append(Launched(program, grid, threads, shared, result))

    def _address(self, name: str, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        base = storage.data_ptr()
        allowed = _elements(tensor)
        if base not in self.storages:
            array = np.frombuffer(_bytes(storage), np.uint8) if len(storage) else np.zeros(1, np.uint8)
            writable = self.outputs is None or name in self.outputs
            defined = name not in self.undefined
            buffer = self.memory.add(name, array, writable=writable, defined=defined, allowed=allowed)
            self.storages[base] = storage, buffer
        buffer = self.storages[base][1]
        buffer.allowed |= allowed  # two arguments may be views of one tensor
        return buffer + (tensor.data_ptr() - base)


def _bytes(storage: torch.UntypedStorage) -> memoryview:
    return memoryview(torch.tensor([], dtype=torch.uint8).set_(storage).numpy())


def _elements(tensor: torch.Tensor) -> np.ndarray:
    """Which bytes of a tensor's storage are its elements."""
    size = tensor.element_size()
    inside = torch.zeros(max(len(tensor.untyped_storage()) // size, 1), dtype=torch.bool)
    inside.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
    return inside.repeat_interleave(size).numpy()


# ---- what Triton asks of a driver -------------------------------------------------------------------


class _Driver:
    launcher_cls: Callable[..., Any]

    def __init__(self, device: SimulatedDevice) -> None:
        self.device = device
        self.launcher_cls = _Launcher
        self.utils = SimpleNamespace(
            load_binary=self.load,
            unload_module=lambda module: None,
            get_device_properties=lambda number: {
                "max_shared_mem": 163 * 1024, "multiprocessor_count": 108, "warpSize": 32,
            },
        )  # fmt: skip

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 80, 32)

    def get_current_device(self) -> str:
        return "simulated"  # the key of Triton's caches, so that no GPU finds what was compiled here

    def get_current_stream(self, device: str) -> int:
        return 0

    def will_load(self, module, function, name: str, files: dict[str, str], key: str) -> None:
        """Triton's hook before a kernel is loaded: the only place that knows its PTX."""
        self.ptx = next(Path(path).read_text() for file, path in files.items() if file.endswith(".ptx"))

    def load(self, name: str, binary: bytes, shared: int, device) -> tuple:
        """Module, function, registers, spilled registers, most threads."""
        return object(), parse(self.ptx, name), 0, 0, 1024


class _Launcher:
    """Belongs to a compiled kernel, which Triton keeps from one device to the next."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.signature = source.signature
        self.metadata = metadata

    def __call__(self, x: int, y: int, z: int, stream, function: Program, *rest: Any) -> None:
        metadata, (_packed, _launched, _enter, _leave, *arguments) = self.metadata, rest
        if metadata.global_scratch_size or metadata.num_ctas != 1:
            raise PtxError("scratch memory and clusters are not supported")
        flat: list[tuple[str, Any]] = []
        for (name, kind), value in zip(self.signature.items(), arguments):
            _flatten(name, kind, value, flat)
        device = triton.runtime.driver.active.device
        device.launch(function, (x, y, z), metadata.num_warps * metadata.warp_size, metadata.shared, flat)


def _flatten(name: str, kind: Any, value: Any, flat: list[tuple[str, Any]]) -> None:
    """Arguments without constants, tuples taken apart: what the compiled kernel takes."""
    if isinstance(kind, tuple):
        fields = getattr(value, "_fields", range(len(kind)))
        for field, inner, item in zip(fields, kind, value):
            _flatten(f"{name}.{field}", inner, item, flat)
    elif kind != "constexpr":
        flat.append((name, float(value) if kind.startswith("fp") else value))
