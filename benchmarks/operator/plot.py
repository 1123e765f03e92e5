# SPDX-License-Identifier: Apache-2.0
"""Ratios to torch's own attention as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """One panel per dtype and method, one group per layer, one bar per set of concepts; the line at 1 is
    attention without negation. Whiskers are 95 % intervals."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((r["dtype"], r["method"]) for r in rows))
    layers = list(dict.fromkeys(r["layer"] for r in rows))
    sets = list(dict.fromkeys(r["concepts"] for r in rows))
    figure = Figure(figsize=(3 + 1.2 * len(layers), 2.6 * len(panels)), layout="constrained")
    width = 0.8 / len(sets)
    for axes, panel in zip(figure.subplots(len(panels), squeeze=False).flat, panels):
        for i, concepts in enumerate(sets):
            chosen = [r for r in rows if (r["dtype"], r["method"]) == panel and r["concepts"] == concepts]
            ratios = [r["fused_over"]["sdpa"] for r in chosen]
            medians = [r["median"] for r in ratios]
            whiskers = [
                [m - r["low"] for m, r in zip(medians, ratios)],
                [r["high"] - m for m, r in zip(medians, ratios)],
            ]
            at = [layers.index(r["layer"]) + (i - (len(sets) - 1) / 2) * width for r in chosen]
            axes.bar(at, medians, width, yerr=whiskers, capsize=2, label=concepts)
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_xticks(range(len(layers)), layers)
        axes.set_ylabel("time / SDPA without negation")
        axes.set_title(", ".join(panel))
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, title="concepts x tokens", loc="outside right upper")
    figure.savefig(file)
