# SPDX-License-Identifier: Apache-2.0
"""Parts of large models at full width, bfloat16, one request: a double and a single block of FLUX.1, in which
concepts ride in the text, and a layer of Wan in which a video attends to its text. Each with a concept of 8
and of 77 tokens, and padded as a prompt is, beside the published two passes.

A call begins and ends with an idle device: its time is what a user waits, host included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import Tensor

import fastnegate as fn
from fastnegate.engine.bank import ConceptBank
from fastnegate.engine.concepts import Concept, Fingerprint
from fastnegate.engine.engine import Engine
from fastnegate.engine.session.call import Call, PipelineCall
from fastnegate.operator.rule import Rule

from ...pipeline import price, published
from ...pipeline.families import PRICED
from ...pipeline.host import within_call
from ...pipeline.models import normal
from ..step import Item, Setting, first_line
from .end_to_end import PLAIN, distance, times

BLOCKS = {"double": "num_layers", "single": "num_single_layers"}  # how the model's config calls them
WAN = {"dim": 5120, "heads": 40, "dim_head": 128}  # 14B
TOKENS, TEXT = 32_760, 512  # of a video of 81 frames at 480p
NAG = Rule.preset("nag", family="wan")
ROUNDS = 21

Variant = Callable[[], Tensor]
Variants = Iterator[tuple[str, Callable[[], Variant]]]


def items(setting: Setting) -> Iterator[Item]:
    for kind in BLOCKS:
        yield Item(f"flux1, a {kind} block", partial(measured, partial(flux, kind), setting))
    yield Item("wan, attention to text", partial(measured, wan, setting))


def measured(variants: Callable[[Setting], Variants], setting: Setting) -> dict[str, Any]:
    """Milliseconds of each variant and what they are of `none`, the most memory beyond weights, and how far
    outputs are from that of `none`; what a backend does not implement is left out."""
    calls: dict[str, Variant] = {}
    outputs: dict[str, Tensor] = {}
    left_out: dict[str, str] = {}
    for name, make in variants(setting):
        try:
            call = make()
            outputs[name] = call().float()
            calls[name] = call
        except fn.BackendError as error:
            left_out[name] = first_line(error)
    found: dict[str, Any] = {
        "left_out": left_out,
        "changed": {name: distance(out, outputs[PLAIN]) for name, out in outputs.items() if name != PLAIN},
        "peak_mbytes": {name: setting.card.memory(call) / 2**20 for name, call in calls.items()},
        **times(calls, setting.card, 2 if setting.small else ROUNDS),
    }
    wrong = [*unlike(outputs)]
    return found if not wrong else found | {"failed": "; ".join(wrong)}


def unlike(outputs: dict[str, Tensor]) -> Iterator[str]:
    """Padded concepts whose output is nearer to that without negation than to the published one."""
    for name, output in outputs.items():
        if name.endswith(price.PADDED):
            plain, published_ = (distance(output, outputs[other]) for other in (PLAIN, price.PASSES))
            if not published_ < plain:
                yield f"{name} is {published_:.1e} from {price.PASSES}, {plain:.1e} from {PLAIN}"


def flux(kind: str, setting: Setting) -> Variants:
    """One block of that kind, between what embeds and what unembeds."""
    priced = PRICED["flux1"].small() if setting.small else PRICED["flux1"]
    blocks = {name: int(kind == of) for of, name in BLOCKS.items()}
    priced = dataclasses.replace(priced, config={**priced.config, **blocks})
    model = priced.model(True, setting.card.device, torch.bfloat16)
    backends = setting.card.backends
    for i, (backend, runs) in enumerate(backends.items()):
        for name, make in price.variants(priced, model, priced.all_tokens, runs):
            if name in ("8", "77", price.PADDED):
                yield f"{backend} {name}", make
            elif i == 0 and name in (price.PLAIN, price.PASSES):
                yield PLAIN if name == price.PLAIN else name, make


def wan(setting: Setting) -> Variants:
    """The layer by itself: what is made of concepts once in a pipeline call is there already."""
    sizes, tokens = (WAN, TOKENS) if not setting.small else ({"dim": 32, "heads": 2, "dim_head": 16}, 64)
    there = {"device": setting.card.device, "dtype": torch.bfloat16}
    attn = WanAttention(**sizes, cross_attention_dim_head=sizes["dim_head"]).to(**there).eval()
    image, text = (normal(i, 1, n, sizes["dim"]).to(**there) for i, n in enumerate((tokens, TEXT)))
    concept = normal(2, TEXT, sizes["dim"])
    yield PLAIN, lambda: partial(WanAttnProcessor(), attn, image, text)
    for backend, runs in setting.card.backends.items():
        for name, count in {"8": 8, "77": 77, price.PADDED: TEXT}.items():
            yield f"{backend} {name}", partial(negated, attn, image, text, concept[:count], runs)
    both = torch.cat([text, concept[None].to(**there)])
    yield price.PASSES, lambda: partial(published.CrossPasses(NAG), attn, image, both)


def negated(attn: Any, image: Tensor, text: Tensor, concept: Tensor, backend: str) -> Variant:
    """A layer with our processor, within a denoiser call."""
    bank = ConceptBank({"concept": Concept.from_embeddings(concept)}, Fingerprint({}, torch.zeros(1)))
    engine = Engine(bank, NAG, ["layer"])
    engine.set_rows([fn.Policy({"concept": 1.0})])
    processor = fn.NegationAttnProcessor.bound(engine, "layer", WanAttnProcessor(), backend)
    call = Call(1, image.device, lambda: False, image.dtype, PipelineCall(), keep=True)
    with engine.running(call) as running:
        running.negated = True  # by the calls that are timed
    return partial(within_call, running, processor, attn, image, text)
