# SPDX-License-Identifier: Apache-2.0
"""The training loop: seeded, resumable, with an average of the weights, a log and samples on the way."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .scenes import Scenes

EMPTY = 0.1
"""Share of the captions that are replaced by the empty one, for classifier-free guidance."""


@dataclass(frozen=True)
class Recipe:
    """How long and how fast; all lengths are in pictures, so that a resumed run goes on as if unbroken.

    Times t are uniform. With a `shift` s above 1, s t / (1 + (s - 1) t), more of them are noisy, where it is
    decided what a picture shows (Esser et al., arXiv 2403.03206).
    """

    pictures: int
    batch: int = 32
    rate: float = 1.5e-3
    text_rate: float = 0.5
    warm: int = 3200
    flat: float = 0.5
    average: float = 0.999
    evaluate: int = 25_600
    seed: int = 0
    shift: float = 1.0

    def rate_at(self, seen: int) -> float:
        """Learning rate after `seen` pictures: a short rise, flat, then half a cosine to zero."""
        share = seen / self.pictures
        fall = max(0.0, (share - self.flat) / (1 - self.flat))
        return self.rate * min(1.0, (seen + self.batch) / self.warm) * (0.5 + 0.5 * math.cos(math.pi * fall))


def train(
    host: Any,
    data: Scenes,
    recipe: Recipe,
    folder: Path,
    evaluate: Callable[[Any, str], dict[str, Any]],
    device: str = "cpu",
    compiled: bool = False,
    resume: bool = False,
    minutes: float = math.inf,
) -> Any:
    """Train `host`; returns the copy of it that holds the averaged weights.

    `folder` gets `state.pt`, every ten minutes and at an evaluation, and `log.jsonl`, a line per
    evaluation; `evaluate(averaged, name)` gives what a line says beside the loss. Ends early, resumable,
    after `minutes`.
    """
    torch.manual_seed(recipe.seed)
    host = host.to(device)
    averaged = copy.deepcopy(host).eval().requires_grad_(False)
    optimisers = _optimisers(host, recipe)
    seen, log, loss_mean = 0, [], math.nan
    state_file = folder / "state.pt"
    if resume:
        state = torch.load(state_file, map_location=device, weights_only=True)
        host.load_state_dict(state["host"])
        averaged.load_state_dict(state["averaged"])
        for optimiser, its in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(its)
        seen, log, loss_mean = state["seen"], state["log"], state["loss"]
    folder.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        state = {
            "host": host.state_dict(),
            "averaged": averaged.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in optimisers],
            "seen": seen,
            "log": log,
            "loss": loss_mean,
        }
        torch.save(state, state_file.with_suffix(".new"))
        state_file.with_suffix(".new").replace(state_file)

    tokens = host.tokenizer(data.captions, padding="max_length", max_length=host.words, return_tensors="pt")
    empty = host.tokenizer([""], padding="max_length", max_length=host.words, return_tensors="pt").input_ids
    tokens, empty, pictures = (x.to(device) for x in (tokens.input_ids, empty, data.pictures))
    loss_of = torch.compile(host.loss) if compiled else host.loss
    host.train()
    began = saved = time.monotonic()
    bar = tqdm(total=recipe.pictures, initial=seen, unit="img", mininterval=20, smoothing=0.05)
    while seen < recipe.pictures and time.monotonic() - began < 60 * minutes:
        latents, noise, t, words = _batch(host, pictures, tokens, empty, recipe, seen)
        loss = loss_of(latents, noise, t, words)
        for optimiser in optimisers:
            optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(host.parameters(), 1.0)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = recipe.rate_at(seen) * group.get("factor", 1.0)
            optimiser.step()
        seen += recipe.batch
        steps = seen // recipe.batch
        _average(averaged, host, min(recipe.average, steps / (steps + 10)))
        loss_mean = loss.item() if math.isnan(loss_mean) else 0.98 * loss_mean + 0.02 * loss.item()
        bar.set_postfix(loss=f"{loss_mean:.4f}", refresh=False)
        bar.update(recipe.batch)
        if seen % recipe.evaluate < recipe.batch or seen >= recipe.pictures:
            found = evaluate(averaged, str(seen))
            log.append({"seen": seen, "loss": round(loss_mean, 4), **found})
            (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
            tqdm.write(json.dumps(log[-1]))
            host.train()
            save()
        elif time.monotonic() - saved > 600:
            save()
            saved = time.monotonic()
    bar.close()
    save()
    (folder / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1) + "\n")
    return averaged


def _optimisers(host: Any, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the denoiser's inner matrices, AdamW for the rest; text learns slower.

    Muon's step is scaled to the size of AdamW's, so one learning rate serves both.
    """
    matrices, rest, text = [], [], []
    for name, weight in host.named_parameters():
        if name.startswith("text_encoder"):
            text.append(weight)
        elif weight.dim() == 2 and not any(part in name for part in host.outer):
            matrices.append(weight)
        else:
            rest.append(weight)
    groups: list[dict[str, Any]] = [{"params": rest}, {"params": text, "factor": recipe.text_rate}]
    return [
        Muon(matrices, lr=recipe.rate, weight_decay=0.01),
        torch.optim.AdamW(groups, recipe.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal (Jordan et al., 2024), scaled to the size of AdamW's.

    As `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`, which orthogonalises in bfloat16: where a CPU has
    no matrix unit for that, float32 takes half of the time, a tenth to a seventh of a whole step here.
    """

    def __init__(
        self, matrices: list[Tensor], lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                buffer = state.setdefault("momentum_buffer", torch.zeros_like(weight))
                buffer.lerp_(weight.grad, 1 - group["momentum"])
                step = orthogonal(weight.grad.lerp(buffer, group["momentum"]))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(step, alpha=group["lr"] * 0.2 * math.sqrt(max(weight.shape)))


def orthogonal(matrix: Tensor) -> Tensor:
    """Nearly U Vᵀ of the singular value decomposition U S Vᵀ: Newton-Schulz, five steps."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), wide, beta=3.4445)
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


def _batch(
    host: Any, pictures: Tensor, tokens: Tensor, empty: Tensor, recipe: Recipe, seen: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A batch that depends on the seed and the pictures seen alone; times are stratified over the batch."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + seen)
    number = recipe.batch
    chosen = torch.randint(len(pictures), (number,), generator=generator).to(pictures.device)
    latents = host.latents(pictures[chosen].permute(0, 3, 1, 2).float() / 127.5 - 1)
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    t = (torch.randperm(number, generator=generator) + torch.rand(number, generator=generator)) / number
    t = recipe.shift * t / (1 + (recipe.shift - 1) * t)
    emptied = (torch.rand(number, 1, generator=generator) < EMPTY).to(tokens.device)
    words = torch.where(emptied, empty, tokens[chosen])
    return latents, noise, t.clamp(1e-3, 0.9995).to(latents.device), words


@torch.no_grad()
def _average(averaged: nn.Module, host: nn.Module, keep: float) -> None:
    torch._foreach_lerp_(list(averaged.parameters()), list(host.parameters()), 1 - keep)
