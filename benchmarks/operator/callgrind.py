# SPDX-License-Identifier: Apache-2.0
"""Count the kernel's arithmetic, instruction by instruction, and compare it with `useful_operations`.

Builds the CPU kernel with debug information and runs one call of each case under valgrind's callgrind,
which knows AVX2 but not AVX-512. How often an instruction ran times its floating-point operations is
summed up, without what the formula leaves out: code of `LEFT_OUT`, told by the functions and files that
the debug information names for each instruction. Needs a source checkout, valgrind and binutils.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from fastnegate.operator.backends import cpu

from .__main__ import fused
from .cases import CONCEPTS, METHODS, Case, Layer, make
from .measure import useful_operations

ROOT = Path(__file__).resolve().parents[2]
DIMS = (40, 64, 160)
# Exponentials, maxima and softmax sums, packing, and scalars per query (all of rule.h is about these).
LEFT_OUT = re.compile(
    r"(?<!/)\b(exp2|softmax|divide|exponent|pack_\w+|open_gates|keep_largest|moments|subtract|share)\b|^\S+/rule\.h:",
    re.MULTILINE,
)
# Operations of one lane; a register has 1, 4, 8 or 16 lanes of float32.
ARITHMETIC = re.compile(r"v?(?P<fma>fn?m(add|sub)\d{3})?(?(fma)|(add|sub|mul))(?P<lanes>[ps])s$")
REQUESTS = """
#include <valgrind/callgrind.h>
void start(void) { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
void stop(const char* name) { CALLGRIND_DUMP_STATS_AT(name); CALLGRIND_STOP_INSTRUMENTATION; }
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print counted / formula of every case; returns 1 if some differ by more than 5 %."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.operator.callgrind", description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["protore"])
    parser.add_argument("--where", action="store_true", help="also list the functions that were counted")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)  # the part under valgrind
    options = parser.parse_args(arguments)
    cases = _cases(options.methods)
    if options.run:
        _run(cases, options.run)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        library = _build(work)
        _valgrind(work, options.methods)
        executed = _executed(work, library)
        operations = _operations(library)
        addresses = {a for counts in executed.values() for a in counts if a in operations}
        places = _places(library, sorted(addresses))
    worst = 0.0
    print(f"{'case':34}{'counted':>12}{'formula':>12}{'ratio':>8}")
    for case in cases:
        functions: collections.Counter[str] = collections.Counter()
        for address, count in executed[case.name].items():
            if address in addresses and not LEFT_OUT.search(places[address]):
                functions[_function(places[address])] += count * operations[address]
        counted, formula = sum(functions.values()), useful_operations(case)
        worst = max(worst, abs(counted / formula - 1))
        print(f"{case.name:34}{counted:12}{formula:12}{counted / formula:8.3f}")
        for name, count in functions.most_common() if options.where else ():
            print(f"{count / formula:12.3f}  {name}")
    return int(worst > 0.05)


def _cases(methods: Iterable[str]) -> list[Case]:
    """Small calls, of as many queries as are a multiple of every tile."""
    layers = [Layer(f"D={dim}", heads=1, queries=64, dim=dim, batch=1) for dim in DIMS]
    return [
        make(layer, CONCEPTS[concepts], METHODS[method])
        for method in methods
        for layer in layers
        for concepts in ("none", "1x8", "4x8")
    ]


