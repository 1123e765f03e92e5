# SPDX-License-Identifier: Apache-2.0
"""Further tiny random pipelines with cross-attention to text: IP-Adapters, LTX-2, Kolors."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import pipelines
import torch
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
)

import fastnegate as fn
from fastnegate import ConceptTokens, Rule

IMAGE_WIDTH = 16  # of an image's embedding
TOKENS = (4, 3)  # of an image, for each of two adapters: they are of different kinds

ONE = {"device": "cpu", "num_images_per_prompt": 1}

Weights = dict[str, dict[str, Tensor]]


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator) * 0.3


def adapter(unet: Any, which: int = 0) -> Weights:
    """Weights of an IP-Adapter as `load_ip_adapter` takes them."""
    generator = torch.Generator().manual_seed(which)
    width, tokens = unet.config.cross_attention_dim, TOKENS[which]
    if which == 0:
        projection = {
            "proj.weight": _randn(generator, width * tokens, IMAGE_WIDTH),
            "proj.bias": _randn(generator, width * tokens),
            "norm.weight": torch.ones(width),
            "norm.bias": torch.zeros(width),
        }
    else:
        projection = _resampler(generator, width, tokens)
    layers = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    return {
        "image_proj": projection,
        "ip_adapter": {
            f"{2 * i + 1}.{part}_ip.weight": _randn(
                generator, *getattr(_layer(unet, name), part).weight.shape
            )
            for i, name in enumerate(layers)
            for part in ("to_k", "to_v")
        },
    }


def _layer(unet: Any, processor: str) -> Any:
    return unet.get_submodule(processor.removesuffix(".processor"))


def _resampler(generator: torch.Generator, width: int, tokens: int) -> dict[str, Tensor]:
    """Of an IP-Adapter Plus, which has attention of its own to the tokens of an image."""
    inner = 64  # one head
    shapes: dict[str, tuple[int, ...]] = {
        "latents": (1, tokens, inner),
        "proj_in.weight": (inner, IMAGE_WIDTH),
        "proj_in.bias": (inner,),
        "proj_out.weight": (width, inner),
        "proj_out.bias": (width,),
        "norm_out.weight": (width,),
        "norm_out.bias": (width,),
    }
    for layer in range(4):
        of_layer = {
            "0.norm1.weight": (inner,),
            "0.norm1.bias": (inner,),
            "0.norm2.weight": (inner,),
            "0.norm2.bias": (inner,),
            "0.to_q.weight": (inner, inner),
            "0.to_kv.weight": (2 * inner, inner),
            "0.to_out.weight": (inner, inner),
            "1.0.weight": (inner,),
            "1.0.bias": (inner,),
            "1.1.weight": (4 * inner, inner),
            "1.3.weight": (inner, 4 * inner),
        }
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    return {name: _randn(generator, *shape) for name, shape in shapes.items()}


def load_adapters(pipe: Any, *which: int) -> None:
    pipe.load_ip_adapter(
        [adapter(pipe.unet, i) for i in which],
        subfolder=[""] * len(which),
        weight_name=[""] * len(which),
        image_encoder_folder=None,
    )


def load_image_adapter(pipe: Any, name: str, **_files: Any) -> None:
    """As `load_ip_adapter` does it with a name on the hub: also what makes embeddings of pictures."""
    assert "/" in name, f"{name} is no model of the hub"
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32,
        patch_size=16, projection_dim=IMAGE_WIDTH,
    )  # fmt: skip
    sizes = {"height": 32, "width": 32}
    pipe.register_modules(
        image_encoder=CLIPVisionModelWithProjection(config).eval(),
        feature_extractor=CLIPImageProcessor(size=sizes, crop_size=sizes),
    )
    pipe.unet._load_ip_adapter_weights([adapter(pipe.unet)])


def images(*which: int, count: int = 1) -> list[Tensor]:
    """Embeddings of `count` images for each adapter, unconditional and conditional."""
    generator = torch.Generator().manual_seed(7)
    shapes = {0: (2, count, IMAGE_WIDTH), 1: (2, count, 5, IMAGE_WIDTH)}
    return [torch.randn(shapes[i], generator=generator) for i in which]


@contextmanager
def literal(pipe: Any, negatives: Sequence[str | None], rule: Rule) -> Iterator[None]:
    """diffusers' own processors, whose first attention of each call, to text, is the reference operator's.
    What they do with images is as it was."""
    layers = pipelines.attentions(pipe).values()
    concepts = [
        None if text is None else pipe.encode_prompt(text, do_classifier_free_guidance=False, **ONE)[0]
        for text in negatives
    ]
    attend = torch.nn.functional.scaled_dot_product_attention
    layer: list[Any] = []

    def of_text(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        if not layer:
            return attend(query, key, value, *args, **options)
        attn = layer.pop()
        known = [c for c in concepts if c is not None]
        keys, values = (
            [to(_projected(pipe.unet, c)[0]).unflatten(1, (attn.heads, -1)) for c in known]
            for to in (attn.to_k, attn.to_v)
        )
        numbers = iter(range(len(known)))
        entries = [[] if c is None else [{"concept": next(numbers)}] for c in concepts]
        first = len(query) - len(concepts)  # unconditional rows, if there are any
        tokens = ConceptTokens.pack(keys, values, [[]] * first + entries)
        return fn.negated_attention(query, key, value, tokens, rule, backend="reference")

    def enter(attn: Any, _args: Any) -> None:
        layer[:] = [attn]

    handles = [attn.register_forward_pre_hook(enter) for attn in layers]
    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", of_text):
        yield
    for handle in handles:
        handle.remove()


def _projected(unet: Any, text: Tensor) -> Tensor:
    """Kolors projects text, with an IP-Adapter by another name."""
    if unet.config.encoder_hid_dim_type == "text_proj":
        return unet.encoder_hid_proj(text)
    moved = getattr(unet, "text_encoder_hid_proj", None)
    return text if moved is None else moved(text)


def ltx2(variant: str = "2.3", image: bool = False, registers: int | None = 16, seed: int = 0) -> Any:
    """LTX-2.0, 2.3 (gates; text modulated by the timestep) or 2.5 (by a table)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _ltx2(variant, image, registers)


