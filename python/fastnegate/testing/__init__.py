# SPDX-License-Identifier: Apache-2.0
"""Problems, and the one judge of accuracy: for the tests, `fastnegate doctor`, benchmarks, and for whoever
writes a backend:

    judge = fair(make_problem(dtype=torch.bfloat16, rule="nag", seed=seed) for seed in range(9))
    judge.check(my_backend(moved(judge.problem, "cuda")).cpu(), "mine")  # asserts the budget
    print(budget_report())
"""

from .judge import Judge, Verdict, budget_report, delta, eps, fair
from .problems import LAYOUTS, MASKS, PARTIALS, ROWS, make_problem, moved, pairwise, with_partials

__all__ = [
    "LAYOUTS",
    "MASKS",
    "PARTIALS",
    "ROWS",
    "Judge",
    "Verdict",
    "budget_report",
    "delta",
    "eps",
    "fair",
    "make_problem",
    "moved",
    "pairwise",
    "with_partials",
]
