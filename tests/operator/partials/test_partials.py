# SPDX-License-Identifier: Apache-2.0
"""`partial_attention`: attention with its log-sum-exp, whatever is asked of the kernels beneath."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

import pytest
import torch
from partial_truth import EXACT, attention, check, exact
from support import DTYPES, LAYOUTS, MASKS, pairwise
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import fastnegate as fn
from fastnegate.operator import choice
from fastnegate.operator.partials import kernels
from fastnegate.operator.problem import Problem

pytestmark = pytest.mark.usefixtures("one_thread")
on_cpu = pytest.mark.parametrize("backend", ["cpu", "reference"])
T = torch.zeros


def of(p: Problem, backend: str = "auto") -> fn.Partial:
    return fn.partial_attention(p.query, p.key, p.value, key_bias=p.key_bias, scale=p.scale, backend=backend)


# ---- values ---------------------------------------------------------------------------------------

CASES = {
    "dtype": [*DTYPES, EXACT],
    "mask": MASKS,
    "layout": LAYOUTS,
    "dim": [40, 64, 7],
    "queries": [37, 130],  # under and over 256 rows
    "keys": [21, 1],
}


@on_cpu
@pytest.mark.parametrize("case", [*pairwise(CASES)], ids=lambda case: "-".join(map(str, case.values())))
def test_it_keeps_the_budget(case: dict, backend: str) -> None:
    problem = attention(seed=1, **case)
    check(problem, of(problem, backend), f"partial {backend}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_keys_of_which_the_first_are_masked(dtype: torch.dtype) -> None:
    """Kernels go through keys in blocks: here whole ones are masked."""
    problem = attention(queries=70, keys=1300, dtype=dtype)
    bias = T(1, 1, 1, 1300).index_fill(3, torch.arange(1100), -torch.inf)
    problem = dataclasses.replace(problem, key_bias=bias)
    check(problem, of(problem), "partial cpu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_logits(dtype: torch.dtype) -> None:
    problem = attention(queries=70, keys=90, dtype=dtype, sharpness=30.0)
    check(problem, of(problem), "partial cpu")
    largest = 6e4 if dtype == torch.float16 else 1e15
    most = torch.full((1, 1, 4, 16), largest, dtype=dtype)
    partial = fn.partial_attention(most, most, torch.ones_like(most))
    assert partial.out.isfinite().all() and partial.lse.isfinite().all()


@on_cpu
@pytest.mark.parametrize("key_bias_dtype", [torch.float16, torch.bfloat16, EXACT])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_is_of_any_dtype(dtype: torch.dtype, key_bias_dtype: torch.dtype, backend: str) -> None:
    problem = attention(mask="additive", dtype=dtype)
    problem = dataclasses.replace(problem, key_bias=problem.key_bias.to(key_bias_dtype))
    check(problem, of(problem, backend))


@on_cpu
def test_autocast(backend: str) -> None:
    p = attention(mask="padding")
    halves = [t.bfloat16() for t in (p.query, p.key, p.value)]
    with torch.autocast("cpu", torch.bfloat16):
        partial = of(p, backend)
        double = of(attention(dtype=EXACT), backend)
    expected = fn.partial_attention(*halves, key_bias=p.key_bias, scale=p.scale, backend=backend)
    assert partial.out.dtype == torch.bfloat16 and torch.equal(partial.out, expected.out)
    assert torch.equal(partial.lse, expected.lse) and double.out.dtype == EXACT


# ---- rows without keys ----------------------------------------------------------------------------


@on_cpu
@pytest.mark.parametrize("shape", [(2, 3, 5, 0), (0, 3, 5, 7), (2, 0, 5, 7), (2, 3, 0, 7), (0, 0, 0, 0)])
@pytest.mark.parametrize("masked", [False, True])
def test_sizes_of_zero_reach_no_kernel(
    shape: tuple[int, int, int, int], masked: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    b, h, n, m = shape
    monkeypatch.setitem(kernels.KERNELS, "cpu", kernels.KERNELS["cpu"]._replace(run=pytest.fail))
    bias = T(b, 1, 1, m) if masked else None
    query, key = T(b, h, n, 8, dtype=torch.bfloat16), T(b, h, m, 8, dtype=torch.bfloat16)
    out, lse = fn.partial_attention(query, key, key, key_bias=bias, backend=backend)
    assert out.shape == (b, h, n, 8) and out.dtype == torch.bfloat16 and not out.any()
    assert lse.shape == (b, h, n) and lse.dtype == torch.float32 and (lse == -torch.inf).all()


def test_no_channels_are_logits_of_zero() -> None:
    out, lse = fn.partial_attention(T(1, 2, 3, 0), T(1, 2, 5, 0), T(1, 2, 5, 0))
    assert out.shape == (1, 2, 3, 0)
    torch.testing.assert_close(lse, torch.full((1, 2, 3), 5.0).log())


@on_cpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_keys_are_those_of_the_mask(dtype: torch.dtype, backend: str) -> None:
    """Row 0 of the batch has no key; in row 1, query 3. Another query of row 1 has one key of logit 0, whose
    log-sum-exp is 0, which torch's kernel also writes for an empty row."""
    problem = attention(mask="none", dtype=dtype)
    bias = T(2, 1, 37, 21)
    bias[0], bias[1, :, 3], bias[1, :, 5, 1:] = -torch.inf, -torch.inf, -torch.inf
    query = problem.query.clone()
    query[1, :, 5] = 0
    problem = dataclasses.replace(problem, query=query, key_bias=bias)
    out, lse = of(problem, backend)
    check(problem, fn.Partial(out, lse))
    assert (lse[0] == -torch.inf).all() and (lse[1, :, 3] == -torch.inf).all()
    assert lse[1, :, 5].isfinite().all()
    assert not out[0].any() and not out[1, :, 3].any()


