# SPDX-License-Identifier: Apache-2.0
"""`fastnegate doctor`: versions, backends with reasons, and a self-check against the reference."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import sys

import torch

from . import reference
from .attention import backends, negated_attention
from .backends import load, unavailable
from .problem import Problem
from .rule import presets
from .tokens import ConceptTokens

_PACKAGES = ("torch", "triton", "diffusers", "transformers", "xformers", "pybind11")
# The accuracy budget of small problems, in eps; a backend is checked in one dtype here, in all by the tests.
_BUDGET = {torch.float32: 8, torch.float16: 2}


def run() -> int:
    """Print the report; returns 0, or 1 if an available backend disagrees with the reference."""
    print(f"python {platform.python_version()} on {platform.machine()} {sys.platform}")
    for package in ("fastnegate", *_PACKAGES):
        try:
            print(f"  {package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"  {package} not installed")
    print(f"threads: {torch.get_num_threads()}")
    if unavailable("cpu") is None:
        cpu = load("cpu")
        print(f"CPU instruction set: {cpu.instruction_set()}")
    if (cuda := load("cuda")._cuda) is not None:
        print(f"CUDA architectures of this build: {cuda.ARCHS}")
    failed = False
    print("backends:")
    for name, reason in backends().items():
        if reason is not None:
            print(f"  {name}: not available: {reason}")
            continue
        wrong = [] if name == "reference" else _disagreements(name)
        failed |= bool(wrong)
        print(f"  {name}: " + ("not checked" if wrong is None else "; ".join(wrong) or "ok"))
    return int(failed)


def _disagreements(backend: str) -> list[str] | None:
    """Presets whose result differs from the reference by more than the budget; None if all are refused."""
    device = "cpu" if backend == "cpu" or not torch.cuda.is_available() else "cuda"
    dtype = torch.float16 if backend == "cuda" else torch.float32
    budget = _BUDGET[dtype] * torch.finfo(dtype).eps
    wrong, checked = [], False
    for name, rule in presets().items():
        problem = dataclasses.replace(_problem(device, dtype), rule=rule)
        reason = load(backend).supports(problem)
        if reason is not None:
            print(f"    {name} is refused: {reason}")
            continue
        checked = True
        actual = negated_attention(
            problem.query, problem.key, problem.value, problem.concepts, rule, backend=backend
        )
        truth = reference.evaluate(problem)
        error = (actual.double() - truth.output).abs().amax(-1) / truth.magnitude.clamp(min=reference.TINY)
        worst = error.max().item()
        if not worst <= budget:
            wrong.append(f"{name} is off by {worst:.1e} of the output's magnitude (allowed {budget:.1e})")
    return wrong if checked else None


def _problem(device: str, dtype: torch.dtype) -> Problem:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    heads, dim = 2, 40
    query, key, value = normal(2, heads, 37, dim), normal(2, heads, 77, dim), normal(2, heads, 77, dim)
    keys = [normal(tokens, heads, dim) for tokens in (8, 3)]
    values = [normal(tokens, heads, dim) + 1 for tokens in (8, 3)]
    direction = normal(2, heads, dim)
    tokens = ConceptTokens.pack(
        keys, values, [[0, 1], [1]], direction=direction / direction.flatten(1).norm(dim=1)[:, None, None]
    )
    query, key, value = query.to(dtype), key.to(dtype), (value + 1).to(dtype)
    return Problem(query, key, value, None, tokens.cast(dtype), presets()["protore"], dim**-0.5)
