# SPDX-License-Identifier: Apache-2.0
"""A pipeline whose denoiser is called by two threads, each on a stream of its own: rows of one are copied to
addresses that the other's kernels may still be reading."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from card import DEVICE, new_stream, synchronize
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import pipelines
from pipelines import generate, one_thread  # noqa: F401

import fastnegate as fn

ROUNDS = 8


def twins() -> tuple[Any, Any]:
    """Two pipelines around one denoiser, each with a scheduler of its own."""
    first = pipelines.build("sd15").to(DEVICE)
    parts = {**first.components, "scheduler": copy.deepcopy(first.scheduler)}
    second = type(first)(**parts, requires_safety_checker=False)
    second.set_progress_bar_config(disable=True)
    return first, second


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_two_threads_on_two_streams_get_their_own_policies(compiled: bool) -> None:
    pipes = twins()
    if compiled:
        pipes[0].unet.compile_repeated_blocks(backend="eager")
    bank = fn.ConceptBank.from_prompts(pipes[0], {"dog": "dog", "cat": "cat"}, templates=["{}"])
    engine = fn.install(pipes[0], bank, rule="nag", unasked="raise")
    policies = (fn.Policy({"dog": 1.0}), fn.Policy({"cat": 1.0}, stop=0.7))

    def image(pipe: Any, policy: fn.Policy | None) -> Tensor:
        with engine.batch([policy]):
            return generate(pipe, steps=3).cpu()

    expected = [image(pipe, policy) for pipe, policy in zip(pipes, policies)]
    assert not torch.allclose(*expected)
    found: list[list[Tensor]] = [[], []]
    together = threading.Barrier(2)

    def serve(which: int) -> None:
        with new_stream():
            for _ in range(ROUNDS):
                together.wait(300)
                found[which].append(image(pipes[which], policies[which]))

    threads = [threading.Thread(target=serve, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    synchronize()
    for want, images in zip(expected, found):
        assert len(images) == ROUNDS
        for got in images:
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
