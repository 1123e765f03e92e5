# SPDX-License-Identifier: Apache-2.0
"""What negation costs a denoising step: operations of all blocks at 1024 x 1024, counted; bytes that live at
once and milliseconds of few blocks, measured. Beside it what people do without this package: the published
two passes, and a batch doubled for a negative prompt.

Operations are counted on tensors without memory, of a later step: what is made once in a pipeline call is
there already.
"""

from __future__ import annotations

import copy
import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import fastnegate as fn
from fastnegate.engine import host
from fastnegate.engine.concepts import Concept
from fastnegate.integrations.diffusers.contract import denoiser
from fastnegate.integrations.diffusers.families import TABLE
from fastnegate.operator.rule import Rule

from ..operator.cases import Concepts
from ..operator.measure import Clock, interleave, ratio, wall
from ..tables import table
from .counting import Told, operations, peak
from .families import PRICED, Priced, TwoPasses
from .models import normal, policy

PLAIN, PADDED, PASSES, DOUBLED = "plain", "padded", "two passes", "doubled batch"
WORDS = {c.name: c for c in (Concepts("8", 1, 8), Concepts("4x8", 4, 8), Concepts("77", 1, 77))}

Step = Callable[[], Tensor]


def processor(call: Callable[[], object]) -> float:
    """Seconds of processor time that a call takes, of all threads: what others do is not in it."""
    start = time.process_time()
    call()
    return time.process_time() - start


def price(priced: Priced, tokens: int, rounds: int, clock: Clock = wall) -> dict[str, dict[str, Any]]:
    """Of each variant all that a report has."""
    model = priced.model(whole=False)
    steps = {name: make() for name, make in variants(priced, model, tokens)}
    peaks = {name: _second(step, peak) for name, step in steps.items()}
    times = interleave(steps, rounds, warm=1, clock=clock)
    counts = counted(priced)
    return {
        name: {
            "operations": counts[name],
            "operations_over": counts[name] / counts[PLAIN],
            "peak_mbytes": peaks[name] / 2**20,
            "peak_over": peaks[name] / peaks[PLAIN],
            "ms": 1e3 * statistics.median(times[name]),
            "over": vars(ratio(times[name], times[PLAIN])),
            "seconds": times[name],
        }
        for name in steps
    }


def counted(priced: Priced) -> dict[str, int]:
    """Operations of a step at 1024 x 1024, all blocks, of each variant."""
    model = priced.model(whole=True, device="meta")
    with Told(priced.all_tokens):
        return {
            name: _second(make(), operations) for name, make in variants(priced, model, priced.all_tokens)
        }


def _second(step: Step, measure: Callable[[Step], int]) -> int:
    step()
    return measure(step)


# ---- variants -------------------------------------------------------------------------------------------


def variants(
    priced: Priced, model: Any, tokens: int, backend: str = "auto"
) -> Iterator[tuple[str, Callable[[], Step]]]:
    """Names, and what makes a step of it, all on the same weights. The image has one row."""

    def there(tensor: Tensor) -> Tensor:
        return tensor.to(model.device, model.dtype if tensor.is_floating_point() else None)

    def given(rows: int) -> dict[str, Any]:
        made: dict[str, Any] = priced.inputs(model.config, tokens, priced.text, rows)
        return tree_map_only(Tensor, there, made)

    yield PLAIN, lambda: plain(model, given(1))
    for name, concepts in {**WORDS, PADDED: Concepts(PADDED, 1, priced.text)}.items():
        made = partial(negated, priced, concepts=concepts, backend=backend)
        yield name, lambda made=made: made(twin(model), given=given(1))
    if priced.two_passes is not None:
        yield PASSES, lambda: passes(priced, priced.two_passes, twin(model), given(1))
    yield DOUBLED, lambda: plain(model, given(2))


def plain(model: Any, given: Mapping[str, Any]) -> Step:
    return lambda: _output(model(**given, return_dict=False))


def _output(returned: Any) -> Tensor:
    """Some models return a list with an image for each row."""
    return torch.stack(returned[0]) if isinstance(returned[0], list) else returned[0]


