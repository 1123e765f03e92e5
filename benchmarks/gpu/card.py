# SPDX-License-Identifier: Apache-2.0
"""What the steps ask of a GPU, and the processor that takes its place in a rehearsal."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch

from ..operator.machine import gpu_facts, gpu_state
from ..operator.measure import wall

Call = Callable[[], object]
Timer = Callable[[], float]  # runs what it times once, returns seconds

COPY, MATMUL = 1 << 29, 8192  # bytes that are copied, rows and columns of a product: both fill any card
SPIN = 200_000  # cycles that the device is kept busy while the host enqueues what is timed: 0.1 ms


class CaptureError(RuntimeError):
    """A graph could not be captured. What torch keeps of it may spoil later captures of this process."""


class Card(Protocol):
    """The steps know a GPU by this alone."""

    device: str
    backends: Mapping[str, str]  # name in the report -> backend that runs
    cache: int  # bytes of the last cache

    def facts(self) -> dict[str, Any]: ...

    def state(self, call: Call) -> dict[str, str]:
        """Clocks and temperature while the call is repeated."""

    def synchronize(self) -> None:
        """Wait for all that was started, and raise what went wrong with it."""

    def captured(self, calls: Sequence[Call]) -> Call:
        """Starts the calls, one after the other, without the host; they have run before."""

    def can_capture(self) -> bool:
        """Whether this process still can, after a capture that failed."""

    def timer(self, calls: Sequence[Call]) -> Timer:
        """Seconds of one of the calls, which follow each other as `captured`."""

    def memory(self, call: Call) -> int:
        """Most bytes that were allocated while it ran, beyond those that were before."""

    def on_a_busy_stream(self, call: Call, warm: Call) -> None:
        """Start the call on another stream, behind work that takes milliseconds; the current one waits.
        `warm` runs there before: it allocates what the call will, which could wait for that work."""

    def rates(self) -> dict[str, float]:
        """What this card does at this moment: `copy`, bytes a second read and written of a large copy;
        `matmul`, operations a second of a large bfloat16 product of random numbers."""


class CudaCard:
    """The current GPU of torch."""

    device = "cuda"
    backends: Mapping[str, str] = {"cuda": "cuda", "triton": "triton"}

    def __init__(self) -> None:
        self.cache: int = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def facts(self) -> dict[str, Any]:
        return gpu_facts()

    def state(self, call: Call) -> dict[str, str]:
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(gpu_state)
            while not asked.done():
                call()
                torch.cuda.synchronize()
        return asked.result()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def captured(self, calls: Sequence[Call]) -> Call:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, and allocates what stays allocated
            for call in calls:
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Not torch.cuda.graph: if the capture fails, it raises another error and leaves its stream current.
        with torch.cuda.stream(side):
            graph.capture_begin()
            try:
                outputs = [call() for call in calls]
            except BaseException as error:
                with contextlib.suppress(Exception):
                    graph.capture_end()
                raise CaptureError(f"{type(error).__name__}: {error}") from error
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(side)

        # What the graph reads stays allocated, and each call keeps an output of its own: they rotate, too.
        def replay(alive: object = (calls, outputs)) -> None:
            graph.replay()

        return replay

    def can_capture(self) -> bool:
        try:
            self.captured([torch.zeros(1, device=self.device).zero_])()
            torch.cuda.synchronize()
        except Exception:  # of whatever type: then it cannot
            return False
        return True

    def timer(self, calls: Sequence[Call]) -> Timer:
        replay = self.captured(calls)
        return lambda: self._seconds(replay) / len(calls)

    def memory(self, call: Call) -> int:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def on_a_busy_stream(self, call: Call, warm: Call) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        a = torch.eye(MATMUL, device=self.device, dtype=torch.bfloat16)
        out = torch.empty_like(a)
        with torch.cuda.stream(side):
            torch.mm(a, a, out=out)
            warm()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            for _ in range(8):
                torch.mm(a, a, out=out)
            call()
        torch.cuda.current_stream().wait_stream(side)

    def rates(self) -> dict[str, float]:
        source = torch.ones(COPY // 4, device=self.device)
        target = torch.empty_like(source)
        a, b = (torch.randn(MATMUL, MATMUL, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(a)
        seconds = {
            "copy": self._median(lambda: target.copy_(source)),
            "matmul": self._median(lambda: torch.mm(a, b, out=out)),
        }
        return {"copy": 2 * source.nbytes / seconds["copy"], "matmul": 2 * MATMUL**3 / seconds["matmul"]}

    def _median(self, call: Call) -> float:
        return statistics.median([self._seconds(call) for _ in range(13)][3:])

    def _seconds(self, call: Call) -> float:
        torch.cuda._sleep(SPIN)  # else the time of the launch on the host counts, too
        self._begin.record()
        call()
        self._end.record()
        self._end.synchronize()
        return 1e-3 * float(self._begin.elapsed_time(self._end))


class Rehearsal:
    """The processor and its backend: the same steps in small, where there is no card. Nothing that it
    measures says anything about a GPU."""

    device = "cpu"
    backends: Mapping[str, str] = {"cuda": "cpu", "triton": "cpu"}
    cache = 0

    def facts(self) -> dict[str, Any]:
        return {"gpu": "none: a rehearsal on the processor"}

    def state(self, call: Call) -> dict[str, str]:
        call()
        return {}

    def synchronize(self) -> None:
        pass

    def captured(self, calls: Sequence[Call]) -> Call:
        for call in calls:
            call()

        def replay() -> None:
            for call in calls:
                call()

        return replay

    def can_capture(self) -> bool:
        return True

    def timer(self, calls: Sequence[Call]) -> Timer:
        replay = self.captured(calls)
        return lambda: wall(replay) / len(calls)

    def memory(self, call: Call) -> int:
        call()
        return 0

    def on_a_busy_stream(self, call: Call, warm: Call) -> None:
        warm()
        call()

    def rates(self) -> dict[str, float]:
        return {"copy": 0.0, "matmul": 0.0}
