# SPDX-License-Identifier: Apache-2.0
"""What requests ask for, looked at before any work; and calls that nobody spoke for."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ...operator.rule import Rule
from ..bank import ConceptBank
from ..errors import NegationNotAppliedError, RowMapError
from ..policy import Policy

log = logging.getLogger("fastnegate")
UNASKED = ("plain", "raise")


def checked(
    policies: Sequence[Policy | None], bank: ConceptBank, rule: Rule, most: int
) -> tuple[Policy | None, ...]:
    """Policies, one per request, as they can be served.

    Raises:
        TypeError: something else than policies.
        RowMapError: more than `most`.
        ValueError: a concept that the bank does not have, or numbers with which the rule could not act.
    """
    if isinstance(policies, Policy):
        raise TypeError("policies is a Policy: must be a list with one per prompt")
    policies = tuple(policies)
    if len(policies) > most:
        raise RowMapError(f"{len(policies)} policies: this engine was installed with max_batch={most}")
    for i, policy in enumerate(policies):
        if policy is None:
            continue
        if not isinstance(policy, Policy):
            raise TypeError(f"policies[{i}] is a {type(policy).__name__}: must be a Policy or None")
        for name in policy.concepts:
            bank[name]  # unknown names raise, naming what there is
        policy.check(rule)
        for strength in (*policy.concepts.values(), policy.negative_strength):
            policy.numbers(f"policies[{i}]", strength, rule)
    return policies


class Unasked:
    """What becomes of a call that nobody spoke for: `plain` or `raise`; see `Engine`.

    Raises:
        ValueError: another word.
    """

    def __init__(self, word: str) -> None:
        if word not in UNASKED:
            raise ValueError(f"unasked={word!r}: allowed are {', '.join(UNASKED)}")
        self._raises, self._told = word == "raise", False

    def decide(self) -> None:
        """Of such a call: NegationNotAppliedError, or a word in the log, once."""
        if self._raises:
            raise NegationNotAppliedError(
                "nobody said what this call negates (unasked='raise'): make it within "
                "engine.batch(policies), where None asks for nothing; threads and executors do not copy the "
                "context: use batch.bind"
            )
        if not self._told:
            self._told = True
            log.warning("a call that no batch and no policy speaks for is not negated (unasked='plain')")
