# SPDX-License-Identifier: Apache-2.0
"""What negation costs the host in an attention layer: microseconds of layers that have next to nothing to
compute, beside diffusers' own processor, in turn. A model pays this per layer and step.

    python -m benchmarks.pipeline.host [--rounds 201] [--backend cpu]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

import fastnegate as fn
from fastnegate.engine.bank import ConceptBank
from fastnegate.engine.concepts import Concept, Fingerprint
from fastnegate.engine.engine import Engine
from fastnegate.engine.session.call import RUNNING, Call, PipelineCall, Running

from ..operator.host import run
from .models import normal

ROWS, HEADS, TOKENS, DIM = 2, 2, 8, 8


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
        with (
            torch.no_grad(),
            engine.running(Call(ROWS, image.device, lambda: False, of=of, keep=True)) as running,
        ):
            pass
        return partial(within_call, running, ours, attn, image, text)

    plain = Running(engine, Call(ROWS, image.device, lambda: False))  # as much around it as around ours
    return {
        "AttnProcessor2_0": partial(within_call, plain, inner, attn, image, text),
        "nobody asks": within(None),
        "one concept": within(fn.Policy({"concept": 1.0})),
    }


def within_call(running: Running, processor: Any, *layer: Any) -> Any:
    """A call of a layer within a denoiser call."""
    before = RUNNING.set(running)
    output = processor(*layer)
    RUNNING.reset(before)
    return output


def main(arguments: Sequence[str] | None = None) -> int:
    return run("benchmarks.pipeline.host", str(__doc__), calls, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
