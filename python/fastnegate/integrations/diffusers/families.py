# SPDX-License-Identifier: Apache-2.0
"""What is known of each pipeline class, as data: where its denoisers and text are, and which variables of a
call of it tell steps and rows. What is not in the table is refused.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from diffusers.pipelines.wan.pipeline_wan import prompt_clean

from .joint.families import JointFamily
from .joint.flux import FLUX, FLUX2
from .joint.qwen import QWEN
from .joint.sd3 import SD3
from .joint.zimage import MULTIPLE, ZIMAGE

_EMBEDS = ("prompt_embeds", "negative_prompt_embeds")
_UNGUIDED = {"do_classifier_free_guidance": False}


@dataclass(frozen=True)
class Family:
    """One pipeline class.

    Attributes:
        denoisers: attributes of the pipeline that hold models, which share its steps; they may be None.
        encoders: (tokenizer, text encoder) attributes, in the order of their use. They speak of the same
            tokens, unless
        tail: the tokens of the last one, which a pipeline may do without, follow those of the others.
        constants: which published constants presets take (`Rule.preset(family=...)`).
        method: the preset that is used where none is asked for.
        masked_padding: whether the model masks padding tokens (else it attends to them).
        projection: modules of the denoiser between text encoder and attention, in the order of their calls.
        encoding: arguments of the pipeline's `encode_prompt` besides texts and device.
        connectors: a module of the pipeline that makes of an encoding one text for video and one for sound:
            concepts have the channels of both.
        cleaned: what the pipeline makes of a text before it tokenizes it.
        framed: a text with what the pipeline puts around it (a chat template, say), of pipeline and text.
        dropped: how many of the first tokens are left out once they are encoded, of a pipeline.
        multiple: texts are padded to a multiple of so many tokens, which the model does with tokens of zeros.
        encoder: the pipeline class that encodes texts as this one does, if it is another.
        clock: what the model is told at a timestep of the scheduler.
        guided: name of what says whether there are unconditional rows: a local variable of the pipeline's
            call, or else an attribute of the pipeline; None: there are none. Rows are [unconditional,
            conditional] halves (or the other way round, `conditional_first`), unless
        texts: unconditional rows get a call of their own: local variables with the text of the conditional
            and of the unconditional call (with a guider: of the state of its loop).
        prompts, timesteps, index: local variables of its call: how many prompts, the timesteps that it runs,
            and which of them is at hand.
        callbacks: local variables of its call that may hold the user's code, which runs between steps.
        further: arguments of the denoiser that are true in further calls of it at a step, which have
            conditional rows alone.
        variant: a word of the pipeline's config, and the family that it is where that is set.
        rides: whether concepts ride behind the prompt, through a model that attends to text by itself.
        left: whether the padding of a text comes before it.
        at_once: how many texts are encoded at once.
        joint: how concepts board a model whose image and text attend to each other in one softmax.
        guider: whether it is made of blocks. Its loop calls the denoiser once for each kind of rows that a
            guider wants; the other names of variables are then not used.
    """

    denoisers: tuple[str, ...]
    encoders: tuple[tuple[str, str], ...]
    constants: Callable[[Any], str]
    method: str = "protore"
    tail: bool = False
    masked_padding: bool = False
    projection: tuple[str, ...] = ()
    encoding: Mapping[str, Any] = field(default_factory=lambda: {"num_images_per_prompt": 1, **_UNGUIDED})
    connectors: str | None = None
    cleaned: Callable[[str], str] = str
    framed: Callable[[Any, str], str] | None = None
    dropped: Callable[[Any], int] = lambda _pipe: 0
    multiple: int = 1
    encoder: str | None = None
    clock: Callable[[float], float] = float
    guided: str | None = "do_classifier_free_guidance"
    conditional_first: bool = False
    texts: tuple[str, str] | None = None
    prompts: str = "batch_size"
    timesteps: str = "timesteps"
    index: str = "i"
    callbacks: tuple[str, ...] = ("callback_on_step_end", "callback")
    further: tuple[str, ...] = ()
    variant: tuple[str, Family] | None = None
    rides: bool = False
    left: Callable[[Any], bool] = lambda pipe: False
    at_once: int = 32
    joint: JointFamily | None = None
    guider: bool = False


def _of_a_thousand(timestep: float) -> float:
    return timestep / 1000


def _chat(pipe: Any, text: str, **options: Any) -> str:
    """A text as what a user says."""
    said = [{"role": "user", "content": text}]
    options = {"tokenize": False, "add_generation_prompt": True, **options}
    framed: str = pipe.tokenizer.apply_chat_template(said, **options)
    return framed


def _instructed(pipe: Any, text: str) -> str:
    """A text as what a user says after the system."""
    (said,) = format_input([text], pipe.system_message)
    framed: str = pipe.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=False)
    return framed


def _pads_left(pipe: Any) -> bool:
    return bool(getattr(pipe.tokenizer, "tokenizer", pipe.tokenizer).padding_side == "left")


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
    "nag",
    projection=("condition_embedder.text_embedder",),
    # Zeros up to the length that the models were trained with: all tokens are attended to.
    encoding={"max_sequence_length": 512, **_UNGUIDED},
    cleaned=prompt_clean,
    texts=_EMBEDS,
)
_LTX = Family(
    ("transformer",),
    (("tokenizer", "text_encoder"),),
    lambda pipe: "wan",  # nothing is published for it: those of another video model
    "nag",
    masked_padding=True,
    projection=("caption_projection",),
    encoding=_UNGUIDED,
)
_LTX2 = Family(
    ("transformer",),
    (("tokenizer", "text_encoder"), ("tokenizer", "connectors")),
    lambda pipe: "wan",
    "nag",
    masked_padding=True,
    encoding=_UNGUIDED,
    connectors="connectors",
    further=("spatio_temporal_guidance_blocks", "isolate_modalities"),
    left=lambda pipe: pipe.connectors.video_connector.learnable_registers is None,  # else they follow it
    rides=True,
    at_once=4,  # of each the outputs of all layers of the text encoder
)
_KOLORS = Family(
    ("unet",),
    (("tokenizer", "text_encoder"),),
    lambda pipe: "sdxl",  # its UNet is SDXL's
    projection=("encoder_hid_proj",),
    left=lambda pipe: True,
)
_SANA = Family(
    ("transformer",),
    (("tokenizer", "text_encoder"),),
    lambda pipe: "sana",
    "nag",
    masked_padding=True,
    projection=("caption_projection", "caption_norm"),
)
_FLUX = Family(
    ("transformer",),
    (("tokenizer_2", "text_encoder_2"),),  # the other one makes a vector that no attention sees
    lambda pipe: "flux",
    "nag",
    encoding={"prompt_2": None, "num_images_per_prompt": 1},
    guided="do_true_cfg",
    texts=_EMBEDS,
    clock=_of_a_thousand,
    joint=FLUX,
)
_FLUX2_KLEIN = Family(
    ("transformer",),
    (("tokenizer", "text_encoder"),),
    lambda pipe: "flux",  # nothing is published for it: those of its forerunner
    "nag",
    encoding={"num_images_per_prompt": 1},
    framed=functools.partial(_chat, enable_thinking=False),
    left=_pads_left,
    texts=_EMBEDS,
    clock=_of_a_thousand,
    joint=FLUX2,
)
_QWEN = Family(
    ("transformer",),
    (("tokenizer", "text_encoder"),),
    lambda pipe: "flux",  # as above
    "nag",
    masked_padding=True,
    encoding={"num_images_per_prompt": 1},
    framed=lambda pipe, text: pipe.prompt_template_encode.format(text),
    dropped=lambda pipe: pipe.prompt_template_encode_start_idx,
    guided="do_true_cfg",
    texts=_EMBEDS,
    clock=_of_a_thousand,
    joint=QWEN,
)
_ZIMAGE = Family(
    ("transformer",),
    (("tokenizer", "text_encoder"),),
    lambda pipe: "zimage",
    "nag",
    masked_padding=True,
    encoding=_UNGUIDED,
    framed=functools.partial(_chat, enable_thinking=True),
    multiple=MULTIPLE,
    clock=lambda t: (1000 - t) / 1000,
    guided="apply_cfg",
    conditional_first=True,
    joint=ZIMAGE,
)
_SD3 = Family(
    ("transformer",),
    (
        ("tokenizer", "text_encoder"),
        ("tokenizer_2", "text_encoder_2"),
        ("tokenizer_3", "text_encoder_3"),
    ),
    lambda pipe: "sd35",
    "nag",
    tail=True,
    encoding={"prompt_2": None, "prompt_3": None, "num_images_per_prompt": 1, **_UNGUIDED},
    further=("skip_layers",),
    joint=SD3,
)


def _without_guidance(entry: Family) -> Family:
    return dataclasses.replace(entry, guided=None, texts=None)


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
        _SDXL, guider=True, encoder="StableDiffusionXLPipeline", texts=_EMBEDS
    ),
    "KolorsPipeline": _KOLORS,
    "KolorsImg2ImgPipeline": _KOLORS,
    "PixArtAlphaPipeline": _PIXART,
    "PixArtSigmaPipeline": _PIXART,
    "SanaPipeline": _SANA,
    "LTXPipeline": _LTX,
    "LTXImageToVideoPipeline": _LTX,
    "LTX2Pipeline": _LTX2,
    "LTX2ImageToVideoPipeline": _LTX2,
    "WanPipeline": _WAN,
    "WanImageToVideoPipeline": _WAN,
    "WanModularPipeline": dataclasses.replace(_WAN, guider=True, encoder="WanPipeline"),
    "Wan22ModularPipeline": dataclasses.replace(_WAN, guider=True, encoder="WanPipeline"),
    "FluxPipeline": _FLUX,
    "FluxImg2ImgPipeline": _FLUX,
    "FluxInpaintPipeline": _FLUX,
    "FluxFillPipeline": _without_guidance(_FLUX),
    "FluxKontextPipeline": _FLUX,
    "Flux2Pipeline": dataclasses.replace(
        _without_guidance(_FLUX2_KLEIN), framed=_instructed, cleaned=lambda text: text.replace("[IMG]", "")
    ),
    "Flux2KleinPipeline": _FLUX2_KLEIN,
    "QwenImagePipeline": _QWEN,
    "QwenImageImg2ImgPipeline": _QWEN,
    "QwenImageInpaintPipeline": _QWEN,
    "QwenImageEditPipeline": dataclasses.replace(_QWEN, encoder="QwenImagePipeline"),
    "QwenImageEditPlusPipeline": dataclasses.replace(_QWEN, encoder="QwenImagePipeline"),
    "QwenImageModularPipeline": dataclasses.replace(_QWEN, guider=True, encoder="QwenImagePipeline"),
    "ZImagePipeline": _ZIMAGE,
    "ZImageImg2ImgPipeline": _ZIMAGE,
    "ZImageInpaintPipeline": _ZIMAGE,
    "ZImageModularPipeline": dataclasses.replace(
        _ZIMAGE, guider=True, encoder="ZImagePipeline", texts=_EMBEDS
    ),
    "StableDiffusion3Pipeline": _SD3,
    "StableDiffusion3Img2ImgPipeline": _SD3,
    "StableDiffusion3InpaintPipeline": _SD3,
}
