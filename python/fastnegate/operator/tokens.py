# SPDX-License-Identifier: Apache-2.0
"""`ConceptTokens`: the concepts of one attention layer and which batch row negates which of them.

Two small tensors carry everything that may change between calls, so that a captured graph stays
valid: `numbers` (float32, one row per entry) and `index` (int32). Their sizes are host-side
capacities; only they decide tile sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .rule import check_number

NUMBERS = ("strength", "logit_bias", "threshold", "width", "cap", "active")
COLUMNS = 8  # numbers per entry, padded from 6 so that a row is 32 bytes

# The one order in which concepts are flattened: in the registered operator, in the Triton kernel and in
# csrc/arguments.h, always after query, key, value, (out) and key_bias. `neutral` is none of them: it came
# after programs had been exported, so the registered operator has it at its end.
TENSORS = (
    "key", "value", "index", "numbers", "token_bias", "token_weight", "direction", "update", "offset",
)  # fmt: skip
CAPACITIES = ("entries", "concepts", "longest", "busiest")

_LIMITS: dict[str, dict[str, float]] = {
    "width": {"above": 0.0},
    "cap": {"low": 0.0, "high": 1.0},
    "active": {"low": 0.0, "high": 1.0},
}
Row = Sequence["int | Mapping[str, Any]"]


def _number(name: str) -> Any:
    """A column of `ConceptTokens.numbers`, [E]."""
    return property(lambda tokens: tokens.numbers[:, NUMBERS.index(name)])


@dataclass(frozen=True, eq=False)
class ConceptTokens:
    """Packed concept tokens of one layer; build it with `pack` or `uniform`.

    Contents of the tensors may change in place between calls. Their shapes, strides and dtypes may not
    (`resize_`, `transpose_`): take `dataclasses.replace`. Memory may move (`set_`, `.data =`); that is seen.

    With T tokens, C concepts, E entries, B batch rows, H heads and head dimension D:

    Attributes:
        key, value: [T, H, D], the dtype and device of the query; or [B, T, H, D], where a row's entries
            read tokens of that row (`from_activations`).
        index: int32 [E + 2 C + B + 1]: the concept of each entry, `begin` and `length` of each
            concept in the token axis, and the CSR offsets of the rows into the entries.
        numbers: float32 [E, 8]: strength, logit_bias, threshold, width, cap, active and two unused
            columns. NaN means "the rule's default". `strength` etc. are views, made for in-place
            changes.
        entries, concepts: E and C.
        longest: capacity, the most tokens a concept has.
        busiest: capacity, the most entries a row has.
        token_bias: float32 [T] or None, added to the logits; -inf masks a token.
        token_weight: float32 [T] or None, multiplies a token's value, not its softmax mass.
        direction, update: float32 [C, H, D] or None: fixed vectors u and u' (default u).
        offset: float32 [C] or None: added to <Z, u>.
        neutral: int32 [B] or None: the concept whose tokens are a row's neutral segment, read by rules that
            centre (`Rule.center`) and by nothing else. A row with entries must have one, with tokens; in
            others -1 is as good.
    """

    key: Tensor
    value: Tensor
    index: Tensor
    numbers: Tensor
    entries: int
    concepts: int
    longest: int
    busiest: int
    token_bias: Tensor | None = None
    token_weight: Tensor | None = None
    direction: Tensor | None = None
    update: Tensor | None = None
    offset: Tensor | None = None
    neutral: Tensor | None = None

    @classmethod
    def pack(
        cls,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        rows: Sequence[Row],
        *,
        token_bias: Sequence[Tensor | None] | Tensor | None = None,
        token_weight: Sequence[Tensor | None] | Tensor | None = None,
        direction: Sequence[Tensor] | Tensor | None = None,
        update: Sequence[Tensor] | Tensor | None = None,
        offset: Sequence[float] | Tensor | None = None,
        neutral: int | Sequence[int | None] | None = None,
        **numbers: float,
    ) -> ConceptTokens:
        """Pack one list of concepts and one list of batch rows.

        Args:
            keys, values: one [T_c, H, D] tensor per concept; T_c may be 0.
            rows: one list per batch row. Its items are concept indices, or dicts with `concept` and
                any of strength, logit_bias, threshold, width, cap, active.
            token_bias, token_weight: one [T_c] tensor (or None) per concept, or one [T] tensor.
            direction, update: one [H, D] tensor per concept, or one [C, H, D] tensor.
            offset: one number per concept.
            neutral: the index of the concept whose tokens say nothing in particular, for all rows or one per
                row (None in rows without entries). It needs no entry, and is not negated by being neutral.
            numbers: strength, logit_bias, threshold, width (> 0), cap and active (in [0, 1]) for
                entries that do not name their own. What neither names comes from the rule.

        Raises:
            ValueError: shapes, dtypes or devices disagree, a number is not finite or out of range,
                a row names a concept that does not exist, or, where `neutral` is given, a row has entries and
                no neutral tokens.
            TypeError: an argument or number with an unknown name.
        """
        if len(keys) != len(values):
            raise ValueError(f"keys has {len(keys)} concepts, values has {len(values)}")
        if not keys:
            if any(len(row) for row in rows):
                raise ValueError("rows name concepts, but keys is empty")
        first = keys[0] if keys else torch.empty(0, 0, 0)
        for name, tensors in (("keys", keys), ("values", values)):
            for c, t in enumerate(tensors):
                if t.dim() != 3 or t.shape[1:] != first.shape[1:]:
                    raise ValueError(
                        f"{name}[{c}] has shape {list(t.shape)}: must be [tokens, H, D] with "
                        f"[H, D] = {list(first.shape[1:])} as in keys[0]"
                    )
                if len(t) != len(keys[c]):
                    raise ValueError(f"{name}[{c}] has {len(t)} tokens, keys[{c}] {len(keys[c])}")
                if t.dtype != first.dtype or t.device != first.device:
                    raise ValueError(
                        f"{name}[{c}] is {t.dtype} on {t.device}, keys[0] is {first.dtype} on "
                        f"{first.device}: they must agree"
                    )
        for name, number in numbers.items():
            if name not in NUMBERS:
                raise TypeError(f"unknown number {name!r}: allowed are {', '.join(NUMBERS)}")
            check_entry_number(name, name, number)

        entries = [
            _entry(item, f"rows[{b}][{i}]", len(keys), numbers)
            for b, row in enumerate(rows)
            for i, item in enumerate(row)
        ]
        offsets = [0]
        for row in rows:
            offsets.append(offsets[-1] + len(row))
        lengths = [len(k) for k in keys]
        begins = [sum(lengths[:c]) for c in range(len(lengths))]
        device = first.device
        index = [c for c, _ in entries] + begins + lengths + offsets
        table = torch.tensor([n for _, n in entries], dtype=torch.float32).reshape(-1, COLUMNS)
        heads = list(first.shape[1:])
        return cls(
            key=torch.cat(list(keys)) if keys else first,
            value=torch.cat(list(values)) if keys else first,
            index=torch.tensor(index, dtype=torch.int32, device=device),
            numbers=table.to(device),
            entries=len(entries),
            concepts=len(keys),
            longest=max(lengths, default=0),
            busiest=max([len(row) for row in rows], default=0),
            token_bias=_per_token("token_bias", token_bias, lengths, 0.0, device),
            token_weight=_per_token("token_weight", token_weight, lengths, 1.0, device),
            direction=_per_concept("direction", direction, [len(keys), *heads], device),
            update=_per_concept("update", update, [len(keys), *heads], device),
            offset=_per_concept("offset", offset, [len(keys)], device),
            neutral=None if neutral is None else _neutral(neutral, rows, lengths, device),
        )

    @classmethod
    def uniform(
        cls, keys: Sequence[Tensor], values: Sequence[Tensor], batch: int, **numbers: Any
    ) -> ConceptTokens:
        """Pack concepts that every one of `batch` rows negates, but for the `neutral` one; arguments as for
        `pack`."""
        negated = [c for c in range(len(keys)) if c != numbers.get("neutral")]
        return cls.pack(keys, values, [negated] * batch, **numbers)

    @classmethod
    def from_activations(cls, key: Tensor, value: Tensor, layout: ConceptTokens) -> ConceptTokens:
        """The concepts of `layout` with tokens of this call alone: in joint attention they are a part of it.

        Args:
            key, value: [B, T, H, D], or [T, H, D] for all rows; any strides with D contiguous. The operator
                checks the rest of their shape; nothing is copied or read here.
            layout: made once by `pack`: which tokens a concept owns, which rows negate it, with which
                numbers, biases and directions.

        Raises:
            ValueError: more or fewer tokens than the layout's.
        """
        for name, tensor in (("key", key), ("value", value)):
            if tensor.dim() not in (3, 4) or tensor.shape[-3] != layout.tokens:
                raise ValueError(
                    f"{name} has shape {list(tensor.shape)}: must have the {layout.tokens} tokens of layout"
                )
        return replace(layout, key=key, value=value)

    @property
    def batch(self) -> int:
        """B, the number of batch rows."""
        return self.index.shape[0] - self.entries - 2 * self.concepts - 1

    @property
    def tokens(self) -> int:
        """T, the number of packed tokens."""
        return self.key.shape[-3]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """In the order of `TENSORS`."""
        return (
            self.key, self.value, self.index, self.numbers, self.token_bias, self.token_weight,
            self.direction, self.update, self.offset,
        )  # fmt: skip

    @property
    def capacities(self) -> tuple[int, int, int, int]:
        """In the order of `CAPACITIES`."""
        return self.entries, self.concepts, self.longest, self.busiest

    @property
    def requires_grad(self) -> bool:
        """Whether one of the tensors does."""
        for tensor in self.tensors:  # written out: compilers trace it
            if tensor is not None and tensor.requires_grad:
                return True
        return False

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles have other memory, and maybe another process."""
        return {name: value for name, value in self.__dict__.items() if name != "found"}

    def first_rows(self, batch: int) -> ConceptTokens:
        """The same concepts for the first `batch` rows: views, so in-place changes still show."""
        if not 0 <= batch <= self.batch:
            raise ValueError(f"batch={batch}: these tokens hold {self.batch} rows")
        rows = batch if self.key.dim() == 4 else self.tokens
        index = self.index[: self.index.shape[0] - self.batch + batch]
        neutral = None if self.neutral is None else self.neutral[:batch]
        return replace(self, index=index, key=self.key[:rows], value=self.value[:rows], neutral=neutral)

    def cast(self, dtype: torch.dtype) -> ConceptTokens:
        """Keys and values in `dtype`; numbers stay float32."""
        return replace(self, key=self.key.to(dtype), value=self.value.to(dtype))

    strength, logit_bias, threshold, width, cap, active = map(_number, NUMBERS)


