# SPDX-License-Identifier: Apache-2.0
"""Denoisers as they were trained: pictures, noise and text in, the training loss out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from typing import Any

import diffusers
import torch
from torch import Tensor

from ....engine.errors import UnsupportedModelError
from ..contract import bare, denoiser, family
from ..install import engine_of
from ..text.encode import encode_whole, evaluating
from ..text.identity import sample_of


def denoising(pipe: Any) -> Denoising:
    """See `fastnegate.engine.host.Denoising`.

    Raises:
        UnsupportedModelError: the pipeline's class, its scheduler's noise, or what that says the model
            predicts, is not one of those known here.
        ValueError: an engine is installed: what it negates could not be learned.
    """
    family(pipe)
    known = next((made for kind, made in _KNOWN.items() if isinstance(pipe, kind)), None)
    if known is None:
        raise UnsupportedModelError(
            f"{type(pipe).__name__}: its training loss is not known here; concepts are learned with "
            f"{', '.join(kind.__name__ for kind in _KNOWN)}"
        )
    if engine_of(pipe) is not None:
        raise ValueError(
            "pipe has an engine, which may negate what is to be learned: call its remove() first"
        )
    return known(pipe)


class Denoising:
    """Stable Diffusion: latents [n, C, H, W], and what it is given besides text is time."""

    multiple = 1  # of the sides of latents

    def __init__(self, pipe: Any) -> None:
        self._pipe, self._model = pipe, denoiser(pipe)
        self._noised = _noising(pipe.scheduler)
        self._said = encode_whole(pipe, "", "", "caption")

    @property
    def width(self) -> int:
        return self._said.embeddings.shape[-1]

    @property
    def length(self) -> float:
        return float(self._said.embeddings.float().square().mean().sqrt())

    @property
    def identity(self) -> str:
        weights = bare(self._model).parameters()
        sample = torch.cat([sample_of(weight.detach()) for weight in weights])
        return sha256(sample.numpy().tobytes()).hexdigest()[:16]

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        model = bare(self._model)
        asked = [weight for weight in model.parameters() if weight.requires_grad]
        with evaluating([model]):
            try:
                for weight in asked:
                    weight.requires_grad_(False)
                yield
            finally:
                for weight in asked:
                    weight.requires_grad_(True)

    @torch.no_grad()
    def latents(self, images: Sequence[Any], size: tuple[int, int] | None) -> Tensor:
        pipe, vae = self._pipe, self._pipe.vae
        scale = pipe.vae_scale_factor
        side = self._sample_size * scale
        height, width = (side, side) if size is None else size
        if height % (scale * self.multiple) or width % (scale * self.multiple) or min(height, width) < 1:
            raise ValueError(f"size={size!r}: must be multiples of {scale * self.multiple}")
        pixels = pipe.image_processor.preprocess(list(images), height, width)
        where = {"device": pipe._execution_device, "dtype": vae.dtype}
        encoded = torch.cat([vae.encode(one.to(**where)).latent_dist.mode() for one in pixels.split(1)])
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        scaled: Tensor = (encoded - shift) * vae.config.scaling_factor
        return scaled.to(self._said.embeddings.dtype)

    def around(self, caption: str | None) -> tuple[Tensor, Tensor]:
        if caption is None:
            return self._said.embeddings[:0], self._said.embeddings[:0]
        if not isinstance(caption, str) or caption.count("{}") != 1:
            raise ValueError(f"caption={caption!r}: must contain {{}} exactly once")
        before, behind = caption.split("{}")
        self._said = said = encode_whole(self._pipe, before, behind, "caption")
        return said.embeddings[: said.at], said.embeddings[said.at :]

    def loss(self, latents: Tensor, noise: Tensor, when: Tensor, text: Tensor) -> Tensor:
        noisy, target, time = self._noised(latents.float(), noise.float(), when)
        said = self._predicted(noisy.to(latents.dtype), time.to(latents.device), text)
        return torch.nn.functional.mse_loss(said.float(), target)

    @property
    def _sample_size(self) -> int:
        return int(bare(self._model).config.sample_size)

    def _predicted(self, noisy: Tensor, time: Tensor, text: Tensor) -> Tensor:
        said: Tensor = self._model(noisy, time, encoder_hidden_states=text, return_dict=False)[0]
        return said

    def _pooled(self, count: int) -> Tensor:
        """The vector of the caption's whole text, or of an empty one: it is not learned."""
        assert self._said.pooled is not None
        return self._said.pooled.expand(count, -1)


