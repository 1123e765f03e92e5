# SPDX-License-Identifier: Apache-2.0
"""`fastnegate doctor` on the machine: what there is, and whether each backend agrees with the reference."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from ..child import run
from ..step import Item, Setting


def items(setting: Setting) -> Iterator[Item]:
    yield Item("machine", setting.card.facts)
    yield Item("doctor", lambda: _doctor(setting))


def _doctor(setting: Setting) -> dict[str, Any]:
    done = run([sys.executable, "-m", "fastnegate", "doctor"], setting.left())
    found: dict[str, Any] = {"printed": done.output}
    return found if done.status == 0 else found | {"failed": done.why}
