# SPDX-License-Identifier: Apache-2.0
# diffusers and transformers are typed only in part:
# mypy: disable-error-code="misc, no-untyped-call, untyped-decorator"
"""What the testbed's pipelines have of their own: an autoencoder without loss, a tokenizer of words, and
FLUX's pipeline for short texts.

A pipeline that was saved finds them again, if fastnegate is installed: diffusers looks for the class in this
module, and for the library's class that it derives from among the names that the module imports.
"""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import BatchEncoding, PreTrainedTokenizerFast

from . import easy, hard
from .world import World


class PixelShuffleVAE(ModelMixin, ConfigMixin):
    """A lossless stand-in for the autoencoder: blocks of pixels become channels, and back.

    It offers what diffusers' pipelines ask of `AutoencoderKL`: `encode`, `decode` and the configuration
    from which they take the scaling factor and the size of the latents. A block has
    `latent_channels / 3` pixels, a square number.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 12,
        block_out_channels: tuple[int, ...] = (3, 12),
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ) -> None:
        super().__init__()
        self.block = isqrt(latent_channels // in_channels)
        # Pipelines ask a module for its device and dtype: without a parameter it has neither.
        self.placement = torch.nn.Parameter(torch.empty(0), requires_grad=False)

    def encode(
        self, x: torch.Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Pictures [B, 3, H, W] in [-1, 1] -> a distribution whose only value is [B, 3 f², H/f, W/f] for
        blocks of f x f pixels. Any floating dtype; f divides H and W.
        """
        mean = F.pixel_unshuffle(x, self.block)
        parameters = torch.cat([mean, torch.zeros_like(mean)], dim=1)
        distribution = DiagonalGaussianDistribution(parameters, deterministic=True)
        return AutoencoderKLOutput(latent_dist=distribution) if return_dict else (distribution,)

    def decode(
        self, z: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Latents [B, 3 f², H, W] -> pictures [B, 3, fH, fW], same dtype; `generator` is not used."""
        picture = F.pixel_shuffle(z, self.block)
        return DecoderOutput(sample=picture) if return_dict else (picture,)


class WordTokenizer(PreTrainedTokenizerFast):
    """A word-level tokenizer; refuses what the model was not trained to read.

    A call or `tokenize` raises ValueError, as the world's `check_prompt` does, where a general tokenizer
    would silently map an unknown word to a stand-in. (What reaches the vocabulary by another way, such as
    `encode`, also fails there, less politely: it has no stand-in.)
    """

    world: World

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> BatchEncoding:
        for prompt in [text] if isinstance(text, str) else text or ():
            if isinstance(prompt, str):
                self.world.check_prompt(prompt)
        encoding: BatchEncoding = super().__call__(text, *args, **kwargs)
        return encoding

    def tokenize(self, text: str, *args: Any, **kwargs: Any) -> list[str]:
        self.world.check_prompt(text)
        words: list[str] = super().tokenize(text, *args, **kwargs)
        return words

    def concept_templates(self, member: str) -> list[str]:
        """Captions for a concept's prototype, as `ConceptBank.from_prompts` asks for them: a model that
        has only ever read scenes says little about a word that stands alone. None for a phrase that is not
        one of the world's concepts."""
        return (
            self.world.templates(member) if (member := member.strip().lower()) in self.world.CONCEPTS else []
        )


class EasyTokenizer(WordTokenizer):
    """Of the easy world's words."""

    world = easy


class HardTokenizer(WordTokenizer):
    """Of the hard world's words."""

    world = hard


def tokenizer_of(kind: type[WordTokenizer]) -> WordTokenizer:
    """A tokenizer of its world's words between white space: a text begins with <bos>, ends with <eos> and is
    filled up with <eos>."""
    vocabulary = kind.world.VOCABULARY
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = Lowercase(), WhitespaceSplit()
    special = [(word, vocabulary.index(word)) for word in ("<bos>", "<eos>")]
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A <eos>", special_tokens=special)
    return kind(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>",
        model_max_length=kind.world.MAX_WORDS + 2, clean_up_tokenization_spaces=False,
    )  # fmt: skip


class PictureFlowMatchScheduler(FlowMatchEulerDiscreteScheduler):
    """Euler steps of rectified flow for a model that predicts the clean picture instead of the velocity.

    Pictures have far fewer ways to be than noise, so a narrow model of large patches, which need not carry
    the noise through, learns sooner (Li and He, "Back to Basics: Let Denoising Generative Models Denoise",
    arXiv 2511.13720).
    """

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, prediction_type: str = "sample") -> None:
        super().__init__(num_train_timesteps)

    def step(
        self, model_output: torch.Tensor, timestep: float | torch.Tensor, sample: torch.Tensor, **options: Any
    ) -> Any:
        """As the base class's, with the picture [B, ...] for `model_output`."""
        if self.step_index is None:
            self._init_step_index(timestep)
        velocity = (sample.float() - model_output.float()) / self.sigmas[self.step_index]
        return super().step(velocity.to(model_output.dtype), timestep, sample, **options)


class ShortFluxPipeline(FluxPipeline):
    """FLUX's pipeline for a model whose texts are short: it pads to what the tokenizer allows, not to 512."""

    def encode_prompt(self, *args: Any, max_sequence_length: int | None = None, **options: Any) -> Any:
        longest = self.tokenizer_2.model_max_length
        length = min(max_sequence_length or longest, longest)
        return super().encode_prompt(*args, max_sequence_length=length, **options)