def negated(priced: Priced, model: Any, concepts: Concepts, given: Mapping[str, Any], backend: str) -> Step:
    """Through an installed engine, each concept of the row with gates that are open."""
    pipe = around(priced, model)
    preset, changes = ("nag", {}) if concepts.name == PADDED else priced.words
    rule = Rule.preset(preset, family=TABLE[priced.pipeline].constants(pipe), **changes)
    embeddings = {
        f"concept {i}": Concept.from_embeddings(normal(i, concepts.tokens, priced.width))
        for i in range(concepts.count)
    }
    bank = fn.ConceptBank(embeddings, host.of(pipe).fingerprint(pipe), pipe)
    engine = fn.install(pipe, bank, 1, rule=rule, backend=backend)
    engine.set_rows([policy(bank, rule)])
    loop = engine.loop()
    loop.sampled = 2  # the steps whose gates are looked at have been

    def step() -> Tensor:
        with loop:
            return _output(denoiser(pipe)(**given, return_dict=False))

    return step


def passes(priced: Priced, two_passes: TwoPasses, model: Any, given: Mapping[str, Any]) -> Step:
    """As published: one row of the image, and two of text, the prompt and the padded concept."""
    rule = Rule.preset("nag", family=TABLE[priced.pipeline].constants(around(priced, model)))
    two_passes(model, rule, priced.text)
    prompt = given["encoder_hidden_states"]
    concept = normal(0, 1, priced.text, priced.width).to(prompt)
    return plain(model, {**given, "encoder_hidden_states": torch.cat([prompt, concept])})


def twin(model: Any) -> Any:
    """The same weights in modules of its own."""
    shared = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def around(priced: Priced, model: Any) -> Any:
    """The pipeline of a denoiser, with next to nothing else: concepts are given, so nobody is asked to encode
    any."""
    pipeline, entry = getattr(diffusers, priced.pipeline), TABLE[priced.pipeline]
    wanted = inspect.signature(pipeline.__init__).parameters.values()
    parts: dict[str, Any] = {p.name: None for p in wanted if p.default is p.empty and p.name != "self"}
    if "requires_safety_checker" in {p.name for p in wanted}:
        parts["requires_safety_checker"] = False
    for tokenizer, encoder in entry.encoders:
        parts |= {tokenizer: Tokenizer(), encoder: nn.Linear(1, 1)}
    pipe = pipeline(
        **parts | {entry.denoisers[0]: model, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}
    )
    pipe.scheduler.timesteps = None  # steps are not told apart: what is negated is negated at all of them
    return pipe


class Tokenizer:
    """One that knows no words."""

    model_max_length = 0

    def get_vocab(self) -> dict[str, int]:
        return {}

    def apply_chat_template(self, said: list[dict[str, str]], **_options: Any) -> str:
        return said[0]["content"]


# ---- report ---------------------------------------------------------------------------------------------


def counts_table(counts: Mapping[str, Mapping[str, int]]) -> str:
    """By model, what a step takes, and of each variant what its step takes of that."""
    variants = [*WORDS, PADDED, PASSES, DOUBLED]
    rows = (
        (
            model, str(PRICED[model].all_tokens), str(PRICED[model].text), f"{of[PLAIN] / 1e12:.2f}",
            *(f"{of[name] / of[PLAIN]:.4f}" if name in of else "-" for name in variants),
        )
        for model, of in counts.items()
    )  # fmt: skip
    return table(("model", "image tokens", "text", "TFLOP, plain", *variants), rows)


def price_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    rows = (
        (
            name, f"{of['operations_over']:.4f}", f"{of['peak_mbytes']:.0f}", f"{of['peak_over']:.3f}",
            f"{of['ms']:.0f}", "{median:.3f} [{low:.3f}, {high:.3f}]".format(**of["over"]),
        )
        for name, of in found.items()
    )  # fmt: skip
    head = ("variant", "FLOP over plain", "peak, MiB", "over plain", "ms a step", "over plain")
    return table(head, rows)
