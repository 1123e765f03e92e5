# SPDX-License-Identifier: Apache-2.0
"""Makes `ptxsim` importable, starts with what takes longest."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of several workers the one with the mutations, minutes in one test, would end long after the others."""
    items.sort(key=lambda item: not item.name.startswith("test_mutations["))
