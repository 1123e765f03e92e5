# SPDX-License-Identifier: Apache-2.0
"""Requests as calls of one pipeline: which may be one call, and what that call's arguments are.

A pipeline takes some arguments per picture (`PER_ROW`), and all others for the whole call. Requests share a
call if all others are equal. What cannot be compared (a picture to start from, a tensor of timesteps) is
never shared: such a request has a call of its own.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from ...engine.policy import Policy

PER_ROW = ("prompt", "negative_prompt", "generator", "latents")


@dataclass(frozen=True, eq=False)
class Job:
    """One request.

    Attributes:
        place: in the engine's batch.
        policy: what it negates.
        call: arguments of the pipeline for it alone.
        images: how many it asks for.
    """

    place: int
    policy: Policy | None
    call: Mapping[str, Any]
    images: int

    @property
    def kind(self) -> Hashable:
        """Jobs of the same kind may share a call; None shares none."""
        prompts = [self.call[name] for name in ("prompt", "negative_prompt") if name in self.call]
        latents = self.call.get("latents")
        if "prompt" not in self.call or not all(isinstance(prompt, str) for prompt in prompts):
            return None
        if latents is not None and not (isinstance(latents, Tensor) and len(latents) == self.images):
            return None
        try:
            rest = _frozen({name: value for name, value in self.call.items() if name not in PER_ROW})
        except TypeError:
            return None
        shape = None if latents is None else (latents.shape, latents.dtype, latents.device)
        # A pipeline may read an absent negative prompt otherwise than an empty one.
        return rest, len(prompts), shape, self.images


def groups(jobs: Sequence[Job], most: int) -> Iterator[list[Job]]:
    """Which jobs share a call: of one kind, and at most `most` images together, but for one job that asks for
    more."""
    alike: dict[Hashable, list[Job]] = {}
    for job in jobs:
        kind = job.kind
        alike.setdefault(("alone", job.place) if kind is None else kind, []).append(job)
    for same in alike.values():
        each = max(1, most // max(1, same[0].images))
        yield from (same[i : i + each] for i in range(0, len(same), each))


def merged(jobs: Sequence[Job]) -> dict[str, Any]:
    """Arguments of the call that jobs of one group share. It draws from copies of their generators, so that
    another call of the same jobs draws the same."""
    calls = [{**job.call, "generator": _generators(job)} for job in jobs]
    if jobs[0].kind is None:
        return calls[0]
    call = dict(calls[0])
    for name in ("prompt", "negative_prompt"):
        if name in call:
            call[name] = [each[name] for each in calls]
    if call.get("latents") is not None:
        call["latents"] = torch.cat([each["latents"] for each in calls])
    call["generator"] = [generator for each in calls for generator in each["generator"]]
    return call


def _generators(job: Job) -> list[Generator]:
    """One per image. Where the request has one for all, they take turns, as the engine's own pipelines have
    it: then a picture is the same whichever requests share the call."""
    given = job.call["generator"]
    if isinstance(given, Generator):
        return [given.clone_state()] * job.images
    return [generator.clone_state() for generator in given]


def _frozen(value: Any) -> Hashable:
    """A plain value as something to compare. Raises TypeError: it is not plain."""
    if isinstance(value, Mapping):
        return frozenset((name, _frozen(each)) for name, each in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a {type(value).__name__} is not plain")
