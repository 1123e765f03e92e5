# SPDX-License-Identifier: Apache-2.0
"""UNets of the sizes of real models, with random weights, and one denoising step of them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import fastnegate as fn
from fastnegate.engine.concepts import Concept
from fastnegate.engine.engine import Engine
from fastnegate.integrations.diffusers.install import engine_of
from fastnegate.operator.rule import Rule

from ..operator.cases import DENSE, Concepts

TOKENS, STEPS = 77, 1000


class Model(NamedTuple):
    unet: dict[str, Any]  # configuration of diffusers.UNet2DConditionModel
    encoders: tuple[int, ...]  # widths of the text encoders


_LAST: dict[str, Any] = {"in_channels": 4, "out_channels": 4, "layers_per_block": 2}
MODELS = {
    # 512 x 512
    "sd15": Model(
        {
            **_LAST,
            "sample_size": 64,
            "block_out_channels": (320, 640, 1280, 1280),
            "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
            "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
            "attention_head_dim": 8,  # in this model: the number of heads
            "cross_attention_dim": 768,
        },
        (768,),
    ),
    # 1024 x 1024
    "sdxl": Model(
        {
            **_LAST,
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
            "up_block_types": (*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),  # numbers of heads
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 6 * 256 + 1280,
        },
        (768, 1280),
    ),
}


def small(model: Model) -> Model:
    """The same layers, few and narrow: a processor makes a step of it at once."""
    widths = tuple(64 for _ in model.unet["block_out_channels"])
    changes: dict[str, Any] = {"sample_size": 16, "block_out_channels": widths, "attention_head_dim": 2}
    encoders = tuple(32 for _ in model.encoders)
    changes["cross_attention_dim"] = sum(encoders)
    if len(encoders) > 1:
        changes |= {"transformer_layers_per_block": (1, 1, 2), "addition_time_embed_dim": 8}
        changes["projection_class_embeddings_input_dim"] = 6 * 8 + encoders[1]
    return Model({**model.unet, **changes}, encoders)


def pipeline(model: Model, unet: Any) -> Any:
    """The pipeline that an engine is installed in; its text encoders are small ones of the same width, since
    no step runs them."""
    tokenizer = CLIPTokenizer(
        vocab={"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}, merges=[], model_max_length=TOKENS
    )
    scheduler = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)
    scheduler.set_timesteps(STEPS)
    parts: dict[str, Any] = {"unet": unet, "vae": None, "scheduler": scheduler, "tokenizer": tokenizer}
    parts["text_encoder"] = _text_encoder(CLIPTextModel, model.encoders[0], unet.device)
    if len(model.encoders) == 1:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return diffusers.StableDiffusionPipeline(**parts)
    second = _text_encoder(CLIPTextModelWithProjection, model.encoders[1], unet.device)
    return diffusers.StableDiffusionXLPipeline(**parts, tokenizer_2=tokenizer, text_encoder_2=second)


def _text_encoder(kind: Any, width: int, device: torch.device) -> Any:
    config = CLIPTextConfig(
        vocab_size=3, hidden_size=width, intermediate_size=width, num_hidden_layers=1, projection_dim=width,
        num_attention_heads=width // 64 or 1, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return kind(config).eval().to(device)


def random_unet(model: Model, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Weights that keep signals at their size; torch's own initialization would take much longer."""
    with torch.device("meta"):
        unet = nn.Module.to(diffusers.UNet2DConditionModel(**model.unet), dtype)  # diffusers' own `to` warns
    unet.to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in unet.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
        else:  # of norms, and biases
            parameter.data.fill_(float(name.endswith("weight")))
    return unet


def twin(unet: Any) -> Any:
    """A second model on the same weights, with processors of its own."""
    with torch.device("meta"):
        other = diffusers.UNet2DConditionModel.from_config(unet.config)
    other.load_state_dict(unet.state_dict(), assign=True)
    return other.eval()


def negating(pipe: Any, concepts: Concepts, rule: Rule, batch: int, backend: str = "auto") -> Engine:
    """An engine in the pipeline; each of `batch` rows is a request that negates all concepts, with gates
    that are open wherever the rule has them."""
    bank = fn.ConceptBank.from_prompts(pipe, {"concept 0": "a"})
    for i in range(concepts.count):
        bank.update(f"concept {i}", Concept.from_embeddings(normal(i, concepts.tokens, bank.width)))
    engine = fn.install(pipe, bank, batch, rule=rule, backend=backend)
    engine.set_rows([policy(bank, rule)] * batch)
    return engine


def policy(bank: fn.ConceptBank, rule: Rule) -> fn.Policy:
    """As in the dense cases of the operator: a threshold below every cosine keeps all gates open."""
    return fn.Policy({name: 1.0 for name in bank}, threshold=None if rule.gate == "open" else DENSE)


def step(pipe: Any, unet: Any, batch: int) -> Callable[..., Tensor]:
    """The denoiser at one step after the other, so that an engine sees one long pipeline call; or at that
    step which the call names. All pipelines hand the same prompt tensor to every step. Inputs keep their
    addresses."""
    bare = getattr(unet, "_orig_mod", unet)
    device, dtype, config = bare.device, bare.dtype, bare.config
    size = config.sample_size

    def made(seed: int, *shape: int) -> Tensor:
        return normal(seed, *shape).to(device, dtype)

    latents, prompt = made(0, batch, 4, size, size), made(1, batch, TOKENS, config.cross_attention_dim)
    options: dict[str, Any] = {"encoder_hidden_states": prompt, "return_dict": False}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        options["added_cond_kwargs"] = {
            "text_embeds": made(2, batch, pooled), "time_ids": torch.full((batch, 6), 8.0 * size).to(device),
        }  # fmt: skip
    engine = engine_of(pipe)
    loop = (
        contextlib.nullcontext() if engine is None else engine.loop()
    )  # as a pipeline's own steps are one call
    timesteps, steps = pipe.scheduler.timesteps.tolist(), itertools.count()
    timestep = torch.zeros((), dtype=torch.int64, device=device)

    def call(at: int | None = None) -> Tensor:
        timestep.fill_(timesteps[next(steps) if at is None else at])
        with loop:
            output: Tensor = unet(latents, timestep, **options)[0]
        return output

    return call


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
