# SPDX-License-Identifier: Apache-2.0
"""`fastnegate doctor`: versions, backends with reasons, and a self-check against the reference."""

from __future__ import annotations

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
# 8 eps(float32), the accuracy budget of small problems; 16-bit backends are checked by the tests.
_BUDGET = 8 * torch.finfo(torch.float32).eps


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
    failed = False
    print("backends:")
    for name, reason in backends().items():
        if reason is not None:
            print(f"  {name}: not available: {reason}")
            continue
        wrong = [] if name == "reference" else _disagreements(name)
        failed |= bool(wrong)
        print(f"  {name}: " + ("; ".join(wrong) if wrong else "ok"))
    return int(failed)


def _disagreements(backend: str) -> list[str]:
    """Presets whose result differs from the reference by more than the budget."""
    device = "cpu" if backend == "cpu" or not torch.cuda.is_available() else "cuda"
    wrong = []
    for name, rule in presets().items():
        problem = _problem(device)
        problem = Problem(**{**vars(problem), "rule": rule})
        reason = load(backend).supports(problem)
        if reason is not None:
            print(f"    {name} is refused: {reason}")
            continue
        actual = negated_attention(
            problem.query, problem.key, problem.value, problem.concepts, rule, backend=backend
        )
        truth = reference.evaluate(problem)
        error = (actual.double() - truth.output).abs().amax(-1) / truth.magnitude.clamp(min=reference.TINY)
        worst = error.max().item()
        if not worst <= _BUDGET:
            wrong.append(f"{name} is off by {worst:.1e} of the output's magnitude (allowed {_BUDGET:.1e})")
    return wrong


def _problem(device: str) -> Problem:
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
    return Problem(query, key, value + 1, None, tokens, presets()["protore"], dim**-0.5)
