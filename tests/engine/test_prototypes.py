# SPDX-License-Identifier: Apache-2.0
"""Prototypes and directions as algebra: against literal formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastnegate import Concept
from fastnegate.engine.prototypes import condense, contrast, orthogonal, spherical_kmeans


def clouds(count: int, each: int, width: int, spread: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points around `count` directions, at many lengths, and the cloud of each."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.linalg.qr(torch.randn(width, count, generator=generator, dtype=torch.float64)).Q.T
    noise = torch.randn(count, each, width, generator=generator, dtype=torch.float64)
    points = (centres[:, None] + spread * noise).flatten(0, 1)
    lengths = torch.rand(len(points), 1, generator=generator, dtype=torch.float64) * 9 + 1
    return points * lengths, torch.arange(count).repeat_interleave(each)


def literal_rounds(
    points: list[list[float]], centroids: list[list[float]]
) -> tuple[list[list[float]], list[int]]:
    """Spherical k-means from given centroids, as one would write it down."""
    units = [[x / math.sqrt(sum(y * y for y in p)) for x in p] for p in points]
    of: list[int] = []
    while True:
        cosines = [[sum(x * y for x, y in zip(u, c)) for c in centroids] for u in units]
        now = [row.index(max(row)) for row in cosines]
        if now == of:
            return centroids, of
        of = now
        for k in range(len(centroids)):
            mates = [u for u, own in zip(units, of) if own == k]
            assert mates, "choose points with which no cluster gets empty"
            total = [sum(column) for column in zip(*mates)]
            length = math.sqrt(sum(x * x for x in total))
            centroids[k] = [x / length for x in total]


@pytest.mark.parametrize("seed", range(5))
def test_kmeans_is_the_literal_loop(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    points, _ = clouds(4, 25, 6, 0.35, seed)
    begin = points[[0, 25, 50, 75]] / points[[0, 25, 50, 75]].norm(dim=1, keepdim=True)
    monkeypatch.setattr("fastnegate.engine.prototypes._spread", lambda *_: begin.clone())
    centroids, of = literal_rounds(points.tolist(), begin.tolist())
    found = spherical_kmeans(points, 4)
    assert found.of.tolist() == of
    torch.testing.assert_close(
        found.centroids, torch.tensor(centroids, dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_kmeans_finds_clouds_whatever_their_lengths() -> None:
    points, cloud = clouds(5, 20, 16, 0.05)
    for seed in range(5):
        found = spherical_kmeans(points, 5, seed)
        pairs = {*zip(cloud.tolist(), found.of.tolist())}
        assert len(pairs) == 5  # each cloud is a cluster
        assert torch.allclose(found.centroids.norm(dim=1), torch.ones(5, dtype=torch.float64))


def test_the_seed_decides() -> None:
    points = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    same = [spherical_kmeans(points, 7, seed=3) for _ in range(2)]
    assert torch.equal(same[0].centroids, same[1].centroids) and torch.equal(same[0].of, same[1].of)
    assert not torch.equal(same[0].of, spherical_kmeans(points, 7, seed=4).of)


def test_a_cluster_that_gets_empty_takes_the_point_that_is_worst_off(monkeypatch: pytest.MonkeyPatch) -> None:
    angles = torch.tensor([0.0, 5.0, 10.0, 60.0, 120.0], dtype=torch.float64).deg2rad()
    points = torch.stack([angles.cos(), angles.sin()], 1)
    begin = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(0.75)], [-1.0, -1e-9]], dtype=torch.float64)
    begin[2, 1] = -1.0  # nobody is near it
    monkeypatch.setattr("fastnegate.engine.prototypes._spread", lambda *_: begin.clone())
    found = spherical_kmeans(points, 3, rounds=1)
    assert found.of.tolist() == [0, 0, 0, 1, 2]


def test_copies_fill_all_clusters() -> None:
    found = spherical_kmeans(torch.ones(6, 3), 4)
    assert sorted({*found.of.tolist()}) == [0, 1, 2, 3]
    assert torch.allclose(found.centroids, torch.full((4, 3), 3**-0.5, dtype=torch.float64))


def test_opposite_points_leave_a_finite_centroid() -> None:
    assert spherical_kmeans(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), 1).centroids.isfinite().all()


@pytest.mark.parametrize(
    ("points", "clusters", "message"),
    [
        (torch.ones(3, 2), 0, "clusters=0: must be a whole number from 1 to 3"),
        (torch.ones(3, 2), 4, "clusters=4"),
        (torch.ones(3, 2), True, "clusters=True"),
        (torch.zeros(3, 2), 1, "length above 0"),
        (torch.full((3, 2), torch.nan), 1, "must be finite"),
    ],
)
def test_kmeans_refuses(points: Tensor, clusters: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spherical_kmeans(points, clusters)


def test_condensed_prototypes_are_as_long_as_what_they_stand_for() -> None:
    long, short = torch.tensor([[8.0, 0, 0]]), torch.tensor([[0, 2.0, 0], [0, 4.0, 0]])
    few = condense([long, long * 1.5, short], 2)
    assert [tuple(p.shape) for p in few] == [(1, 3), (1, 3)] and few[0].dtype == torch.float32
    assert sorted(float(p.norm()) for p in few) == pytest.approx([3.0, 10.0])


def test_a_condensed_concept_keeps_the_rest() -> None:
    concept = Concept.from_embeddings(list(torch.randn(9, 2, 4)), [str(i) for i in range(9)])
    few = concept.condensed(3)
    assert len(few.prototypes) == 3 and few.members == concept.members and few.prompt is concept.prompt
    for clusters in (0, 10, 1.5):
        with pytest.raises(ValueError, match=f"clusters={clusters}"):
            concept.condensed(clusters)  # type: ignore[arg-type]


def test_contrast_is_the_unit_difference() -> None:
    shown, absent = torch.randn(2, 3, 4, dtype=torch.float64)
    (direction,) = contrast({"a": shown}, {"a": absent}).values()
    expected = (shown - absent) / (shown - absent).square().sum().sqrt()
    torch.testing.assert_close(direction, expected.float())
    with pytest.raises(ValueError, match="layer a gives the same"):
        contrast({"a": shown}, {"a": shown.clone()})


def test_gram_schmidt_keeps_the_span_and_the_first() -> None:
    vectors = torch.randn(3, 2, 5, dtype=torch.float64)
    vectors /= vectors.flatten(1).norm(dim=1).view(3, 1, 1)
    vectors = vectors.float()
    made = torch.stack([of["x"] for of in orthogonal([{"x": v} for v in vectors])]).flatten(1).double()
    torch.testing.assert_close(made @ made.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(made[0], vectors[0].flatten().double())
    triangular = vectors.flatten(1).double() @ made.T  # each is made of itself and of those before it
    assert torch.allclose(triangular.triu(1), torch.zeros(3, 3, dtype=torch.float64), atol=1e-6)
    assert (triangular.diagonal() > 0).all()
    with pytest.raises(ValueError, match="direction 1 is that of others before it in layer x"):
        orthogonal([{"x": vectors[0]}, {"x": vectors[0]}])
