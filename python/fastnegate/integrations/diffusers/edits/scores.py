# SPDX-License-Identifier: Apache-2.0
"""SLD and CRG: at each step the denoiser runs for the concepts, too, and what it says of them changes what it
said of the prompt.

A pipeline guides by e_0 + s (e_p - e_0), in its own code. Both methods subtract something, g, from e_p there,
so e_p - g is what the pipeline is given; where it asks for e_p before e_0 is known, it is given
e_0 + s / (s - 1) g instead of e_0, to the same effect.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from ....engine.errors import NegationNotAppliedError, UnsupportedModelError
from ....engine.prologue.scores import KINDS, SLD, Crg, Sld, State, noise_factor, path_weight
from ....operator.rule import check_number
from ..contract import InProgress, family, in_progress
from .edit import AroundDenoiser, Edit, alone, check_plain
from .given import Several, concepts_of, text_of

MOST_GENERATIONS = 16  # in progress at once
# Predictions for prompt, empty text and concepts; factor to noise; state; step; weight of the step -> g
Method = Callable[[Tensor, Tensor, list[Tensor], float, State, int, float], Tensor]


class _Generation:
    """What is remembered of one pipeline call, which is known by the object that holds its timesteps."""

    def __init__(self, timesteps: Any) -> None:
        self.timesteps = timesteps
        self.steps = [float(t) for t in (timesteps.tolist() if isinstance(timesteps, Tensor) else timesteps)]
        self.state = State()
        self.waiting: tuple[Tensor, list[Tensor]] | None = None  # the prompt's and the concepts' predictions


class _Scores(AroundDenoiser):
    def __init__(self, pipe: Any, name: str, texts: list[Tensor], method: Method, first: int) -> None:
        super().__init__(pipe, name)
        self._first = first  # the step from which it acts
        self.extra_passes = len(texts)
        self._texts, self._method = texts, method
        self._generations: list[_Generation] = []
        self._adding = threading.Lock()
        self._put()

    def _denoise(
        self, model: Any, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType
    ) -> Any:
        given = self._arguments(model, args, kwargs)
        progress = in_progress(model, frame, given)
        if progress is None or not progress.own:
            raise NegationNotAppliedError(
                f"{self.method} needs the predictions of a pipeline's own step, with and without the prompt: "
                "this call of the denoiser is none"
            )
        apart = family(progress.pipe).texts is not None
        if not (frame.f_locals["do_true_cfg"] if apart else progress.guided):
            raise NegationNotAppliedError(
                f"{self.method} needs classifier-free guidance: call the pipeline with "
                + ("true_cfg_scale > 1 and a negative_prompt" if apart else "guidance_scale > 1")
            )
        generation = self._generation(progress, starts=not progress.unconditional)
        result = call(*args, **kwargs)
        step = functools.partial(self._change, progress, generation)
        if not apart:
            empty, prompt = result[0].chunk(2)
            half = _second_half(given, len(result[0]))
            g = step(prompt, empty, self._concepts(model, progress, half, prompt))
            return (torch.cat([empty, prompt - g]), *result[1:])
        if not progress.unconditional:
            generation.waiting = result[0], self._concepts(model, progress, given, result[0])
            return result
        if generation.waiting is None:
            raise NegationNotAppliedError(f"{self.method}: the prompt's prediction of this step is unknown")
        (prompt, concepts), generation.waiting = generation.waiting, None
        scale = frame.f_locals["true_cfg_scale"]
        return (result[0] + scale / (scale - 1) * step(prompt, result[0], concepts), *result[1:])

    def _generation(self, progress: InProgress, starts: bool) -> _Generation:
        """A step that does not come after the last one begins another generation."""
        with self._adding:
            found = next((g for g in self._generations if g.timesteps is progress.timesteps), None)
            if found is None or (starts and progress.at <= found.state.last):
                self._generations = [g for g in self._generations if g is not found][-MOST_GENERATIONS + 1 :]
                found = _Generation(progress.timesteps)
                if len(found.steps) <= self._first:
                    raise NegationNotAppliedError(
                        f"{self.method} acts from step {self._first} on, and {len(found.steps)} steps run: "
                        "give it a shorter warmup"
                    )
                self._generations.append(found)
            found.state.last = progress.at
            return found

    def _concepts(
        self, model: Any, progress: InProgress, given: dict[str, Any], like: Tensor
    ) -> list[Tensor]:
        """The prediction for each concept's text alone, in rows like those of the prompt."""
        made = []
        for text in self._texts:
            there = text.to(device=like.device, dtype=given["encoder_hidden_states"].dtype)
            own = {**given, "encoder_hidden_states": there.expand(len(like), -1, -1)}
            own |= {name: None for name in ("encoder_attention_mask",) if name in given}
            if "txt_ids" in given:
                own["txt_ids"] = given["txt_ids"].new_zeros(len(text), given["txt_ids"].shape[-1])
            made.append(alone(model, progress, len(like), like.device, **own)[0])
        return made

    def _change(
        self,
        progress: InProgress,
        generation: _Generation,
        prompt: Tensor,
        empty: Tensor,
        concepts: list[Tensor],
    ) -> Tensor:
        """g, in the dtype of the predictions."""
        scheduler, steps, at = progress.pipe.scheduler, generation.steps, progress.at
        kept = _kept(scheduler, steps[at])
        last = at + 1 == len(steps)
        weight = 0.0 if last else path_weight(kept, _kept(scheduler, steps[at + 1]))
        factor = noise_factor(_kind(scheduler), kept)
        wide = torch.promote_types(prompt.dtype, torch.float32)
        full = [c.to(wide) for c in concepts]
        g = self._method(prompt.to(wide), empty.to(wide), full, factor, generation.state, at, weight)
        if last:
            with self._adding:
                self._generations = [other for other in self._generations if other is not generation]
        return g.to(prompt.dtype)


