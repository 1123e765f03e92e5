# SPDX-License-Identifier: Apache-2.0
"""Why a method wins or loses: its gates and similarities by layer, head and step, where the concept is in the
prompt and where it is not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from torch import Tensor

from fastnegate import ConceptTokens, Partial, Rule, negated_attention_with_statistics
from fastnegate.engine.errors import UnsupportedModelError
from fastnegate.engine.session.call import Record
from fastnegate.integrations.diffusers import processor
from fastnegate.integrations.diffusers.install import engine_of
from fastnegate.integrations.diffusers.joint import attention as joint
from fastnegate.operator.statistics import Statistics
from fastnegate.testbed.model import DEFAULT_STEPS
from fastnegate.testbed.quality import Stage
from fastnegate.testbed.quality.methods import method_of
from fastnegate.testbed.quality.stage import noise_of

BINS = tuple(round(-1 + 0.1 * i, 1) for i in range(21))
"""Edges of the histograms."""


@dataclass(frozen=True)
class Gates:
    """Of a head at a step, over the entries of all cases of a suite: prototypes, or whole concepts.

    Args:
        suite, layer, step: where.
        head: of the layer; None: all of them, by a rule that measures them together (scope `feature`).
        mean: of the gate, over queries and entries.
        largest: mean over entries of their largest gate.
        similarities: how many entries had their largest similarity between two of `BINS`.
    """

    suite: str
    layer: str
    step: int
    head: int | None
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
    method = method_of(name)
    latest: list[Statistics] = []  # of each head, in the layer's call that is recorded next
    places: dict[tuple[str, int, int | None], list[Statistics]] = defaultdict(list)

    def note(record: Record) -> None:
        acting = [entry for entry, *_ in record.entries]
        for head, seen in enumerate(latest) if latest else [(None, record.statistics)]:
            gates = {
                field: getattr(seen, field)[acting] for field in ("gate_mean", "gate_max", "similarity_max")
            }
            places[record.layer, record.step or 0, head].append(seen._replace(**gates))

    @contextmanager
    def watched(*given: Any) -> Iterator[dict[str, Any]]:
        with method.applied(*given) as changed:
            engine = engine_of(stage.pipe)
            if engine is None:
                raise UnsupportedModelError(f"{name} acts beside attention: it has no gates")
            end = engine.watch(note)
            try:
                with _by_head(latest):
                    yield changed
            finally:
                end()

    drawn = stage.world.suite(suite, cases, seed, split="development")
    noise = [noise_of(seed, i, "development") for i in range(cases)]
    stage.draw(replace(method, applied=watched), {}, drawn, noise, on_step)
    for (layer, step, head), seen in places.items():
        yield _summed(suite, layer, step, head, seen)


@contextmanager
def _by_head(latest: list[Statistics]) -> Iterator[None]:
    """Have each call of a layer leave in `latest` what each of its heads does: nothing, if the rule measures
    them together."""

    def call(
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        concepts: ConceptTokens,
        rule: Rule,
        **more: Any,
    ) -> tuple[Tensor, Statistics]:
        heads = range(query.shape[1]) if rule.scope == "head" else []
        latest[:] = [
            negated_attention_with_statistics(
                *(_head(tensor, h) for tensor in (query, key, value)),
                _concepts_of_head(concepts, h),
                rule,
                **{name: _head(given, h) for name, given in more.items()},
            )[1]
            for h in heads
        ]
        return negated_attention_with_statistics(query, key, value, concepts, rule, **more)

    name = "negated_attention_with_statistics"
    with patch.object(processor, name, call), patch.object(joint, name, call):
        yield


def _head(given: Any, head: int) -> Any:
    """Of a tensor [B, H, ...] or a partial; what is neither, or the same for all heads, stays."""
    if isinstance(given, Partial):
        return Partial(*(_head(tensor, head) for tensor in given))
    if not isinstance(given, Tensor) or given.shape[1] == 1:
        return given
    return given[:, head : head + 1]


def _concepts_of_head(concepts: ConceptTokens, head: int) -> ConceptTokens:
    def of(given: Tensor | None, axis: int) -> Any:
        return None if given is None else given.narrow(axis, head, 1)

    return replace(
        concepts,
        key=of(concepts.key, -2),
        value=of(concepts.value, -2),
        direction=of(concepts.direction, 1),
        update=of(concepts.update, 1),
    )


def _summed(suite: str, layer: str, step: int, head: int | None, seen: Sequence[Statistics]) -> Gates:
    def of_entries(field: str) -> np.ndarray[Any, Any]:
        return np.concatenate([getattr(statistics, field).cpu().numpy() for statistics in seen])

    counts, _ = np.histogram(np.clip(of_entries("similarity_max"), -1, 1), BINS)
    mean, largest = float(of_entries("gate_mean").mean()), float(of_entries("gate_max").mean())
    return Gates(suite, layer, step, head, round(mean, 4), round(largest, 4), tuple(map(int, counts)))


def picture(found: Sequence[Gates], name: str, file: Path) -> None:
    """A column per suite: mean gates by layer, head and step, and below the similarities by layer and head.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install 'fastnegate[quality]'") from error

    suites = list(dict.fromkeys(g.suite for g in found))
    heads = list(dict.fromkeys((g.layer, g.head) for g in found))
    figure = Figure(figsize=(4 * len(suites), 2 + 0.25 * len(heads) * 2), layout="constrained")
    panels = figure.subplots(2, len(suites), squeeze=False)
    top = max(g.mean for g in found) or 1.0
    for column, suite in enumerate(suites):
        here = [g for g in found if g.suite == suite]
        steps = sorted({g.step for g in here})
        maps, counts = np.zeros((len(heads), len(steps))), np.zeros((len(heads), len(BINS) - 1))
        for g in here:
            line = heads.index((g.layer, g.head))
            maps[line, steps.index(g.step)] = g.mean
            counts[line] += g.similarities
        upper, lower = panels[:, column]
        image = upper.imshow(maps, vmin=0, vmax=top, aspect="auto", cmap="viridis")
        upper.set(title=f"{suite}: mean gate", xlabel="step")
        shares = counts / counts.sum(1, keepdims=True).clip(min=1)
        lower.imshow(
            shares, vmin=0, vmax=1, aspect="auto", cmap="viridis", extent=(-1, 1, len(heads) - 0.5, -0.5)
        )
        lower.set(title="largest similarity, share of entries", xlabel="similarity")
        for axes in (upper, lower):
            axes.set_yticks(range(len(heads)), [_short(*head) for head in heads] if not column else [])
    figure.colorbar(image, ax=panels[0].tolist())
    figure.suptitle(name)
    figure.savefig(file, metadata={"Software": None})


def _short(layer: str, head: int | None) -> str:
    for word in ("_blocks", ".attentions", ".transformer", ".attn2"):
        layer = layer.replace(word, "")
    return layer if head is None else f"{layer} {head}"


def as_json(found: Sequence[Gates]) -> list[dict[str, Any]]:
    """As files have them."""
    return [asdict(g) for g in found]
