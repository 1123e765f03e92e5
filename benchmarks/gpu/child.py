# SPDX-License-Identifier: Apache-2.0
"""Processes that end: with everything that they started, when their time is over."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

THROUGH, STICKY, CUT, AGAIN = 0, 3, 4, 5  # exit statuses of a step: see step.py


class Done(NamedTuple):
    status: int | None  # None: its time was over
    output: str  # both streams
    seconds: float

    @property
    def why(self) -> str:
        """Why it failed, in a line."""
        if self.status is None:
            return f"killed after {self.seconds:.1f} s"
        if self.status < 0:
            return f"died of {signal.Signals(-self.status).name}"
        last = self.output.strip().rpartition("\n")[2]
        return f"exit status {self.status}: {last}"


def start(
    command: Sequence[str | Path],
    output: IO[str],
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> subprocess.Popen[str]:
    """A process that leads a session of its own and reads nothing."""
    return _started(command, output, environment, cwd=folder, start_new_session=True)


def kill(process: subprocess.Popen[str]) -> None:
    """It and what it started, also what outlived it, if it was started here."""
    for pid in [process.pid, *_of_session(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(os.getpgid(pid), signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(command: Sequence[str | Path], limit: float, environment: Mapping[str, str] | None = None) -> Done:
    """Run a command for at most `limit` seconds. It leads a group of its own within our session: who kills us
    as `kill` does reaches it, too."""
    begun = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:  # no pipe: whoever holds one is waited for
        try:
            process = _started(command, output, environment, preexec_fn=os.setpgrp)
        except OSError as error:  # it is not there, or no program
            return Done(127, str(error), 0.0)
        try:
            status: int | None = process.wait(max(limit, 0.1))
        except subprocess.TimeoutExpired:
            status = None
        finally:
            kill(process)
        output.seek(0)
        return Done(status, output.read(), time.monotonic() - begun)


def _started(
    command: Sequence[str | Path], output: IO[str], environment: Mapping[str, str] | None, **options: Any
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, **(environment or {})}, **options,
    )  # fmt: skip


def _of_session(leader: int) -> list[int]:
    """Processes of the session that this process leads."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(int(path.name)) == leader:
                found.append(int(path.name))
    return found
