# SPDX-License-Identifier: Apache-2.0
"""`Policy`: what one request negates, how strongly, and during which part of the denoising."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..operator.rule import Rule, check_number


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
        negative_prompt: a text that is negated like a concept; the engine encodes it once, with the
            pipeline's text encoder, when it first meets it.
        negative_strength: the relative strength of `negative_prompt`.

    Raises:
        ValueError: a number outside these ranges (strengths must be >= 0), an empty window, or a
            blank negative prompt.
        TypeError: `concepts` or `negative_prompt` of another type.
    """

    concepts: Mapping[str, float] = field(default_factory=dict)
    start: float = 0.0
    stop: float | None = None
    threshold: float | None = None
    negative_prompt: str | None = None
    negative_strength: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.concepts, Mapping):
            raise TypeError(f"concepts={self.concepts!r}: must map concept names to strengths")
        object.__setattr__(self, "concepts", dict(self.concepts))  # the caller's may change
        for name, strength in self.concepts.items():
            check_number(f"strength of {name!r}", strength, low=0.0)
        check_number("start", self.start, low=0.0, high=1.0)
        if self.stop is not None:
            check_number("stop", self.stop, low=0.0, high=1.0)
            if self.start >= self.stop:
                raise ValueError(f"start={self.start!r}, stop={self.stop!r}: the window is empty")
        if self.threshold is not None:
            check_number("threshold", self.threshold)
        check_number("negative_strength", self.negative_strength, low=0.0)
        if self.negative_prompt is not None and not isinstance(self.negative_prompt, str):
            raise TypeError(f"negative_prompt={self.negative_prompt!r}: must be a text or None")
        if self.negative_prompt is not None and not self.negative_prompt.strip():
            raise ValueError(f"negative_prompt={self.negative_prompt!r}: is blank; None negates nothing")

    @property
    def asks(self) -> bool:
        """Whether it asks for any negation: some strength is above 0."""
        return self.text is not None or any(strength > 0 for strength in self.concepts.values())

    @property
    def text(self) -> str | None:
        """The negative prompt that needs to be encoded."""
        return self.negative_prompt if self.negative_strength > 0 else None

    def check(self, rule: Rule) -> None:
        """Raise ValueError if this policy could not act under `rule`."""
        stop = rule.stop if self.stop is None else self.stop
        if self.start >= stop:
            raise ValueError(f"start={self.start!r}: the window of rule {rule.name!r} ends at {stop:g}")
        if self.threshold is None:
            return
        if rule.gate == "open":
            raise ValueError(f"threshold={self.threshold!r}: rule {rule.name!r} has no gate")
        if rule.width is None and self.threshold >= 1.0:
            raise ValueError(f"threshold={self.threshold!r}: rule {rule.name!r} needs one below 1")

    def active(self, progress: float, default_stop: float) -> float:
        """The schedule value at `progress` = i / n: 1.0 inside the window, else 0.0."""
        stop = default_stop if self.stop is None else self.stop
        return float(self.start <= progress < stop)

    def always(self, default_stop: float) -> bool:
        """Whether the window is the whole denoising, so that progress need not be known."""
        return self.start == 0.0 and (default_stop if self.stop is None else self.stop) == 1.0
