# SPDX-License-Identifier: Apache-2.0
"""Times of the operator on layers of real models, beside torch's attention kernels, which negate nothing, and
the same negation in torch operators.

Inputs rotate through more memory than the last cache has, in one graph, so that neither the host nor an
earlier call helps; all calls of a layer are timed in turn. `floor` is a kernel that does nothing, in the same
graph: how much of a time is the launch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnegate import negated_attention
from fastnegate.operator.problem import Problem
from fastnegate.testing import Judge, moved

from ...operator.baselines import attentions, by_sdpa, concept_tensors, negated, sdpa
from ...operator.cases import CONCEPTS, DTYPES, LAYERS, METHODS, Case, Layer, make
from ...operator.measure import Ratio, compulsory_bytes, interleave, ratio
from ..card import Call, CaptureError, Card, Timer
from ..step import Item, Setting, first_line

# Seven layers in order of worth; a size of 1024 x 1024 and one of few queries are for `benchmarks.tune`.
TIMED = ("sdxl-64", "sd15-64", "sdxl-32", "sd15-32", "pixart-64", "wan-480p", "sd15-16")
TIMED_CONCEPTS = ("4x8", "none", "1x8")
COMPILED = ("sdxl-64", "sd15-32")  # on which the negation in torch operators is compiled, too
ROUNDS, WARM = 25, 3
MOST_SETS = 48  # of inputs
SAMPLED = 32  # queries that are judged, of each batch row
FLOOR = "floor"


def items(setting: Setting) -> Iterator[Item]:
    card = setting.card
    rounds = 3 if setting.small else ROUNDS
    yield Item("rates", card.rates)
    for layer in TIMED:
        for concepts in TIMED_CONCEPTS:
            yield Item(f"{layer} {concepts}", partial(timed, layer, concepts, setting, rounds))
    for layer in COMPILED:
        yield Item(f"{layer} 4x8, compiled", partial(timed, layer, "4x8", setting, rounds, compiled=True))


def timed(layer: str, concepts: str, setting: Setting, rounds: int, compiled: bool = False) -> dict[str, Any]:
    """Microseconds of every call, and what each backend's are of the others'."""
    card = setting.card
    size = LAYERS[layer]
    if setting.small:
        size = replace(size, queries=min(size.queries, 64), heads=2)
    cases = inputs(size, concepts, card)
    found: dict[str, Any] = {"sets": len(cases), "judged": {}, "left_out": {}}
    judge = judge_of(cases[0])
    timers: dict[str, Timer] = {}
    for name, calls in what_is_timed(cases, card, compiled).items():
        try:
            if name in card.backends:
                found["judged"][name] = judge.check(sampled(calls[0]()).cpu())
            timers[name] = card.timer(calls)
            timers[name]()
        except Exception as error:  # whatever a kernel, a library or a compiler may raise
            found["left_out"][name] = first_line(error)
            card.synchronize()  # raises again if the device is lost
            if isinstance(error, CaptureError) and not card.can_capture():
                found["spoiled"] = True
                break
    if wrong := [name for name in card.backends if name in found["left_out"]]:
        found["failed"] = "; ".join(f"{name}: {found['left_out'][name]}" for name in wrong)
    times = interleave(timers, rounds, WARM, asked)
    clocks = card.state(next(iter(timers.values()))) if timers else {}
    return found | row(times, card, compulsory_bytes(cases[0])) | {"clocks": clocks}


def asked(timer: Call) -> float:
    """The clock of `interleave` for calls that know their own time."""
    return float(timer())  # type: ignore[arg-type]


def row(times: Mapping[str, Sequence[float]], card: Card, bytes_: int) -> dict[str, Any]:
    """Of the times of calls, `bytes_` of which must move at least."""
    us = {name: as_dict(ratio(t, [1e-6] * len(t))) for name, t in times.items()}
    return {
        "us": us,
        "over": {name: over(times, name) for name in card.backends if name in times},
        "gbytes": {name: bytes_ / of["median"] / 1e3 for name, of in us.items() if name != FLOOR},
    }


def over(times: Mapping[str, Sequence[float]], name: str) -> dict[str, dict[str, float]]:
    """What a call's times are of the others'."""
    others = (other for other in times if other not in (name, FLOOR))
    return {other: as_dict(ratio(times[name], times[other])) for other in others}


def as_dict(found: Ratio) -> dict[str, float]:
    return {name: float(f"{number:.4g}") for name, number in vars(found).items()}


# ---- what is timed ----------------------------------------------------------------------------


def inputs(
    layer: Layer, concepts: str, card: Card, method: str = "protore", dtype: str = "bfloat16"
) -> list[Case]:
    """As many sets as fill the last cache twice, at least two."""

    def of_seed(seed: int) -> Case:
        return make(layer, CONCEPTS[concepts], METHODS[method], DTYPES[dtype], device=card.device, seed=seed)

    first = of_seed(0)
    sets = min(-(-2 * card.cache // compulsory_bytes(first)), MOST_SETS)
    return [first, *map(of_seed, range(1, max(sets, 2)))]


def problem_of(case: Case) -> Problem:
    scale = case.sizes[4] ** -0.5
    return Problem(case.query, case.key, case.value, None, case.tokens, case.rule, scale)


def what_is_timed(cases: Sequence[Case], card: Card, compiled: bool) -> dict[str, list[Call]]:
    """By name, a call for each set of inputs."""
    of_sets = [calls(case, card, compiled) for case in cases]
    found = {name: [of[name] for of in of_sets] for name in of_sets[0]}
    if compiled:
        torch._dynamo.reset()
        formula = torch.compile(partial(negated, cases[0], F.scaled_dot_product_attention), dynamic=False)
        found["sdpa + tail, compiled"] = [
            partial(formula, case.query, case.key, case.value, concept_tensors(case)) for case in cases
        ]
    return found


def calls(case: Case, card: Card, compiled: bool) -> dict[str, Call]:
    found: dict[str, Call] = {}
    for name, backend in card.backends.items():
        prompt = case.query, case.key, case.value
        found[name] = partial(negated_attention, *prompt, case.tokens, case.rule, backend=backend)
    found["sdpa"] = sdpa(case)
    if case.tokens is not None:
        found["sdpa + tail"] = by_sdpa(case)
    if not compiled:
        found |= attentions(case)
    return found | {FLOOR: case.query.new_zeros(1).zero_}


# ---- whether it is right ----------------------------------------------------------------------


def sampled(tensor: Tensor) -> Tensor:
    """[B, H, n, D]: the first and the last queries, and some between."""
    places = torch.linspace(0, tensor.shape[2] - 1, min(SAMPLED, tensor.shape[2])).long()
    return tensor[:, :, places.to(tensor.device)]


def judge_of(case: Case) -> Judge:
    """Of the sampled queries. The concepts of a dense case resemble each other: of many queries two gates are
    as good as equal, and those are not judged here."""
    alone = moved(replace(case, query=sampled(case.query)), "cpu")
    return Judge(problem_of(alone), leave_near=True)
