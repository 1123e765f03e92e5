# SPDX-License-Identifier: Apache-2.0
"""Which call a denoiser call belongs to, and at which of its steps: a pipeline's, or a server's own loop."""

from __future__ import annotations

import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from ...engine.engine import Engine
from ...engine.session.call import PipelineCall, current_loop
from ...engine.session.ledger import Ledger
from ...engine.session.rows import Step
from .contract import InProgress, bare, denoisers

MOST_CALLS = 256  # pipeline calls in progress that are told apart


class OwnCall(PipelineCall):
    """A pipeline call: the schedule steps that it runs, and those that came by."""

    def __init__(self, timesteps: Any, schedule: Any) -> None:
        super().__init__()
        self.timesteps = timesteps  # kept: its identity is this call's
        everything, these = _listed(schedule), _listed(timesteps)
        self.count = len(everything)
        # A part of the schedule: img2img drops its beginning, `denoising_end` its end. PNDM and Heun repeat
        # timesteps, so the whole part has to match.
        first = next(
            (i for i in _from_both_ends(self.count - len(these)) if everything[i : i + len(these)] == these),
            None,
        )
        if first is None:  # a schedule of its own
            first, self.count = 0, len(these)
        self.run = range(first, first + len(these))
        self.seen: set[tuple[int, int]] = set()  # which timestep, and which part of its denoiser calls

    def step(self, index: int) -> Step:
        return Step(self.run.start + index, self.count, self.run)

    def is_of(self, progress: InProgress) -> bool:
        """Whether a denoiser call is of this pipeline call, not of another that has the same timesteps: a
        step comes once in a call."""
        comes_again = progress.own and (progress.at, progress.part) in self.seen
        return self.timesteps is progress.timesteps and not comes_again

    @property
    def missing(self) -> int:
        """Steps that did not come by."""
        return len(self.run) - len({at for at, _ in self.seen})


class Watched:
    """A call of a pipeline that has the hook around it: whom it is for, and what came by of it."""

    def __init__(self, pipe: Any, ledger: Ledger | None) -> None:
        self.pipe, self.ledger = pipe, ledger
        self.calls: list[OwnCall] = []

    @property
    def asks(self) -> bool:
        return self.ledger is not None and self.ledger.assignment.asks


WATCHED: ContextVar[Watched | None] = ContextVar("fastnegate_watched", default=None)


class Calls:
    """The pipeline calls and loops that an engine's denoiser is called in."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._own: OrderedDict[tuple[int, int], OwnCall] = OrderedDict()  # of pipelines without a hook
        self._loops = threading.local()
        self._adding = threading.Lock()

    def own(self, progress: InProgress) -> OwnCall:
        """The pipeline call in progress, known by the object that holds its timesteps."""
        watched = WATCHED.get()
        if watched is not None and watched.pipe is progress.pipe:
            for known in reversed(watched.calls):
                if known.is_of(progress):
                    return known
            made = OwnCall(progress.timesteps, progress.pipe.scheduler.timesteps)
            made.pin(watched.ledger)
            watched.calls.append(made)
            return made
        key = threading.get_ident(), id(progress.timesteps)
        with self._adding:
            unwatched = self._own.get(key)
            if unwatched is not None and unwatched.is_of(progress):
                return unwatched
            made = self._own[key] = OwnCall(progress.timesteps, progress.pipe.scheduler.timesteps)
            while len(self._own) > MOST_CALLS:
                self._own.popitem(last=False)
        made.pin(self._engine.ledger())
        if made.ledger is not None and made.ledger.ends and made.ledger.assignment.asks:
            made.ledger.ask_at_the_end(_unwatched(made, progress.pipe, self._engine))
        return made

    def loop(
        self, pipe: Any, timestep: Any, clock: Callable[[float], float]
    ) -> tuple[PipelineCall, Step | None]:
        """Of a denoiser call that no pipeline makes: a server's own loop, which the scheduler's timesteps
        tell about, by the model's clock. Steps grow within a loop; rows at different timesteps have no common
        step."""
        loops, said = self._loops, current_loop()
        timesteps = None if pipe is None else pipe.scheduler.timesteps
        if timesteps is None:
            return said or PipelineCall(), None
        if timesteps is not getattr(loops, "timesteps", None):
            loops.timesteps, loops.last, loops.of = timesteps, -1, None
            loops.listed = [clock(t) for t in _listed(timesteps)]
        rows = set(timestep.flatten().tolist()) if isinstance(timestep, Tensor) else {timestep}
        t = rows.pop()
        at = (
            [i for i, known in enumerate(loops.listed) if math.isclose(known, t, rel_tol=1e-6)]
            if not rows
            else []
        )
        if not at:
            return said or PipelineCall(), None
        later = [i for i in at if i >= loops.last]
        if loops.of is None or not later:
            loops.of = PipelineCall()
        loops.last = later[0] if later else at[0]
        return said or loops.of, Step(loops.last, len(loops.listed))


def _unwatched(call: OwnCall, pipe: Any, engine: Engine) -> Callable[[], str | None]:
    """Of a pipeline that shares the denoiser and has no hook around it yet: whether it lost the denoiser."""
    models = {name: weakref.ref(bare(model)) for name, model in denoisers(pipe).items()}
    owner = weakref.ref(pipe)

    def lost() -> str | None:
        living = owner()
        if living is None or not call.missing:
            return None
        if not engine.removed and all(bare(getattr(living, n)) is model() for n, model in models.items()):
            return None
        return (
            f"{call.missing} steps ran without negation: the engine was removed, or the "
            f"{' or '.join(models)} exchanged"
        )

    return lost


def _listed(timesteps: Any) -> list[float]:
    return timesteps.tolist() if hasattr(timesteps, "tolist") else list(timesteps)


def _from_both_ends(last: int) -> Iterator[int]:
    """0 and `last`, where parts of a schedule mostly begin, and then what is between."""
    yield from dict.fromkeys((0, last, *range(1, last))) if last >= 0 else ()
