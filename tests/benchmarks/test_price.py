# SPDX-License-Identifier: Apache-2.0
"""The price of negation: what is counted, what is measured beside what, and bars that no machine moves."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fastnegate.benchmarks.pipeline import __main__ as command
from fastnegate.benchmarks.pipeline import price
from fastnegate.benchmarks.pipeline.counting import Told, operations, peak
from fastnegate.benchmarks.pipeline.families import PRICED
from support import RULES, make_problem
from torch.nn.functional import scaled_dot_product_attention

from fastnegate.operator import reference, registration
from fastnegate.operator.backends import cpu
from fastnegate.testing import moved, with_partials
from fastnegate.testing.problems import PARTIALS

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(cpu.unavailable() is not None, reason=f"{cpu.unavailable()}"),
]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


# ---- operations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", (None, *PARTIALS))
@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
def test_ours_are_counted_as_the_definition_multiplies(rule: Any, which: str | None) -> None:
    """The definition is made of matrix products, which torch counts."""
    problem = make_problem(2, 2, 9, 7, 16, rule=rule, rows="same", concept_lengths=(5, 5, 5), extras=False)
    if which is not None:
        if rule.direction == "retrieve" and which != "shared":
            return  # there is no such problem
        problem = with_partials(problem, which)
    expected = operations(lambda: reference.evaluate(problem))
    assert (expected > 0) is (which in (None, "shared") or (rule.reads.tokens and which != "combine"))
    on_meta = moved(problem, "meta")
    for statistics in (False, True):
        for where, backend in ((problem, "cpu"), (on_meta, "reference")):
            assert operations(partial(registration.run, where, backend, statistics)) == expected


@pytest.mark.parametrize("keys", (1, 12))
def test_attention_of_torch_is_counted_as_its_products(keys: int) -> None:
    query, key = torch.randn(2, 3, 5, 8), torch.randn(2, 3, keys, 8)
    expected = operations(lambda: (query @ key.mT).softmax(-1) @ key)
    assert operations(lambda: scaled_dot_product_attention(query, key, key)) == expected == 4 * 30 * keys * 8


def test_what_is_read_of_a_tensor_without_memory() -> None:
    ids, given = torch.zeros(5, device="meta"), torch.tensor(3)
    with Told(7):
        assert int((ids == 0).sum()) == 7 and int(given) == 3
        with pytest.raises(TypeError, match="float32"):
            float(ids.sum())


# ---- what each variant is -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRICED)
def test_variants_do_what_their_names_say(name: str) -> None:
    """The two passes are what the padded concept is computed to be; every variant negates something else."""
    priced = PRICED[name].small()
    model = priced.model(whole=False)
    steps = {variant: make() for variant, make in price.variants(priced, model, priced.tokens)}
    expected = ["plain", "8", "4x8", "77", "padded", "two passes", "doubled batch"]
    assert [*steps] == [v for v in expected if v != price.PASSES or priced.two_passes is not None]
    found = {variant: step() for variant, step in steps.items()}
    doubled = found.pop(price.DOUBLED)
    plain, published = found.pop(price.PLAIN), found.pop(price.PASSES, None)
    assert len(doubled) == 2
    assert _apart(doubled[:1], plain) < 1e-5
    assert published is None or _apart(found["padded"], published) < 1e-5
    different = [plain, *found.values()]
    assert all(_apart(a, b) > 1e-4 for i, a in enumerate(different) for b in different[:i])
    assert torch.equal(steps["8"](), found["8"])  # it stays so, step by step


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def test_weights_are_there_once() -> None:
    model = PRICED["flux1"].small().model(whole=False)
    other = price.twin(model)
    weights = [{p.data_ptr() for p in m.parameters()} for m in (model, other)]
    assert weights[0] == weights[1] and not {*model.modules()} & {*other.modules()}


# ---- bars ---------------------------------------------------------------------------------------------


def over_plain(name: str, few: dict[str, Any]) -> dict[str, float]:
    """Operations at 1024 x 1024 of each variant, of a model at full width with fewer blocks."""
    priced = PRICED[name]
    counts = price.counted(dataclasses.replace(priced, config={**priced.config, **few}))
    return {variant: count / counts[price.PLAIN] for variant, count in counts.items()}


# Few blocks, of each kind as many to one as of all.
SHARES: dict[str, dict[str, int]] = {
    "flux1": {"num_layers": 1, "num_single_layers": 2},
    "flux2-klein": {"num_layers": 1, "num_single_layers": 4},
    "qwen": {"num_layers": 2},
    "zimage": {"n_layers": 2, "n_refiner_layers": 1},
    "sd35": {"num_layers": 2},
}


@pytest.mark.parametrize("name", SHARES)
def test_bars_of_joint_models(name: str) -> None:
    over = over_plain(name, SHARES[name])
    assert 1.0 < over["8"] <= 1.003
    assert 1.0 < over["77"] <= 1.025
    assert over["8"] < over["4x8"] < over["77"] < over["padded"] <= 1.15
    assert over["doubled batch"] == pytest.approx(2, abs=1e-2)
    if name == "flux1":  # whose published code runs the image twice
        assert over["two passes"] >= 1.6


def test_bars_of_wan() -> None:
    over = over_plain("wan", {"num_layers": 1})
    assert 1.0 < over["8"] < over["77"] <= 1.001
    assert over["padded"] == pytest.approx(over["two passes"], abs=1e-4)  # of a cross-attention it is both


def test_bars_of_live_bytes() -> None:
    """Heads of the model's width: then what is per query and head weighs as there."""
    narrow = {"num_attention_heads": 2, "attention_head_dim": 128, "axes_dims_rope": (16, 56, 56)}
    flux = PRICED["flux1"].small()
    flux = dataclasses.replace(flux, config={**flux.config, **narrow})
    model = flux.model(whole=False)
    found = {}
    for name, make in price.variants(flux, model, 1024):
        if name in ("plain", "8", "doubled batch"):
            step = make()
            step()
            found[name] = peak(step) / found.get("plain", 1)
    assert 1.0 < found["8"] <= 1.05
    assert found["doubled batch"] > 1.9


