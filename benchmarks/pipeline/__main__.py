# SPDX-License-Identifier: Apache-2.0
"""Time one denoising step of a full-size Stable Diffusion 1.5 UNet (512 x 512, batch 2) with random
weights: negated through an installed engine, against the same step with diffusers' own processors.

With --model, the price of negation in other models instead: operations of a step at 1024 x 1024, and peak
memory and milliseconds of a few blocks at full width; beside the published two passes and a doubled
batch.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastnegate.commands.options import whole
from fastnegate.engine.engine import Engine
from fastnegate.engine.session.call import Record

from ..operator.cases import CONCEPTS, METHODS
from ..operator.machine import facts
from ..operator.measure import interleave, ratio, wall
from . import price
from .families import PRICED
from .models import MODELS, STEPS, negating, pipeline, policy, random_unet, step, twin

BATCH = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = parsed(arguments)
    for name, most in (("threads", 1024), ("pairs", STEPS - 2)):
        if not 1 <= getattr(options, name) <= most:
            raise ValueError(f"--{name} {getattr(options, name)}: must be 1 to {most}")
    if options.json:
        options.json.touch()  # fails now rather than after the run
    torch.set_num_threads(options.threads)
    if options.model is not None:
        result = priced(options)
        if options.json:
            options.json.write_text(json.dumps({"facts": facts(), **result}, indent=2) + "\n")
        return 0
    with torch.inference_mode():
        result = run(options.method, options.concepts, options.rows, options.pairs)
    r = result["ratio"]
    print(
        f"{result['case']}, {options.threads} threads\n"
        f"  default {result['default_ms']:.0f} ms, negated {result['negated_ms']:.0f} ms a step, "
        f"ratio {r['median']:.4f} [{r['low']:.4f}, {r['high']:.4f}] over {options.pairs} pairs\n"
        f"  open gates {100 * result['open_gates']:.1f} % of queries, output changed by "
        f"{100 * result['change']:.1f} %, peak memory {result['peak_gbytes']:.1f} GB"
    )
    if options.json:
        options.json.write_text(json.dumps({"facts": facts(), **result}, indent=2) + "\n")
    return 0


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.pipeline", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=15, help="rounds, in which each is timed once (15)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE")
    step = parser.add_argument_group("the step of Stable Diffusion 1.5")
    step.add_argument("--method", choices=METHODS, default="protore")
    step.add_argument("--concepts", choices=[c for c in CONCEPTS if c != "none"], default="4x8")
    step.add_argument(
        "--rows",
        choices=("all", "conditional"),
        default="all",
        help="negate both rows, or the second alone as with classifier-free guidance",
    )
    of_model = parser.add_argument_group("the price in a model")
    of_model.add_argument("--model", nargs="+", choices=PRICED)
    of_model.add_argument("--tokens", type=whole(1), help="of the image, where steps are timed")
    of_model.add_argument("--count", action="store_true", help="operations alone: nothing is timed")
    of_model.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="processor: of all threads, on a machine with others"
    )
    options = parser.parse_args(arguments)
    for group, wanted in ((step, options.model is None), (of_model, options.model is not None)):
        for action in group._group_actions:
            if not wanted and getattr(options, action.dest) != action.default:
                parser.error(f"{action.option_strings[0]} is of {group.title}")
    return options


CLOCKS = {"wall": wall, "processor": price.processor}


def priced(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, and print tables."""
    models = {name: PRICED[name] for name in options.model}
    with torch.no_grad():  # in inference mode nobody sees what operators are made of
        if options.count:
            counts = {name: price.counted(model) for name, model in models.items()}
            print(price.counts_table(counts))
            return {"operations": counts}
        found: dict[str, Any] = {"clock": options.clock, "models": {}}
        for name, model in models.items():
            tokens = options.tokens or model.tokens
            variants = price.price(model, tokens, options.pairs, CLOCKS[options.clock])
            found["models"][name] = {"tokens": tokens, "variants": variants}
            print(
                f"{name}, {tokens} image and {model.text} text tokens, {options.threads} threads, "
                f"{options.clock} time, {options.pairs} rounds; FLOP of all blocks at 1024 x 1024\n"
                f"{price.price_table(variants)}",
                flush=True,
            )
    return found


def run(method: str, concepts: str, rows: str, pairs: int) -> dict[str, Any]:
    """Measure; `change` is the distance between the outputs, relative to the default one."""
    model = MODELS["sd15"]
    pipe = pipeline(model, random_unet(model))
    plain = twin(pipe.unet)
    engine = negating(pipe, CONCEPTS[concepts], METHODS[method], BATCH)
    if rows == "conditional":
        of_both = policy(engine.bank, METHODS[method])
        engine.set_rows([of_both], row_map=[0] * BATCH, conditional=[False, True])
    default, negated = (step(pipe, unet, BATCH) for unet in (plain, pipe.unet))
    # One round that does not count; in it the engine projects the concepts, once per pipeline call.
    times = interleave({"default": default, "negated": negated}, pairs, warm=1)
    expected, (actual, share) = default(), _watched(engine, negated)
    return {
        "case": f"{method} {concepts}, {rows} rows of {BATCH}",
        "default_ms": 1e3 * statistics.median(times["default"]),
        "negated_ms": 1e3 * statistics.median(times["negated"]),
        "ratio": vars(ratio(times["negated"], times["default"])),
        "open_gates": share,
        "change": float((actual - expected).norm() / expected.norm()),
        "peak_gbytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "seconds": times,
    }


def _watched(engine: Engine, step: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """The output of a step, and the share of queries of negated rows with an open gate."""
    records: list[Record] = []
    engine.observer = records.append
    output = step()
    engine.observer = None
    open_gates = [
        record.statistics.heat[[e for e, b, _ in record.entries if b == row]].amax(0) > 0
        for record in records
        for row in {b for _, b, _ in record.entries}
    ]
    return output, float(torch.cat(open_gates).float().mean())


if __name__ == "__main__":
    sys.exit(main())
