# SPDX-License-Identifier: Apache-2.0
"""What negation costs the host in an attention layer: microseconds of layers that have next to nothing to
compute, beside diffusers' own processor, in turn. A model pays this per layer and step.

    python -m benchmarks.pipeline.host [--rounds 201] [--backend cpu]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

import fastnegate as fn
from fastnegate.engine.bank import ConceptBank
from fastnegate.engine.concepts import Concept, Fingerprint
from fastnegate.engine.engine import Engine
from fastnegate.engine.session.call import RUNNING, Call, PipelineCall, Running

from ..operator.measure import interleave, wall
from .models import normal

ROWS, HEADS, TOKENS, DIM = 2, 2, 8, 8
CALLS = 20  # timed at once: a clock is too coarse for one
PLAIN = "AttnProcessor2_0"


def calls(backend: str) -> dict[str, Callable[[], object]]:
    """A layer with diffusers' processor; with ours, while nobody asks for negation, and while each row
    negates a concept of as many tokens as the prompt."""
    width = HEADS * DIM
    attn = Attention(query_dim=width, cross_attention_dim=width, heads=HEADS, dim_head=DIM).eval()
    concept = Concept.from_embeddings(normal(0, TOKENS, width))
    bank = ConceptBank({"concept": concept}, Fingerprint({}, torch.zeros(1)))
    engine = Engine(bank, fn.Rule.preset("protore", threshold=-1.0), ["layer"])
    image, text = normal(1, ROWS, TOKENS, width), normal(2, ROWS, TOKENS, width)
    inner = AttnProcessor2_0()
    ours = fn.NegationAttnProcessor.bound(engine, "layer", inner, backend)

    def within(policy: fn.Policy | None) -> Callable[[], object]:
        engine.set_rows([policy] * ROWS)
        of = PipelineCall()
        of.sampled = 2  # the calls whose gates are looked at have been
        with engine.running(Call(ROWS, image.device, lambda: False, of=of, keep=True)) as running:
            pass
        return partial(_running, running, ours, attn, image, text)

    return {
        PLAIN: partial(inner, attn, image, text),
        "nobody asks": within(None),
        "one concept": within(fn.Policy({"concept": 1.0})),
    }


def _running(running: Running, *layer: object) -> None:
    """Many calls of a layer within a denoiser call."""
    processor, *arguments = layer
    before = RUNNING.set(running)
    for _ in range(CALLS):
        processor(*arguments)  # type: ignore[operator]
    RUNNING.reset(before)


def medians(backend: str, rounds: int) -> dict[str, float]:
    """Microseconds of a layer."""

    def often(call: Callable[[], object]) -> None:
        for _ in range(CALLS):
            call()

    many = calls(backend)  # outside of inference mode, as models are made
    many[PLAIN] = partial(often, many[PLAIN])
    with torch.inference_mode():
        times = interleave(many, rounds, clock=wall)
    return {name: 1e6 / CALLS * statistics.median(of) for name, of in times.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.pipeline.host", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=201, help="in which each is timed once (%(default)s)")
    parser.add_argument("--backend", default="cpu", help="that takes tensors of the CPU (%(default)s)")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: must be at least 1")
    torch.set_num_threads(1)
    found = medians(options.backend, options.rounds)
    for name, microseconds in found.items():
        print(f"{name:>16} {microseconds:8.2f} us {microseconds - found[PLAIN]:+8.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