# ---- live bytes ---------------------------------------------------------------------------------------


def test_live_bytes_by_hand() -> None:
    weight, given = torch.ones(100), torch.ones(100)

    def call() -> torch.Tensor:
        a = given + weight  # 400
        b = a[10:].view(-1)  # the same memory
        a = a * weight[:100]  # 800: b holds the first
        del b
        a = a + 1  # 400 gone before, 800 here
        c = torch.cat([a, a, a])  # 1600
        del a
        return c[:10].clone() + given[0]  # 1200 and two of 40

    assert peak(call) == 1600
    assert peak(lambda: given[5:].t()) == 0
    assert peak(lambda: [given + 1 for _ in range(5)]) == 2000
    assert peak(lambda: [float((given + 1).sum()) for _ in range(5)]) == 404


# ---- the command --------------------------------------------------------------------------------------


def test_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("flux1", "wan"):
        monkeypatch.setitem(PRICED, name, PRICED[name].small())
    file = tmp_path / "price.json"
    few = ["--model", "flux1", "--tokens", "24", "--pairs", "2", "--threads", "1", "--clock", "processor"]
    assert command.main([*few, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    of_flux = found["models"]["flux1"]
    assert of_flux["tokens"] == 24 and found["facts"]["torch"] == torch.__version__
    assert {len(of["seconds"]) for of in of_flux["variants"].values()} == {2}
    first, head, _, *rows = capsys.readouterr().out.splitlines()
    assert "flux1, 24 image and 512 text tokens, 1 threads, processor time" in first
    assert head.count("over plain") == 3
    assert len(rows) == len(of_flux["variants"]) == 7
    assert command.main(["--model", "flux1", "wan", "--count", "--json", str(file)]) == 0
    assert [*json.loads(file.read_text())["operations"]] == ["flux1", "wan"]
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert "two passes" in head and [row.split()[1] for row in rows] == ["flux1", "wan"]
    for wrong in (
        ["--model", "flux1", "--tokens", "0"],
        ["--tokens", "8"],
        ["--model", "wan", "--rows", "conditional"],
    ):
        with pytest.raises(SystemExit):
            command.main(wrong)
    said = capsys.readouterr().err
    assert "--tokens is of the price in a model" in said and "--rows is of the step" in said


@pytest.mark.full
def test_the_table_of_the_docs() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
    assert price.counts_table({name: price.counted(priced) for name, priced in PRICED.items()}) in page