def _build(work: Path) -> Path:
    """The extension as it is shipped, with debug information."""
    if not (ROOT / "CMakeLists.txt").exists():
        raise RuntimeError(f"{ROOT} is not a source checkout: there is no kernel to build")
    import pybind11

    _call(
        "cmake", "-S", ROOT, "-B", work / "build",
        "-DCMAKE_BUILD_TYPE=RelWithDebInfo",  # Release is stripped
        "-DCMAKE_CXX_FLAGS_RELWITHDEBINFO=-O3 -DNDEBUG -g",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={work}", f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    )  # fmt: skip
    _call("cmake", "--build", work / "build")
    (work / "requests.c").write_text(REQUESTS)
    _call("cc", "-shared", "-fPIC", "-o", work / "requests.so", work / "requests.c")
    return next(work.glob("_C.*"))


def _valgrind(work: Path, methods: Iterable[str]) -> None:
    environment = {**os.environ, "FASTNEGATE_CPU_ISA": "avx2", "OMP_NUM_THREADS": "1"}
    _call(
        "valgrind", "--tool=callgrind", "--instr-atstart=no", "--dump-instr=yes", "--compress-pos=no",
        "--compress-strings=no", f"--callgrind-out-file={work / 'counts'}",
        sys.executable, "-m", "benchmarks.operator.callgrind", "--run", work, "--methods", *methods,
        environment=environment,
    )  # fmt: skip


def _call(*command: object, environment: dict[str, str] | None = None) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return done.stdout


def _run(cases: Iterable[Case], work: Path) -> None:
    """Under valgrind: one call of each case with the library in `work`, one file of counts for each."""
    spec = importlib.util.spec_from_file_location("_C", next(work.glob("_C.*")))
    assert spec is not None and spec.loader is not None
    cpu._C = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cpu._C)
    requests = ctypes.CDLL(str(work / "requests.so"))
    for case in cases:
        with torch.inference_mode():
            fused(case)()  # what is loaded or cached at a first call
            requests.start()
            fused(case)()
            requests.stop(case.name.encode())


def _executed(work: Path, library: Path) -> dict[str, dict[int, int]]:
    """Case name -> address in the library -> how often it ran."""
    found: dict[str, dict[int, int]] = {}
    for file in work.glob("counts.*"):
        name, inside, skip = "", False, False
        counts: collections.Counter[int] = collections.Counter()
        for line in file.read_text().splitlines():
            if line.startswith("desc: Trigger: Client Request: "):
                name = line.removeprefix("desc: Trigger: Client Request: ")
            elif line.startswith("ob="):
                inside = line.endswith(library.name)
            elif line.startswith("calls="):
                skip = True  # the next line is the cost of the callee
            elif line.startswith("0x"):
                if inside and not skip:
                    address, _, cost = line.split()
                    counts[int(address, 16)] += int(cost)
                skip = False
        if name:
            found[name] = dict(counts)
    return found


def _operations(library: Path) -> dict[int, int]:
    """Address -> floating-point operations of the instruction there, where it does any."""
    found = {}
    for line in _call("objdump", "-d", "--no-show-raw-insn", library).splitlines():
        parts = line.strip().split(None, 2)
        if len(parts) < 3 or not parts[0].endswith(":"):
            continue
        arithmetic = ARITHMETIC.match(parts[1])
        if arithmetic is None:
            continue
        lanes = 16 if "%zmm" in parts[2] else 8 if "%ymm" in parts[2] else 4
        lanes = lanes if arithmetic["lanes"] == "p" else 1
        found[int(parts[0][:-1], 16)] = lanes * (2 if arithmetic["fma"] else 1)
    return found


def _places(library: Path, addresses: Sequence[int]) -> dict[int, str]:
    """Address -> the functions that it was inlined from, innermost first: a line with the name, one with
    file and line."""
    answer = subprocess.run(
        ["addr2line", "-e", library, "-a", "-f", "-i", "-C"],
        input="\n".join(map(hex, addresses)), capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    parts = re.split(r"^0x([0-9a-f]+)\n", answer, flags=re.MULTILINE)[1:]
    return {int(address, 16): place for address, place in zip(parts[::2], parts[1::2])}


def _function(place: str) -> str:
    """The innermost function that is not a wrapper of an instruction (vec.h or a system header)."""
    lines = place.splitlines()
    frames = [f"{name}  {Path(at).name}" for name, at in zip(lines[::2], lines[1::2]) if str(ROOT) in at]
    return next((frame for frame in frames if "vec.h:" not in frame), place)


if __name__ == "__main__":
    sys.exit(main())
