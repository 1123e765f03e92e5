# SPDX-License-Identifier: Apache-2.0
"""The easy world: one or two coloured shapes in fixed places, 32x32 pixels."""

from __future__ import annotations

from .concepts import CONCEPTS, covers, members, templates
from .detector import LOOSE, STRICT, Detection, Thresholds, detect, judge, kept, objects_in, shows
from .suites import LOOK_ALIKES, SUITES, suite
from .world import MAX_WORDS, SIZE, VOCABULARY, WORDS, PromptObject, caption, check_prompt, render, scene

NAME = "easy"

__all__ = [
    "CONCEPTS",
    "LOOK_ALIKES",
    "LOOSE",
    "MAX_WORDS",
    "NAME",
    "SIZE",
    "STRICT",
    "SUITES",
    "VOCABULARY",
    "WORDS",
    "Detection",
    "PromptObject",
    "Thresholds",
    "caption",
    "check_prompt",
    "covers",
    "detect",
    "judge",
    "kept",
    "members",
    "objects_in",
    "render",
    "scene",
    "shows",
    "suite",
    "templates",
]
