# SPDX-License-Identifier: Apache-2.0
"""`fastnegate concepts`: what it writes is what its files hold, and bad options end in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastnegate as fn
from fastnegate import testbed
from fastnegate.commands import cli
from fastnegate.engine.files import contents


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_build_inspect_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bank.safetensors"
    concepts = ["--concept", "warm=red, orange,yellow", "--concept", "ring=ring"]
    command = ["concepts", "build", "--model", "embedded", *concepts, "--kmeans", "2", "--out", str(file)]
    assert cli.main(command) == 0
    assert lines(capsys) == [
        "warm: red, orange, yellow; prompt of 16 tokens, prototypes of 1 1, directions of 0 layers",
        "ring: ring; prompt of 16 tokens, prototypes of 1, directions of 0 layers",
    ]
    bank = fn.ConceptBank.load(file, testbed.load())
    assert bank["warm"].members == ("red", "orange", "yellow") and len(bank["warm"].prototypes) == 2
    assert cli.main(["concepts", "list", str(file)]) == 0
    assert lines(capsys) == ["warm", "ring"]
    assert cli.main(["concepts", "inspect", str(file)]) == 0
    first, *rest = lines(capsys)
    assert first.startswith("text encoder: ") and "text_encoder CLIPTextModel" in first and len(rest) == 2


def test_directions_of_the_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tokenizer says in which captions a word means something; here a few of them."""
    monkeypatch.setattr(testbed.easy, "templates", lambda member: testbed.templates(member)[:2])
    file = tmp_path / "bank.safetensors"
    concepts = ["--concept", "red=red", "--concept", "blue=blue"]
    options = ["--directions", "--orthogonal", "--steps", "2", "--out", str(file)]
    assert cli.main(["concepts", "build", "--model", "embedded", *concepts, *options]) == 0
    red, blue = (concept.directions for concept in contents(file).concepts.values())
    assert red is not None and blue is not None and red.shapes == blue.shapes
    assert all(abs(float((red.layers[n] * blue.layers[n]).sum())) < 1e-6 for n in red.layers)


def test_invert_goes_on_from_its_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "red").mkdir()
    for i in range(2):
        pixels = testbed.render([testbed.PromptObject("red", "circle")], rng=np.random.default_rng(i))
        Image.fromarray((pixels * 255).astype(np.uint8)).save(tmp_path / "red" / f"{i}.png")
    options = ["--model", "embedded", "--images", str(tmp_path / "red"), "--name", "red", "--tokens", "2"]
    made = []
    for name, steps, checkpoint in (("a", "1", "run"), ("a", "3", "run"), ("b", "3", "other")):
        written = ["--out", str(tmp_path / name), "--checkpoint", str(tmp_path / checkpoint)]
        assert cli.main(["concepts", "invert", *options, "--steps", steps, *written]) == 0
        said = "red: learned; prompt of 2 tokens, prototypes of 2, directions of 0 layers"
        assert lines(capsys) == [said]
        made.append((tmp_path / name).read_bytes())
    assert made[0] != made[1] == made[2]


BUILD = "concepts build --model embedded --out bank"
INVERT = "concepts invert --model embedded --out bank --name x"
BAD = [
    (f"{BUILD} --concept red", "argument --concept: 'red': must be NAME=phrase,phrase"),
    (f"{BUILD} --concept red=red,", "argument --concept: 'red=red,'"),
    (f"{BUILD} --concept red=red --kmeans 0", "argument --kmeans: '0': must be a whole number >= 1"),
    (f"{BUILD} --concept red=red --concept red=red", "--concept: two have the same name"),
    (f"{BUILD} --concept red=red --orthogonal", "--orthogonal: is of --directions"),
    (f"{BUILD} --concept cat=cat", "'cat' has the unknown word 'cat'"),
    (f"{BUILD} --concept red=red,blue --images there", "has no image_encoder"),
    (BUILD, "arguments are required: --concept"),
    ("concepts build --model none --concept a=a --out b", "argument --model: 'none': must be 'embedded', or"),
    (f"{INVERT} --images nowhere", "argument --images: 'nowhere': must be a folder with pictures"),
    (f"{INVERT} --images .", "argument --images: '.'"),
    (f"{INVERT} --images there --tokens 9", "argument --tokens: '9': must be a whole number from 1 to 8"),
    (f"{INVERT} --images there --rate 0", "argument --rate: '0': must be a number above 0"),
    (f"{INVERT} --images there --caption red", "caption='red': must contain {} exactly once"),
    ("concepts inspect nothing", "nothing"),
    ("concepts list there/a.png", "path='there/a.png' is not a concept bank"),
    ("concepts", "arguments are required: action"),
]


@pytest.mark.parametrize(("line", "message"), BAD, ids=[line for line, _ in BAD])
def test_bad_options_end_in_one_line(
    line: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    Image.new("RGB", (32, 32)).save("there/a.png")
    try:
        status = cli.main(line.split())
    except SystemExit as refused:
        status = int(refused.code or 0)
    captured = capsys.readouterr()
    assert status == 2 and message in captured.err and captured.out == ""
    assert "Traceback" not in captured.err and not Path("bank").exists()
