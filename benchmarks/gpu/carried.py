# SPDX-License-Identifier: Apache-2.0
"""What is made before there is a card: problems with their references in float64, and wheels that the
machine lacks. Without it the steps compute the same references themselves."""

from __future__ import annotations

import functools
import gzip
import io
import pickle
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastnegate.operator import registration as ops
from fastnegate.operator.problem import Problem
from fastnegate.operator.rule import Rule
from fastnegate.testing import ROWS, Judge, fair, make_problem, pairwise

from ..operator.machine import commit

REFERENCES = "references.pt.gz"
# What reading it raises where it is not there, was cut short or is something else.
BROKEN = (OSError, EOFError, zlib.error, pickle.UnpicklingError, LookupError, TypeError, RuntimeError)
MOST_BYTES = 16 << 20  # of all that is carried
WHEELS = ("diffusers", "importlib_metadata", "setuptools")  # setuptools: licences of pyproject.toml want 77

RULES = {
    **{name: Rule.preset(name) for name in ("protore", "nag", "vsf", "eiup", "ong", "casteer")},
    "step-max": Rule("cosine", "step", "projection", select="max", scope="feature", threshold=0.4),
}
FACTORS: dict[str, tuple[Any, ...]] = {
    "rule": (*RULES,),
    "dim": (64, 40, 80, 128, 160),
    "dtype": (torch.bfloat16, torch.float16),
    "queries": (130, 21, 1),
    "keys": (77, 120, 140, 21, 1),
    "mask": ("none", "padding", "additive"),
    "layout": ("bnhd", "contiguous", "broadcast"),
    "rows": tuple(rows for rows in ROWS if rows != "none"),
    "concept_lengths": ((8, 8, 8, 8), (8, 3, 12), (77, 5)),
}


class Problems(NamedTuple):
    """What `--prepare` writes."""

    commit: str  # that it was made with
    gate: dict[str, Judge]


def gate_problems() -> Iterator[tuple[str, Judge]]:
    """Some forty problems in which each pair of values of two factors meets."""
    for number, case in enumerate(pairwise(FACTORS)):
        name = case.pop("rule")
        rule = RULES[name]

        def problem(seed: int, rule: Rule = rule, case: dict[str, Any] = case) -> Problem:
            return make_problem(2, 2, rule=rule, seed=seed, **case)

        words = (
            name, str(case["dtype"]).removeprefix("torch."), f"D {case['dim']}", f"N {case['queries']}",
            f"M {case['keys']}", case["mask"], case["layout"], case["rows"],
            "+".join(map(str, case["concept_lengths"])),
        )  # fmt: skip
        yield f"{number:02} {' '.join(words)}", fair(problem(seed) for seed in range(9))


# ---- the file ---------------------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """Write the references and download the wheels.

    Raises:
        RuntimeError: pip cannot download the wheels, or there is more than can be carried.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored: dict[str, Any] = {"commit": commit(), "gate": {}}
    for name, judge in gate_problems():
        print(f"reference: {name}", flush=True)
        flat = ops.flat(judge.problem, "reference")
        stored["gate"][name] = {"problem": flat, "state": judge.state()}
    with gzip.open(folder / REFERENCES, "wb") as file:  # exponents of random numbers are much alike
        torch.save(stored, file)
    (folder / "commit").write_text(stored["commit"] + "\n")  # for a copy of the checkout without its history
    _download(folder / "wheels")
    carried = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {carried / 2**20:.1f} MiB")
    if carried > MOST_BYTES:
        raise RuntimeError(f"{folder}: {carried / 2**20:.1f} MiB are more than {MOST_BYTES >> 20} MiB")


def _download(folder: Path) -> None:
    """Of this project's versions, where it names one."""
    constraints = Path(__file__).resolve().parents[2] / "constraints.txt"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-q"]
    command += ["-c", str(constraints), "-d", str(folder), *WHEELS]
    for old in folder.glob("*.whl"):
        old.unlink()  # two versions stop whoever installs them all
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"pip cannot download {', '.join(WHEELS)}: {done.stderr.strip()[-400:]}")


@functools.cache
def load(folder: Path | None) -> Problems:
    """What `prepare` wrote; computed here where there is no folder.

    Raises:
        ValueError: the folder holds no references.
    """
    if folder is None:
        return Problems(commit(), dict(gate_problems()))
    try:
        content = io.BytesIO(gzip.decompress((folder / REFERENCES).read_bytes()))
        stored = torch.load(content, weights_only=True)
        gate = {
            name: Judge.restored(ops.from_flat(*item["problem"]), item["state"])
            for name, item in stored["gate"].items()
        }
        return Problems(stored["commit"], gate)
    except (
        OSError,
        EOFError,
        zlib.error,
        pickle.UnpicklingError,
        KeyError,
        TypeError,
        RuntimeError,
    ) as error:
        raise ValueError(f"{folder / REFERENCES}: {error}: make it anew with --prepare {folder}") from error
