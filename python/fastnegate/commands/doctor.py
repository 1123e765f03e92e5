# SPDX-License-Identifier: Apache-2.0
"""`fastnegate doctor`: versions, driver, backends with reasons, and a self-check against the reference."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..operator.attention import backends, negated_attention
from ..operator.backends import cpu, cuda, load, unavailable
from ..operator.problem import Problem
from ..operator.rule import presets
from ..testing import Judge, fair, make_problem, moved

Size = tuple[int, tuple[int, ...]]  # head_dim, tokens of each concept

_PACKAGES = ("torch", "triton", "diffusers", "transformers", "xformers", "pybind11")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Kernels are made for these sizes: Stable Diffusion 1.5 and SDXL with prototypes, and with a whole prompt of
# CLIP as the concept.
_SIZES: tuple[Size, ...] = ((40, (8, 8)), (64, (8, 8)), (64, (77,)))
_QUERIES, _KEYS = 37, 77
_DRIVER = Path("/proc/driver/nvidia/version")


def run() -> int:
    """Print the report; returns 0, or 1 if a variable of the environment is bad, or if an available backend
    fails or disagrees with the reference."""
    print(f"python {platform.python_version()} on {platform.machine()} {sys.platform}")
    for package in ("fastnegate", *_PACKAGES):
        try:
            print(f"  {package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"  {package} not installed")
    print(f"threads: {torch.get_num_threads()}")
    faults = _environment()
    if unavailable("cpu") is None and "cpu" not in faults:
        print(f"CPU instruction set: {cpu.instruction_set()}")
    build = cuda._cuda
    print(f"NVIDIA driver: {_driver() or 'none found'}{_needed(build)}")
    if build is not None:
        print(f"CUDA architectures of this build: {build.ARCHS}")
    failed = bool(faults)
    print("backends, each by every preset in every dtype:")
    print(f"  compared: 2 rows of 2 heads, {_QUERIES} queries, {_KEYS} keys; {'; '.join(map(_said, _SIZES))}")
    print("  ok: each output is within the accuracy budget of the float64 reference (docs/semantics.md)")
    for name, reason in backends().items():
        if reason is not None:
            print(f"  {name}: not available: {reason}")
        elif name == "reference":
            print("  reference: the definition, which the others are compared with")
        elif name in faults:
            print(f"  {name}: not checked: {faults[name]}")
        else:
            failed |= _report(name)
    return int(failed)


# ---- the environment --------------------------------------------------------------------------


def _environment() -> dict[str, str]:
    """Print what the variables that are set mean; returns what is wrong with them, by what they concern: a
    backend, or threads."""
    faults: dict[str, str] = {}
    for variable, (concern, check) in _VARIABLES.items():
        if value := os.environ.get(variable):
            named = f"{variable}={value!r}: "
            try:
                said = check(value)
            except Exception as error:  # whatever is wrong with it, the rest of the report is worth having
                said = "BAD: " + str(error).removeprefix(named)
                faults[concern] = named + said
            print(named + said)
    return faults


def _cpu_isa(value: str) -> str:
    if (reason := unavailable("cpu")) is not None:
        return f"not used: the backend cpu is {reason}"
    cpu.instruction_set()  # refuses what is not there, naming variable and value
    return "forced"


def _triton_tiles(value: str) -> str:
    try:
        json.loads(Path(value).read_text())
    except OSError as error:
        raise ValueError(f"must be a file that can be read: {error.strerror}") from error
    return "measured tiles"


def _omp_num_threads(value: str) -> str:
    if not re.fullmatch(r" *[1-9]\d*( *, *[1-9]\d*)* *", value):
        raise ValueError("must be whole numbers >= 1, separated by commas; it is ignored")
    return (
        "as asked" if torch.get_num_threads() == int(value.partition(",")[0]) else "torch has another number"
    )


def _triton_interpret(value: str) -> str:
    if value.lower() in ("1", "true", "on", "y", "yes"):
        return "Triton's kernels are interpreted on the CPU, slowly, and no GPU runs them"
    if value.lower() in ("0", "false", "off", "n", "no"):
        return "off"
    raise ValueError("must be 1 or 0; Triton takes it as 0")


_VARIABLES: dict[str, tuple[str, Callable[[str], str]]] = {
    "FASTNEGATE_CPU_ISA": ("cpu", _cpu_isa),
    "FASTNEGATE_TRITON_TILES": ("triton", _triton_tiles),
    "OMP_NUM_THREADS": ("threads", _omp_num_threads),
    "TRITON_INTERPRET": ("interpreter", _triton_interpret),
}


# ---- the driver -------------------------------------------------------------------------------


def _driver() -> str:
    """Version of NVIDIA's driver; empty if there is none."""
    try:
        for word in _DRIVER.read_text().partition("\n")[0].split():
            if word[0].isdigit() and "." in word:
                return word
    except OSError:
        pass  # Linux has this file, the Linux within Windows has nvidia-smi alone
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except subprocess.TimeoutExpired:
        return "not known: nvidia-smi does not answer"
    except OSError as error:
        return f"not known: nvidia-smi cannot be run: {error}"
    first = done.stdout.strip().partition("\n")[0]
    return first if done.returncode == 0 else f"not known: nvidia-smi says {first or done.stderr.strip()!r}"


