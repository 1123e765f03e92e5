# SPDX-License-Identifier: Apache-2.0
"""README and docs: their code runs, their links exist, and they name what there is.

The blocks of a page run in order, as one program. Pipelines come from `from_pretrained` as they would, but
tiny, random and offline; there is no GPU to move them to. Blocks that import a serving engine are run where
that is: in tests/engines.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import fastnegate as fn
from fastnegate import Rule, strength_range
from fastnegate.operator import rule as words

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
STEPS = 5
OF_ENGINES = re.compile(r"^from (ray|vllm_omni)\b", re.MULTILINE)
NOT_RUN: dict[str, str] = {}  # page:line of a block -> why; three at most

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path) -> list[tuple[int, str]]:
    """First line and text of each block."""
    text = page.read_text()
    return [(text.count("\n", 0, m.start(1)) + 1, m[1]) for m in BLOCK.finditer(text)]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a page downloads is tiny, what it draws takes few steps, what it writes is temporary."""
    diffusers = pytest.importorskip("diffusers")
    import joint_pipelines
    import pipelines
    from cross_pipelines import kolors, load_image_adapter, ltx2

    kinds = {"StableDiffusionPipeline": "sd15", "StableDiffusionXLPipeline": "sdxl"}
    of_few_steps = [*kinds]
    kinds |= {"WanPipeline": "wan", "LTXPipeline": "ltx", "SanaPipeline": "sana"}
    kinds["PixArtSigmaPipeline"] = "pixart_sigma"
    joint = {"FluxPipeline": "flux", "Flux2KleinPipeline": "klein", "QwenImagePipeline": "qwen"}
    joint |= {"ZImagePipeline": "zimage", "StableDiffusion3Pipeline": "sd3"}
    for kind in of_few_steps:
        module = sys.modules[getattr(diffusers, kind).__module__]
        retrieve = module.retrieve_timesteps

        def few(scheduler: Any, _steps: int, *args: Any, retrieve: Any = retrieve, **options: Any) -> Any:
            return retrieve(scheduler, STEPS, *args, **options)

        monkeypatch.setattr(module, "retrieve_timesteps", few)

    def from_pretrained(cls: type, name: str, **_options: Any) -> Any:
        assert "/" in name, f"{name} is no model of the hub"
        if cls.__name__ in ("LTX2Pipeline", "KolorsPipeline"):
            return ltx2() if cls.__name__ == "LTX2Pipeline" else kolors()
        if cls.__name__ in joint:
            return joint_pipelines.build(joint[cls.__name__])
        return pipelines.build(kinds[cls.__name__])

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", classmethod(from_pretrained))
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "load_ip_adapter", load_image_adapter)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "to", lambda pipe, *_where: pipe)
    monkeypatch.chdir(tmp_path)


@by_page
def test_the_code_of_a_page_runs(page: Path, tiny: None, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for line, text in blocks(page):
        if f"{page.name}:{line}" not in NOT_RUN and not OF_ENGINES.search(text):
            # Tracebacks show the line of the page.
            exec(compile("\n" * (line - 1) + text, str(page), "exec"), names)


def test_what_is_refused_is_told() -> None:
    pytest.importorskip("diffusers")
    from fastnegate.integrations.diffusers.families import TABLE
    from fastnegate.integrations.diffusers.refused import REFUSED, reason

    page = (ROOT / "docs" / "models.md").read_text()
    assert all(f"| `{begin}...` | {why} |" in page for begin, why in REFUSED.items())
    assert not any(reason(name) for name in TABLE)


def test_the_numbers_are_those_of_the_code() -> None:
    def shown(number: float) -> str:
        return f"{number:g}".removeprefix("0") if number else "0"

    page = (ROOT / "docs" / "models.md").read_text()
    for family in ("sd15", "sdxl", "pixart", "sana", "wan", "flux", "zimage", "sd35"):
        nag, (low, high) = Rule.preset("nag", family=family), strength_range("nag", family=family)
        constants = ", ".join(map(shown, (nag.strength, nag.norm_limit, nag.blend)))
        assert f"| {constants} | {shown(low)} and {shown(high)} |" in page, family


def test_the_blocks_were_found() -> None:
    assert len(blocks(ROOT / "README.md")) >= 3 and sum(len(blocks(page)) for page in PAGES) >= 15
    places = {f"{page.name}:{line}" for page in PAGES for line, _ in blocks(page)}
    assert NOT_RUN.keys() <= places and len(NOT_RUN) <= 3
    fences = sum(page.read_text().count("```python") for page in PAGES)
    assert fences == len(places)  # none is indented, or left open


@by_page
def test_links_exist(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text())
    assert links or page.name == "semantics.md"
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_names_of_the_package_exist() -> None:
    """Every `fn.name` that a page writes."""
    wanted = {(page.name, name) for page in PAGES for name in re.findall(r"\bfn\.(\w+)", page.read_text())}
    assert [f"{page}: fn.{name}" for page, name in sorted(wanted) if not hasattr(fn, name)] == []


def test_the_definition_names_every_word() -> None:
    text = (ROOT / "docs" / "semantics.md").read_text()
    fields = (
        "SIMILARITIES",
        "GATES",
        "DIRECTIONS",
        "COMBINES",
        "SELECTS",
        "NORMS",
        "SCOPES",
        "SHARED",
        "CENTERS",
    )
    wanted = {word for field in fields for word in getattr(words, field)} | {*fn.presets()}
    wanted |= {*fn.Statistics._fields}
    quoted = {word for code in re.findall(r"`([^`\n]+)`", text) for word in re.findall(r"\w+", code)}
    assert sorted(wanted - quoted) == []


def test_the_table_of_methods_is_that_of_the_presets() -> None:
    text = (ROOT / "README.md").read_text()
    methods = text[text.index("## Which method") : text.index("## What runs where")]
    assert re.findall(r"^\| `(\w+)`", methods, re.MULTILINE) == [*fn.presets()]
    default = inspect.signature(fn.negated_attention).parameters["rule"].default
    assert f"| `{default}` (default) |" in text


def test_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
