# SPDX-License-Identifier: Apache-2.0
"""Another bank on all workers: all of them take it, or none.

First every worker reads the file and keeps it aside; only if all say that they have the same concepts are
they told to take them. The engine runs both between two batches, so that no batch sees two banks.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from os import PathLike
from typing import Any

STAGE, COMMIT = "negation_stage", "negation_commit"  # methods of `NegatedWorker`


async def reload_bank(collective_rpc: Callable[..., Awaitable[Any]], path: str | PathLike[str]) -> str:
    """Have all workers of an engine take the bank of a file.

    Args:
        collective_rpc: `AsyncOmni.collective_rpc` or `DiffusionEngine.async_collective_rpc`, of that engine.
        path: of the bank file, as the workers see it.

    Returns:
        The bank's digest, which proofs have from now on.

    Raises:
        ValueError: a worker cannot read the file or may not use it, or two read different concepts. All
            workers keep the bank that they have.
    """
    digest = agreed(await collective_rpc(STAGE, args=(str(path),)))
    return agreed(await collective_rpc(COMMIT, args=(digest,)))


def agreed(answers: Any) -> str:
    """The digest that all workers named. Raises ValueError: somebody refused, nobody answered, or they
    disagree."""
    said = [*_leaves(answers)]
    refusals = [_refusal(answer) for answer in said]
    if any(refusals) or not said:
        raise ValueError(next(filter(None, refusals), "no worker answered"))
    digests = {answer["bank"] for answer in said}
    if len(digests) > 1:
        raise ValueError(f"workers read {len(digests)} different banks: is it one file?")
    return str(digests.pop())


def _leaves(answers: Any) -> Iterator[Any]:
    """Workers' answers come in lists: of ranks, within lists of replicas."""
    if isinstance(answers, (list, tuple)):
        for answer in answers:
            yield from _leaves(answer)
    else:
        yield answers


def _refusal(answer: Any) -> str | None:
    if isinstance(answer, dict) and isinstance(answer.get("bank"), str):
        return None
    said = answer.get("refused") or answer.get("error") if isinstance(answer, dict) else None
    return str(said or f"a worker answered {answer!r}: does it have NegatedWorker?")