def _second_half(value: Any, batch: int) -> Any:
    """The conditional rows of what a denoiser is given: of all tensors with a row for each of the batch."""
    if isinstance(value, Tensor):
        return value.chunk(2)[1] if value.dim() and len(value) == batch else value
    if isinstance(value, dict):
        return {name: _second_half(part, batch) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_second_half(part, batch) for part in value)
    return value


def _kind(scheduler: Any) -> str:
    """What the model predicts, one of KINDS."""
    kind = scheduler.config.get("prediction_type")
    if "FlowMatch" in type(scheduler).__name__:
        return "sample" if kind == "sample" else "flow_prediction"
    if kind not in KINDS[:-1] or not hasattr(scheduler, "alphas_cumprod"):
        raise UnsupportedModelError(
            f"{type(scheduler).__name__} with prediction_type={kind!r}: supported are "
            f"{', '.join(KINDS[:-1])} over alphas_cumprod, and flow matching"
        )
    return str(kind)


def _kept(scheduler: Any, timestep: float) -> float:
    """ᾱ at a timestep, which may lie between two that the model was trained with."""
    if "FlowMatch" in type(scheduler).__name__:
        noise = timestep / float(scheduler.config.num_train_timesteps)
        return (1 - noise) ** 2 / ((1 - noise) ** 2 + noise**2)
    table = scheduler.alphas_cumprod
    low = min(int(timestep), len(table) - 1)
    high, share = min(low + 1, len(table) - 1), timestep - int(timestep)
    between = (1 - share) * table[low] + share * table[high]
    return float(between)


def _put(pipe: Any, concepts: Several, name: str, method: Method, first: int = 0) -> Edit:
    entry = family(pipe)
    unet = entry.denoisers == ("unet",) and entry.texts is None and not entry.guider
    if not unet and "FluxPipeline" not in (kind.__name__ for kind in type(pipe).__mro__):
        raise UnsupportedModelError(
            f"{name} needs a UNet whose rows are [unconditional, conditional] halves, or FluxPipeline with "
            f"true guidance: {type(pipe).__name__} is neither"
        )
    _kind(pipe.scheduler)
    check_plain(pipe, name)
    found = concepts_of(pipe, concepts)
    return _Scores(pipe, name, [text_of(c, n) for n, c in found.items()], method, first)


def sld(pipe: Any, concepts: Several, preset: str = "medium", **numbers: float) -> Edit:
    """Safe Latent Diffusion: guidance away from the concepts' own predictions, where the prompt's comes near
    them (Schramowski et al., CVPR 2023, arXiv 2211.05105; `fastnegate.engine.prologue.scores.Sld` has the
    formula).

    Args:
        pipe: a Stable Diffusion pipeline (SDXL's pooled vector stays the prompt's), or `FluxPipeline`; called
            with classifier-free guidance.
        concepts: words, embeddings [T, C], a mapping from names to either, several, or a `ConceptBank`; each
            is a text of its own and takes a pass. The paper has one text that lists them all.
        preset: `weak`, `medium`, `strong` or `max`.
        numbers: `warmup`, `strength`, `threshold`, `momentum`, `inertia` instead of the preset's; strengths
            and thresholds are those of predicted noise, whatever the model predicts.

    Returns:
        The edit; `extra_passes` is the number of concepts. Nothing is remembered from one generation to the
        next.

    Raises:
        UnsupportedModelError: another pipeline or scheduler, or a denoiser that is compiled or cached.
        ValueError: a bad argument.
        NegationNotAppliedError: in a later call without classifier-free guidance, or whose steps all are
            warmup.
    """
    if preset not in SLD:
        raise ValueError(f"preset={preset!r}: allowed are {', '.join(SLD)}")
    fields = SLD[preset].__dict__
    for name, number in numbers.items():
        if name not in fields:
            raise ValueError(f"{name}={number!r}: sld has {', '.join(fields)}")
        check_number(name, number, low=-1.0 if name == "threshold" else 0.0)
    chosen = Sld(**{**fields, **numbers})

    def method(
        prompt: Tensor, empty: Tensor, concepts: list[Tensor], factor: float, state: State, at: int, _w: float
    ) -> Tensor:
        return chosen.step(prompt, empty, concepts, factor, state, at)

    return _put(pipe, concepts, "sld", method, math.ceil(chosen.warmup))


def crg(
    pipe: Any, concepts: Several, strength: float = 1.0, *, threshold: float = 0.0, gain: float = 1.0
) -> Edit:
    """Concept Removal Guidance [reconstruction]: the least change of the prompt's prediction that brings the
    evidence for the concepts down to a threshold (Choi et al., ICML 2026, arXiv 2606.29801;
    `fastnegate.engine.prologue.scores.Crg` has the formula, and says what of it could not be read).

    Args:
        pipe, concepts: as for `sld`.
        strength: at least 0; 1.0 meets the threshold, more goes beyond it.
        threshold: evidence that is left alone, in squared noise.
        gain: the weight of the step at hand against those before it, above 0.

    Returns, Raises:
        As `sld`.
    """
    check_number("strength", strength, low=0.0)
    check_number("threshold", threshold)
    check_number("gain", gain, above=0.0)
    chosen = Crg(strength, threshold, gain)

    def method(
        prompt: Tensor, empty: Tensor, concepts: list[Tensor], factor: float, state: State, _at: int, w: float
    ) -> Tensor:
        return chosen.step(prompt, empty, concepts, factor, state, w)

    return _put(pipe, concepts, "crg", method)