def _ltx2(variant: str, image: bool, registers: int | None) -> Any:
    first = variant == "2.0"
    text_width, inner, audio = 32, 32, 16
    config = Gemma3TextConfig(
        head_dim=8, hidden_size=text_width, intermediate_size=64, num_attention_heads=4,
        num_key_value_heads=2, num_hidden_layers=2, vocab_size=300, query_pre_attn_scalar=8,
        sliding_window=32,
    )  # fmt: skip
    by_modality = {} if first else {
        "per_modality_projections": True, "video_hidden_dim": inner, "audio_hidden_dim": audio,
        "video_gated_attn": True, "audio_gated_attn": True, "proj_bias": True,
    }  # fmt: skip
    connectors = LTX2TextConnectors(
        caption_channels=text_width, text_proj_in_factor=3, video_connector_num_attention_heads=4,
        video_connector_attention_head_dim=8, video_connector_num_layers=1,
        video_connector_num_learnable_registers=registers, audio_connector_num_learnable_registers=registers,
        audio_connector_num_attention_heads=4, audio_connector_attention_head_dim=8 if first else 4,
        audio_connector_num_layers=1, rope_double_precision=False, **by_modality,
    )  # fmt: skip
    modulated = {} if first else {
        "use_prompt_embeddings": False, "gated_attn": True, "cross_attn_mod": True, "perturbed_attn": True,
        "audio_gated_attn": True, "audio_cross_attn_mod": True,
        "use_prompt_adaln_single": variant == "2.3",
    }  # fmt: skip
    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, cross_attention_dim=inner,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=4, audio_attention_head_dim=4,
        audio_cross_attention_dim=audio, num_layers=2, caption_channels=text_width,
        rope_double_precision=False, vae_scale_factors=(8, 8, 8), **modulated,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4, block_out_channels=(8,), decoder_block_out_channels=(8,), layers_per_block=(1,),
        down_block_types=("LTX2VideoDownBlock3D",), spatio_temporal_scaling=(True,), patch_size=4,
        decoder_layers_per_block=(1, 1), decoder_spatio_temporal_scaling=(True,), upsample_factor=(1,),
        decoder_inject_noise=(False, False), downsample_type=("spatial",), upsample_type=("spatiotemporal",),
        upsample_residual=(False,), spatial_compression_ratio=8, temporal_compression_ratio=8,
    )  # fmt: skip
    audio_vae = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, in_channels=2, resolution=32, latent_channels=2,
        mel_bins=8,
    )  # fmt: skip
    pipeline = diffusers.LTX2ImageToVideoPipeline if image else diffusers.LTX2Pipeline
    tokenizer = pipelines.gemma_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    pipe = pipeline(
        transformer=transformer.eval(), vae=vae.eval(), audio_vae=audio_vae.eval(),
        text_encoder=Gemma3ForCausalLM(config).eval(), tokenizer=tokenizer, connectors=connectors.eval(),
        vocoder=None, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
    for block in transformer.transformer_blocks:
        with torch.no_grad():
            block.attn2.to_v.weight *= 4  # random models hardly look at their text
    pipe.set_progress_bar_config(disable=True)
    return pipe


LENGTH = 32  # tokens of an encoded text


def film(pipe: Any, prompts: Sequence[str] = ("a cat",), guidance: float = 3.0, **options: Any) -> Any:
    """Latents of videos and of their sound."""
    if "Image" in type(pipe).__name__:
        frames = torch.linspace(0, 1, len(prompts) * 3 * 32 * 32).view(-1, 3, 32, 32)
        options |= {"image": frames, "image_crf": 0}
    made = pipe(
        prompt=list(prompts),
        negative_prompt=["red"] * len(prompts),
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(i) for i in range(len(prompts))],
        output_type="latent",
        max_sequence_length=LENGTH,
        **{
            "height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 2,
            "spatio_temporal_guidance_blocks": [1], **options,
        },
    )  # fmt: skip
    return made.frames, made.audio


