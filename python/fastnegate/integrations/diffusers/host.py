# SPDX-License-Identifier: Apache-2.0
"""The `Host` of diffusers' pipelines (`fastnegate.engine.host`)."""

from __future__ import annotations

from .encode import encode, negative_prompt
from .identity import fingerprint
from .install import engine_of

__all__ = ["encode", "engine_of", "fingerprint", "negative_prompt"]
