# SPDX-License-Identifier: Apache-2.0
"""docs/quality.md says what the result files say; pictures, tuning and gates by small runs."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from fastnegate.benchmarks.quality import __main__ as command
from fastnegate.benchmarks.quality import page, plots
from fastnegate.benchmarks.quality import tune as tuning

from fastnegate.testbed import easy
from fastnegate.testbed.quality import Lines, measure, stage
from fastnegate.testbed.quality.methods import METHODS
from fastnegate.testbed.quality.results import Results, read_studies, write_studies
from fastnegate.testbed.quality.technique import Technique


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of two steps."""
    monkeypatch.setattr(stage, "DEFAULT_STEPS", 2)
    monkeypatch.setattr(measure, "DEFAULT_STEPS", 2)
    monkeypatch.setattr(measure, "PICTURES", 1)


def files_of(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.skipif(not page.PAGE.exists(), reason="installed without its docs")
def test_the_page_has_the_tables_of_the_result_files() -> None:
    text = page.PAGE.read_text()
    assert page.with_measured(text, page.measured()) == text
    readme = page.README.read_text()
    assert page.with_measured(readme, page.headlines()) == readme
    for file in page.RESULTS.glob("*/rows.json"):
        results = Results.read(file)
        assert (file.parent / page.DETAILS).read_text() == page.detailed(page.RESULTS, results)
    rows = Results.read(page.RESULTS / "easy-cfg" / "rows.json").rows
    none = next(row for row in rows if row.method == "none")
    assert all(score.gain[0].value == 0.0 for score in none.scores)
    assert all(score.right[0].value > 0.9 for score in none.scores if score.benign)
    with pytest.raises(ValueError, match="the page has no lines <!-- measured: begin -->"):
        page.with_measured("# Quality", "")


def test_runs_end_in_files_and_the_page_shows_them(
    tmp_path: Path, hurried: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--out", str(tmp_path), "--lines", str(tmp_path / "lines")]
    monkeypatch.setattr(plots, "STRENGTHS", (0.5, 2.0))
    few = ["--suites", "colour", "benign", "--cases", "2"]
    assert command.main(["measure", "--methods", "nag", "vsf", *few, *where]) == 0
    assert command.main(["frontier", "--methods", "nag", *few, *where]) == 0
    monkeypatch.setattr(easy, "SUITES", ("colour",))
    monkeypatch.setattr(plots, "COLUMNS", 2)
    assert command.main(["grids", "--methods", "nag", *where]) == 0
    assert command.main(["gates", "--methods", "protore", *few, *where]) == 0
    names = ["frontier.json", "frontier.png", "gates-protore.json", "gates-protore.png", "grid-nag.png"]
    assert files_of(tmp_path) == ["easy-cfg", "lines"]
    assert files_of(tmp_path / "easy-cfg") == [*names, "rows.json"]
    assert len(Results.read(tmp_path / "easy-cfg" / "frontier.json").rows) == 2
    found = json.loads((tmp_path / "easy-cfg" / "gates-protore.json").read_text())
    assert {g["step"] for g in found} == {0, 1} and {g["suite"] for g in found} == {"colour", "benign"}
    assert {g["head"] for g in found} == {0, 1, 2}
    assert all(0 <= g["mean"] <= g["largest"] <= 1 and sum(g["similarities"]) == 2 for g in found)
    file, readme = tmp_path / "quality.md", tmp_path / "README.md"
    for made in (file, readme):
        made.write_text(f"# Quality\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    page.write_pages(tmp_path, file, readme)
    shown, details = file.read_text(), (tmp_path / "easy-cfg" / page.DETAILS).read_text()
    assert "2 cases of each suite, seed 0, test split" in shown and "| vsf " in shown
    assert "easy-cfg/frontier.png" in shown and "old" not in shown and shown.endswith("after\n")
    assert re.search(r"\n- \*easy, cfg\* \(2 cases a suite\): (none|nag|vsf) -?\d+, ", readme.read_text())
    assert "## colour" in details and "| vsf " in details
    for name in ("grid-nag", "gates-protore"):
        assert f"({name}.png)" in details

    assert command.main(["gates", "--methods", "uce", *few, *where]) == 2
    assert "uce acts beside attention: it has no gates" in capsys.readouterr().err


def test_tuning_finds_what_is_best_and_repeats_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a method whose objective is known."""
    pytest.importorskip("optuna")
    tried: list[dict[str, Any]] = []

    class Known:
        def __init__(self, *_given: Any) -> None: ...

        def row(self, _name: str, numbers: dict[str, Any] | None = None) -> Any:
            tried.append(numbers or {})
            far = abs(np.log(numbers["strength"]) - np.log(3)) if numbers else 9.0
            return SimpleNamespace(objective=-far, refused="")

    monkeypatch.setattr(tuning, "Contest", Known)
    where: Any = SimpleNamespace(host="easy", guidance="cfg", world=easy, joint=False)
    study = tuning.tune(where, "nag", Lines())
    assert study.objective == max(-abs(np.log(t["strength"]) - np.log(3)) for t in tried[1:])
    assert 1.5 < study.numbers["strength"] < 6 and study.published == -9.0  # type: ignore[operator]
    assert len(tried) == 1 + tuning.TRIALS and study.cases == 96 // len(easy.SUITES)
    for numbers in tried[1:]:
        METHODS["nag"].check(numbers)
        for name, value in numbers.items():
            assert METHODS["nag"].tuned[name].low <= value <= METHODS["nag"].tuned[name].high
    assert tuning.tune(where, "nag", Lines()) == study
    write_studies(tmp_path / "tuned.json", [study])
    assert read_studies(tmp_path / "tuned.json") == [study]
    with pytest.raises(ValueError, match="method='none': has nothing to tune"):
        tuning.tune(where, "none", Lines())


def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert command.main(["tune", "--methods", "nag"]) == 2
    assert "tuning needs optuna: pip install 'fastnegate[quality]'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match="plots need matplotlib"):
        plots.frontier(Results("easy", "cfg", None, ()), Path("x.png"))  # type: ignore[arg-type]


def test_the_technique_draws_each_prompt_from_its_own_noise() -> None:
    technique = Technique("red", batch=2, num_inference_steps=2, output_type="pil")
    prompts = ["a red circle and a blue ring", "a green ring", "a red square"]
    images = [np.asarray(image) for image in technique.generate(prompts, seed=4)]
    assert len(images) == 3 and images[0].shape == (32, 32, 3)
    alone = np.asarray(technique.generate(prompts[2:], seed=6)[0])
    assert np.abs(images[2].astype(int) - alone).max() <= 1  # batches round differently
    plain = technique.pipe(
        prompts[2], num_inference_steps=2, generator=torch.Generator().manual_seed(6)
    ).images[0]
    assert np.abs(np.asarray(plain).astype(int) - alone).max() > 1
