# SPDX-License-Identifier: Apache-2.0
"""Compiles the Triton kernels that later steps launch, on most cores, while nvcc builds the CUDA kernels:
they are then in Triton's cache."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from fastnegate import doctor
from fastnegate.backends import load
from fastnegate.problem import Problem

from ..operator.cases import CONCEPTS, LAYERS, METHODS, make, moved
from .card import Card, CudaCard
from .carried import load as carried
from .step import Item, Setting, first_line
from .times import TIMED, problem_of

SPARED = 4  # cores, for nvcc
MOST_WORKERS = 12


def items(setting: Setting) -> Iterator[Item]:
    yield Item("triton", lambda: _all(setting))


def problems(card: Card, folder: Path | None) -> Iterator[tuple[str, Problem, bool]]:
    """Name, problem and whether with statistics: of the gate, the doctor and the layers that are timed."""
    for with_statistics in (False, True):
        for name, judge in carried(folder).gate.items():
            statistics = ", statistics" * with_statistics
            yield name + statistics, moved(judge.problem, card.device), with_statistics
    for name, problem in doctor.problems():
        yield name, moved(problem, card.device), False
    for layer in TIMED:
        for concepts in ("4x8", "none"):  # with 1x8 it is the same kernel as with 4x8
            case = make(
                LAYERS[layer], CONCEPTS[concepts], METHODS["protore"], torch.bfloat16, device=card.device
            )
            yield f"{layer} {concepts}", problem_of(case), False


def compiled(card: Card, folder: Path | None, part: int, parts: int) -> tuple[int, dict[str, str]]:
    """How many problems of this part were compiled, and why others were not."""
    triton, count, failures = load("triton"), 0, {}
    for number, (name, problem, with_statistics) in enumerate(problems(card, folder)):
        if number % parts != part or triton.supports(problem) is not None:
            continue
        try:
            triton.prepare(problem, with_statistics)
            count += 1
        except Exception as error:  # whatever a compiler may raise: the gate will say so, too
            failures[name] = first_line(error)
    return count, failures


def _part(folder: Path | None, part: int, parts: int) -> tuple[int, dict[str, str]]:
    return compiled(CudaCard(), folder, part, parts)


def _all(setting: Setting) -> dict[str, Any]:
    if setting.small:
        return {"skipped": "Triton compiles for a GPU, and there is none"}
    parts = max(min((os.cpu_count() or 1) - SPARED, MOST_WORKERS), 1)
    count, failures = 0, {}
    with ProcessPoolExecutor(parts, multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(_part, setting.carried, part, parts) for part in range(parts)]
        for done in as_completed(running):
            more, why = done.result()
            count, failures = count + more, failures | why
    found: dict[str, Any] = {"problems": count, "processes": parts}
    return found | ({"failed": f"{len(failures)}: {next(iter(failures.values()))}"} if failures else {})
