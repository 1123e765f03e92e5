# SPDX-License-Identifier: Apache-2.0
"""The one judge of accuracy: the budget of docs/semantics.md, section 8."""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..operator import reference
from ..operator.problem import Problem, Statistics, Tables
from ..operator.reference import Nudge

MANY_ROWS = 256  # from here on the plain torch formula is the yardstick
_used: dict[tuple[str, str, str], list[float]] = collections.defaultdict(list)


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def delta(dtype: torch.dtype) -> float:
    """How exactly a similarity is known: results closer than this to a jump may fall on either side."""
    return max(64 * eps(torch.float32), 4 * eps(dtype))


class Verdict(NamedTuple):
    """The share of the accuracy budget that was used, and what is wrong, empty if nothing is."""

    used: float
    wrong: str = ""


class Judge:
    """The accuracy budget of the definition ("Accuracy budget") for one problem; nothing else has a
    tolerance of its own.

    Truth is float64 on the stored inputs. The error of a row (b, h, n) is divided by max_d(|a||Z| +
    sum |b||X|). Problems of 256 rows or more may err twice as much as the plain torch formula, on
    average 1.25 times; smaller ones 8 eps(float32), or 2 eps(t) in 16 bit. Rows next to a jump may
    take either side.

    Args:
        truth: another float64 [B, H, N, D] to judge by, for identities that the definition promises.
        leave_near: do not judge rows next to a jump, however many there are.
    """

    leave_near = False

    def __init__(self, problem: Problem, truth: Tensor | None = None, leave_near: bool = False) -> None:
        self._begin(problem)
        self.leave_near = leave_near
        nominal = reference.evaluate(problem, nudge=Nudge(delta=self.delta))
        self.truth = nominal.output if truth is None else truth
        self.magnitude = nominal.magnitude
        self.near = nominal.near_jump
        self.tables = nominal.tables
        self.others = []
        if self.near.any() and not leave_near:
            sides = itertools.product((0.0, self.delta, -self.delta), (False, True))
            nudged = (reference.evaluate(problem, nudge=Nudge(*side)) for side in list(sides)[1:])
            self.others = [(n.output[self.near], n.magnitude[self.near]) for n in nudged]

    def _begin(self, problem: Problem) -> None:
        self.problem = problem
        self.dtype = problem.query.dtype
        self.delta = delta(self.dtype)

    @property
    def near_share(self) -> float:
        return self.near.double().mean().item() if self.near.numel() and not self.leave_near else 0.0

    @property
    def near_limit(self) -> float:
        return 0.001 if self.dtype == torch.float32 else 0.05

    @functools.cached_property
    def allowed(self) -> tuple[float, float]:
        """Most and mean relative error."""
        if self.near.numel() < MANY_ROWS:
            most = 8 * eps(self.dtype) if self.dtype == torch.float32 else 2 * eps(self.dtype)
            return most, most
        eager = self.errors(reference.evaluate(self.problem, dtype=self.dtype).output.to(self.dtype))
        assert eager.isfinite().all(), "the plain formula overflows: no yardstick"
        t = eps(self.dtype)
        return 2 * eager.max().item() + 2 * t, 1.25 * eager.mean().item() + t / 4

    @functools.cached_property
    def sides(self) -> list[Tables]:
        """Statistics with each similarity a little less and a little more above the threshold."""
        if self.problem.concepts is None or self.problem.rule.gate == "open":
            return []
        nudges = (Nudge(threshold) for threshold in (self.delta, -self.delta))
        return [reference.evaluate(self.problem, nudge=nudge).tables for nudge in nudges]

    def state(self) -> dict[str, Any]:
        """All that was computed, in tensors and numbers that `torch.load(weights_only=True)` reads. In 16 bit
        truth is rounded to float32, which is nothing beside a budget of 2^-10."""
        stored = torch.float64 if self.dtype == torch.float32 else torch.float32
        return {
            "truth": self.truth.to(stored), "magnitude": self.magnitude.to(stored), "near": self.near,
            "others": [tuple(t.to(stored) for t in other) for other in self.others],
            "allowed": self.allowed, "tables": tuple(self.tables), "sides": [tuple(t) for t in self.sides],
        }  # fmt: skip

    @classmethod
    def restored(cls, problem: Problem, state: Mapping[str, Any]) -> Judge:
        """The judge of the problem with that state: nothing is computed again."""
        judge = cls.__new__(cls)
        judge._begin(problem)
        judge.truth, judge.magnitude = state["truth"].double(), state["magnitude"].double()
        judge.near, judge.allowed = state["near"], state["allowed"]
        judge.others = [tuple(t.double() for t in other) for other in state["others"]]
        judge.tables, judge.sides = Tables(*state["tables"]), [Tables(*t) for t in state["sides"]]
        return judge

    def errors(self, actual: Tensor) -> Tensor:
        """[B, H, N], relative to each row's magnitude."""
        error = _relative(actual, self.truth, self.magnitude, self.dtype)
        if self.leave_near:
            return error.masked_fill(self.near, 0.0)
        for output, magnitude in self.others:
            beside = _relative(actual[self.near], output, magnitude, self.dtype)
            error[self.near] = torch.minimum(error[self.near], beside)
        return error

    def verdict(self, actual: Tensor) -> Verdict:
        """Whether [B, H, N, D] keeps the budget, and how much of it was used."""
        if self.near_share > self.near_limit:
            return Verdict(torch.inf, f"{self.near_share:.2%} of rows next to a jump")
        if actual.dtype != self.dtype or actual.shape != self.truth.shape:
            return Verdict(
                torch.inf, f"{actual.dtype} {[*actual.shape]} is not of the problem's dtype and shape"
            )
        if actual.numel() == 0:
            return Verdict(0.0)
        error = self.errors(actual)
        worst, mean = error.max().item(), error.mean().item()
        most, most_mean = self.allowed
        used = max(worst / most, mean / most_mean)
        if not worst <= most:
            row = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
            return Verdict(used, f"row {row} errs by {worst:.3g}, allowed {most:.3g}")
        if not mean <= most_mean:
            return Verdict(used, f"mean error {mean:.3g}, allowed {most_mean:.3g}")
        return Verdict(used)

    def check(self, actual: Tensor, label: str = "") -> float:
        """The share of the budget that was used; with a label, `budget_report` knows it.

        Raises:
            AssertionError: the budget is not kept.
        """
        verdict = self.verdict(actual)
        if label and actual.numel():
            _used[label, self.problem.rule.name, str(self.dtype)].append(verdict.used)
        if verdict.wrong:
            raise AssertionError(f"{label}: {verdict.wrong}")
        return verdict.used

    def check_statistics(self, actual: Statistics, label: str = "") -> None:
        """Statistics are the reference's up to delta (1 + |x|), where a similarity may be delta off.

        A share counts queries on one side of a limit and may differ by one of them. Rows next to a
        jump count with their share, and their own `heat` is not judged.
        """
        rows = self.near.shape[0]
        concepts = self.problem.concepts
        assert all(t.dtype == torch.float32 for t in actual)
        nudged = [tables.named for tables in self.sides]
        near_row = self.near.flatten(1).double().mean(1) if self.near.numel() else torch.zeros(rows)
        near_query = self.near.any(1)
        if concepts is not None:
            offsets = concepts.index[-rows - 1 :].tolist()
            row_of = [b for b in range(rows) for _ in range(offsets[b], offsets[b + 1])]
            near_entry, near_heat = near_row[row_of], near_query[row_of]
        else:
            near_entry, near_heat = torch.zeros(0), torch.zeros(0, self.near.shape[2])
        queries = max(self.near.shape[2], 1)
        for name, value, truth, *sides in zip(Statistics._fields, actual, self.tables.named, *nudged):
            value = value.double()
            assert value.shape == truth.shape and value.isfinite().all(), f"{label}: {name}"
            both = torch.stack([truth, *sides])
            room = self.delta * (1 + truth.abs())
            if name in ("gate_fraction", "limited_fraction"):
                room = room + 1 / queries
            if name == "heat":
                room = room.masked_fill(near_heat.bool(), torch.inf)
            elif name == "gate_max":
                room = room.masked_fill(near_entry > 0, torch.inf)
            elif name in ("removed_energy", "limited_fraction", "nonfinite", "text_share"):
                room = room + near_row * (1 + truth.abs())
            elif name != "similarity_max":
                room = room + near_entry
            wrong = (value < both.amin(0) - room) | (value > both.amax(0) + room)
            assert not wrong.any(), f"{label}: {name} is {value[wrong]}, reference {truth[wrong]}"


