# SPDX-License-Identifier: Apache-2.0
"""Attention kernels of others that also give the log-sum-exp of each row: a table of what each one takes, and
how each one is called. Every adapter takes and returns [B, H, N, D] with the log-sum-exp [B, H, N], natural,
over the keys as the kernel sees them.

Which rows have no keys is read off the mask: kernels write 0, -inf or +inf there, and 0 is a log-sum-exp like
any other.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention
from torch.nn.functional import pad

from .. import checks, reference
from ..plan import require
from ..problem import Problem

aten = torch.ops.aten
_flex_attention: Any = flex_attention

Run = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor]]

HALF = (torch.float16, torch.bfloat16)
SINGLE = (*HALF, torch.float32)
ALL = (*SINGLE, torch.float64)


class Kernel(NamedTuple):
    """What a kernel takes."""

    run: Run
    dtypes: tuple[torch.dtype, ...]
    device: str | None = "cuda"  # None: any
    dim: int | None = None  # the largest D
    multiple: int = 8  # of which D is to be: what kernels on GPUs read at once
    bias: str = "none"  # which it takes: "none", "own", of the dtype of the query, or "any"
    capability: tuple[int, int] = (0, 0)  # of the GPU, at least
    missing: Callable[[], str | None] = lambda: None  # why it is not on this machine


def refusal(name: str, problem: Problem) -> str | None:
    """Why the kernel cannot run the call, or None. Metadata alone is read."""
    kernel, query = KERNELS[name], problem.query
    device, dim = query.device, query.shape[3]
    if kernel.device is not None and device.type != kernel.device:
        return f"query is on {device}: must be on {kernel.device}"
    if query.dtype not in kernel.dtypes:
        return f"query has dtype {query.dtype}: must be one of {', '.join(map(str, kernel.dtypes))}"
    if kernel.dim is not None and dim > kernel.dim:
        return f"query has {dim} channels: must be at most {kernel.dim}"
    bias = problem.key_bias
    if bias is not None and kernel.bias == "none":
        return "key_bias is given: must be None"
    if bias is not None and kernel.bias == "own" and bias.dtype != query.dtype:
        return f"key_bias has dtype {bias.dtype}: must be {query.dtype} as the query"
    if kernel.run is not _reference and torch.is_grad_enabled() and checks.requires_grad(*problem.operands):
        return "an input requires grad, and the log-sum-exp of fused kernels has no gradient"
    if kernel.capability > (0, 0) and torch.cuda.is_available():
        found = torch.cuda.get_device_capability(device)
        if found < kernel.capability:
            return "the GPU has compute capability {}.{}: must be at least {}.{}".format(
                *found, *kernel.capability
            )
    return kernel.missing()


def run(name: str, problem: Problem) -> tuple[Tensor, Tensor]:
    """`out` and `lse` of a `Partial`, by a kernel that does not refuse the problem."""
    kernel, query, key, value = KERNELS[name], problem.query, problem.key, problem.value
    bias, empty = problem.key_bias, None
    if query.numel() == 0 or key.shape[2] == 0:
        kernel = KERNELS["reference"]  # kernels divide by the sizes; there is nothing to compute
    if bias is not None and kernel.run is not _reference:
        if bias.dtype != query.dtype:
            bias = bias.to(torch.promote_types(query.dtype, torch.float32))
        masked = bias == -torch.inf
        empty = masked.all(-1)
        # A key masked for every query is absent: even NaN in it must not reach the output.
        absent = masked.all(-2).unsqueeze(-1)
        key, value = key.masked_fill(absent, 0.0), value.masked_fill(absent, 0.0)
    extra = -query.shape[3] % kernel.multiple
    if extra:
        query, key, value = (pad(t, (0, extra)) for t in (query, key, value))
    out, lse = kernel.run(query, key, value, bias, problem.scale)
    if extra:
        out = out.narrow(3, 0, problem.query.shape[3])
    if empty is not None:
        lse = lse.masked_fill(empty, -torch.inf)
    return out, lse


# ---- of torch -------------------------------------------------------------------------------------


def _reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """In float64; both results have gradients."""
    out, lse = reference.partial(q.double(), k.double(), v.double(), bias, scale)
    return out.to(q.dtype), lse.to(torch.promote_types(q.dtype, torch.float32))


def _cpu(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Log-sum-exp 0 for empty rows, and, of a few keys, for rows of NaN, whose output is 0 then, as that of
    `scaled_dot_product_attention`. Zero keys, and zero heads, end the process."""
    operator = aten._scaled_dot_product_flash_attention_for_cpu.default
    out, lse = operator(q, k, v, attn_mask=bias, scale=scale)
    return out, lse


