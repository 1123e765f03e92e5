# SPDX-License-Identifier: Apache-2.0
"""What is known of each pipeline class, as data: where its denoisers and text are, and which variables of a
call of it tell steps and rows. What is not in the table is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusers.pipelines.wan.pipeline_wan import prompt_clean

from .joint.families import FLUX, JointFamily


@dataclass(frozen=True)
class Family:
    """One pipeline class.

    Attributes:
        denoisers: attributes of the pipeline that hold models, which share its steps; they may be None.
        encoders: (tokenizer, text encoder) attributes, in the order of their use.
        constants: which published constants presets take (`Rule.preset(family=...)`).
        masked_padding: whether the model masks padding tokens (else it attends to them).
        projection: modules of the denoiser between text encoder and attention, in the order of their calls.
        encoding: arguments of the pipeline's `encode_prompt` besides texts, device and guidance.
        cleaned: what the pipeline makes of a text before it tokenizes it.
        guided: name of what says whether there are unconditional rows: a local variable of the pipeline's
            call, or else an attribute of the pipeline. Rows are [unconditional, conditional] halves, unless
        texts: unconditional rows get a call of their own: local variables with the text of the conditional
            and of the unconditional call (with a guider: of the state of its loop).
        prompts, timesteps, index: local variables of its call: how many prompts, the timesteps that it runs,
            and which of them is at hand.
        callbacks: local variables of its call that may hold the user's code, which runs between steps.
        variant: a word of the pipeline's config, and the family that it is where that is set.
        joint: how concepts board a model whose image and text attend to each other in one softmax.
        whole: of a pipeline made of blocks, the one with the same parts that is not: it encodes texts. Its
            loop calls the denoiser once for each kind of rows that a guider wants; the other names of
            variables are then not used.
    """

    denoisers: tuple[str, ...]
    encoders: tuple[tuple[str, str], ...]
    constants: Callable[[Any], str]
    masked_padding: bool = False
    projection: tuple[str, ...] = ()
    encoding: Mapping[str, Any] = field(default_factory=lambda: {"num_images_per_prompt": 1})
    cleaned: Callable[[str], str] = str
    guided: str = "do_classifier_free_guidance"
    texts: tuple[str, str] | None = None
    prompts: str = "batch_size"
    timesteps: str = "timesteps"
    index: str = "i"
    callbacks: tuple[str, ...] = ("callback_on_step_end", "callback")
    variant: tuple[str, Family] | None = None
    joint: JointFamily | None = None
    whole: str | None = None


_SD = Family(
    ("unet",),
    (("tokenizer", "text_encoder"),),
    # Stable Diffusion 2 is the one with OpenCLIP's width.
    lambda pipe: "sd2" if pipe.unet.config.cross_attention_dim == 1024 else "sd15",
)
_REFINER = Family(("unet",), (("tokenizer_2", "text_encoder_2"),), lambda pipe: "sdxl")
_SDXL = Family(
    ("unet",),
    (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")),
    lambda pipe: "sdxl",
    variant=("requires_aesthetics_score", _REFINER),
)
_PIXART = Family(
    ("transformer",),
    (("tokenizer", "text_encoder"),),
    lambda pipe: "pixart",
    masked_padding=True,
    projection=("caption_projection",),
)
_WAN = Family(
    ("transformer", "transformer_2"),
    (("tokenizer", "text_encoder"),),
    lambda pipe: "wan",
    projection=("condition_embedder.text_embedder",),
    # Zeros up to the length that the models were trained with: all tokens are attended to.
    encoding={"max_sequence_length": 512},
    cleaned=prompt_clean,
    texts=("prompt_embeds", "negative_prompt_embeds"),
)
_LTX = Family(
    ("transformer",),
    (("tokenizer", "text_encoder"),),
    lambda pipe: "wan",  # nothing is published for it: those of another video model
    masked_padding=True,
    projection=("caption_projection",),
    encoding={},
)
_SANA = Family(
    ("transformer",),
    (("tokenizer", "text_encoder"),),
    lambda pipe: "sana",
    masked_padding=True,
    projection=("caption_projection", "caption_norm"),
)
_FLUX = Family(
    ("transformer",),
    (("tokenizer_2", "text_encoder_2"),),  # the other one makes a vector that no attention sees
    lambda pipe: "flux",
    encoding={"prompt_2": None, "num_images_per_prompt": 1},
    guided="do_true_cfg",
    texts=("prompt_embeds", "negative_prompt_embeds"),
    joint=FLUX,
)

TABLE: dict[str, Family] = {
    "StableDiffusionPipeline": _SD,
    "StableDiffusionImg2ImgPipeline": _SD,
    "StableDiffusionInpaintPipeline": _SD,
    "StableDiffusionControlNetPipeline": _SD,
    "StableDiffusionControlNetImg2ImgPipeline": _SD,
    "StableDiffusionControlNetInpaintPipeline": _SD,
    "LatentConsistencyModelPipeline": _SD,
    "LatentConsistencyModelImg2ImgPipeline": _SD,
    "StableDiffusionXLPipeline": _SDXL,
    "StableDiffusionXLImg2ImgPipeline": _SDXL,
    "StableDiffusionXLInpaintPipeline": _SDXL,
    "StableDiffusionXLControlNetPipeline": _SDXL,
    "StableDiffusionXLControlNetImg2ImgPipeline": _SDXL,
    "StableDiffusionXLControlNetInpaintPipeline": _SDXL,
    "StableDiffusionXLModularPipeline": dataclasses.replace(
        _SDXL, whole="StableDiffusionXLPipeline", texts=("prompt_embeds", "negative_prompt_embeds")
    ),
    "PixArtAlphaPipeline": _PIXART,
    "PixArtSigmaPipeline": _PIXART,
    "SanaPipeline": _SANA,
    "LTXPipeline": _LTX,
    "LTXImageToVideoPipeline": _LTX,
    "WanPipeline": _WAN,
    "WanImageToVideoPipeline": _WAN,
    "WanModularPipeline": dataclasses.replace(_WAN, whole="WanPipeline"),
    "Wan22ModularPipeline": dataclasses.replace(_WAN, whole="WanPipeline"),
    "FluxPipeline": _FLUX,
}