@on_cpu
@pytest.mark.parametrize("poisoned", ["key", "value"])
def test_nan_in_a_key_masked_for_all_does_not_get_out(poisoned: str, backend: str) -> None:
    problem = attention(mask="padding")
    holder = getattr(problem, poisoned)
    absent = (problem.key_bias == -torch.inf).mT
    poison = holder.masked_fill(absent, torch.nan)
    assert poison.isnan().any()
    partial = of(dataclasses.replace(problem, **{poisoned: poison}), backend)
    check(problem, partial)


# ---- gradients ------------------------------------------------------------------------------------


def test_out_and_lse_are_differentiable(caplog: pytest.LogCaptureFixture) -> None:
    choice.log_once.cache_clear()
    p = attention(1, 2, 4, 3, dim=5, dtype=EXACT)
    mask = T(1, 1, 4, 3, dtype=EXACT)
    mask[..., 2], mask[..., 1, :] = -torch.inf, -torch.inf  # a key, and a query's all

    def both(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = fn.partial_attention(q, k, v, key_bias=bias + mask)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    bias = torch.randn(1, 2, 1, 3, dtype=EXACT)
    inputs = [t.clone().requires_grad_() for t in (p.query, p.key, p.value, bias)]
    assert torch.autograd.gradcheck(both, inputs)
    assert len(caplog.records) == 1 and "reference" in caplog.text and "requires grad" in caplog.text
    q, k, v, bias = inputs
    out, lse = fn.partial_attention(q, k, v, key_bias=bias + mask)
    (out.sum() + lse[:, :, :1].sum()).backward()
    assert all(t.grad.isfinite().all() for t in inputs) and k.grad.any()


@pytest.mark.parametrize("name", ["query", "key", "value", "key_bias"])
def test_a_named_kernel_refuses_gradients(name: str) -> None:
    problem = attention(mask="additive")
    tensor = getattr(problem, name).requires_grad_()
    with pytest.raises(fn.BackendError, match=r"backend='cpu' .* requires grad"):
        of(problem, "cpu")
    assert of(problem, "reference").out.requires_grad
    with torch.no_grad():
        assert not of(problem, "cpu").lse.requires_grad
    tensor.requires_grad_(False)


def test_a_gradient_through_the_operator_is_that_of_one_softmax() -> None:
    """The image attended apart, with its gradient: the operator merges it."""
    p = attention(1, 2, 6, 9, dim=8, dtype=EXACT)
    q, k, v = (t.clone().requires_grad_() for t in (p.query, p.key, p.value))
    image = fn.partial_attention(q, k[:, :, :5], v[:, :, :5])
    split = fn.negated_attention(q, k[:, :, 5:], v[:, :, 5:], shared=image)
    apart = torch.autograd.grad(split.square().sum(), (q, k, v))
    whole = torch.autograd.grad(exact(q, k, v, None, 8**-0.5)[0].square().sum(), (q, k, v))
    for one, other in zip(apart, whole):
        torch.testing.assert_close(one, other)


# ---- compilers, fakes -----------------------------------------------------------------------------


class Attend(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> fn.Partial:
        return fn.partial_attention(q, k, v, key_bias=bias)


def operands(queries: int, mask: str = "padding") -> tuple[Tensor | None, ...]:
    p = attention(queries=queries, mask=mask)
    return p.query, p.key, p.value, p.key_bias


def same(one: fn.Partial, other: fn.Partial) -> None:
    assert torch.equal(one.out, other.out) and torch.equal(one.lse, other.lse)


@pytest.mark.parametrize("mask", ["none", "padding"])
def test_one_graph_for_all_lengths(mask: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(Attend(), fullgraph=True, dynamic=True, backend=counter)
    for queries in (37, 12, 130):
        same(compiled(*operands(queries, mask)), Attend()(*operands(queries, mask)))
    assert counter.frame_count == 1


def test_export() -> None:
    given = operands(37)
    program = torch.export.export(Attend(), given, strict=True)
    same(fn.Partial(*program.module()(*given)), Attend()(*given))


def test_inference_mode() -> None:
    with torch.inference_mode():
        inside = Attend()(*operands(37))
    same(inside, Attend()(*operands(37)))


def test_meta() -> None:
    out, lse = Attend()(*(None if t is None else t.to("meta") for t in operands(37)))
    assert out.is_meta and out.shape == (2, 2, 37, 40) and lse.shape == (2, 2, 37)


GPU = {  # dtype, dtype of the bias: the kernel
    (torch.bfloat16, None): "flash",
    (torch.float16, torch.float16): "cudnn",
    (torch.float16, torch.float32): "efficient",
    (torch.float32, None): "efficient",
    (torch.float32, torch.float32): "efficient",
    (EXACT, None): "reference",
}


@pytest.mark.parametrize(("dtypes", "name"), GPU.items(), ids=lambda item: str(item))
def test_choice_on_a_gpu(dtypes: tuple, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By fake tensors: the operators' own fakes say what comes out."""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    taken = []
    for known, kernel in kernels.KERNELS.items():
        monkeypatch.setitem(kernels.KERNELS, known, kernel._replace(run=recorded(known, kernel.run, taken)))
    with FakeTensorMode():
        query = torch.empty(2, 3, 37, 36, device="cuda", dtype=dtypes[0])
        key = torch.empty(2, 3, 21, 36, device="cuda", dtype=dtypes[0])
        bias = None if dtypes[1] is None else torch.empty(2, 1, 1, 21, device="cuda", dtype=dtypes[1])
        out, lse = fn.partial_attention(query, key, key, key_bias=bias)
    assert taken == [name]
    assert out.shape == query.shape and out.dtype == query.dtype and out.device == query.device
    assert lse.shape == (2, 3, 37) and lse.dtype == torch.promote_types(dtypes[0], torch.float32)


def recorded(name: str, run: Callable, taken: list[str]) -> Callable:
    def call(*arguments: object) -> tuple[Tensor, Tensor]:
        taken.append(name)
        return run(*arguments)

    return call


def test_auto_takes_the_kernel_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="fastnegate"):
        same(of(attention()), of(attention(), "cpu"))
    assert not caplog.records


# ---- refusals -------------------------------------------------------------------------------------

CALLS: dict[str, tuple[dict, type[Exception], str]] = {
    "rank": ({"query": T(4, 5, 8)}, ValueError, r"query has shape \[4, 5, 8\]: must be \[B, H, N, D\]"),
    "type": ({"value": None}, TypeError, "value is a NoneType"),
    "dtype": (
        {"key": T(2, 3, 6, 8).half()},
        ValueError,
        "key has dtype torch.float16: must be torch.float32",
    ),
    "heads": ({"key": T(2, 1, 6, 8)}, ValueError, "key has 1 heads, .* grouped-query"),
    "strides": ({"query": T(2, 3, 8, 5).mT}, ValueError, "query has strides .* last must be 1"),
    "scale": ({"scale": float("nan")}, ValueError, "scale=nan"),
    "bias": ({"key_bias": T(2, 1, 1, 7)}, ValueError, r"key_bias has shape .*\[2 or 1, 3 or 1, 1 or 5, 6\]"),
    "bool": ({"key_bias": T(2, 1, 1, 6).bool()}, ValueError, "key_bias has dtype torch.bool"),
    "name": ({"backend": "flash2"}, ValueError, "backend='flash2': allowed are auto, reference, cpu, flash,"),
    "device": ({"backend": "flash"}, fn.BackendError, "backend='flash' .* query is on cpu: must be on cuda"),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_wrong_call_is_refused_by_name(case: str) -> None:
    changes, error, words = CALLS[case]
    arguments = {"query": T(2, 3, 5, 8), "key": T(2, 3, 6, 8), "value": T(2, 3, 6, 8), **changes}
    with pytest.raises(error, match=words):
        fn.partial_attention(**arguments)
