# SPDX-License-Identifier: Apache-2.0
"""Z-Image: image before text, a text refiner of its own before both are joined, and an image whose position
depends on the length of the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF, ZSingleStreamAttnProcessor
from torch import Tensor, nn

from ....engine.errors import UnsupportedModelError
from ..around import base_class
from .families import Boarded, Given, JointFamily, no_words
from .riders import Joint, Layout, Riders
from .seam import Seam

MULTIPLE: int = SEQ_MULTI_OF  # of which every length of text and image is one


def _padded(length: int) -> int:
    return length + -length % MULTIPLE


def _board(_model: Any, given: Given, riders: Riders, tokens: Tensor, _image: int | None) -> Boarded:
    """Nothing boards yet: what is appended to a text would move its image."""
    no_words(given, "joint_attention_kwargs", "scale")
    images, texts = given["x"], given["cap_feats"]
    if isinstance(images[0], (list, tuple)) or given.get("siglip_feats") is not None:
        raise UnsupportedModelError("pictures to go by (Z-Image omni): negation does not know their layout")
    if given.get("controlnet_block_samples") is not None:
        raise UnsupportedModelError(
            "controlnet_block_samples are as long as the text, in which concepts ride"
        )
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise UnsupportedModelError(f"images of different sizes in a batch, {sorted(shapes)}: must be one")
    patch, frames = given.get("patch_size", 2), given.get("f_patch_size", 1)
    _, f, h, w = shapes.pop()
    image = (f // frames) * (h // patch) * (w // patch)
    prompt = max(_padded(len(text)) for text in texts)
    return dict(given), Layout(prompt, riders.count, image, _padded(image) - image, image_first=True)


def _joined(model: Any, seam: Seam) -> list[tuple[nn.Module, dict[str, Any]]]:
    build = base_class(model)._build_unified_sequence  # type: ignore[attr-defined]

    def with_riders(
        self: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        tokens, turns, mask, noise = build(self, *args, **kwargs)
        joint = seam.joint
        if joint is None:
            return tokens, turns, mask, noise
        lengths = args[6] if len(args) > 6 else kwargs["cap_seqlens"]
        theirs, their_turns = _riders(self, joint, lengths)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), joint.riders.count)], 1)
        return torch.cat([tokens, theirs], 1), torch.cat([turns, their_turns], 1), mask, noise

    return [(model, {"_build_unified_sequence": with_riders})]


def _riders(model: Any, joint: Joint, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Riders as the model refines a text, [B, T, d], and their rotations.

    To the image each stands as it would in a text of its own: after which the image would begin.
    """
    riders, given = joint.riders, joint.embeddings
    place = riders.place.expand_as(riders.ends)
    refined = model.cap_embedder(given)
    # Texts are padded to a multiple of a length by tokens of zeros, for which the model has learnt another.
    refined = torch.where((given == 0).all(-1, keepdim=True), model.cap_pad_token.to(refined.dtype), refined)
    turns = _turns(model, 1 + place)
    everywhere = riders.alone and riders.longest == riders.count
    if everywhere or _takes_masks(model.context_refiner):
        mask = None if everywhere else riders.bias.to(refined.dtype)
        for layer in model.context_refiner:
            refined = layer(refined, mask, turns)
    else:  # one after the other
        for row, span in riders.spans:
            text = refined[row : row + 1, span]
            for layer in model.context_refiner:
                text = layer(text, None, turns[row : row + 1, span])
            refined[row : row + 1, span] = text
    own = riders.ends + -riders.ends % MULTIPLE
    # Row by row: to bring a tensor of lengths to the device would be to wait for it.
    later = torch.stack([length - row for length, row in zip(lengths, own)])
    return refined, _turns(model, 1 + place + torch.where(riders.ends > 0, later, 0))


def _takes_masks(layers: Any) -> bool:
    """A kernel that somebody has chosen may not."""
    return all(layer.attention.processor._attention_backend is None for layer in layers)


def _turns(model: Any, position: Tensor) -> Tensor:
    """Rotations at positions [B, T] of text, which may be negative."""
    ids = torch.zeros(*position.shape, len(model.axes_dims), dtype=torch.int32, device=position.device)
    ids[..., 0] = position.abs()
    turns: Tensor = model.rope_embedder(ids.flatten(0, 1)).unflatten(0, position.shape)
    return torch.where((position < 0).unsqueeze(-1), turns.conj(), turns)


ZIMAGE = JointFamily((ZSingleStreamAttnProcessor,), _board, overrides=_joined)
