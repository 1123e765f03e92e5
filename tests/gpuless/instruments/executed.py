# SPDX-License-Identifier: Apache-2.0
"""What the tests that execute compiled kernels share: problems, what exists in them, and mutated kernels."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

import torch
from ptxsim import Instruction, Mutation, Program, PtxError
from support import make_problem, with_concepts
from torch import Tensor

from fastnegate.operator.problem import Problem
from fastnegate.operator.rule import Rule

FLOAT16, BFLOAT16 = torch.float16, torch.bfloat16
THREE_SWEEPS = Rule(
    "cosine", "ramp", "projection", select="max", norm="limit", norm_order=1, scope="feature", strength=2.0
)
SMALL = {"batch": 2, "heads": 1, "queries": 20, "keys": 21, "dim": 40, "dtype": FLOAT16}


def only(problem: Problem, row: int) -> Problem:
    """The problem of one batch row."""
    concepts, batch = problem.concepts, problem.sizes[0]
    concept, places, rows = concepts.index.tensor_split([concepts.entries, -batch - 1])
    mine = slice(*rows[row : row + 2].tolist())
    index = torch.cat([concept[mine], places, rows[row : row + 2] - rows[row]])
    alone = with_concepts(
        problem, index=index, numbers=concepts.numbers[mine], entries=len(concept[mine])
    ).concepts
    tensors = (x[row : row + 1] for x in (problem.query, problem.key, problem.value))
    return Problem(*tensors, None, alone, problem.rule, problem.scale)


# ---- what exists ------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """An active one."""

    place: int  # in its row
    kept: Tensor  # which tokens of its concept are not masked
    exists: bool


def kept_keys(problem: Problem) -> Tensor:
    """[B, H, M]: those that are not masked."""
    batch, heads, _, keys, _ = problem.sizes
    if problem.key_bias is None:
        return torch.ones(batch, heads, keys, dtype=torch.bool)
    return (problem.key_bias > -torch.inf).expand(batch, heads, 1, keys)[:, :, 0]


def entries_of(problem: Problem) -> list[list[Entry]]:
    """The active ones of each row."""
    concepts, batch = problem.concepts, problem.sizes[0]
    if concepts is None:
        return [[]] * batch
    sizes = [concepts.entries, concepts.concepts, concepts.concepts, batch + 1]
    concept, begin, length, rows = (part.tolist() for part in concepts.index.split(sizes))
    kept = torch.ones(concepts.tokens, dtype=torch.bool)
    if concepts.token_bias is not None:
        kept = concepts.token_bias > -torch.inf
    reads = problem.rule.reads.tokens
    found: list[list[Entry]] = [[] for _ in range(batch)]
    for row, (first, last) in enumerate(itertools.pairwise(rows)):
        for e in range(first, last):
            c = concept[e]
            tokens = kept[begin[c] : begin[c] + length[c] * reads]
            if concepts.active[e] > 0:
                found[row].append(Entry(e - first, tokens, bool(tokens.any()) or not reads))
    return found


# ---- problems that reveal mistakes ------------------------------------------------------------------

FIRST, SECOND, THIRD = (
    {"concept": 0, "strength": 5.0, "threshold": 0.1, "width": 0.75, "cap": 0.95, "active": 0.8},
    {"concept": 1, "logit_bias": 0.2},
    {"concept": 2, "strength": 4.0},
)
FAR = [{"concept": 0, "logit_bias": 300.0}, {"concept": 1, "logit_bias": -300.0}, 2]
STRONG = [{**entry, "strength": 1e4} for entry in (FIRST, SECOND, THIRD)]


def ties(**options) -> tuple[Problem, Problem]:
    """Equal gates, and the same with winners alone: the larger similarity, then the lower concept, then the
    first entry wins. Concepts 0 and 1 are twins."""
    loser, capped = {"strength": 1.0}, {"cap": 0.01, "strength": 9.0}
    all_of_them = [[1, {"concept": 1, **loser}], [{"concept": 1, **loser}, 0], [{"concept": 2, **capped}, 0]]
    winners = [[1], [0], [0, {"concept": 2, **capped}]]

    def made(rows: list) -> Problem:
        problem = make_problem(**{**options, "batch": 3, "rows": rows, "concept_lengths": (8, 8, 12)})
        changed = {}
        for name in ("key", "value", "token_bias", "token_weight"):
            changed[name] = getattr(problem.concepts, name).clone()
            changed[name][8:16] = changed[name][:8]
        return with_concepts(problem, **changed)

    return made(all_of_them), made(winners)


def pointing_nowhere(**options) -> Problem:
    """Numbers of concepts, tokens and rows outside of the arrays."""
    problem = make_problem(**{**options, "batch": 2, "rows": [[FIRST, SECOND, THIRD], [0]]})
    concepts = problem.concepts
    entries, count, index = concepts.entries, concepts.concepts, concepts.index.clone()
    index[0], index[1] = 99, -99  # concepts
    index[entries], index[entries + 1] = -7, concepts.tokens - 1  # begins
    index[entries + count : entries + 2 * count] = 10**6  # lengths
    index[-3], index[-1] = -5, entries + 5  # rows
    return with_concepts(problem, index=index)


def masked(problem: Problem) -> Problem:
    """Of concept 0 no token, of concept 1 each, of concept 2 by the lowest number, which is no mask."""
    bias = problem.concepts.token_bias.nan_to_num(neginf=0.0)
    bias[8:11], bias[11:] = -torch.inf, torch.finfo(torch.float32).min
    return with_concepts(problem, token_bias=bias)


def all_weigh(problem: Problem) -> Problem:
    return with_concepts(problem, token_weight=torch.ones_like(problem.concepts.token_weight))


def loud(problem: Problem) -> Problem:
    """Outputs are too large for float16."""
    factor = 2.0**14
    concepts = dataclasses.replace(problem.concepts, value=problem.concepts.value * factor)
    return dataclasses.replace(problem, value=problem.value * factor, concepts=concepts)


def largest(problem: Problem) -> Problem:
    """Outputs are the largest float16."""
    return dataclasses.replace(problem, value=torch.full_like(problem.value, torch.finfo(FLOAT16).max))


# ---- what becomes of mistakes -----------------------------------------------------------------------


def fate(checks: Iterable[Callable], change: Callable[[Program], Program], limit: int) -> str:
    """What reveals a changed program, which may take so many steps."""
    for check in checks:
        try:
            check(change=change, limit=limit)
        except PtxError:
            return "simulator"
        except AssertionError:
            return "result"
    return "nothing"


def check_fates(
    program: Program,
    tried: Collection[Mutation],
    checks_of: Callable[[Mutation], Iterable[Callable]],
    limit: int,
    line_of: Callable[[Instruction], str],
    why_harmless: Callable[[Mutation, str], str],
    most: float,
) -> None:
    """Prints what reveals mutations of the program, by kind; and of those that nothing does, why they are
    harmless.

    Raises:
        AssertionError: more than this share survives, or one without a reason.
    """
    table: dict[str, Counter[str]] = defaultdict(Counter)
    survivors = []
    for mutation in tried:
        found = fate(checks_of(mutation), lambda _, mutation=mutation: mutation.program, limit)
        table[mutation.kind][found] += 1
        survivors += [mutation] * (found == "nothing")
    columns = ("simulator", "result", "nothing")
    print(f"\n{'':32}" + "".join(f"{column:>10}" for column in columns))
    for kind, row in table.items():
        print(f"{kind:32}" + "".join(f"{row[column] or '':>10}" for column in columns))
    unexplained = []
    for mutation in survivors:
        line = line_of(program.code[mutation.place])
        reason = why_harmless(mutation, line)
        print(f"{mutation.description} | {line} | {reason}")
        unexplained += [mutation.description] * (not reason)
    assert len(tried) >= 60 and len(survivors) <= most * len(tried)
    assert not unexplained
