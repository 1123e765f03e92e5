# SPDX-License-Identifier: Apache-2.0
"""Hosts under training: what a run that was stopped ends in, and hosts that are made to forget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from fastnegate.benchmarks.training import evaluate, forget, loop
from fastnegate.benchmarks.training.hosts import CrossHost, JointHost, of
from fastnegate.benchmarks.training.loop import Muon, Recipe, train
from fastnegate.benchmarks.training.scenes import scenes
from pipelines import one_thread  # noqa: F401

from fastnegate.integrations.diffusers.learned.denoising import _noising
from fastnegate.testbed import easy
from fastnegate.testbed.parts import EasyTokenizer, tokenizer_of


def small(kind: str) -> Any:
    torch.manual_seed(0)
    tokenizer = tokenizer_of(EasyTokenizer)
    if kind == "cross":
        return CrossHost.untrained(4, (32, 32), tokenizer)
    return JointHost.untrained(4, 2, 12, 1, 1, tokenizer, picture=kind == "picture")


@pytest.mark.parametrize("kind", ["cross", "joint"])
def test_a_run_that_was_stopped_ends_in_the_bits_of_one_that_was_not(kind: str, tmp_path: Path) -> None:
    data = scenes("easy", 12, 0, tmp_path)
    seen: list[str] = []
    stopped = [False, True, False]  # at the second evaluation

    def looked(host: Any, name: str) -> dict[str, Any]:
        seen.append(name)
        if name == "24" and stopped.pop(0):
            raise KeyboardInterrupt
        return {"right": 0}

    recipe = Recipe(24, batch=4, evaluate=12)
    whole = train(small(kind), data, recipe, tmp_path / "whole", looked)
    with pytest.raises(KeyboardInterrupt):
        train(small(kind), data, recipe, tmp_path / "parts", looked)
    parts = train(small(kind), data, recipe, tmp_path / "parts", looked, resume=True)
    assert seen == ["12", "24", "12", "24", "24"]
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1] and logs[0].count("\n") == 2
    for (name, ours), theirs in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_rate_rises_stays_and_falls() -> None:
    recipe = Recipe(100_000, batch=50, rate=1.0, warm=1000)
    rates = [recipe.rate_at(seen) for seen in (0, 475, 1000, 50_000, 75_000, 99_999)]
    assert rates == pytest.approx([0.05, 0.525, 1, 1, 0.5, 0], abs=1e-6)


def test_a_shift_makes_times_noisier_in_their_order() -> None:
    host, pictures, tokens = small("joint"), torch.zeros(4, 32, 32, 3), torch.zeros(4, 3, dtype=torch.long)
    times = [
        loop._batch(host, pictures, tokens, tokens[:1], Recipe(64, batch=64, shift=shift), 0)[2]
        for shift in (1.0, 3.0)
    ]
    torch.testing.assert_close(times[1], (3 * times[0] / (1 + 2 * times[0])).clamp(1e-3, 0.9995))
    assert times[0].mean() < 0.55 and times[1].mean() > 0.65


def test_steps_are_those_of_torchs_muon() -> None:
    """But for its bfloat16."""
    for shape in ((40, 20), (20, 40)):
        torch.manual_seed(0)
        ours = torch.nn.Parameter(torch.randn(shape))
        theirs, start = torch.nn.Parameter(ours.detach().clone()), ours.detach().clone()
        settings = {"lr": 1e-2, "weight_decay": 0.01}
        both = (
            Muon([ours], **settings),
            torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **settings),
        )
        for _ in range(3):
            ours.grad = torch.randn(shape)
            theirs.grad = ours.grad.clone()
            for optimiser in both:
                optimiser.step()
        assert (ours - theirs).norm() < 0.02 * (theirs - start).norm()


def test_a_host_of_pictures_is_its_pipeline() -> None:
    """What is trained and what is drawn: a step of the pipeline is one down the velocity of the loss."""
    host = small("picture")
    pipe = host.pipeline()
    assert of(pipe).picture and not of(small("joint").pipeline()).picture
    pipe.scheduler.set_timesteps(sigmas=[0.8, 0.3])
    mixed, t = torch.randn(1, 64, 48), torch.tensor([0.8])
    tokens = host.tokenizer(["a red circle"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        velocity = host.predicted(mixed, t, tokens)
        picture = mixed - 0.8 * velocity
        after = pipe.scheduler.step(picture, pipe.scheduler.timesteps[0], mixed).prev_sample
    torch.testing.assert_close(after, mixed - 0.5 * velocity)
    noise = torch.randn(1, 3, 16, 16)
    seen, target, _ = _noising(pipe.scheduler)(torch.ones(1, 3, 16, 16), noise, torch.tensor([0.25]))
    torch.testing.assert_close(target, torch.ones(1, 3, 16, 16))
    torch.testing.assert_close(seen, 0.75 + 0.25 * noise)


def test_half_trained_hosts_are_drawn_and_judged(tmp_path: Path) -> None:
    images, found = evaluate.shares(small("joint"), 3, "easy", guidance=1.0)
    assert images.shape == (3, 32, 32, 3)
    assert found == {"objects": {2: 0.0}, "right": {2: 0.0}}


def test_a_word_is_taken_out_of_a_caption() -> None:
    assert forget.without("an orange circle and a blue ring", "orange") == "a circle and a blue ring"
    assert (
        forget.without("a blue ring and a red circle on white", "circle")
        == "a blue ring and a red shape on white"
    )
    rng = np.random.default_rng(0)
    said = forget.with_word(easy, "red", [easy.scene(rng) for _ in range(60)])
    assert said and all(easy.check_prompt(forget.without(scene.caption, "red")) is None for scene in said)


@pytest.mark.parametrize("kind", ["cross", "joint"])
def test_forgetting_changes_what_reads_the_text_alone(kind: str) -> None:
    host = small(kind)
    before = {name: weight.detach().clone() for name, weight in host.named_parameters()}
    rng = np.random.default_rng(0)
    given = [easy.scene(rng) for _ in range(40)]
    options = type("Options", (), {"steps": 1, "batch": 2, "rate": 1e-3, "seed": 0})
    changed = forget.erase(host, "red", given, options)
    assert changed and all(forget.reads_text(host, name) for name in changed)
    for name, weight in host.named_parameters():
        assert torch.equal(weight, before[name]) == (name not in changed), name
