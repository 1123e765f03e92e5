# SPDX-License-Identifier: Apache-2.0
"""What methods learn of a concept from its pictures: embeddings, for INE, and weights, for task vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...engine.concepts import Concept
from ...engine.host import of
from ...engine.inversion import invert
from ...integrations.diffusers.contract import bare, denoiser
from ..world import Scene, World

PICTURES = 32
"""Of a concept, to learn from: each of one object, by whose words it is sure to show the concept."""


class Adam(NamedTuple):
    """How a concept is learned."""

    steps: int
    batch: int
    rate: float


EMBEDDINGS = Adam(steps=300, batch=8, rate=2e-2)
WEIGHTS = Adam(steps=150, batch=16, rate=5e-4)

_SEED = 7
_MOST_SCENES = 30_000  # are drawn in search of those with one object


class Learned:
    """What was learned, by the words that say the concept.

    Args:
        pipe: a pipeline of the testbed.
        world: what it draws.
        identity: changes with the pipeline's weights.
        folder: where it is kept, as a file for each concept; None: in memory.
    """

    def __init__(self, pipe: Any, world: World, identity: str, folder: Path | None) -> None:
        self._pipe, self._world, self._identity, self._folder = pipe, world, identity, folder
        self._in_memory: dict[str, dict[str, Tensor]] = {}
        self._keys: dict[tuple[str, ...], str] = {}
        self._alone: list[Scene[Any, Any]] = []
        self._scenes = self._drawn()

    def concept(self, words: Sequence[str]) -> Concept:
        """One embedding for all that the words mean, by `fastnegate.invert`."""
        learned = self._kept("embeddings", words)["embeddings"]
        return Concept.from_embeddings(learned)

    def weights(self, words: Sequence[str]) -> dict[str, Tensor]:
        """The denoiser's state dict after it was trained on what the words mean."""
        return self._kept("weights", words)

    def key(self, what: str, words: Sequence[str]) -> str:
        """Changes with the host, the pictures and the way in which "embeddings" or "weights" are learned."""
        asked = (what, *words)
        if asked not in self._keys:
            how = (self._identity, {"embeddings": EMBEDDINGS, "weights": WEIGHTS}[what], [*words])
            digest = sha256(repr(how).encode())
            for scene in self._showing(words):
                digest.update(scene.caption.encode() + picture(scene).tobytes())
            self._keys[asked] = digest.hexdigest()[:16]
        return self._keys[asked]

    def _kept(self, what: str, words: Sequence[str]) -> dict[str, Tensor]:
        learn = {"embeddings": self._embeddings, "weights": self._weights}[what]
        key = self.key(what, words)
        if self._folder is None:
            if key not in self._in_memory:
                self._in_memory[key] = learn(words)
            return self._in_memory[key]
        file = self._folder / f"{what}-{key}.safetensors"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            beside = file.with_suffix(".new")
            save_file(learn(words), str(beside), metadata={"words": ", ".join(words)})
            beside.replace(file)
        found: dict[str, Tensor] = load_file(file)
        return found

    def _embeddings(self, words: Sequence[str]) -> dict[str, Tensor]:
        shown = [picture(scene) for scene in self._showing(words)]
        found = invert(self._pipe, shown, caption="a {}", seed=_SEED, **EMBEDDINGS._asdict())
        return {"embeddings": found.prompt.contiguous()}

    def _weights(self, words: Sequence[str]) -> dict[str, Tensor]:
        """Under the captions of the scenes; the pipeline's own weights are put back. A step sees one scene,
        since a batch has one caption, under many noises."""
        model, denoising = bare(denoiser(self._pipe)), of(self._pipe).denoising(self._pipe)
        own = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        adam = torch.optim.Adam(model.parameters(), WEIGHTS.rate)
        generator, batch = torch.Generator().manual_seed(_SEED), WEIGHTS.batch
        scenes = self._showing(words)
        latents = denoising.latents([picture(scene) for scene in scenes], None)
        try:
            for step in range(WEIGHTS.steps):
                at = step % len(scenes)
                text = torch.cat(denoising.around(scenes[at].caption + " {}")).expand(batch, -1, -1)
                shown = latents[at].expand(batch, *latents[at].shape)
                noise = torch.randn(shown.shape, generator=generator).to(shown)
                when = torch.rand(batch, generator=generator, dtype=torch.float64)
                adam.zero_grad()
                denoising.loss(shown, noise, when, text).backward()
                adam.step()
            return {name: weight.detach().clone() for name, weight in model.named_parameters()}
        finally:
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    weight.copy_(own[name])
                    weight.grad = None

    def _showing(self, words: Sequence[str]) -> list[Scene[Any, Any]]:
        """At most `PICTURES` that show what one of the words means.

        Raises:
            ValueError: none does.
        """
        found: list[Scene[Any, Any]] = []
        for scene in self._scenes_alone():
            if any(self._world.covers(word, scene.objects[0].thing) for word in words):
                found.append(scene)
            if len(found) == PICTURES:
                break
        if not found:
            raise ValueError(f"words={[*words]!r}: no scene shows one of them")
        return found

    def _scenes_alone(self) -> Iterator[Scene[Any, Any]]:
        """Those with one object: drawn when they are first asked for."""
        at = 0
        while True:
            if at == len(self._alone):
                following = next(self._scenes, None)
                if following is None:
                    return
                self._alone.append(following)
            yield self._alone[at]
            at += 1

    def _drawn(self) -> Iterator[Scene[Any, Any]]:
        rng = np.random.default_rng(_SEED)
        scenes = (self._world.scene(rng) for _ in range(_MOST_SCENES))
        return (scene for scene in scenes if len(scene.objects) == 1)


def picture(scene: Scene[Any, Any]) -> Image.Image:
    """As a file would have it."""
    return Image.fromarray((255 * scene.image).round().astype(np.uint8))
