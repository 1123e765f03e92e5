# SPDX-License-Identifier: Apache-2.0
"""What a call costs the host: microseconds of calls that have next to nothing to compute, beside torch's own
attention, in turn. A layer pays this at every step, whatever its size.

    python -m benchmarks.operator.host [--rounds 201] [--backend cpu]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch

from fastnegate import negated_attention, negated_attention_with_statistics

from .baselines import sdpa
from .cases import CONCEPTS, METHODS, Layer, make
from .measure import interleave, wall

LAYER = Layer("host", heads=2, queries=8, dim=8, keys=8)
CALLS = 20  # timed at once: a clock is too coarse for one


def calls(backend: str) -> dict[str, Callable[[], object]]:
    """torch's attention, and ours: plain, with a concept in each row, with statistics as well."""
    plain, negated = (
        make(LAYER, concepts, METHODS["protore"]) for concepts in (CONCEPTS["none"], CONCEPTS["1x8"])
    )
    prompt = plain.query, plain.key, plain.value
    call = partial(negated_attention, *prompt, rule=plain.rule, backend=backend)
    measured = partial(negated_attention_with_statistics, *prompt, rule=plain.rule, backend=backend)
    return {
        "torch": sdpa(plain),
        "no concepts": call,
        "one concept": partial(call, concepts=negated.tokens),
        "with statistics": partial(measured, concepts=negated.tokens),
    }


def medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Microseconds of a call."""

    def often(call: Callable[[], object]) -> None:
        for _ in range(CALLS):
            call()

    with torch.inference_mode():
        times = interleave({name: partial(often, call) for name, call in calls.items()}, rounds, clock=wall)
    return {name: 1e6 / CALLS * statistics.median(of) for name, of in times.items()}


def run(
    name: str,
    about: str,
    make: Callable[[str], dict[str, Callable[[], object]]],
    arguments: Sequence[str] | None,
) -> int:
    """The command `name`: times of what `make` makes for a backend, and how much more than the first."""
    parser = argparse.ArgumentParser(name, description=about.partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=201, help="in which each is timed once (%(default)s)")
    parser.add_argument("--backend", default="cpu", help="that takes tensors of the CPU (%(default)s)")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: must be at least 1")
    torch.set_num_threads(1)
    found = medians(make(options.backend), options.rounds)
    baseline = next(iter(found.values()))
    for call, microseconds in found.items():
        print(f"{call:>16} {microseconds:8.2f} us {microseconds - baseline:+8.2f}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return run("benchmarks.operator.host", str(__doc__), calls, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
