# SPDX-License-Identifier: Apache-2.0
"""Families x features, as docs/models.md shows them: from the tables that the tests go through."""

from __future__ import annotations

from typing import Any

from caches import CACHES
from features import FAMILIES, FEATURES, Family, Feature, has_caches

from fastnegate.integrations.diffusers.families import TABLE

NONE = "–"  # diffusers does not have it, or fails itself


def matrix() -> str:
    """A table in Markdown."""
    pipes = [family.build() for family in FAMILIES]
    rows = [["", *(family.name for family in FAMILIES)], ["---"] * (len(pipes) + 1)]
    for feature in FEATURES:
        rows.append([feature.name, *(_verdict(feature, *column) for column in zip(FAMILIES, pipes))])
    for cache in CACHES:
        has = [has_caches(pipe) and cache.name not in family.fails for family, pipe in zip(FAMILIES, pipes)]
        rows.append([cache.name, *("right" if there else NONE for there in has)])
    rows.append(["guiders", *("right" if _has_guiders(pipe) else NONE for pipe in pipes)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _verdict(feature: Feature, family: Family, pipe: Any) -> str:
    if not feature.offered(pipe) or feature.name in family.fails:
        return NONE
    return "right" if feature.refused(pipe) is None else "refused"


def _has_guiders(pipe: Any) -> bool:
    """Whether there is a pipeline made of blocks around its parts."""
    kind = type(pipe).__name__
    return any(entry.guider and entry.encoder == kind for entry in TABLE.values())
