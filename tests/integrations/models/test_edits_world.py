# SPDX-License-Identifier: Apache-2.0
"""Whether edits do in the embedded world what they are for, judged by its detector."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

import fastnegate as fn
from fastnegate import testbed
from fastnegate.testbed import LOOSE, STRICT, Case, detect, kept, shows

CASES = 8
OTHERS = [color for color in ("orange", "yellow", "green", "blue", "purple", "white", "black", "gray")]


def red(suite: str) -> list[Case]:
    return [case for case in testbed.suite(suite, 300, 0) if case.concept == "red"][:CASES]


def draw(pipe: Any, cases: list[Case]) -> Any:
    return pipe(
        [case.prompt for case in cases],
        num_inference_steps=testbed.DEFAULT_STEPS,
        guidance_scale=testbed.DEFAULT_GUIDANCE,
        generator=[torch.Generator().manual_seed(i) for i in range(len(cases))],
        output_type="np",
    ).images


EDITS: dict[str, Callable[[Any], Any]] = {
    "none": lambda _pipe: nullcontext(),
    "adavd": lambda pipe: fn.edits.adavd(pipe, "red", tokens="prototype"),
    "uce": lambda pipe: fn.edits.uce(pipe, "red", tokens="prototype", preserve=OTHERS),
}


@pytest.mark.full
@pytest.mark.parametrize("edit", EDITS)
def test_red_goes_and_the_rest_stays(edit: str) -> None:
    pipe = testbed.load()
    named, benign = red("colour"), red("benign")
    with EDITS[edit](pipe):
        pictures, others = draw(pipe, named), draw(pipe, benign)
    gone = sum(not shows(detect(p, LOOSE), "red") for p in pictures)
    stays = sum(kept(detect(p, STRICT), [case.other], "red") for p, case in zip(pictures, named))
    right = sum(kept(detect(p, STRICT), [case.target, case.other], "red") for p, case in zip(others, benign))
    assert gone >= CASES - 2 if edit != "none" else gone == 0
    assert stays >= CASES - 2 and right >= CASES - 2


@pytest.mark.full
@pytest.mark.parametrize("preset", ("weak", "max"))
def test_sld_acts_the_more_the_stronger_it_is(preset: str) -> None:
    pipe, cases = testbed.load(), red("colour")[:2]
    plain = torch.as_tensor(draw(pipe, cases))
    with fn.edits.sld(pipe, "red", preset):
        moved = (torch.as_tensor(draw(pipe, cases)) - plain).abs().mean().item()
    assert (moved > 0.02) == (preset == "max")
