# SPDX-License-Identifier: Apache-2.0
"""Options: what cannot work is refused before any work, and nothing is left behind."""

from __future__ import annotations

import argparse
import io
import sys
import time
from pathlib import Path

import pytest
from fastnegate.benchmarks.operator import __main__ as bench

from fastnegate.commands import cli, demo, doctor, options, progress, quality


@pytest.fixture(autouse=True)
def no_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever begins to work fails, and what is written by a relative path is found."""

    def work(*_args: object, **_options: object) -> None:
        raise AssertionError("work has begun")

    monkeypatch.setattr(demo, "load", work)
    monkeypatch.setattr(quality, "Stage", work)
    monkeypatch.setattr(bench, "facts", work)
    monkeypatch.setattr(doctor, "_report", work)
    monkeypatch.chdir(tmp_path)


BAD = [
    ("demo --prompt cat", "argument --prompt: prompt='cat' has the unknown word 'cat'"),
    ("demo --negate cat", "argument --negate: invalid choice: 'cat'"),
    ("demo --negate tomato", "argument --negate: invalid choice: 'tomato'"),
    ("demo --method magic", "argument --method: invalid choice: 'magic'"),
    ("demo --method casteer", "argument --method: invalid choice: 'casteer'"),
    ("demo --pictures 0", "argument --pictures: '0': must be a whole number from 1 to 64"),
    ("demo --pictures 65", "argument --pictures: '65': must be"),
    ("demo --steps 0", "argument --steps: '0': must be a whole number from 1 to 1000"),
    ("demo --steps 1001", "argument --steps: '1001'"),
    ("demo --steps 1.5", "argument --steps: '1.5'"),
    ("demo --seed -1", "argument --seed: '-1': must be a whole number from 0 to 4294967295"),
    ("demo --seed 4294967296", "argument --seed: '4294967296'"),
    ("demo --out there/x", "argument --out: 'there/x': must be a folder that can be written"),
    ("quality --cases 0", "argument --cases: '0': must be a whole number >= 1"),
    ("quality --cases many", "argument --cases: 'many'"),
    ("quality --methods none magic", "method='magic'; allowed: none, negative prompt, protore"),
    ("quality --guidance some", "argument --guidance: invalid choice: 'some'"),
    ("quality --seed -1", "argument --seed: '-1'"),
    ("quality --strength 0", "argument --strength: '0': must be a number above 0"),
    ("quality --strength nan", "argument --strength: 'nan': must be a number above 0"),
    ("quality --strength weak", "argument --strength: 'weak': must be a number above 0"),
    ("quality --json none/x.json", "argument --json: 'none/x.json': must be a file that can be written"),
    ("quality --json .", "argument --json: '.': must be a file that can be written"),
    ("bench --rounds 0", "argument --rounds: '0': must be a whole number >= 1"),
    ("bench --threads 0", "argument --threads: '0': must be a whole number from 1 to 1024"),
    ("bench --layers sd9", "argument --layers: invalid choice: 'sd9'"),
    ("bench --methods magic", "argument --methods: invalid choice: 'magic'"),
    ("bench --json none/x.json", "argument --json: 'none/x.json'"),
    ("bench --plot none/x.png", "argument --plot: 'none/x.png'"),
    ("bench --json x.json --own --plot x.png", "--plot shows layers and concepts"),
    ("bench --json x.json --sparse --methods nag", "--sparse: method nag has no gate"),
    ("doctor --fast", "unrecognized arguments: --fast"),
    ("magic", "invalid choice: 'magic'"),
]


@pytest.mark.parametrize(("line", "message"), BAD, ids=[line for line, _ in BAD])
def test_bad_options_end_before_any_work(
    line: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").write_text("kept")  # a file, where a folder is asked for
    try:
        status = cli.main(line.split())
    except SystemExit as refused:
        status = refused.code
    captured = capsys.readouterr()
    assert status == 2 and message in captured.err and captured.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_text() == "kept"


@pytest.mark.parametrize(
    "line", ["demo", "quality", "quality --json there", "bench --json new.json", "doctor"]
)
def test_good_options_do_begin(line: str, tmp_path: Path) -> None:
    """The test above would pass, too, if nothing ever worked."""
    (tmp_path / "there").write_text("kept")
    with pytest.raises(AssertionError, match="work has begun"):
        cli.main(line.split())
    assert (tmp_path / "there").read_text() == "kept"  # until there is something to write


def test_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    assert options.folder("a/b/c") == Path("a/b/c")
    assert not (tmp_path / "a").exists()


def test_a_folder_that_nothing_can_be_written_to() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="'/proc/x': must be a folder that can be written"):
        options.folder("/proc/x")


# ---- the bar ----------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, stderr: io.StringIO, after: float) -> str:
    monkeypatch.setattr(progress, "AFTER", after)
    monkeypatch.setattr(sys, "stderr", stderr)
    with progress.progress("step") as bar:
        bar.expect(100)
        for i in range(3):
            time.sleep(0.11)  # the bar is drawn ten times a second at most
            bar.step("drawing")
            if i == 1:
                bar.say("a result")
    return stderr.getvalue()


def test_the_bar_is_on_a_terminal_alone_and_results_on_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = shown(monkeypatch, Terminal(), 1e-9)
    assert "drawing" in written and "/100" in written and "a result" not in written
    assert written.rpartition("\r")[0].rpartition("\r")[2].strip() == ""  # it is gone
    assert shown(monkeypatch, io.StringIO(), 1e-9) == ""
    assert capsys.readouterr().out == "a result\na result\n"


def test_what_is_quick_has_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, Terminal(), 1e9).strip() == ""


def test_results_come_without_tqdm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert shown(monkeypatch, Terminal(), 1e-9) == ""
    assert capsys.readouterr().out == "a result\n"