def check_entry_number(where: str, name: str, number: Any) -> None:
    """Raise a ValueError unless `number` may be the number `name` of an entry."""
    check_number(where, number, **_LIMITS.get(name, {}))


def entry_numbers(where: str, given: Mapping[str, Any]) -> list[float]:
    """One row of `ConceptTokens.numbers` from the numbers given; the rest are the rule's."""
    row = [float("nan")] * (COLUMNS - 2) + [0.0, 0.0]
    row[NUMBERS.index("active")] = 1.0
    for name, number in given.items():
        if name not in NUMBERS:
            raise TypeError(f"{where}: unknown key {name!r}: allowed are concept, {', '.join(NUMBERS)}")
        check_entry_number(f"{where}: {name}", name, number)
        row[NUMBERS.index(name)] = float(number)
    return row


def _entry(item: Any, where: str, concepts: int, defaults: Mapping[str, float]) -> tuple[int, list[float]]:
    given = dict(item) if isinstance(item, Mapping) else {"concept": item}
    concept = given.pop("concept", None)
    if isinstance(concept, bool) or not isinstance(concept, int):
        raise ValueError(f"{where}={item!r}: must be a concept index or a dict with 'concept'")
    if not 0 <= concept < concepts:
        raise ValueError(f"{where} names concept {concept}: there are {concepts} (0 to {concepts - 1})")
    return concept, entry_numbers(where, {**defaults, **given})


