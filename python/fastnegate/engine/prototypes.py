# SPDX-License-Identifier: Apache-2.0
"""Prototypes: a few tokens that stand for a phrase in any context.

A text encoder writes the context into every token. So the phrase is encoded in several captions, and what
its tokens have in common, their mean, stands for it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DEFAULT_TEMPLATES = ("{}", "a photo of {}", "a painting of {}", "a picture with {} in it", "{} and a tree")

_SPAN = re.compile(r"^(?P<before>[^\[\]]*)\[(?P<span>[^\[\]]*\{\}[^\[\]]*)\](?P<after>[^\[\]]*)$")


class Caption(NamedTuple):
    """A phrase in a context; `span` holds the phrase, and its tokens are the ones that are averaged."""

    before: str
    span: str
    after: str

    @classmethod
    def of(cls, template: str, member: str) -> Caption:
        """`template` with `member` for its `{}`; square brackets may mark a longer span.

        Raises:
            ValueError: not one `{}`, or brackets that do not mark one span around it.
        """
        if not isinstance(template, str) or template.count("{}") != 1:
            raise ValueError(f"templates: {template!r} must contain {{}} exactly once")
        marked = template if "[" in template or "]" in template else template.replace("{}", "[{}]")
        parts = _SPAN.match(marked)
        if parts is None:
            raise ValueError(f"templates: {template!r} must have one pair of brackets around {{}}")
        return cls(*(part.replace("{}", member) for part in parts.groups()))

    @property
    def text(self) -> str:
        return self.before + self.span + self.after


def prototype(spans: Sequence[Tensor]) -> Tensor:
    """Mean of embeddings [T, C] of the same phrase in several contexts, at the mean length of a token:
    averaging shortens, and concept keys should be as long as the prompt's."""
    stacked = torch.stack(list(spans))
    mean = stacked.mean(0)
    length = stacked.norm(dim=-1).mean()
    rescaled: Tensor = mean * (length / mean.norm(dim=-1, keepdim=True).clamp(min=1e-12))
    return rescaled
