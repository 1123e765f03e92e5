# SPDX-License-Identifier: Apache-2.0
"""Problems that are hard to get right, and the one judge of accuracy.

The tests and the report of a GPU judge by it. Notation as in the reference: Z is the attention to the
prompt, F to a concept, r a similarity.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import fastnegate as fn
from fastnegate.operator import reference
from fastnegate.operator.problem import Problem, Statistics, Tables
from fastnegate.operator.reference import Nudge
from fastnegate.operator.rule import Rule

# ---- problems ---------------------------------------------------------------------------------

LAYOUTS = ("contiguous", "bnhd", "broadcast", "odd")
MASKS = ("none", "padding", "additive", "per_query", "per_head_and_query")
ROWS = ("none", "same", "mixed", "zero_tokens", "inactive")


def make_problem(
    batch: int = 3,
    heads: int = 2,
    queries: int = 37,
    keys: int = 21,
    dim: int = 40,
    dtype: torch.dtype = torch.float32,
    *,
    rule: Rule | str = "protore",
    rows: str | Sequence[Sequence[int | Mapping]] = "mixed",
    concept_lengths: Sequence[int] = (8, 3, 12),
    layout: str = "contiguous",
    mask: str = "none",
    extras: bool = True,
    sharpness: float | None = None,
    seed: int = 0,
) -> Problem:
    """A problem in which each query looks at a part of the prompt that resembles one concept.

    Query i and prompt token j belong to group i or j mod C + 1, the last group to no concept. The
    values of group c are built on the vector of concept c and point away from the others, so gates
    are open for some queries, partly open for more, and closed for the rest. A ground common to the
    prompt keeps Z from cancelling, where no arithmetic is exact relative to it.

    Args:
        rows: what each batch row negates, or one of ROWS.
        layout: one of LAYOUTS, the memory of the tensors.
        mask: one of MASKS, the form of `key_bias`.
        sharpness: size of the logits; by default smaller where the budget is a few float32 roundings
            (see `Judge`), which no arithmetic keeps for large logits.
        extras: whether concepts carry token biases (one of them -inf), weights, u' and an offset.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    rule = Rule.preset(rule) if isinstance(rule, str) else rule
    if rows == "zero_tokens":
        concept_lengths = (concept_lengths[0], 0, *concept_lengths[2:])
    count = len(concept_lengths)
    places = normal(count + 1, heads, dim)
    looks = torch.nn.functional.normalize(normal(count + 1, heads, dim), dim=-1)

    def keys_of(group: Tensor) -> Tensor:  # [tokens, H, D]
        return places[group] + normal(len(group), heads, dim)

    def values_of(group: Tensor, purity: Tensor, ground: float) -> Tensor:
        others = looks[:count].sum(0) - looks[group] * (group < count)[:, None, None]
        noise = normal(len(group), heads, dim) * (0.4 * dim**-0.5)
        return 4 * (purity[:, None, None] * looks[group] - 0.3 * others + ground * looks[count] + noise)

    def batched(make) -> Tensor:  # -> [B, H, tokens, D]
        shared = 1 if layout == "broadcast" else batch
        made = [make().transpose(0, 1) for _ in range(shared)]
        return torch.stack(made) if made else torch.empty(0, heads, len(token_groups), dim)

    token_groups = torch.arange(keys) % (count + 1)
    query_groups = torch.arange(queries) % (count + 1)
    if sharpness is None:
        constant = dtype == torch.float32 and batch * heads * queries < MANY_ROWS
        sharpness = 0.5 if constant else 1.5
    pointed = 3 * dim**-0.5 * places[query_groups].transpose(0, 1)
    query = sharpness * (normal(batch, heads, queries, dim) + pointed)
    key = batched(lambda: keys_of(token_groups))
    value = batched(lambda: values_of(token_groups, 0.5 + 0.5 * uniform(keys), 0.6))
    groups = [torch.full((n,), c) for c, n in enumerate(concept_lengths)]
    direction = looks[:count] * heads**-0.5 if heads else looks[:count]  # unit norm over H and D
    tokens = sum(concept_lengths)
    bias = 0.5 * normal(tokens)
    bias[1:2] = -torch.inf  # never the only token of a concept in these tests
    optional = {
        "token_bias": bias,
        "token_weight": (uniform(tokens) > 0.2) * (0.5 + uniform(tokens)),
        "update": direction + 0.1 * dim**-0.5 * normal(count, heads, dim),
        "offset": 0.2 + 0.05 * uniform(count),
    }
    concepts = fn.ConceptTokens.pack(
        [keys_of(g).to(dtype) for g in groups],
        [values_of(g, 0.6 + 0.2 * uniform(len(g)), 0.0).to(dtype) for g in groups],
        _rows(rows, batch, count) if isinstance(rows, str) else rows,
        direction=direction,
        **(optional if extras else {}),
    )
    query, key, value = (
        _lay_out(t.to(dtype), layout, batch, name == "query")
        for name, t in (("query", query), ("key", key), ("value", value))
    )
    if layout == "odd":
        concepts = dataclasses.replace(concepts, key=_odd(concepts.key), value=_odd(concepts.value))
    key_bias = _key_bias(mask, batch, heads, queries, keys, uniform)
    return Problem(query, key, value, key_bias, concepts, rule, dim**-0.5 if dim else 1.0)


