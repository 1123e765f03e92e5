# SPDX-License-Identifier: Apache-2.0
"""Types of options for argparse: a bad value is refused while arguments are parsed, before any work."""

from __future__ import annotations

import tempfile
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

from ..operator.rule import check_number

MOST_SEED = 2**32 - 1  # what numpy's and torch's generators both take

PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """Whole numbers from `low` to `high`."""
    allowed = f"a whole number from {low} to {high}" if high is not None else f"a whole number >= {low}"

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low or (high is not None and value > high):
            raise ArgumentTypeError(f"{text!r}: must be {allowed}")
        return value

    return number


seed = whole(0, MOST_SEED)


def above_0(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
        check_number("number", value, above=0.0)
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r}: must be a number above 0") from error
    return value


def checked(check: Callable[[str], object]) -> Callable[[str], str]:
    """Texts for which `check` does not raise a ValueError."""

    def text(given: str) -> str:
        try:
            check(given)
        except ValueError as error:
            raise ArgumentTypeError(str(error)) from error
        return given

    return text


def file(text: str) -> Path:
    """A file that can be written. It is opened to find out, and left as it was, or as missing as it was."""
    path = Path(text)
    there = path.exists()
    try:
        with path.open("ab"):
            pass
        if not there:
            path.unlink()
    except OSError as error:
        raise ArgumentTypeError(f"{text!r}: must be a file that can be written: {error.strerror}") from error
    return path


strength = above_0  # which would be no negation


def model(text: str) -> str:
    """`embedded`, or a folder with the files of a pipeline."""
    if text != "embedded" and not (Path(text) / "model_index.json").is_file():
        raise ArgumentTypeError(f"{text!r}: must be 'embedded', or a folder with a model_index.json")
    return text


def concept(text: str) -> tuple[str, list[str]]:
    """NAME=phrase,phrase."""
    name, _, phrases = text.partition("=")
    members = [phrase.strip() for phrase in phrases.split(",")]
    if not name.strip() or not all(members):
        raise ArgumentTypeError(f"{text!r}: must be NAME=phrase,phrase")
    return name.strip(), members


def pictures(text: str) -> list[Path]:
    """The pictures of a folder, by name."""
    path = Path(text)
    found = [p for p in path.iterdir() if p.suffix.lower() in PICTURES] if path.is_dir() else []
    if not found:
        raise ArgumentTypeError(f"{text!r}: must be a folder with pictures ({', '.join(PICTURES)})")
    return sorted(found)


def folder(text: str) -> Path:
    """A folder in which files can be written, or one that can be made; it is not made here."""
    path = Path(text)
    nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            return path
    except OSError as error:
        raise ArgumentTypeError(
            f"{text!r}: must be a folder that can be written: {error.strerror}"
        ) from error
