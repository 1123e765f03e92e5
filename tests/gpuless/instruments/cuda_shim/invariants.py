# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin: `support` has the CUDA backend, on the shim, as the only one; imported before the tests
that take their parameters from there.

    FASTNEGATE_CUDA_SHIM=_cuda.so pytest -p invariants tests/operator/test_invariants.py
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(TESTS / "helpers"), str(TESTS / "gpuless" / "instruments")]

import support  # noqa: E402
from cuda_shim.backend import Shim  # noqa: E402

support.DTYPES = (torch.bfloat16, torch.float16)
support.RULES = {name: rule for name, rule in support.RULES.items() if rule.direction != "retrieve"}
support.every_backend = pytest.mark.parametrize("backend", ("cuda",))
support.every_dtype = pytest.mark.parametrize("dtype", support.DTYPES, ids=("bfloat16", "float16"))
support.every_rule = pytest.mark.parametrize("rule", support.RULES.values(), ids=list(support.RULES))

_make_problem = support.make_problem
_parameters = inspect.signature(_make_problem)


def make_problem(*args, **options):
    """bfloat16 for float32, which the kernel does not have; of tiny values float16 would leave nothing."""
    call = _parameters.bind(*args, **options)
    if call.arguments.get("dtype", torch.float32) == torch.float32:
        call.arguments["dtype"] = torch.bfloat16
    return _make_problem(*call.args, **call.kwargs)


support.make_problem = make_problem


@pytest.fixture(autouse=True, scope="session")
def shim() -> Iterator[Shim]:
    with Shim(Path(os.environ["FASTNEGATE_CUDA_SHIM"])).installed() as shim:
        yield shim
