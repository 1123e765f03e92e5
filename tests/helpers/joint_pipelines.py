# SPDX-License-Identifier: Apache-2.0
"""Tiny random pipelines whose image and text attend to each other, and how the tests call them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import pipelines
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from PIL import Image
from pipelines import WORDS
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)

JOINT = ("flux", "kontext", "flux2", "klein", "klein_edit", "qwen", "qwen_edit", "zimage", "sd3")
_TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
_CHAT = (
    "{% for m in messages %}<|im_start|>user\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
_PICTURE = Image.linear_gradient("L").convert("RGB")


def build(kind: str, seed: int = 0) -> Any:
    """One of JOINT, with random weights, but such that its text matters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipe = _BUILDERS[kind]()
    with torch.no_grad():  # random models hardly look at their text
        for name, weight in pipe.transformer.named_parameters():
            if name.endswith(("add_v_proj.weight", "context_embedder.weight", "cap_embedder.1.weight")):
                weight *= 30
            if "mod" in name or "norm1" in name or "adaLN" in name:
                weight *= 3
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(
    pipe: Any, prompts: str | Sequence[str] = "a cat", seeds: Sequence[int] = (0,), **options: Any
) -> Tensor:
    """Latents, one per prompt."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    size = {"height": 64, "width": 32} if "ZImage" in type(pipe).__name__ else {"height": 24, "width": 16}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    options = {**size, "num_inference_steps": 2, **_CALLS.get(type(pipe).__name__, {}), **options}
    if getattr(pipe, "picture", None) is not None:
        options["image"] = pipe.picture
    made: Tensor = pipe(prompt=prompts, output_type="latent", generator=generators, **options).images
    return made


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Each of WORDS is one token, with and without a space before it; other words are spelt."""
    bytes_ = sorted(ByteLevel.alphabet())
    tokens, merges = list(bytes_), []
    for word in sorted(WORDS, key=len, reverse=True):  # before the words that are in it
        for begin in ("Ġ" + word, word):
            for end in range(2, len(begin) + 1):
                merge = (begin[: end - 1], begin[end - 1])
                merges += [] if merge in merges else [merge]
                tokens.append("".join(merge))
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*special, *tokens]))}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, additional_special_tokens=special[1:])
    tokenizer.chat_template = _CHAT
    return tokenizer


def _qwen3(layers: int, width: int) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, vocab_size=500,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def _qwen_vl() -> Qwen2_5_VLForConditionalGeneration:
    text = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 500,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 4]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()


def _flow() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler()


class Processor:
    """Of pictures and texts, but these tests show it no pictures."""

    def __init__(self) -> None:
        self.tokenizer = qwen_tokenizer()
        self.tokenizer.padding_side = "left"

    def apply_chat_template(self, messages: list[Any], tokenize: bool, **options: Any) -> Any:
        if isinstance(messages[0], list):
            texts = [self.apply_chat_template(said, tokenize=False) for said in messages]
            del options["add_generation_prompt"], options["return_dict"]
            return self.tokenizer(texts, **options)
        return "".join(f"<|im_start|>{m['content'][0]['text']}<|im_end|>" for m in messages)


def _klein(
    pipeline: Any = diffusers.Flux2KleinPipeline, layers: int = 28, tokenizer: Any = None, **options: Any
) -> Any:
    distilled = pipeline is not diffusers.Flux2KleinPipeline
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, timestep_guidance_channels=8, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=distilled,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4,), down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",), norm_num_groups=1, latent_channels=4, layers_per_block=1,
        sample_size=16,
    )  # fmt: skip
    return pipeline(
        transformer=transformer.eval(), vae=vae.eval(), text_encoder=_qwen3(layers, 8),
        tokenizer=tokenizer or qwen_tokenizer(), scheduler=_flow(), **options,
    )  # fmt: skip


def _qwen(pipeline: Any = diffusers.QwenImagePipeline, **components: Any) -> Any:
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    pipe = pipeline(
        transformer=transformer.eval(), vae=vae.eval(), text_encoder=_qwen_vl(), tokenizer=qwen_tokenizer(),
        scheduler=_flow(), **components,
    )  # fmt: skip
    pipe.prompt_template_encode = _TEMPLATE
    pipe.prompt_template_encode_start_idx = len(pipe.tokenizer("<|im_start|>user\n").input_ids)
    return pipe


