# SPDX-License-Identifier: Apache-2.0
"""`Policy`: what one request negates, how strongly, and during which part of the denoising."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..operator.rule import Rule, check_number
from ..operator.tokens import entry_numbers

# What a form that came over the wire may hold.
MOST_CONCEPTS, LONGEST_NAME, LONGEST_PROMPT = 64, 200, 2000


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

    @classmethod
    def from_json(cls, form: object) -> Policy:
        """The policy that a client wrote: `form` is what `json.loads` made of it. Fields are those of the
        class, all optional: {"concepts": {"disney": 1.0}, "stop": 0.8}.

        Raises:
            ValueError: no object, a field that there is not, a value that the class refuses, more than 64
                concepts, a name of more than 200 characters or a negative prompt of more than 2000.
        """
        if not isinstance(form, Mapping):
            raise ValueError(f"policy is a {type(form).__name__}: must be an object")
        known = [field.name for field in fields(cls)]
        for name in form:
            if name not in known:
                raise ValueError(f"policy has {shortened(repr(name))}: its fields are {', '.join(known)}")
        concepts, text = form.get("concepts", {}), form.get("negative_prompt")
        if not isinstance(concepts, Mapping):
            raise ValueError(f"concepts is a {type(concepts).__name__}: must map concept names to strengths")
        if len(concepts) > MOST_CONCEPTS:
            raise ValueError(f"concepts has {len(concepts)} names: at most {MOST_CONCEPTS} are allowed")
        for name in concepts:
            if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME:
                shown = shortened(repr(name))
                raise ValueError(f"concept {shown}: a name has 1 to {LONGEST_NAME} characters")
        if isinstance(text, str) and len(text) > LONGEST_PROMPT:
            raise ValueError(
                f"negative_prompt has {len(text)} characters: at most {LONGEST_PROMPT} are allowed"
            )
        try:
            return cls(**form)
        except (TypeError, ValueError) as error:  # to a server, what a client wrote is one kind of error
            raise ValueError(shortened(error)) from error

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads: the fields that are not as the class has them by default."""
        default = Policy()
        form = {f.name: getattr(self, f.name) for f in fields(self)}
        form = {name: value for name, value in form.items() if value != getattr(default, name)}
        return {name: dict(value) if name == "concepts" else value for name, value in form.items()}

    @property
    def asks(self) -> bool:
        """Whether it asks for any negation: some strength is above 0."""
        return self.text is not None or any(strength > 0 for strength in self.concepts.values())

    @property
    def text(self) -> str | None:
        """The negative prompt that needs to be encoded."""
        return self.negative_prompt if self.negative_strength > 0 else None

    def check(self, rule: Rule, steps: int | None = None) -> None:
        """Raise ValueError if this policy could not act under `rule`, or in a schedule of so many steps."""
        stop = rule.stop if self.stop is None else self.stop
        if self.start >= stop:
            raise ValueError(f"start={self.start!r}: the window of rule {rule.name!r} ends at {stop:g}")
        if steps is not None and not any(self.active(i / steps, rule.stop) for i in range(steps)):
            raise ValueError(
                f"start={self.start!r}, stop={stop:g}: the window holds none of the {steps} steps, of which "
                f"step i is at i / {steps}"
            )
        if self.threshold is None:
            return
        if rule.gate == "open":
            raise ValueError(f"threshold={self.threshold!r}: rule {rule.name!r} has no gate")
        if rule.width is None and self.threshold >= 1.0:
            raise ValueError(f"threshold={self.threshold!r}: rule {rule.name!r} needs one below 1")

    def numbers(self, called: str, strength: float, rule: Rule) -> list[float]:
        """Of an entry with this relative strength, before any step (`ConceptTokens.numbers`). Raises
        ValueError, which names what it is `called`, for numbers that float32 does not hold."""
        given = {"strength": strength * rule.strength, "active": 0.0}
        if self.threshold is not None:
            given["threshold"] = self.threshold
        return entry_numbers(called, given)

    def active(self, progress: float, default_stop: float) -> float:
        """The schedule value at `progress` = i / n: 1.0 inside the window, else 0.0."""
        stop = default_stop if self.stop is None else self.stop
        return float(self.start <= progress < stop)

    def always(self, default_stop: float) -> bool:
        """Whether the window is the whole denoising, so that progress need not be known."""
        return self.start == 0.0 and (default_stop if self.stop is None else self.stop) == 1.0


def shortened(words: object) -> str:
    """As a message shows what somebody may have made long."""
    return text if len(text := str(words)) <= 300 else f"{text[:300]}..."
