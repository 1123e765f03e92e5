# SPDX-License-Identifier: Apache-2.0
"""What the steps of a run on a GPU share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol


class Setting(Protocol):
    work: Path  # a folder of the run

    def left(self) -> float:
        """Seconds that are left."""


class Item(NamedTuple):
    name: str
    run: Callable[[], dict[str, Any]]
