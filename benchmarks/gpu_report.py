# SPDX-License-Identifier: Apache-2.0
"""One command on a machine with a GPU: judge every preset by the accuracy budget, time the operator against
torch's attention kernels and against the same formulas in torch operators, write report.json and report.md.

Every call is a CUDA graph, so that the host has no part in its time, and is timed in three states of the
caches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastnegate import negated_attention, negated_attention_with_statistics, presets
from fastnegate.backends import load, unavailable
from fastnegate.problem import Problem, Statistics

from .accuracy import fair, make_problem
from .operator.baselines import attentions, baselines
from .operator.cases import CONCEPTS, DTYPES, LAYERS, METHODS, Case, make, moved
from .operator.machine import gpu_facts, gpu_state
from .operator.measure import compulsory_bytes, interleave, ratio
from .tables import table

ROUNDS, WARM = 101, 5  # measured ones, and ones before that do not count
REPEATED = 20  # calls in a graph of the state `repeated`
# Bytes that empty all caches: more than AMD's last one, 256 MiB on MI300X, which is not counted as L2.
FLUSH = 1 << 29
FLOOR = "nothing"  # a trivial kernel: how much of a time is the timing's own
STATES = {
    "cold": "Nothing that a call reads is in a cache.",
    "warm": "The query was just written, as by the projection before the layer; the rest is in no cache.",
    "repeated": "Calls follow each other: what fits into the caches is there.",
}
Timer = Callable[[], float]  # makes a call, returns its seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 1 if a check or the operator failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__)
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=[*LAYERS])
    parser.add_argument("--concepts", nargs="+", choices=CONCEPTS, default=["none", "4x8", "1x77"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["protore", "nag"])
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"], help="of the timed calls"
    )
    parser.add_argument("--backend", choices=("triton", "cuda"), default="triton")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("gpu-report"))
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: must be >= 1")
    if (reason := missing(options.backend)) is not None:
        print(f"gpu_report: {reason}; nothing was run", file=sys.stderr)
        return 2
    with torch.inference_mode():
        return run(options, CudaGpu())


def missing(backend: str) -> str | None:
    """Why no report can be made here, or None."""
    if not torch.cuda.is_available():
        return "torch finds no GPU on this machine"
    return unavailable(backend)


class Gpu(Protocol):
    """What the report asks of a GPU."""

    device: str

    def facts(self) -> dict[str, Any]: ...

    def state(self) -> dict[str, str]:
        """Clocks and temperature at this moment."""

    def timers(self, call: Callable[[], object], query: Tensor) -> dict[str, Timer]:
        """A timer of `call`, which reads `query`, for each of STATES."""


def run(options: argparse.Namespace, gpu: Gpu) -> int:
    """Check and time, writing both files after every step: what breaks late then loses little."""
    options.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"facts": gpu.facts(), "checks": [], "rows": []}
    for step in plan(options):
        found = step.run(gpu, options)
        report["checks" if isinstance(step, Check) else "rows"].append(found)
        (options.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.out / "report.md").write_text(markdown(report))
        print(step, found.get("failed") or found.get("refused") or "ok", flush=True)
    return int(any("failed" in found for found in report["checks"] + report["rows"]))


def plan(options: argparse.Namespace) -> Iterator[Check | Timing]:
    """First every preset in every dtype on every size of head and prompt that a layer has; then the times."""
    sizes = sorted({(layer.dim, layer.keys) for layer in LAYERS.values()})
    for preset, dtype, (dim, keys) in product(presets(), DTYPES, sizes):
        yield Check(preset, dtype, dim, keys)
    for layer, dtype, method, concepts in product(
        options.layers, options.dtypes, options.methods, options.concepts
    ):
        if concepts != "none" or method == options.methods[0]:  # without concepts all methods are the same
            yield Timing(layer, dtype, method, concepts)


# ---- accuracy ---------------------------------------------------------------------------------


class Check(NamedTuple):
    """A preset on a problem of 1024 rows, judged on the CPU."""

    preset: str
    dtype: str
    dim: int
    keys: int

    def __str__(self) -> str:
        return f"check {self.preset} {self.dtype}, head_dim {self.dim}, {self.keys} keys:"

    def run(self, gpu: Gpu, options: argparse.Namespace) -> dict[str, Any]:
        """The share of the budget that the output used, or why the preset was refused or failed."""
        found: dict[str, Any] = self._asdict()
        judge = fair(self.problem(seed) for seed in range(9))
        problem = moved(judge.problem, gpu.device)
        if (reason := load(options.backend).supports(problem)) is not None:
            return found | {"refused": reason}
        try:
            found["used"] = judge.check(_call(negated_attention, problem, options.backend).cpu())
            output, tables = _call(negated_attention_with_statistics, problem, options.backend)
            judge.check(output.cpu())
            judge.check_statistics(Statistics._make(t.cpu() for t in tables))
        except Exception as error:  # also what Triton raises; the rest of the report is worth having
            found["failed"] = _first_line(error)
        return found

    def problem(self, seed: int) -> Problem:
        mask = "none" if self.keys == 77 else "padding"  # prompts of CLIP are not masked, those of T5 are
        return make_problem(
            2, 2, 256, self.keys, self.dim, DTYPES[self.dtype],
            rule=self.preset, rows="same", layout="bnhd", mask=mask, seed=seed,
        )  # fmt: skip


def _call(operator: Callable[..., Any], p: Problem, backend: str) -> Any:
    return operator(
        p.query, p.key, p.value, p.concepts, p.rule, scale=p.scale, key_bias=p.key_bias, backend=backend
    )


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().partition("\n")[0]


# ---- time -------------------------------------------------------------------------------------


class Timing(NamedTuple):
    """A layer with its concepts: the operator and all that it is compared with."""

    layer: str
    dtype: str
    method: str
    concepts: str

    def __str__(self) -> str:
        return f"time {self.layer} {self.dtype} {self.method} {self.concepts}:"

    def run(self, gpu: Gpu, options: argparse.Namespace) -> dict[str, Any]:
        """One row of the report; a baseline that cannot run is left out and named with its reason."""
        found: dict[str, Any] = {**self._asdict(), "left_out": {}}
        case = make(LAYERS[self.layer], CONCEPTS[self.concepts], METHODS[self.method], DTYPES[self.dtype])
        case = moved(case, gpu.device)
        timers: dict[str, dict[str, Timer]] = {}
        for name, call in calls(case, options.backend).items():
            try:
                timers[name] = gpu.timers(call, case.query)
            except Exception as error:  # whatever a compiler or a library may raise
                if name == "fused":
                    return found | {"failed": _first_line(error)}
                found["left_out"][name] = _first_line(error)
        times = {
            state: interleave({n: t[state] for n, t in timers.items()}, options.rounds, WARM, _asked)
            for state in STATES
        }
        return found | row(compulsory_bytes(case), times) | {"gpu": gpu.state()}


def _asked(timer: Callable[[], object]) -> float:
    """The clock of `interleave` for calls that know their own time."""
    return float(timer())  # type: ignore[arg-type]


def calls(case: Case, backend: str) -> dict[str, Callable[[], object]]:
    """The operator, and what it is compared with."""
    prompt = case.query, case.key, case.value
    found: dict[str, Callable[[], object]] = {
        "fused": partial(negated_attention, *prompt, case.tokens, case.rule, backend=backend)
    }
    if case.tokens is not None:
        found["fused, no concepts"] = partial(negated_attention, *prompt, None, case.rule, backend=backend)
    nothing = case.query.new_zeros(1)
    return {**found, **baselines(case, with_compile=True), **attentions(case), FLOOR: nothing.zero_}


def row(bytes_: int, times: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """What is reported of the times, by state and call; `bytes_` must move at least."""
    states: dict[str, Any] = {}
    for state, of_calls in times.items():
        fused = of_calls["fused"]
        states[state] = {
            "us": {name: 1e6 * statistics.median(t) for name, t in of_calls.items()},
            "gbytes": bytes_ / statistics.median(fused) / 1e9,
            "fused_over": {
                name: vars(ratio(fused, t)) for name, t in of_calls.items() if name not in ("fused", FLOOR)
            },
        }
    return {"states": states, "seconds": {state: dict(t) for state, t in times.items()}}


class CudaGpu:
    """The current GPU of torch."""

    device = "cuda"

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._flush = torch.zeros(max(4 * cache, FLUSH) // 4, device=self.device)
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def facts(self) -> dict[str, Any]:
        return gpu_facts()

    def state(self) -> dict[str, str]:
        return gpu_state()

    def timers(self, call: Callable[[], object], query: Tensor) -> dict[str, Timer]:
        once, often, same = self._captured(call, 1), self._captured(call, REPEATED), query.clone()

        def flush() -> None:
            # Read, not written: lines that must be written back would slow down the call after it. It takes
            # longer than the host needs to enqueue that call, so the GPU never waits for the host.
            self._flush.sum()

        def write_query() -> None:
            flush()
            query.copy_(same)

        return {
            "cold": lambda: self._seconds(once, flush),
            "warm": lambda: self._seconds(once, write_query),
            "repeated": lambda: self._seconds(often, flush) / REPEATED,
        }

    def _captured(self, call: Callable[[], object], times: int) -> Callable[[], object]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, and allocates what stays allocated
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(times):
                call()

        def replay(alive: Callable[[], object] = call) -> None:  # what the graph reads stays allocated
            graph.replay()

        return replay

    def _seconds(self, replay: Callable[[], object], before: Callable[[], object]) -> float:
        before()
        self._begin.record()
        replay()
        self._end.record()
        self._end.synchronize()
        return 1e-3 * float(self._begin.elapsed_time(self._end))


# ---- the report -------------------------------------------------------------------------------


def markdown(report: Mapping[str, Any]) -> str:
    """The report as it is read."""
    parts = ["# Measured on a GPU", _facts(report["facts"])]
    failed = [found for found in report["checks"] + report["rows"] if "failed" in found]
    if failed:
        parts += ["## Failed", "\n".join(f"- {_named(found)}: {found['failed']}" for found in failed)]
    parts += ["## Accuracy", _accuracy(report["checks"])]
    rows = [found for found in report["rows"] if "states" in found]
    if rows:
        parts += [
            "## Time",
            "Medians; GB/s counts the bytes that must move. Then the operator's time over that of other "
            "calls, with 95 % bootstrap intervals.",
        ]
    for state, meaning in STATES.items() if rows else ():
        parts += [f"### {state.capitalize()}", meaning, _times(rows, state)]
    left_out = [f"- {_named(r)}, {name}: {why}" for r in rows for name, why in r["left_out"].items()]
    if left_out:
        parts += ["## Baselines that could not run", "\n".join(left_out)]
    return "\n\n".join(parts) + "\n"


def _facts(facts: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())


def _named(found: Mapping[str, Any]) -> str:
    names = ("layer", "preset", "dtype", "method", "concepts", "dim", "keys")
    return " ".join(str(found[name]) for name in names if name in found)


def _accuracy(checks: Sequence[Mapping[str, Any]]) -> str:
    """The most of the budget that was used, by preset and dtype."""
    dtypes = list(dict.fromkeys(check["dtype"] for check in checks))

    def cell(preset: str, dtype: str) -> str:
        here = [c for c in checks if (c["preset"], c["dtype"]) == (preset, dtype)]
        if any("failed" in c for c in here):
            return "failed"
        if used := [c["used"] for c in here if "used" in c]:
            return f"{max(used):.2f}"
        return here[0]["refused"] if here else "-"  # not yet checked

    body = [[p, *(cell(p, d) for d in dtypes)] for p in dict.fromkeys(check["preset"] for check in checks)]
    return "Largest share of the accuracy budget that was used; 1 is the limit.\n\n" + table(
        ["preset", *dtypes], body
    )


def _times(rows: Sequence[Mapping[str, Any]], state: str) -> str:
    """The operator's time, and what it is of each other call's."""
    others = list(dict.fromkeys(name for r in rows for name in r["states"][state]["fused_over"]))

    def cells(r: Mapping[str, Any]) -> Iterator[str]:
        yield from (r["layer"], r["dtype"], "-" if r["concepts"] == "none" else r["method"], r["concepts"])
        here = r["states"][state]
        yield from (f"{here['us'][name]:.1f}" for name in ("fused", FLOOR))
        yield f"{here['gbytes']:.0f}"
        for name in others:
            x = here["fused_over"].get(name)
            yield f"{x['median']:.2f} [{x['low']:.2f}, {x['high']:.2f}]" if x else "-"

    head = ["layer", "dtype", "method", "concepts", "fused, us", f"{FLOOR}, us", "GB/s", *others]
    return table(head, map(cells, rows))


if __name__ == "__main__":
    sys.exit(main())
