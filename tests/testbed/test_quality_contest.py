# SPDX-License-Identifier: Apache-2.0
"""Contests: what is drawn and what is not, how it is paired and scored, what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers")

from fastnegate.engine.errors import UnsupportedModelError
from fastnegate.testbed import easy
from fastnegate.testbed.cases import Case
from fastnegate.testbed.quality import METHODS, Contest, Lines, Plan, Price, Stage, measure
from fastnegate.testbed.quality.learned import Learned
from fastnegate.testbed.quality.lines import Cases, Run
from fastnegate.testbed.quality.methods import Choice, Range
from fastnegate.testbed.quality.results import (
    Results,
    Study,
    entries,
    numbers_of,
    read_studies,
    write_studies,
)
from fastnegate.testbed.quality.scores import details, overview, score
from fastnegate.testbed.quality.stage import BATCH, noise_of
from fastnegate.testbed.verdict import Verdict

SUITES = ("colour", "benign", "multi")


class Rendered(Stage):
    """A host that draws every prompt as it should be, and negates perfectly: as the world itself renders."""

    def __init__(self) -> None:
        self.host, self.guidance, self.world, self.version = "rendered", "cfg", easy, 0
        self.drawn: list[tuple[str, list[Case[Any]], list[int]]] = []

    def draw(self, method, numbers, cases, noise, on_step=lambda: None):  # type: ignore[no-untyped-def]
        if method.name == "casteer":
            raise UnsupportedModelError("not here")
        self.drawn.append((method.name, list(cases), list(noise)))
        for _ in range(20):
            on_step()
        return np.stack([self._render(method.name, case) for case in cases])

    def _render(self, method: str, case: Case[Any]) -> Any:
        things = easy.objects_in(case.prompt)
        if method != "none":
            things = [thing for thing in things if thing not in case.goes]
        return easy.render(things) if things else np.full((32, 32, 3), 0.5, np.float32)

    def fingerprint(self, cases: Sequence[Case[Any]], learns: str = "") -> str:
        return f"{self.version} {[case.prompt for case in cases]}"


def test_rows_are_paired_with_the_same_prompts_and_noise() -> None:
    stage = Rendered()
    row = Contest(stage, Plan(SUITES, cases=12, seed=5), Lines()).row("protore")
    (_, cases, noise), (_, plain, plain_noise) = stage.drawn[0], stage.drawn[2]
    assert [name for name, *_ in stage.drawn] == ["protore", "protore", "none", "none"]
    assert cases == plain and noise == plain_noise and len(cases) == BATCH
    assert [score.suite for score in row.scores] == [*SUITES]
    for found in row.scores:
        assert found.right[0].value == 1.0 and found.right[0].cases == 12
        assert found.benign == (found.suite == "benign")
        assert found.gain[0].value == (0.0 if found.benign else 1.0)
        assert found.malformed.value == 0.0
    assert row.objective == 1.0


def test_methods_that_cannot_tell_rows_apart_get_a_concept_at_a_time() -> None:
    stage = Rendered()
    Contest(stage, Plan(SUITES, cases=12), Lines()).row("uce")
    batches = [cases for name, cases, _ in stage.drawn if name == "uce"]
    assert len(batches) > 3 and sum(map(len, batches)) == 36
    assert all(len({(case.concepts, case.given) for case in cases}) == 1 for cases in batches)


def test_nothing_is_drawn_twice(tmp_path: Path) -> None:
    file, plan = tmp_path / "lines.jsonl", Plan(SUITES, cases=6)
    first = Contest(Rendered(), plan, Lines(file)).row("protore")
    stage = Rendered()
    assert Contest(stage, plan, Lines(file)).row("protore") == first and not stage.drawn
    # More of the same: only what is missing.
    Contest(stage, replace(plan, cases=8), Lines(file)).row("protore")
    assert [len(cases) for _, cases, _ in stage.drawn] == [6, 6]
    # Fewer, other numbers, another split or seed.
    for other, drawn in (
        ((replace(plan, cases=2), {}), 0),
        ((plan, {"strength": 2.0}), 18),
        ((replace(plan, split="development"), {}), 36),
        ((replace(plan, seed=1), {}), 36),
    ):
        stage.drawn.clear()
        Contest(stage, other[0], Lines(file)).row("protore", other[1])
        assert sum(len(cases) for _, cases, _ in stage.drawn) == drawn


def test_what_another_host_or_judge_has_drawn_does_not_count(tmp_path: Path) -> None:
    file, plan = tmp_path / "lines.jsonl", Plan(("colour",), cases=4)
    Contest(Rendered(), plan, Lines(file)).row("none")
    stage = Rendered()
    stage.version = 1
    Contest(stage, plan, Lines(file)).row("none")
    assert len(stage.drawn) == 1
    Contest(stage, plan, Lines(file)).row("none")
    assert len(stage.drawn) == 1


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    file, plan = tmp_path / "lines.jsonl", Plan(("colour",), cases=4)
    Contest(Rendered(), plan, Lines(file)).row("none")
    whole = file.read_text()
    file.write_text(whole + whole[: len(whole) // 2])
    lines = Lines(file)
    assert file.read_text() == whole
    stage = Rendered()
    Contest(stage, plan, lines).row("none")
    assert not stage.drawn
    file.write_text('{"method": "none"}\n')
    with pytest.raises(ValueError, match=r"lines.jsonl, line 1: not a line of verdicts: KeyError\('host'\)"):
        Lines(file)


def test_every_step_is_told() -> None:
    expected, told = [], []
    stage = Rendered()
    Contest(stage, Plan(("colour",), cases=40), Lines(), expected.append, told.append).row("vsf")
    assert sum(expected) == len(told) == 4 * 20
    assert told[0] == "vsf on colour" and told[-1] == "none on colour"


def test_a_method_that_does_not_fit_is_a_row_that_says_so() -> None:
    row = Contest(Rendered(), Plan(("colour",), cases=2), Lines()).row("casteer")
    assert row.refused == "not here" and not row.scores
    assert "does not fit: not here" in details([row], "colour") and "casteer" in overview([row])


@pytest.mark.parametrize(
    ("name", "numbers", "message"),
    [
        ("magic", {}, "method='magic'; allowed: none, negative prompt, protore"),
        (
            "nag",
            {"threshold": 0.5},
            "nag has no 'threshold'; allowed: strength, blend, norm_limit, shared, stop",
        ),
        ("none", {"strength": 1.0}, "none has no 'strength'; allowed: none"),
        ("nag", {"strength": "much"}, "strength='much': must be a number"),
        ("rece", {"epochs": 1.5}, "epochs=1.5: must be a whole number"),
        ("uce", {"tokens": "all"}, "tokens='all'; allowed: prompt, prototype"),
    ],
)
def test_what_no_method_has_is_refused_before_any_drawing(name: str, numbers: Any, message: str) -> None:
    stage = Rendered()
    with pytest.raises(ValueError, match=message):
        Contest(stage, Plan(("colour",), cases=2), Lines()).row(name, numbers)
    assert not stage.drawn


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(("hue",)), "name='hue'; allowed: colour"),
        (Plan(cases=0), "n=0"),
        (Plan(seed=-1), "seed=-1"),
        (Plan(split="training"), "split='training'"),
    ],
)
def test_what_no_world_has_is_refused(plan: Plan, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Contest(Rendered(), plan, Lines())


def test_kept_is_of_what_the_host_keeps() -> None:
    def verdict(gone: bool, kept: bool, malformed: int = 0) -> Verdict:
        return Verdict(gone, kept, gone and kept, malformed, gone, True, gone)

    before = [verdict(False, True), verdict(False, True), verdict(False, False), verdict(False, False)]
    after = [verdict(True, True), verdict(True, False, 1), verdict(True, True), verdict(False, False)]
    found = score("colour", False, after, before)
    assert found.gone[0].value == 0.75 and found.right[0].value == 0.5
    assert (found.kept[0].value, found.kept[0].cases) == (0.5, 2)
    assert (found.kept[1].value, found.kept[1].cases) == (1.0, 4)
    assert found.malformed.value == 0.25 and found.gain[0].value == 0.5


def test_the_noise_of_the_splits_is_apart() -> None:
    assert noise_of(3, 4, "test") == noise_of(4, 3, "test") == 7
    largest = noise_of(2**32 - 1, 10**6, "test")
    assert largest < noise_of(0, 0, "development") < 2**63


def test_files_are_read_as_they_were_written(tmp_path: Path) -> None:
    stage, plan, lines = Rendered(), Plan(SUITES, cases=3), Lines()
    run = Run.of("rendered", "cfg", "vsf", {})
    lines.add_price(run, Price(2.0, 1.5, 8, "a machine"))
    contest = Contest(stage, plan, lines)
    rows = (contest.row("vsf", price=True), contest.row("casteer"), contest.row("nag", {"strength": 2.0}))
    assert rows[0].price == Price(2.0, 1.5, 8, "a machine")
    results = Results("rendered", "cfg", plan, rows)
    results.write(tmp_path / "rows.json")
    assert Results.read(tmp_path / "rows.json") == results
    (tmp_path / "other.json").write_text('{"host": "easy"}')
    with pytest.raises(ValueError, match=r"other.json has no rows of methods: KeyError\('plan'\)"):
        Results.read(tmp_path / "other.json")

    study = Study("easy", "cfg", "nag", {"strength": 3.0}, 0.5, 0.25, 20, 12)
    write_studies(tmp_path / "tuned.json", [study, replace(study, guidance="free", numbers={})])
    studies = read_studies(tmp_path / "tuned.json")
    assert studies[0] == study and numbers_of(studies, "easy", "cfg") == {"nag": {"strength": 3.0}}
    with pytest.raises(ValueError, match=r"rows.json has no tuned numbers"):
        read_studies(tmp_path / "rows.json")


def test_a_tuned_method_is_measured_with_both_numbers() -> None:
    found = entries(["none", "nag", "sld"], 2.0, {"nag": {"strength": 3.0}})
    assert [(e.method, dict(e.numbers), e.tuned) for e in found] == [
        ("none", {}, False),
        ("nag", {"strength": 2.0}, False),
        ("nag", {"strength": 3.0}, True),
        ("sld", {"strength": 2000.0}, False),
    ]
    with pytest.raises(ValueError, match="nag has no 'scale'"):
        entries(["nag"], tuned={"nag": {"scale": 3.0}})


def test_ranges_hold_the_published_strengths() -> None:
    for method in METHODS.values():
        if method.strength is not None:
            name, own = method.strength
            allowed = method.tuned[name]
            assert isinstance(allowed, Range) and allowed.low < own < allowed.high
        for allowed in method.tuned.values():
            assert isinstance(allowed, Choice) or (allowed.low > 0 or not allowed.log)
    with pytest.raises(ValueError, match="none has no strength"):
        METHODS["none"].stronger(2.0)


@pytest.fixture(scope="module")
def hurried() -> Any:
    """The embedded model, for pictures of two steps; a pair of prompts is enough for a direction."""
    from fastnegate.testbed.quality import learned, stage

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "DEFAULT_STEPS", 2)
        patch.setattr(measure, "DEFAULT_STEPS", 2)
        patch.setattr(measure, "PICTURES", 1)
        patch.setattr(stage, "_PAIRS", 1)
        patch.setattr(learned, "EMBEDDINGS", learned.Adam(1, 2, 0.02))
        patch.setattr(learned, "WEIGHTS", learned.Adam(1, 2, 5e-4))
        patch.setattr(learned, "PICTURES", 2)
        yield Stage("easy")


# At two steps some act nowhere yet: with numbers that let them.
SOONER: dict[str, dict[str, Any]] = {
    "sld": {"warmup": 0},
    "crg": {"threshold": -1e4},
    "safree": {"middle": 0.0},
    "ine": {"threshold": 0.0},
}


@pytest.mark.parametrize("name", METHODS)
def test_each_method_acts_in_the_pipeline_and_is_undone(name: str, hurried: Stage) -> None:
    cases, noise = easy.suite("umbrella", 1, 0), [0]
    plain = hurried.draw(METHODS["none"], {}, cases, noise)
    changed = hurried.draw(METHODS[name], SOONER.get(name, {}), cases, noise)
    assert np.array_equal(changed, plain) == (name == "none")
    assert np.array_equal(hurried.draw(METHODS["none"], {}, cases, noise), plain)


@pytest.mark.parametrize(
    ("name", "guidance", "passes"), [("none", "cfg", 2), ("vsf", "free", 1), ("crg", "cfg", 3)]
)
def test_passes_are_counted(
    name: str, guidance: str, passes: int, hurried: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hurried, "guidance", guidance)
    lines = Lines()
    row = Contest(hurried, Plan(("umbrella",), cases=1), lines).row(name, price=True)
    assert row.price is not None and row.price.passes == passes and row.price.ms > 0 and row.price.machine
    assert lines.price(Run.of("easy", guidance, name, {})) == row.price


def test_methods_that_need_guidance_are_refused_without(
    hurried: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hurried, "guidance", "free")
    contest = Contest(hurried, Plan(("umbrella",), cases=1), Lines())
    for name in ("negative prompt", "sld", "crg"):
        assert contest.row(name).refused == f"{name} needs classifier-free guidance"


def test_joint_hosts_are_called_as_they_want(hurried: Stage) -> None:
    """True guidance has an empty negative prompt for each picture; free runs have half the passes."""
    plan = Plan(("colour",), cases=1)
    for guidance, name, passes in (("cfg", "crg", 3), ("free", "vsf", 1)):
        contest = Contest(Stage("easy-joint", guidance), plan, Lines())
        price = contest.row(name, price=True).price
        assert price is not None and price.passes == passes
        assert contest.row("casteer").refused == "casteer needs layers that attend to text alone"
        assert "text changes from layer to layer" in contest.row("adavd").refused


def test_fingerprints_change_with_weights_and_cases(hurried: Stage) -> None:
    cases = easy.suite("colour", 2, 0)
    found = {hurried.fingerprint(cases), hurried.fingerprint(cases[:1]), hurried.fingerprint(cases[1:])}
    other = Stage("easy")
    assert other.fingerprint(cases) in found
    weight = next(other.pipe.unet.parameters())
    changed = Stage("easy")
    changed.pipe.unet.load_state_dict({**other.pipe.unet.state_dict()})
    next(changed.pipe.unet.parameters()).data = weight.data + 1
    assert len(found | {changed.fingerprint(cases)}) == 4


def test_fingerprints_of_methods_that_learn_change_with_what_they_learn_from(
    hurried: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastnegate.testbed.quality import learned

    cases = easy.suite("colour", 1, 0)
    found = [hurried.fingerprint(cases, METHODS[name].learns) for name in ("nag", "ine", "task vector")]
    assert found[0] == hurried.fingerprint(cases)
    monkeypatch.setattr(learned, "PICTURES", 3)
    other = Stage("easy")
    found += [other.fingerprint(cases, METHODS[name].learns) for name in ("ine", "task vector")]
    assert len({*found}) == 5


def test_what_was_learned_of_a_concept_is_kept(hurried: Stage, tmp_path: Path) -> None:
    learned = Learned(hurried.pipe, easy, "as it is", tmp_path)
    own = {name: weight.detach().clone() for name, weight in hurried.pipe.unet.named_parameters()}
    found = learned.concept(["red"]), learned.weights(["red"])
    assert found[0].prompt.shape == (1, 96) and found[1].keys() == own.keys()
    assert any(not weight.equal(own[name]) for name, weight in found[1].items())
    for name, weight in hurried.pipe.unet.named_parameters():
        assert weight.equal(own[name]) and weight.requires_grad and weight.grad is None, name
    again = Learned(None, easy, "as it is", tmp_path)  # without a pipeline it cannot learn
    assert again.concept(["red"]).prompt.equal(found[0].prompt)
    assert all(weight.equal(found[1][name]) for name, weight in again.weights(["red"]).items())
    in_memory = Learned(hurried.pipe, easy, "as it is", None)
    assert in_memory.weights(["red"]) is in_memory.weights(["red"])
    for identity, words in (("another", ["red"]), ("as it is", ["warm", "red"])):
        with pytest.raises(UnsupportedModelError):
            Learned(None, easy, identity, tmp_path).concept(words)


def test_stages_are_checked() -> None:
    with pytest.raises(ValueError, match="guidance='some'; allowed: cfg, free"):
        Stage("easy", "some")
    with pytest.raises(ValueError, match="host='large'; allowed: easy"):
        Stage("large")


def test_lines_are_json(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    lines = Lines(file)
    verdict = Verdict(True, False, False, 2, True, True, True)
    run = Run.of("easy", "cfg", "nag", {"b": 1.0, "a": "x"})
    lines.add(run, Cases("colour", "test", 0), {3: verdict}, "print")
    assert json.loads(file.read_text()) == {
        **{"host": "easy", "guidance": "cfg", "method": "nag", "numbers": '{"a": "x", "b": 1.0}'},
        **{"suite": "colour", "split": "test", "seed": 0, "cases": [3], "fingerprint": "print"},
        "verdicts": [[1, 0, 0, 2, 1, 1, 1]],
    }
    assert Lines(file).verdicts(run, Cases("colour", "test", 0), lambda _: "print") == {3: verdict}