def fair(problems: Iterable[Problem]) -> Judge:
    """The judge of the first problem with few rows next to a jump.

    Raises:
        ValueError: there is none.
    """
    for judge in map(Judge, problems):
        if judge.near_share <= judge.near_limit:
            return judge
    raise ValueError("every problem has too many rows next to a jump")


def _relative(actual: Tensor, truth: Tensor, magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """max_d |actual - truth| / magnitude; infinite where finiteness or the sign of inf differs.

    What storing does outside the normal range is not an error: it overflows to inf as torch does, and
    near zero it rounds to multiples of the smallest subnormal number.
    """
    stored = truth.to(dtype).double()
    actual = actual.double()
    gap = (actual - truth).abs() - torch.finfo(dtype).smallest_normal * eps(dtype) / 2
    gap = torch.where((actual == stored) & ~stored.isfinite(), 0.0, gap.nan_to_num(torch.inf, torch.inf))
    gap = gap.clamp(min=0.0).amax(-1)
    return torch.where(gap == 0, 0.0, gap / magnitude)


def budget_report() -> str:
    """How many results were judged by backend, rule and dtype, and how much of the budget they used."""
    lines = [f"{'backend':14} {'rule':24} {'dtype':16} {'results':>8} {'worst':>8} {'median':>8}"]
    for (label, rule, dtype), used in sorted(_used.items()):
        median = sorted(used)[len(used) // 2]
        lines.append(f"{label:14} {rule:24} {dtype:16} {len(used):8} {max(used):8.3f} {median:8.3f}")
    return "\n".join(lines) + "\n"
