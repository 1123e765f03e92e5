# SPDX-License-Identifier: Apache-2.0
"""A denoising step of whole UNets, random bfloat16 weights: what negation adds to it, beside what people do
without it: the same formula in torch operators, and a batch doubled for a negative prompt.

A step begins and ends with an idle device: its time is what a user waits, host included. `graph` replays the
UNet's forward as a CUDA graph; the engine's hook stays outside and prepares each call.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnegate.operator.backends import unavailable

from ...operator.baselines import negated
from ...operator.cases import CONCEPTS, DENSE, METHODS, Case
from ...operator.measure import interleave, ratio, wall
from ...pipeline.models import MODELS, Model, negating, pipeline, random_unet, small, step, twin
from ..card import Call, CaptureError, Card
from ..step import Item, Setting, first_line
from .times import as_dict

NEGATED, RULE = CONCEPTS["4x8"], METHODS["protore"]
ROUNDS, FEW, WARM = 11, 5, 2  # FEW: of large batches
PLAIN, DOUBLED, OPERATORS = "none", "doubled batch", "torch operators"


def items(setting: Setting) -> Iterator[Item]:
    if setting.part == "compiled":
        bench = Bench("sdxl", 2, setting, compiled=True)
        yield Item("sdxl, batch 2, torch.compile", bench.eager)
        return
    for name in ("sdxl", "sd15"):
        bench = Bench(name, int(setting.part), setting)
        yield Item(f"{name}, batch {setting.part}, eager", bench.eager)
        yield Item(f"{name}, batch {setting.part}, graph", bench.graph)
        bench.steps.clear()  # its memory is for the next


class Bench:
    """A model in all variants, made when the first item wants it."""

    def __init__(self, name: str, batch: int, setting: Setting, compiled: bool = False) -> None:
        self.name, self.batch, self.card, self.compiled = name, batch, setting.card, compiled
        self.model = small(MODELS[name]) if setting.small else MODELS[name]
        self.rounds = 2 if setting.small else ROUNDS if batch <= 2 else FEW
        self.steps: dict[str, Step] = {}
        self.missing: dict[str, str] = {}
        self.outputs: dict[str, Tensor] = {}

    def make(self) -> None:
        if not self.steps:
            self.steps, self.missing = variants(self.model, self.batch, self.card, self.compiled)
            self.outputs = {variant: of.call(at=0).float() for variant, of in self.steps.items()}

    def eager(self) -> dict[str, Any]:
        """Milliseconds of a step of each variant, what they are of `none`, the most memory that a step takes
        beyond weights; and how far the outputs are from each other."""
        self.make()
        far, wrong = changed(self.outputs)
        calls = {variant: of.call for variant, of in self.steps.items()}
        memory = {variant: self.card.memory(call) / 2**20 for variant, call in calls.items()}
        found = {"changed": far, "peak_mbytes": memory, **self.timed(calls)}
        return found if not wrong else found | {"failed": "; ".join(wrong)}

    def graph(self) -> dict[str, Any]:
        """The same with the UNet's forward as a CUDA graph, whose output must be the eager one's but for
        rounding: a quarter of what negation changes."""
        self.make()
        far, _ = changed(self.outputs)
        room, left_out, calls = min(far[name] for name in far if name in self.outputs) / 4, {}, {}
        for variant, of in self.steps.items():
            of.unet.forward = Captured(of.unet.forward, self.card)
            try:
                distant = distance(of.call(at=0).float(), self.outputs[variant])
                assert distant < room, f"a graph's output is {distant:.1e} from the eager one"
                calls[variant] = of.call
            except Exception as error:
                left_out[variant] = first_line(error)
                self.card.synchronize()  # raises again if the device is lost
                if isinstance(error, CaptureError) and not self.card.can_capture():
                    return {"failed": f"{variant}: {left_out[variant]}", "spoiled": True}
        found = self.timed(calls)
        return found if not left_out else found | {"failed": "; ".join(map(": ".join, left_out.items()))}

    def timed(self, calls: dict[str, Call]) -> dict[str, Any]:
        found = times(calls, self.card, self.rounds)
        found["clocks"] = self.card.state(next(iter(calls.values())))
        if self.missing:
            found["failed"] = "; ".join(map(": ".join, self.missing.items()))
        return found


def times(calls: dict[str, Call], card: Card, rounds: int) -> dict[str, Any]:
    def clock(call: Call) -> float:
        def to_the_end() -> None:
            call()
            card.synchronize()

        card.synchronize()
        return wall(to_the_end)

    seconds = interleave(calls, rounds, WARM, clock)
    over = {name: as_dict(ratio(of, seconds[PLAIN])) for name, of in seconds.items() if PLAIN in seconds}
    return {"ms": {name: 1e3 * statistics.median(of) for name, of in seconds.items()}, "over_none": over}


def changed(outputs: dict[str, Tensor]) -> tuple[dict[str, float], list[str]]:
    """How far negated outputs are from the plain one, and from the same formula in torch operators, relative;
    and what is wrong: a negation that changed nothing, or something else than torch operators do."""
    found, wrong = {}, []
    for name, output in outputs.items():
        if name in (PLAIN, DOUBLED):
            continue
        found[name] = distance(output, outputs[PLAIN])
        if not found[name] > 1e-3:
            wrong.append(f"{name} changed the output by {found[name]:.1e} only")
        if name != OPERATORS and OPERATORS in outputs:
            far = found[f"{name} from {OPERATORS}"] = distance(output, outputs[OPERATORS])
            if not far < found[name] / 4:
                wrong.append(f"{name} is {far:.1e} from {OPERATORS}, {found[name]:.1e} from none")
    return found, wrong


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# ---- variants ---------------------------------------------------------------------------------


class Step:
    """A UNet and its step."""

    def __init__(self, pipe: Any, unet: Any, batch: int) -> None:
        self.pipe, self.unet = pipe, unet  # engines hold their pipeline by a weak reference
        self.call: Callable[..., Tensor] = step(pipe, unet, batch)


class Captured:
    """The forward of a UNet: captured when it is first called, with the arguments that it always gets."""

    def __init__(self, forward: Callable[..., Any], card: Card) -> None:
        self._forward, self._card = forward, card
        self._outputs: list[Any] = []
        self._replay: Call | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._replay is None:
            self._replay = self._card.captured([lambda: self._outputs.append(self._forward(*args, **kwargs))])
        self._replay()
        return self._outputs[-1]


def variants(model: Model, batch: int, card: Card, compiled: bool) -> tuple[dict[str, Step], dict[str, str]]:
    """What is timed, all on the same weights, and why something is missing."""
    unet = random_unet(model, card.device, torch.bfloat16)

    def made(negate: Callable[[Any], None] | None = None, size: int = batch) -> Step:
        pipe = pipeline(model, twin(unet))
        if compiled:
            pipe.unet = torch.compile(pipe.unet)
        if negate is not None:
            negate(pipe)
        return Step(pipe, pipe.unet, size)

    found, left_out = {PLAIN: made()}, {}
    for name, backend in card.backends.items():
        if (reason := unavailable(backend)) is not None:
            left_out[name] = reason
        elif not compiled or len(found) == 1:  # the first is enough: compiling takes minutes
            found[name] = made(partial(negating, concepts=NEGATED, rule=RULE, batch=batch, backend=backend))
    if not compiled:
        found[OPERATORS] = made(partial(by_operators, batch=batch))
        found[DOUBLED] = made(size=2 * batch)
    return found, left_out


def by_operators(pipe: Any, batch: int) -> None:
    """Negate as with an engine, but with the formula in torch operators in place of ours."""
    negating(pipe, NEGATED, RULE, batch)
    for processor in pipe.unet.attn_processors.values():
        if getattr(processor, "engine", None) is not None:
            processor._attend = MethodType(_attend, processor)


def _attend(
    processor: Any,
    attn: Any,
    running: Any,
    context: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: None,
) -> Tensor:
    tokens = processor._concepts(attn, query, running, context)
    batch = query.shape[0]

    def parts(x: Tensor) -> list[Tensor]:  # [B, H, T, D] of each concept
        expanded = x.transpose(0, 1).expand(batch, -1, -1, -1)
        return list(expanded.split(NEGATED.tokens, dim=2))

    case = Case("", query, key, value, tokens, RULE, DENSE)
    concepts = list(zip(parts(tokens.key), parts(tokens.value)))
    return negated(case, F.scaled_dot_product_attention, query, key, value, concepts)
