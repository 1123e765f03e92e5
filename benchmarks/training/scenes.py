# SPDX-License-Identifier: Apache-2.0
"""Captioned training pictures of a world, drawn once and kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from fastnegate.testbed.easy.concepts import covers
from fastnegate.testbed.easy.world import (
    ALIASES,
    BACKGROUNDS,
    COLOR_UMBRELLAS,
    COLORS,
    SHAPE_UMBRELLAS,
    SHAPES,
    UMBRELLAS,
    PromptObject,
    article,
    phrase,
    render,
)
from fastnegate.testbed.hard.scenes import scene as hard_scene

Scene = tuple[str, NDArray[np.float32]]


class Scenes(NamedTuple):
    """`pictures`: uint8 [n, S, S, 3]; `captions`: one each."""

    pictures: Tensor
    captions: list[str]


def easy(rng: np.random.Generator) -> Scene:
    """A caption of the easy world and its picture.

    Most captions name two objects, left and right; a part of the words are umbrellas and aliases, and a
    lone object is sometimes named by one bare word, so that a concept alone is a prompt the host knows.
    """
    number = 2 if rng.random() < 0.85 else 1
    things: list[PromptObject] = []
    while len(things) < number:
        thing = PromptObject(str(rng.choice(COLORS)), str(rng.choice(SHAPES)))
        if thing not in things:
            things.append(thing)
    background = str(rng.choice(list(BACKGROUNDS)))
    if number == 1 and rng.random() < 0.4:
        words = str(rng.choice(_bare(things[0])))
    else:
        beside = " left of " if number == 2 and rng.random() < 0.15 else " and "
        words = beside.join(_named(rng, thing, plain=rng.random() < 0.4) for thing in things)
    if rng.random() < 0.3:
        words += f" on {background}"
    return words, render(things, background, rng=rng)


def _bare(thing: PromptObject) -> list[str]:
    return [str(thing.color), str(thing.shape), *(word for word in UMBRELLAS if covers(word, thing))]


def _named(rng: np.random.Generator, thing: PromptObject, plain: bool) -> str:
    """The phrase of an object; where not plain, sometimes an alias, an umbrella word or no shape."""
    if plain:
        return phrase(thing)
    alias = next((word for word, hidden in ALIASES.items() if hidden == thing), None)
    if alias and rng.random() < 0.45:
        return f"{article(alias)} {alias}"
    color, shape = thing.color, thing.shape
    if rng.random() < 0.12:
        color = next(word for word in COLOR_UMBRELLAS if covers(word, thing))
    if rng.random() < 0.15:
        shape = next((word for word in SHAPE_UMBRELLAS if covers(word, thing)), shape)
    chance = rng.random()
    if chance < 0.06:
        shape = None
    elif chance < 0.12:
        color = None
    return phrase(PromptObject(color, shape))


def _hard(places: str) -> Callable[[np.random.Generator], Scene]:
    def drawn(rng: np.random.Generator) -> Scene:
        scene = hard_scene(rng, places=places)
        return scene.caption, scene.image

    return drawn


WORLDS: dict[str, Callable[[np.random.Generator], Scene]] = {
    "easy": easy,
    "hard-free": _hard("free"),
    "hard-grid": _hard("grid"),
}


def scenes(world: str, number: int, seed: int, kept: Path) -> Scenes:
    """`number` scenes of a world; drawn once, then read from the folder `kept`."""
    file = kept / f"{world}-{number}-{seed}.npz"
    if not file.exists():
        rng = np.random.default_rng(seed)
        drawn = [WORLDS[world](rng) for _ in tqdm(range(number), f"drawing {world} scenes", mininterval=10)]
        pictures = np.stack([(picture * 255).round().astype(np.uint8) for _, picture in drawn])
        kept.mkdir(parents=True, exist_ok=True)
        np.savez(file, pictures=pictures, captions=np.array([caption for caption, _ in drawn]))
    with np.load(file) as arrays:
        return Scenes(torch.from_numpy(arrays["pictures"]), arrays["captions"].tolist())
