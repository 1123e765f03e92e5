# SPDX-License-Identifier: Apache-2.0
# diffusers and transformers are typed only in part:
# mypy: disable-error-code="no-untyped-call"
"""The testbed's text-to-image models as diffusers pipelines, loaded from package data.

The models are small but real: diffusers' and transformers' own classes, trained from scratch on captioned
pictures by `python -m benchmarks.training`. They work on blocks of pixels rather than on the latents of a
learned autoencoder. A *cross* host is a Stable Diffusion: CLIP text encoder, cross-attention UNet that
predicts the clean picture under a zero-terminal-SNR schedule. A *joint* host is a FLUX: T5 and CLIP, image
and text in one attention, rectified flow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from transformers import CLIPTextModel, T5EncoderModel
from transformers.utils import logging

from .parts import (
    EasyTokenizer,
    HardTokenizer,
    PictureFlowMatchScheduler,
    PixelShuffleVAE,
    ShortFluxPipeline,
    WordTokenizer,
    tokenizer_of,
)

DEFAULT_STEPS = 20
"""Denoising steps for which the models' quality is stated."""

DEFAULT_GUIDANCE = 3.0
"""Classifier-free guidance scale for which the models' quality is stated."""

_WEIGHTS = Path(__file__).parent / "weights"
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Host(NamedTuple):
    """`tokenizer`: that of its world; `joint`: a FLUX, not a Stable Diffusion; `picture`: as `joint_pipeline`
    has it."""

    tokenizer: type[WordTokenizer]
    joint: bool
    picture: bool = False


_HOSTS = {
    "easy": Host(EasyTokenizer, joint=False),
    "easy-joint": Host(EasyTokenizer, joint=True),
    "hard": Host(HardTokenizer, joint=False),
}

HOSTS: tuple[str, ...] = tuple(_HOSTS)
"""Names of the models that `load` knows."""


def load(
    host: str = "easy", *, dtype: torch.dtype = torch.float32
) -> StableDiffusionPipeline | ShortFluxPipeline:
    """One of the testbed's pipelines, on the CPU, from the files in this package: no network, no cache.

    Call it as any pipeline of its class with `num_inference_steps=DEFAULT_STEPS`. Guidance by two passes is
    `guidance_scale=DEFAULT_GUIDANCE` of a cross host, and `true_cfg_scale=DEFAULT_GUIDANCE,
    negative_prompt=""` of a joint one. Prompts are those of the world's `check_prompt`, pictures have its
    `SIZE`. The progress bar is off; `set_progress_bar_config(disable=False)` brings it back.

    Args:
        host: one of `HOSTS`.
        dtype: of the denoiser, the text encoders and the latents.

    Raises:
        ValueError: another host, or `dtype` is not float32, float64, bfloat16 or float16.
    """
    if host not in _HOSTS:
        raise ValueError(f"host={host!r}; allowed: {', '.join(HOSTS)}")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype}; allowed: {', '.join(map(str, _DTYPES))}")
    kind, joint, picture = _HOSTS[host]
    folder, tokenizer = _WEIGHTS / host, tokenizer_of(kind)
    with _without_loading_bar():
        parts: dict[str, Any] = {
            "text_encoder": CLIPTextModel.from_pretrained(
                folder / "text_encoder", local_files_only=True, dtype=dtype
            ),
            "tokenizer": tokenizer,
        }
        if joint:
            parts["text_encoder_2"] = T5EncoderModel.from_pretrained(
                folder / "text_encoder_2", local_files_only=True, dtype=dtype
            )
    # Low-memory loading would warn where accelerate is missing; a few MB need none.
    options: dict[str, Any] = {
        "local_files_only": True,
        "low_cpu_mem_usage": False,
        "torch_dtype": dtype,
    }
    if joint:
        transformer = FluxTransformer2DModel.from_pretrained(folder / "transformer", **options)
        return joint_pipeline(transformer, picture, tokenizer_2=tokenizer, **parts)
    return cross_pipeline(unet=UNet2DConditionModel.from_pretrained(folder / "unet", **options), **parts)


def cross_pipeline(unet: UNet2DConditionModel, **parts: Any) -> StableDiffusionPipeline:
    """A cross host of its UNet, text encoder and tokenizer."""
    channels = unet.config.in_channels
    pipe = StableDiffusionPipeline(
        unet=unet,
        vae=_autoencoder(channels, unet.dtype),
        scheduler=DDIMScheduler(
            beta_schedule="squaredcos_cap_v2", rescale_betas_zero_snr=True, timestep_spacing="trailing",
            prediction_type="sample", clip_sample=False, steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **parts,
    )  # fmt: skip
    _of_pixels(pipe, pipe.vae.block, packed=1)
    return pipe


def joint_pipeline(
    transformer: FluxTransformer2DModel, picture: bool = False, **parts: Any
) -> ShortFluxPipeline:
    """A joint host of its transformer, text encoders and tokenizers; it packs 2 x 2 blocks to a token.
    `picture`: the transformer predicts the clean picture, not the velocity."""
    vae = _autoencoder(transformer.config.in_channels // 4, transformer.dtype)
    scheduler = PictureFlowMatchScheduler() if picture else FlowMatchEulerDiscreteScheduler()
    pipe = ShortFluxPipeline(transformer=transformer, vae=vae, scheduler=scheduler, **parts)
    # FLUX's pipeline knows no size of its own: every host has 8 x 8 tokens.
    pipe.default_sample_size = 16
    _of_pixels(pipe, vae.block, packed=2)
    return pipe


def _autoencoder(channels: int, dtype: torch.dtype) -> PixelShuffleVAE:
    vae: PixelShuffleVAE = PixelShuffleVAE(latent_channels=channels, block_out_channels=(3, channels))
    vae.type(dtype).eval()
    return vae


def _of_pixels(pipe: Any, block: int, packed: int) -> None:
    """Tell a pipeline the side of a block, which it takes for a power of two."""
    pipe.vae_scale_factor = block
    pipe.image_processor.register_to_config(vae_scale_factor=block * packed)
    pipe.set_progress_bar_config(disable=True)


@contextmanager
def _without_loading_bar() -> Iterator[None]:
    """Keep transformers from drawing a progress bar for a load of milliseconds."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
