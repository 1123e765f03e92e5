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
from fastnegate.testbed.quality import Stage

from ..tables import table

CASES = 24
PICTURES = 64
COLUMNS = (
    *("host", "word", "kept", "alias", "learned", "alias, negated by words", "by learned tokens"),
    *("learned, negated by words", "by learned tokens "),
)


def cases_of(stage: Stage, suite: str, concept: str) -> list[Any]:
    """The first cases of a suite that are about this concept."""
    return [case for case in stage.world.suite(suite, 60 * CASES, 0) if case.concepts == (concept,)][:CASES]


def pictures_of(stage: Stage, concept: str) -> list[Image.Image]:
    """Scenes of one object, which shows the concept and is said to."""
    rng = np.random.default_rng(7)
    found: list[Image.Image] = []
    while len(found) < PICTURES:
        scene = stage.world.scene(rng)
        if len(scene.objects) == 1 and concept in scene.caption.split():
            found.append(Image.fromarray((255 * scene.image).round().astype(np.uint8)))
    return found


def images_of(stage: Stage, number: int, **prompt: Any) -> Any:
    generator = [torch.Generator().manual_seed(i) for i in range(number)]
    call = {**prompt, **stage.call(number)}
    return stage.pipe(generator=generator, output_type="np", **call).images.clip(0, 1)


def seen(stage: Stage, images: Any, concept: str) -> float:
    """Share of pictures in which the loose detector finds the concept."""
    world: Any = stage.world
    return float(np.mean([world.shows(world.detect(image, world.LOOSE), concept) for image in images]))


def measured(name: str, stage: Stage, concept: str, steps: int) -> list[str]:
    """The host's line of the table."""
    learned = fn.invert(
        stage.pipe, pictures_of(stage, concept), caption="a {} shape", steps=steps, rate=0.02, batch=8
    )
    words = fn.ConceptBank.from_prompts(
        stage.pipe, {concept: stage.world.members(concept)}, templates=stage.world.templates
    )
    tokens = fn.ConceptBank({concept: learned}, words.fingerprint, stage.pipe)
    named = cases_of(stage, "colour" if concept in testbed.easy.world.COLORS else "shape", concept)
    hidden = cases_of(stage, "implicit", concept)
    verdicts = [
        stage.world.judge(image, case)
        for image, case in zip(
            images_of(stage, len(named), prompt=[case.prompt for case in named]), named, strict=True
        )
    ]
    alias = {"prompt": [case.prompt for case in hidden]}
    taught = text_of(stage, learned, len(named))
    shares = [1 - np.mean([v.gone for v in verdicts]), np.mean([v.kept for v in verdicts])]
    asked: list[tuple[int, Any]] = [(len(hidden), alias), (len(named), taught)]
    shares += [seen(stage, images_of(stage, number, **prompt), concept) for number, prompt in asked]
    for number, prompt in asked:
        for bank in (words, tokens):
            with fn.negate(stage.pipe, bank, method="protore"):
                shares.append(seen(stage, images_of(stage, number, **prompt), concept))
    return [name, *(f"{100 * share:.0f} %" for share in shares)]


def text_of(stage: Stage, learned: Concept, number: int) -> dict[str, Tensor]:
    """A prompt of learned tokens, `number` times, as the pipeline takes encoded ones."""
    before, after = engine_host.of(stage.pipe).denoising(stage.pipe).around("a {} shape")
    text = torch.cat([before, learned.prompt.to(before), after])  # ends in padding: as long as other texts
    text = text[: stage.pipe.tokenizer.model_max_length].expand(number, -1, -1)
    prompt = {"prompt_embeds": text}
    if not hasattr(stage.pipe, "unet"):
        prompt["pooled_prompt_embeds"] = stage.pipe.encode_prompt("a shape", None)[1].expand(number, -1)
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

    def line(name: str, stage: Stage) -> None:
        lines.append(measured(name, stage, options.concept, options.steps))
        print(" | ".join(lines[-1]), flush=True)

    line("as it was", Stage(options.host))
    if options.erased is not None:
        stage = Stage(options.host)
        weights: Mapping[str, Tensor] = load_file(options.erased)
        denoiser = stage.pipe.unet if hasattr(stage.pipe, "unet") else stage.pipe.transformer
        denoiser.load_state_dict(dict(weights), strict=False)
        line("erased", stage)
    if options.learned is not None:
        for strength in options.strength:
            stage = Stage(options.host)
            with fn.edits.task_vector(stage.pipe, load_file(options.learned), strength):
                line(f"task vector x {strength:g}", stage)
    print(table(COLUMNS, lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
