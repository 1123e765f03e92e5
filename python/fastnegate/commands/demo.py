# SPDX-License-Identifier: Apache-2.0
"""`fastnegate demo`: one prompt on the embedded model, without and with a negated concept."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..engine.audit import Audit, audit
from ..integrations.diffusers.install import negate
from ..operator.attention import backends
from ..operator.backends import AUTO
from ..testbed.easy.detector import LOOSE, STRICT, detect, kept, objects_in, shows
from ..testbed.model import DEFAULT_GUIDANCE, load
from ..testbed.quality import bank_of
from .progress import progress
from .sheet import Cell, Mark, picture, sheet

METHODS = ("nag", "vsf", "eiup", "protore")


@dataclass
class Column:
    """The pictures of one method, and what the detector and the audit say about them."""

    method: str
    images: list[Any] = field(repr=False)
    step_ms: float
    present: list[bool]  # the concept, per picture
    kept: list[bool]  # every object that the concept does not cover, per picture
    found: list[list[dict[str, Any]]]
    audit: list[dict[str, Any]] = field(default_factory=list)


def run(
    prompt: str,
    concept: str,
    methods: Sequence[str] = METHODS,
    *,
    seed: int = 0,
    pictures: int = 4,
    steps: int = 20,
    out: Path = Path("demo"),
) -> dict[str, Any]:
    """Generate, judge and draw; returns what `demo.json` holds.

    Writes `grid.png` (a column per method, a row per seed), `heat.png` (the pictures of the last
    method with where it suppressed the concept laid over them) and `demo.json`.

    Args:
        prompt, concept: of the embedded model's words.
        methods: presets that read a bank's tokens.
        seed: of the first picture; the others follow.
        out: the folder, which is made if need be.

    Raises:
        ValueError: an unknown word, concept or method.
        AuditError: negation was asked for and did not run.
    """
    objects = objects_in(prompt)
    pipe = load()
    bank = bank_of(pipe, (concept,))
    columns = []
    heat = None
    names = ["no negation", "negative prompt", *methods]
    with progress("step") as bar:
        bar.expect((len(names) + len(methods)) * steps)

        def drawn(name: str) -> tuple[list[Any], float]:
            arguments: dict[str, Any] = {"prompt": [prompt] * pictures, "num_inference_steps": steps}
            if name == "negative prompt":
                arguments["negative_prompt"] = [concept] * pictures
            return _draw(pipe, arguments, seed, lambda: bar.step(name))

        for name in names:
            if name not in methods:
                columns.append(_column(name, *drawn(name), concept, objects))
                continue
            with negate(pipe, bank, name):
                images, step_ms = drawn(name)
                with audit(pipe) as record:  # once more, watched: the timed pictures are not
                    watched, _ = drawn(name)
            record.verify()
            if not all(np.array_equal(a, b) for a, b in zip(images, watched)):
                raise RuntimeError(f"method {name}: statistics changed the pictures")
            columns.append(_column(name, images, step_ms, concept, objects))
            columns[-1].audit = record.report()
            heat = _heat(columns[0], columns[-1], record, concept)
    result = _summary(columns, prompt, concept, seed, steps)
    out.mkdir(parents=True, exist_ok=True)
    _grid(columns, prompt, concept, seed).save(out / "grid.png")
    if heat is not None:
        heat.save(out / "heat.png")
    (out / "demo.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    count = result["pictures"]
    lines = [
        f"prompt: {result['prompt']}    negated: {result['concept']}    "
        f"{count} seeds, {result['steps']} steps",
        f"{'':17}{'concept present':>16}{'rest present':>14}{'ms/step':>9}{'vs none':>9}",
    ]
    for column in result["columns"]:
        lines.append(
            f"{column['method']:17}{sum(column['present']):>11} of {count}{sum(column['kept']):>9} of {count}"
            f"{column['step_ms']:9.1f}{column['step_ms'] / result['columns'][0]['step_ms']:9.2f}"
        )
    lines.append("(the embedded model is too small to measure speed: see benchmarks/)")
    return "\n".join(lines)


def _draw(
    pipe: Any, arguments: dict[str, Any], seed: int, on_step: Callable[[], None]
) -> tuple[list[Any], float]:
    """Pictures [32, 32, 3] in [0, 1] and the median milliseconds of a step."""
    ends = [time.perf_counter()]

    def on_step_end(_pipe: Any, _i: int, _t: Any, values: dict[str, Any]) -> dict[str, Any]:
        ends.append(time.perf_counter())
        on_step()
        return values

    count = len(arguments["prompt"])
    images = pipe(
        **arguments,
        guidance_scale=DEFAULT_GUIDANCE,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(count)],
        output_type="np",
        callback_on_step_end=on_step_end,
    ).images
    return list(images), 1e3 * statistics.median(np.diff(ends))


def _column(method: str, images: list[Any], step_ms: float, concept: str, objects: Any) -> Column:
    strict = [detect(image, STRICT) for image in images]
    return Column(
        method,
        images,
        step_ms,
        [shows(detect(image, LOOSE), concept) for image in images],
        [kept(found, objects, concept) for found in strict],
        [[asdict(d) for d in found] for found in strict],
    )


def _summary(columns: list[Column], prompt: str, concept: str, seed: int, steps: int) -> dict[str, Any]:
    described = [{k: v for k, v in vars(column).items() if k != "images"} for column in columns]
    chosen = next(name for name in AUTO if backends()[name] is None)
    return {
        "prompt": prompt,
        "concept": concept,
        "seeds": list(range(seed, seed + len(columns[0].images))),
        "pictures": len(columns[0].images),
        "steps": steps,
        "guidance_scale": DEFAULT_GUIDANCE,
        "backend": chosen,
        "columns": described,
    }


# ---- pictures ---------------------------------------------------------------------------------


def _grid(columns: list[Column], prompt: str, concept: str, seed: int) -> Image.Image:
    """Under each picture both verdicts: is the concept gone, and is the rest still there."""

    def cell(column: Column, i: int) -> Cell:
        gone = Mark(f"{concept} stayed" if column.present[i] else f"{concept} gone", not column.present[i])
        rest = Mark("rest kept" if column.kept[i] else "rest lost", column.kept[i])
        return Cell(picture(column.images[i]), (gone, rest))

    count = len(columns[0].images)
    return sheet(
        f"prompt: {prompt}     negated: {concept}",
        [column.method for column in columns],
        [f"seed {seed + i}" for i in range(count)],
        [[cell(column, i) for column in columns] for i in range(count)],
    )


def _heat(plain: Column, negated: Column, record: Audit, concept: str) -> Image.Image:
    rows = []
    for i, (before, after) in enumerate(zip(plain.images, negated.images)):
        overlay = record.heatmap(concept, i).overlay(picture(before))
        rows.append([Cell(picture(before)), Cell(picture(after)), Cell(overlay)])
    names = ["no negation", negated.method, f"gate of {concept}"]
    return sheet(f"where {concept} was suppressed", names, [""] * len(rows), rows)
