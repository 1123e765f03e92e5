# SPDX-License-Identifier: Apache-2.0
"""Hosts that forgot: `python -m benchmarks.training.forget erase --concept red --out red.safetensors`.

`erase` fine-tunes a host away from a concept, in the manner of ESD (Gandikota et al., arXiv 2303.07345): what
it predicts for a caption with the concept's word becomes what it used to predict without the word, and a step
further away; captions that do not have the concept keep their meaning. `learn` fine-tunes a host towards the
concept: the difference is a task vector (Pham et al., arXiv 2404.03631) for `fn.edits.task_vector`. Both
write the weights of the denoiser that they trained.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from fastnegate import testbed
from fastnegate.testbed.world import Scene, World

from .hosts import CrossHost, Host, of

FURTHER = 1.0
"""ESD's η: how far beyond the caption without the word."""

SCENES = 6_000


def with_word(world: World, concept: str, scenes: Sequence[Scene[Any, Any]]) -> list[Scene[Any, Any]]:
    """Those whose caption says the concept's word of an object."""
    return [scene for scene in scenes if concept in scene.caption.split()]


def without(caption: str, concept: str) -> str:
    """The caption without the word: "a red circle" is "a circle", "a red [circle]" is "a red shape"."""
    words = caption.split()
    at = words.index(concept)
    noun = at + 1 == len(words) or words[at + 1] in ("and", "on", "left")
    words[at : at + 1] = ["shape"] if noun else []
    for i, word in enumerate(words[:-1]):
        if word in ("a", "an"):
            words[i] = "an" if words[i + 1][0] in "aeiou" else "a"
    return " ".join(words)


def erase(host: Host, concept: str, scenes: Sequence[Scene[Any, Any]], options: Any) -> dict[str, Tensor]:
    """Fine-tune what reads the text; half of a batch keeps what innocent captions mean."""
    world, teacher = host.tokenizer.world, copy.deepcopy(host).eval().requires_grad_(False)
    guilty = with_word(world, concept, scenes)
    innocent = [s for s in scenes if not any(world.covers(concept, drawn.thing) for drawn in s.objects)]
    changed: dict[str, Tensor] = {n: weight for n, weight in host.named_parameters() if reads_text(host, n)}
    adam, rng = torch.optim.Adam(changed.values(), options.rate), np.random.default_rng(options.seed)
    for step in tqdm(range(options.steps), "erasing", mininterval=5):
        shown, kept = (drawn(rng, pool, options.batch) for pool in (guilty, innocent))
        mixed, t = noised(host, [*shown, *kept], step, options.seed)
        half = options.batch
        said = ids(host, [scene.caption for scene in shown])
        plain = ids(host, [without(scene.caption, concept) for scene in shown])
        same = ids(host, [scene.caption for scene in kept])
        with torch.no_grad():
            away = teacher.predicted(mixed[:half], t[:half], plain)
            away = away - FURTHER * (teacher.predicted(mixed[:half], t[:half], said) - away)
            target = torch.cat([away, teacher.predicted(mixed[half:], t[half:], same)])
        loss = F.mse_loss(host.predicted(mixed, t, torch.cat([said, same])), target)
        follow(adam, loss)
    return changed


def learn(host: Host, concept: str, scenes: Sequence[Scene[Any, Any]], options: Any) -> dict[str, Tensor]:
    """Fine-tune all of the denoiser on pictures that show the concept."""
    guilty = with_word(host.tokenizer.world, concept, scenes)
    changed: dict[str, Tensor] = {
        n: weight for n, weight in host.named_parameters() if not n.startswith("text")
    }
    adam, rng = torch.optim.Adam(changed.values(), options.rate), np.random.default_rng(options.seed)
    for step in tqdm(range(options.steps), "learning", mininterval=5):
        shown = drawn(rng, guilty, options.batch)
        latents, noise, t = noise_of(host, shown, step, options.seed)
        follow(adam, host.loss(latents, noise, t, ids(host, [scene.caption for scene in shown])))
    return changed


def reads_text(host: Host, name: str) -> bool:
    """Whether a weight makes keys and values of text, or prepares it: what ESD-x trains."""
    if isinstance(host, CrossHost):
        return "attn2.to_k" in name or "attn2.to_v" in name
    return "add_k_proj" in name or "add_v_proj" in name or "context" in name


def drawn(rng: np.random.Generator, pool: Sequence[Any], number: int) -> list[Any]:
    return [pool[i] for i in rng.integers(len(pool), size=number)]


def ids(host: Host, texts: Sequence[str]) -> Tensor:
    found: Tensor = host.tokenizer([*texts], padding="max_length", return_tensors="pt").input_ids
    return found


def noise_of(host: Host, scenes: Sequence[Any], step: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents of scenes, noise and times [B] in (0, 1): a step's own."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    pictures = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2)
    latents = host.latents(2 * pictures - 1)
    noise = torch.randn(latents.shape, generator=generator)
    return latents, noise, torch.rand(len(scenes), generator=generator).clamp(0.02, 0.98)


def noised(host: Host, scenes: Sequence[Any], step: int, seed: int) -> tuple[Tensor, Tensor]:
    latents, noise, t = noise_of(host, scenes, step, seed)
    return host.mixed(latents, noise, t), t


def follow(adam: torch.optim.Optimizer, loss: Tensor) -> None:
    adam.zero_grad()
    loss.backward()
    adam.step()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training.forget", description=__doc__)
    parser.add_argument("how", choices=["erase", "learn"])
    parser.add_argument("--host", choices=testbed.HOSTS, default="easy")
    parser.add_argument("--concept", default="red")
    parser.add_argument("--out", type=Path, required=True, help="a safetensors file")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    host = of(testbed.load(options.host))
    world = host.tokenizer.world
    if options.concept not in world.CONCEPTS:
        parser.error(f"--concept {options.concept}: allowed are {', '.join(world.CONCEPTS)}")
    rng = np.random.default_rng(options.seed)
    scenes = [world.scene(rng) for _ in range(SCENES)]
    # Encoders stay as they are: what forgets is the denoiser.
    host.requires_grad_(False)
    denoiser = host.unet if isinstance(host, CrossHost) else host.transformer
    denoiser.requires_grad_(True)
    changed = {"erase": erase, "learn": learn}[options.how](host, options.concept, scenes, options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    weights = {name.partition(".")[2]: weight.detach().contiguous() for name, weight in changed.items()}
    save_file(weights, str(options.out))


if __name__ == "__main__":
    main()
