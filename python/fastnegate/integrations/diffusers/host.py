# SPDX-License-Identifier: Apache-2.0
"""The `Host` of diffusers' pipelines (`fastnegate.engine.host`)."""

from __future__ import annotations

from .install import engine_of
from .text.encode import encode, negative_prompt
from .text.identity import fingerprint
from .text.neutral import neutral

__all__ = ["encode", "engine_of", "fingerprint", "negative_prompt", "neutral"]
