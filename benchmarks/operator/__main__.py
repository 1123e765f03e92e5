# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.operator`: ratio tables of the fused operator against its baselines."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastnegate import explain, negated_attention, negated_attention_with_statistics

from .baselines import baselines
from .cases import CONCEPTS, DTYPES, LAYERS, METHODS, Case, make
from .measure import compulsory_bytes, interleave, ratio, useful_operations


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fastnegate bench", description=__doc__)
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=["sd15-64", "sdxl-64"])
    parser.add_argument("--concepts", nargs="+", choices=CONCEPTS, default=["none", "1x8", "4x8"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["protore"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--compile", action="store_true", help="also the baselines under torch.compile")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    for name in ("threads", "rounds"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)}: must be >= 1")
    if options.json:
        options.json.touch()  # fails now rather than after the run
    torch.set_num_threads(options.threads)
    rows = []
    print(f"{_processor()}, {options.threads} threads, torch {torch.__version__}")
    for layer in options.layers:
        for dtype in options.dtypes:
            for method in options.methods:
                for concepts in options.concepts:
                    case = make(LAYERS[layer], CONCEPTS[concepts], method, DTYPES[dtype])
                    rows.append(_row(case, options.rounds, options.compile))
                    _print(rows[-1])
    if options.json:
        facts = {
            "system": platform.platform(),
            "processor": _processor(),
            "threads": options.threads,
            "torch": torch.__version__,
            "choice": explain(case.query, case.key, case.value, case.tokens, case.rule),
        }
        options.json.write_text(json.dumps({"facts": facts, "rows": rows}, indent=2) + "\n")
    return 0


def open_gates(case: Case) -> float:
    """Share of queries (and heads) where some gate is above 0, i.e. where work cannot be skipped."""
    if case.tokens is None:
        return 1.0
    _, stats = negated_attention_with_statistics(case.query, case.key, case.value, case.tokens, case.rule)
    per_row = case.tokens.entries // case.query.shape[0]
    return float((stats.heat.unflatten(0, (-1, per_row)).amax(1) > 0).float().mean())


def _row(case: Case, rounds: int, with_compile: bool) -> dict[str, Any]:
    def fused() -> torch.Tensor:
        return negated_attention(case.query, case.key, case.value, case.tokens, case.rule)

    with torch.inference_mode():
        gates = open_gates(case)
        times = interleave({"fused": fused, **baselines(case, with_compile=with_compile)}, rounds)
    seconds = statistics.median(times["fused"])
    return {
        "case": case.name,
        "open_gates": gates,
        "fused_ms": 1e3 * seconds,
        "fused_gflops": useful_operations(case) / seconds / 1e9,
        "fused_gbytes": compulsory_bytes(case) / seconds / 1e9,
        "baseline_ms": {n: 1e3 * statistics.median(t) for n, t in times.items() if n != "fused"},
        "fused_over": {n: vars(ratio(times["fused"], t)) for n, t in times.items() if n != "fused"},
        "seconds": times,
    }


def _print(row: dict[str, Any]) -> None:
    print(
        f"{row['case']:36} {row['fused_ms']:8.2f} ms {row['fused_gflops']:6.0f} GFLOP/s "
        f"{row['fused_gbytes']:5.1f} GB/s  open gates {100 * row['open_gates']:.1f} %"
    )
    for name, r in row["fused_over"].items():
        print(
            f"{'':4}fused / {name:24} {r['median']:6.2f} [{r['low']:.2f}, {r['high']:.2f}]"
            f"   ({row['baseline_ms'][name]:.2f} ms)",
            flush=True,
        )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        return names[0].split(":", 1)[1].strip() if names else "unknown"
    return platform.processor()


if __name__ == "__main__":
    sys.exit(main())