def _rows(kind: str, batch: int, count: int) -> list[list]:
    """Per batch row what it negates; concepts are named at most once, so that gates do not tie."""
    last = count - 1
    full = {"strength": 1.25, "logit_bias": 0.2, "threshold": 0.1, "width": 0.75, "cap": 0.95, "active": 0.8}
    numbers = [{"concept": 0, **full}, {"concept": last, "strength": 0.5}]
    kinds = {
        "none": [[]],
        "same": [list(range(count))],
        "mixed": [numbers, [], [last], list(range(count))],
        "zero_tokens": [[min(1, last)], [0, min(1, last)]],
        "inactive": [[{"concept": 0, "active": 0.0}], [{"concept": 0, "active": 0.0}, last]],
    }[kind]
    return [kinds[b % len(kinds)] for b in range(batch)]


def _lay_out(t: Tensor, layout: str, batch: int, is_query: bool) -> Tensor:
    if layout == "bnhd":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "broadcast" and not is_query:
        return t.expand(batch, *t.shape[1:]) if batch else t[:0]
    return _odd(t) if layout == "odd" else t


def _odd(t: Tensor) -> Tensor:
    """The same values, unaligned, with a gap after every last dimension."""
    gap = t.new_full((*t.shape[:-1], t.shape[-1] + 3), torch.nan)[..., 1:-2]
    return gap.copy_(t)


def _key_bias(mask: str, batch: int, heads: int, queries: int, keys: int, uniform) -> Tensor | None:
    if mask == "none":
        return None
    if mask == "padding":  # one row keeps nothing
        kept = torch.arange(batch) * max(keys // 2, 1) % (keys + 1)
        return torch.where(torch.arange(keys) < kept[:, None], 0.0, -torch.inf)[:, None, None]
    if mask == "additive":
        away = (uniform(1, heads, 1, keys) < 0.3) & (torch.arange(keys) > 0)
        return torch.where(away, -10000.0, uniform(1, heads, 1, keys))
    shape = (batch, 1, queries, keys) if mask == "per_query" else (1, heads, queries, keys)
    return torch.where(uniform(*shape) < 0.2, -torch.inf, uniform(*shape))


def pairwise(factors: Mapping[str, Sequence], repeats: int = 1) -> Iterator[dict]:
    """Cases in which every pair of values of two factors meets at least `repeats` times.

    Greedy: each case takes the best of a few random ones that hold a pair still to be covered.
    """
    rng = random.Random(0)
    names = list(factors)
    missing = collections.Counter(
        {
            ((a, i), (b, j)): repeats
            for a, b in itertools.combinations(names, 2)
            for i in range(len(factors[a]))
            for j in range(len(factors[b]))
        }
    )
    while missing:
        must = max(missing, key=missing.__getitem__)
        candidates = []
        for _ in range(30):
            case = {name: rng.randrange(len(factors[name])) for name in names} | dict(must)
            pairs = list(itertools.combinations(case.items(), 2))
            candidates.append((sum(pair in missing for pair in pairs), len(candidates), case, pairs))
        *_, case, pairs = max(candidates)
        missing.subtract(pair for pair in pairs if pair in missing)
        missing = +missing
        yield {name: factors[name][i] for name, i in case.items()}


# ---- the judge --------------------------------------------------------------------------------

MANY_ROWS = 256  # from here on the plain torch formula is the yardstick
_used: dict[tuple[str, str, str], list[float]] = collections.defaultdict(list)


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def delta(dtype: torch.dtype) -> float:
    """How exactly a similarity is known: results closer than this to a jump may fall on either side."""
    return max(64 * eps(torch.float32), 4 * eps(dtype))


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

    def check(self, actual: Tensor, label: str = "") -> float:
        """Assert the budget; returns the share of it that was used."""
        assert self.near_share <= self.near_limit, f"{self.near_share:.2%} of rows next to a jump"
        assert actual.dtype == self.dtype and actual.shape == self.truth.shape
        if actual.numel() == 0:
            return 0.0
        error = self.errors(actual)
        most, mean = self.allowed
        worst = error.max().item()
        where = tuple(torch.unravel_index(error.argmax(), error.shape))
        used = max(worst / most, error.mean().item() / mean)
        if label:
            _used[label, self.problem.rule.name, str(self.dtype)].append(used)
        at = [int(i) for i in where]
        assert worst <= most, f"{label}: row {at} errs by {worst:.3g}, allowed {most:.3g}"
        assert error.mean() <= mean, f"{label}: mean error {error.mean():.3g}, allowed {mean:.3g}"
        return used

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
            elif name in ("removed_energy", "limited_fraction", "nonfinite"):
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
