# SPDX-License-Identifier: Apache-2.0
"""Compiles CUDA sources with g++ for the shim, which executes their kernels on the CPU.

    build(["csrc/cuda/launch.cu"], "out/kernels.so", sanitize="address")

A program or library with a sanitizer runs in `environment(sanitize)`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SHIM = Path(__file__).resolve().parent
CSRC = SHIM.parents[3] / "csrc"
GXX = shutil.which("g++")
NVCC_OPTIONS = (CSRC / "cuda" / "nvcc.options").read_text().split()  # those of the shipped kernels

# Kernels see memory as words of other types, as nvcc lets them. Kernels say where a multiply-add is fused.
FLAGS = ["-std=c++17", "-O2", "-g1", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", "-Wall", "-Wextra"]
FLAGS += ["-Wno-unknown-pragmas", "-fvisibility=hidden"]
LIBRARIES = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}
OPTIONS = {
    None: [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"],
    "thread": ["-fsanitize=thread", "-fno-omit-frame-pointer"],
}
# ThreadSanitizer must not see what the shim does for all threads: neither its accesses, nor those of the
# memcpy and memset that g++ makes of its loops.
SHIM_OPTIONS = {
    **OPTIONS,
    "thread": ["-DFASTNEGATE_SHIM_TSAN", "-fno-tree-loop-distribute-patterns"],
}


def _library(name: str) -> str | None:
    """Where g++ has it."""
    found = subprocess.run([GXX, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return found if os.path.isabs(found) and os.path.exists(found) else None


def missing(sanitize: str | None = None) -> str | None:
    """Why nothing can be built, a reason to skip a test."""
    if GXX is None:
        return "there is no g++"
    absent = [name for name in LIBRARIES.get(sanitize, ()) if _library(name) is None]
    return f"g++ has no {', '.join(absent)}" if absent else None


def environment(sanitize: str | None, preload: bool = False) -> dict[str, str]:
    """For a process with what `build` made; `preload` if its executable is another one, as Python."""
    variables = dict(os.environ)
    if sanitize == "address":
        # Leaks are none of a kernel's: a thread that failed never returns, and Python frees late.
        variables["ASAN_OPTIONS"] = "detect_leaks=0"
    if sanitize == "thread":
        variables["TSAN_OPTIONS"] = "exitcode=66 report_signal_unsafe=0"
    if preload and sanitize is not None:
        variables["LD_PRELOAD"] = " ".join(filter(None, map(_library, LIBRARIES[sanitize])))
    return variables


def _compile(command: Sequence[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr[-6000:]}")


def build(
    sources: Sequence[str | Path],
    target: str | Path,
    *,
    sanitize: str | None = None,
    flags: Sequence[str] = (),
    python: bool = False,
) -> Path:
    """The shim and `sources` as an executable, or as a shared library if `target` ends with .so.

    `flags` go to the compiler. `python`: with the headers of Python and pybind11. Objects lie beside it, and
    may be sources of another one: they are linked as they are.
    """
    target = Path(target)
    includes = [SHIM / "include", CSRC, CSRC / "include"]
    if python:
        import pybind11

        includes += [sysconfig.get_path("include"), pybind11.get_include()]
    common = [GXX, *FLAGS, *(f"-I{path}" for path in includes)]
    commands, objects = [], []
    for source in [SHIM / "shim.cpp", *map(Path, sources)]:
        if source.suffix == ".o":
            objects.append(source)
            continue
        compiled = target.with_name(f"{target.name}.{len(objects)}.{source.stem}.o")
        is_shim = source == SHIM / "shim.cpp"
        options = (SHIM_OPTIONS if is_shim else OPTIONS)[sanitize]
        # nvcc includes the runtime's header in every source.
        language = ["-x", "c++", *(["-include", "cuda_runtime.h"] if source.suffix == ".cu" else [])]
        commands.append([*common, *options, *flags, *language, "-c", source, "-o", compiled])
        objects.append(compiled)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(_compile, commands))
    shared = ["-shared"] if target.suffix == ".so" else []
    _compile([GXX, *shared, *OPTIONS[sanitize], *objects, "-o", target])
    return target
