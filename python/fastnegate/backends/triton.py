# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel (triton_kernels/attention.py), on NVIDIA and AMD GPUs.

With TRITON_INTERPRET=1 in the environment Triton's interpreter runs it, slowly, on CPU tensors.
Triton is imported on first use.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..problem import GATE_REPORT_LEVEL, Problem, Tables
from ..rule import DIRECTIONS, GATES, NORMS, SIMILARITIES, Rule
from ..tokens import ConceptTokens

_KERNELS = "fastnegate.triton_kernels"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST = 65535  # programs along the second and third axis of a grid
_TILE_BYTES = 16384  # of keys, and of values: both fit the shared memory of every GPU


class Tiles(NamedTuple):
    """Sizes of one program: queries, prompt keys and concept tokens at a time, padded head_dim."""

    rows: int
    keys: int
    tokens: int
    channels: int
    warps: int


def tiles(dim: int, keys: int, longest: int, itemsize: int) -> Tiles:
    """Tiles for head_dim, prompt keys, tokens of the longest concept and bytes per element."""
    channels = _padded(dim)
    most = min(_TILE_BYTES // (channels * itemsize), 64)
    return Tiles(
        rows=min(max(8192 // (channels * itemsize), 16), 64),  # more would spill registers
        keys=min(_padded(keys), most),
        tokens=min(_padded(longest), most),
        channels=channels,
        warps=4 if channels <= 64 else 8,
    )


def _padded(size: int) -> int:
    """The next power of two, at least 16: what a Triton matrix product takes."""
    return 1 << max(size - 1, 15).bit_length()


def unavailable() -> str | None:
    if _MISSING is not None:
        return _MISSING
    if not _interpreted() and not torch.cuda.is_available():
        return "no GPU that Triton can drive"
    return None


def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if importlib.util.find_spec(_KERNELS) is None:
        return "the Triton kernels are not part of this install"
    return None


_MISSING = _missing()  # not asked at the first call, which may be inside a traced graph


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def supports(problem: Problem) -> str | None:
    batch, heads, _, _, dim = problem.sizes
    query = problem.query
    if (reason := unavailable()) is not None:
        return reason
    device = "cpu" if _interpreted() else "cuda"
    if query.device.type != device:
        return f"query is on {query.device}, not on {device}"
    if query.dtype not in _DTYPES:
        return f"dtype {query.dtype} is not float32, bfloat16 or float16"
    if _interpreted() and query.dtype == torch.bfloat16:
        return "the Triton interpreter computes bfloat16 dot products wrongly"
    if device == "cuda" and torch.version.hip is None:
        if torch.cuda.get_device_capability(query.device) < (8, 0):
            return "Triton needs compute capability 8.0"
    if dim % 8 or not 16 <= dim <= 256:
        return f"head_dim={dim} is not a multiple of 8 from 16 to 256"
    if batch > _MOST or heads > _MOST:
        return f"batch {batch} or heads {heads} is more than {_MOST}"
    if problem.bias_per_query:
        return "key_bias differs between queries"
    if problem.scale <= 0:
        return f"scale={problem.scale:g} is not positive"
    if problem.rule.direction == "retrieve":
        return "direction='retrieve' is not implemented"
    return None


def describe(problem: Problem) -> str:
    """One line for `explain`."""
    t = _tiles(problem)
    launches = len(_goals(problem.rule)) if problem.concepts is not None else 1
    return (
        f"tiles of {t.rows} queries, {t.keys} keys and {t.tokens} concept tokens, head_dim as "
        f"{t.channels}, {t.warps} warps, {launches} launch{'es' if launches > 1 else ''}"
    )


def run(problem: Problem) -> Tensor:
    return _run(problem, None)


def run_with_statistics(problem: Problem) -> tuple[Tensor, Tables]:
    batch, heads, queries, _, _ = problem.sizes
    count = problem.concepts.entries if problem.concepts is not None else 0
    made: dict[str, Any] = {"dtype": torch.float32, "device": problem.query.device}
    entries = torch.zeros(3, count, heads, queries, **made)
    rows = torch.zeros(4, batch, heads, queries, **made)
    output = _run(problem, (entries, rows))
    if not output.numel():
        shapes = ((count, 5), (count, queries), (batch, 3))
        return output, Tables._make(torch.zeros(shape, **made) for shape in shapes)
    gates, similarity, mass = entries
    both, mean = (1, 2), functools.partial(torch.mean, dtype=torch.float64)
    above = (gates > GATE_REPORT_LEVEL).float()
    per_entry = [gates.amax(both), mean(gates, both), mean(above, both), mean(mass, both)]
    per_entry.append(similarity.amax(both))
    moved, energy, limited, nonfinite = rows.sum((2, 3), dtype=torch.float64)
    share = torch.where(energy < 1e-30, 0.0, moved / energy)
    per_row = [share, limited / (heads * queries), nonfinite]
    return output, Tables(
        torch.stack([t.float() for t in per_entry], 1),
        mean(gates, 1).float(),
        torch.stack([t.float() for t in per_row], 1),
    )


def _tiles(problem: Problem) -> Tiles:
    _, _, _, keys, dim = problem.sizes
    longest = problem.concepts.longest if problem.concepts is not None else 0
    return tiles(dim, keys, longest, problem.query.element_size())


def _goals(rule: Rule) -> list[str]:
    """The launches: scope `feature` needs sums over heads before the output."""
    goals = ["output"]
    if rule.scope == "feature" and rule.norm != "none":
        goals.insert(0, "norms")
    if rule.scope == "feature" and (
        rule.similarity != "one" or rule.direction in ("orthogonal", "projection", "fixed")
    ):
        goals.insert(0, "moments")
    return goals


def _run(problem: Problem, tables: tuple[Tensor, Tensor] | None) -> Tensor:
    kernel: Any = importlib.import_module(f"{_KERNELS}.attention")
    query, tokens, rule = problem.query, problem.concepts, problem.rule
    batch, heads, queries, keys, dim = problem.sizes
    out = query.new_empty(batch, queries, heads, dim).transpose(1, 2)
    if not out.numel():
        return out
    if tokens is not None and (tokens.concepts == 0 or (rule.reads_direction and tokens.direction is None)):
        tokens = None  # no entry exists
    goals = _goals(rule) if tokens is not None else ["output"]
    sizes = (0, 0, 0, 0)
    if tokens is not None:
        sizes = (tokens.entries, tokens.concepts, tokens.tokens, tokens.longest)
    table = functools.partial(torch.empty, dtype=torch.float32, device=query.device)
    moments = table(5, sizes[0], heads, queries) if "moments" in goals else None
    norms = table(2, batch, heads, queries) if "norms" in goals else None
    bias = None
    if problem.key_bias is not None:
        strides = problem.key_bias.expand(batch, heads, 1, keys).stride()
        bias = kernel.View(problem.key_bias, strides[0], strides[1], strides[3])
    views = [kernel.View(x, *x.stride()[:3]) for x in (query, problem.key, problem.value, out)]
    packed = _concepts(kernel, tokens, rule) if tokens is not None else None
    t = _tiles(problem)
    with torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext():
        for goal in goals:
            kernel.attention[-(-queries // t.rows), heads, batch](
                *views, bias, packed, _rule(kernel, rule), moments, norms if goal != "moments" else None,
                kernel.Trace(*tables) if tables is not None and goal == "output" else None,
                problem.scale * math.log2(math.e), heads, queries, keys, *sizes,
                GOAL=goal, HEAD_DIM=dim, CHANNELS=t.channels, ROWS=t.rows, KEYS=t.keys, TOKENS=t.tokens,
                num_warps=t.warps,
                num_stages=1,  # text is short: loops run once or twice, there is nothing to pipeline
                enable_fp_fusion=False,  # else rounding depends on what the compiler finds around
            )  # fmt: skip
    return out


def _concepts(kernel: Any, tokens: ConceptTokens, rule: Rule) -> Any:
    """Pointers to what the rule reads."""
    key, value = (kernel.View(x, 0, x.stride(1), x.stride(0)) for x in (tokens.key, tokens.value))
    optional = [tokens.token_bias, tokens.token_weight]
    optional += [tokens.direction, None, tokens.offset] if rule.reads_direction else [None, None, None]
    if rule.direction == "fixed":
        optional[3] = tokens.direction if tokens.update is None else tokens.update
    flat = [x if x is None else x.contiguous() for x in (tokens.index, tokens.numbers, *optional)]
    return kernel.Concepts(key, value, *flat)


def _rule(kernel: Any, rule: Rule) -> Any:
    """The rule as floats: Triton would compile an integer 0, 1 or 16 in as a constant."""
    return kernel.Rule(
        similarity=float(SIMILARITIES.index(rule.similarity)),
        gate=float(GATES.index(rule.gate)),
        direction=float(DIRECTIONS.index(rule.direction)),
        joint=float(rule.combine == "joint"),
        largest=float(rule.select == "max"),
        norm=float(NORMS.index(rule.norm)),
        norm_order=float(rule.norm_order),
        reads_tokens=float(rule.reads_tokens),
        norm_limit=rule.norm_limit,
        blend=rule.blend,
        strength=rule.strength,
        logit_bias=rule.logit_bias,
        threshold=rule.threshold,
        width=rule.width or 0.0,
        cap=rule.cap,
    )
