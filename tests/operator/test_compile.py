# SPDX-License-Identifier: Apache-2.0
"""torch.compile: one graph for a whole UNet, whatever the policies, or a loud error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastnegate import ConceptBank, Policy, Rule

pytest.importorskip("diffusers")

import pipelines
from pipelines import generate, one_thread  # noqa: F401

import fastnegate as fn
from fastnegate.integrations.diffusers.contract import denoiser, family

OPEN = Rule.preset("protore", threshold=-1.0)
DOG, CAT = Policy({"dog": 1.0}), Policy({"cat": 0.5})


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def bank_of(pipe: Any) -> ConceptBank:
    return ConceptBank.from_prompts(pipe, {"dog": ["dog", "red"], "cat": "cat"}, templates=["{}"])


def compiled(pipe: Any, backend: str = "eager") -> CompileCounterWithBackend:
    """Compile the denoiser of the pipeline in one graph; the counter knows how often."""
    counter = CompileCounterWithBackend(backend)
    setattr(pipe, family(pipe).denoiser, torch.compile(denoiser(pipe), fullgraph=True, backend=counter))
    return counter


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


CALLS: list[list[Policy | None]] = [
    [DOG, CAT],
    [CAT, DOG],  # other rows
    [Policy({"dog": 0.25, "cat": 2.0}), None],  # other strengths
    [Policy({"dog": 1.0}, stop=0.5), Policy({"cat": 1.0}, start=0.7)],  # windows; steps without a live entry
    [None, None],
    [DOG, CAT],
]
PROMPTS = ["a photo", "a cat in it"]


@pytest.mark.parametrize(("kind", "backend"), [("sd15", "aot_eager"), ("pixart_alpha", "eager")])
def test_one_graph_for_all_policies(kind: str, backend: str) -> None:
    eager, pipe = pipelines.build(kind), pipelines.build(kind)
    counter = compiled(pipe, backend)
    expected = fn.install(eager, bank_of(eager), rule=OPEN)
    engine = fn.install(pipe, bank_of(pipe), rule=OPEN)
    results = []
    for policies in CALLS:
        with engine.batch(policies), expected.batch(policies):
            results.append(generate(pipe, PROMPTS))
            close(results[-1], generate(eager, PROMPTS))
        assert counter.frame_count == 1
    assert torch.equal(results[0], results[-1]) and not torch.allclose(results[0], results[1])
    close(generate(pipe, PROMPTS), results[-2])  # and without a batch
    engine.bank.update("cat", engine.bank["cat"].prompt[-1:])  # hot swap of the same shape
    with engine.batch(CALLS[0]):
        swapped = generate(pipe, PROMPTS)
    assert not torch.allclose(swapped, results[0])
    assert counter.frame_count == 1


def test_what_changes_the_graph_compiles_again() -> None:
    """A longer bank, and taking the negation out."""
    results = []
    for kind in ("eager", "compiled"):
        pipe = pipelines.build("pixart_alpha")
        untouched = generate(pipe)
        counter = compiled(pipe) if kind == "compiled" else None
        engine = fn.install(pipe, bank_of(pipe), rule=OPEN)
        with engine.batch([DOG]):
            first = generate(pipe)
        engine.bank.update("more", torch.ones(3, 32))
        with engine.batch([Policy({"more": 1.0, "dog": 1.0})]):
            second = generate(pipe)
        engine.remove()
        close(generate(pipe), untouched)
        results.append(torch.cat([first, second]))
    close(*results)
    assert counter is not None and counter.frame_count == 3


def test_compiled_past_the_hook_it_fails() -> None:
    """Compiling after install puts the hook, which prepares each call, inside the graph."""
    pipe = pipelines.build("sd15")
    engine = fn.install(pipe, bank_of(pipe), rule=OPEN)
    compiled(pipe)
    with pytest.raises(Exception, match="compile the denoiser before"), engine.batch([DOG]):
        generate(pipe)


def test_compiled_blocks_after_install_are_negated() -> None:
    """Regional compilation leaves the hook on the denoiser outside."""
    eager, pipe = pipelines.build("sd15"), pipelines.build("sd15")
    pipe.unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    results = []
    for p in (eager, pipe):
        with fn.negate(p, bank_of(p), OPEN):
            results.append(generate(p))
    close(results[1], results[0])


def test_an_unprepared_call_of_compiled_code_fails() -> None:
    pipe = pipelines.build("sd15")
    fn.install(pipe, bank_of(pipe))
    forward = torch.compile(pipe.unet.forward, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="without the hook"):
        forward(torch.zeros(1, 4, 8, 8), torch.tensor(1), torch.zeros(1, 77, 32))


def test_processors_made_by_hand_in_one_graph() -> None:
    eager, pipe = pipelines.build("sd15"), pipelines.build("sd15")
    counter = compiled(pipe)
    untouched = generate(eager)
    for p in (eager, pipe):
        p.unet.set_attn_processor(fn.NegationAttnProcessor(bank_of(p), OPEN, conditional="all"))
    expected = generate(eager)
    close(generate(pipe), expected)
    assert counter.frame_count == 1
    assert not torch.allclose(expected, untouched)
