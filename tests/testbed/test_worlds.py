# SPDX-License-Identifier: Apache-2.0
"""What every world of the testbed must be, and that what judges them does not change unnoticed."""

from __future__ import annotations

from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastnegate import testbed
from fastnegate.testbed import WORLDS, easy, hard
from fastnegate.testbed.cases import SPLITS, Case
from fastnegate.testbed.world import World

PACKAGE = Path(testbed.__file__).parent


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest) -> Any:
    return WORLDS[request.param]


def test_a_world_has_all_names(world: Any) -> None:
    assert WORLDS[world.NAME] is world
    names = {name for name in vars(World) if not name.startswith("_")}
    assert len(names) > 15 and names <= {*world.__all__}


def test_scenes_are_what_their_captions_say(world: Any) -> None:
    rng = np.random.default_rng(0)
    counts = set()
    for _ in range(300):
        scene = world.scene(rng)
        world.check_prompt(scene.caption)
        things = [drawn.thing for drawn in scene.objects]
        assert world.objects_in(scene.caption) == things
        assert scene.image.shape == (world.SIZE, world.SIZE, 3) and scene.image.dtype == np.float32
        assert 0 <= scene.image.min() and scene.image.max() <= 1
        case = Case(scene.caption, ("red",), (), tuple(things), (("red",),))
        found = world.judge(scene.image, case)
        assert found.kept and found.right and found.malformed == 0 and found.lenient_right
        counts.add(len(things))
        for drawn in scene.objects:
            assert drawn.radius < drawn.x < world.SIZE - drawn.radius
            assert drawn.radius < drawn.y < world.SIZE - drawn.radius
    assert counts == ({1, 2} if world is easy else {1, 2, 3})


def test_every_word_is_trained_but_those_that_captions_have_no_use_for(world: Any) -> None:
    rng = np.random.default_rng(1)
    read = {word for _ in range(3000) for word in world.scene(rng).caption.split()}
    assert read == {*world.WORDS}


def test_a_prompt_with_an_unknown_word_or_too_many_is_refused(world: Any) -> None:
    world.check_prompt("")
    with pytest.raises(ValueError, match=r"unknown word 'zebra'; allowed: a, an"):
        world.check_prompt("a zebra")
    world.check_prompt("red " * world.MAX_WORDS)
    with pytest.raises(ValueError, match=f"{world.MAX_WORDS + 1} words"):
        world.check_prompt("red " * (world.MAX_WORDS + 1))


def test_suites_are_pure_and_their_splits_differ(world: Any) -> None:
    for name in world.SUITES:
        cases = world.suite(name, 24, 7)
        assert cases == world.suite(name, 24, 7, "test") and cases[:5] == world.suite(name, 5, 7)
        assert cases != world.suite(name, 24, 8)
        # No draw of one split is one of the other: not of the same seed, nor of those next to it.
        assert SPLITS == ("test", "development")
        tuning = world.suite(name, 24, 7, "development")
        assert tuning not in [world.suite(name, 24, seed) for seed in range(12)]
        for case in cases + tuning:
            world.check_prompt(case.prompt)
            assert 1 <= len(case.concepts) == len({*case.concepts}) <= 3
            assert len(case.given) == len(case.concepts)
            for concept, words in zip(case.concepts, case.given):
                assert {*words} <= {*world.members(concept)} and concept in words


def test_a_case_of_several_concepts_has_no_single_one(world: Any) -> None:
    case = world.suite("multi", 1, 0)[0]
    with pytest.raises(ValueError, match="more than one"):
        _ = case.concept


# The judges were fixed before the first negation was run. A change of what is below makes all numbers that
# were measured before it another judge's: run everything again, or leave it.


def test_the_judges_are_frozen() -> None:
    frozen = {
        "blobs.py": "cfedf2f9468b4a32",
        "shapes.py": "3fca4ac30ac9e506",
        "easy/detector.py": "60abd66283b25589",
        "hard/detector.py": "caef4230efa213d1",
        "hard/drawing.py": "a68623240ce29ec5",
        "verdict.py": "831c02dd931b200d",
    }
    found = {file: sha256((PACKAGE / file).read_bytes()).hexdigest()[:16] for file in frozen}
    assert found == frozen


def test_the_thresholds_are_frozen() -> None:
    assert [asdict(thresholds) for thresholds in (easy.STRICT, easy.LOOSE)] == [
        {"min_saturation": 0.25, "min_area": 18, "min_shape_area": 18, "min_score": 0.6, "max_aspect": 2.0},
        {"min_saturation": 0.125, "min_area": 6, "min_shape_area": 18, "min_score": 0.5, "max_aspect": 2.5},
    ]
    assert [asdict(thresholds) for thresholds in (hard.STRICT, hard.LOOSE)] == [
        {"contrast": 0.15, "min_area": 24, "min_side": 11, "faintest": 0.75, "max_distance": 0.16},
        {"contrast": 0.1, "min_area": 12, "min_side": 7, "faintest": 0.35, "max_distance": 0.25},
    ]


def test_the_sprites_are_those_of_the_notice() -> None:
    folder = PACKAGE / "hard" / "sprites"
    assert {path.name for path in folder.iterdir()} == {"sprites.png", "NOTICE", "LICENSE"}
    sheet = (folder / "sprites.png").read_bytes()
    assert sha256(sheet).hexdigest() == "2c8cca9561b01e1e5e4b21e10234648773c77f5e3d6fbb23345d210bbb35f4c9"
    assert len(sheet) < 120e3
    notice = (folder / "NOTICE").read_text()
    assert "Apache License" in notice and "resized" in notice
    assert "Version 2.0, January 2004" in (folder / "LICENSE").read_text()
    for sprite in hard.words.SPRITES:
        assert f"{sprite} " in notice
