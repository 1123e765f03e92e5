# SPDX-License-Identifier: Apache-2.0
"""What negation is judged by: one prompt, with what should go and what should stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

import numpy as np

ThingT = TypeVar("ThingT")

SPLITS: tuple[str, ...] = ("test", "development")
"""Methods are tuned on cases of the second, and reported on those of the first."""


@dataclass(frozen=True)
class Case(Generic[ThingT]):
    """One prompt, and what a negation should make of it.

    Args:
        prompt: names `goes` and `stays`, in any order.
        concepts: one to three of the world's `CONCEPTS`, all to be negated at once.
        goes: the objects that show one of the concepts, and should not be seen as they are; none where the
            prompt has nothing of the concepts, and everything should stay.
        stays: the objects that show none of them, and should be seen all the same.
        given: for each concept the words that the negation may know it by: its `members`, or a single one.
    """

    prompt: str
    concepts: tuple[str, ...]
    goes: tuple[ThingT, ...]
    stays: tuple[ThingT, ...]
    given: tuple[tuple[str, ...], ...]

    @property
    def concept(self) -> str:
        """The concept, of a case that has one.

        Raises:
            ValueError: it has several.
        """
        if len(self.concepts) != 1:
            raise ValueError(f"concepts={self.concepts!r}: there is more than one")
        return self.concepts[0]


def draw_cases(
    draws: Mapping[str, Callable[[np.random.Generator], Iterator[Case[ThingT] | None]]],
    name: str,
    n: int,
    seed: int,
    split: str,
) -> list[Case[ThingT]]:
    """The first `n` cases that a suite draws from the seed of a split; None among them is no case.

    Raises:
        ValueError: a name that is not in `draws`, another split, or a number out of its range.
    """
    if name not in draws:
        raise ValueError(f"name={name!r}; allowed: {', '.join(draws)}")
    if n < 1:
        raise ValueError(f"n={n}; allowed: at least 1")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed}; allowed: 0 to {2**32 - 1}")
    if split not in SPLITS:
        raise ValueError(f"split={split!r}; allowed: {', '.join(SPLITS)}")
    # A generator takes (seed, 0) for `seed`, and no seed of one word for (seed, 1).
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    cases: Iterator[Case[ThingT]] = (case for case in draws[name](rng) if case is not None)
    return list(islice(cases, n))
