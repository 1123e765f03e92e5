# SPDX-License-Identifier: Apache-2.0
"""Throughput, latency and memory of a server with unlike policies in a batch, beside one where nobody negates
and one whose batches have one policy, in the same run.

The embedded model is small, so what a policy costs the host is large in it; with --width, a step of a Stable
Diffusion 1.5 UNet at its full width instead.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastnegate.commands.options import whole

from ..operator.machine import facts
from ..operator.measure import Ratio, ratio, wall
from ..pipeline.price import processor
from ..tables import table
from . import load, width

PLAIN = "no negation"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = parsed(arguments)
    torch.set_num_threads(options.threads)
    report = of_width(options) if options.width else of_load(options)
    if options.json:
        options.json.write_text(json.dumps({"facts": facts(), **report}, indent=2) + "\n")
    return 0


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--batch", type=whole(1), default=8, help="the most requests in a batch (8)")
    parser.add_argument("--rounds", type=whole(1), default=5, help="in which each is timed once (5)")
    parser.add_argument("--threads", type=whole(1), default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--requests", type=whole(1), default=112, help="of a round (112)")
    parser.add_argument("--clients", type=whole(1), default=32, help="who ask at the same time (32)")
    parser.add_argument("--steps", type=whole(1), default=10, help="of denoising (10)")
    parser.add_argument("--width", action="store_true", help="a step at full width")
    parser.add_argument("--size", type=whole(64), default=128, help="pixels of that step's pictures (128)")
    parser.add_argument("--method", default="protore", help="of that step (protore)")
    return parser.parse_args(arguments)


def of_load(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, and print a table."""
    found = load.run(options.requests, options.clients, options.batch, options.steps, options.rounds)
    body = []
    for name, arm in found.items():
        arm["throughput"] = vars(ratio(arm["requests_per_second"], found[PLAIN]["requests_per_second"]))
        arm["of_processor"] = vars(ratio(found[PLAIN]["processor_seconds"], arm["processor_seconds"]))
        latency = " / ".join(f"{seconds:.2f}" for seconds in arm["latency"].values())
        body.append(
            [
                name,
                f"{statistics.median(arm['requests_per_second']):.2f}",
                str(Ratio(**arm["throughput"])),
                str(Ratio(**arm["of_processor"])),
                latency,
                f"{arm['batch']:.1f}",
                f"{arm['peak_bytes'] / 2**20:.1f}",
            ]
        )
    head = [
        "",
        "requests/s",
        "relative",
        "by processor time",
        "p50 / p90 / p99, s",
        "in a batch",
        "peak, MiB",
    ]
    print(
        f"{options.clients} clients, {options.requests} requests of {options.steps} steps in each of "
        f"{options.rounds} rounds, {options.threads} threads\n{table(head, body)}"
    )
    return {"load": found}


def of_width(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, and print a table."""
    found: dict[str, Any] = {}
    body = []
    for clock in (wall, processor):
        times = width.run(options.batch, options.size, options.method, options.rounds, clock)
        found[clock.__name__] = times
        for name, seconds in times.items():
            r = ratio(times[PLAIN], seconds)
            shown = f"{r.median:.3f} [{r.low:.3f}, {r.high:.3f}]"
            body.append([name, clock.__name__, f"{1e3 * statistics.median(seconds):.0f}", shown])
    print(
        f"Stable Diffusion 1.5, {options.size} pixels, {options.batch} rows, {options.method}, "
        f"{options.threads} threads, {options.rounds} rounds\n"
        f"{table(['', 'clock', 'ms a step', 'throughput'], body)}"
    )
    return {"width": found}


if __name__ == "__main__":
    raise SystemExit(main())
