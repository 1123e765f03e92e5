# SPDX-License-Identifier: Apache-2.0
"""Clients that wait for an answer before they ask again, and the replica that serves them, in one process."""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import fastnegate as fn
from fastnegate import testbed
from fastnegate.integrations.ray_serve import Negation, Request, picture

from ..pipeline.counting import peak

PROMPT = "a red circle and a blue square"
# Six kinds of policy, and none.
POLICIES: tuple[fn.Policy | None, ...] = (
    None,
    fn.Policy({"red": 1.0}),
    fn.Policy({"blue": 1.0}),
    fn.Policy({"red": 0.5, "square": 1.0}),
    fn.Policy({"circle": 1.0}, stop=0.5),
    fn.Policy({"warm": 1.0}, start=0.25),
    fn.Policy(negative_prompt="square"),
)
CONCEPTS = ("red", "blue", "square", "circle", "warm")


class OnePolicy(Negation):
    """What a server does whose batches have one policy: most do, since most methods change the model."""

    def _share(self, one: Request, other: Request) -> bool:
        return super()._share(one, other) and one.policy == other.policy


@dataclass
class Arm:
    """A replica, what its clients ask for, and what came of it.

    Attributes:
        seconds: of each round; `processor` are those of all threads, in which what others do is not.
        latencies: seconds from a request to its answer, of all rounds.
        sizes: of the batch that each request was in.
    """

    replica: Negation
    policies: Sequence[fn.Policy | None]
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def run(self, requests: int, clients: int, counts: bool) -> None:
        """One more round."""
        before = time.perf_counter(), time.process_time()
        answered = asyncio.run(self._clients(requests, clients))
        after = time.perf_counter(), time.process_time()
        if not counts:
            return
        self.seconds.append(after[0] - before[0])
        self.processor.append(after[1] - before[1])
        for latency, answer in answered:
            self.latencies.append(latency)
            self.sizes.append(answer["batch"])

    async def _clients(self, requests: int, clients: int) -> list[tuple[float, dict[str, Any]]]:
        left, answered = iter(range(requests)), []

        async def client() -> None:
            for i in left:
                policy = self.policies[i % len(self.policies)]
                form = {"prompt": PROMPT, "seed": i}
                if policy is not None:
                    form["negation"] = policy.to_json()
                start = time.perf_counter()
                status, answer = await self.replica.answer(json.dumps(form).encode())
                if status != 200:
                    raise RuntimeError(f"{status}: {answer}")
                answered.append((time.perf_counter() - start, answer))
                picture(answer, policy)  # it has to be what was asked for

        await asyncio.gather(*(client() for _ in range(clients)))
        return answered

    @property
    def batch(self) -> float:
        """Requests in a call of the pipeline."""
        calls = round(sum(1 / size for size in self.sizes))  # each request is its share of one
        return len(self.sizes) / calls


def arms(batch: int, steps: int, folder: Path) -> dict[str, Arm]:
    """By name, each with a pipeline of its own around the embedded model."""
    pipe = testbed.load()
    members = {name: testbed.members(name) for name in CONCEPTS}
    fn.ConceptBank.from_prompts(pipe, members, templates=testbed.templates).save(folder / "bank")

    def replica(kind: type[Negation]) -> Negation:
        call = {"guidance_scale": testbed.DEFAULT_GUIDANCE}
        return kind(_quiet, folder / "bank", max_batch=batch, steps=steps, call=call)

    return {
        "no negation": Arm(replica(Negation), [None]),
        "mixed policies": Arm(replica(Negation), POLICIES),
        "one policy a batch": Arm(replica(OnePolicy), POLICIES),
    }


def _quiet() -> Any:
    pipe = testbed.load()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(requests: int, clients: int, batch: int, steps: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Of each arm all that a report has. In each round each runs once, so that noise meets all of them."""
    with tempfile.TemporaryDirectory() as folder:
        served = arms(batch, steps, Path(folder))
        for i in range(rounds + 1):  # the first does not count
            for arm in served.values():
                arm.run(requests, clients, counts=i > 0)
        return {name: _report(arm, requests, batch) for name, arm in served.items()}


def _report(arm: Arm, requests: int, batch: int) -> dict[str, Any]:
    cut = statistics.quantiles(arm.latencies, n=100, method="inclusive")
    policies = list(itertools.islice(itertools.cycle(arm.policies), batch))
    rows = [Request(PROMPT, policy, i, 2) for i, policy in enumerate(policies)]
    with torch.no_grad():
        most = peak(lambda: arm.replica._pictures(rows))
    return {
        "requests_per_second": [requests / seconds for seconds in arm.seconds],
        "processor_seconds": arm.processor,
        "latency": {f"p{p}": cut[p - 1] for p in (50, 90, 99)},
        "batch": arm.batch,
        "peak_bytes": most,
    }
