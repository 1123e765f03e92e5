# SPDX-License-Identifier: Apache-2.0
"""Makes `support` importable, leaves out the full grid and what needs an engine unless asked for, fixes
hypothesis' seed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Before torch loads its OpenMP runtime: waiting threads of a busy machine must not burn its cores.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import hypothesis
import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent / "helpers")]

hypothesis.settings.register_profile(
    "fastnegate",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.load_profile("fastnegate")


def pytest_configure(config: pytest.Config) -> None:
    config.option.markexpr = config.option.markexpr or "not full and not engines"
    for report in ("FASTNEGATE_BUDGET_REPORT", "FASTNEGATE_COMPILED_REPORT"):
        if report in os.environ and hasattr(config, "workerinput"):
            raise pytest.UsageError(f"{report} is written by one process: without -n")


def pytest_sessionfinish() -> None:
    """Write how much of the accuracy budget was used to the file FASTNEGATE_BUDGET_REPORT."""
    support = sys.modules.get("support")
    if support is not None and "FASTNEGATE_BUDGET_REPORT" in os.environ:
        Path(os.environ["FASTNEGATE_BUDGET_REPORT"]).write_text(support.budget_report())


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small problems, one after the other: more threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
