# SPDX-License-Identifier: Apache-2.0
"""fastnegate: cross-attention fused with concept negation.

`import fastnegate` needs torch alone; names that need diffusers are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

from .attention import (
    backends,
    explain,
    negated_attention,
    negated_attention_with_statistics,
)
from .backends import BackendError
from .problem import Statistics
from .rule import Rule, presets
from .tokens import ConceptTokens

__version__ = "0.1.0"

_LAZY: dict[str, str] = {}

__all__ = [
    "BackendError",
    "ConceptTokens",
    "Rule",
    "Statistics",
    "backends",
    "explain",
    "negated_attention",
    "negated_attention_with_statistics",
    "presets",
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
