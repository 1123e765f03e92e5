# SPDX-License-Identifier: Apache-2.0
"""How well methods negate on the testbed's hosts: suites of cases, judged by the detector of their world.

A `Stage` is a host, guided in one way; a `Contest` gives each of `METHODS` the same cases and the same noise
there, and a `Row` says what became of them, beside what becomes of them without negation.
"""

from __future__ import annotations

from typing import Any

from ...engine.bank import ConceptBank
from ..easy import CONCEPTS, members, templates
from .intervals import Share
from .lines import Lines, Price
from .measure import Contest, Plan
from .methods import METHODS
from .scores import Row, Score
from .stage import GUIDANCE, Stage

__all__ = [
    "GUIDANCE",
    "METHODS",
    "Contest",
    "Lines",
    "Plan",
    "Price",
    "Row",
    "Score",
    "Share",
    "Stage",
    "bank_of",
]


def bank_of(pipe: Any, concepts: tuple[str, ...] = CONCEPTS) -> ConceptBank:
    """Concepts of the easy world, each member a prototype."""
    return ConceptBank.from_prompts(pipe, {c: members(c) for c in concepts}, templates=templates)
