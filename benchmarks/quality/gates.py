# SPDX-License-Identifier: Apache-2.0
"""Why a method wins or loses: its gates and similarities by layer and step, where the concept is in the
prompt and where it is not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastnegate.engine.errors import UnsupportedModelError
from fastnegate.engine.session.call import Record
from fastnegate.integrations.diffusers.install import engine_of
from fastnegate.testbed.model import DEFAULT_STEPS
from fastnegate.testbed.quality import Stage
from fastnegate.testbed.quality.methods import method_of
from fastnegate.testbed.quality.stage import noise_of

BINS = tuple(round(-1 + 0.1 * i, 1) for i in range(21))
"""Edges of the histograms."""


@dataclass(frozen=True)
class Gates:
    """Of a layer at a step, over the entries of all cases of a suite: prototypes, or whole concepts.

    Args:
        suite, layer, step: where.
        mean: of the gate, over queries, heads and entries.
        largest: mean over entries of their largest gate.
        similarities: how many entries had their largest similarity between two of `BINS`.
    """

    suite: str
    layer: str
    step: int
    mean: float
    largest: float
    similarities: tuple[int, ...]


def collect(
    stage: Stage,
    name: str,
    suites: Sequence[str],
    cases: int,
    seed: int,
    expect: Callable[[int], None] = lambda _: None,
    on_step: Callable[[str], None] = lambda _: None,
) -> list[Gates]:
    """Draw the first cases of suites with a preset, at its published numbers, and look at its statistics.

    Raises:
        ValueError: another method or suite.
        UnsupportedModelError: a method that has no gates: one beside attention.
    """
    expect(len(suites) * DEFAULT_STEPS)
    return [
        found
        for suite in suites
        for found in _of_suite(
            stage, name, suite, cases, seed, lambda suite=suite: on_step(f"{name} on {suite}")
        )
    ]


def _of_suite(
    stage: Stage, name: str, suite: str, cases: int, seed: int, on_step: Callable[[], None]
) -> Iterator[Gates]:
    method, records = method_of(name), list[Record]()

    @contextmanager
    def watched(*given: Any) -> Iterator[dict[str, Any]]:
        with method.applied(*given) as changed:
            engine = engine_of(stage.pipe)
            if engine is None:
                raise UnsupportedModelError(f"{name} acts beside attention: it has no gates")
            end = engine.watch(records.append)
            try:
                yield changed
            finally:
                end()

    drawn = stage.world.suite(suite, cases, seed, split="development")
    noise = [noise_of(seed, i, "development") for i in range(cases)]
    stage.draw(replace(method, applied=watched), {}, drawn, noise, on_step)
    places: dict[tuple[str, int], list[Record]] = defaultdict(list)
    for record in records:
        places[record.layer, record.step or 0].append(record)
    for (layer, step), some in places.items():
        yield _summed(suite, layer, step, some)


def _summed(suite: str, layer: str, step: int, records: Sequence[Record]) -> Gates:
    def of_entries(field: str) -> np.ndarray[Any, Any]:
        values = [getattr(r.statistics, field)[[entry for entry, *_ in r.entries]] for r in records]
        return np.concatenate([value.cpu().numpy() for value in values])

    counts, _ = np.histogram(np.clip(of_entries("similarity_max"), -1, 1), BINS)
    mean, largest = float(of_entries("gate_mean").mean()), float(of_entries("gate_max").mean())
    return Gates(suite, layer, step, mean, largest, tuple(map(int, counts)))


def picture(found: Sequence[Gates], name: str, file: Path) -> None:
    """A column per suite: mean gates by layer and step, and below the similarities by layer.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install 'fastnegate[quality]'") from error

    suites = list(dict.fromkeys(g.suite for g in found))
    layers = list(dict.fromkeys(g.layer for g in found))
    figure = Figure(figsize=(4 * len(suites), 2 + 0.35 * len(layers) * 2), layout="constrained")
    panels = figure.subplots(2, len(suites), squeeze=False)
    top = max(g.mean for g in found) or 1.0
    for column, suite in enumerate(suites):
        here = [g for g in found if g.suite == suite]
        steps = sorted({g.step for g in here})
        maps, counts = np.zeros((len(layers), len(steps))), np.zeros((len(layers), len(BINS) - 1))
        for g in here:
            maps[layers.index(g.layer), steps.index(g.step)] = g.mean
            counts[layers.index(g.layer)] += g.similarities
        upper, lower = panels[:, column]
        image = upper.imshow(maps, vmin=0, vmax=top, aspect="auto", cmap="viridis")
        upper.set(title=f"{suite}: mean gate", xlabel="step")
        shares = counts / counts.sum(1, keepdims=True).clip(min=1)
        lower.imshow(
            shares, vmin=0, vmax=1, aspect="auto", cmap="viridis", extent=(-1, 1, len(layers) - 0.5, -0.5)
        )
        lower.set(title="largest similarity, share of entries", xlabel="similarity")
        for axes in (upper, lower):
            axes.set_yticks(range(len(layers)), [_short(layer) for layer in layers] if not column else [])
    figure.colorbar(image, ax=panels[0].tolist())
    figure.suptitle(name)
    figure.savefig(file, metadata={"Software": None})


def _short(layer: str) -> str:
    return (
        layer.replace("_blocks", "")
        .replace(".attentions", "")
        .replace(".transformer", "")
        .replace(".attn2", "")
    )


def as_json(found: Sequence[Gates]) -> list[dict[str, Any]]:
    """As files have them."""
    return [asdict(g) for g in found]
