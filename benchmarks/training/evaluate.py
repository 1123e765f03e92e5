# SPDX-License-Identifier: Apache-2.0
"""What a host draws of fresh prompts, unnegated: `python -m benchmarks.training.evaluate easy-joint`."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastnegate import testbed
from fastnegate.testbed import easy, hard
from fastnegate.testbed.hard.scenes import draw_kind
from fastnegate.testbed.model import DEFAULT_GUIDANCE as GUIDANCE
from fastnegate.testbed.model import DEFAULT_STEPS as STEPS

from .hosts import Host, JointHost, of

PROMPTS = 64
BATCH = 64


def evaluate(folder: Path, world: str, host: Host, name: str) -> dict[str, Any]:
    """Draw `PROMPTS` fresh prompts: by their number of objects, the shares of objects and of pictures that
    the strict detector finds right. The first 32 pictures go to `folder`."""
    images, found = shares(host, PROMPTS, world)
    rows = [np.concatenate(images[i : i + 8], 1) for i in range(0, 32, 8)]
    sheet = Image.fromarray((np.concatenate(rows) * 255).round().astype(np.uint8))
    sheet.resize((2 * sheet.width, 2 * sheet.height), 0).save(folder / f"{name}.png")
    return found


def shares(
    host: Host, prompts: int, world: str, guidance: float = GUIDANCE, first: int = 900
) -> tuple[np.ndarray[Any, Any], dict[str, Any]]:
    """Pictures of fresh prompts and, by their number of objects, the shares of objects and of pictures that
    the strict detector finds right; `first` is the seed of the prompts."""
    judged = (_easy if world == "easy" else _hard)(prompts, first)
    images = draw(host, [prompt for prompt, _ in judged], guidance).clip(0, 1)
    right: dict[int, list[list[bool]]] = defaultdict(list)
    for image, (_, found_in) in zip(images, judged, strict=True):
        found = found_in(image)
        right[len(found)].append(found)
    return images, {
        "objects": {n: round(float(np.mean(found)), 3) for n, found in sorted(right.items())},
        "right": {n: round(float(np.mean([all(f) for f in found])), 3) for n, found in sorted(right.items())},
    }


@torch.no_grad()
def draw(host: Host, prompts: list[str], guidance: float) -> np.ndarray[Any, Any]:
    """Pictures [n, S, S, 3], one seed each; a guidance of 1 is one pass a step."""
    pipe, parts = host.pipeline(), []
    scale = "true_cfg_scale" if isinstance(host, JointHost) else "guidance_scale"
    for at in range(0, len(prompts), BATCH):
        said = prompts[at : at + BATCH]
        noise = [torch.Generator().manual_seed(at + i) for i in range(len(said))]
        options: dict[str, Any] = {scale: guidance, "generator": noise, "num_inference_steps": STEPS}
        parts.append(pipe(said, negative_prompt=[""] * len(said), output_type="np", **options).images)
    return np.concatenate(parts)


def _easy(prompts: int, first: int) -> list[Any]:
    """Prompts, each with a function from a picture to which of its objects are there."""

    def found(image: Any, case: Any) -> list[bool]:
        seen = easy.detect(image, easy.STRICT)
        return [easy.kept(seen, [thing], case.concept) for thing in case.stays]

    return [(case.prompt, partial(found, case=case)) for case in easy.suite("benign", prompts, first)]


def _hard(prompts: int, first: int) -> list[Any]:
    def found(image: Any, kinds: Any) -> list[bool]:
        seen = [detection.kind for detection in hard.detect(image, hard.STRICT)]
        return [kind in seen for kind in kinds]

    rng = np.random.default_rng(first)
    judged = []
    for i in range(prompts):
        kinds = list(dict.fromkeys(draw_kind(rng) for _ in range(8)))[: 1 + i % 3]
        judged.append((hard.caption([hard.exactly(kind) for kind in kinds]), partial(found, kinds=kinds)))
    return judged


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training.evaluate", description=__doc__)
    parser.add_argument("host", choices=testbed.HOSTS)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--seed", type=int, default=4242, help="of the prompts")
    parser.add_argument("--guidance", type=float, default=GUIDANCE, help="1: one pass a step")
    options = parser.parse_args()
    host = of(testbed.load(options.host))
    _, found = shares(host, options.prompts, options.host.partition("-")[0], options.guidance, options.seed)
    said = {"host": options.host, "guidance": options.guidance, "prompts": options.prompts}
    print(json.dumps({**said, **found}))


if __name__ == "__main__":
    main()