def kolors(pipeline: str = "KolorsPipeline", seed: int = 0) -> Any:
    """With ChatGLM's tokenizer, which pads on the left and needs sentencepiece."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _kolors(getattr(diffusers, pipeline))


def _kolors(pipeline: Any) -> Any:
    import sentencepiece
    from diffusers.pipelines.kolors import ChatGLMModel, ChatGLMTokenizer
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig

    vocabulary = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(pipelines.WORDS)] * 9), model_writer=vocabulary, vocab_size=40,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(vocabulary.getvalue())
        tokenizer = ChatGLMTokenizer(file.name)
    config = ChatGLMConfig(
        num_layers=2, padded_vocab_size=64, hidden_size=32, ffn_hidden_size=64, kv_channels=8,
        num_attention_heads=4, seq_length=256, multi_query_attention=True, multi_query_group_num=2,
        add_qkv_bias=True, bias_dropout_fusion=False, original_rope=True,
    )  # fmt: skip
    text_encoder = ChatGLMModel(config).eval()
    for name, weight in text_encoder.named_parameters():
        torch.nn.init.ones_(weight) if "norm" in name else torch.nn.init.normal_(weight, std=0.2)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), sample_size=16, norm_num_groups=2, cross_attention_dim=24,
        layers_per_block=1, attention_head_dim=(1, 2), transformer_layers_per_block=(1, 1),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), use_linear_projection=True,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 32,
        encoder_hid_dim=32, encoder_hid_dim_type="text_proj",
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 8), down_block_types=["DownEncoderBlock2D"] * 2, latent_channels=4,
        up_block_types=["UpDecoderBlock2D"] * 2, norm_num_groups=1,
    )  # fmt: skip
    pipe = pipeline(
        unet=unet.eval(), vae=vae.eval(), text_encoder=text_encoder, tokenizer=tokenizer,
        scheduler=diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
    )  # fmt: skip
    for attn in pipelines.attentions(pipe).values():
        with torch.no_grad():
            attn.to_v.weight *= 4  # random models hardly look at their text
    pipe.set_progress_bar_config(disable=True)
    return pipe
