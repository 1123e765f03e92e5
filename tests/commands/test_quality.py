# SPDX-License-Identifier: Apache-2.0
"""`fastnegate quality`, and what it asks of `testbed.quality`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastnegate.commands import cli
from fastnegate.testbed.quality import BATCH, measure, steps


def test_the_table_is_what_the_file_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "scores.json"
    arguments = ["--methods", "none", "protore", "--suites", "implicit", "--cases", "3", "--json", str(file)]
    assert cli.main(["quality", *arguments]) == 0
    none, protore = json.loads(file.read_text())
    assert (none["method"], none["suite"], none["cases"]) == ("none", "implicit", 3)
    assert none["gone"] == 0.0 and none["kept"] == 1.0
    assert protore["method"] == "protore" and protore["gone"] >= 2 / 3 and protore["right"] >= 2 / 3
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["method", "suite", "cases", "concept", "gone", "rest", "kept", "right"]
    assert lines[0].split() == ["none", "implicit", "3", "0", "%", "100", "%", "0", "%"]
    assert len(lines) == 2 and f"{100 * protore['gone']:.0f} %" in lines[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cases": 0}, "cases=0: must be a whole number >= 1"),
        ({"cases": 1.5}, "cases=1.5"),
        ({"seed": -1}, "seed=-1"),
        ({"suites": ("hue",)}, "'hue'"),
        ({"methods": ("magic",)}, "'magic'"),
        ({"strength": 0.0}, "strength=0.0: must be > 0"),
        ({"methods": ("casteer",)}, "methods: 'casteer' needs directions"),
    ],
)
def test_measure_refuses_before_any_work(arguments: dict, message: str) -> None:
    """When it is called, not when the first score is asked for; there is not even a pipeline."""
    with pytest.raises(ValueError, match=message):
        measure(None, **arguments)


def test_each_step_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar ends at 100 %."""
    from fastnegate.testbed import load

    seen: list[str] = []
    monkeypatch.setattr("fastnegate.testbed.quality.BATCH", 2)
    scores = list(measure(load(), ("none", "vsf"), ("shape",), cases=3, on_step=seen.append))
    assert len(scores) == 2 and len(seen) == steps(("none", "vsf"), ("shape",), 3)
    assert seen[0] == "none on shape" and seen[-1] == "vsf on shape"
    assert BATCH > 2  # else the last batch was not smaller than the others


def test_less_strength_removes_less() -> None:
    from fastnegate.testbed import load

    pipe = load()
    (little,) = measure(pipe, ("protore",), ("implicit",), cases=4, strength=0.01)
    (usual,) = measure(pipe, ("protore",), ("implicit",), cases=4)
    assert little.gone == 0.0 < usual.gone
