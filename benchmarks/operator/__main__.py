# SPDX-License-Identifier: Apache-2.0
"""Time the operator against torch on the attention layers of real models, interleaved, with intervals."""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fastnegate import negated_attention, negated_attention_with_statistics
from fastnegate.commands.options import file as writable
from fastnegate.commands.options import whole
from fastnegate.commands.progress import Progress, progress

from .baselines import baselines, sdpa
from .cases import CONCEPTS, DTYPES, LAYERS, METHODS, Case, make
from .machine import copy_bandwidth, facts, fma_peak
from .measure import ROUNDS, WARM, interleave, largest_gates, open_share, ratio, row


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="fastnegate bench", description=__doc__)
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=["sd15-64", "sdxl-64"])
    parser.add_argument("--concepts", nargs="+", choices=CONCEPTS, default=["none", "1x8", "4x8"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["protore"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--threads", type=whole(1, 1024), default=torch.get_num_threads())
    parser.add_argument("--rounds", type=whole(1), default=ROUNDS)
    parser.add_argument("--compile", action="store_true", help="also the baselines under torch.compile")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--own", action="store_true", help="the operator against itself, by layer and dtype")
    mode.add_argument("--sparse", action="store_true", help="gates that are open in one region of the image")
    mode.add_argument("--embedded", action="store_true", help="tensors of the embedded model as it draws")
    parser.add_argument("--json", type=writable, metavar="FILE")
    parser.add_argument(
        "--plot", type=writable, metavar="FILE", help="ratios to torch's attention as a picture"
    )
    options = parser.parse_args(arguments)
    _check(options)
    torch.set_num_threads(options.threads)
    machine = facts()
    copy = copy_bandwidth()
    machine["copy_gbytes"] = copy / 1e9
    print(
        f"{machine['processor']}, {options.threads} threads, {machine['instruction_set']}, "
        f"torch {torch.__version__}, copy {copy / 1e9:.1f} GB/s"
    )
    run = _own if options.own else _embedded if options.embedded else _layers
    with torch.inference_mode(), progress("round") as bar:
        rows = list(run(options, copy, bar))
    if options.json:
        options.json.write_text(json.dumps({"facts": machine, "rows": rows}, indent=2) + "\n")
    if options.plot:
        from .plot import plot

        plot(rows, options.plot)
    return 0


def _check(options: argparse.Namespace) -> None:
    """Refuse what cannot work before the run rather than after it."""
    if options.sparse:
        for method in options.methods:
            if METHODS[method].gate == "open":
                raise ValueError(f"--sparse: method {method} has no gate that could be closed")
        if options.concepts == ["none"]:
            raise ValueError("--sparse: needs concepts")
    if options.plot and (options.own or options.embedded):
        raise ValueError("--plot shows layers and concepts, not --own or --embedded")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError("--plot needs matplotlib: pip install 'fastnegate[bench]'")


# ---- what is measured -------------------------------------------------------------------------


def fused(case: Case) -> Callable[[], Tensor]:
    return partial(negated_attention, case.query, case.key, case.value, case.tokens, case.rule)


def timed(
    calls: Mapping[str, Callable[[], object]], rounds: int, bar: Progress
) -> tuple[dict[str, list[float]], tuple[float, float]]:
    """Interleaved times, and the FMA peaks just before and after."""
    interleave(calls, WARM, warm=0, on_round=bar.step)  # compiles, too
    before = fma_peak()
    times = interleave(calls, rounds, warm=1, on_round=bar.step)
    return times, (before, fma_peak())


def _rounds(options: argparse.Namespace) -> int:
    """That `timed` runs."""
    return WARM + 1 + int(options.rounds)


def _layers(options: argparse.Namespace, copy: float, bar: Progress) -> Iterator[dict[str, Any]]:
    """Each layer, dtype, method and set of concepts against the baselines."""
    wanted = [
        (layer, dtype, method, concepts)
        for layer, dtype, method, concepts in product(
            options.layers, options.dtypes, options.methods, options.concepts
        )
        # Without concepts there are no gates, and all methods are the same.
        if concepts != "none" or (not options.sparse and method == options.methods[0])
    ]
    bar.expect(len(wanted) * _rounds(options))
    for layer, dtype, method, concepts in wanted:
        case = make(LAYERS[layer], CONCEPTS[concepts], METHODS[method], DTYPES[dtype], sparse=options.sparse)
        calls = {"fused": fused(case), **baselines(case, with_compile=options.compile)}
        found = row(case, *timed(calls, options.rounds, bar), copy)
        found |= {"layer": layer, "dtype": dtype, "method": method, "concepts": concepts}
        bar.say(_text(found))
        yield found


def _embedded(options: argparse.Namespace, copy: float, bar: Progress) -> Iterator[dict[str, Any]]:
    from .embedded import captured

    for method, suite in product(options.methods, ("implicit", "benign")):
        cases = [*captured(suite, METHODS[method])]
        bar.expect(len(cases) * _rounds(options))
        for case in cases:
            calls = {"fused": fused(case), "sdpa": sdpa(case)}
            found = row(case, *timed(calls, options.rounds, bar), copy)
            bar.say(_text(found))
            yield found


# Numerator and denominator of the operator's own ratios: (method, concepts, whether with statistics).
NONE, SMALL = ("protore", "none", False), ("protore", "4x8", False)
OWN = (
    (("protore", "1x8", False), NONE),
    (SMALL, NONE),
    (("protore", "8x16", False), NONE),
    (("nag", "1x77", False), NONE),
    (("eiup", "1x77", False), NONE),
    (("nag", "4x8", False), ("nag-head", "4x8", False)),
    (("nag", "1x77", False), ("nag-head", "1x77", False)),
    (("protore", "4x8", True), SMALL),
)


def _own(options: argparse.Namespace, copy: float, bar: Progress) -> Iterator[dict[str, Any]]:
    """For each layer and dtype, ratios of the operator to itself, all of them from the same rounds."""
    bar.expect(len(options.layers) * len(options.dtypes) * _rounds(options))
    for layer, dtype in product(options.layers, options.dtypes):
        calls, gates = {}, []
        for method, concepts, with_statistics in dict.fromkeys(key for pair in OWN for key in pair):
            case = make(LAYERS[layer], CONCEPTS[concepts], METHODS[method], DTYPES[dtype])
            call = fused(case)
            if with_statistics:
                call = partial(negated_attention_with_statistics, *call.args)
            calls[method, concepts, with_statistics] = call
            gates.append(open_share(largest_gates(case)))
        times, peaks = timed({_named(key): call for key, call in calls.items()}, options.rounds, bar)
        names = [(_named(a), _named(b)) for a, b in OWN]
        found = {
            "case": f"{layer} {dtype}",
            "open_gates": min(gates),
            "peak_gflops": [peak / 1e9 for peak in peaks],
            "ms": {name: 1e3 * statistics.median(t) for name, t in times.items()},
            "own": {f"{a} / {b}": vars(ratio(times[a], times[b])) for a, b in names},
            "seconds": times,
        }
        bar.say(
            f"{found['case']}: open gates {100 * min(gates):.1f} %, FMA peak before and after "
            f"{peaks[0] / 1e9:.1f}, {peaks[1] / 1e9:.1f} GFLOP/s"
        )
        for (a, b), r in zip(names, found["own"].values()):
            ms = found["ms"]
            bar.say(f"    {a:26} / {b:14} {_interval(r)}   ({ms[a]:.2f} / {ms[b]:.2f} ms)")
        yield found


def _named(key: tuple[str, str, bool]) -> str:
    method, concepts, with_statistics = key
    name = "none" if concepts == "none" else f"{method} {concepts}"
    return name + (" with statistics" if with_statistics else "")


# ---- tables -----------------------------------------------------------------------------------


def _text(found: dict[str, Any]) -> str:
    gates = f"open gates {100 * found['open_gates']:.1f} %"
    gates += f", blocks without one {100 * found['skipped_blocks']:.1f} %" if found["skipped_blocks"] else ""
    lines = [
        f"{found['case']:58} {found['fused_ms']:8.2f} ms {found['fused_gflops']:6.1f} GFLOP/s "
        f"({100 * found['share_of_peak']:.0f} % of peak) {found['fused_gbytes']:5.1f} GB/s "
        f"({100 * found['share_of_copy']:.0f} % of copy)  {gates}"
    ]
    for name, r in found["fused_over"].items():
        lines.append(f"    fused / {name:28} {_interval(r)}   ({found['baseline_ms'][name]:.2f} ms)")
    return "\n".join(lines)


def _interval(r: dict[str, float]) -> str:
    return f"{r['median']:6.3f} [{r['low']:.3f}, {r['high']:.3f}]"


if __name__ == "__main__":
    sys.exit(main())