def _qwen_edit() -> Any:
    """Its text encoder is not shown the picture: that would take a processor of pictures."""
    pipe = _qwen(diffusers.QwenImageEditPipeline, processor=None)
    pipe._get_qwen_prompt_embeds = lambda prompt, image, device: (
        diffusers.QwenImagePipeline._get_qwen_prompt_embeds(pipe, prompt, device)
    )
    pipeline_qwenimage_edit.calculate_dimensions = lambda _area, _ratio: (16, 16, None)  # else 1024 x 1024
    return _with_picture(pipe)


def _zimage() -> Any:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 4, 8], axes_lens=[256, 64, 64],
    )  # fmt: skip
    for pad in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(pad)
    return diffusers.ZImagePipeline(
        transformer=transformer.eval(), vae=pipelines._vae((4, 4), shift_factor=0.0, scaling_factor=1.0),
        text_encoder=_qwen3(3, 16), tokenizer=qwen_tokenizer(), scheduler=_flow(),
    )  # fmt: skip


def _sd3() -> Any:
    """Like 3.5: normalised queries and keys, and blocks in which the image attends to itself besides."""
    pipe = pipelines._sd3()
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=64,
        out_channels=4,
        qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    return pipelines._around(pipe, diffusers.StableDiffusion3Pipeline, transformer=transformer.eval())


def _with_picture(pipe: Any, side: int = 16) -> Any:
    pipe.picture = _PICTURE.resize((32, 64) if "ZImage" in type(pipe).__name__ else (side, side))
    return pipe


_BUILDERS: dict[str, Callable[[], Any]] = {
    "flux": pipelines._flux,
    "sd3": _sd3,
    "kontext": lambda: _with_picture(pipelines._around(pipelines._flux(), diffusers.FluxKontextPipeline)),
    "flux2": lambda: _klein(diffusers.Flux2Pipeline, 31, Processor()),
    "klein": lambda: _klein(is_distilled=True),
    "klein_edit": lambda: _with_picture(_klein(is_distilled=True), 64),
    "qwen": _qwen,
    "qwen_edit": _qwen_edit,
    "zimage": _zimage,
}
_MASK = Image.new("L", (16, 16), 255)


def _from(kind: str, pipeline: Any, **parts: Any) -> Callable[[], Any]:
    """Another pipeline around the same parts, which begins with a picture."""
    return lambda: _with_picture(pipelines._around(_BUILDERS[kind](), pipeline, **parts))


def _fill() -> Any:
    pipe = pipelines._flux()
    with torch.no_grad():
        pipe.transformer.x_embedder = torch.nn.Linear(12, 32)
    return _with_picture(pipelines._around(pipe, diffusers.FluxFillPipeline))


_BUILDERS |= {
    "flux_img2img": _from("flux", diffusers.FluxImg2ImgPipeline),
    "flux_inpaint": _from("flux", diffusers.FluxInpaintPipeline),
    "flux_fill": _fill,
    "qwen_img2img": _from("qwen", diffusers.QwenImageImg2ImgPipeline),
    "zimage_img2img": _from("zimage", diffusers.ZImageImg2ImgPipeline),
    "sd3_img2img": _from("sd3", diffusers.StableDiffusion3Img2ImgPipeline),
}
_CALLS: dict[str, dict[str, Any]] = {
    "FluxPipeline": {"max_sequence_length": 512},
    "FluxKontextPipeline": {"max_sequence_length": 512, "_auto_resize": False, "max_area": 24 * 16},
    "FluxInpaintPipeline": {"mask_image": _MASK, "strength": 1.0},
    "FluxFillPipeline": {"mask_image": _MASK},
    "FluxImg2ImgPipeline": {"strength": 1.0},
    "QwenImageImg2ImgPipeline": {"strength": 1.0},
    "ZImageImg2ImgPipeline": {"strength": 1.0, "guidance_scale": 0.0},
    "StableDiffusion3Img2ImgPipeline": {"strength": 1.0, "guidance_scale": 1.0},
    "ZImagePipeline": {"guidance_scale": 0.0},
    "StableDiffusion3Pipeline": {"guidance_scale": 1.0},
}
