# SPDX-License-Identifier: Apache-2.0
"""The measured parts of README and docs/quality.md, and a page for each stage beside the results, all made of
these."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fastnegate.testbed.quality.measure import PICTURES
from fastnegate.testbed.quality.results import Results, Study, read_studies
from fastnegate.testbed.quality.scores import details, overview, table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "quality"
PAGE = ROOT / "docs" / "quality.md"
README = ROOT / "README.md"
TUNED = RESULTS / "tuned.json"
DETAILS = "details.md"
_FROM_PAGE = "../benchmarks/results/quality"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def write_pages(folder: Path = RESULTS, page: Path = PAGE, readme: Path = README) -> None:
    """Write the measured parts of both pages, and beside the result files the details of each stage.

    Raises:
        ValueError: a page has no place for its part.
    """
    texts = {
        page: with_measured(page.read_text(), measured(folder)),
        readme: with_measured(readme.read_text(), headlines(folder)),
    }
    for results in _all(folder):
        (folder / stem(results.host, results.guidance) / DETAILS).write_text(detailed(folder, results))
    for file, text in texts.items():
        file.write_text(text)


def headlines(folder: Path = RESULTS) -> str:
    """A line for each result file: the methods from the best to the worst, in brackets tuned."""
    return "\n".join(map(_headline, _all(folder)))


def _headline(results: Results) -> str:
    found: dict[str, list[float]] = {}
    for row in results.rows:
        if row.scores:
            found.setdefault(row.method, []).append(100 * row.objective)
    ranked = sorted(found.items(), key=lambda of: -max(of[1]))
    said = (f"{name} {first:.0f}{f' ({tuned[0]:.0f})' if tuned else ''}" for name, (first, *tuned) in ranked)
    return f"- *{results.host}, {results.guidance}* ({results.plan.cases} cases a suite): {', '.join(said)}"


def measured(folder: Path = RESULTS) -> str:
    """A table and a picture for each result file in a folder, as Markdown."""
    return "\n\n".join(part for results in _all(folder) for part in _summary(folder, results))


def detailed(folder: Path, results: Results) -> str:
    """All that was measured on a stage, as Markdown."""
    return "\n\n".join(_details(folder, results)) + "\n"


def _all(folder: Path) -> list[Results]:
    return [Results.read(file) for file in sorted(folder.glob("*/rows.json"))]


def _summary(folder: Path, results: Results) -> Iterator[str]:
    plan, name = results.plan, stem(results.host, results.guidance)
    yield f"### {results.host}, {results.guidance}"
    machines = sorted({row.price.machine for row in results.rows if row.price is not None})
    yield (
        f"{plan.cases} cases of each suite, seed {plan.seed}, {plan.split} split. Right, in per cent; "
        f"CPU milliseconds of a step of {PICTURES} pictures on {', '.join(machines)}.\n"
        f"[Gone, kept, intervals, by suite; gates; pictures]({_FROM_PAGE}/{name}/{DETAILS})."
    )
    yield overview(results.rows)
    if (folder / name / "frontier.png").exists():
        yield f"![gone against kept, by strength]({_FROM_PAGE}/{name}/frontier.png)"


def _details(folder: Path, results: Results) -> Iterator[str]:
    name = stem(results.host, results.guidance)
    yield f"# {results.host}, {results.guidance}: all that was measured"
    yield "What the words mean is in [docs/quality.md](../../../../docs/quality.md)."
    for suite in dict.fromkeys(score.suite for row in results.rows for score in row.scores):
        yield f"## {suite}"
        yield details(results.rows, suite)
    studies = read_studies(folder / TUNED.name) if (folder / TUNED.name).exists() else []
    studies = [s for s in studies if (s.host, s.guidance) == (results.host, results.guidance)]
    if studies:
        yield "## What methods were tuned to"
        yield _studies(studies)
    for file in sorted((folder / name).glob("gates-*.png")):
        method = file.stem.removeprefix("gates-")
        yield f"## Gates of `{method}` on cases of the development split"
        yield f"![gates of {method}, by layer, head and step]({file.name})"
    for file in sorted((folder / name).glob("grid-*.png")):
        method = file.stem.removeprefix("grid-")
        yield f"## The first eight cases of each suite, without negation and below with `{method}`"
        yield f"![unselected pictures of {method}]({file.name})"


def _studies(studies: list[Study]) -> str:
    head = ["method", "numbers", "objective", "of the published"]
    body = []
    for study in studies:
        numbers = ", ".join(f"{name} {value}" for name, value in study.numbers.items()) or "the published"
        body.append([study.method, numbers, f"{100 * study.objective:.0f}", f"{100 * study.published:.0f}"])
    return table(head, body)


def stem(host: str, guidance: str) -> str:
    """What a stage's files and folders are called."""
    return f"{host}-{guidance}"


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
