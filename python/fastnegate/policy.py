# SPDX-License-Identifier: Apache-2.0
"""`Policy`: what one request negates, how strongly, and during which part of the denoising."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .rule import check_number


@dataclass(frozen=True)
class Policy:
    """What one request negates.

    Args:
        concepts: concept name -> relative strength: 1.0 is the rule's own strength, 0 creates no
            entry.
        start, stop: the active window as fractions of the denoising steps: step i of n is active if
            `start <= i / n < stop`. `stop=None` is the rule's own (1.0, i.e. to the end, for all
            presets but `eiup`).
        threshold: gate threshold instead of the rule's.

    Raises:
        ValueError: a number outside these ranges; strengths must be >= 0.
    """

    concepts: Mapping[str, float] = field(default_factory=dict)
    start: float = 0.0
    stop: float | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "concepts", dict(self.concepts))  # the caller's may change
        for name, strength in self.concepts.items():
            check_number(f"strength of {name!r}", strength, low=0.0)
        check_number("start", self.start, low=0.0, high=1.0)
        if self.stop is not None:
            check_number("stop", self.stop, low=0.0, high=1.0)
        if self.threshold is not None:
            check_number("threshold", self.threshold)

    def active(self, progress: float, default_stop: float) -> float:
        """The schedule value at `progress` = i / n: 1.0 inside the window, else 0.0."""
        stop = default_stop if self.stop is None else self.stop
        return float(self.start <= progress < stop)

    def always(self, default_stop: float) -> bool:
        """Whether the window is the whole denoising, so that progress need not be known."""
        return self.start == 0.0 and (default_stop if self.stop is None else self.stop) == 1.0
