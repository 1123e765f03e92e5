# SPDX-License-Identifier: Apache-2.0
"""Which backend computes a call, and why not another."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from . import checks
from .backends import AUTO, NAMES, load, unavailable
from .plan import BackendError, require
from .problem import Partial, Problem
from .rule import Rule
from .tokens import ConceptTokens

log = logging.getLogger("fastnegate")


def check_backend(backend: str) -> None:
    """Raise ValueError for an unknown name, BackendError for one this machine cannot use."""
    if backend == "auto":
        return
    if backend not in NAMES:
        raise ValueError(f"backend={backend!r}: allowed are auto, {', '.join(NAMES)}")
    reason = unavailable(backend)
    if reason is not None:
        raise BackendError(f"backend={backend!r} cannot be used here: {reason}")


def backends() -> dict[str, str | None]:
    """Every backend by name: None if it can be used on this machine, else why not."""
    return {name: unavailable(name) for name in NAMES}


def choose(problem: Problem, backend: str) -> str:
    """The name of the backend that computes the problem.

    Raises:
        ValueError: there is no backend of that name.
        BackendError: the named one, or with `auto` every one, cannot run this call.
    """
    if backend == "auto":
        return _first(problem)
    check_backend(backend)
    require(backend, _refusal(problem, backend))
    return backend


def explain(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    concepts: ConceptTokens | None = None,
    rule: Rule | str = "protore",
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    shared: Partial | None = None,
    prompt: Partial | None = None,
) -> str:
    """Which backend `auto` would choose for this call, how it would cut the work, and why each other one is
    not chosen. Arguments and errors as for `negated_attention`."""
    if prompt is not None or key is None or value is None:
        key, value = checks.keys(query, key, value, key_bias, prompt)
    problem = checks.problem(query, key, value, key_bias, concepts, rule, scale, shared, prompt)
    batch, heads, queries, keys, dim = problem.sizes
    lines = [
        f"negated_attention B={batch} H={heads} N={queries} M={keys} D={dim} "
        f"{str(query.dtype).removeprefix('torch.')} rule={problem.rule.name} entries={problem.entries}"
    ]
    chosen = _first(problem)
    for name in AUTO:
        if name == chosen:
            lines.append(f"  {name}: chosen: {load(name).plan(problem, False).describe()}")
        else:
            lines.append(f"  {name}: {_refusal(problem, name) or 'could run; another comes first'}")
    return "\n".join(lines)


def _first(problem: Problem) -> str:
    """The first backend that can run the call."""
    reasons: list[str] = []
    for name in AUTO:
        reason = _refusal(problem, name)
        if reason is None:
            break
        reasons.append(f"{name}: {reason}")
    else:
        raise BackendError("no backend can run this call: " + "; ".join(reasons))
    if name == "reference" and not torch.compiler.is_compiling() and problem.query.device.type != "meta":
        log_once("using the slow reference (" + "; ".join(reasons) + ")")
    return name


def _refusal(problem: Problem, name: str) -> str | None:
    """Why the backend cannot run the call, or None."""
    if name != "reference":
        missing = unavailable(name)
        if missing is not None:
            return missing
        if torch.is_grad_enabled() and checks.requires_grad(*problem.operands):
            return "an input requires grad, and fused backends have no gradient"
    return load(name).supports(problem)


@functools.cache
def log_once(message: str) -> None:
    log.warning(message)
