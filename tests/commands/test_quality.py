# SPDX-License-Identifier: Apache-2.0
"""`fastnegate quality`: its tables are what its files hold, and it goes on where it was."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("diffusers")

from fastnegate.commands import cli, quality
from fastnegate.testbed.quality import Stage, measure
from fastnegate.testbed.quality.results import Results, Study, write_studies
from fastnegate.testbed.quality.scores import details, overview


def test_the_table_is_what_the_file_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "PICTURES", 1)
    file, lines, tuned = tmp_path / "rows.json", tmp_path / "lines.jsonl", tmp_path / "tuned.json"
    write_studies(tuned, [Study("easy", "cfg", "protore", {"strength": 0.25}, 0.0, 0.0, 20, 12)])
    arguments = ["--methods", "none", "protore", "--suites", "implicit", "--cases", "3"]
    arguments += ["--tuned", str(tuned), "--lines", str(lines), "--json", str(file)]
    assert cli.main(["quality", *arguments]) == 0
    said = capsys.readouterr().out
    none, protore, weak = rows = Results.read(file).rows
    assert none.scores[0].gone[0].value == 0.0 and none.scores[0].kept[0].value == 1.0
    assert protore.scores[0].gone[0].value >= 2 / 3 and protore.scores[0].right[0].value >= 2 / 3
    assert weak.tuned and weak.scores[0].gone[0].value < protore.scores[0].gone[0].value
    assert overview(rows) in said and details(rows, "implicit") in said
    assert said.startswith("none: right in implicit 0 %\nprotore: right in implicit")
    assert "\nprotore, tuned: right in implicit" in said

    monkeypatch.setattr(Stage, "draw", None)  # all of it is known
    assert cli.main(["quality", *arguments]) == 0
    assert capsys.readouterr().out == said


def test_quick_is_less(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(quality, "run", lambda *given, **more: asked.append((given, more)))
    assert cli.main(["quality", "--quick", "--seed", "3"]) == 0
    assert cli.main(["quality", "--host", "easy", "--guidance", "free"]) == 0
    (quick, _), (usual, options) = asked
    assert quick[2] == ("none", "protore") and len(quick[3].suites) == 3 and quick[3].cases == 16
    assert quick[3].seed == 3
    assert usual[:2] == ("easy", "free") and usual[3].suites == () and usual[3].cases == 64
    assert options == {"strength": 1.0, "tuned": None, "lines": None, "file": None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "magic"], "method='magic'; allowed: none, negative prompt, protore"),
        (["--suites", "hue"], "name='hue'; allowed: colour, shape"),
        (["--host", "large"], "host='large'; allowed: easy"),
        (["--tuned", "none.json"], "No such file or directory: 'none.json'"),
        (["--cases", "0"], "must be a whole number >= 1"),
        (["--seed", "-1"], "'-1': must be a whole number from 0"),
        (["--strength", "0"], "'0': must be a number above 0"),
    ],
)
def test_bad_arguments_are_refused_before_any_drawing(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stage, "draw", None)
    try:
        status = cli.main(["quality", *arguments])
    except SystemExit as stopped:
        status = stopped.code  # type: ignore[assignment]
    assert status == 2 and message in capsys.readouterr().err
