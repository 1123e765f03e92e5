# SPDX-License-Identifier: Apache-2.0
# diffusers and transformers are typed only in part:
# mypy: disable-error-code="no-untyped-call"
"""The hosts as they are trained: diffusers' own model classes at a size that two cores can train."""

from __future__ import annotations

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
from fastnegate.testbed.parts import PictureFlowMatchScheduler, WordTokenizer

_GRID = 8  # tokens, or latent pixels, from edge to edge
_WIDTH = 96  # of a text token
_LEAST_NOISE = 0.05  # a velocity is a difference over the time; less noise than this does not count for more


class CrossHost(nn.Module):
    """A small Stable Diffusion: a CLIP text encoder, and a UNet with cross-attention.

    The UNet predicts the clean picture under a cosine schedule whose last step holds no picture at all.
    """

    outer = ("conv_in", "conv_out", "time_embedding")
    """Parts of the names of weights that meet the outside: their rows are not alike, as Muon wants them."""

    def __init__(
        self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: WordTokenizer
    ) -> None:
        super().__init__()
        self.unet, self.text_encoder, self.tokenizer = unet, text_encoder, tokenizer
        self.words = tokenizer.model_max_length

    @classmethod
    def untrained(cls, block: int, channels: tuple[int, ...], tokenizer: WordTokenizer) -> CrossHost:
        """`block` pixels squared are a latent pixel; `channels` of the UNet's levels, all with
        cross-attention."""
        depth = 3 * block**2
        unet = UNet2DConditionModel(
            sample_size=_GRID, in_channels=depth, out_channels=depth, block_out_channels=channels,
            layers_per_block=1, down_block_types=("CrossAttnDownBlock2D",) * len(channels),
            up_block_types=("CrossAttnUpBlock2D",) * len(channels), norm_num_groups=8,
            attention_head_dim=tuple(width // 32 for width in channels), cross_attention_dim=_WIDTH,
        )  # fmt: skip
        return cls(unet, _clip(tokenizer, width=_WIDTH, layers=3), tokenizer)

    def latents(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, S, S] in [-1, 1] -> latents [B, 3 block², grid, grid]."""
        return F.pixel_unshuffle(pictures, pictures.shape[-1] // self.unet.config.sample_size)

    def mixed(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """`cos(πt/2) latents + sin(πt/2) noise`, t [B] in [0, 1]."""
        signal, spoil = _shares(t)
        return signal * latents + spoil * noise

    def predicted(self, mixed: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """The picture, as latents, of mixed latents and token ids [B, words]."""
        words = self.text_encoder(tokens).last_hidden_state
        picture: Tensor = self.unet(mixed, 999 * t, words, return_dict=False)[0]
        return picture

    def loss(self, latents: Tensor, noise: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """Mean squared error of the picture; the weight is the signal-to-noise ratio plus one, at most 5:
        little noise must not drown the rest."""
        signal, spoil = _shares(t)
        picture = self.predicted(self.mixed(latents, noise, t), t, tokens)
        weight = ((signal / spoil) ** 2 + 1).clamp(max=5)
        return (weight * (picture - latents) ** 2).mean()

    def pipeline(self) -> StableDiffusionPipeline:
        """The host as users call it, sharing this module's weights."""
        parts = {"text_encoder": self.text_encoder.eval(), "tokenizer": self.tokenizer}
        return cross_pipeline(self.unet.eval(), **parts)


class JointHost(nn.Module):
    """A small FLUX: T5 and CLIP text encoders, rectified flow, no autoencoder.

    The latents are pixels: half of a block by the lossless "autoencoder", the other half by the packing of
    FLUX's own pipeline.

    Args:
        picture: the transformer predicts the clean picture, not the velocity.
    """

    outer = ("x_embedder", "context_embedder", "time_text_embed", "transformer.proj_out")

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        text_encoder: CLIPTextModel,
        text_encoder_2: T5EncoderModel,
        tokenizer: WordTokenizer,
        picture: bool = False,
    ) -> None:
        super().__init__()
        self.picture = picture
        self.transformer, self.text_encoder, self.text_encoder_2 = transformer, text_encoder, text_encoder_2
        self.tokenizer, self.words = tokenizer, tokenizer.model_max_length
        where = torch.device("cpu"), torch.float32
        ids = FluxPipeline._prepare_latent_image_ids(1, _GRID, _GRID, *where)
        self.register_buffer("image_ids", ids, persistent=False)
        self.register_buffer("text_ids", torch.zeros(self.words, 3), persistent=False)

    @classmethod
    def untrained(
        cls,
        block: int,
        heads: int,
        head_dim: int,
        double: int,
        single: int,
        tokenizer: WordTokenizer,
        picture: bool = False,
    ) -> JointHost:
        """`block` pixels squared are a token; its width is heads times head_dim; blocks of two streams and
        of one; `picture`: as for the class."""
        t5 = T5Config(
            **_ids(tokenizer), d_model=_WIDTH, d_kv=24, d_ff=256, num_layers=3, num_heads=4,
            dropout_rate=0.0, feed_forward_proj="gated-gelu",
        )  # fmt: skip
        pair = head_dim // 6 * 2  # rotary parts: number, row, column; each even
        transformer = FluxTransformer2DModel(
            patch_size=1, in_channels=3 * block**2, num_layers=double, num_single_layers=single,
            attention_head_dim=head_dim, num_attention_heads=heads, joint_attention_dim=_WIDTH,
            pooled_projection_dim=64, guidance_embeds=False, axes_dims_rope=(head_dim - 2 * pair, pair, pair),
        )  # fmt: skip
        return cls(transformer, _clip(tokenizer, width=64, layers=2), T5EncoderModel(t5), tokenizer, picture)

    def latents(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, S, S] in [-1, 1] -> packed latents [B, grid², 3 block²]."""
        latents = F.pixel_unshuffle(pictures, pictures.shape[-1] // (2 * _GRID))
        packed: Tensor = FluxPipeline._pack_latents(latents, *latents.shape[:1], *latents.shape[1:])
        return packed

    def mixed(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """`(1 - t) latents + t noise`, t [B] in [0, 1]."""
        return torch.lerp(latents, noise, t[:, None, None])

    def predicted(self, mixed: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """The velocity `noise - latents` of mixed latents and token ids [B, words]."""
        said: Tensor = self.transformer(
            hidden_states=mixed,
            timestep=t,
            encoder_hidden_states=self.text_encoder_2(tokens)[0],
            pooled_projections=self.text_encoder(tokens).pooler_output,
            img_ids=self.image_ids,
            txt_ids=self.text_ids,
            return_dict=False,
        )[0]
        return (mixed - said) / t.clamp(min=_LEAST_NOISE)[:, None, None] if self.picture else said

    def loss(self, latents: Tensor, noise: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """Mean squared error of the velocity."""
        return F.mse_loss(self.predicted(self.mixed(latents, noise, t), t, tokens), noise - latents)

    def pipeline(self) -> FluxPipeline:
        """The host as users call it, sharing this module's weights."""
        return joint_pipeline(
            self.transformer.eval(),
            self.picture,
            text_encoder=self.text_encoder.eval(),
            tokenizer=self.tokenizer,
            text_encoder_2=self.text_encoder_2.eval(),
            tokenizer_2=self.tokenizer,
        )


Host = CrossHost | JointHost


def of(pipe: Any) -> Host:
    """The host that a pipeline of the testbed is, sharing its weights."""
    if hasattr(pipe, "unet"):
        return CrossHost(pipe.unet, pipe.text_encoder, pipe.tokenizer)
    picture = isinstance(pipe.scheduler, PictureFlowMatchScheduler)
    return JointHost(pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.tokenizer, picture)


def _shares(t: Tensor) -> tuple[Tensor, Tensor]:
    """How much of a latent is picture, and how much noise, at time t."""
    angle = t[:, None, None, None] * torch.pi / 2
    return torch.cos(angle), torch.sin(angle)


def _ids(tokenizer: WordTokenizer) -> dict[str, int]:
    return {"vocab_size": len(tokenizer), "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 1}


def _clip(tokenizer: WordTokenizer, width: int, layers: int) -> CLIPTextModel:
    config = CLIPTextConfig(
        **_ids(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=tokenizer.model_max_length,
    )  # fmt: skip
    return CLIPTextModel(config)
