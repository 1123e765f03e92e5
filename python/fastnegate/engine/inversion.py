# SPDX-License-Identifier: Apache-2.0
"""Concepts from pictures. `invert`: text embeddings, learned with the frozen denoiser; `phrases_shown`: which
words say what the pictures show.

Words say nothing to a model that was made to forget them, but pictures of what they meant still fit some
embedding: INE (arXiv 2511.04834) searches it with the model's own training loss, and negates that.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import host
from .concepts import Concept
from .host import Denoising

MOST_TOKENS = 8


def invert(
    pipe: Any,
    images: Sequence[Any],
    *,
    tokens: int = 1,
    steps: int = 3000,
    rate: float = 5e-3,
    batch: int = 1,
    caption: str | None = None,
    start: Tensor | None = None,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    checkpoint: str | Path | None = None,
    every: int = 100,
    on_step: Callable[[float], None] = lambda loss: None,
) -> Concept:
    """Learn the embeddings c that minimise E |target - denoiser(z_t, t, c)|^2 over pictures, noise and t.

    The target is what the scheduler's config says that the model predicts: noise, the picture, v, or the
    velocity of flow matching. Adam, as published: rate 5e-3, one picture a step, 3000 steps, one token. The
    denoiser is not changed. What a step draws depends on `seed` and its number alone, so a run that was
    interrupted ends in the very bits of one that was not.

    Args:
        pipe: a pipeline with one of the denoisers that `Host.denoising` knows; no engine in it.
        images: PIL pictures that show the concept and differ in the rest.
        tokens: T, from 1 to 8.
        steps: of Adam, all in all.
        rate: of Adam.
        batch: pictures in a step.
        caption: where the embeddings stand in a text, "a photo of {}"; what the text says is then not
            learned. None: they are all the text there is.
        start: [T, C], where to begin; default: next to nothing, noise of a hundredth of the length of the
            text encoder's tokens, so that tokens differ. What no picture speaks of then stays next to
            nothing; beginning at full length, it would be most of what is negated.
        seed: of `start`, and of what steps draw.
        size: height and width of the pictures, in pixels; default: the pipeline's own.
        checkpoint: a file that is written every `every` steps and at the end, and read where it exists: then
            the run goes on from there.
        on_step: called after each step with its loss.

    Returns:
        A concept with these embeddings as its prototype and as content of its prompt, so every rule that
        reads tokens takes it.

    Raises:
        UnsupportedModelError: a pipeline whose training loss is not known.
        ValueError: a bad argument, before any work; or a checkpoint of another run.
        RuntimeError: the loss is not finite.
    """
    _check(tokens=tokens, steps=steps, batch=batch, every=every)
    if tokens > MOST_TOKENS:
        raise ValueError(f"tokens={tokens!r}: must be at most {MOST_TOKENS}")
    if not 0 < rate < float("inf"):
        raise ValueError(f"rate={rate!r}: must be a finite number above 0")
    if not len(images):
        raise ValueError("images is empty: there is nothing to learn from")
    denoising = host.of(pipe).denoising(pipe)
    if start is not None and (start.shape != (tokens, denoising.width) or not start.isfinite().all()):
        raise ValueError(
            f"start has shape {list(start.shape)}: must be {[tokens, denoising.width]}, all of it finite"
        )
    with torch.inference_mode(False), torch.enable_grad(), denoising.frozen():
        before, after = denoising.around(caption)
        latents = denoising.latents(images, size)
        run = _Run.begun(denoising, start, tokens, rate, seed)
        settings: dict[str, Any] = {}
        file = None if checkpoint is None else Path(checkpoint)
        if file is not None:
            settings = {
                "denoiser": denoising.identity, "tokens": tokens, "rate": rate, "batch": batch,
                "caption": caption, "seed": seed, "pictures": _digest(latents),
                "start": _digest(run.embeddings),
            }  # fmt: skip
            if file.exists():
                run.load(file, settings)
        while run.step < steps:
            drawn = _Draw.of(latents, batch, seed, run.step)
            text = torch.cat([before, run.embeddings.to(before), after]).expand(batch, -1, -1)
            loss = denoising.loss(drawn.latents, drawn.noise, drawn.when, text)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise RuntimeError(f"the loss of step {run.step} is {value}: try a smaller rate")
            run.follow(loss)
            if file is not None and (run.step % every == 0 or run.step == steps):
                run.save(file, settings)
            on_step(value)
    return Concept.from_embeddings(run.embeddings)


def phrases_shown(pipe: Any, images: Sequence[Any], phrases: Sequence[str]) -> dict[str, float]:
    """Which of some phrases pictures show, as the pipeline's own pair of image and text tower (CLIP) sees it.

    An image embedding is no concept: it lives in the space in which images and texts are compared, and
    attention reads tokens of the text encoder, which nothing maps it to. What the towers can do is choose
    words: each picture is shared out among the phrases by CLIP's own classifier, the softmax of 100 x cosine,
    and shares are averaged over pictures. `ConceptBank.from_prompts` makes a concept of the phrases.

    Args:
        pipe: a pipeline with an image tower.
        images: PIL pictures.
        phrases: at least two; chance is 1 / their number.

    Returns:
        Phrase -> share, of those above chance; the largest first.

    Raises:
        UnsupportedModelError: the pipeline has no image tower beside a text tower of the same space.
        ValueError: no pictures, fewer than two phrases, or one that cannot be encoded.
    """
    if not len(images):
        raise ValueError("images is empty: there is nothing to look at")
    if isinstance(phrases, str) or len({*phrases}) < 2 or len({*phrases}) < len(phrases):
        raise ValueError(f"phrases={phrases!r}: must be several, all of them different")
    shares = host.of(pipe).likeness(pipe, images, phrases).double().softmax(1).mean(0).tolist()
    found = {phrase: share for phrase, share in zip(phrases, shares) if share > 1 / len(phrases)}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _check(**numbers: int) -> None:
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name}={number!r}: must be a whole number >= 1")


def _digest(tensor: Tensor) -> str:
    values = tensor.detach().float().cpu().contiguous()
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]


class _Draw(NamedTuple):
    """What one step sees."""

    latents: Tensor
    noise: Tensor
    when: Tensor

    @classmethod
    def of(cls, latents: Tensor, batch: int, seed: int, step: int) -> _Draw:
        # Its generator is its own: nothing of it is to be kept in a checkpoint.
        generator = torch.Generator().manual_seed(random.Random(f"{seed} {step}").getrandbits(63))
        chosen = torch.randint(len(latents), (batch,), generator=generator)
        noise = torch.randn(batch, *latents.shape[1:], generator=generator)
        when = torch.rand(batch, generator=generator, dtype=torch.float64)
        return cls(latents[chosen.to(latents.device)], noise.to(latents), when)


class _Run:
    """Embeddings [T, C] in float32 on the CPU, and Adam's state of them, after `step` steps."""

    def __init__(self, embeddings: Tensor, rate: float) -> None:
        self.embeddings = embeddings.requires_grad_()
        self.step = 0
        self._adam = torch.optim.Adam([self.embeddings], lr=rate)

    @classmethod
    def begun(cls, denoising: Denoising, start: Tensor | None, tokens: int, rate: float, seed: int) -> _Run:
        if start is None:
            generator = torch.Generator().manual_seed(seed)
            start = denoising.length / 100 * torch.randn(tokens, denoising.width, generator=generator)
        return cls(start.detach().float().cpu().clone(), rate)

    def follow(self, loss: Tensor) -> None:
        """One step down the gradient, which nothing but the embeddings is given."""
        (self.embeddings.grad,) = torch.autograd.grad(loss, [self.embeddings])
        self._adam.step()
        self.step += 1

    def save(self, file: Path, settings: dict[str, Any]) -> None:
        """Whole or not at all: the file takes its place when it is written."""
        from safetensors.torch import save_file

        state = self._adam.state[self.embeddings]
        tensors = {"embeddings": self.embeddings.detach(), **{name: state[name] for name in _MOMENTS}}
        header = json.dumps({"settings": settings, "step": self.step}, sort_keys=True)
        beside = file.with_name(file.name + ".new")
        save_file(tensors, str(beside), metadata={"fastnegate-inversion": header})
        os.replace(beside, file)

    def load(self, file: Path, settings: dict[str, Any]) -> None:
        """Go on from there. Raises ValueError: no checkpoint, or one with other settings."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(file), framework="pt") as opened:
                header = json.loads((opened.metadata() or {})["fastnegate-inversion"])
                tensors = {name: opened.get_tensor(name) for name in ("embeddings", *_MOMENTS)}
            theirs, step = header["settings"], int(header["step"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"checkpoint={str(file)!r} is not one of an inversion: {error!r}") from error
        for name, value in settings.items():
            if (other := theirs.get(name)) != value:
                raise ValueError(
                    f"checkpoint={str(file)!r} is of another run: {name} was {other!r}, not {value!r}"
                )
        with torch.no_grad():
            self.embeddings.copy_(tensors.pop("embeddings"))
        self._adam.state[self.embeddings] = {"step": torch.tensor(float(step)), **tensors}
        self.step = step


_MOMENTS = ("exp_avg", "exp_avg_sq")  # as torch's Adam calls them
