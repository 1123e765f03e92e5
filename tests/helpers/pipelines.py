# SPDX-License-Identifier: Apache-2.0
"""Tiny random pipelines of every supported family, built offline, and how the tests call them."""

from __future__ import annotations

import inspect
import string
import types
from collections.abc import Iterator, Sequence
from typing import Any

import diffusers
import pytest
import torch
from diffusers.pipelines.wan import pipeline_wan_i2v
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from fastnegate.integrations.diffusers.contract import cross_attention_layers, denoiser, denoisers

SUPPORTED = ("sd15", "sd2", "sdxl", "pixart_alpha", "pixart_sigma")
UNET = SUPPORTED[:3]
# Those whose layers are not diffusers' `Attention` with its usual processor.
FAMILIES = ("wan", "wan22", "wan_i2v", "ltx", "sana")
# Further pipelines around the same denoisers.
OTHERS = ("sd15_controlnet", "sdxl_controlnet", "lcm", "sdxl_refiner", "ltx_i2v")
IMAGE_TOKENS = 5  # before the text, where a video begins with an image
WORDS = ("a", "and", "cat", "dog", "in", "it", "of", "painting", "photo", "picture", "red", "with")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For modules that import this: tiny operators spend more time on waking threads than on work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(kind: str, seed: int = 0) -> Any:
    """A pipeline with random weights: one of SUPPORTED, FAMILIES, OTHERS, `flux`, or `sd3`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipe = _BUILDERS[kind]()
    for attn in attentions(pipe).values() if kind in SUPPORTED + FAMILIES + OTHERS else ():
        with torch.no_grad():
            attn.to_v.weight *= 4  # random models hardly look at their text
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(
    pipe: Any,
    prompts: str | Sequence[str] | None = "a cat",
    *,
    seeds: Sequence[int] | None = None,
    steps: int = 3,
    guidance: float = 5.0,
    images: int = 1,
    **options: Any,
) -> Tensor:
    """Latents, one per image; `seeds` are those of the initial noise. Prompts may be embeddings in `options`
    instead: then seeds tell how many."""
    if prompts is not None:
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    seeds = range(len(prompts or ()) * images) if seeds is None else seeds
    if "LatentConsistency" not in type(pipe).__name__:
        options = {"negative_prompt": ["red"] * len(prompts or ()), **options}  # SDXL's default is zeros
    kind = next((kind for name, kind in _CALLS.items() if name in type(pipe).__name__), {})
    of_video = "num_frames" in kind
    made = pipe(
        prompt=prompts,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
        **{"num_videos_per_prompt" if of_video else "num_images_per_prompt": images},
        **{"height": 32, "width": 32, **kind, **options},
    )
    return made.frames if of_video else made.images


def row_by_row(pipe: Any) -> None:
    """Compute linear layers and convolutions for each batch row on its own: what torch makes of a row may
    else depend on the rows beside it, and tests of row isolation want to see what we make of it."""
    for part in pipe.components.values():
        for module in part.modules() if isinstance(part, nn.Module) else ():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.forward = lambda x, forward=module.forward: torch.cat([forward(r) for r in x.split(1)])


def attentions(pipe: Any) -> dict[str, Any]:
    """The text cross-attention modules of a supported pipeline."""
    models = denoisers(pipe)
    return {
        name if model is denoiser(pipe) else f"{attribute}.{name}": attn
        for attribute, model in models.items()
        for name, attn in cross_attention_layers(model).items()
    }


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


def _around(pipe: Any, pipeline: Any, **components: Any) -> Any:
    """Another pipeline around the same parts."""
    parts = {**pipe.components, **components}
    if "safety_checker" in parts:
        parts["requires_safety_checker"] = False
    taken = inspect.signature(pipeline.__init__).parameters
    return pipeline(**{name: part for name, part in parts.items() if name in taken})


def _controlled(pipe: Any, pipeline: Any) -> Any:
    net = diffusers.ControlNetModel.from_unet(
        pipe.unet, conditioning_channels=3, conditioning_embedding_out_channels=(8, 8)
    )
    for block in net.controlnet_down_blocks:
        nn.init.normal_(block.weight, std=0.1)  # else it does nothing yet
    return _around(pipe, pipeline, controlnet=net.eval())


def _lcm() -> Any:
    pipe, scheduler = _sd(time_cond_proj_dim=8), diffusers.LCMScheduler()
    return _around(pipe, diffusers.LatentConsistencyModelPipeline, scheduler=scheduler)


def _refiner() -> Any:
    """SDXL with its second text encoder alone, and a score where the first has sizes."""
    unet = _unet(
        32, transformer_layers_per_block=(1, 2), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=5 * 8 + 32,
    )  # fmt: skip
    return diffusers.StableDiffusionXLImg2ImgPipeline(
        unet=unet, vae=_vae(), text_encoder=None, tokenizer=None, tokenizer_2=clip_tokenizer(),
        text_encoder_2=_clip(CLIPTextModelWithProjection), requires_aesthetics_score=True,
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


def _wan_transformer(**options: Any) -> Any:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, text_dim=32, freq_dim=16, ffn_dim=32, num_layers=2,
        rope_max_seq_len=32, **{"in_channels": 16, "out_channels": 16, **options},
    ).eval()  # fmt: skip


def _wan(pipeline: Any = diffusers.WanPipeline, seconds: bool = False, **options: Any) -> Any:
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    given = {"image_encoder": None, "image_processor": None} if pipeline is not diffusers.WanPipeline else {}
    return pipeline(
        transformer=_wan_transformer(**options), vae=vae.eval(), text_encoder=_t5(), tokenizer=t5_tokenizer(),
        transformer_2=_wan_transformer(**options) if seconds else None,
        boundary_ratio=0.875 if seconds else None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0), **given,
    )  # fmt: skip


def _wan_i2v() -> Any:
    pipeline_wan_i2v.ftfy = types.SimpleNamespace(fix_text=str)  # it cannot do without that package
    pipe = _wan(diffusers.WanImageToVideoPipeline, in_channels=36, image_dim=8, added_kv_proj_dim=32)
    pipe.encode_image = lambda _image, _device: torch.linspace(-1, 1, IMAGE_TOKENS * 8).view(1, -1, 8)
    return pipe


def _ltx() -> Any:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32,
        num_layers=2, caption_channels=32,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
    )  # fmt: skip
    return diffusers.LTXPipeline(
        transformer=transformer.eval(), vae=vae.eval(), text_encoder=_t5(), tokenizer=t5_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def gemma_tokenizer() -> GemmaTokenizer:
    """Letters, and each of WORDS is one token; a text begins with a special token, and none ends it."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.printable.strip()]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        for begin in ("▁" + word, word):
            for end in range(2, len(begin) + 1):
                merge = (begin[: end - 1], begin[end - 1])
                merges += [] if merge in merges else [merge]
                tokens.append("".join(merge))
    return GemmaTokenizer(vocab={t: i for i, t in enumerate(dict.fromkeys(tokens))}, merges=merges)


