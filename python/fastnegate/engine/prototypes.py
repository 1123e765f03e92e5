# SPDX-License-Identifier: Apache-2.0
"""Prototypes: a few tokens that stand for a phrase in any context, or one token for many phrases; and
directions, which stand for a concept in what the layers make of text.

A text encoder writes the context into every token. So the phrase is encoded in several captions, and what
its tokens have in common, their mean, stands for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DEFAULT_TEMPLATES = ("{}", "a photo of {}", "a painting of {}", "a picture with {} in it", "{} and a tree")

_SPAN = re.compile(r"^(?P<before>[^\[\]]*)\[(?P<span>[^\[\]]*\{\}[^\[\]]*)\](?P<after>[^\[\]]*)$")


class Caption(NamedTuple):
    """A phrase in a context; `span` holds the phrase, and its tokens are the ones that are averaged."""

    before: str
    span: str
    after: str

    @classmethod
    def of(cls, template: str, member: str) -> Caption:
        """`template` with `member` for its `{}`; square brackets may mark a longer span.

        Raises:
            ValueError: not one `{}`, or brackets that do not mark one span around it.
        """
        if not isinstance(template, str) or template.count("{}") != 1:
            raise ValueError(f"templates: {template!r} must contain {{}} exactly once")
        marked = template if "[" in template or "]" in template else template.replace("{}", "[{}]")
        parts = _SPAN.match(marked)
        if parts is None:
            raise ValueError(f"templates: {template!r} must have one pair of brackets around {{}}")
        return cls(*(part.replace("{}", member) for part in parts.groups()))

    @property
    def text(self) -> str:
        return self.before + self.span + self.after


def prototype(spans: Sequence[Tensor]) -> Tensor:
    """Mean of embeddings [T, C] of the same phrase in several contexts, at the mean length of a token:
    averaging shortens, and concept keys should be as long as the prompt's."""
    stacked = torch.stack(list(spans))
    mean = stacked.mean(0)
    length = stacked.norm(dim=-1).mean()
    rescaled: Tensor = mean * (length / mean.norm(dim=-1, keepdim=True).clamp(min=1e-12))
    return rescaled


class Clusters(NamedTuple):
    """Of `spherical_kmeans`: centroids [K, C] of length 1, and the cluster, int64 [P], of each point."""

    centroids: Tensor
    of: Tensor


def spherical_kmeans(points: Tensor, clusters: int, seed: int = 0, rounds: int = 100) -> Clusters:
    """Group points [P, C] by their directions: maximises the sum of <x / |x|, centroid of x's cluster>.

    Dhillon and Modha, 2001: points go to the centroid with the largest cosine, a centroid becomes the mean of
    its points at length 1; until nothing changes. The first centroids are points, drawn one after another as
    in k-means++: those that are far from what was drawn before are likelier. A cluster that loses all its
    points takes the point that is farthest from its own centroid, of those that have company.

    Computed in float64 on the CPU, so that the same seed gives the same clusters everywhere.

    Args:
        points: any floating dtype; none of length 0.
        clusters: K, from 1 to P.
        seed: of the first centroids.
        rounds: the most there are; 100 are many.

    Raises:
        ValueError: K out of its range, or points that have no direction.
    """
    count = len(points)
    if isinstance(clusters, bool) or not isinstance(clusters, int) or not 1 <= clusters <= count:
        raise ValueError(
            f"clusters={clusters!r}: must be a whole number from 1 to {count}, the points there are"
        )
    points = points.detach().double().cpu()
    lengths = points.norm(dim=1, keepdim=True)
    if not lengths.isfinite().all() or (lengths == 0).any():
        raise ValueError("points must be finite and have a length above 0")
    points = points / lengths
    centroids = _spread(points, clusters, seed)
    of = torch.full((count,), -1)
    for _ in range(rounds):
        cosines = points @ centroids.T
        before, of = of, cosines.argmax(1)
        _fill_empty(of, cosines)
        if torch.equal(of, before):
            break
        sums = torch.zeros_like(centroids).index_add_(0, of, points)
        lengths = sums.norm(dim=1, keepdim=True)
        # Opposite points cancel out, and have no mean direction: the centroid stays what it was.
        centroids = torch.where(lengths > 1e-12, sums / lengths.clamp(min=1e-12), centroids)
    return Clusters(centroids, of)


def _spread(points: Tensor, clusters: int, seed: int) -> Tensor:
    """Points of length 1 that are likely to be far from each other, [K, C]."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(points), (), generator=generator))]
    while len(chosen) < clusters:
        away = (1 - points @ points[chosen].T).amin(1).clamp(min=0)
        away[chosen] = 0
        if not away.sum() > 0:  # what is left are copies of what was chosen
            away = torch.ones_like(away)
            away[chosen] = 0
        chosen.append(int(torch.multinomial(away, 1, generator=generator)))
    return points[chosen]


def _fill_empty(of: Tensor, cosines: Tensor) -> None:
    """Give each cluster that has no point the one that is worst off where it is; `of` changes in place."""
    own = cosines.gather(1, of.unsqueeze(1)).squeeze(1).clone()
    for empty in range(cosines.shape[1]):
        sizes = torch.bincount(of, minlength=cosines.shape[1])
        if sizes[empty]:
            continue
        worst = int(own.masked_fill(sizes[of] == 1, torch.inf).argmin())
        of[worst], own[worst] = empty, 1.0


def condense(prototypes: Sequence[Tensor], clusters: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Few prototypes for many: K single tokens [1, C] for prototypes [T_i, C], by `spherical_kmeans` over the
    mean token of each. A centroid gets the mean length of the tokens that it stands for."""
    means = torch.stack([tokens.mean(0) for tokens in prototypes])
    lengths = torch.stack([tokens.norm(dim=-1).mean() for tokens in prototypes]).double().cpu()
    centroids, of = spherical_kmeans(means, clusters, seed)
    return tuple(
        (centroid * lengths[of == k].mean()).float().unsqueeze(0) for k, centroid in enumerate(centroids)
    )


def contrast(shown: Mapping[str, Tensor], absent: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Directions from means [H, D] of what each layer's attention gave with and without a concept: the
    difference, at length 1 over all channels of a layer (CASteer, arXiv 2503.09630).

    Raises:
        ValueError: a layer in which there is no difference.
    """
    made = {}
    for layer, mean in shown.items():
        difference = mean.double() - absent[layer].double()
        length = difference.norm()
        if not length.isfinite() or not length > 1e-12 * mean.double().norm():
            raise ValueError(
                f"layer {layer} gives the same with and without the concept: it has no direction"
            )
        made[layer] = (difference / length).float()
    return made


def orthogonal(directions: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Directions [H, D] by layer, each without what those before it have of it, at length 1 over H * D
    (Gram-Schmidt, in float64, twice: once leaves more than rounding where directions are nearly the same).

    Raises:
        ValueError: a direction that those before it make up, or nearly so.
    """
    made: list[dict[str, Tensor]] = []
    for number, layers in enumerate(directions):
        rest = {}
        for layer, direction in layers.items():
            vector = direction.double().flatten()
            vector = vector / vector.norm()
            before = [done[layer].double().flatten() for done in made]
            for _ in range(2):
                for other in before:
                    vector = vector - (vector @ other) * other
            if vector.norm() < 1e-3:
                raise ValueError(f"direction {number} is that of others before it in layer {layer}")
            rest[layer] = (vector / vector.norm()).float().view_as(direction)
        made.append(rest)
    return made
