# SPDX-License-Identifier: Apache-2.0
"""How kernels are called that need a GPU or a package: by stand-ins that return what each was recorded to
return: layout, shape, log-sum-exp of empty rows. Those of torch are behind the real operators' schemas."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from partial_truth import attention, check, exact
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

import fastnegate as fn
from fastnegate.operator.partials import kernels

pytestmark = pytest.mark.usefixtures("one_thread")
HALF = (torch.bfloat16, torch.float16)
NONE = torch.empty(0)


def computed(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, empty: float
) -> tuple[Tensor, Tensor]:
    """What kernels on GPUs compute of [B, H, N, D]; `empty` is the log-sum-exp of a row without a sum."""
    assert q.shape[3] % 8 == 0 and q.shape[3] == k.shape[3] == v.shape[3] and k.shape[2] > 0
    out, lse = exact(q, k, v, bias, scale)
    lse = lse.float().masked_fill(lse == -torch.inf, empty)
    return out.to(q.dtype), lse.masked_fill(lse.isnan(), torch.inf) if empty == torch.inf else lse


def on_cpu(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The kernel takes tensors of the CPU."""
    monkeypatch.setitem(kernels.KERNELS, name, kernels.KERNELS[name]._replace(device="cpu"))


def run(name: str, own_bias: bool = False, **options: Any) -> None:
    """The stand-in keeps the budget: numbers, layout and scale went in and came out as they should.
    `own_bias`: in the dtype of the query."""
    for queries in (37, 130):
        p = attention(queries=queries, **options)
        if own_bias and p.key_bias is not None:
            p = dataclasses.replace(p, key_bias=p.key_bias.to(p.query.dtype))
        check(p, fn.partial_attention(
            p.query, p.key, p.value, key_bias=p.key_bias, scale=p.scale, backend=name
        ))  # fmt: skip


# ---- operators of torch ---------------------------------------------------------------------------


def flash(query: Tensor, key: Tensor, value: Tensor, *_: Any, scale: float | None = None) -> tuple[Any, ...]:
    assert query.dtype in HALF and scale is not None
    return *computed(query, key, value, None, scale, torch.inf), NONE, NONE, 0, 0, NONE, NONE, NONE


def cudnn(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, lse: bool, *_: Any, scale: float
) -> tuple[Any, ...]:
    assert query.dtype in HALF and lse and (bias is None or bias.dtype == query.dtype)
    out, sums = computed(query, key, value, bias, scale, -torch.inf)
    return out, sums.unsqueeze(3), NONE, NONE, 0, 0, NONE, NONE, NONE


def cudnn_before_2_9(*arguments: Any, **keywords: Any) -> tuple[Any, ...]:
    out, lse, *rest = cudnn(*arguments, **keywords)
    return out, lse.squeeze(3), *rest


def efficient(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, lse: bool, *_: Any, scale: float
) -> tuple[Any, ...]:
    assert lse
    if bias is not None:
        assert bias.dtype == query.dtype and bias.shape == (*query.shape[:3], key.shape[2])
        assert all(stride % 8 == 0 for stride in bias.stride()[:3]) and bias.data_ptr() % 16 == 0
    out, sums = computed(query, key, value, bias, scale, 0.0)
    return out, torch.nn.functional.pad(sums, (0, -sums.shape[2] % 32), value=torch.nan), NONE, NONE


@pytest.fixture
def aten() -> Iterator[torch.library.Library]:
    with torch.library._scoped_library("aten", "IMPL") as library:
        yield library


OPERATORS: dict[str, tuple[str, Callable, tuple[str, ...]]] = {
    "flash": ("flash", flash, ("none",)),
    "cudnn": ("cudnn", cudnn, ("none", "padding", "per_query")),
    "cudnn before torch 2.9": ("cudnn", cudnn_before_2_9, ("none", "padding")),
    "efficient": ("efficient", efficient, ("none", "padding", "per_query", "per_head_and_query")),
}


