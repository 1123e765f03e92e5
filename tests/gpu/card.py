# SPDX-License-Identifier: Apache-2.0
"""The GPU that the tests of this folder run on, and how a problem gets there.

FASTNEGATE_GPU_TESTS=rehearse puts the CPU and its backend in the GPU's place: the same tests, to find
mistakes in them where there is no GPU. What has no meaning there is skipped.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import pytest
import torch
from support import DTYPES, RULES
from torch import Tensor

import fastnegate as fn
from fastnegate.operator.problem import Problem, Statistics
from fastnegate.operator.rule import Rule
from fastnegate.testing import moved

_asked = os.environ.get("FASTNEGATE_GPU_TESTS", "")
if _asked not in ("", "rehearse"):
    raise pytest.UsageError(f"FASTNEGATE_GPU_TESTS={_asked!r}: the only value is rehearse")
REHEARSED = _asked == "rehearse"
DEVICE = "cpu" if REHEARSED else "cuda"
BACKENDS = ("cpu",) if REHEARSED else ("cuda", "triton")
MISSING = None if REHEARSED or torch.cuda.is_available() else "torch finds no GPU"
DTYPES_OF = {"cuda": (torch.bfloat16, torch.float16), "triton": DTYPES, "cpu": DTYPES}

SUPPORTED = {name: rule for name, rule in RULES.items() if rule.direction != "retrieve"}
# Gates that need sums over heads, and a norm that needs the gates: three launches.
FEATURE_MAX = Rule(
    "cosine", "ramp", "projection", select="max", norm="limit", norm_order=1, scope="feature", strength=2.0,
    name="feature-max",
)  # fmt: skip

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_rule = pytest.mark.parametrize("rule", SUPPORTED.values(), ids=list(SUPPORTED))
needs_gpu = pytest.mark.skipif(REHEARSED, reason="streams, graphs and allocations are a GPU's")


def unavailable(backend: str | None) -> str | None:
    """Why tests of a backend cannot run, or any test if it is None."""
    if MISSING is not None or backend is None:
        return MISSING
    reason = fn.backends()[backend]
    return None if reason is None else f"{backend}: {reason}"


def on_card(problem: Problem) -> Problem:
    """The problem in the GPU's memory, laid out as it was."""
    return moved(problem, DEVICE)


def call(p: Problem, backend: str) -> Tensor:
    """The public operator on tensors that are on the GPU; so is the result."""
    return _call(fn.negated_attention, p, backend)


def call_with_statistics(p: Problem, backend: str) -> tuple[Tensor, Statistics]:
    output, statistics = _call(fn.negated_attention_with_statistics, p, backend)
    return output, Statistics._make(t.cpu() for t in statistics)


def _call(operator: Any, p: Problem, backend: str) -> Any:
    return operator(
        p.query, p.key, p.value, p.concepts, p.rule, scale=p.scale, key_bias=p.key_bias, backend=backend
    )


def run(problem: Problem, backend: str) -> Tensor:
    """Of a problem on the CPU, computed on the GPU, the output on the CPU."""
    return call(on_card(problem), backend).cpu()


def same(a: Tensor, b: Tensor) -> bool:
    """Whether all bits are equal, those of NaN and of zeros too."""
    a, b = (t.cpu().contiguous() for t in (a, b))
    return a.dtype == b.dtype and torch.equal(*(t.view(-1).view(torch.uint8) for t in (a, b)))


def synchronize() -> None:
    if not REHEARSED:
        torch.cuda.synchronize()


def new_stream() -> Any:
    """A stream of its own as a context."""
    return contextlib.nullcontext() if REHEARSED else torch.cuda.stream(torch.cuda.Stream())
