# SPDX-License-Identifier: Apache-2.0
"""What a host that forgot still shows, and what a negation still removes there (INE, arXiv 2511.04834):

    python -m benchmarks.quality.forgot --concept red --erased red.safetensors --learned learned.safetensors

A line per host: as it was, fine-tuned to forget, and after subtraction of the task vector. How many pictures
show the concept: where the prompt says its word; where it means it by another (an alias); where tokens stand
that were learned from pictures *on that host*. Then the last two again under a negation that knows the
concept by its words, and by learned tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import fastnegate as fn
from fastnegate import testbed
from fastnegate.engine import host as engine_host
from fastnegate.engine.concepts import Concept

from ..tables import table
from .hosts import Host, load

CASES = 24
PICTURES = 64
COLUMNS = (
    *("host", "word", "kept", "alias", "learned", "alias, negated by words", "by learned tokens"),
    *("learned, negated by words", "by learned tokens "),
)


def cases_of(host: Host, suite: str, concept: str) -> list[Any]:
    """The first cases of a suite that are about this concept."""
    return [case for case in host.world.suite(suite, 60 * CASES, 0) if case.concepts == (concept,)][:CASES]


def pictures_of(host: Host, concept: str) -> list[Image.Image]:
    """Scenes of one object, which shows the concept and is said to."""
    rng = np.random.default_rng(7)
    found: list[Image.Image] = []
    while len(found) < PICTURES:
        scene = host.world.scene(rng)
        if len(scene.objects) == 1 and concept in scene.caption.split():
            found.append(Image.fromarray((255 * scene.image).round().astype(np.uint8)))
    return found


def images_of(host: Host, number: int, **prompt: Any) -> Any:
    generator = [torch.Generator().manual_seed(i) for i in range(number)]
    return host.pipe(generator=generator, output_type="np", **prompt, **host.call).images.clip(0, 1)


def seen(host: Host, images: Any, concept: str) -> float:
    """Share of pictures in which the loose detector finds the concept."""
    world: Any = host.world
    return float(np.mean([world.shows(world.detect(image, world.LOOSE), concept) for image in images]))


def measured(name: str, host: Host, concept: str, steps: int) -> list[str]:
    """The host's line of the table."""
    learned = fn.invert(
        host.pipe, pictures_of(host, concept), caption="a {} shape", steps=steps, rate=0.02, batch=8
    )
    words = fn.ConceptBank.from_prompts(
        host.pipe, {concept: host.world.members(concept)}, templates=host.world.templates
    )
    tokens = fn.ConceptBank({concept: learned}, words.fingerprint, host.pipe)
    named = cases_of(host, "colour" if concept in testbed.easy.world.COLORS else "shape", concept)
    hidden = cases_of(host, "implicit", concept)
    verdicts = [
        host.world.judge(image, case)
        for image, case in zip(
            images_of(host, len(named), prompt=[case.prompt for case in named]), named, strict=True
        )
    ]
    alias = {"prompt": [case.prompt for case in hidden]}
    taught = text_of(host, learned, len(named))
    shares = [1 - np.mean([v.gone for v in verdicts]), np.mean([v.kept for v in verdicts])]
    asked: list[tuple[int, Any]] = [(len(hidden), alias), (len(named), taught)]
    shares += [seen(host, images_of(host, number, **prompt), concept) for number, prompt in asked]
    for number, prompt in asked:
        for bank in (words, tokens):
            with fn.negate(host.pipe, bank, method="protore"):
                shares.append(seen(host, images_of(host, number, **prompt), concept))
    return [name, *(f"{100 * share:.0f} %" for share in shares)]


def text_of(host: Host, learned: Concept, number: int) -> dict[str, Tensor]:
    """A prompt of learned tokens, `number` times, as the pipeline takes encoded ones."""
    before, after = engine_host.of(host.pipe).denoising(host.pipe).around("a {} shape")
    text = torch.cat([before, learned.prompt.to(before), after])  # ends in padding: as long as other texts
    text = text[: host.pipe.tokenizer.model_max_length].expand(number, -1, -1)
    prompt = {"prompt_embeds": text}
    if not hasattr(host.pipe, "unet"):
        prompt["pooled_prompt_embeds"] = host.pipe.encode_prompt("a shape", None)[1].expand(number, -1)
    return prompt


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser("benchmarks.quality.forgot", description=__doc__.splitlines()[0])
    parser.add_argument("--host", choices=testbed.HOSTS, default="easy")
    parser.add_argument("--concept", default="red")
    parser.add_argument("--erased", type=Path, help="weights of `python -m benchmarks.training.forget erase`")
    parser.add_argument(
        "--learned", type=Path, help="weights of `python -m benchmarks.training.forget learn`"
    )
    parser.add_argument("--strength", type=float, nargs="+", default=[1.0], help="of the task vector")
    parser.add_argument("--steps", type=int, default=300, help="of inversion")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    lines = []

    def line(name: str, host: Host) -> None:
        lines.append(measured(name, host, options.concept, options.steps))
        print(" | ".join(lines[-1]), flush=True)

    line("as it was", load(options.host))
    if options.erased is not None:
        host = load(options.host)
        weights: Mapping[str, Tensor] = load_file(options.erased)
        denoiser = host.pipe.unet if hasattr(host.pipe, "unet") else host.pipe.transformer
        denoiser.load_state_dict(dict(weights), strict=False)
        line("erased", host)
    if options.learned is not None:
        for strength in options.strength:
            host = load(options.host)
            with fn.edits.task_vector(host.pipe, load_file(options.learned), strength):
                line(f"task vector x {strength:g}", host)
    print(table(COLUMNS, lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
