# SPDX-License-Identifier: Apache-2.0
"""Real, trained text-to-image models in the package, and a judge of what they draw.

`load(host)` gives a diffusers pipeline, small enough for a laptop and offline. `easy` is a Stable Diffusion
for 32x32 pictures of coloured shapes, `easy-joint` a FLUX for the same world; `suite` gives prompts with a concept to negate, `detect` and its
companions tell from a picture whether the concept is gone and the rest has stayed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .easy.concepts import CONCEPTS, covers, members, templates
from .easy.detector import (
    LOOSE,
    STRICT,
    Detection,
    Thresholds,
    detect,
    kept,
    objects_in,
    shows,
)
from .easy.suites import SUITES, Case, suite
from .easy.world import PromptObject, caption, check_prompt, render

if TYPE_CHECKING:
    from .model import DEFAULT_GUIDANCE, DEFAULT_STEPS, HOSTS, load

__all__ = [
    "CONCEPTS",
    "DEFAULT_GUIDANCE",
    "DEFAULT_STEPS",
    "HOSTS",
    "LOOSE",
    "STRICT",
    "SUITES",
    "Case",
    "Detection",
    "PromptObject",
    "Thresholds",
    "caption",
    "check_prompt",
    "covers",
    "detect",
    "kept",
    "load",
    "members",
    "objects_in",
    "render",
    "shows",
    "suite",
    "templates",
]


def __getattr__(name: str) -> Any:
    # Only the model needs diffusers: prompts and the detector work without it.
    if name in ("DEFAULT_GUIDANCE", "DEFAULT_STEPS", "HOSTS", "load"):
        from . import model

        return getattr(model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
