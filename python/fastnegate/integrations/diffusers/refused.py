# SPDX-License-Identifier: Apache-2.0
"""Pipelines that people ask for and that are not supported, and what stands in the way."""

from __future__ import annotations

# By how the names of their classes begin; the longest that fits counts.
REFUSED = {
    "Chroma": "its mask enters the softmax as a bias of 0 and 1, which concepts would need as well",
    "Krea2": "text passes a fusion of its own before it meets the image",
    "HunyuanVideo": "a refiner's mean over all text modulates it, and its mask counts tokens",
    "HunyuanImage": "two texts of different encoders, of which one comes from what is written in the prompt",
    "HunyuanDiT": "two texts of different lengths in one attention, with positions for the image alone",
    "Kandinsky5": "its attention has other parts than those of other models",
    "Kandinsky6": "its attention has other parts than those of other models",
    "QwenImage21": "text is causal and cached, so that a concept would be a cache of its own",
    "QwenImageLayered": "layers of an image have positions of their own",
    "QwenImageControlNet": "the ControlNet attends to the same text, which is not negated there",
    "PRX": "text is only attended to, as one sequence with the image",
    "NucleusMoE": "text is only attended to, as one sequence with the image, and cached",
    "HiDream": "fresh text enters every block",
    "Mochi": "its attention works sample by sample on the tokens that are not masked",
    "BriaFibo": "a layer of the text encoder enters every block",
    "Ideogram4": "the unconditional rows have a model of their own",
    "MiniMaxH3": "video, sound and text are packed by an index",
    "Flux3": "text, image and pictures to go by have blocks of their own before they meet",
    "Flux2KleinKV": "pictures to go by are cached from step to step",
    "FluxControl": "not tested: a picture joins the channels, or a second model attends to the same text",
    "ZImageOmni": "pictures to go by come between text and image",
    "ZImageControlNet": "the ControlNet attends to the same text, which is not negated there",
    "StableDiffusion3ControlNet": "the ControlNet attends to the same text, which is not negated there",
    "WanVACE": "blocks of a second branch attend to the same text",
    "WanAnimate": "other blocks, which are not tested",
    "LTXCondition": "other calls of the denoiser, which are not tested",
    "SanaSprint": "its guidance is embedded, and it is not tested",
}


def reason(name: str) -> str | None:
    """Why a pipeline class of that name is refused, if anybody has looked."""
    fitting = [begin for begin in REFUSED if name.startswith(begin)]
    return REFUSED[max(fitting, key=len)] if fitting else None