class Xl(Denoising):
    """SDXL is told the sizes of pictures, too: these are whole."""

    def _predicted(self, noisy: Tensor, time: Tensor, text: Tensor) -> Tensor:
        height, width = (side * self._pipe.vae_scale_factor for side in noisy.shape[2:])
        sizes = noisy.new_tensor([height, width, 0, 0, height, width]).expand(len(noisy), -1)
        besides = {"text_embeds": self._pooled(len(noisy)), "time_ids": sizes}
        said: Tensor = self._model(
            noisy, time, encoder_hidden_states=text, added_cond_kwargs=besides, return_dict=False
        )[0]
        return said


class Sd3(Denoising):
    """Its transformer makes tokens of latents itself."""

    @property
    def multiple(self) -> int:  # type: ignore[override]
        return int(bare(self._model).config.patch_size)

    def _predicted(self, noisy: Tensor, time: Tensor, text: Tensor) -> Tensor:
        said: Tensor = self._model(
            hidden_states=noisy,
            timestep=time.to(noisy.dtype),
            encoder_hidden_states=text,
            pooled_projections=self._pooled(len(noisy)),
            return_dict=False,
        )[0]
        return said


class Flux(Denoising):
    """Its tokens are 2 x 2 latents, which the pipeline packs; time is from 0 to 1."""

    multiple = 2

    @property
    def _sample_size(self) -> int:
        return int(self._pipe.default_sample_size)

    def _predicted(self, noisy: Tensor, time: Tensor, text: Tensor) -> Tensor:
        pipe, (count, _, height, width) = self._pipe, noisy.shape
        where = pipe._prepare_latent_image_ids(count, height // 2, width // 2, noisy.device, noisy.dtype)
        # Guidance that was distilled into it exaggerates the text: 1 is none.
        guided = bare(self._model).config.guidance_embeds
        said = self._model(
            hidden_states=pipe._pack_latents(noisy, *noisy.shape),
            timestep=(time / 1000).to(noisy.dtype),
            guidance=noisy.new_ones(count, dtype=torch.float32) if guided else None,
            pooled_projections=self._pooled(count),
            encoder_hidden_states=text,
            txt_ids=noisy.new_zeros(text.shape[1], 3),
            img_ids=where,
            return_dict=False,
        )[0]
        scale = pipe.vae_scale_factor
        unpacked: Tensor = pipe._unpack_latents(said, height * scale, width * scale, scale)
        return unpacked


_KNOWN: dict[type, Callable[[Any], Denoising]] = {
    diffusers.StableDiffusionPipeline: Denoising,
    diffusers.StableDiffusionXLPipeline: Xl,
    diffusers.StableDiffusion3Pipeline: Sd3,
    diffusers.FluxPipeline: Flux,
}

# Latents, noise [B, ...] and uniform numbers [B] -> what the model sees, what it should say, the timestep.
Noised = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def _noising(scheduler: Any) -> Noised:
    """How pictures become noise, and what a model is trained to say of both, by the scheduler's config.

    Raises:
        UnsupportedModelError: it is none of those below.
    """
    config = scheduler.config
    says = config.get("prediction_type")
    if says == "flow_prediction" or "FlowMatch" in type(scheduler).__name__:
        shift = float(config.get("shift") or config.get("flow_shift") or 1.0)
        steps = config.num_train_timesteps

        def flowing(clean: Tensor, noise: Tensor, when: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            sigma = shift * when / (1 + (shift - 1) * when)
            share = _column(sigma, clean)
            target = clean if says == "sample" else noise - clean
            return clean + share * (noise - clean), target, (sigma * steps).float()

        return flowing
    if says not in _TARGETS or not isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor):
        raise UnsupportedModelError(
            f"{type(scheduler).__name__} with prediction_type={says!r}: allowed are {', '.join(_TARGETS)} of "
            "a schedule with alphas_cumprod, and flow matching"
        )
    kept, target = scheduler.alphas_cumprod.double().cpu(), _TARGETS[says]

    def diffusing(clean: Tensor, noise: Tensor, when: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        time = (when * len(kept)).long()
        signal, spread = (_column(share.sqrt(), clean) for share in (kept[time], 1 - kept[time]))
        return signal * clean + spread * noise, target(clean, noise, signal, spread), time

    return diffusing


_TARGETS: dict[Any, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "epsilon": lambda clean, noise, signal, spread: noise,
    "sample": lambda clean, noise, signal, spread: clean,
    "v_prediction": lambda clean, noise, signal, spread: signal * noise - spread * clean,
}


def _column(numbers: Tensor, like: Tensor) -> Tensor:
    """[B] for [B, ...]."""
    return numbers.to(like).view(-1, *[1] * (like.dim() - 1))
