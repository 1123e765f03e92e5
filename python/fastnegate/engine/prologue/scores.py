# SPDX-License-Identifier: Apache-2.0
"""SLD and CRG: guidance away from a concept, by what the denoiser predicts for the concept alone.

Both are defined for predicted noise. Models that predict something else are brought there: at a fixed noisy
sample every prediction is an affine function of the noise, so *differences* of predictions differ from those
of noises by one factor (`noise_factor`).

Sources: "Safe Latent Diffusion" (CVPR 2023, arXiv 2211.05105), "Concept Removal Guidance" (ICML 2026, arXiv
2606.29801).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("epsilon", "v_prediction", "sample", "flow_prediction")


def noise_factor(kind: str, kept: float) -> float:
    """Factor from a difference of predictions to the difference of noises, n - n' = factor (d - d').

    Args:
        kind: what the model predicts, one of `KINDS`.
        kept: ᾱ, the signal's share of the variance, in [0, 1); of a flow x = (1 - σ) x0 + σ n it is
            (1 - σ)² / ((1 - σ)² + σ²).

    0 where the sample is all noise and the model predicts something else: then no prediction changes it.

    Raises:
        ValueError: another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"prediction kind {kind!r}: known are {', '.join(KINDS)}")
    if kind == "epsilon":
        return 1.0
    if kind == "v_prediction":
        return math.sqrt(kept)  # n = √ᾱ v + √(1-ᾱ) x
    if kind == "sample":
        return -math.sqrt(kept / (1 - kept))  # n = (x - √ᾱ x0) / √(1-ᾱ)
    signal, noise = math.sqrt(kept), math.sqrt(1 - kept)
    return signal / (signal + noise)  # n = x + (1-σ) f


@dataclass
class State:
    """What a method remembers from step to step of one generation; None before its first step."""

    memory: Tensor | None = None
    last: int = -1  # step


@dataclass(frozen=True)
class Sld:
    """Safe Latent Diffusion. The guidance g is subtracted from the conditional prediction's difference:
    e = e_0 + s (e_p - e_0 - g), with

        μ = min(|e_p - e_S| s_S, 1), 0 where e_p - e_S >= λ;   g = μ (e_S - e_0) + s_m v;
        v <- β_m v + (1 - β_m) g

    element by element; v is remembered from the first step on, g acts from step `warmup` on.

    Attributes:
        warmup: steps without guidance.
        strength: s_S.
        threshold: λ.
        momentum: s_m.
        inertia: β_m.
    """

    warmup: int = 10
    strength: float = 1000.0
    threshold: float = 0.01
    momentum: float = 0.3
    inertia: float = 0.4

    def step(
        self, prompt: Tensor, empty: Tensor, concepts: list[Tensor], factor: float, state: State, at: int
    ) -> Tensor:
        """g of step `at`, as a difference of predictions [B, ...] like those it is given, for the prompt, for
        the empty text and for each concept. Of several concepts the guidances add up."""
        g = torch.zeros_like(empty)
        for concept in concepts:
            apart = factor * (prompt - concept)
            mu = (apart.abs() * self.strength).clamp(max=1).masked_fill(apart >= self.threshold, 0)
            g += mu * factor * (concept - empty)
        velocity = torch.zeros_like(g) if state.memory is None else state.memory
        g = g + self.momentum * velocity
        state.memory = self.inertia * velocity + (1 - self.inertia) * g
        if at < self.warmup or factor == 0:
            return torch.zeros_like(g)
        return g / factor


SLD = {
    "weak": Sld(15, 20.0, 0.0, 0.0, 0.0),  # as published code has it; the paper says 200
    "medium": Sld(10, 1000.0, 0.01, 0.3, 0.4),
    "strong": Sld(7, 2000.0, 0.025, 0.5, 0.7),
    "max": Sld(0, 5000.0, 1.0, 0.5, 0.7),
}


@dataclass(frozen=True)
class Crg:
    """Concept Removal Guidance [reconstruction]: from its abstract and a third party's account of its closed
    form, since the paper's text could not be read.

    How much of the concept is in the picture is told by which prediction is nearer to the prompt's, the
    concept's or the empty text's, now and at the steps before:

        Δ = e_n - e_0;   b_k = |e_p - e_0|² - |e_p - e_n|²;   presence = K/2 b_k + Σ_{k' < k} w_k' b_k'
        ω = max(presence - threshold, 0) / (K |Δ|²);   e_p <- e_p - strength ω Δ

    w is the weight of a step in the log-likelihood ratio of the path (`path_weight`). With strength 1 this is
    the smallest change of e_p that brings its presence down to the threshold. Sums are over a whole sample.
    That the changed e_p goes through classifier-free guidance, and is multiplied by its scale, is our
    reading. Of several concepts the changes add up, each with its own evidence.

    Attributes:
        strength: 1.0 meets the threshold.
        threshold: presence that is left alone, in squared noise.
        gain: K, the weight of the step at hand.
    """

    strength: float = 1.0
    threshold: float = 0.0
    gain: float = 1.0

    def step(
        self,
        prompt: Tensor,
        empty: Tensor,
        concepts: list[Tensor],
        factor: float,
        state: State,
        weight: float,
    ) -> Tensor:
        """What is subtracted from the prompt's prediction; arguments as for `Sld.step`, and the `path_weight`
        of this step, which counts from the next one on."""
        if state.memory is None:
            state.memory = prompt.new_zeros(len(concepts), len(prompt))
        change, evidence = torch.zeros_like(prompt), []
        for concept, path in zip(concepts, state.memory):
            difference = factor * (concept - empty)
            nearer = _squared(factor * (prompt - empty)) - _squared(factor * (prompt - concept))
            excess = (self.gain / 2 * nearer + path - self.threshold).clamp(min=0)
            length = self.gain * _squared(difference)
            omega = torch.where(length > 0, excess / length.where(length > 0, 1), 0)
            change += self.strength * omega.view(-1, *[1] * (prompt.dim() - 1)) * (concept - empty)
            evidence.append(nearer)
        state.memory = state.memory + weight * torch.stack(evidence)
        return change


def path_weight(kept: float, kept_next: float) -> float:
    """w of a step from ᾱ to the greater ᾱ', for squared noise: β / (2 α (1 - ᾱ)) with α = ᾱ / ᾱ', β = 1 - α.

    It is what makes w (|n - n_0|² - |n - n_c|²) the log-likelihood ratio of that step under two predictions
    of a DDPM. Where ᾱ is 0 no noise differs from another, so it is 0.
    """
    if kept <= 0 or kept_next <= kept:
        return 0.0
    alpha = kept / kept_next
    return (1 - alpha) / (2 * alpha * (1 - kept))


def _squared(difference: Tensor) -> Tensor:
    """|x|² of each sample [B]."""
    return difference.flatten(1).square().sum(1)
