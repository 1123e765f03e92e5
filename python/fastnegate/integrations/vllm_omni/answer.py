# SPDX-License-Identifier: Apache-2.0
"""The proof of negation in an answer: how a worker writes it, and how whoever receives it reads it.

A server that knows nothing of negation ignores a policy and answers 200, with pictures in which nothing was
negated. So an answer counts only with a `Proof`. Of all that a worker may say about a request, HTTP answers
of every endpoint carry one thing: `stage_durations`, seconds by name. The proof is such a name, and takes no
time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ...engine.errors import NegationNotAppliedError
from ...engine.session.proof import Proof

_BEGIN = "negation "


def written(proof: Proof) -> dict[str, float]:
    """The entry of `stage_durations` that says it."""
    return {_BEGIN + json.dumps(proof.to_json(), sort_keys=True, separators=(",", ":")): 0.0}


def proof_of(answer: Any) -> Proof:
    """The proof in an answer: the JSON object of an HTTP answer, or the `OmniRequestOutput` of the engine.

    Raises:
        NegationNotAppliedError: there is none, or none that can be read: the server does not negate, or the
            answer is of a kind that carries nothing but the file (`response_format="file"`).
    """
    names = [name for name in _durations(answer) if isinstance(name, str) and name.startswith(_BEGIN)]
    if len(names) != 1:
        raise NegationNotAppliedError(
            f"the answer has {len(names)} proofs of negation, not one: do not trust its pictures"
        )
    try:
        return Proof.from_json(json.loads(names[0].removeprefix(_BEGIN)))
    except ValueError as error:
        raise NegationNotAppliedError(f"the proof in the answer cannot be read: {error}") from error


def _durations(answer: Any) -> Mapping[Any, Any]:
    if isinstance(answer, Mapping):
        metrics = answer.get("metrics")
        durations = metrics.get("stage_durations") if isinstance(metrics, Mapping) else None
        durations = durations or answer.get("stage_durations")  # of videos
    else:
        durations = getattr(answer, "stage_durations", None)
    return durations if isinstance(durations, Mapping) else {}
