# SPDX-License-Identifier: Apache-2.0
"""What a host under training draws of fresh prompts, without negation."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastnegate.testbed import easy, hard
from fastnegate.testbed.hard.scenes import draw_kind

from .hosts import JointHost

PROMPTS = 64
STEPS, GUIDANCE = 20, 3.0


def evaluate(folder: Path, world: str, host: Any, name: str) -> dict[str, Any]:
    """Draw `PROMPTS` fresh prompts: by their number of objects, the shares of objects and of pictures that
    the strict detector finds right. The first 32 pictures go to `folder`."""
    judged = _easy() if world == "easy" else _hard()
    images = draw(host, [prompt for prompt, _ in judged])
    right: dict[int, list[list[bool]]] = defaultdict(list)
    for image, (_, found_in) in zip(images, judged, strict=True):
        found = found_in(np.clip(image, 0, 1))
        right[len(found)].append(found)
    rows = [np.concatenate(images[i : i + 8], 1) for i in range(0, 32, 8)]
    sheet = Image.fromarray((np.concatenate(rows).clip(0, 1) * 255).round().astype(np.uint8))
    sheet.resize((2 * sheet.width, 2 * sheet.height), 0).save(folder / f"{name}.png")
    return {
        "objects": {n: round(float(np.mean(found)), 3) for n, found in sorted(right.items())},
        "right": {n: round(float(np.mean([all(f) for f in found])), 3) for n, found in sorted(right.items())},
    }


@torch.no_grad()
def draw(host: Any, prompts: list[str]) -> np.ndarray[Any, Any]:
    """Pictures [n, S, S, 3] in [0, 1], one seed each."""
    options: dict[str, Any] = {"guidance_scale": GUIDANCE}
    if isinstance(host, JointHost):
        options = {"true_cfg_scale": GUIDANCE}
    drawn = host.pipeline()(
        prompts, negative_prompt=[""] * len(prompts), num_inference_steps=STEPS, output_type="np",
        generator=[torch.Generator().manual_seed(i) for i in range(len(prompts))], **options,
    )  # fmt: skip
    images: np.ndarray[Any, Any] = np.asarray(drawn.images)
    return images


def _easy() -> list[Any]:
    """Prompts, each with a function from a picture to which of its objects are there."""

    def found(image: Any, case: Any) -> list[bool]:
        seen = easy.detect(image, easy.STRICT)
        return [easy.kept(seen, [thing], case.concept) for thing in case.stays]

    return [(case.prompt, partial(found, case=case)) for case in easy.suite("benign", PROMPTS, 900)]


def _hard() -> list[Any]:
    def found(image: Any, kinds: Any) -> list[bool]:
        seen = [detection.kind for detection in hard.detect(image, hard.STRICT)]
        return [kind in seen for kind in kinds]

    rng = np.random.default_rng(900)
    judged = []
    for i in range(PROMPTS):
        kinds = list(dict.fromkeys(draw_kind(rng) for _ in range(8)))[: 1 + i % 3]
        judged.append((hard.caption([hard.exactly(kind) for kind in kinds]), partial(found, kinds=kinds)))
    return judged
