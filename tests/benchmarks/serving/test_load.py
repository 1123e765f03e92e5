# SPDX-License-Identifier: Apache-2.0
"""The serving benchmark serves what it says, and its step is the one of a whole model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from fastnegate.benchmarks.pipeline import models
from fastnegate.benchmarks.serving import __main__ as serving
from fastnegate.benchmarks.serving import width

from fastnegate import Rule

pytestmark = pytest.mark.usefixtures("one_thread")


def test_unlike_policies_share_batches_and_one_policy_splits_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "report.json"
    options = ["--requests", "7", "--clients", "7", "--batch", "7", "--steps", "2", "--rounds", "1"]
    assert serving.main([*options, "--threads", "1", "--json", str(file)]) == 0
    report = json.loads(file.read_text())["load"]
    assert {name: arm["batch"] for name, arm in report.items()} == {
        "no negation": 7, "mixed policies": 7, "one policy a batch": 1
    }  # fmt: skip
    for arm in report.values():
        assert 0 < arm["latency"]["p50"] <= arm["latency"]["p90"] <= arm["latency"]["p99"]
        assert arm["peak_bytes"] > 2**20 and len(arm["requests_per_second"]) == 1
    printed = capsys.readouterr().out
    assert "7 clients, 7 requests of 2 steps" in printed and "| one policy a batch |" in printed


def test_a_step_is_negated_in_the_rows_that_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.MODELS, "sd15", models.small(models.MODELS["sd15"]))
    with torch.inference_mode():
        made = width.steps(models.MODELS["sd15"], 7, Rule.preset("protore"))
        own, nobody, mixed = (made[name]() for name in ("own processors", "no negation", "mixed policies"))
    assert torch.equal(own, nobody)
    changed = (mixed - own).abs().amax((1, 2, 3)) / own.abs().max()
    assert changed[0] < 1e-5 and float(changed[1:].min()) > 1e-3


def test_a_step_is_timed_by_both_clocks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(models.MODELS, "sd15", models.small(models.MODELS["sd15"]))
    assert serving.main(["--width", "--batch", "2", "--rounds", "1", "--threads", "1"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "| no negation " in line]
    assert len(lines) == 2 and all("1.000 [1.000, 1.000]" in line for line in lines)
