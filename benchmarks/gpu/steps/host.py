# SPDX-License-Identifier: Apache-2.0
"""What a call costs the host, which a graph does not pay: microseconds from call to return, on problems so
small that the device is never behind."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from fastnegate import negated_attention

from ...operator.baselines import sdpa
from ...operator.cases import CONCEPTS, METHODS, Layer, make
from ...operator.measure import interleave, ratio, wall
from ..card import Call, Card
from ..step import Item, Setting

LAYER = Layer("host", heads=2, queries=64, dim=64, keys=16)
CALLS, ROUNDS = 50, 41  # calls that are timed at once, and how often


def items(setting: Setting) -> Iterator[Item]:
    yield Item("host", lambda: measured(setting.card, 5 if setting.small else ROUNDS))


def calls(card: Card) -> dict[str, Call]:
    rule = METHODS["protore"]
    plain, negated = (
        make(LAYER, CONCEPTS[concepts], rule, torch.bfloat16, device=card.device)
        for concepts in ("none", "4x8")
    )
    prompt = plain.query, plain.key, plain.value
    found: dict[str, Call] = {"sdpa": sdpa(plain), "a kernel of torch": plain.query.new_zeros(1).zero_}
    for name, backend in card.backends.items():
        for concepts, case in (("none", plain), ("4x8", negated)):
            call = partial(negated_attention, *prompt, case.tokens, rule, backend=backend)
            found[f"{name} {concepts}"] = call
    return found


def measured(card: Card, rounds: int) -> dict[str, Any]:
    """Medians in microseconds, and ratios to torch's attention with 95 % bootstrap intervals. A backend that
    cannot run is left out with its reason."""
    timed: dict[str, Call] = {}
    left_out: dict[str, str] = {}
    for name, call in calls(card).items():
        try:
            call()
            card.synchronize()
        except Exception as error:  # the others are worth knowing
            left_out[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
        else:
            timed[name] = partial(_often, call)

    def clock(call: Call) -> float:
        card.synchronize()
        return wall(call) / CALLS

    times = interleave(timed, rounds, clock=clock)
    found: dict[str, Any] = {
        "us": {name: 1e6 * statistics.median(of) for name, of in times.items()},
        "over_sdpa": {name: vars(ratio(of, times["sdpa"])) for name, of in times.items() if name != "sdpa"},
        "left_out": left_out,
    }
    if left_out:
        found["failed"] = "; ".join(f"{name}: {why}" for name, why in left_out.items())
    return found


def _often(call: Call) -> None:
    for _ in range(CALLS):
        call()
