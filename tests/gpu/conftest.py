# SPDX-License-Identifier: Apache-2.0
"""Tests that need a GPU: where there is none, or a backend cannot run, one skipped test says so for all; a
GPU that an error has made unusable ends the run, since all that follows would fail.

`pytest tests/gpu` on a machine with an NVIDIA GPU; with `-n 8` as many processes compile side by side.
`FASTNEGATE_GPU_TESTS=rehearse pytest tests/gpu` anywhere: see card.py.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import card  # noqa: E402

_failed = pytest.StashKey[bool]()


def pytest_report_header() -> list[str]:
    if card.MISSING is not None or card.REHEARSED:
        return [f"GPU: {card.MISSING or 'none, the CPU takes its place'}"]
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    reasons = ", ".join(card.unavailable(backend) or backend for backend in card.BACKENDS)
    return [f"GPU: {gpu.name}, compute capability {gpu.major}.{gpu.minor}; backends: {reasons}"]


@pytest.hookimpl(trylast=True)  # after -k and -m, which might leave out the one test that says why
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept, said, dropped = [], set(), []
    for item in items:
        reason = None
        if item.path.is_relative_to(HERE):
            params = item.callspec.params if hasattr(item, "callspec") else {}
            reason = card.unavailable(params.get("backend"))
        if reason in said:
            dropped.append(item)
            continue
        if reason is not None:
            said.add(reason)
            item.add_marker(pytest.mark.skip(reason=reason))
        kept.append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        item.stash[_failed] = True
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Once the failure has been reported."""
    result = yield
    if item.stash.get(_failed, False):
        try:
            card.synchronize()
        except Exception as error:  # of whatever type torch makes of an error of CUDA
            why = f"{item.nodeid} left the GPU unusable: {type(error).__name__}: {error}"
            if not hasattr(item.config, "workerinput"):
                pytest.exit(why, returncode=3)
            item.session.shouldstop = why  # pytest-xdist ends all processes for it; `exit` is an error to it
    return result
