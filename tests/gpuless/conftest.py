# SPDX-License-Identifier: Apache-2.0
"""Makes the instruments importable, starts with what takes longest."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "instruments"))


# Those that run other tests in a child, and with `-m full` mutations.
LONGEST = ("test_under_the_interpreter", "test_under_the_oldest[", "test_mutations[")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Workers begin with equal shares of the tests. Each of LONGEST takes minutes, and whoever came to it
    last would end long after the others: so shares begin with them."""
    longest = [item for item in items if item.name.startswith(LONGEST)]
    items[:] = [item for item in items if item not in longest]
    for i, item in reversed([*enumerate(longest)]):
        items.insert(len(items) * i // len(longest), item)
