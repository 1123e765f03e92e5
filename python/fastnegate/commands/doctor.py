# SPDX-License-Identifier: Apache-2.0
"""`fastnegate doctor`: versions, driver, backends with reasons, and a self-check against the reference."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..benchmarks.operator.cases import moved
from ..operator.attention import backends, negated_attention
from ..operator.backends import cpu, cuda, load, unavailable
from ..operator.problem import Problem
from ..operator.rule import presets
from ..testing.accuracy import Judge, fair, make_problem

_PACKAGES = ("torch", "triton", "diffusers", "transformers", "xformers", "pybind11")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (head_dim, tokens of each concept): kernels are made for these sizes. Stable Diffusion 1.5 and SDXL with
# prototypes, and a whole prompt of CLIP as the concept.
_SIZES = ((40, (8, 8)), (64, (8, 8)), (64, (77,)))
_DRIVER = Path("/proc/driver/nvidia/version")


def run() -> int:
    """Print the report; returns 0, or 1 if an available backend fails or disagrees with the reference."""
    print(f"python {platform.python_version()} on {platform.machine()} {sys.platform}")
    for package in ("fastnegate", *_PACKAGES):
        try:
            print(f"  {package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"  {package} not installed")
    print(f"threads: {torch.get_num_threads()}")
    if unavailable("cpu") is None:
        print(f"CPU instruction set: {cpu.instruction_set()}")
    build = cuda._cuda
    print(f"NVIDIA driver: {_driver() or 'none found'}{_needed(build)}")
    if build is not None:
        print(f"CUDA architectures of this build: {build.ARCHS}")
    failed = False
    print("backends:")
    for name, reason in backends().items():
        if reason is not None:
            print(f"  {name}: not available: {reason}")
        elif name == "reference":
            print("  reference: ok: the definition, which the others are compared with")
        else:
            failed |= _report(name)
    return int(failed)


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

    dtype: str
    preset: str
    refused: str = ""
    wrong: str = ""


def _report(backend: str) -> bool:
    """Check a backend and print what was found; returns whether something is wrong."""
    device = "cpu" if backend == "cpu" or not torch.cuda.is_available() else "cuda"
    if backend == "triton":
        print("  triton: compiles its kernels when they are first used, which takes minutes", flush=True)
    found = [*_checks(backend, device)]
    wrong = [f for f in found if f.wrong]
    right = {(f.dtype, f.preset) for f in found if not f.refused} - {(f.dtype, f.preset) for f in wrong}
    if wrong:
        print(f"  {backend}: WRONG in {_named(wrong)}" + (f"; right in {_named(right)}" if right else ""))
    elif right:
        print(f"  {backend}: ok: {_named(right)} against the reference")
    else:
        print(f"  {backend}: not checked")
    for f in wrong:
        print(f"    {f.preset} in {f.dtype}, {f.wrong}")
    for reason in dict.fromkeys(f.refused for f in found if f.refused):
        print(f"    refused: {_named(f for f in found if f.refused == reason)}: {reason}")
    return bool(wrong)


def _named(pairs: Iterable[tuple[str, ...]]) -> str:
    """Dtypes and presets, those with the same presets together."""
    presets_of: dict[str, list[str]] = {}
    for dtype, preset, *_ in sorted(set((p[0], p[1]) for p in pairs)):
        presets_of.setdefault(dtype, []).append(preset)
    dtypes_of: dict[tuple[str, ...], list[str]] = {}
    for dtype, names in presets_of.items():
        dtypes_of.setdefault(tuple(names), []).append(dtype)
    return ", ".join(
        f"{f'{len(names)} presets' if len(names) > 2 else ' and '.join(names)} in {', '.join(dtypes)}"
        for names, dtypes in dtypes_of.items()
    )


def _checks(backend: str, device: str) -> Iterator[_Found]:
    """Every preset in every dtype on every size."""
    for dtype, name, size in product(_DTYPES, presets(), _SIZES):
        pair = str(dtype).removeprefix("torch."), name
        said = f"head_dim {size[0]}, concepts of {size[1][0]} tokens"
        try:
            judge = _judge(dtype, name, size)
            p = moved(judge.problem, device)
            reason = load(backend).supports(p)
            if reason is not None:
                yield _Found(*pair, refused=reason)
                continue
            output = negated_attention(
                p.query, p.key, p.value, p.concepts, p.rule, scale=p.scale, backend=backend
            )
            wrong = _disagreement(judge, output.cpu())
        except Exception as error:  # whatever a compiler or a driver may raise: the rest is worth knowing
            first = str(error).strip().partition("\n")[0]
            wrong = f"{type(error).__name__}: {first}"
        yield _Found(*pair, wrong=wrong and f"{said}: {wrong}")


def _judge(dtype: torch.dtype, preset: str, size: tuple[int, tuple[int, ...]]) -> Judge:
    dim, lengths = size
    sizes = {"queries": 37, "keys": 77, "dim": dim, "concept_lengths": lengths}
    return fair(make_problem(2, dtype=dtype, rule=preset, rows="same", **sizes, seed=s) for s in range(9))


def problems() -> Iterator[tuple[str, Callable[[], Problem]]]:
    """Names of what is checked, and what makes it: whoever compiles it first does not wait here."""
    for dtype, name, size in product(_DTYPES, presets(), _SIZES):
        yield f"doctor: {name} {dtype} {size}", functools.partial(_problem, dtype, name, size)


def _problem(dtype: torch.dtype, preset: str, size: tuple[int, tuple[int, ...]]) -> Problem:
    problem: Problem = _judge(dtype, preset, size).problem
    return problem


def _disagreement(judge: Judge, output: torch.Tensor) -> str:
    """Empty if the output is within the accuracy budget."""
    worst, allowed = judge.errors(output).max().item(), judge.allowed[0]
    if worst <= allowed:
        return ""
    return f"off by {worst:.1e} of the output's magnitude (allowed {allowed:.1e})"
