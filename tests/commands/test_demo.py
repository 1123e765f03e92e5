# SPDX-License-Identifier: Apache-2.0
"""`fastnegate demo`: what it draws, and what it says about it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastnegate.commands import cli, demo
from fastnegate.commands.sheet import CELL, Cell, Mark, sheet


def test_demo_removes_the_concept_and_writes_what_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "here"
    assert cli.main(["demo", "--method", "protore", "--pictures", "2", "--out", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((out / "demo.json").read_text())
    none, negative, protore = result["columns"]
    assert [c["method"] for c in result["columns"]] == ["no negation", "negative prompt", "protore"]
    assert none["present"] == negative["present"] == [True, True] and protore["present"] == [False, False]
    assert none["kept"] == protore["kept"] == [True, True]
    assert [x["image"] for x in protore["audit"]] == [0, 1]
    assert all(x["gate_max"] > 0 and x["removed_energy"] > 0 for x in protore["audit"])
    for name in ("grid.png", "heat.png"):
        with Image.open(out / name) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 100


def test_the_table_shows_the_verdicts() -> None:
    column = {"method": "protore", "step_ms": 2.0, "present": [False, True], "kept": [True, True]}
    text = demo.table({"prompt": "p", "concept": "c", "pictures": 2, "steps": 20, "columns": [column]})
    assert "1 of 2" in text and "2 of 2" in text


@pytest.mark.parametrize("present", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_the_grid_shows_both_verdicts(present: bool, kept: bool) -> None:
    column = demo.Column("m", [np.zeros((32, 32, 3))], 1.0, [present], [kept], [[]])
    made = demo._grid([column], "p", "red", 0)
    marks = (
        Mark("red stayed" if present else "red gone", not present),
        Mark("rest kept" if kept else "rest lost", kept),
    )
    cell = Cell(Image.new("RGB", (CELL, CELL)), marks)
    expected = sheet("prompt: p     negated: red", ["m"], ["seed 0"], [[cell]])
    assert np.array_equal(np.asarray(made), np.asarray(expected))


def test_verdicts_are_told_by_words_and_colours() -> None:
    def drawn(*marks: Mark) -> np.ndarray:
        return np.asarray(sheet("t", ["c"], [""], [[Cell(Image.new("RGB", (CELL, CELL)), marks)]])).astype(
            int
        )

    good, bad = drawn(Mark("kept", True)), drawn(Mark("kept", False))
    differ = (good != bad).any(-1)
    assert differ.sum() > 0.7 * CELL * 20  # the ground of the words
    green, red = good[differ].mean(0), bad[differ].mean(0)
    assert green[1] > green[0] + 50 and red[0] > red[1] + 50
    assert (drawn(Mark("kept", True)) != drawn(Mark("lost", True))).any()


def test_a_title_that_is_wider_than_the_pictures_is_not_cut() -> None:
    cell = Cell(Image.new("RGB", (CELL, CELL), "white"))
    wide = sheet("w" * 60, ["c"], [""], [[cell]])
    ink = (np.asarray(wide)[:30] < 128).all(-1).any(0)
    assert wide.width > 3 * CELL and not ink[-5:].any() and ink[-30:].any()
