# SPDX-License-Identifier: Apache-2.0
"""The report of a run on a GPU: what is in report.json, and how it is read. Nothing here is measured.

`python -m benchmarks.gpu.report` fills the table of docs/performance.md from the committed reports.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..tables import table

VERSION = 1
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"  # <card>/report.json
PAGE = ROOT / "docs" / "performance.md"
PLACE = re.compile(r"(<!-- measured on GPUs -->\n).*?(<!-- end -->)", re.DOTALL)  # of the table
UNSHOWN = ("seconds", "report", "trace", "missing", "kernel", "failures", "commit")  # only in report.json
Content = Mapping[str, Any]


def begun(machine: Content, old: Content | None) -> dict[str, Any]:
    """A report without steps, or with those of the old one: each item keeps the commit that it is of, and
    what ran when that report was cut off is cut off."""
    steps: dict[str, Any] = {}
    for name, step in (old["steps"] if old is not None else {}).items():
        of = {"commit": step["commit"]} if "commit" in step else {}
        items = {item: {**of, **found} for item, found in step["items"].items()}
        for found in items.values():
            found.pop("spoiled", None)  # that process is gone: the item is tried again
        steps[name] = {**step, "items": items}
        if step["status"] == "running":
            steps[name]["status"] = "killed: the run ended"
    took = {} if old is None else dict(old["took"])  # seconds of steps that came to their end
    return {"version": VERSION, **machine, "took": took, "steps": steps}


def check(old: Any) -> None:
    """Raises ValueError unless it is a report of this version."""
    fields = {"version": int, "rehearsal": bool, "commit": str, "gpu": dict, "took": dict, "steps": dict}
    if not isinstance(old, dict) or not all(isinstance(old.get(f), kind) for f, kind in fields.items()):
        raise ValueError(f"is no report: it needs {', '.join(fields)}")
    if old["version"] != VERSION:
        raise ValueError(f"is a report of version {old['version']}, not {VERSION}")
    for name, step in old["steps"].items():
        whole = isinstance(step, dict) and isinstance(step.get("status"), str)
        if not whole or not isinstance(step.get("items"), dict):
            raise ValueError(f"has a step {name!r} without status or items")
        if not all(isinstance(found, dict) for found in step["items"].values()):
            raise ValueError(f"has an item of {name!r} that is no object")
    if not all(isinstance(seconds, (int, float)) for seconds in old["took"].values()):
        raise ValueError("has a field took that holds no numbers")


def another(old: Content, machine: Content) -> str | None:
    """Why the old report cannot be continued on this machine, or None."""
    for field in ("rehearsal", "gpu"):
        if old[field] != machine[field]:
            return f"the report to resume has {field} {old[field]!r}, this machine {machine[field]!r}"
    return None


def complete(steps: Content, name: str) -> bool:
    """Whether nothing of the step has to be run again."""
    step = steps.get(name, {})
    return step.get("status") == "done" and not any(map(is_open, step["items"].values()))


def is_open(item: Content) -> bool:
    return "failed" in item or "cut" in item


def troubles(content: Content, steps: Collection[str] | None = None) -> Iterator[str]:
    """What failed, was cut off, was not reached or checked nothing, each in a line; of these steps alone."""
    for name, step in content["steps"].items():
        if steps is not None and name not in steps:
            continue
        items = step.get("items", {})
        for item, found in items.items():
            for how in ("failed", "cut"):
                if how in found:
                    yield f"{name}: {item}: {'cut: ' * (how == 'cut')}{found[how]}"
        if step.get("status") not in ("done", "running"):
            yield f"{name}: {step.get('status')}"
        elif step["status"] == "done" and items and not content["rehearsal"]:
            if all("skipped" in found or "refused" in found for found in items.values()):
                yield f"{name}: nothing was checked: {next(iter(items.values()))}"


def facts(content: Content) -> dict[str, Any]:
    found = content["steps"].get("doctor", {}).get("items", {}).get("machine", {})
    return {} if is_open(found) else {name: fact for name, fact in found.items() if name != "seconds"}


# ---- as it is read ----------------------------------------------------------------------------


def markdown(content: Content) -> str:
    parts = ["# Measured on a GPU" if not content["rehearsal"] else "# A rehearsal: nothing here is a GPU's"]
    known = {**facts(content), "commit": content["commit"]}
    known |= {name: content[name] for name in ("carried",) if content.get(name)}
    known |= {"gpu": content["gpu"].get("name"), "driver": content["gpu"].get("driver_version")}
    parts.append("\n".join(f"- {name}: {value}" for name, value in known.items()))
    if failed := list(troubles(content)):
        parts += ["## Failed or missing", "\n".join(f"- {line}" for line in failed)]
    parts += ["## Steps", _steps(content)]
    for title, part in (
        ("Accuracy and promises", _gate),
        ("Host time of a call", _host),
        ("Times of layers", _times),
        ("Whole models", _models),
        ("Sanitizers and profiler", partial(_lines, step="tools")),
        ("Compiled ahead", partial(_lines, step="triton")),
        ("Tests", partial(_lines, step="tests")),
        ("Doctor", partial(_printed, step="doctor", item="doctor")),
    ):
        try:
            text = part(content)
        except (LookupError, TypeError, ValueError, AttributeError) as error:  # of a part that is not whole
            text = f"Not shown: {type(error).__name__}: {error}; report.json has it."
        if text:
            parts += [f"## {title}", text]
    return "\n\n".join(parts) + "\n"


def _items(content: Content, step: str) -> dict[str, Any]:
    items: dict[str, Any] = content["steps"].get(step, {}).get("items", {})
    return items


def _steps(content: Content) -> str:
    body, commit = [], content["commit"]
    for name, step in content["steps"].items():
        items = step.get("items", {})
        commits = dict.fromkeys(found.get("commit", step.get("commit", "-"))[:12] for found in items.values())
        seconds = [f"{step[key]:.0f}" if key in step else "-" for key in ("seconds", "limit")]
        skipped = sum("skipped" in found for found in items.values())
        of = ", ".join(commits) or step.get("commit", "-")[:12]
        body.append([name, _cell(step.get("status", "-")), *seconds, str(len(items)), str(skipped), of])
    return table(["step", "status", "s", "limit, s", "items", "skipped", f"commit ({commit[:12]})"], body)


def _gate(content: Content) -> str:
    """By backend: how many problems were judged and the most of the budget that was used."""
    body = []
    for backend in ("cuda", "triton"):
        items = _items(content, f"gate {backend}")
        used = [item["used"] for item in items.values() if "used" in item]
        counted = [sum(key in item for item in items.values()) for key in ("refused", "kept", "failed")]
        if items:
            most = f"{max(used):.2f}" if used else "-"
            body.append([backend, str(len(used)), most, *map(str, counted)])
    if not body:
        return ""
    head = ["backend", "problems", "most of the budget used", "refused", "promises kept", "failed"]
    return "Of the accuracy budget 1 is the limit.\n\n" + table(head, body)


def _host(content: Content) -> str:
    found = _items(content, "host").get("host", {})
    if "us" not in found:
        return ""
    over = found["over_sdpa"]
    body = [[n, f"{us:.1f}", _interval(over[n]) if n in over else "1"] for n, us in found["us"].items()]
    return table(["call", "us", "over sdpa"], body) + _left_out(found)


def _times(content: Content) -> str:
    items = _items(content, "times")
    rows = {name: item for name, item in items.items() if "us" in item}
    if not rows:
        return ""
    rates = items.get("rates", {})
    text = ["Microseconds, medians, and ratios with 95 % bootstrap intervals. `floor` does nothing."]
    if "copy" in rates and not content["rehearsal"]:
        text.append(
            f"In the same run a copy moved {rates['copy'] / 1e12:.2f} TB/s and a bfloat16 product of 8192 "
            f"made {rates['matmul'] / 1e12:.0f} TFLOP/s."
        )
    names = list(dict.fromkeys(name for item in rows.values() for name in item["us"]))
    body = [
        [layer, *(f"{item['us'][n]['median']:.1f}" if n in item["us"] else "-" for n in names)]
        for layer, item in rows.items()
    ]
    text.append(table(["layer", *names], body))
    for backend in ("cuda", "triton"):
        over = {layer: item["over"][backend] for layer, item in rows.items() if backend in item["over"]}
        others = list(dict.fromkeys(name for of in over.values() for name in of))
        body = [
            [layer, *(_interval(of[n]) if n in of else "-" for n in others),
             f"{rows[layer]['gbytes'][backend]:.0f}", f"{rows[layer]['judged'][backend]:.2f}"]
            for layer, of in over.items()
        ]  # fmt: skip
        if body:
            head = [f"{backend} over", *others, "GB/s", "budget used"]
            text.append(table(head, body))
    left_out: dict[tuple[str, str], list[str]] = {}
    for layer, item in rows.items():
        for why in item["left_out"].items():
            left_out.setdefault(why, []).append(layer)
    lines = [f"- {name}: {why} ({', '.join(layers)})" for (name, why), layers in left_out.items()]
    if lines:
        text.append("Could not run:\n\n" + "\n".join(lines))
    return "\n\n".join(text)


def _models(content: Content) -> str:
    text = []
    for step in ("models, batch 2", "blocks", "models, batch 8", "models, compiled"):
        for name, item in _items(content, step).items():
            if "ms" not in item:
                continue
            over, peak = item["over_none"], item.get("peak_mbytes", {})
            body = [
                [variant, f"{ms:.2f}", _interval(over[variant], 4) if variant in over else "-",
                 f"{peak[variant]:.0f}" if variant in peak else "-"]
                for variant, ms in item["ms"].items()
            ]  # fmt: skip
            text.append(table([name, "ms a step", "over none", "peak MiB beyond weights"], body))
    return "\n\n".join(text)


def _lines(content: Content, step: str) -> str:
    """A line for each item, with what else than details it holds."""
    body = []
    for name, item in _items(content, step).items():
        shown = {key: value for key, value in item.items() if key not in UNSHOWN}
        body.append([name, _cell(", ".join(f"{key} {_short(value)}" for key, value in shown.items()))])
    return table(["item", "found"], body) if body else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_short(item)}" for key, item in value.items()) + ")"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _printed(content: Content, step: str, item: str) -> str:
    printed = _items(content, step).get(item, {}).get("printed")
    return f"```\n{printed.strip()}\n```" if printed else ""


def _interval(found: Mapping[str, float], digits: int = 2) -> str:
    low, high = (f"{found[end]:.{digits}f}" for end in ("low", "high"))
    return f"{found['median']:.{digits}f} [{low}, {high}]"


def _left_out(found: Content) -> str:
    return "".join(f"\n\n{name} is left out: {why}" for name, why in found.get("left_out", {}).items())


# ---- the table of docs/performance.md ---------------------------------------------------------


def summary(results: Path = RESULTS) -> str:
    """A row for each layer with four concepts of 8 tokens that a committed report has a time of."""
    body = []
    for path in sorted(results.glob("*/report.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["rehearsal"]:
            raise ValueError(f"{path} is a rehearsal: nothing in it was measured on a GPU")
        rows = _items(content, "times")
        for name, item in rows.items():
            layer, _, concepts = name.partition(" ")
            if concepts != "4x8" or "us" not in item:
                continue
            for backend in item["over"]:
                none = rows.get(f"{layer} none", {}).get("us", {}).get(backend)
                us = item["us"][backend]["median"]
                body.append([
                    content["gpu"]["name"], layer, backend, f"{us:.1f}",
                    f"{us / none['median']:.2f}" if none else "-", _interval(item["over"][backend]["sdpa"]),
                ])  # fmt: skip
    head = ["card", "layer", "backend", "4 x 8, us", "over no concepts", "over torch's attention"]
    return table(head, body)


def filled(page: str, results: Path = RESULTS) -> str:
    """The page with that table."""
    return PLACE.sub(lambda place: f"{place[1]}{summary(results)}\n{place[2]}", page)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
