# SPDX-License-Identifier: Apache-2.0
"""`Settings`: what the operator of a server says about negation, in `custom_pipeline_args`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Settings:
    """Entries of `custom_pipeline_args`, besides `pipeline_class`.

    Args:
        bank: path of the bank file, as the workers see it.
        rule: name of a preset; by default the family's.
        max_images: the most images of one request.
        backend: as for `negated_attention`.
        max_tokens: as for `fastnegate.install`.

    Raises:
        ValueError: another type or range.
    """

    bank: str
    rule: str | None = None
    max_images: int = 10  # as many as an HTTP request of vLLM-Omni may ask for
    backend: str = "auto"
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.bank, str) or not self.bank:
            raise ValueError(f"bank={self.bank!r}: must be the path of a bank file")
        if isinstance(self.max_images, bool) or not isinstance(self.max_images, int) or self.max_images < 1:
            raise ValueError(f"max_images={self.max_images!r}: must be an int >= 1")

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> Settings:
        """Raises ValueError: no bank is named, or an entry that there is not: one that was misspelt would be
        as if it had not been said."""
        entries = {name: value for name, value in (given or {}).items() if name != "pipeline_class"}
        known = [field.name for field in fields(cls)]
        unknown = [name for name in entries if name not in known]
        if unknown:
            raise ValueError(f"custom_pipeline_args has {unknown[0]!r}: allowed are {', '.join(known)}")
        if "bank" not in entries:
            raise ValueError("custom_pipeline_args has no 'bank': must be the path of a bank file")
        return cls(**entries)
