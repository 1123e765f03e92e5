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
    setattr(pipe, family(pipe).denoisers[0], torch.compile(denoiser(pipe), fullgraph=True, backend=counter))
    return counter


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


CALLS: list[list[Policy | None]] = [
    [DOG, CAT],
    [CAT, DOG],  # other rows
    [Policy({"dog": 0.25, "cat": 2.0}), None],  # other strengths
    [Policy({"dog": 1.0}, stop=0.5), Policy({"cat": 1.0}, start=0.6)],  # windows; steps without a live entry
    [None, None],
    [DOG, CAT],
]
PROMPTS = ["a photo", "a cat in it"]


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("sd15", "aot_eager"),
        ("pixart_alpha", "eager"),
        ("wan", "eager"),
        *(pytest.param(kind, "eager", marks=pytest.mark.full) for kind in ("ltx", "sana", "wan_i2v")),
    ],
)
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
    engine.bank.update("cat", -engine.bank["cat"].prompt[-1:])  # hot swap of the same shape
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


def in_place(pipe: Any) -> None:
    pipe.unet.compile(backend="eager")


def by_blocks(pipe: Any) -> None:
    pipe.unet.compile_repeated_blocks(fullgraph=True, backend="eager")


@pytest.mark.parametrize("compile_it", [in_place, by_blocks])
@pytest.mark.parametrize("first", ["compile", "install"])
def test_code_compiled_in_place_is_negated(compile_it: Any, first: str) -> None:
    """Whatever came first; also without a policy, and with another one."""
    eager, pipe = pipelines.build("sd15"), pipelines.build("sd15")
    if first == "compile":
        compile_it(pipe)
    expected = fn.install(eager, bank_of(eager), rule=OPEN)
    engine = fn.install(pipe, bank_of(pipe), rule=OPEN)
    if first == "install":
        compile_it(pipe)
    for policies in ([DOG], [None], [CAT], [Policy({"dog": 1.0}, stop=0.5)]):
        with engine.batch(policies), expected.batch(policies):
            close(generate(pipe), generate(eager))
    close(generate(pipe), generate(eager))


def test_negative_prompts_do_not_compile_again() -> None:
    eager, pipe = pipelines.build("sd15"), pipelines.build("sd15")
    counter = compiled(pipe)
    engines = [fn.install(p, bank_of(p), rule="nag") for p in (eager, pipe)]
    frames = set()
    for text in ("red", "a photo of a dog", "it", "painting"):
        with (
            engines[0].batch([Policy(negative_prompt=text)]),
            engines[1].batch([Policy(negative_prompt=text)]),
        ):
            close(generate(pipe), generate(eager))
        frames.add(counter.frame_count)
    assert len(frames) == 1


class Scaled(torch.nn.Module):
    """A linear layer and a low-rank part of a scale that may change, as adapters have it."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.scale = torch.nn.Parameter(torch.zeros(()), requires_grad=False)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.part = torch.nn.Linear(base.in_features, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * self.part(x)


def test_an_adapters_scale_changed_by_a_callback_acts_on_concepts() -> None:
    """Eager and compiled, from the step after the callback on."""
    results = []
    for compile_it in (False, True):
        pipe = pipelines.build("sd15")
        adapters = []
        for attn in pipelines.attentions(pipe).values():
            attn.to_k, attn.to_v = Scaled(attn.to_k), Scaled(attn.to_v)
            adapters += [attn.to_k, attn.to_v]
        if compile_it:
            compiled(pipe)
        engine = fn.install(pipe, bank_of(pipe), rule="nag")

        def switch(_pipe: Any, i: int, _t: Any, given: Any, adapters: Any = adapters) -> Any:
            for adapter in adapters:
                adapter.scale.fill_(float(i))  # 0 at the first step
            return given

        with engine.batch([DOG]):
            results.append(generate(pipe, steps=4, callback_on_step_end=switch))
        engine.remove()
    close(*results)


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
