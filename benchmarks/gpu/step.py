# SPDX-License-Identifier: Apache-2.0
"""A step as a process: `python -m benchmarks.gpu.step JOB.json` runs its items in order of worth and writes
one line of JSON for each, at once, so that a kill loses no more than the item that it hits.

Exit status: 0 if the step is through, 4 if its time is over, 3 after an error that the device does not
recover from, which every later call of this process would repeat, 5 if what is left had better be run by
another process; 1, Python's own, if the step itself broke.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .card import CaptureError, Card, CudaCard, Rehearsal
from .child import AGAIN, CUT, STICKY, THROUGH


class Item(NamedTuple):
    """A part of a step that is worth having by itself."""

    name: str
    run: Callable[
        [], dict[str, Any]
    ]  # what the report holds; `failed`, `cut` (by time) or `skipped` is a reason


@dataclass(frozen=True)
class Setting:
    """What the items of a step are given."""

    card: Card
    work: Path  # what was built
    carried: Path | None  # what `--prepare` made: see carried.py
    until: float  # as time.monotonic(), which all processes of a machine share
    part: str = ""  # which of a step that comes in several: a backend as the report names it, say
    small: bool = False  # a rehearsal: sizes that a processor can do

    def left(self) -> float:
        """Seconds."""
        return self.until - time.monotonic()


class Job(NamedTuple):
    """What the process is told."""

    step: str  # a module of benchmarks.gpu.steps with `items(setting)`
    part: str
    work: str
    carried: str | None
    until: float
    rehearse: bool
    results: str  # the file of lines
    done: list[str]  # items that are not run again
    failed: list[str]  # items that failed before: they are tried again, after all others


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the process; returns its exit status."""
    path = (sys.argv[1:] if arguments is None else arguments)[0]
    job = Job(**json.loads(Path(path).read_text()))
    card: Card = Rehearsal() if job.rehearse else CudaCard()
    carried = Path(job.carried) if job.carried else None
    setting = Setting(card, Path(job.work), carried, job.until, job.part, small=job.rehearse)
    items = importlib.import_module(f"{__package__}.steps.{job.step}").items
    with open(job.results, "a") as results:

        def write(line: dict[str, Any]) -> None:
            results.write(json.dumps(line) + "\n")
            results.flush()

        with torch.inference_mode():
            return run(items(setting), setting, write, job.done, job.failed)


def run(
    items: Iterator[Item],
    setting: Setting,
    write: Callable[[dict[str, Any]], None],
    done: Sequence[str] = (),
    failed: Sequence[str] = (),
) -> int:
    """Run the items, first those that were never tried; `write` gets {"begin": name}, then {"name": name,
    ...} for each. Returns the exit status."""
    again: list[Item] = []
    wanted = (item for item in items if item.name not in done)

    def in_order() -> Iterator[Item]:
        for item in wanted:
            if item.name in failed:
                again.append(item)
            else:
                yield item
        yield from again

    cut = False
    for item in in_order():
        if setting.left() <= 0:
            return CUT
        write({"begin": item.name})
        begun = time.perf_counter()
        found, sticky = attempt(item, setting.card)
        cut |= "cut" in found
        write({"name": item.name, **found, "seconds": round(time.perf_counter() - begun, 3)})
        if sticky:
            return STICKY
        if found.get("spoiled"):
            return AGAIN
    return CUT if cut else THROUGH


def attempt(item: Item, card: Card) -> tuple[dict[str, Any], bool]:
    """The item's result, and whether the device is lost to this process."""
    try:
        found = item.run()
        card.synchronize()  # what goes wrong on the device is this item's fault
        return found, False
    except Exception as error:  # whatever a kernel, a compiler or a library may raise: the next item is worth
        found = {"failed": first_line(error), "trace": traceback.format_exc()[-2000:]}
        if isinstance(error, CaptureError) and not card.can_capture():
            found["spoiled"] = True
    try:
        card.synchronize()
        torch.ones(1, device=card.device).add_(1).cpu()
    except Exception as error:  # the same again: it will not go away
        return found | {"sticky": first_line(error)}, True
    return found, False


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main())
