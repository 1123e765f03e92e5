# SPDX-License-Identifier: Apache-2.0
"""The study of centring: what it asks of a host, what it writes, and that it goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")

from fastnegate.benchmarks.quality import centre

from fastnegate.testbed.quality import stage


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Pictures of two steps; the rules that were scored, with the bank's neutral tokens."""
    found: list[Any] = []
    scored = centre.scored

    def record(on: Any, bank: Any, rule: Any, *rest: Any) -> Any:
        found.append((rule, bank.neutral))
        return scored(on, bank, rule, *rest)

    monkeypatch.setattr(stage, "DEFAULT_STEPS", 2)
    monkeypatch.setattr(centre, "scored", record)
    return found


def test_it_is_measured_once_and_goes_on(
    short: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "study.jsonl"
    usual = [
        "--suites",
        "colour",
        "benign",
        "--cases",
        "2",
        "--threads",
        "1",
        "--strength",
        "2",
        "--out",
        str(out),
    ]
    assert centre.main([*usual, "--neutral", "-", "--threshold", "0.5"]) == 0
    first = out.read_text()
    assert centre.main([*usual, "--neutral", "-", "empty", "mean", "--threshold", "0.5"]) == 0
    assert out.read_text().startswith(first) and len(short) == 3
    assert [rule.name for rule, _ in short] == ["protore", *["protore[center=neutral]"] * 2]
    assert short[0][1] is None and not short[1][1].equal(short[2][1])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["neutral"] for line in lines] == ["-", "empty", "mean"]
    shares = lines[0]["scores"]["colour"]
    assert set(shares) == {"gone", "kept", "right"} and all(0 <= share <= 1 for share in shares.values())
    printed = capsys.readouterr().out
    assert "| neutral | threshold | strength | colour" in printed and "| mean " in printed
    with pytest.raises(ValueError, match="is of another study"):
        centre.main([*usual[:-4], "--strength", "2", "--seed", "7", "--out", str(out)])
