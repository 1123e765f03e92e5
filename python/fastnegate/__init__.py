# SPDX-License-Identifier: Apache-2.0
"""fastnegate: cross-attention fused with concept negation.

`import fastnegate` needs torch alone; names that need diffusers are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

from .engine.audit import Audit, audit
from .engine.bank import ConceptBank
from .engine.concepts import Concept
from .engine.engine import Engine
from .engine.errors import (
    AuditError,
    BankMismatchError,
    DisplacedProcessorError,
    NegationNotAppliedError,
    RowMapError,
    UnsupportedModelError,
)
from .engine.inversion import invert, phrases_shown
from .engine.policy import Policy
from .engine.session.batch import Batch
from .engine.session.proof import Proof
from .operator.attention import (
    backends,
    combine,
    explain,
    negated_attention,
    negated_attention_with_statistics,
)
from .operator.backends import BackendError
from .operator.partials import partial_attention
from .operator.problem import Partial, Statistics
from .operator.rule import Rule, presets, strength_range
from .operator.tokens import ConceptTokens

__version__ = "0.1.0"

_LAZY = {
    "NegationAttnProcessor": ".integrations.diffusers.processor",
    "install": ".integrations.diffusers.install",
    "negate": ".integrations.diffusers.install",
    "processors_for": ".integrations.diffusers.install",
    "remove": ".integrations.diffusers.install",
}
_ROOMS = {"edits": ".integrations.diffusers.edits", "testbed": ".testbed"}

__all__ = [
    "Audit",
    "AuditError",
    "Batch",
    "BackendError",
    "BankMismatchError",
    "Concept",
    "ConceptBank",
    "ConceptTokens",
    "DisplacedProcessorError",
    "Engine",
    "NegationNotAppliedError",
    "Partial",
    "Policy",
    "Proof",
    "RowMapError",
    "Rule",
    "Statistics",
    "UnsupportedModelError",
    "audit",
    "backends",
    "combine",
    "explain",
    "invert",
    "negated_attention",
    "negated_attention_with_statistics",
    "partial_attention",
    "phrases_shown",
    "presets",
    "strength_range",
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    if name in _ROOMS:
        return importlib.import_module(_ROOMS[name], __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
