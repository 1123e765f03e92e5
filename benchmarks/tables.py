# SPDX-License-Identifier: Apache-2.0
"""Tables of reports."""

from __future__ import annotations

from collections.abc import Iterable


def table(head: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    """A Markdown table, padded so that it reads as plain text too."""
    lines = [[*head], *([*line] for line in body)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)
