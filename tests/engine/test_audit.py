# SPDX-License-Identifier: Apache-2.0
"""`audit`: what is recorded, where, and when `verify` refuses; and the commands built on it."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastnegate as fn
from fastnegate import testbed
from fastnegate.commands import cli, demo
from fastnegate.testbed import quality

PROMPT = "a red circle and a blue square"


@pytest.fixture(scope="module")
def pipe() -> Any:
    return testbed.load()


@pytest.fixture(scope="module")
def bank(pipe: Any) -> fn.ConceptBank:
    return quality.bank_of(pipe, ("red", "warm", "circle"))


def draw(pipe: Any, prompts: list[str], steps: int = 4) -> Any:
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    return pipe(prompts, num_inference_steps=steps, generator=generators, output_type="np").images


def test_audit_stays_a_function(pipe: Any, bank: fn.ConceptBank) -> None:
    importlib.import_module("fastnegate.engine.audit")  # the module of that name must not take its place

    with fn.negate(pipe, bank):
        for _ in range(2):
            with fn.audit(pipe) as record:
                draw(pipe, [PROMPT])
            record.verify()


def test_one_line_per_image_and_concept(pipe: Any, bank: fn.ConceptBank, tmp_path: Path) -> None:
    engine = fn.install(pipe, bank)
    layers = len(engine.layers)
    policies = [fn.Policy({"red": 1.0}, stop=0.5), None, fn.Policy({"red": 1.0, "circle": 0.5})]
    try:
        with fn.audit(pipe) as record:
            with engine.batch(policies):
                plain = draw(pipe, [PROMPT] * 3)
            with engine.batch([fn.Policy({"warm": 1.0})]):
                draw(pipe, [PROMPT])
        with engine.batch(policies):
            assert np.array_equal(plain, draw(pipe, [PROMPT] * 3))  # watching changes nothing
    finally:
        engine.remove()
    lines = [(x["image"], x["request"], x["concept"], x["calls"]) for x in record.report()]
    assert lines == [
        (0, 0, "red", 2 * layers),
        (1, 2, "circle", 4 * layers),
        (1, 2, "red", 4 * layers),
        (2, 0, "warm", 4 * layers),
    ]
    assert all(x["gate_max"] > 0 and math.isfinite(x["removed_energy"]) for x in record.report())
    record.verify()
    record.to_json(tmp_path / "audit.json")
    assert json.loads((tmp_path / "audit.json").read_text())["images"] == record.report()


def test_the_heat_is_where_the_concept_is(pipe: Any, bank: fn.ConceptBank) -> None:
    with fn.negate(pipe, bank), fn.audit(pipe) as record:
        draw(pipe, [PROMPT], steps=20)
    heat = record.heatmap("red").array(32, 32)
    assert heat.shape == (32, 32) and 0 <= heat.min() and heat.max() <= 1
    assert heat[:, :16].mean() > 1.5 * heat[:, 16:].mean()  # the red circle is on the left
    for concept, image in (("blue", 0), ("red", 1), ("red", -1)):
        with pytest.raises(ValueError, match="nothing was recorded"):
            record.heatmap(concept, image)


def test_verify_refuses_what_never_acted(pipe: Any, bank: fn.ConceptBank) -> None:
    engine = fn.install(pipe, bank)
    try:
        with fn.audit(pipe) as record:
            pass
        with pytest.raises(fn.AuditError, match="no negated attention call"):
            record.verify()
        # With 4 steps no i / 4 lies in [.55, .7): the window is not empty, but nothing acts.
        policies = [fn.Policy({"red": 1.0}), fn.Policy({"red": 1.0}, start=0.55, stop=0.7)]
        with fn.audit(pipe) as record, engine.batch(policies):
            draw(pipe, [PROMPT] * 2)
        with pytest.raises(fn.AuditError, match="'red' never acted on image 1"):
            record.verify()
    finally:
        engine.remove()


def test_audit_needs_an_engine(pipe: Any) -> None:
    with pytest.raises(ValueError, match="no engine"), fn.audit(pipe):
        pass


# The commands.


def test_demo_removes_the_concept_and_writes_what_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["demo", "--method", "protore", "--pictures", "2", "--out", str(tmp_path), "--json"]
    assert cli.main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "demo.json").read_text())
    none, negative, protore = result["columns"]
    assert (none["method"], negative["method"], protore["method"]) == (
        "no negation",
        "negative prompt",
        "protore",
    )
    assert none["present"] == [True, True] and protore["present"] == [False, False]
    assert none["kept"] == protore["kept"] == [True, True]
    assert [x["image"] for x in protore["audit"]] == [0, 1]
    assert all(x["gate_max"] > 0 and x["removed_energy"] > 0 for x in protore["audit"])
    for name in ("grid.png", "heat.png"):
        with Image.open(tmp_path / name) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 100


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "--prompt", "a cat"], "cat"),
        (["demo", "--negate", "cat"], "cat"),
        (["demo", "--pictures", "0"], "pictures=0"),
        (["demo", "--pictures", "65"], "pictures=65"),
        (["quality", "--methods", "magic"], "magic"),
        (["bench", "--rounds", "0"], "--rounds 0"),
    ],
)
def test_bad_options_end_before_any_work(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if arguments[0] == "demo":
        arguments = [*arguments, "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.out == ""
    assert not (tmp_path / "out").exists()


def test_the_table_shows_the_verdicts() -> None:
    column = {"method": "protore", "step_ms": 2.0, "present": [False, True], "kept": [True, True]}
    text = demo.table({"prompt": "p", "concept": "c", "pictures": 2, "steps": 20, "columns": [column]})
    assert "1 of 2" in text and "2 of 2" in text
