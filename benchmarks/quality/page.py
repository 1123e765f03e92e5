# SPDX-License-Identifier: Apache-2.0
"""The measured part of docs/quality.md, made of the files in benchmarks/results/quality."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fastnegate.testbed.quality.measure import PICTURES
from fastnegate.testbed.quality.results import Results, Study, read_studies
from fastnegate.testbed.quality.scores import details, overview, table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "quality"
PAGE = ROOT / "docs" / "quality.md"
TUNED = RESULTS / "tuned.json"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def measured(folder: Path = RESULTS) -> str:
    """Tables and pictures of all result files in a folder, as Markdown."""
    parts = []
    studies = read_studies(folder / TUNED.name) if (folder / TUNED.name).exists() else []
    for file in sorted(folder.glob("*-rows.json")):
        results = Results.read(file)
        of_stage = [s for s in studies if (s.host, s.guidance) == (results.host, results.guidance)]
        parts += [*_section(folder, results, of_stage)]
    return "\n\n".join(parts)


def _section(folder: Path, results: Results, studies: list[Study]) -> Iterator[str]:
    plan, name = results.plan, stem(results.host, results.guidance)
    yield f"## {results.host}, {results.guidance}"
    machines = sorted({row.price.machine for row in results.rows if row.price is not None})
    yield (
        f"{plan.cases} cases of each suite, seed {plan.seed}, {plan.split} split. Right, in per cent; "
        f"CPU milliseconds of a step of {PICTURES} pictures on {', '.join(machines)}:"
    )
    yield overview(results.rows)
    for suite in dict.fromkeys(score.suite for row in results.rows for score in row.scores):
        yield f"### {results.host}, {results.guidance}: {suite}"
        yield details(results.rows, suite)
    if studies:
        yield f"### {results.host}, {results.guidance}: what methods were tuned to"
        yield _studies(studies)
    if (folder / f"{name}-frontier.png").exists():
        yield f"![gone against kept, by strength]({_from_page(name)}-frontier.png)"
    for file in sorted(folder.glob(f"{name}-gates-*.png")):
        method = file.stem.removeprefix(f"{name}-gates-")
        yield f"Gates of `{method}` on cases of the development split:"
        yield f"![gates of {method}, by layer and step]({_from_page(file.stem)}.png)"
    for file in sorted(folder.glob(f"{name}-grid-*.png")):
        method = file.stem.removeprefix(f"{name}-grid-")
        yield (
            "The first eight cases of each suite, in the order of the table, without negation and below with "
            f"`{method}`:"
        )
        yield f"![unselected pictures of {method}]({_from_page(file.stem)}.png)"


def _studies(studies: list[Study]) -> str:
    head = ["method", "numbers", "objective", "of the published"]
    body = []
    for study in studies:
        numbers = ", ".join(f"{name} {value}" for name, value in study.numbers.items()) or "the published"
        body.append([study.method, numbers, f"{100 * study.objective:.0f}", f"{100 * study.published:.0f}"])
    return table(head, body)


def stem(host: str, guidance: str) -> str:
    """What the names of a stage's files begin with."""
    return f"{host}-{guidance}"


def _from_page(name: str) -> str:
    return f"../benchmarks/results/quality/{name}"


def with_measured(page: str, text: str) -> str:
    """The page with another measured part.

    Raises:
        ValueError: it has no place for one.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no lines {BEGIN} and {END}")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"
