# SPDX-License-Identifier: Apache-2.0
"""Tiny random pipelines of every supported family, built offline, and how the tests call them."""

from __future__ import annotations

import string
from collections.abc import Iterator, Sequence
from typing import Any

import diffusers
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from fastnegate.integrations.diffusers.contract import cross_attention_layers, denoiser

SUPPORTED = ("sd15", "sd2", "sdxl", "pixart_alpha", "pixart_sigma")
UNET = SUPPORTED[:3]
WORDS = ("a", "and", "cat", "dog", "in", "it", "of", "painting", "photo", "picture", "red", "with")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For modules that import this: tiny operators spend more time on waking threads than on work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(kind: str, seed: int = 0) -> Any:
    """A pipeline with random weights: one of SUPPORTED, or `sd3` or `flux`, which are not."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipe = _BUILDERS[kind]()
    for attn in attentions(pipe).values() if kind in SUPPORTED else ():
        with torch.no_grad():
            attn.to_v.weight *= 4  # random models hardly look at their text
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(
    pipe: Any,
    prompts: str | Sequence[str] = "a cat",
    *,
    seeds: Sequence[int] | None = None,
    steps: int = 3,
    guidance: float = 5.0,
    images: int = 1,
    **options: Any,
) -> Tensor:
    """Latents [images, 4, 16, 16]; `seeds` are those of the initial noise, one per image."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    seeds = range(len(prompts) * images) if seeds is None else seeds
    options = {"negative_prompt": ["red"] * len(prompts), **options}  # SDXL's default is zeros
    if "PixArt" in type(pipe).__name__:
        options = {"use_resolution_binning": False, "clean_caption": False, **options}
    return pipe(
        prompts,
        num_inference_steps=steps,
        guidance_scale=guidance,
        num_images_per_prompt=images,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        height=32,
        width=32,
        output_type="latent",
        **options,
    ).images


def row_by_row(pipe: Any) -> None:
    """Compute linear layers and convolutions for each batch row on its own: what torch makes of a row may
    else depend on the rows beside it, and tests of row isolation want to see what we make of it."""
    for part in pipe.components.values():
        for module in part.modules() if isinstance(part, nn.Module) else ():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.forward = lambda x, forward=module.forward: torch.cat([forward(r) for r in x.split(1)])


def attentions(pipe: Any) -> dict[str, Any]:
    """The text cross-attention modules of a supported pipeline."""
    return cross_attention_layers(denoiser(pipe))


def clip_tokenizer() -> CLIPTokenizer:
    """Each of WORDS is one token, other words are spelt."""
    bytes_ = sorted(ByteLevel.alphabet())
    tokens = ["<|startoftext|>", "<|pad|>", "<|endoftext|>", *bytes_, *(b + "</w>" for b in bytes_)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            last = word[end - 1] + ("</w>" if end == len(word) else "")
            merge = (word[: end - 1], last)
            merges += [] if merge in merges else [merge]
            tokens.append("".join(merge))
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(dict.fromkeys(tokens))},
        merges=merges,
        unk_token="<|endoftext|>",
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=77,
    )


def t5_tokenizer() -> T5Tokenizer:
    """Each of WORDS is one token, other words are spelt; unlike with CLIP, case matters."""
    letters = string.ascii_letters + string.digits + string.punctuation
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab += [(letter, -6.0) for letter in letters] + [("▁" + word, -1.0) for word in WORDS]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def _clip(model: Any = CLIPTextModel, width: int = 32, layers: int = 2) -> Any:
    config = CLIPTextConfig(
        bos_token_id=0, eos_token_id=2, pad_token_id=1, hidden_size=width, intermediate_size=64,
        num_attention_heads=4, num_hidden_layers=layers, vocab_size=1000, projection_dim=32,
    )  # fmt: skip
    return model(config).eval()


def _t5() -> T5EncoderModel:
    config = T5Config(
        d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, vocab_size=200, dropout_rate=0.0,
        is_encoder_decoder=False,
    )  # fmt: skip
    return T5EncoderModel(config).eval()


def _vae(channels: Sequence[int] = (4, 8), latent: int = 4, **options: Any) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=channels, down_block_types=["DownEncoderBlock2D"] * len(channels),
        up_block_types=["UpDecoderBlock2D"] * len(channels), norm_num_groups=1, latent_channels=latent,
        **options,
    ).eval()  # fmt: skip


def _unet(text_width: int = 32, **options: Any) -> Any:
    options = {"attention_head_dim": (1, 2), "layers_per_block": 1, **options}  # the number of heads, in fact
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), sample_size=16, norm_num_groups=2, cross_attention_dim=text_width,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **options,
    ).eval()  # fmt: skip


def _ddim(**options: Any) -> Any:
    return diffusers.DDIMScheduler(clip_sample=False, steps_offset=1, **options)


def _sd(text_width: int = 32, prediction_type: str = "epsilon", **options: Any) -> Any:
    return diffusers.StableDiffusionPipeline(
        unet=_unet(text_width, **options), vae=_vae(), text_encoder=_clip(width=text_width),
        tokenizer=clip_tokenizer(), scheduler=_ddim(prediction_type=prediction_type), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _sdxl() -> Any:
    unet = _unet(
        64, layers_per_block=2, transformer_layers_per_block=(1, 2), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        unet=unet, vae=_vae(), text_encoder=_clip(), tokenizer=clip_tokenizer(),
        text_encoder_2=_clip(CLIPTextModelWithProjection), tokenizer_2=clip_tokenizer(),
        scheduler=diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
    )  # fmt: skip


def _pixart(pipeline: Any) -> Any:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3,
        caption_channels=32, in_channels=4, cross_attention_dim=24, out_channels=8,
    )  # fmt: skip
    return pipeline(
        transformer=transformer.eval(), vae=_vae(), scheduler=_ddim(), text_encoder=_t5(),
        tokenizer=t5_tokenizer(),
    )  # fmt: skip


def _sd3() -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32,
        pooled_projection_dim=64, out_channels=4,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, vae=_vae(shift_factor=0.0), text_encoder_3=_t5(), tokenizer_3=t5_tokenizer(),
        text_encoder=_clip(CLIPTextModelWithProjection), tokenizer=clip_tokenizer(),
        text_encoder_2=_clip(CLIPTextModelWithProjection), tokenizer_2=clip_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def _flux() -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return diffusers.FluxPipeline(
        transformer=transformer, vae=_vae((4,), 1, shift_factor=0.0), text_encoder=_clip(),
        tokenizer=clip_tokenizer(), text_encoder_2=_t5(), tokenizer_2=t5_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


_BUILDERS = {
    "sd15": _sd,
    "sd2": lambda: _sd(1024, "v_prediction", use_linear_projection=True),  # the width tells it from 1.5
    "sdxl": _sdxl,
    "pixart_alpha": lambda: _pixart(diffusers.PixArtAlphaPipeline),
    "pixart_sigma": lambda: _pixart(diffusers.PixArtSigmaPipeline),
    "sd3": _sd3,
    "flux": _flux,
}
