# SPDX-License-Identifier: Apache-2.0
"""What one test chooses for all of diffusers is not what the next one finds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def chosen_backend() -> Iterator[None]:
    """`set_attention_backend` of one model sets that of all others as well."""
    dispatch = pytest.importorskip("diffusers.models.attention_dispatch")
    registry = dispatch._AttentionBackendRegistry
    before = registry._active_backend
    yield
    registry._active_backend = before