def _neutral(
    given: int | Sequence[int | None], rows: Sequence[Row], lengths: list[int], device: torch.device
) -> Tensor:
    each = [given] * len(rows) if isinstance(given, int) else list(given)
    if len(each) != len(rows):
        raise ValueError(f"neutral has {len(each)} rows, rows has {len(rows)}")
    for b, (c, row) in enumerate(zip(each, rows)):
        if c is None and not len(row):
            continue
        if isinstance(c, bool) or not isinstance(c, int) or not 0 <= c < len(lengths) or not lengths[c]:
            raise ValueError(f"neutral of rows[{b}] is {c!r}: must be the index of a concept that has tokens")
    return torch.tensor([-1 if c is None else c for c in each], dtype=torch.int32, device=device)


def _per_token(
    name: str,
    parts: Sequence[Tensor | None] | Tensor | None,
    lengths: list[int],
    fill: float,
    device: torch.device,
) -> Tensor | None:
    if parts is None:
        return None
    if isinstance(parts, Tensor):
        packed = parts
    else:
        if len(parts) != len(lengths):
            raise ValueError(f"{name} has {len(parts)} concepts, keys has {len(lengths)}")
        packed = torch.cat([torch.full((n,), fill) if p is None else p.cpu() for p, n in zip(parts, lengths)])
    if packed.shape != (sum(lengths),):
        raise ValueError(f"{name} has shape {list(packed.shape)}: must be [{sum(lengths)}]")
    masks = (packed == float("-inf")) & (name == "token_bias")
    if not (packed.isfinite() | masks).all():
        raise ValueError(f"{name} holds nan or inf (-inf masks a token in token_bias alone)")
    return packed.to(device=device, dtype=torch.float32).contiguous()


def _per_concept(name: str, parts: Any, shape: list[int], device: torch.device) -> Tensor | None:
    if parts is None:
        return None
    if not isinstance(parts, Tensor):
        parts = torch.stack([torch.as_tensor(p, dtype=torch.float32) for p in parts])
    if list(parts.shape) != shape:
        raise ValueError(f"{name} has shape {list(parts.shape)}: must be {shape}")
    if not parts.isfinite().all():
        raise ValueError(f"{name} holds nan or inf")
    packed: Tensor = parts.to(device=device, dtype=torch.float32).contiguous()
    return packed
