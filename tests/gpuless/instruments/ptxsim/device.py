# SPDX-License-Identifier: Apache-2.0
"""Lets Triton launch kernels on the simulator: `with SimulatedDevice() as device: kernel[grid](...)`.

A `Device` takes the place of Triton's driver, so kernels are specialised, compiled and given their arguments
as on a GPU. Tensors live on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from triton.backends.compiler import GPUTarget

from fastnegate.operator.plan import plans

from .machine import Result, run
from .parse import Program, PtxError, parse
from .tensors import Tensors

AnyDevice = TypeVar("AnyDevice", bound="Device")


class Gpu(NamedTuple):
    """What Triton and a backend ask of a GPU."""

    target: GPUTarget
    shared: int  # bytes that a CTA may have
    multiprocessors: int


A100 = Gpu(GPUTarget("cuda", 80, 32), 163 * 1024, 108)


class Call(NamedTuple):
    """What Triton gives a launch besides the kernel."""

    grid: tuple[int, int, int]
    metadata: Any  # `num_warps`, `shared`, ...
    constants: dict[str, Any]  # arguments that were compiled in
    arguments: list[tuple[str, Any]]  # what the compiled kernel takes


class Device:
    """Triton's driver while it is entered. Subclasses say what loading and launching a kernel are."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def __enter__(self: AnyDevice) -> AnyDevice:
        plans.clear()  # those for another device
        self._before = triton.runtime.driver._active
        driver = _Driver(self)
        triton.runtime.driver.set_active(driver)
        self._hook = driver.will_load
        triton.knobs.runtime.kernel_load_start_hook.add(self._hook)
        return self

    def __exit__(self, *error: object) -> None:
        triton.knobs.runtime.kernel_load_start_hook.remove(self._hook)
        triton.runtime.driver._active = self._before
        plans.clear()

    def load(self, name: str, files: dict[str, Path]) -> Any:
        """The kernel that `launch` gets; Triton asks once for what it compiled, and keeps it.

        Args:
            files: the compiler's results by extension, such as "ptx".
        """
        raise NotImplementedError

    def launch(self, kernel: Any, call: Call) -> None:
        raise NotImplementedError


class Launched(NamedTuple):
    """A launch that took place."""

    program: Program
    grid: tuple[int, int, int]
    threads: int
    shared: int
    constants: dict[str, Any]  # the kernel's arguments that were compiled in
    result: Result


class SimulatedDevice(Device):
    """A GPU whose matrix instructions are mma.sync. Of each tensor the kernel may touch the elements and
    nothing between or around them.

    Args:
        outputs: names of arguments that the kernel may write ("out.data" of a tuple `out`), by default
            all. They must be written before they are read if they are in `undefined`. Arguments that
            are views of one tensor count as the first of them.
        change: applied to every program before it runs, for mutations.
        limit: as of `ptxsim.run`.
        gpu: by default one of compute capability 8.0.
    """

    def __init__(
        self,
        outputs: Iterable[str] | None = None,
        undefined: Iterable[str] = (),
        change: Callable[[Program], Program] = lambda program: program,
        limit: int = 1_000_000,
        gpu: Gpu = A100,
    ) -> None:
        super().__init__(gpu)
        self.outputs = None if outputs is None else set(outputs)
        self.undefined = set(undefined)
        self.change = change
        self.limit = limit
        self.launches: list[Launched] = []
        self.memory = Tensors()

    def load(self, name: str, files: dict[str, Path]) -> Program:
        return parse(files["ptx"].read_text(), name)

    def launch(self, program: Program, call: Call) -> None:
        metadata = call.metadata
        if metadata.global_scratch_size or metadata.num_ctas != 1:
            raise PtxError("scratch memory and clusters are not supported")
        packed = [self._address(n, x) if isinstance(x, torch.Tensor) else x for n, x in call.arguments]
        packed += [0] * (len(program.parameters) - len(packed))  # scratch memory, which nobody asked for
        program = self.change(program)
        threads = metadata.num_warps * metadata.warp_size
        result = run(program, call.grid, threads, packed, self.memory, metadata.shared, self.limit)
        launched = Launched(program, call.grid, threads, metadata.shared, call.constants, result)
        self.launches.append(launched)

    def _address(self, name: str, tensor: torch.Tensor) -> int:
        writable = self.outputs is None or name in self.outputs
        defined = name not in self.undefined
        return self.memory.address(name, tensor, writable=writable, defined=defined)


# ---- what Triton asks of a driver -------------------------------------------------------------------


class _Driver:
    launcher_cls: Callable[..., Any]

    def __init__(self, device: Device) -> None:
        self.device = device
        self.launcher_cls = _Launcher
        gpu = device.gpu
        self.utils = SimpleNamespace(
            load_binary=self.load,
            unload_module=lambda module: None,
            get_device_properties=lambda number: {
                "max_shared_mem": gpu.shared, "multiprocessor_count": gpu.multiprocessors,
                "warpSize": gpu.target.warp_size,
            },
        )  # fmt: skip

    def get_current_target(self) -> GPUTarget:
        return self.device.gpu.target

    def get_current_device(self) -> str:
        """The key of Triton's caches: what was loaded here is for no other device."""
        return f"{type(self.device).__name__} {self.device.gpu.target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0

    def will_load(self, module, function, name: str, files: dict[str, str], key: str) -> None:
        """Triton's hook before a kernel is loaded: the only place that knows all that was compiled."""
        self.files = {Path(file).suffix[1:]: Path(path) for file, path in files.items()}

    def load(self, name: str, binary: bytes, shared: int, device) -> tuple:
        """Module, function, registers, spilled registers, most threads."""
        return object(), self.device.load(name, self.files), 0, 0, 1024


class _Launcher:
    """Belongs to a compiled kernel, which Triton keeps from one device to the next."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.signature = source.signature
        self.metadata = metadata

    def __call__(self, x: int, y: int, z: int, stream, function: Any, *rest: Any) -> None:
        _packed, _launched, _enter, _leave, *values = rest
        constants: dict[str, Any] = {}
        arguments: list[tuple[str, Any]] = []
        for (name, kind), value in zip(self.signature.items(), values):
            _flatten(name, kind, value, constants, arguments)
        call = Call((x, y, z), self.metadata, constants, arguments)
        triton.runtime.driver.active.device.launch(function, call)


def _flatten(name: str, kind: Any, value: Any, constants: dict, arguments: list) -> None:
    """Tuples are taken apart: `out` with a field `data` has "out.data"."""
    if isinstance(kind, tuple):
        fields = getattr(value, "_fields", range(len(kind)))
        for field, inner, item in zip(fields, kind, value):
            _flatten(f"{name}.{field}", inner, item, constants, arguments)
    elif kind == "constexpr":
        constants[name] = value
    else:
        arguments.append((name, float(value) if kind.startswith("fp") else value))
