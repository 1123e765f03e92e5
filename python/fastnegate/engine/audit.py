# SPDX-License-Identifier: Apache-2.0
"""`audit`: what negation did during pipeline calls: report, heat maps, JSON.

A gate statistic is evidence about a layer's features, not proof that a concept is absent from the
picture.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import host
from .engine import Engine
from .errors import AuditError
from .heat import HeatMap
from .session.call import Record

_Image = tuple[int, int]
_T = TypeVar("_T")


@dataclass
class _Totals:
    """Sums over layers and steps for one image and concept."""

    calls: int = 0
    gate_max: float = 0.0
    gate_mean: float = 0.0
    gate_fraction: float = 0.0
    mass_mean: float = 0.0
    similarity_max: float = -math.inf
    heat: dict[int, Tensor] = field(default_factory=dict)  # queries N -> sum of heat [N]
    heats: dict[int, int] = field(default_factory=dict)  # and how many were added


def _alone(method: Callable[..., _T]) -> Callable[..., _T]:
    """While no call adds to the record."""

    @functools.wraps(method)
    def locked(self: Audit, *args: Any, **kwargs: Any) -> _T:
        with self._adding:
            return method(self, *args, **kwargs)

    return locked


class Audit:
    """Collects the statistics of every negated attention call while its context is open."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # An image is a pipeline call and a row of it, counted from the first that is conditional: calls of a
        # step may have unconditional rows before those or not.
        self._totals: dict[tuple[_Image, str], _Totals] = defaultdict(_Totals)
        self._asked: set[tuple[_Image, str]] = set()
        self._requests: dict[_Image, int | None] = {}
        self._calls: dict[tuple[int, int | None], dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self._removed: dict[_Image, list[float]] = defaultdict(list)
        self._nonfinite = 0
        self._adding = threading.RLock()  # calls of several threads, and who reads meanwhile

    @_alone
    def __call__(self, record: Record) -> None:
        stats = record.statistics
        self._calls[record.call, record.step][record.layer] += 1
        first = next((row for row, request in enumerate(record.requests) if request is not None), 0)
        self._asked |= {((record.call, row - first), concept) for row, concept in record.asked}
        groups: dict[tuple[int, str], list[int]] = defaultdict(list)
        for entry, row, concept in record.entries:
            groups[row, concept].append(entry)
        for (row, concept), entries in groups.items():
            image = record.call, row - first
            self._requests[image] = record.requests[row]
            total = self._totals[image, concept]
            total.calls += 1
            total.gate_max = max(total.gate_max, stats.gate_max[entries].max().item())
            total.gate_mean += stats.gate_mean[entries].max().item()
            total.gate_fraction += stats.gate_fraction[entries].max().item()
            total.mass_mean += stats.mass_mean[entries].sum().item()
            total.similarity_max = max(total.similarity_max, stats.similarity_max[entries].max().item())
            heat = stats.heat[entries].amax(0).cpu()
            total.heat[len(heat)] = total.heat.get(len(heat), torch.zeros_like(heat)) + heat
            total.heats[len(heat)] = total.heats.get(len(heat), 0) + 1
        for row in {row for row, _ in groups}:
            self._removed[record.call, row - first].append(stats.removed_energy[row].item())
        self._nonfinite += int(stats.nonfinite.sum().item())

    @_alone
    def report(self) -> list[dict[str, Any]]:
        """One dict per image and concept: `image` (in order of the calls and their negated rows),
        `request`, `concept`, `calls` (layers x steps at which it acted), `gate_max`, `gate_mean`,
        `gate_fraction`, `mass_mean`, `similarity_max`, and `removed_energy`, the mean share of the
        row's energy removed."""
        images = self._images()
        lines = []
        for (image, concept), t in sorted(self._totals.items(), key=lambda item: item[0]):
            removed = self._removed[image]
            lines.append(
                {
                    "image": images.index(image),
                    "request": self._requests[image],
                    "concept": concept,
                    "calls": t.calls,
                    "gate_max": t.gate_max,
                    "gate_mean": t.gate_mean / t.calls,
                    "gate_fraction": t.gate_fraction / t.calls,
                    "mass_mean": t.mass_mean / t.calls,
                    "similarity_max": t.similarity_max,
                    "removed_energy": sum(removed) / len(removed),
                }
            )
        return lines

    @_alone
    def heatmap(self, concept: str, image: int = 0) -> HeatMap:
        """Where `concept` was suppressed in the `image`-th negated image.

        Raises:
            ValueError: nothing was recorded for them.
        """
        images = self._images()
        if not 0 <= image < len(images) or (images[image], concept) not in self._totals:
            raise ValueError(f"concept={concept!r}, image={image}: nothing was recorded for them")
        total = self._totals[images[image], concept]
        return HeatMap({n: heat / total.heats[n] for n, heat in total.heat.items()})

    def to_json(self, path: str | Path) -> None:
        """Write the report."""
        Path(path).write_text(json.dumps({"rule": self._engine.rule.name, "images": self.report()}, indent=2))

    @_alone
    def verify(self) -> None:
        """Raise AuditError unless every concept that was asked for acted, every layer ran negated
        equally often at every recorded step, and no output was inf or NaN."""
        if not self._totals:
            raise AuditError("no negated attention call was recorded")
        for image, concept in sorted(self._asked - self._totals.keys()):
            raise AuditError(f"concept {concept!r} never acted on image {self._images().index(image)}")
        for (_, step), calls in self._calls.items():
            for layers in self._engine.models:
                most = max((calls[layer] for layer in layers), default=0)  # 0: another model's step
                for layer in layers:
                    if calls[layer] != most:
                        raise AuditError(
                            f"layer {layer} ran {calls[layer]} times at step {step}, others more often"
                        )
        if self._nonfinite:
            raise AuditError(f"{self._nonfinite} output values are not finite")

    def __repr__(self) -> str:
        return f"Audit({len(self._images())} images, {self._engine!r})"

    def _images(self) -> list[_Image]:
        return sorted({image for image, _ in self._asked})


@contextlib.contextmanager
def audit(pipe: Any) -> Iterator[Audit]:
    """Collect statistics of the pipeline calls made within the context.

    Raises:
        ValueError: no engine is installed in `pipe`.
    """
    engine = host.of(pipe).engine_of(pipe)
    if engine is None:
        raise ValueError("pipe has no engine: call fastnegate.install or negate first")
    collector = Audit(engine)
    end = engine.watch(collector)
    try:
        yield collector
    finally:
        end()
