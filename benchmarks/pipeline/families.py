# SPDX-License-Identifier: Apache-2.0
"""Models that people run, as data: how wide they are, how many tokens they see, and which published form of
negation ours is measured against. Weights are random: no price depends on them.

Another model is another line of `PRICED`, and, where its blocks are new, a function in published.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import nn

from fastnegate.operator.rule import Rule

from . import models, published

Inputs = Callable[[Any, int, int, int], dict[str, Any]]  # of config, image tokens, text tokens, text rows

TwoPasses = Callable[[nn.Module, Rule, int], None]  # of denoiser, rule and text tokens


@dataclass(frozen=True)
class Priced:
    """A model.

    Attributes:
        pipeline, denoiser: classes of diffusers.
        config: of the denoiser, where it is not the class's own.
        few: the changes that leave a block of each kind.
        inputs: what a denoiser call gets, by name.
        tokens: of the image, that few blocks are run with; `all_tokens`: that 1024 x 1024 pixels have.
        text: tokens of a prompt and of a padded concept, `width`: channels of their embeddings.
        two_passes: makes the denoiser negate as published; None where all that is published for it is a
            doubled batch.
        narrow: the changes that make it small, with embeddings of `NARROW` channels.
        words: the rule for concepts of a few words, of the preset of that name; padded ones take `nag`.
    """

    pipeline: str
    denoiser: str
    few: Mapping[str, Any]
    inputs: Inputs
    tokens: int
    all_tokens: int
    text: int
    width: int
    two_passes: TwoPasses | None
    narrow: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)
    words: tuple[str, Mapping[str, Any]] = ("nag", {})

    def model(self, whole: bool, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
        """The denoiser with all blocks, or with few."""
        config = {**self.config, **({} if whole else self.few)}
        torch.manual_seed(0)
        with torch.device(device), torch.no_grad():
            model = getattr(diffusers, self.denoiser)(**config)
            for name, weight in model.named_parameters():
                if name.endswith(LOOKED_AT):
                    weight *= 30  # random models hardly look at their text
        return nn.Module.to(model, dtype).eval()

    def small(self) -> Priced:
        """The same layers, few and narrow: a processor makes a step of it at once."""
        config = {**self.config, **self.few, **self.narrow}
        return dataclasses.replace(self, config=config, width=NARROW, tokens=64, all_tokens=256)


NARROW = 32
LOOKED_AT = ("add_v_proj.weight", ".attn2.to_v.weight", "cap_embedder.1.weight")  # values of text, or text


def _square(tokens: int) -> tuple[int, int]:
    """Height and width, as near to a square as the number of tokens allows."""
    height = next(h for h in range(math.isqrt(tokens), 0, -1) if tokens % h == 0)
    return height, tokens // height


def _of_flux(config: Any, tokens: int, text: int, rows: int) -> dict[str, Any]:
    """What FLUX.1 and FLUX.2 have in common."""
    height, width = _square(tokens)
    grid = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), -1)
    return {
        "hidden_states": models.normal(0, rows, tokens, config.in_channels),
        "encoder_hidden_states": models.normal(1, rows, text, config.joint_attention_dim),
        "timestep": torch.full((rows,), 0.5),
        "img_ids": torch.nn.functional.pad(grid.flatten(0, 1), (1, 0)).float(),
    }


def _flux(config: Any, tokens: int, text: int, rows: int) -> dict[str, Any]:
    return {
        **_of_flux(config, tokens, text, rows),
        "pooled_projections": models.normal(2, rows, config.pooled_projection_dim),
        "guidance": torch.full((rows,), 3.5),
        "txt_ids": torch.zeros(text, 3),
    }


def _flux2(config: Any, tokens: int, text: int, rows: int) -> dict[str, Any]:
    ids = torch.zeros(text, 4)
    ids[:, 3] = torch.arange(text)
    given = _of_flux(config, tokens, text, rows)
    return {**given, "img_ids": torch.nn.functional.pad(given["img_ids"], (0, 1)), "txt_ids": ids}


def _qwen(config: Any, tokens: int, text: int, rows: int) -> dict[str, Any]:
    return {
        "hidden_states": models.normal(0, rows, tokens, config.in_channels),
        "encoder_hidden_states": models.normal(1, rows, text, config.joint_attention_dim),
        "timestep": torch.full((rows,), 0.5),
        "img_shapes": [[(1, *_square(tokens))]] * rows,
    }


def _zimage(config: Any, tokens: int, text: int, rows: int) -> dict[str, Any]:
    height, width = _square(tokens)
    return {
        "x": [*models.normal(0, rows, config.in_channels, 1, 2 * height, 2 * width)],
        "cap_feats": [*models.normal(1, rows, text, config.cap_feat_dim)],
        "t": torch.full((rows,), 0.5),
    }


def _sd3(config: Any, tokens: int, text: int, rows: int) -> dict[str, Any]:
    height, width = _square(tokens)
    return {
        "hidden_states": models.normal(0, rows, config.in_channels, 2 * height, 2 * width),
        "encoder_hidden_states": models.normal(1, rows, text, config.joint_attention_dim),
        "pooled_projections": models.normal(2, rows, config.pooled_projection_dim),
        "timestep": torch.full((rows,), 500),
    }


def _wan(config: Any, tokens: int, text: int, rows: int) -> dict[str, Any]:
    """Videos of 81 frames where the tokens are those of one; else a picture."""
    frames = WAN_FRAMES if tokens % (WAN_FRAMES * 1024) == 0 else 1
    height, width = _square(tokens // frames)
    return {
        "hidden_states": models.normal(0, rows, config.in_channels, frames, 2 * height, 2 * width),
        "encoder_hidden_states": models.normal(1, rows, text, config.text_dim),
        "timestep": torch.full((rows,), 500),
    }


WAN_FRAMES = 21  # of latents, for 81 frames of video


def _ltx2(config: Any, tokens: int, text: int, rows: int) -> dict[str, Any]:
    frames = LTX2_FRAMES if tokens % LTX2_FRAMES == 0 else 1
    height, width = _square(tokens // frames)
    return {
        "hidden_states": models.normal(0, rows, tokens, config.in_channels),
        "audio_hidden_states": models.normal(1, rows, LTX2_SOUND, config.audio_in_channels),
        "encoder_hidden_states": models.normal(2, rows, text, config.cross_attention_dim),
        "audio_encoder_hidden_states": models.normal(3, rows, text, config.audio_cross_attention_dim),
        "timestep": torch.full((rows,), 500.0),
        "sigma": torch.full((rows,), 500.0),
        **{"num_frames": frames, "height": height, "width": width, "audio_num_frames": LTX2_SOUND},
    }


LTX2_FRAMES, LTX2_SOUND = 16, 126  # of latents, for 121 frames of video, and of their sound


def _unet(config: Any, tokens: int, text: int, rows: int) -> dict[str, Any]:
    height, width = _square(tokens)
    return {
        "sample": models.normal(0, rows, config.in_channels, height, width),
        "encoder_hidden_states": models.normal(1, rows, text, config.cross_attention_dim),
        "timestep": torch.full((rows,), 500),
    }


def _sdxl(config: Any, tokens: int, text: int, rows: int) -> dict[str, Any]:
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    added = {"text_embeds": models.normal(2, rows, pooled), "time_ids": torch.full((rows, 6), 1024.0)}
    return {**_unet(config, tokens, text, rows), "added_cond_kwargs": added}


_FEW: dict[str, Any] = {"layers_per_block": 1}
_NARROW: dict[str, Any] = {"attention_head_dim": 2, "cross_attention_dim": NARROW}
PRICED = {
    "flux1": Priced(
        "FluxPipeline", "FluxTransformer2DModel", {"num_layers": 1, "num_single_layers": 1}, _flux,
        tokens=256, all_tokens=4096, text=512, width=4096, two_passes=published.flux,
        narrow={
            "in_channels": 4, "attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 4, 8),
            "joint_attention_dim": NARROW, "pooled_projection_dim": 32,
        },
        config={"guidance_embeds": True}, words=("nag", {"shared": "outside"}),
    ),
    "flux2-klein": Priced(  # 4B
        "Flux2KleinPipeline", "Flux2Transformer2DModel", {"num_layers": 1, "num_single_layers": 1}, _flux2,
        tokens=256, all_tokens=4096, text=512, width=7680, two_passes=None,
        narrow={
            "in_channels": 16, "attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4,) * 4,
            "joint_attention_dim": NARROW, "timestep_guidance_channels": 8,
        },
        config={
            "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        words=("nag", {"shared": "outside"}),
    ),
    "qwen": Priced(
        "QwenImagePipeline", "QwenImageTransformer2DModel", {"num_layers": 1}, _qwen,
        tokens=256, all_tokens=4096, text=128, width=3584, two_passes=None,
        narrow={
            "in_channels": 16, "out_channels": 4, "attention_head_dim": 16, "num_attention_heads": 2,
            "joint_attention_dim": NARROW, "axes_dims_rope": (4, 4, 8),
        },
        words=("nag", {"shared": "outside"}),
    ),
    "zimage": Priced(
        "ZImagePipeline", "ZImageTransformer2DModel", {"n_layers": 1, "n_refiner_layers": 1}, _zimage,
        tokens=256, all_tokens=4096, text=128, width=2560, two_passes=None,
        narrow={
            "in_channels": 4, "dim": 32, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": NARROW,
            "axes_dims": [4, 4, 8], "axes_lens": [256, 64, 64],
        },
        words=("nag", {"shared": "outside"}),
    ),
    "sd35": Priced(  # large
        "StableDiffusion3Pipeline", "SD3Transformer2DModel", {"num_layers": 2}, _sd3,  # the last has no text
        tokens=256, all_tokens=4096, text=333, width=4096, two_passes=published.sd3,
        narrow={
            "attention_head_dim": 16, "num_attention_heads": 2, "caption_projection_dim": 32,
            "joint_attention_dim": NARROW, "pooled_projection_dim": 32,
        },
        config={
            "num_layers": 38, "attention_head_dim": 64, "num_attention_heads": 38, "qk_norm": "rms_norm",
            "caption_projection_dim": 2432, "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
        },
        words=("nag", {"shared": "outside"}),
    ),
    "wan": Priced(  # 2.1, 14B
        "WanPipeline", "WanTransformer3DModel", {"num_layers": 1}, _wan,
        tokens=256, all_tokens=WAN_FRAMES * 4096, text=512, width=4096, two_passes=published.cross,
        narrow={
            "attention_head_dim": 16, "num_attention_heads": 2, "freq_dim": 16, "ffn_dim": 32,
            "text_dim": NARROW,
        },
    ),
    "ltx2": Priced(  # 2.3
        "LTX2Pipeline", "LTX2VideoTransformer3DModel", {"num_layers": 1}, _ltx2,
        tokens=256, all_tokens=LTX2_FRAMES * 1024, text=1024, width=4096, two_passes=published.cross,
        narrow={
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 4, "attention_head_dim": 8,
            "cross_attention_dim": NARROW, "audio_in_channels": 8, "audio_out_channels": 8,
            "audio_num_attention_heads": 4, "audio_attention_head_dim": 4, "audio_cross_attention_dim": 16,
        },
        config={
            "use_prompt_embeddings": False, "perturbed_attn": True, "rope_double_precision": False,
            "gated_attn": True, "cross_attn_mod": True, "audio_gated_attn": True,
            "audio_cross_attn_mod": True,
        },
    ),
    "sdxl": Priced(
        "StableDiffusionXLPipeline", "UNet2DConditionModel",
        _FEW | {"transformer_layers_per_block": 1}, _sdxl,
        tokens=1024, all_tokens=128 * 128, text=77, width=2048, two_passes=published.cross,
        narrow=_NARROW | {
            "block_out_channels": (32, 64, 64), "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 32,
        },
        config=models.MODELS["sdxl"].unet, words=("protore", {}),
    ),
    "sd15": Priced(
        "StableDiffusionPipeline", "UNet2DConditionModel", _FEW, _unet,
        tokens=1024, all_tokens=128 * 128, text=77, width=768, two_passes=published.cross,
        narrow=_NARROW | {"block_out_channels": (32, 64, 64, 64)},
        config=models.MODELS["sd15"].unet, words=("protore", {}),
    ),
}  # fmt: skip
