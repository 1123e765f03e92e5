# SPDX-License-Identifier: Apache-2.0
"""This package as a technique of the public harness eval-unlearn (entry points `eval_unlearn.techniques`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ...engine.bank import ConceptBank
from ...integrations.diffusers.install import negate
from ..model import HOSTS, load

if TYPE_CHECKING:
    from PIL.Image import Image


class Technique:
    """What the harness asks of a technique: made of a configuration, it draws prompts without a concept.

    Args:
        erase_concept: words for it.
        model_id: one of `testbed.HOSTS`, or what `DiffusionPipeline.from_pretrained` takes.
        members: phrases that make up the concept, in place of its own words.
        method: a preset.
        strength: as for `fastnegate.negate`.
        device: where to draw; by default a GPU where there is one.
        batch: pictures that are drawn together.
        call: further arguments of the pipeline's calls.

    Raises:
        As `ConceptBank.from_prompts`.
    """

    def __init__(
        self,
        erase_concept: str,
        model_id: str = "easy",
        members: Sequence[str] | None = None,
        method: str = "protore",
        strength: float = 1.0,
        device: str | None = None,
        batch: int = 8,
        **call: Any,
    ) -> None:
        if model_id in HOSTS:
            self.pipe: Any = load(model_id)
        else:
            from diffusers import DiffusionPipeline

            self.pipe = DiffusionPipeline.from_pretrained(model_id)
        self.pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.bank = ConceptBank.from_prompts(self.pipe, {erase_concept: members or erase_concept})
        self.method, self.strength, self.batch, self.call = method, strength, batch, call

    def generate(self, prompts: Sequence[str], seed: int | None = None, **call: Any) -> list[Image]:
        """A picture of each prompt; the noise of picture i is that of `seed` + i.

        Raises:
            As the pipeline; and whatever says that the negation could not be applied.
        """
        images: list[Image] = []
        with negate(self.pipe, self.bank, self.method, strength=self.strength):
            for first in range(0, len(prompts), self.batch):
                some = list(prompts[first : first + self.batch])
                noise = None
                if seed is not None:
                    noise = [torch.Generator().manual_seed(seed + first + i) for i in range(len(some))]
                images += self.pipe(prompt=some, generator=noise, **{**self.call, **call}).images
        return images
