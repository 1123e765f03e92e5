# SPDX-License-Identifier: Apache-2.0
"""vLLM-Omni: policies per request in its engine, with a proof in every answer.

Servers name `NegatedPipeline` and `NegatedWorker`; clients use `Client`, or `proof_of` on what they received
by other means. The client's half needs neither vLLM-Omni nor torch's accelerators.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .answer import proof_of
from .client import Client, ServerError
from .reload import reload_bank

if TYPE_CHECKING:
    from .pipeline import NegatedPipeline
    from .worker import NegatedWorker

_OF_SERVERS = {"NegatedPipeline": ".pipeline", "NegatedWorker": ".worker"}

__all__ = ["Client", "NegatedPipeline", "NegatedWorker", "ServerError", "proof_of", "reload_bank"]


def __getattr__(name: str) -> Any:
    # These are built on classes of vLLM-Omni, which a client need not have.
    if name in _OF_SERVERS:
        return getattr(importlib.import_module(_OF_SERVERS[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
