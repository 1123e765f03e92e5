# SPDX-License-Identifier: Apache-2.0
"""How a picture is judged from what the detectors found in it, in every world."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from .cases import Case

ThingT = TypeVar("ThingT")
FoundT = TypeVar("FoundT")


@dataclass(frozen=True)
class Verdict:
    """What became of a case's prompt in a picture.

    The first judgement is hard on the negation in both directions: a trace of the concept is a failure, and
    so is an object that is only roughly there. The lenient one has the two detectors the other way round.
    A spoiled object is nobody's: it neither shows a concept nor counts as kept. So a method that spoils what
    it should remove has the price of its successes in `malformed`.

    Args:
        gone: the loose detector finds none of the concepts.
        kept: the strict detector finds every object that should stay, each with a detection of its own.
        right: both; of a case in which nothing should go, `kept` alone.
        malformed: blobs that not even the loose detector has a name for.
        lenient_gone: the strict detector finds none of the concepts.
        lenient_kept: the loose detector finds every object that should stay.
        lenient_right: as `right`, of the lenient two.
    """

    gone: bool
    kept: bool
    right: bool
    malformed: int
    lenient_gone: bool
    lenient_kept: bool
    lenient_right: bool


def verdict(
    case: Case[ThingT],
    strict: Sequence[FoundT],
    loose: Sequence[FoundT],
    shows: Callable[[Sequence[FoundT], str], bool],
    fits: Callable[[FoundT, ThingT], bool],
    malformed: int,
) -> Verdict:
    """Judge what two detectors have found, by a world's idea of which concept and which object that is."""
    gone, lenient_gone = (not any(shows(found, c) for c in case.concepts) for found in (loose, strict))
    kept, lenient_kept = (matched(case.stays, found, fits) for found in (strict, loose))
    benign = not case.goes
    return Verdict(
        gone=gone,
        kept=kept,
        right=kept and (gone or benign),
        malformed=malformed,
        lenient_gone=lenient_gone,
        lenient_kept=lenient_kept,
        lenient_right=lenient_kept and (lenient_gone or benign),
    )


def matched(
    things: Sequence[ThingT], found: Sequence[FoundT], fits: Callable[[FoundT, ThingT], bool]
) -> bool:
    """Whether each thing can be given a detection of its own."""
    if not things:
        return True
    first, *rest = things
    return any(
        fits(one, first) and matched(rest, [*found[:index], *found[index + 1 :]], fits)
        for index, one in enumerate(found)
    )
