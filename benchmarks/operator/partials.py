# SPDX-License-Identifier: Apache-2.0
"""What negation costs in joint attention: NAG on top of torch's attention to the image, in turn with
attention to all keys without negation and with NAG as published.

    python -m benchmarks.operator.partials [--dtypes float32 bfloat16] [--concepts 1x8 1x77]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnegate import negated_attention, partial_attention
from fastnegate.commands.options import whole

from .baselines import concept_tensors, negated
from .cases import CONCEPTS, DTYPES, METHODS, Case, Layer, make, noise
from .machine import instruction_set, processor
from .measure import ROUNDS, interleave, ratio

PLAIN = "plain attention to all keys"


def calls(case: Case) -> dict[str, Callable[[], Tensor]]:
    """Attention of the image's queries to as many image keys and to the prompt: plain, with `shared` and the
    prompt's keys in our kernel, with the prompt as a partial too, and by two passes over joined keys, which
    are joined beforehand."""
    batch, heads, queries, _, dim = case.sizes
    query, key, value = case.query, case.key, case.value
    image_key, image_value = (
        noise(seed, batch, queries, heads, dim).to(query.dtype).transpose(1, 2) for seed in (101, 102)
    )

    def joined(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([image_key, k], 2), torch.cat([image_value, v], 2)

    all_keys, all_values = joined(key, value)
    concepts = [joined(k, v) for k, v in concept_tensors(case)]

    def fused() -> Tensor:
        image = partial_attention(query, image_key, image_value)
        return negated_attention(query, key, value, case.tokens, case.rule, shared=image)

    def by_partials() -> Tensor:
        image = partial_attention(query, image_key, image_value)
        prompt = partial_attention(query, key, value)
        return negated_attention(query, None, None, case.tokens, case.rule, shared=image, prompt=prompt)

    return {
        PLAIN: lambda: F.scaled_dot_product_attention(query, all_keys, all_values),
        "image as a partial": lambda: partial_attention(query, image_key, image_value).out,
        "shared, prompt keys": fused,
        "shared, prompt as a partial": by_partials,
        "two passes and a mix": lambda: negated(
            case, F.scaled_dot_product_attention, query, all_keys, all_values, concepts
        ),
    }


def amx() -> str:
    """Whether the processor has AMX, as Linux says."""
    info = Path("/proc/cpuinfo")
    return "AMX" if info.exists() and "amx_tile" in info.read_text() else "no AMX"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        "benchmarks.operator.partials", description=str(__doc__).partition("\n\n")[0]
    )
    parser.add_argument("--queries", type=whole(1), default=4096, help="and image keys (%(default)s)")
    parser.add_argument("--keys", type=whole(1), default=512, help="of the prompt (%(default)s)")
    parser.add_argument("--heads", type=whole(1), default=4)
    parser.add_argument("--dim", type=whole(1), default=128)
    parser.add_argument(
        "--concepts", nargs="+", choices=[c for c in CONCEPTS if c != "none"], default=["1x8", "1x77"]
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=whole(1, 1024), default=1)
    parser.add_argument("--rounds", type=whole(1), default=ROUNDS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(
        f"{processor()}, {amx()}, {options.threads} threads, {instruction_set()}, torch {torch.__version__}"
    )
    layer = Layer("joint", options.heads, options.queries, options.dim, options.keys, batch=1)
    for dtype in options.dtypes:
        for concepts in options.concepts:
            case = make(layer, CONCEPTS[concepts], METHODS["nag"], DTYPES[dtype])
            with torch.inference_mode():
                times = interleave(calls(case), options.rounds, warm=1)
            print(f"{case.name}: {1e3 * statistics.median(times[PLAIN]):.1f} ms {PLAIN}")
            for name, seconds in times.items():
                if name != PLAIN:
                    print(f"    {name:28} {ratio(seconds, times[PLAIN])}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
