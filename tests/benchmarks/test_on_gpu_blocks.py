# SPDX-License-Identifier: Apache-2.0
"""Parts of large models, timed on a GPU: with the processor in its place."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from fastnegate.benchmarks.gpu import report
from fastnegate.benchmarks.gpu.card import Rehearsal
from fastnegate.benchmarks.gpu.step import THROUGH, Setting, run
from fastnegate.benchmarks.gpu.steps import blocks

from fastnegate.operator.backends import cpu

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(cpu.unavailable() is not None, reason=f"{cpu.unavailable()}"),
]
LENGTHS = ("8", "77", "padded")


def setting() -> Setting:
    return Setting(Rehearsal(), Path(), None, time.monotonic() + 600, small=True)


def test_every_part_with_concepts_of_every_length() -> None:
    lines: list[dict] = []
    with torch.inference_mode():
        assert run(blocks.items(setting()), setting(), lines.append) == THROUGH
    found = {line["name"]: line for line in lines if "name" in line}
    assert [*found] == ["flux1, a double block", "flux1, a single block", "wan, attention to text"]
    negated = {"two passes", *(f"{backend} {n}" for backend in ("cuda", "triton") for n in LENGTHS)}
    for item in found.values():
        assert "failed" not in item and {*item["ms"]} == {*item["peak_mbytes"]} == {"none", *negated}
        assert {*item["changed"]} == negated and min(item["changed"].values()) > 1e-3
    content = {
        **report.begun({"rehearsal": True, "commit": "", "gpu": {}}, None),
        "steps": {"blocks": {"status": "done", "items": found}},
    }
    shown = report.markdown(content)
    assert all(f"| {name} " in shown for name in (*found, *negated))


def test_what_a_backend_does_not_implement_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rehearsal, "backends", {"cuda": "cuda", "triton": "cpu"})
    with torch.inference_mode():
        item = blocks.measured(blocks.wan, setting())
    assert {*item["left_out"]} == {f"cuda {n}" for n in LENGTHS} and "triton 8" in item["ms"]


def test_a_block_that_negates_nothing_is_found() -> None:
    plain, published = torch.ones(4), torch.arange(4.0)
    outputs = {"none": plain, "two passes": published, "cuda padded": plain, "cuda 8": plain}
    assert [wrong.partition(" is ")[0] for wrong in blocks.unlike(outputs)] == ["cuda padded"]
    assert not [*blocks.unlike(outputs | {"cuda padded": published})]