def _sana() -> Any:
    config = Gemma2Config(
        head_dim=8, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=1, vocab_size=300, query_pre_attn_scalar=8,
    )  # fmt: skip
    vae = diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        encoder_block_types=("ResBlock", "ResBlock"), decoder_block_types=("ResBlock", "ResBlock"),
        encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
    )  # fmt: skip
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=32,
        sample_size=16, qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    return diffusers.SanaPipeline(
        transformer=transformer.eval(), vae=vae.eval(), text_encoder=Gemma2Model(config).eval(),
        tokenizer=gemma_tokenizer(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
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


# What calls of pipelines are given besides, by a part of their names.
_CALLS: dict[str, dict[str, Any]] = {
    "PixArt": {"use_resolution_binning": False, "clean_caption": False},
    "ControlNet": {"image": torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32)},
    "XLImg2Img": {"image": torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32), "strength": 1.0},
    "Sana": {"use_resolution_binning": False, "complex_human_instruction": None},
    "WanImage": {
        "num_frames": 5,
        "image": torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32),
    },
    "Wan": {"num_frames": 5},
    "LTXImage": {"num_frames": 9, "image": torch.linspace(0, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)},
    "LTX": {"num_frames": 9},
}
_BUILDERS = {
    "sd15_controlnet": lambda: _controlled(_sd(), diffusers.StableDiffusionControlNetPipeline),
    "sdxl_controlnet": lambda: _controlled(_sdxl(), diffusers.StableDiffusionXLControlNetPipeline),
    "lcm": lambda: _around(
        _sd(time_cond_proj_dim=8),
        diffusers.LatentConsistencyModelPipeline,
        scheduler=diffusers.LCMScheduler(),
    ),
    "sdxl_refiner": _refiner,
    "wan": _wan,
    "wan22": lambda: _wan(seconds=True),
    "wan_i2v": _wan_i2v,
    "ltx": _ltx,
    "ltx_i2v": lambda: _around(_ltx(), diffusers.LTXImageToVideoPipeline),
    "sana": _sana,
    "sd15": _sd,
    "sd2": lambda: _sd(1024, "v_prediction", use_linear_projection=True),  # the width tells it from 1.5
    "sdxl": _sdxl,
    "pixart_alpha": lambda: _pixart(diffusers.PixArtAlphaPipeline),
    "pixart_sigma": lambda: _pixart(diffusers.PixArtSigmaPipeline),
    "sd3": _sd3,
    "flux": _flux,
}
