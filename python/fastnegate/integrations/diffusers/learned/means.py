# SPDX-License-Identifier: Apache-2.0
"""What cross-attention layers give, averaged over runs of a pipeline, and whose layers these are."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ....engine.concepts import Fingerprint
from ....engine.errors import UnsupportedModelError
from ....engine.prototypes import Caption
from ..around import put_around, take_away
from ..contract import bare, cross_attention_layers, denoisers, encoders_of, family, in_progress
from ..hook import unconditional
from ..install import engine_of
from ..layers.ip_adapter import WithImages
from ..layers.known import kind_of
from ..text.identity import sample_of

# What a concept may be seen with: few words that every text encoder knows.
_SUBJECTS = (
    "a man", "a woman", "a child", "a dog", "a horse", "a bird", "a house", "a street", "a room", "a table",
    "a car", "a ship", "a tree", "a garden", "a beach", "a mountain",
)  # fmt: skip
# A sample of the weights of a denoiser's layers, as they were seen last: they may be offloaded later.
_seen: weakref.WeakKeyDictionary[nn.Module, Tensor] = weakref.WeakKeyDictionary()


def denoiser_fingerprint(pipe: Any) -> Fingerprint:
    """Identity of the denoisers and their cross-attention layers, by a sample of what makes values of text: a
    fine-tune that hardly changed them is the same.

    Raises:
        UnsupportedModelError: it has no such layers that can be looked at; or weights are offloaded that were
            never seen.
    """
    facts: dict[str, Any] = {}
    samples = []
    for attribute, model in _looked_at(pipe).items():
        layers = cross_attention_layers(model)
        shapes = "\n".join(f"{name} {attn.heads} {attn.inner_dim}" for name, attn in sorted(layers.items()))
        facts[attribute] = type(bare(model)).__name__
        facts[f"layers of {attribute}"] = hashlib.sha256(shapes.encode()).hexdigest()[:16]
        # An adapter has the layer that it changes within it.
        weights = [getattr(attn.to_v, "base_layer", attn.to_v).weight.detach() for attn in layers.values()]
        if not any(weight.is_meta for weight in weights):
            _seen[bare(model)] = torch.cat([sample_of(weight) for weight in weights])
        elif bare(model) not in _seen:
            raise UnsupportedModelError(
                f"the weights of pipe.{attribute} are offloaded, so nobody can tell which directions belong "
                "to them: make or load the bank before enabling offload"
            )
        samples.append(_seen[bare(model)])
    return Fingerprint(facts, torch.cat(samples))


def contrasts(pipe: Any, members: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of prompts with and without a member: "a dog with a hat" and "a dog"; or, where the tokenizer has
    captions of its own for a member (`concept_templates`), those, and the same without its words."""
    offers = getattr(getattr(pipe, encoders_of(pipe)[0][0]), "concept_templates", None)
    pairs = []
    for member in members:
        offered = offers(member) if offers is not None else ()
        for template in offered:
            texts = [" ".join(Caption.of(template, words).text.split()) for words in (member, "")]
            pairs.append((texts[0], texts[1]))
        if not offered:
            pairs += [(f"{subject} with {member}", subject) for subject in _SUBJECTS]
    return pairs


def attention_means(
    pipe: Any,
    prompts: Sequence[str],
    seed: int,
    batch: int,
    on_call: Callable[[], None],
    call: Mapping[str, Any],
) -> dict[str, Tensor]:
    """See `Host.attention_means`.

    Raises:
        UnsupportedModelError: as `denoiser_fingerprint`; a compiled denoiser, whose layers nobody can look
            into; or an IP-Adapter, whose pictures are in what layers give.
        ValueError: an engine is installed: what it negates would be missing.
    """
    if engine_of(pipe) is not None:
        raise ValueError("pipe has an engine, which changes what layers give: call its remove() first")
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch={batch!r}: must be a whole number >= 1")
    watches = [
        _Watch(model, f"{attribute}." if i else "")
        for i, (attribute, model) in enumerate(_looked_at(pipe).items())
    ]
    with contextlib.ExitStack() as stack:
        for watch in watches:
            stack.enter_context(watch.watching())
        for i in range(0, len(prompts), batch):
            some = list(prompts[i : i + batch])
            generators = [torch.Generator().manual_seed(seed + i + j) for j in range(len(some))]
            pipe(prompt=some, generator=generators, **{"output_type": "latent", **call})
            on_call()
    means: dict[str, Tensor] = {}
    for watch in watches:
        means.update(watch.means())
    return means


def _looked_at(pipe: Any) -> dict[str, nn.Module]:
    """The denoisers of a pipeline whose layers give something that is of text alone."""
    entry = family(pipe)
    if entry.joint is not None or entry.rides or entry.guider:
        why = "is made of blocks" if entry.guider else "has layers in which text is not apart"
        raise UnsupportedModelError(
            f"{type(pipe).__name__} {why}: directions are collected from pipelines with cross-attention, "
            "such as Stable Diffusion's"
        )
    return denoisers(pipe)


class _Watch:
    """The sums of one denoiser's layers, over its conditional rows; each row is the mean of its pixels."""

    def __init__(self, model: nn.Module, prefix: str) -> None:
        if bare(model) is not model:
            raise UnsupportedModelError(
                "nobody can look into the layers of a compiled denoiser: collect directions before compiling"
            )
        self._model, self._parameters = model, [*inspect.signature(model.forward).parameters]
        self._layers = {f"{prefix}{name}": attn for name, attn in cross_attention_layers(model).items()}
        for name, attn in self._layers.items():
            if isinstance(kind_of(attn.processor), WithImages):
                raise UnsupportedModelError(f"layer {name} has an IP-Adapter: unload it before")
        self._sums: dict[str, Tensor] = {}
        self._rows: dict[str, int] = dict.fromkeys(self._layers, 0)
        self._conditional: slice | None = None  # rows of the call at work; None: none

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        handles = [
            attn.to_out[0].register_forward_pre_hook(functools.partial(self._add, name))
            for name, attn in self._layers.items()
        ]
        put_around(self._model, self._denoise)
        try:
            yield
        finally:
            take_away(self._model, self._denoise)
            for handle in handles:
                handle.remove()

    def _denoise(
        self,
        model: Any,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        frame: FrameType,
    ) -> Any:
        given = {**dict(zip(self._parameters, args)), **kwargs}
        progress = in_progress(model, frame, given)
        self._conditional = None
        if progress is not None and progress.own and not unconditional(progress):
            rows = len(next(iter(given.values())))
            self._conditional = slice(rows // 2 if progress.guided else 0, rows)
        return call(*args, **kwargs)

    def _add(self, name: str, _module: nn.Module, given: tuple[Tensor, ...]) -> None:
        if self._conditional is None:
            return
        rows = given[0][self._conditional]  # [rows, pixels, H * D]
        total = rows.detach().float().mean(1).double().sum(0).cpu()
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._rows[name] += len(rows)

    def means(self) -> dict[str, Tensor]:
        """Raises ValueError: a layer gave nothing, since its denoiser has none of the steps."""
        for name, rows in self._rows.items():
            if not rows:
                raise ValueError(f"layer {name} was not asked in these runs: they have too few steps for it")
        return {
            name: (total / self._rows[name]).view(self._layers[name].heads, -1)
            for name, total in self._sums.items()
        }
