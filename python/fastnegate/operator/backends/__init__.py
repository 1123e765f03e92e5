# SPDX-License-Identifier: Apache-2.0
"""Backends: each module says `supports(problem)` (None, or why not) and `run(problem)`.

A backend that cannot be used at all on this machine says why in `unavailable()`. Backends never
import one another.
"""

from __future__ import annotations

from types import ModuleType

from .. import reference
from . import cpu, cuda, triton

# Modules are imported here and not at the first call: a first call may be inside a traced graph.
_MODULES: dict[str, ModuleType] = {"reference": reference, "cpu": cpu, "cuda": cuda, "triton": triton}
NAMES = ("reference", "cpu", "cuda", "triton")
# Order in which `backend="auto"` tries. Triton takes CPU tensors only in its (slow) interpreter.
AUTO = ("cuda", "cpu", "triton", "reference")


class BackendError(RuntimeError):
    """The requested backend cannot run this call; the message says why."""


def load(name: str) -> ModuleType:
    """The module of a backend."""
    return _MODULES[name]


def unavailable(name: str) -> str | None:
    """Why the backend cannot be used on this machine at all, or None."""
    reason: str | None = _MODULES[name].unavailable()
    return reason
