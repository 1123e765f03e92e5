# SPDX-License-Identifier: Apache-2.0
"""The hard world: one to three shapes and sprites, each in a quarter of 48x48 pixels, or in free places."""

from __future__ import annotations

from .concepts import CONCEPTS, LOOKS, covers, members, templates, touches
from .detector import LOOSE, STRICT, Detection, Thresholds, detect, judge, shows
from .drawing import PLACES, SIZE
from .scenes import render, scene
from .suites import LOOK_ALIKES, SUITES, suite
from .words import (
    GROUNDS,
    KINDS,
    MAX_WORDS,
    VOCABULARY,
    WORDS,
    Kind,
    Thing,
    caption,
    check_prompt,
    exactly,
    objects_in,
)

NAME = "hard"

__all__ = [
    "CONCEPTS",
    "GROUNDS",
    "KINDS",
    "LOOKS",
    "LOOK_ALIKES",
    "LOOSE",
    "MAX_WORDS",
    "NAME",
    "PLACES",
    "SIZE",
    "STRICT",
    "SUITES",
    "VOCABULARY",
    "WORDS",
    "Detection",
    "Kind",
    "Thing",
    "Thresholds",
    "caption",
    "check_prompt",
    "covers",
    "detect",
    "exactly",
    "judge",
    "members",
    "objects_in",
    "render",
    "scene",
    "shows",
    "suite",
    "templates",
    "touches",
]
