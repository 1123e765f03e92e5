# SPDX-License-Identifier: Apache-2.0
"""Time one denoising step of a full-size Stable Diffusion 1.5 UNet (512 x 512, batch 2) with random
weights: negated through an installed engine, against the same step with diffusers' own processors."""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import fastnegate as fn
from fastnegate.concepts import Concept
from fastnegate.engine import Engine, Record

from ..operator.cases import CONCEPTS, DENSE, METHODS
from ..operator.machine import facts
from ..operator.measure import interleave, ratio

SD15: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "attention_head_dim": 8,  # in this model: the number of heads
    "cross_attention_dim": 768,
}
BATCH, TOKENS, STEPS = 2, 77, 1000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline", description=__doc__)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--method", choices=METHODS, default="protore")
    parser.add_argument("--concepts", choices=[c for c in CONCEPTS if c != "none"], default="4x8")
    parser.add_argument(
        "--rows",
        choices=("all", "conditional"),
        default="all",
        help="negate both rows, or the second alone as with classifier-free guidance",
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    for name, most in (("threads", 1024), ("pairs", STEPS - 2)):
        if not 1 <= getattr(options, name) <= most:
            raise ValueError(f"--{name} {getattr(options, name)}: must be 1 to {most}")
    if options.json:
        options.json.touch()  # fails now rather than after the run
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        result = run(options.method, options.concepts, options.rows, options.pairs)
    r = result["ratio"]
    print(
        f"{result['case']}, {options.threads} threads\n"
        f"  default {result['default_ms']:.0f} ms, negated {result['negated_ms']:.0f} ms a step, "
        f"ratio {r['median']:.4f} [{r['low']:.4f}, {r['high']:.4f}] over {options.pairs} pairs\n"
        f"  open gates {100 * result['open_gates']:.1f} % of queries, output changed by "
        f"{100 * result['change']:.1f} %, peak memory {result['peak_gbytes']:.1f} GB"
    )
    if options.json:
        options.json.write_text(json.dumps({"facts": facts(), **result}, indent=2) + "\n")
    return 0


def run(method: str, concepts: str, rows: str, pairs: int) -> dict[str, Any]:
    """Measure; `change` is the distance between the outputs, relative to the default one."""
    pipe = pipeline()
    plain = twin(pipe.unet)
    size = CONCEPTS[concepts]
    bank = fn.ConceptBank.from_prompts(pipe, {"concept 0": "a"})
    for i in range(size.count):
        bank.update(f"concept {i}", Concept.from_embeddings(_normal(i, size.tokens, bank.width)))
    engine = fn.install(pipe, bank, BATCH, rule=METHODS[method])
    # As in the dense cases of the operator: a threshold below every cosine keeps all gates open.
    threshold = None if METHODS[method].gate == "open" else DENSE
    policy = fn.Policy({name: 1.0 for name in bank}, threshold=threshold)
    if rows == "all":
        engine.set_rows([policy] * BATCH)
    else:
        engine.set_rows([policy], row_map=[0] * BATCH, conditional=[False, True])
    default, negated = (_step(pipe, unet) for unet in (plain, pipe.unet))
    # One round that does not count; in it the engine projects the concepts, once per pipeline call.
    times = interleave({"default": default, "negated": negated}, pairs, warm=1)
    expected, (actual, share) = default(), _watched(engine, negated)
    return {
        "case": f"{method} {concepts}, {rows} rows of {BATCH}",
        "default_ms": 1e3 * statistics.median(times["default"]),
        "negated_ms": 1e3 * statistics.median(times["negated"]),
        "ratio": vars(ratio(times["negated"], times["default"])),
        "open_gates": share,
        "change": float((actual - expected).norm() / expected.norm()),
        "peak_gbytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "seconds": times,
    }


def pipeline() -> Any:
    """The pipeline that an engine is installed in; its text encoder is a small one of the same width,
    since no step runs it."""
    width = SD15["cross_attention_dim"]
    text = CLIPTextConfig(
        vocab_size=2, hidden_size=width, intermediate_size=width, num_hidden_layers=1, num_attention_heads=12,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    tokenizer = CLIPTokenizer(
        vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[], model_max_length=TOKENS
    )
    scheduler = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)
    scheduler.set_timesteps(STEPS)
    return diffusers.StableDiffusionPipeline(
        unet=_random(SD15), vae=None, text_encoder=CLIPTextModel(text).eval(), tokenizer=tokenizer,
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def twin(unet: Any) -> Any:
    """A second model on the same weights, with processors of its own."""
    with torch.device("meta"):
        other = diffusers.UNet2DConditionModel(**SD15)
    other.load_state_dict(unet.state_dict(), assign=True)
    return other.eval()


def _random(config: dict[str, Any]) -> Any:
    """Weights that keep signals at their size; torch's own initialization would take much longer."""
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**config)
    unet.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in unet.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
        else:  # of norms, and biases
            parameter.data.fill_(float(name.endswith("weight")))
    return unet


def _step(pipe: Any, unet: Any) -> Callable[[], Tensor]:
    """The denoiser at one step after the other, so that the engine sees one long pipeline call; all
    pipelines hand the same prompt tensor to every step."""
    latents = _normal(0, BATCH, 4, SD15["sample_size"], SD15["sample_size"])
    prompt = _normal(1, BATCH, TOKENS, SD15["cross_attention_dim"])
    steps = itertools.count()

    def call() -> Tensor:
        timestep = pipe.scheduler.timesteps[next(steps)]
        output: Tensor = unet(latents, timestep, encoder_hidden_states=prompt, return_dict=False)[0]
        return output

    return call


def _watched(engine: Engine, step: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """The output of a step, and the share of queries of negated rows with an open gate."""
    records: list[Record] = []
    engine.observer = records.append
    output = step()
    engine.observer = None
    open_gates = [
        record.statistics.heat[[e for e, b, _ in record.entries if b == row]].amax(0) > 0
        for record in records
        for row in {b for _, b, _ in record.entries}
    ]
    return output, float(torch.cat(open_gates).float().mean())


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


if __name__ == "__main__":
    sys.exit(main())
