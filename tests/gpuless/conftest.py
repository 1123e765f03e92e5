# SPDX-License-Identifier: Apache-2.0
"""Makes `ptxsim` importable, starts with what takes longest."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Workers begin with equal shares of the tests. Each test of mutations takes minutes, and whoever came to
    it last would end long after the others: so shares begin with them."""
    longest = [item for item in items if item.name.startswith("test_mutations[")]
    items[:] = [item for item in items if item not in longest]
    for i, item in reversed([*enumerate(longest)]):
        items.insert(len(items) * i // len(longest), item)
