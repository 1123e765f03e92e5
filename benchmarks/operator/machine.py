# SPDX-License-Identifier: Apache-2.0
"""What this machine is and can do: facts for the record, and the two speeds that shares refer to."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import fastnegate
from fastnegate.operator.backends import cpu

_CPU = Path("/sys/devices/system/cpu/cpu0")
_SMI = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")


def facts() -> dict[str, Any]:
    """Facts that a measurement on the processor depends on."""
    return {
        **_software(),
        "caches": caches(),
        "threads": torch.get_num_threads(),
        "instruction_set": instruction_set(),
    }


def _software() -> dict[str, Any]:
    return {
        "system": platform.platform(),
        "processor": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastnegate": fastnegate.__version__,
    }


def gpu_facts() -> dict[str, Any]:
    """Facts that a measurement on the current GPU depends on; what it does at this moment is `gpu_state`."""
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "unknown"  # AMD's wheels have another name
    return {
        "gpu": gpu.name,
        "capability": gpu.gcnArchName if torch.version.hip else f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "memory_gbytes": round(gpu.total_memory / 2**30, 1),
        "l2_mbytes": gpu.L2_cache_size / 2**20,
        "driver": _smi(("driver_version",)).get("driver_version", "unknown"),
        "cuda": torch.version.hip or torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton,
        "commit": commit(),
        **_software(),
    }


def gpu_state() -> dict[str, str]:
    """Clocks in MHz, power in W and temperature at this moment; empty where there is no nvidia-smi."""
    return _smi(_SMI)


def _smi(names: tuple[str, ...]) -> dict[str, str]:
    if shutil.which("nvidia-smi") is None:
        return {}
    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    which = [f"--id=GPU-{uuid}"] if uuid else []
    done = subprocess.run(
        ["nvidia-smi", *which, f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return parse_smi(names, done.stdout) if done.returncode == 0 else {}


def parse_smi(names: tuple[str, ...], text: str) -> dict[str, str]:
    """The first line of nvidia-smi's CSV by name."""
    first = text.strip().partition("\n")[0]
    return dict(zip(names, (item.strip() for item in first.split(","))))


def commit() -> str:
    """Of the checkout that runs, with "+" if it has changes; "unknown" for an installed package."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    if shutil.which("git") is None or not git("ls-files", "machine.py"):
        return "unknown"
    return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))


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
