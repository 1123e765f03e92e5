# SPDX-License-Identifier: Apache-2.0
"""`Host`: what the engine asks of whoever owns the text encoder and the denoiser.

The engine knows no pipeline. Where it needs one (encode a phrase, tell whose words a bank holds, find an
installed engine) it asks the integration that knows the pipeline's library, found by the name of the module
that the pipeline's class comes from.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

from torch import Tensor

from .concepts import Concept, Fingerprint, Templates
from .errors import UnsupportedModelError

# Library -> the module that is its `Host`, imported when first asked for.
_HOSTS = {"diffusers": "fastnegate.integrations.diffusers.host"}


class Host(Protocol):
    """One library of pipelines. Every method raises UnsupportedModelError for a pipeline of the library
    that it does not know."""

    def encode(
        self,
        pipe: Any,
        prompts: Mapping[str, str | Sequence[str]],
        templates: Templates | None = None,
        called: str = "prompts",
    ) -> dict[str, Concept]:
        """Concepts by name, as `ConceptBank.from_prompts`; messages call the mapping `called`."""

    def negative_prompt(self, pipe: Any, text: str) -> Concept:
        """A request's negative prompt as a concept whose members are its comma-separated parts. The same
        text gives the same concept. Raises ValueError: not a text, blank, or too long."""

    def neutral(self, pipe: Any, given: str | Sequence[str], templates: Templates | None = None) -> Tensor:
        """Tokens [T, C] that say nothing in particular; `given` as for `ConceptBank.from_prompts`, which says
        more. Raises ValueError: no such kind, or the text encoder has no such tokens."""

    def fingerprint(self, pipe: Any) -> Fingerprint:
        """Identity of the text encoders, also of encoders that were freed or offloaded after it was asked
        for once. Raises UnsupportedModelError where nobody can tell."""

    def engine_of(self, pipe: Any) -> Any:
        """The `Engine` installed in the pipeline, or None."""


def of(pipe: Any) -> Host:
    """The host of a pipeline.

    Raises:
        UnsupportedModelError: its class comes from no library in the table.
    """
    for base in type(pipe).__mro__:
        module = _HOSTS.get(base.__module__.partition(".")[0])
        if module is not None:
            return cast(Host, importlib.import_module(module))
    raise UnsupportedModelError(
        f"pipe is a {type(pipe).__name__}: supported are pipelines of {', '.join(_HOSTS)}"
    )
