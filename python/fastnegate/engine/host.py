# SPDX-License-Identifier: Apache-2.0
"""`Host`: what the engine asks of whoever owns the text encoder and the denoiser.

The engine knows no pipeline. Where it needs one (encode a phrase, tell whose words a bank holds, find an
installed engine) it asks the integration that knows the pipeline's library, found by the name of the module
that the pipeline's class comes from.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, cast

from torch import Tensor

from .concepts import Concept, Fingerprint, Templates
from .errors import UnsupportedModelError

# Library -> the module that is its `Host`, imported when first asked for.
_HOSTS = {"diffusers": "fastnegate.integrations.diffusers.host"}


class Denoising(Protocol):
    """A pipeline's denoiser as it was trained: what it is given, and what it should have said."""

    @property
    def length(self) -> float:
        """Root mean square of what the text encoder gives, over tokens and channels."""

    @property
    def width(self) -> int:
        """C, channels of a text token."""

    @property
    def identity(self) -> str:
        """Changes with the denoiser's weights, but for small changes of a few."""

    def frozen(self) -> AbstractContextManager[None]:
        """Within it no weight of the denoiser asks for a gradient, and nothing is dropped out."""

    def latents(self, images: Sequence[Any], size: tuple[int, int] | None) -> Tensor:
        """Pictures (PIL) as the denoiser draws them, without noise, [n, ...]; `size`: height and width in
        pixels, by default the pipeline's own. Raises ValueError: a size that the pipeline cannot draw."""

    def around(self, caption: str | None) -> tuple[Tensor, Tensor]:
        """Encoded tokens before and after the `{}` of a caption, [L, C] each, special ones too; None: there
        are none. Raises ValueError: not one `{}`, or a text that cannot be encoded."""

    def loss(self, latents: Tensor, noise: Tensor, when: Tensor, text: Tensor) -> Tensor:
        """The training loss, a scalar that gradients flow from: mean of |target - denoiser(z_t, t, text)|^2.
        Latents and noise are [B, ...], text is [B, L, C], and `when`, uniform in [0, 1), chooses t."""


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

    def check_negative_prompt(self, pipe: Any, text: str) -> None:
        """Raise what `negative_prompt` would, without encoding anything."""

    def neutral(self, pipe: Any, given: str | Sequence[str], templates: Templates | None = None) -> Tensor:
        """Tokens [T, C] that say nothing in particular; `given` as for `ConceptBank.from_prompts`, which says
        more. Raises ValueError: no such kind, or the text encoder has no such tokens."""

    def fingerprint(self, pipe: Any) -> Fingerprint:
        """Identity of the text encoders, also of encoders that were freed or offloaded after it was asked
        for once. Raises UnsupportedModelError where nobody can tell."""

    def denoiser_fingerprint(self, pipe: Any) -> Fingerprint:
        """Identity of the denoisers and of their cross-attention layers, also of weights that were offloaded
        after it was asked for once. Raises UnsupportedModelError where there are no such layers."""

    def contrasts(self, pipe: Any, members: Sequence[str]) -> list[tuple[str, str]]:
        """Pairs of prompts with and without a member, in words that the pipeline reads."""

    def attention_means(
        self,
        pipe: Any,
        prompts: Sequence[str],
        seed: int,
        batch: int,
        on_call: Callable[[], None],
        call: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        """Run the pipeline, and average what each cross-attention layer gives, before its output projection:
        float64 [H, D] by layer; see `ConceptBank.add_directions`."""

    def denoising(self, pipe: Any) -> Denoising:
        """The pipeline's denoiser as it was trained. Raises UnsupportedModelError where that is not known."""

    def likeness(self, pipe: Any, images: Sequence[Any], phrases: Sequence[str]) -> Tensor:
        """100 x the cosines of pictures (PIL) and phrases [images, phrases] by the pipeline's own towers.
        Raises UnsupportedModelError where it has none."""

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