def _flash(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Log-sum-exp +inf where the sum is 0 or NaN. There is no mask, so no row is empty, and what is wrong
    stays +inf: it shows as NaN in a merge, where -inf would drop the row in silence. So with FlashAttention
    below."""
    out, lse, *_ = aten._scaled_dot_product_flash_attention.default(q, k, v, scale=scale)
    return out, lse


def _cudnn(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Log-sum-exp [B, H, N, 1], before torch 2.9 [B, H, N]; -inf for empty rows."""
    operator = aten._scaled_dot_product_cudnn_attention.default
    out, lse, *_ = operator(q, k, v, bias, True, scale=scale)
    return out, lse.reshape(q.shape[:3])


def _efficient(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of N rounded up to 32; 0 for empty rows. A bias has to be of the dtype of the query; beside
    one more exact, all is computed in float32 rather than the bias rounded. Its rows have to be aligned."""
    stored, (batch, heads, queries), keys = q.dtype, q.shape[:3], k.shape[2]
    if bias is not None:
        q, k, v = q.to(bias.dtype), k.to(bias.dtype), v.to(bias.dtype)
        bias = pad(bias, (0, 16 - keys % 16)).narrow(3, 0, keys).expand(batch, heads, queries, keys)
    operator = aten._scaled_dot_product_efficient_attention.default
    out, lse, *_ = operator(q, k, v, bias, True, scale=scale)
    return out.to(stored), lse.narrow(2, 0, queries)


def _flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Compiled, for each shape of the bias again."""
    score_mod: Callable[..., Tensor] | None = None
    if bias is not None:
        added = bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])

        def score_mod(logit: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return logit + added[b, h, query, key]

    function = _flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    out, aux = function(q, k, v, score_mod=score_mod, scale=scale, return_aux=AuxRequest(lse=True))
    return out, aux.lse


@functools.cache
def _compiled_flex() -> Any:
    return torch.compile(_flex_attention)


# ---- of others: FlashAttention has [B, N, H, D] ---------------------------------------------------


def _flash_attn_2(q: Tensor, k: Tensor, v: Tensor, _: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """`return_attn_probs` returns the log-sum-exp as well, and no probabilities without dropout."""
    function = importlib.import_module("flash_attn").flash_attn_func
    out, lse, *_rest = function(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), softmax_scale=scale, return_attn_probs=True
    )
    return out.transpose(1, 2), lse


def _flash_attn_3(q: Tensor, k: Tensor, v: Tensor, _: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Returned the log-sum-exp always, and since August 2025 on request."""
    function = importlib.import_module("flash_attn_interface").flash_attn_func
    wanted = {"return_attn_probs": True} if _takes(function, "return_attn_probs") else {}
    out, lse, *_rest = function(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), softmax_scale=scale, **wanted
    )
    return out.transpose(1, 2), lse


def _flash_attn_4(q: Tensor, k: Tensor, v: Tensor, _: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Returns the log-sum-exp on request, since February 2026."""
    function = importlib.import_module("flash_attn.cute").flash_attn_func
    if not _takes(function, "return_lse"):
        require("flash_attn_4", "this version of flash_attn.cute does not return the log-sum-exp")
    out, lse, *_rest = function(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), softmax_scale=scale, return_lse=True
    )
    return out.transpose(1, 2), lse


def _sage(q: Tensor, k: Tensor, v: Tensor, _: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Has [B, H, N, D] under the name HND. The log-sum-exp is that of products rounded to int8."""
    function = importlib.import_module("sageattention").sageattn
    out, lse = function(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=scale, return_lse=True)
    return out, lse


@functools.cache
def _takes(function: Callable[..., Any], argument: str) -> bool:
    return argument in inspect.signature(function).parameters


def _importable(package: str) -> str | None:
    """Why the package cannot be imported, or None."""
    try:
        importlib.import_module(package)
    except (ImportError, OSError) as error:  # not installed, or built for another torch
        return f"{package} cannot be imported: {error}"
    return None


def _nvidia() -> str | None:
    return "this torch was built without CUDA" if torch.version.cuda is None else None


# ---- the table ------------------------------------------------------------------------------------

KERNELS: dict[str, Kernel] = {
    "reference": Kernel(_reference, ALL, device=None, multiple=1, bias="any"),
    "cpu": Kernel(_cpu, ALL, device="cpu", multiple=1, bias="any"),
    "flash": Kernel(_flash, HALF, dim=256, capability=(8, 0)),
    "cudnn": Kernel(_cudnn, HALF, dim=128, bias="own", capability=(8, 0), missing=_nvidia),
    "efficient": Kernel(_efficient, SINGLE, bias="any"),
    "flex": Kernel(_flex, SINGLE, bias="any"),
    "flash_attn_2": Kernel(
        _flash_attn_2, HALF, dim=256, missing=functools.partial(_importable, "flash_attn")
    ),
    "flash_attn_3": Kernel(
        _flash_attn_3, HALF, dim=256, missing=functools.partial(_importable, "flash_attn_interface")
    ),
    "flash_attn_4": Kernel(
        _flash_attn_4, HALF, dim=256, missing=functools.partial(_importable, "flash_attn.cute")
    ),
    "sage": Kernel(_sage, HALF, dim=128, missing=functools.partial(_importable, "sageattention")),
}
AUTO = ("cpu", "flash", "cudnn", "efficient", "reference")  # in the order in which they are tried
