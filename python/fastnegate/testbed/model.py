# SPDX-License-Identifier: Apache-2.0
# diffusers and transformers are typed only in part:
# mypy: disable-error-code="misc, no-untyped-call, untyped-decorator"
"""The testbed's text-to-image model as a diffusers pipeline, loaded from package data.

The model is small but real: a CLIP text encoder (0.35 M parameters) and a cross-attention UNet
(2.03 M parameters), trained together from scratch on captioned pictures of coloured shapes. It
predicts the clean picture under a zero-terminal-SNR schedule, and works on 2x2 pixel blocks rather
than on the latents of a learned autoencoder: latents [B, 12, 16, 16] are pictures [B, 3, 32, 32].
With `DEFAULT_STEPS` and `DEFAULT_GUIDANCE` it drew both objects right for 64 of 64 captions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from transformers import BatchEncoding, CLIPTextModel, PreTrainedTokenizerFast
from transformers.utils import logging

from .easy.concepts import CONCEPTS, templates
from .easy.world import check_prompt

DEFAULT_STEPS = 20
"""Denoising steps for which the model's quality is stated."""

DEFAULT_GUIDANCE = 3.0
"""Classifier-free guidance scale for which the model's quality is stated."""

_WEIGHTS = Path(__file__).parent / "weights"
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class PixelShuffleVAE(ModelMixin, ConfigMixin):
    """A lossless stand-in for the autoencoder: 2x2 pixel blocks become channels, and back.

    It offers what diffusers' Stable Diffusion pipelines ask of `AutoencoderKL`: `encode`, `decode`
    and the configuration from which they take the scaling factor and the size of the latents.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 12,
        block_out_channels: tuple[int, ...] = (3, 12),
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        # Pipelines ask a module for its device and dtype: without a parameter it has neither.
        self.placement = torch.nn.Parameter(torch.empty(0), requires_grad=False)

    def encode(
        self, x: torch.Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Pictures [B, 3, H, W] in [-1, 1] -> a distribution whose only value is [B, 12, H/2, W/2].

        Any floating dtype, H and W even.
        """
        mean = F.pixel_unshuffle(x, 2)
        parameters = torch.cat([mean, torch.zeros_like(mean)], dim=1)
        distribution = DiagonalGaussianDistribution(parameters, deterministic=True)
        return AutoencoderKLOutput(latent_dist=distribution) if return_dict else (distribution,)

    def decode(
        self, z: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Latents [B, 12, H, W] -> pictures [B, 3, 2H, 2W], same dtype; `generator` is not used."""
        picture = F.pixel_shuffle(z, 2)
        return DecoderOutput(sample=picture) if return_dict else (picture,)


class WordTokenizer(PreTrainedTokenizerFast):
    """The testbed's word-level tokenizer; refuses what the model was not trained to read.

    A call or `tokenize` raises ValueError, as `check_prompt` does, where a general tokenizer would
    silently map an unknown word to a stand-in. (What reaches the vocabulary by another way, such as
    `encode`, also fails there, less politely: it has no stand-in.)
    """

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> BatchEncoding:
        for prompt in [text] if isinstance(text, str) else text or ():
            if isinstance(prompt, str):
                check_prompt(prompt)
        encoding: BatchEncoding = super().__call__(text, *args, **kwargs)
        return encoding

    def tokenize(self, text: str, *args: Any, **kwargs: Any) -> list[str]:
        check_prompt(text)
        words: list[str] = super().tokenize(text, *args, **kwargs)
        return words

    def concept_templates(self, member: str) -> list[str]:
        """Captions for a concept's prototype, as `ConceptBank.from_prompts` asks for them: a model that
        has only ever read scenes of shapes says little about a word that stands alone. None for a
        phrase that is not one of `CONCEPTS`."""
        return templates(member) if (member := member.strip().lower()) in CONCEPTS else []


def load(*, dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """The testbed's pipeline, on the CPU, from the files in this package: no network, no cache.

    Call it as any Stable Diffusion pipeline, with `num_inference_steps=DEFAULT_STEPS` and
    `guidance_scale=DEFAULT_GUIDANCE`; pictures are 32x32, prompts are those of `check_prompt`. The
    progress bar is off; `set_progress_bar_config(disable=False)` brings it back.

    Args:
        dtype: of the UNet, the text encoder and the latents.

    Raises:
        ValueError: `dtype` is not float32, float64, bfloat16 or float16.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype}; allowed: {', '.join(map(str, _DTYPES))}")
    with _without_loading_bar():
        text_encoder = CLIPTextModel.from_pretrained(
            _WEIGHTS / "text_encoder", local_files_only=True, dtype=dtype
        )
        tokenizer = WordTokenizer.from_pretrained(_WEIGHTS / "tokenizer", local_files_only=True)
    # Low-memory loading would warn where accelerate is missing; 8 MB need none.
    unet = UNet2DConditionModel.from_pretrained(
        _WEIGHTS / "unet", local_files_only=True, low_cpu_mem_usage=False, torch_dtype=dtype
    )
    components: dict[str, Any] = {
        "vae": PixelShuffleVAE().type(dtype).eval(),
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "unet": unet,
        "scheduler": DDIMScheduler.from_pretrained(_WEIGHTS / "scheduler", local_files_only=True),
        "safety_checker": None,
        "feature_extractor": None,
    }
    pipeline = StableDiffusionPipeline(**components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


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
