# SPDX-License-Identifier: Apache-2.0
"""The backends, all that there are: modules that `plan.Backend` describes."""

from __future__ import annotations

from .. import reference
from ..plan import Backend
from ..plan import BackendError as BackendError
from . import cpu, cuda, triton

# In the order in which `backend="auto"` tries. Triton takes CPU tensors only in its (slow) interpreter.
# Modules are imported here and not at the first call: a first call may be inside a traced graph.
BACKENDS: tuple[Backend, ...] = (cuda, cpu, triton, reference)
_BY_NAME = {backend.NAME: backend for backend in BACKENDS}
AUTO = tuple(_BY_NAME)
NAMES = ("reference", "cpu", "cuda", "triton")  # in the order in which they are listed to people


def load(name: str) -> Backend:
    """The backend of a name."""
    return _BY_NAME[name]


def unavailable(name: str) -> str | None:
    """Why the backend cannot be used on this machine at all, or None."""
    return load(name).unavailable()
