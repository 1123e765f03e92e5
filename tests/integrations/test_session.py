# SPDX-License-Identifier: Apache-2.0
"""Overlapping requests, at random: each image is the one that is made alone, or an error with a name is
raised; no policy outlives its batch, and nothing is stuck."""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("diffusers")

from pipelines import one_thread  # noqa: F401
from sessions import POLICIES, SEATS, STEPS, TROUBLES, WAYS, Request, Round, Theatre

REQUESTS = st.builds(
    Request, st.sampled_from(WAYS), st.sampled_from(list(POLICIES)), st.sampled_from(TROUBLES),
    st.integers(0, STEPS - 1),
)  # fmt: skip
ROUNDS = st.builds(
    Round,
    st.lists(REQUESTS, min_size=3, max_size=SEATS).map(tuple),
    st.lists(st.integers(0, SEATS - 1), min_size=3 * SEATS, max_size=3 * SEATS).map(tuple),
    st.integers(0, 23),
    st.sampled_from([None, None, "dog", "cat"]),
    st.sampled_from([1.0, 1.25]),
    st.sampled_from(["dog", "red"]),
)


@pytest.fixture(autouse=True)
def watchdog() -> Iterator[None]:
    """Where every thread is, should one hang."""
    faulthandler.dump_traceback_later(600, exit=False)
    yield
    faulthandler.cancel_dump_traceback_later()


def _play(examples: int) -> None:
    theatre = Theatre()

    # A schedule that fails says all; to shrink it would take minutes.
    @settings(max_examples=examples, phases=[Phase.generate], report_multiple_bugs=False)
    @given(st.lists(ROUNDS, min_size=1, max_size=2))
    def schedule(rounds: list[Round]) -> None:
        for round in rounds:
            theatre.play(round)

    schedule()
    images = theatre.tally["image"]
    assert images > theatre.tally.total() - images, theatre.tally  # else little was looked at


def test_overlapping_requests_never_mix() -> None:
    _play(30)


@pytest.mark.full
def test_overlapping_requests_never_mix_in_many_schedules() -> None:
    _play(500)
