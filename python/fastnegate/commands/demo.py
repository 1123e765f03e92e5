# SPDX-License-Identifier: Apache-2.0
"""`fastnegate demo`: one prompt on the embedded model, without and with a negated concept."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from ..engine.audit import Audit, audit
from ..integrations.diffusers.install import MOST_IMAGES, negate
from ..operator.attention import backends
from ..operator.backends import AUTO
from ..operator.rule import Rule
from ..testbed.concepts import members
from ..testbed.detector import LOOSE, STRICT, detect, kept, objects_in, shows
from ..testbed.model import DEFAULT_GUIDANCE, load
from ..testbed.quality import bank_of

METHODS = ("nag", "vsf", "eiup", "protore")
_CELL, _TEXT = 160, 34  # pixels of a picture in the grid, and of a line of text


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

    Raises:
        ValueError: an unknown word, concept or method, or numbers that are not positive.
        AuditError: negation was asked for and did not run.
    """
    for method in methods:
        Rule.preset(method)
    for name, number in (("pictures", pictures), ("steps", steps)):
        if number < 1:
            raise ValueError(f"{name}={number}: must be >= 1")
    if pictures > MOST_IMAGES:
        raise ValueError(f"pictures={pictures}: must be <= {MOST_IMAGES}")
    objects = objects_in(prompt)
    members(concept)
    out.mkdir(parents=True, exist_ok=True)
    pipe = load()
    bank = bank_of(pipe, (concept,))
    columns = []
    heat = None
    names = ["no negation", "negative prompt", *methods]
    with tqdm(total=len(names) * steps, unit="step") as bar:
        for name in names:
            bar.set_description(f"{name:>15}")
            arguments: dict[str, Any] = {"prompt": [prompt] * pictures, "num_inference_steps": steps}
            if name == "negative prompt":
                arguments["negative_prompt"] = [concept] * pictures
            if name not in methods:
                columns.append(_column(name, *_draw(pipe, arguments, seed, bar), concept, objects))
                continue
            with negate(pipe, bank, name):
                drawn = _draw(pipe, arguments, seed, bar)
                with audit(pipe) as record:  # once more, watched: the timed pictures are not
                    watched, _ = _draw(pipe, arguments, seed, None)
            record.verify()
            if not all(np.array_equal(a, b) for a, b in zip(drawn[0], watched)):
                raise RuntimeError(f"method {name}: statistics changed the pictures")
            columns.append(_column(name, *drawn, concept, objects))
            columns[-1].audit = record.report()
            heat = _heat(columns[0], columns[-1], record, concept)
    _grid(columns, prompt, concept, seed).save(out / "grid.png")
    if heat is not None:
        heat.save(out / "heat.png")
    result = _summary(columns, prompt, concept, seed, steps)
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


def _draw(pipe: Any, arguments: dict[str, Any], seed: int, bar: Any) -> tuple[list[Any], float]:
    """Pictures [32, 32, 3] in [0, 1] and the median milliseconds of a step."""
    ends = [time.perf_counter()]

    def on_step_end(_pipe: Any, _i: int, _t: Any, values: dict[str, Any]) -> dict[str, Any]:
        ends.append(time.perf_counter())
        if bar is not None:
            bar.update()
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


def _picture(array: Any) -> Image.Image:
    pixels = (np.clip(array, 0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(pixels).resize((_CELL, _CELL), Image.Resampling.NEAREST)


def _grid(columns: list[Column], prompt: str, concept: str, seed: int) -> Image.Image:
    rows = [[_picture(c.images[i]) for c in columns] for i in range(len(columns[0].images))]
    marks = [
        [(f"{concept}: {'yes' if c.present[i] else 'no'}", not c.present[i]) for c in columns]
        for i in range(len(rows))
    ]
    return _sheet(
        f"prompt: {prompt}     negated: {concept}",
        [c.method for c in columns],
        [f"seed {seed + i}" for i in range(len(rows))],
        rows,
        marks,
    )


def _heat(plain: Column, negated: Column, record: Audit, concept: str) -> Image.Image:
    rows = []
    for i, (before, after) in enumerate(zip(plain.images, negated.images)):
        overlay = record.heatmap(concept, i).overlay(_picture(before))
        rows.append([_picture(before), overlay, _picture(after)])
    names = ["no negation", f"{negated.method}: gate of {concept}", negated.method]
    return _sheet(f"where {concept} was suppressed", names, [""] * len(rows), rows, None)


def _sheet(
    title: str,
    columns: list[str],
    rows: list[str],
    pictures: list[list[Image.Image]],
    marks: list[list[tuple[str, bool]]] | None,
) -> Image.Image:
    """Pictures in a table with a title, column and row names, and a coloured mark under each."""
    font = ImageFont.load_default(size=15)
    gap, left = 10, 70 if any(rows) else 10
    line = _CELL + gap + (24 if marks else 0)
    sheet = Image.new("RGB", (left + len(columns) * (_CELL + gap), 2 * _TEXT + len(rows) * line), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((gap, 8), title, "black", font)
    for c, name in enumerate(columns):
        pen.text((left + c * (_CELL + gap), _TEXT + 6), name, "black", font)
    for r, name in enumerate(rows):
        top = 2 * _TEXT + r * line
        pen.text((gap, top + _CELL // 2 - 8), name, "black", font)
        for c, picture in enumerate(pictures[r]):
            x = left + c * (_CELL + gap)
            sheet.paste(picture, (x, top))
            pen.rectangle((x, top, x + _CELL - 1, top + _CELL - 1), outline=(190, 190, 190))
            if marks:
                text, good = marks[r][c]
                pen.text((x, top + _CELL + 2), text, (0, 120, 0) if good else (190, 0, 0), font)
    return sheet
