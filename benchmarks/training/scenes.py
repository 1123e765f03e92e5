# SPDX-License-Identifier: Apache-2.0
"""Captioned training pictures of a world, drawn once and kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastnegate.testbed import easy, hard

SCENES: dict[str, Callable[[np.random.Generator], Any]] = {
    "easy": easy.scene,
    "hard-free": partial(hard.scene, places="free"),
    "hard-grid": partial(hard.scene, places="grid"),
}
"""Worlds, by the way that objects find their places."""


class Scenes(NamedTuple):
    """`pictures`: uint8 [n, S, S, 3]; `captions`: one each."""

    pictures: Tensor
    captions: list[str]


def scenes(name: str, number: int, seed: int, kept: Path) -> Scenes:
    """`number` of the `SCENES`; drawn once, then read from the folder `kept`."""
    file = kept / f"{name}-{number}-{seed}.npz"
    if not file.exists():
        rng = np.random.default_rng(seed)
        drawn = [SCENES[name](rng) for _ in tqdm(range(number), f"drawing {name} scenes", mininterval=10)]
        pictures = np.stack([(scene.image * 255).round().astype(np.uint8) for scene in drawn])
        kept.mkdir(parents=True, exist_ok=True)
        np.savez(file, pictures=pictures, captions=np.array([scene.caption for scene in drawn]))
    with np.load(file) as arrays:
        return Scenes(torch.from_numpy(arrays["pictures"]), arrays["captions"].tolist())
