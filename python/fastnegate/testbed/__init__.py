# SPDX-License-Identifier: Apache-2.0
"""Real, trained text-to-image models in the package, and judges of what they draw.

`load(host)` gives a diffusers pipeline, small enough for a laptop and offline: `easy` is a Stable Diffusion
for 32x32 pictures of coloured shapes. The worlds that the models know are packages of their own, `easy` and
`hard`: prompts with a concept to negate (`suite`), and a detector that tells from a picture whether the
concept is gone and the rest has stayed (`judge`). The names here are the easy world's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from . import easy, hard
from .cases import Case
from .easy import (
    CONCEPTS,
    LOOSE,
    STRICT,
    SUITES,
    Detection,
    PromptObject,
    Thresholds,
    caption,
    check_prompt,
    covers,
    detect,
    judge,
    kept,
    members,
    objects_in,
    render,
    shows,
    suite,
    templates,
)
from .verdict import Verdict
from .world import Scene, World

if TYPE_CHECKING:
    from .model import DEFAULT_GUIDANCE, DEFAULT_STEPS, HOSTS, load

WORLDS: Mapping[str, World] = {"easy": easy, "hard": hard}
"""The worlds by their names."""

__all__ = [
    "CONCEPTS",
    "DEFAULT_GUIDANCE",
    "DEFAULT_STEPS",
    "HOSTS",
    "LOOSE",
    "STRICT",
    "SUITES",
    "WORLDS",
    "Case",
    "Detection",
    "PromptObject",
    "Scene",
    "Thresholds",
    "Verdict",
    "World",
    "caption",
    "check_prompt",
    "covers",
    "detect",
    "easy",
    "hard",
    "judge",
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
