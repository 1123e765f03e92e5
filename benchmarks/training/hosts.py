# SPDX-License-Identifier: Apache-2.0
# diffusers and transformers are typed only in part:
# mypy: disable-error-code="no-untyped-call"
"""The hosts before training: diffusers' own model classes at a size that two cores can train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from fastnegate.testbed.model import cross_pipeline, joint_pipeline


def _ids(vocabulary: int) -> dict[str, int]:
    return {"vocab_size": vocabulary, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 1}


def _clip(vocabulary: int, words: int, width: int, layers: int) -> CLIPTextModel:
    config = CLIPTextConfig(
        **_ids(vocabulary), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=words,
    )  # fmt: skip
    return CLIPTextModel(config)


@dataclass(frozen=True)
class Size:
    """Of a joint host: `block` pixels squared are a token, on `grid` x `grid` tokens; width = heads times
    head_dim; double and single stream blocks."""

    block: int
    grid: int
    heads: int
    head_dim: int
    double: int
    single: int

    @property
    def channels(self) -> int:
        return 3 * self.block**2


class CrossHost(nn.Module):
    """A small Stable Diffusion: CLIP text encoder from scratch, a UNet with cross-attention.

    The UNet predicts the clean picture under a cosine schedule whose last step holds no picture at all.

    Args:
        block: pixels squared that are a latent "pixel".
        grid: latents are [3 block², grid, grid].
        channels: of the UNet's levels; every level has cross-attention.
        tokenizer: its `model_max_length` is how many tokens the text encoder reads.
    """

    outer = ("conv_in", "conv_out", "time_embedding")

    def __init__(self, block: int, grid: int, channels: tuple[int, ...], tokenizer: Any) -> None:
        super().__init__()
        self.block, self.tokenizer, self.words = block, tokenizer, tokenizer.model_max_length
        self.text_encoder = _clip(len(tokenizer), self.words, width=96, layers=3)
        depth = 3 * block**2
        self.unet = UNet2DConditionModel(
            sample_size=grid, in_channels=depth, out_channels=depth, block_out_channels=channels,
            layers_per_block=1, down_block_types=("CrossAttnDownBlock2D",) * len(channels),
            up_block_types=("CrossAttnUpBlock2D",) * len(channels), norm_num_groups=8,
            attention_head_dim=tuple(width // 32 for width in channels), cross_attention_dim=96,
        )  # fmt: skip

    def latents(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, S, S] in [-1, 1] -> latents [B, 3 block², grid, grid]."""
        return F.pixel_unshuffle(pictures, self.block)

    def loss(self, latents: Tensor, noise: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """Mean squared error of the picture at `cos(πt/2) latents + sin(πt/2) noise`, t [B]; the weight is
        the signal-to-noise ratio plus one, at most 5: little noise must not drown the rest."""
        signal, spoil = (
            x[:, None, None, None] for x in (torch.cos(t * torch.pi / 2), torch.sin(t * torch.pi / 2))
        )
        mixed = signal * latents + spoil * noise
        words = self.text_encoder(tokens).last_hidden_state
        picture = self.unet(mixed, 999 * t, words, return_dict=False)[0]
        weight = ((signal / spoil) ** 2 + 1).clamp(max=5)
        return (weight * (picture - latents) ** 2).mean()

    def pipeline(self) -> StableDiffusionPipeline:
        """The host as users call it, sharing this module's weights."""
        parts = {"text_encoder": self.text_encoder.eval(), "tokenizer": self.tokenizer}
        return cross_pipeline(self.unet.eval(), **parts)


class JointHost(nn.Module):
    """A small FLUX: T5 and CLIP text encoders from scratch, rectified flow, no autoencoder.

    The latents are pixels: half of `block` by the lossless "autoencoder", the other half by the packing of
    FLUX's own pipeline.
    """

    outer = ("x_embedder", "context_embedder", "time_text_embed", "transformer.proj_out")
    """Parts of the names of weights that meet the outside: their rows are not alike, as Muon wants them."""

    def __init__(self, size: Size, tokenizer: Any) -> None:
        super().__init__()
        self.size, self.tokenizer, self.words = size, tokenizer, tokenizer.model_max_length
        self.text_encoder = _clip(len(tokenizer), self.words, width=64, layers=2)
        self.text_encoder_2 = T5EncoderModel(
            T5Config(
                **_ids(len(tokenizer)), d_model=96, d_kv=24, d_ff=256, num_layers=3, num_heads=4,
                dropout_rate=0.0, feed_forward_proj="gated-gelu",
            )
        )  # fmt: skip
        pair = size.head_dim // 6 * 2  # rotary parts: number, row, column; each even
        self.transformer = FluxTransformer2DModel(
            patch_size=1, in_channels=size.channels, num_layers=size.double, num_single_layers=size.single,
            attention_head_dim=size.head_dim, num_attention_heads=size.heads, joint_attention_dim=96,
            pooled_projection_dim=64, guidance_embeds=False,
            axes_dims_rope=(size.head_dim - 2 * pair, pair, pair),
        )  # fmt: skip
        ids = FluxPipeline._prepare_latent_image_ids(
            1, size.grid, size.grid, torch.device("cpu"), torch.float32
        )
        self.register_buffer("image_ids", ids, persistent=False)
        self.register_buffer("text_ids", torch.zeros(self.words, 3), persistent=False)

    def latents(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, S, S] in [-1, 1] -> packed latents [B, grid², channels]."""
        latents = F.pixel_unshuffle(pictures, self.size.block // 2)
        packed: Tensor = FluxPipeline._pack_latents(latents, *latents.shape[:1], *latents.shape[1:])
        return packed

    def loss(self, latents: Tensor, noise: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """Mean squared error of the velocity `noise - latents` at `(1 - t) latents + t noise`, t [B]."""
        mixed = torch.lerp(latents, noise, t[:, None, None])
        velocity = self.transformer(
            hidden_states=mixed,
            timestep=t,
            encoder_hidden_states=self.text_encoder_2(tokens)[0],
            pooled_projections=self.text_encoder(tokens).pooler_output,
            img_ids=self.image_ids,
            txt_ids=self.text_ids,
            return_dict=False,
        )[0]
        return F.mse_loss(velocity, noise - latents)

    def pipeline(self) -> FluxPipeline:
        """The host as users call it, sharing this module's weights."""
        return joint_pipeline(
            self.transformer.eval(), text_encoder=self.text_encoder.eval(), tokenizer=self.tokenizer,
            text_encoder_2=self.text_encoder_2.eval(), tokenizer_2=self.tokenizer,
        )  # fmt: skip