@pytest.mark.parametrize("case", OPERATORS)
@pytest.mark.parametrize("dim", [40, 36])
def test_operators_of_torch(
    case: str, dim: int, aten: torch.library.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, stand_in, masks = OPERATORS[case]
    aten.impl(f"_scaled_dot_product_{name}_attention", stand_in, "CPU")
    on_cpu(monkeypatch, name)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    for dtype in HALF if name != "efficient" else (*HALF, torch.float32):
        for mask in masks:
            run(name, dtype=dtype, dim=dim, mask=mask, own_bias=name == "cudnn")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not compiled, which is what it does as well."""
    on_cpu(monkeypatch, "flex")
    monkeypatch.setattr(kernels, "_compiled_flex", lambda: flex_attention)
    for mask in ("none", "padding", "additive", "per_query", "per_head_and_query"):
        run("flex", dtype=torch.float32, mask=mask, dim=36)


@pytest.mark.parametrize("dtype", HALF)
def test_a_bias_is_not_rounded_to_the_dtype_of_the_query(
    dtype: torch.dtype, aten: torch.library.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    aten.impl("_scaled_dot_product_efficient_attention", efficient, "CPU")
    on_cpu(monkeypatch, "efficient")
    p = attention(dtype=dtype, mask="per_query")
    p = dataclasses.replace(p, key_bias=30 * p.key_bias)  # of which the last bits of 16 are worth .06
    for name in ("cpu", "efficient", "reference"):
        check(p, fn.partial_attention(
            p.query, p.key, p.value, key_bias=p.key_bias, scale=p.scale, backend=name
        ))  # fmt: skip


# ---- packages: [B, N, H, D] -----------------------------------------------------------------------


def transposed(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    assert q.dtype in HALF and scale is not None
    out, lse = computed(*(t.transpose(1, 2) for t in (q, k, v)), None, scale, torch.inf)
    return out.transpose(1, 2).contiguous(), lse


def flash_attn_2(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, return_attn_probs: bool = False,
) -> Any:  # fmt: skip
    out, lse = transposed(q, k, v, softmax_scale)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_3(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False,
    return_attn_probs: bool = False,
) -> Any:  # fmt: skip
    out, lse = transposed(q, k, v, softmax_scale)
    return (out, lse) if return_attn_probs else out


def flash_attn_3_before_august_2025(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False
) -> Any:
    return transposed(q, k, v, softmax_scale)


def flash_attn_4(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False,
    return_lse: bool = False,
) -> Any:  # fmt: skip
    out, lse = transposed(q, k, v, softmax_scale)
    return out, lse if return_lse else None


def flash_attn_4_before_february_2026(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False
) -> Any:
    return transposed(q, k, v, softmax_scale)[0], None


def sageattn(
    q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", is_causal: bool = False,
    sm_scale: float | None = None, return_lse: bool = False,
) -> Any:  # fmt: skip
    assert tensor_layout == "HND" and q.dtype in HALF and sm_scale is not None
    out, lse = computed(q, k, v, None, sm_scale, -torch.inf)
    return (out, lse) if return_lse else out


PACKAGES: dict[str, tuple[str, str, str, Callable]] = {
    "flash_attn_2": ("flash_attn_2", "flash_attn", "flash_attn_func", flash_attn_2),
    "flash_attn_3": ("flash_attn_3", "flash_attn_interface", "flash_attn_func", flash_attn_3),
    "flash_attn_3 before August 2025": (
        "flash_attn_3", "flash_attn_interface", "flash_attn_func", flash_attn_3_before_august_2025,
    ),
    "flash_attn_4": ("flash_attn_4", "flash_attn.cute", "flash_attn_func", flash_attn_4),
    "sage": ("sage", "sageattention", "sageattn", sageattn),
}  # fmt: skip


def install(monkeypatch: pytest.MonkeyPatch, package: str, function: str, stand_in: Callable) -> None:
    module = ModuleType(package)
    setattr(module, function, stand_in)
    monkeypatch.setitem(sys.modules, package, module)


@pytest.mark.parametrize("case", PACKAGES)
def test_packages(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, package, function, stand_in = PACKAGES[case]
    on_cpu(monkeypatch, name)
    install(monkeypatch, package, function, stand_in)
    for dtype in HALF:
        for dim in (64, 36):
            run(name, dtype=dtype, dim=dim)


@pytest.mark.parametrize("name", ["flash_attn_2", "flash_attn_3", "flash_attn_4", "sage"])
def test_a_package_that_is_not_there_is_refused_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu(monkeypatch, name)
    package = PACKAGES[name][1]
    monkeypatch.setitem(sys.modules, package, None)
    p = attention(dtype=torch.bfloat16)
    with pytest.raises(fn.BackendError, match=rf"backend='{name}' .*{package} cannot be imported"):
        fn.partial_attention(p.query, p.key, p.value, backend=name)


def test_a_package_that_does_not_return_the_lse_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu(monkeypatch, "flash_attn_4")
    install(monkeypatch, "flash_attn.cute", "flash_attn_func", flash_attn_4_before_february_2026)
    p = attention(dtype=torch.bfloat16)
    with pytest.raises(fn.BackendError, match=r"backend='flash_attn_4' .* does not return the log-sum-exp"):
        fn.partial_attention(p.query, p.key, p.value, backend="flash_attn_4")


def test_nan_is_not_taken_for_a_row_without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention writes +inf for both. There are no rows without keys, so a merge must show it."""
    on_cpu(monkeypatch, "flash_attn_2")
    install(monkeypatch, "flash_attn", "flash_attn_func", flash_attn_2)
    p = attention(dtype=torch.bfloat16)
    query = p.query.clone()
    query[0, 0, 3, 5] = torch.nan
    image = fn.partial_attention(query, p.key, p.value, backend="flash_attn_2")
    assert image.lse[0, 0, 3] == torch.inf
    merged = fn.negated_attention(p.query, p.key, p.value, shared=image, backend="reference")
    assert merged[0, 0, 3].isnan().all() and merged[0, 0, 4].isfinite().all()


# ---- refusals -------------------------------------------------------------------------------------

REFUSED = {
    "a mask": ("flash", {"mask": "padding"}, "key_bias is given: must be None"),
    "a bias more exact": (
        "cudnn",
        {"mask": "padding"},
        "key_bias has dtype torch.float32: must be torch.bfl",
    ),
    "dtype": (
        "flash",
        {"dtype": torch.float32},
        "query has dtype torch.float32: must be one of torch.float16",
    ),
    "double": ("efficient", {"dtype": torch.float64}, "query has dtype torch.float64"),
    "channels": ("cudnn", {"dim": 136}, "query has 136 channels: must be at most 128"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_kernel_does_not_take_is_refused_by_name(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, options, words = REFUSED[case]
    on_cpu(monkeypatch, name)
    p = attention(**{"dtype": torch.bfloat16, **options})
    with pytest.raises(fn.BackendError, match=f"backend='{name}' .*{words}"):
        fn.partial_attention(p.query, p.key, p.value, key_bias=p.key_bias, backend=name)


def test_an_old_gpu_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu(monkeypatch, "flash")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    p = attention(dtype=torch.float16)
    with pytest.raises(fn.BackendError, match=r"backend='flash' .* capability 7\.5: must be at least 8\.0"):
        fn.partial_attention(p.query, p.key, p.value, backend="flash")
