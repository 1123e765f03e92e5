# SPDX-License-Identifier: Apache-2.0
"""`audit`: what is recorded, where, and when `verify` refuses."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastnegate as fn
from fastnegate import testbed
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
        record = fn.Audit(engine)
        with engine.batch([fn.Policy({"red": 1.0})] * 2):
            # Of the second image, row 3, nothing is told but that it was asked for.
            engine.observer = lambda r: record(
                dataclasses.replace(r, entries=tuple(e for e in r.entries if e[1] != 3))
            )
            draw(pipe, [PROMPT] * 2)
        with pytest.raises(fn.AuditError, match="'red' never acted on image 1"):
            record.verify()
    finally:
        engine.remove()


def test_audit_needs_an_engine(pipe: Any) -> None:
    with pytest.raises(ValueError, match="no engine"), fn.audit(pipe):
        pass