def _needed(cuda: Any) -> str:
    """By the CUDA kernels; nothing where they were built before they could say it."""
    oldest, branch = getattr(cuda, "OLDEST_DRIVER", None), getattr(cuda, "OLDEST_DRIVER_BRANCH", None)
    if oldest is None:
        return ""
    release = f"{oldest // 1000}.{oldest % 1000 // 10}"
    return f"; needed: CUDA {release} (driver {branch}) or later for this build"


# ---- the self-check ---------------------------------------------------------------------------


class _Found(NamedTuple):
    """What came of one check: neither `refused` nor `wrong` if the backend is right."""

    pair: tuple[str, str]  # dtype and preset
    refused: str = ""
    wrong: str = ""
    used: float = 0.0  # of the accuracy budget


def _report(backend: str) -> bool:
    """Check a backend and print what was found; returns whether something is wrong."""
    device = "cpu" if backend == "cpu" or not torch.cuda.is_available() else "cuda"
    if backend == "triton":
        print("  triton: compiles its kernels when they are first used, which takes minutes", flush=True)
    found = [*_checks(backend, device)]
    wrong = [f for f in found if f.wrong]
    pairs = {f.pair for f in wrong}
    right = {f.pair for f in found if not f.refused} - pairs
    if wrong:
        print(f"  {backend}: WRONG in {_named(pairs)}" + (f"; right in {_named(right)}" if right else ""))
    elif right:
        used = max(f.used for f in found)
        print(f"  {backend}: ok: {_named(right)}; at most {100 * used:.0f} % of the budget was used")
    else:
        print(f"  {backend}: not checked")
    for f in wrong:
        print(f"    {f.pair[1]} in {f.pair[0]}, {f.wrong}")
    for reason in dict.fromkeys(f.refused for f in found if f.refused):
        print(f"    refused: {_named(f.pair for f in found if f.refused == reason)}: {reason}")
    return bool(wrong)


def _named(pairs: Iterable[tuple[str, str]]) -> str:
    """Dtypes and presets, those with the same presets together."""
    presets_of: dict[str, list[str]] = {}
    for dtype, preset in sorted(set(pairs)):
        presets_of.setdefault(dtype, []).append(preset)
    dtypes_of: dict[tuple[str, ...], list[str]] = {}
    for dtype, names in presets_of.items():
        dtypes_of.setdefault(tuple(names), []).append(dtype)
    return ", ".join(
        f"{f'{len(names)} presets' if len(names) > 2 else ' and '.join(names)} in {', '.join(dtypes)}"
        for names, dtypes in dtypes_of.items()
    )


def _said(size: Size) -> str:
    return f"head_dim {size[0]}, concepts of {' and '.join(map(str, size[1]))} tokens"


def _checks(backend: str, device: str) -> Iterator[_Found]:
    """Every preset in every dtype on every size."""
    for dtype, name, size in product(_DTYPES, presets(), _SIZES):
        pair = str(dtype).removeprefix("torch."), name
        used = 0.0
        try:
            judge = _judge(dtype, name, size)
            p = moved(judge.problem, device)
            reason = load(backend).supports(p)
            if reason is not None:
                yield _Found(pair, refused=reason)
                continue
            output = negated_attention(
                p.query, p.key, p.value, p.concepts, p.rule, scale=p.scale, backend=backend
            )
            used, wrong = judge.verdict(output.cpu())
        except Exception as error:  # whatever a compiler or a driver may raise: the rest is worth knowing
            first = str(error).strip().partition("\n")[0]
            wrong = f"{type(error).__name__}: {first}"
        yield _Found(pair, wrong=wrong and f"{_said(size)}: {wrong}", used=used)


def _judge(dtype: torch.dtype, preset: str, size: Size) -> Judge:
    dim, lengths = size
    options: dict[str, Any] = {"rule": preset, "rows": "same", "concept_lengths": lengths}
    return fair(make_problem(2, 2, _QUERIES, _KEYS, dim, dtype, **options, seed=seed) for seed in range(9))


def problems() -> Iterator[tuple[str, Callable[[], Problem]]]:
    """Names of what is checked, and what makes it: whoever compiles it first does not wait here."""
    for dtype, name, size in product(_DTYPES, presets(), _SIZES):
        yield f"doctor: {name} {dtype} {size}", functools.partial(_problem, dtype, name, size)


def _problem(dtype: torch.dtype, preset: str, size: Size) -> Problem:
    problem: Problem = _judge(dtype, preset, size).problem
    return problem
