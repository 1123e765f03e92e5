# SPDX-License-Identifier: Apache-2.0
"""`drive`, which runs the CUDA kernels under sanitizers and profilers, on the shim: it finds the kernels
right, and wrong with every mistake that is planted in them."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from cuda_shim.backend import dims_flag
from cuda_shim.build import CSRC, build, missing
from fastnegate.benchmarks.operator.cases import CONCEPTS, LAYERS

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

SOURCE = CSRC.parent / "benchmarks" / "gpu" / "drive.cpp"
DIMS = dims_flag((40, 64, 160))
LAUNCH = "run.cu"

# Each is switched on by its name in the variable FAULT: where, what is there, and what is in its place.
FAULTS = {
    "softmax factor": (LAUNCH, "p.scale * 1.44269504088896f", "p.scale * (FAULT ? 1.4f : 1.44269504088896f)"),
    "last query not written": (
        "kernel/epilogue.cuh", "if (!place.has(r)) continue;",
        "if (place.query(r) >= place.turn.end - FAULT) continue;",
    ),
    "second gate kept": (
        "kernel/entries.cuh", "slot.place == best[r] ? g[r]", "slot.place == best[r] + FAULT ? g[r]",
    ),
    "last head not summed": ("kernel/entries.cuh", "h < heads; ++h) sum", "h < heads - FAULT; ++h) sum"),
    "piece before not scaled": (
        "kernel/segment.cuh", "mass[0] *= shrink[0],", "mass[0] *= FAULT ? 1.f : shrink[0],",
    ),
    "masses of statistics": (
        "kernel/entries.cuh", "to[2 * apart] = share[r];", "to[2 * apart] = share[r] + .1f * FAULT;",
    ),
}  # fmt: skip

BEGIN = "int driver = 0, devices = 0;"  # of the first thing that is done with the device
SWITCH = """
#pragma once
#include <cstdlib>
#include <cstring>
extern "C" int fastnegate_shim_fail_next(const char* function, int error);
inline void arrange_failure() {
  if (const char* function = std::getenv("FAIL")) fastnegate_shim_fail_next(function, 719);
}
inline int fault(const char* name) {
  const char* on = std::getenv("FAULT");
  return on && std::strcmp(on, name) == 0;
}
"""


def drive(program: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *words], env={**os.environ, **variables}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources = [CSRC / "cuda" / name for name in ("bfloat16.cu", "float16.cu", LAUNCH)]
    return build([*sources, SOURCE], tmp_path_factory.mktemp("drive") / "drive", flags=[DIMS])


@pytest.fixture(scope="module")
def faulty(program: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the faults, those of the kernel in bfloat16 only. The first call of the function that the
    variable FAIL names fails."""
    folder = tmp_path_factory.mktemp("faulty")
    (folder / "cuda" / "kernel").mkdir(parents=True)
    (folder / "fault.h").write_text(SWITCH)
    for file in {file for file, _, _ in FAULTS.values()}:
        text = (CSRC / "cuda" / file).read_text()
        assert (BEGIN in text) == (file == LAUNCH)
        text = text.replace(BEGIN, f"arrange_failure(); {BEGIN}")
        for name, (place, right, wrong) in FAULTS.items():
            if place == file:
                assert text.count(right) == 1, name
                text = text.replace(right, wrong.replace("FAULT", f'fault("{name}")'))
        (folder / "cuda" / file).write_text(f'#include "fault.h"\n{text}')
    made = sorted(program.parent.glob("drive.*.o"))
    kept = [path for path in made if path.name.split(".")[2] in ("float16", "drive")]
    assert len(kept) == 2
    sources = [folder / "cuda" / LAUNCH, CSRC / "cuda" / "bfloat16.cu"]
    return build([*sources, *kept], folder / "drive", flags=[DIMS, "-iquote", str(folder)])


def test_the_kernels_are_right(program: Path) -> None:
    done = drive(program, "small")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) >= 10, done.stdout + done.stderr
    assert all(": ok: " in line for line in lines)
    for covered in ("all text stays", "concepts in pieces", "all text in pieces", "blocks of [5-8] warps"):
        assert re.search(covered, done.stdout), covered
    assert {re.search(r", (b?float16), head_dim (\d+):", line).groups() for line in lines} >= {
        (dtype, dim) for dtype in ("bfloat16", "float16") for dim in ("40", "64", "160")
    }
    used = [float(share) for share in re.findall(r"ok: \d+ rows, (\S+) of the allowed error", done.stdout)]
    assert len(used) == len(lines) and all(0.01 < share < 0.5 for share in used)


def test_a_layer(program: Path) -> None:
    done = drive(program, "layer", "sd15-8", "4x8")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("sd15-8 4x8, bfloat16, head_dim 160: ok: ")


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str, faulty: Path) -> None:
    done = drive(faulty, "small", FAULT=name)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r": WRONG: batch row \d, head \d, query \d+: ", done.stdout), done.stdout


def test_without_a_fault_none_is_found(faulty: Path) -> None:
    assert drive(faulty, "small").returncode == 0


@pytest.mark.parametrize("function", (
    "cudaMalloc", "cudaMemcpy", "cudaMemset", "cudaLaunchKernel", "cudaDeviceSynchronize",
))  # fmt: skip
def test_a_call_that_fails(function: str, faulty: Path) -> None:
    done = drive(faulty, "small", FAIL=function)
    named = "the kernel" if function == "cudaDeviceSynchronize" else function
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"drive: {named}") and "unspecified launch failure" in done.stderr


def test_no_device(faulty: Path) -> None:
    done = drive(faulty, "small", FAIL="cudaGetDeviceCount")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == "drive: cudaGetDeviceCount: unspecified launch failure\n"


def test_its_layers_are_those_of_the_benchmarks(program: Path) -> None:
    said = drive(program, "list").stdout.splitlines()
    layers = [
        f"layer {layer.name} B{layer.batch} H{layer.heads} N{layer.queries} M{layer.keys} D{layer.dim}"
        for layer in LAYERS.values()
    ]
    assert said == [*layers, "concepts none", "concepts 1x8", "concepts 4x8"]
    assert [(CONCEPTS[name].count, CONCEPTS[name].tokens) for name in ("1x8", "4x8")] == [(1, 8), (4, 8)]


@pytest.mark.parametrize("words, problem", (
    ([], "no command"),
    (["big"], "command 'big': allowed are small, layer, list"),
    (["small", "4x8"], "small takes 0 arguments, not 1"),
    (["layer", "sdxl-64"], "layer takes 2 arguments, not 1"),
    (["layer", "sd9", "none"], f"NAME 'sd9': allowed are {', '.join(LAYERS)}"),
    (["layer", "sdxl-64", "9x9"], "CONCEPTS '9x9': allowed are none, 1x8, 4x8"),
))  # fmt: skip
def test_wrong_arguments(words: list[str], problem: str, program: Path) -> None:
    done = drive(program, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"drive: {problem}\nusage: drive small ")
