# SPDX-License-Identifier: Apache-2.0
"""`Proof`: what negation did for one request, as an answer can carry it. A server that knows no negation
ignores a policy and answers all the same: only what the answer says tells them apart."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import NegationNotAppliedError
from ..policy import Policy, shortened


@dataclass(frozen=True)
class Proof:
    """What negation did for one request.

    Attributes:
        rule: the name of the engine's rule.
        bank: `ConceptBank.digest` of what the last denoiser call read; "" if none came by.
        steps: denoising steps that ran, of all pipeline calls of the batch.
        concepts: the concepts that acted -> at how many of the steps.
        negative_prompt: at how many of them the request's negative prompt acted.

    Raises:
        ValueError: a count of another type, or out of range.
    """

    rule: str
    bank: str
    steps: int
    concepts: Mapping[str, int]
    negative_prompt: int = 0

    def __post_init__(self) -> None:
        counts = {"steps": self.steps, "negative_prompt": self.negative_prompt, **self.concepts}
        for name, count in counts.items():
            if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= self.steps:
                raise ValueError(f"{name}={shortened(repr(count))}: must be a number of the steps")

    @classmethod
    def from_json(cls, form: object) -> Proof:
        """The proof in an answer: `form` is what `json.loads` made of it.

        Raises:
            NegationNotAppliedError: it is none, as that of a server that knows no negation.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(form, Mapping) or sorted(form) != sorted(names):
            raise NegationNotAppliedError(f"the answer proves nothing: {shortened(repr(form))}")
        texts, concepts = (form["rule"], form["bank"], *form["concepts"]), form["concepts"]
        if not isinstance(concepts, Mapping) or not all(isinstance(text, str) for text in texts):
            raise NegationNotAppliedError(f"the answer's proof is none: {shortened(repr(form))}")
        if not re.fullmatch("[0-9a-f]{64}", form["bank"]):
            raise NegationNotAppliedError(f"the answer's proof has bank={shortened(repr(form['bank']))}")
        try:
            return cls(**{**form, "concepts": dict(concepts)})
        except (TypeError, ValueError) as error:
            raise NegationNotAppliedError(f"the answer's proof has {error}") from error

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return {**asdict(self), "concepts": dict(self.concepts)}

    def check(self, policy: Policy | None, *, bank: str | None = None) -> None:
        """Raise unless what `policy` asks for acted at some step at least, and nothing else did.

        Args:
            policy: what was asked for; None: nothing.
            bank: the digest that the bank should have; None: any.

        Raises:
            NegationNotAppliedError: another concept, or none, or no step, or another bank.
        """
        policy = policy or Policy()
        asked = sorted(name for name, strength in policy.concepts.items() if strength > 0)
        acted = sorted(name for name, steps in self.concepts.items() if steps)
        if asked != acted:
            raise NegationNotAppliedError(f"asked to negate {asked or 'nothing'}: {acted or 'nothing'} acted")
        if (policy.text is not None) != (self.negative_prompt > 0):
            raise NegationNotAppliedError(
                f"negative_prompt={policy.negative_prompt!r} acted at {self.negative_prompt} steps"
            )
        if not self.steps:
            raise NegationNotAppliedError("no denoising step ran")
        if bank is not None and bank != self.bank:
            raise NegationNotAppliedError(f"bank {self.bank} was read: asked for was {bank}")
