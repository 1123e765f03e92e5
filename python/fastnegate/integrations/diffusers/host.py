# SPDX-License-Identifier: Apache-2.0
"""The `Host` of diffusers' pipelines (`fastnegate.engine.host`)."""

from __future__ import annotations

from .install import engine_of
from .learned.denoising import denoising
from .learned.means import attention_means, contrasts, denoiser_fingerprint
from .learned.tower import likeness
from .text.encode import check_negative_prompt, encode, negative_prompt
from .text.identity import fingerprint
from .text.neutral import neutral

__all__ = [
    "attention_means",
    "check_negative_prompt",
    "contrasts",
    "denoiser_fingerprint",
    "denoising",
    "encode",
    "engine_of",
    "fingerprint",
    "likeness",
    "negative_prompt",
    "neutral",
]
