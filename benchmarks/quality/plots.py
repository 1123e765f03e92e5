# SPDX-License-Identifier: Apache-2.0
"""Pictures of results: frontiers of what is gone against what is kept, and what was drawn, unselected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from fastnegate.testbed.quality import Row, Stage
from fastnegate.testbed.quality.methods import METHODS, method_of
from fastnegate.testbed.quality.results import Results
from fastnegate.testbed.quality.stage import noise_of

STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Factors to the published strengths."""

COLUMNS = 8
"""Cases of a suite in a grid: the first ones."""

_ENLARGED = 2  # pixels of the sheet to one of a picture
_GAP = 4


def frontier(results: Results, file: Path) -> None:
    """A panel per suite in which something should go: a line per method and `shared` mode through strengths.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install 'fastnegate[quality]'") from error

    rows = [row for row in results.rows if row.scores]
    suites = [score.suite for score in rows[0].scores if not score.benign]
    methods = list(dict.fromkeys(map(_label, rows)))
    columns = min(len(suites), 3)
    shape = (-(-len(suites) // columns), columns)
    figure = Figure(figsize=(4 * shape[1], 3.6 * shape[0]), layout="constrained")
    panels = figure.subplots(*shape, squeeze=False).flat
    for axes, suite in zip(panels, suites):
        for i, method in enumerate(methods):
            found = [s for row in rows if _label(row) == method for s in row.scores if s.suite == suite]
            gone = [100 * score.gone[0].value for score in found]
            kept = [100 * score.kept[0].value for score in found]
            # 20 colours and 2 marks: lines that lie on each other are told apart.
            style = {"color": f"C{i % 10}", "marker": "o^"[i // 10 % 2], "markersize": 4, "linewidth": 1}
            axes.plot(gone, kept, label=method, alpha=0.8, **style)
        axes.set(title=suite, xlim=(-3, 103), ylim=(-3, 103), xlabel="gone, %", ylabel="kept, %")
    for axes in panels:
        axes.set_axis_off()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper")
    figure.suptitle(
        f"{results.host}, {results.guidance}: strength x {', '.join(map('{:g}'.format, STRENGTHS))}"
    )
    figure.savefig(file, metadata={"Software": None})


def _label(row: Row) -> str:
    """The method, and where it has the image's keys on a joint host."""
    return f"{row.method}, {row.numbers['shared']}" if "shared" in row.numbers else row.method


def grid(
    stage: Stage,
    name: str,
    seed: int,
    file: Path,
    expect: Callable[[int], None] = lambda _: None,
    on_step: Callable[[str], None] = lambda _: None,
) -> None:
    """A sheet of two lines for each suite: its first cases without negation, and below with it.

    Raises:
        ValueError: another method.
        UnsupportedModelError: it does not fit the stage.
    """
    from PIL import Image

    from fastnegate.testbed.model import DEFAULT_STEPS

    method = method_of(name)
    together = COLUMNS if method.mixed else 1
    suites, side = stage.world.SUITES, stage.world.SIZE * _ENLARGED
    expect(len(suites) * (1 + COLUMNS // together) * DEFAULT_STEPS)
    wide = COLUMNS * (side + _GAP) + _GAP
    sheet = Image.new("RGB", (wide, len(suites) * (2 * side + 3 * _GAP)), "white")
    for line, suite in enumerate(suites):
        cases = stage.world.suite(suite, COLUMNS, seed)
        noise = [noise_of(seed, i, "test") for i in range(COLUMNS)]
        told = lambda suite=suite: on_step(f"{name} on {suite}")  # noqa: E731
        plain = stage.draw(METHODS["none"], {}, cases, noise, told)
        negated = [
            picture
            for i in range(0, COLUMNS, together)
            for picture in stage.draw(method, {}, cases[i : i + together], noise[i : i + together], told)
        ]
        top = line * (2 * side + 3 * _GAP) + _GAP
        for i, pictures in enumerate((plain, negated)):
            for j, picture in enumerate(pictures):
                shown = Image.fromarray((255 * np.clip(picture, 0, 1)).round().astype(np.uint8))
                shown = shown.resize((side, side), Image.Resampling.NEAREST)
                sheet.paste(shown, (_GAP + j * (side + _GAP), top + i * (side + _GAP)))
    sheet.save(file)
