# SPDX-License-Identifier: Apache-2.0
"""What a denoiser call needs, whatever machine it runs on: floating-point operations, and bytes that live at
once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

from fastnegate.operator import registration


def operations(call: Callable[[], object]) -> int:
    """Of all matrix products and convolutions of a call, a multiply-add being two. Tensors may be on `meta`.
    What is done element by element is not counted, nor what a kernel does twice."""
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        call()
    return counter.get_total_flops()


class Told(TorchDispatchMode):
    """Whoever reads a whole number of a tensor on `meta`, which has none, is told this one. FLUX.1 and FLUX.2
    are asked so how many tokens of theirs are the image's."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            if args[0].dtype != torch.int64:
                raise TypeError(f"a number of dtype {args[0].dtype} is read of a tensor on meta")
            return self.number
        return func(*args, **(kwargs or {}))


def _flash(query: Any, key: Any, value: Any, *_: Any, out_val: Any = None, **__: Any) -> int:
    """Of torch's attention on processors."""
    flops: int = sdpa_flop(query, key, value)
    return flops


def _negated(*arguments: Any, out_val: Any = None) -> int:
    """Of ours: each query with the keys and values of its prompt, and with those of the concepts of its row.
    How long a concept is stands in memory, which tensors on `meta` do not have: all count as the longest."""
    problem = registration.from_flat(*arguments)
    batch, heads, queries, keys, dim = problem.sizes
    tokens, rule = problem.concepts, problem.rule
    products = 2 * batch * keys
    if tokens is not None and rule.reads.tokens:
        # `retrieve` looks the output up among the concept's values once more.
        products += (4 if rule.direction == "retrieve" else 2) * tokens.entries * tokens.longest
    return 2 * heads * queries * dim * products


# Attributes are what torch's counter knows an operator by, and how it says to hand on tensors, not shapes.
_negated._get_raw = True  # type: ignore[attr-defined]
FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _flash,
    torch.ops.fastnegate.negated_attention: _negated,
    torch.ops.fastnegate.negated_attention_with_statistics: _negated,
}


def peak(call: Callable[[], object]) -> int:
    """The most bytes that live at once among tensors that the call makes: without weights and arguments, and
    without what a kernel needs within itself."""
    with Live() as live:
        call()
    return live.most


class Live(TorchDispatchMode):
    """Bytes of the memory that operators have made and nobody has let go.

    Attributes:
        now, most: at this moment, and at the worst.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        # By identity; a storage lives as long as a tensor that has it.
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._look(tensor, made=False)  # what was not made here is a weight or an argument
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._look(tensor, made=True)
        return result

    def _look(self, tensor: Tensor, made: bool) -> None:
        storage = tensor.untyped_storage()
        identity = storage._cdata
        if identity in self._known:
            return
        size = storage.nbytes() if made else 0

        def gone(_: object) -> None:
            del self._known[identity]
            self.now -= size

        self._known[identity] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


def _tensors(structure: Any) -> list[Tensor]:
    return [leaf for leaf in tree_iter(structure) if isinstance(leaf, Tensor)]
