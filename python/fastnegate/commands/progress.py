# SPDX-License-Identifier: Apache-2.0
"""A progress bar for whatever takes longer than two seconds: on stderr, and only where that is a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

AFTER = 2.0  # seconds


class Progress:
    """A bar while work goes on, and lines of results above it on stdout."""

    def __init__(self, unit: str) -> None:
        try:
            from tqdm import tqdm
        except ModuleNotFoundError:  # results matter more
            self._bar = None
        else:
            # disable=None: unless stderr is a terminal.
            self._bar = tqdm(total=0, unit=unit, delay=AFTER, leave=False, disable=None)

    def expect(self, units: int) -> None:
        """So much more is to be done."""
        if self._bar is not None:
            self._bar.total += units

    def step(self, label: str = "") -> None:
        """One unit is done; `label` says of what."""
        if self._bar is not None:
            self._bar.set_description_str(label, refresh=False)
            self._bar.update()

    def say(self, line: str = "") -> None:
        """Print a line on stdout at once, in the bar's place; the next step draws the bar again below it."""
        if self._bar is not None:
            self._bar.clear()
        print(line, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


@contextlib.contextmanager
def progress(unit: str) -> Iterator[Progress]:
    """A bar that is gone afterwards."""
    bar = Progress(unit)
    try:
        yield bar
    finally:
        bar.close()
