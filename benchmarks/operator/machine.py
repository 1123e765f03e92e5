# SPDX-License-Identifier: Apache-2.0
"""What this machine is and can do: facts for the record, and the two speeds that shares refer to."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Any

import torch

import fastnegate
from fastnegate.backends import cpu

_CPU = Path("/sys/devices/system/cpu/cpu0")


def facts() -> dict[str, Any]:
    """Facts that a measurement depends on."""
    return {
        "system": platform.platform(),
        "processor": processor(),
        "caches": caches(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastnegate": fastnegate.__version__,
        "instruction_set": instruction_set(),
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        return names[0].split(":", 1)[1].strip() if names else "unknown"
    return platform.processor()


def caches() -> dict[str, str]:
    """Sizes of the caches that the first core sees, e.g. {"L2 Unified": "1024K"}; empty if unknown."""
    found = {}
    for cache in sorted(_CPU.glob("cache/index*")):
        level, kind, size = ((cache / name).read_text().strip() for name in ("level", "type", "size"))
        found[f"L{level} {kind}"] = size
    return found


def instruction_set() -> str:
    """The instruction set of the CPU kernel.

    Raises:
        RuntimeError: there is no CPU kernel to measure, or FASTNEGATE_CPU_ISA names one that cannot be used.
    """
    if (reason := cpu.unavailable()) is not None:
        raise RuntimeError(f"there is no CPU kernel to measure: {reason}")
    return cpu.instruction_set()


def fma_peak(seconds: float = 0.2) -> float:
    """Floating-point operations per second that independent float32 multiply-adds reach on all threads,
    with the instruction set of the kernel."""
    peak: float = cpu._C.fma_peak(instruction_set(), torch.get_num_threads(), seconds)
    return peak


def copy_bandwidth(mebibytes: int = 256, repeats: int = 7) -> float:
    """Bytes per second, read and written ones together, of the fastest of several copies of a tensor
    far larger than the last cache."""
    source = torch.ones(mebibytes << 18)
    target = torch.empty_like(source)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(times)
