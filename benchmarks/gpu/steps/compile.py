# SPDX-License-Identifier: Apache-2.0
"""Compiles the Triton kernels that later steps launch, on most cores, while nvcc builds the CUDA kernels:
they are then in Triton's cache."""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastnegate.commands import doctor
from fastnegate.operator.backends import load
from fastnegate.operator.problem import Problem
from fastnegate.testing import moved

from ...operator.cases import CONCEPTS, LAYERS, METHODS, Layer, make
from ..card import Card, CudaCard
from ..carried import load as carried
from ..step import Item, Setting, first_line
from . import gate, host
from .times import TIMED, problem_of

SPARED = 4  # cores, for nvcc
MOST_WORKERS = 12


def items(setting: Setting) -> Iterator[Item]:
    yield Item("triton", lambda: _all(setting))


class Ahead(NamedTuple):
    """What is compiled: a problem, made by the process that compiles it."""

    name: str
    make: Callable[[], Problem]
    with_statistics: bool = False


def ahead(folder: Path | None) -> Iterator[Ahead]:
    """All that later steps launch, in order of worth: layers that are timed, the gate's problems and
    promises, the host's, the doctor's."""
    for layer in TIMED:
        for concepts in ("4x8", "none"):  # with 1x8 it is the same kernel as with 4x8
            yield Ahead(f"{layer} {concepts}", partial(_layer, LAYERS[layer], concepts))
    gate_of = carried(folder).gate
    for name, judge in gate_of.items():
        yield Ahead(name, partial(getattr, judge, "problem"))
    for rule in gate.PROMISED:
        for mask in (False, True):
            yield Ahead(f"promise: {rule}{' masked' * mask}", partial(gate.promised, rule, mask))
    for concepts in ("4x8", "none"):
        yield Ahead(f"host {concepts}", partial(_layer, host.LAYER, concepts))
    for name, made in doctor.problems():
        yield Ahead(name, made)
    for name, judge in gate_of.items():
        yield Ahead(f"{name}, statistics", partial(getattr, judge, "problem"), with_statistics=True)


def _layer(layer: Layer, concepts: str) -> Problem:
    return problem_of(make(layer, CONCEPTS[concepts], METHODS["protore"], torch.bfloat16))


def compiled(card: Card, folder: Path | None, part: int, parts: int) -> tuple[int, dict[str, str]]:
    """How many problems of this part were compiled, and why others were not."""
    triton, count, failures = load("triton"), 0, {}
    for item in itertools.islice(ahead(folder), part, None, parts):
        problem = moved(item.make(), card.device)
        if triton.supports(problem) is not None:
            continue
        try:
            triton.prepare(problem, item.with_statistics)
            count += 1
        except Exception as error:  # whatever a compiler may raise: the gate will say so, too
            failures[item.name] = first_line(error)
    return count, failures


def _part(folder: Path | None, part: int, parts: int) -> tuple[int, dict[str, str]]:
    torch.set_num_threads(1)  # there are as many processes as cores
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
