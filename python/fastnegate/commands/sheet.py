# SPDX-License-Identifier: Apache-2.0
"""Pictures in a table: a title, names of columns and rows, and verdicts under each picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL = 160  # pixels of a picture's side
_GAP, _LINE = 10, 34  # between pictures, and the height of a line of names
_MARK = 22  # the height of a verdict
_GOOD, _BAD = (0, 115, 60), (190, 20, 30)


class Mark(NamedTuple):
    """A verdict: a word or two, and whether it is the one that was hoped for."""

    text: str
    good: bool


class Cell(NamedTuple):
    """A picture, CELL high, and what is said about it."""

    picture: Image.Image
    marks: tuple[Mark, ...] = ()


def picture(pixels: Any) -> Image.Image:
    """A picture of RGB in [0, 1], [H, W, 3], in the size of a cell, each pixel a square."""
    stored = (np.clip(pixels, 0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(stored).resize((CELL, CELL), Image.Resampling.NEAREST)


def sheet(
    title: str, columns: Sequence[str], rows: Sequence[str], cells: Sequence[Sequence[Cell]]
) -> Image.Image:
    """The table as one picture: `cells[row][column]`, all rows with as many verdicts."""
    font, bold = ImageFont.load_default(size=15), ImageFont.load_default(size=14)
    left = _GAP + (60 if any(rows) else 0)
    widths = [max(row[c].picture.width for row in cells) + _GAP for c in range(len(columns))]
    marks = max(len(cell.marks) for row in cells for cell in row)
    line = CELL + marks * (_MARK + 2) + _GAP
    width = max(left + sum(widths), round(font.getlength(title)) + 2 * _GAP)
    made = Image.new("RGB", (width, 2 * _LINE + len(rows) * line), "white")
    pen = ImageDraw.Draw(made)
    pen.text((_GAP, 8), title, "black", font)
    for c, name in enumerate(columns):
        pen.text((left + sum(widths[:c]), _LINE + 6), name, "black", font)
    for r, name in enumerate(rows):
        top = 2 * _LINE + r * line
        pen.text((_GAP, top + CELL // 2 - 8), name, "black", font)
        for c, cell in enumerate(cells[r]):
            x = left + sum(widths[:c])
            made.paste(cell.picture, (x, top))
            pen.rectangle((x, top, x + CELL - 1, top + CELL - 1), outline=(190, 190, 190))
            for m, mark in enumerate(cell.marks):
                y = top + CELL + 2 + m * (_MARK + 2)
                pen.rectangle((x, y, x + CELL - 1, y + _MARK - 1), fill=_GOOD if mark.good else _BAD)
                pen.text((x + CELL // 2, y + _MARK // 2), mark.text, "white", bold, anchor="mm")
    return made
