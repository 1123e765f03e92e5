# SPDX-License-Identifier: Apache-2.0
"""Train a host of the testbed: `python -m benchmarks.training easy-joint --out build/easy-joint`.

The log and the pictures of every evaluation, the state to resume from and, at the end, the weights in
float16 go to the folder. A run that was stopped goes on with `--resume`, as if it had not been.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastnegate.testbed.parts import EasyTokenizer, HardTokenizer, tokenizer_of

from .evaluate import evaluate
from .hosts import CrossHost, Host, JointHost
from .loop import Recipe, train
from .scenes import SCENES, scenes

HOSTS: dict[str, Callable[[], Host]] = {
    "easy-joint": lambda: JointHost.untrained(4, 4, 32, 2, 3, tokenizer_of(EasyTokenizer)),
    "hard": lambda: CrossHost.untrained(6, (48, 80), tokenizer_of(HardTokenizer)),
    "hard-joint": lambda: JointHost.untrained(6, 3, 48, 2, 3, tokenizer_of(HardTokenizer), picture=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("host", choices=HOSTS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--world", choices=SCENES, help="the host's, where it has one way to place objects")
    parser.add_argument("--pictures", type=int, default=400_000, help="to train on, repeats counted")
    parser.add_argument("--scenes", type=int, default=60_000, help="different ones")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--shift", type=float, default=1.0, help="above 1: more of the pictures are noisy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--minutes", type=float, default=math.inf, help="then stop, to be resumed")
    arguments = parser.parse_args()
    world = arguments.world or {"easy-joint": "easy"}.get(arguments.host, "hard-grid")
    if world.partition("-")[0] != arguments.host.partition("-")[0]:
        parser.error(f"--world {world}: not a world of {arguments.host}")
    if not arguments.shift > 0:
        parser.error(f"--shift {arguments.shift}: must be above 0")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    host: Any = HOSTS[arguments.host]()
    data = scenes(world, arguments.scenes, arguments.seed, arguments.out.parent / "scenes")
    recipe = Recipe(arguments.pictures, arguments.batch, seed=arguments.seed, shift=arguments.shift)
    averaged = train(
        host, data, recipe, arguments.out, partial(evaluate, arguments.out, world),
        arguments.device, arguments.compile, arguments.resume, arguments.minutes,
    )  # fmt: skip
    averaged.half().pipeline().save_pretrained(arguments.out / "weights")


if __name__ == "__main__":
    main()
