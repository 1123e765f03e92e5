# SPDX-License-Identifier: Apache-2.0
"""The algebra of methods that edit before or beside attention, in float64, against its definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastnegate.engine.prologue.scores import SLD, Crg, Sld, State, noise_factor, path_weight
from fastnegate.engine.prologue.text import Safree, onto, subspace
from fastnegate.engine.prologue.values import Shift, gram_schmidt, without_concepts
from fastnegate.engine.prologue.vectors import moved_away, smallest_strength
from fastnegate.engine.prologue.weights import ClosedForm, answers, evened, resurfacing


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


# ---- AdaVD ----------------------------------------------------------------------------------


def test_gram_schmidt() -> None:
    targets = rand(4, 9)
    basis, factors = gram_schmidt(targets)
    products = basis @ basis.T
    close(products, products.diagonal().diag())
    close(factors @ targets, basis)
    close(factors.triu(), torch.eye(4, dtype=torch.float64))


def test_adavd_of_one_concept_is_the_papers_formula() -> None:
    values, target = rand(5, 8), rand(1, 8)
    got = without_concepts(values, target, Shift(2.0, 0.1, 3.0))
    for value, edited in zip(values, got):
        cosine = value @ target[0] / (value.norm() * target[0].norm())
        delta = 2 / (1 + math.exp(-3.0 * (cosine.item() - 0.1)))
        close(edited, value - delta * (value @ target[0]) / (target[0] @ target[0]) * target[0])


def test_adavd_leaves_what_is_orthogonal_to_all_concepts() -> None:
    values, targets = rand(3, 5, 8), rand(3, 8)
    edited = without_concepts(values, targets, Shift())
    close(edited @ targets.T, torch.zeros(3, 5, 3, dtype=torch.float64))
    close(edited, values - onto(values, subspace(targets)))
    close(without_concepts(edited, targets, Shift()), edited)


def test_adavd_of_several_concepts_shifts_each_target_and_projects_on_the_basis() -> None:
    values, targets, shift = rand(6, 8), rand(2, 8), Shift(2.0, 0.0, 2.0)
    first, second = targets
    second_basis = second - (second @ first) / (first @ first) * first
    for value, edited in zip(values, without_concepts(values, targets, shift)):
        delta = [2 / (1 + math.exp(-2 * (value @ t / value.norm() / t.norm()).item())) for t in targets]
        removed = (value @ first) / (first @ first) * delta[0] * first
        scaled = delta[1] * second - (second @ first) / (first @ first) * delta[0] * first
        removed += (value @ second_basis) / (second_basis @ second_basis) * scaled
        close(edited, value - removed)


def test_adavd_takes_concepts_that_say_the_same_or_nothing() -> None:
    values, target = rand(5, 8), rand(1, 8)
    once = without_concepts(values, target, Shift())
    close(without_concepts(values, torch.cat([target, -3 * target, target * 0]), Shift()), once)
    half = values.bfloat16()
    assert without_concepts(half, target.bfloat16(), Shift()).dtype is torch.bfloat16


# ---- SAFREE ---------------------------------------------------------------------------------


def test_safrees_projector_is_the_formula_and_idempotent() -> None:
    vectors = rand(3, 8)
    vectors = torch.cat([vectors, vectors[:1] * 2])  # of rank 3
    basis, columns = subspace(vectors), vectors.T
    projector = columns @ torch.linalg.pinv(columns.T @ columns) @ columns.T
    close(basis.T @ basis, projector)
    x = rand(5, 8)
    close(onto(x, basis), x @ projector)
    close(onto(onto(x, basis), basis), onto(x, basis))
    close((x - onto(x, basis)) @ vectors.T, torch.zeros(5, 4, dtype=torch.float64))


def test_safree_finds_the_token_that_carries_the_concept() -> None:
    """Without it the prompt is farther from the concept's subspace."""
    concept = torch.eye(6, dtype=torch.float64)[:1]
    masked = 0.1 * rand(4, 6) + 1
    masked[:, 0] = 5.0
    masked[2] *= torch.tensor([0, 3, 3, 3, 3, 3])
    assert Safree().triggers(masked, concept).tolist() == [False, False, True, False]
    for i in range(4):
        distance = [(p - p[0] * concept[0]).norm().item() for p in masked]
        others = sum(d for j, d in enumerate(distance) if j != i) / 3
        assert (distance[i] >= 1.01 * others) == (i == 2)
    assert Safree().triggers(masked[:1], concept).tolist() == [True]


def test_safree_projects_triggers_alone() -> None:
    tokens, masked, concepts = rand(4, 12), rand(4, 12), subspace(rand(2, 12))
    method = Safree()
    triggers = method.triggers(masked, concepts)
    assert triggers.any() and not triggers.all()
    got = method.filtered(tokens, masked, concepts)
    eye = torch.eye(12, dtype=torch.float64)
    of_concepts, inside = concepts.T @ concepts, subspace(masked).T @ subspace(masked)
    close(got[triggers], tokens[triggers] @ inside @ (eye - of_concepts))
    assert torch.equal(got[~triggers], tokens[~triggers])


def test_safree_filters_longer_where_it_changes_more() -> None:
    tokens = rand(4, 12)
    steps = [Safree().last_step(tokens, share * tokens + (1 - share) * rand(4, 12)) for share in (1, 0.5, 0)]
    assert steps[0] == 0 and steps == sorted(steps) and steps[2] == 10
    before, after = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[1.0, 1.0]]).double()
    beta = 1 - math.sqrt(0.5)
    expected = 10 / (1 + math.exp(-2 * 3.5 * (10 * beta - 2.9)))
    assert Safree(rise=3.5, middle=2.9).last_step(before, after) == round(expected)


# ---- UCE and RECE ---------------------------------------------------------------------------


def test_uce_solves_the_least_squares_problem() -> None:
    """The literal one: rows of a tall system, solved by QR."""
    weight, erased, kept, wanted = rand(5, 7), rand(3, 7), rand(2, 7), rand(3, 5)
    a, b, ridge = 1.3, 0.4, 0.2
    left = torch.cat([a**0.5 * erased, b**0.5 * kept, ridge**0.5 * torch.eye(7, dtype=torch.float64)])
    right = torch.cat([a**0.5 * wanted, b**0.5 * kept @ weight.T, ridge**0.5 * weight.T])
    form = ClosedForm(erased, kept, erase_scale=a, keep_scale=b, ridge=ridge)
    close(form.of(weight, wanted), torch.linalg.lstsq(left, right).solution.T)


def test_uce_answers_with_the_target_and_keeps_the_rest() -> None:
    weight, erased, kept, targets = rand(5, 9), rand(2, 9), rand(3, 9), rand(2, 9)
    form = ClosedForm(erased, kept, erase_scale=1.0, keep_scale=1.0, ridge=1e-9)
    edited = form.of(weight, answers(weight, erased, targets, False))
    torch.testing.assert_close(erased @ edited.T, targets @ weight.T, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(kept @ edited.T, kept @ weight.T, rtol=1e-6, atol=1e-6)
    same = form.of(weight, answers(weight, erased, erased, False))
    close(same, weight)


def test_the_orthogonal_answer_has_nothing_of_the_old_one() -> None:
    weight, erased, targets = rand(5, 9), rand(2, 9), rand(2, 9)
    got, before = answers(weight, erased, targets, True), erased @ weight.T
    close((got * before).sum(-1), torch.zeros(2, dtype=torch.float64))
    whole = answers(weight, erased, targets, False)
    close(whole, targets @ weight.T)
    assert torch.linalg.matrix_rank(torch.stack([whole[0] - got[0], before[0]])) == 1


def test_reces_embedding_is_the_minimiser() -> None:
    """By gradient, and by being better than what is near it."""
    pairs = [(rand(5, 6), rand(5, 6)) for _ in range(3)]
    concept, ridge = rand(1, 6), 0.1
    found = resurfacing(pairs, concept, ridge).requires_grad_()

    def loss(c: Tensor) -> Tensor:
        apart = sum(((edited @ c[0] - original @ concept[0]) ** 2).sum() for edited, original in pairs)
        return apart + ridge * (c**2).sum()

    (gradient,) = torch.autograd.grad(loss(found), found)
    close(gradient, torch.zeros_like(gradient))
    for _ in range(5):
        assert loss(found.detach() + 1e-3 * rand(1, 6)) > loss(found.detach())


def test_concepts_and_targets_are_paired_token_by_token() -> None:
    old, new = [rand(3, 4), rand(1, 4)], [rand(2, 4), rand(5, 4)]
    erased, targets = evened(old, new)
    assert torch.equal(erased, torch.cat(old))
    assert torch.equal(targets, torch.cat([new[0], new[0][-1:], new[1][:1]]))


# ---- task vectors ---------------------------------------------------------------------------


def test_task_vectors() -> None:
    before, trained = rand(3, 4), rand(3, 4)
    close(moved_away(before, trained, 0.7), before - 0.7 * (trained - before))
    assert torch.equal(moved_away(before, trained, 0.0), before)
    assert torch.equal(moved_away(before, before, 3.0), before)
    assert moved_away(before.half(), trained, 1.0).dtype is torch.float16


def test_the_smallest_strength_that_suffices() -> None:
    found = smallest_strength((0.5, 1.0, 1.5, 2.0), lambda a: [a, 2 * a], bound=1.2)
    assert found.strength == 1.5 and found.losses == {0.5: [0.5, 1.0], 1.0: [1.0, 2.0], 1.5: [1.5, 3.0]}
    with pytest.raises(ValueError, match="no strength of grid"):
        smallest_strength((0.5, 1.0), lambda a: [a], bound=1.0)  # it is not above
    for grid in ((), (1.0, 1.0), (1.0, 0.5)):
        with pytest.raises(ValueError, match="must be strengths that ascend"):
            smallest_strength(grid, lambda a: [a], bound=0.0)
    with pytest.raises(ValueError, match="nan"):
        smallest_strength((1.0,), lambda a: [math.nan], bound=0.0)


# ---- SLD and CRG ----------------------------------------------------------------------------


@pytest.mark.parametrize("kept", (0.9, 0.3, 1e-6))
def test_differences_of_predictions_become_differences_of_noise(kept: float) -> None:
    x, x0, other = rand(2, 3), rand(2, 3), rand(2, 3)

    def noise(x0: Tensor) -> Tensor:
        return (x - math.sqrt(kept) * x0) / math.sqrt(1 - kept)

    predictions = {
        "epsilon": noise,
        "sample": lambda x0: x0,
        "v_prediction": lambda x0: math.sqrt(kept) * noise(x0) - math.sqrt(1 - kept) * x0,
    }
    for kind, predict in predictions.items():
        close(noise_factor(kind, kept) * (predict(x0) - predict(other)), noise(x0) - noise(other))
    sigma = math.sqrt(1 - kept) / (math.sqrt(kept) + math.sqrt(1 - kept))  # of a flow with the same noise
    assert math.isclose((1 - sigma) ** 2 / ((1 - sigma) ** 2 + sigma**2), kept, rel_tol=1e-9)
    y = (1 - sigma) * x0 + sigma * x
    flows = [(y - clean) / sigma for clean in (x0, other)]
    noises = [(y - (1 - sigma) * clean) / sigma for clean in (x0, other)]
    close(noise_factor("flow_prediction", kept) * (flows[0] - flows[1]), noises[0] - noises[1])


def test_where_all_is_noise_no_prediction_counts() -> None:
    assert [noise_factor(kind, 0.0) for kind in ("sample", "v_prediction", "flow_prediction")] == [0, 0, 0]
    with pytest.raises(ValueError, match="prediction kind 'score'"):
        noise_factor("score", 0.5)


def literal_sld(
    e0: Tensor, ep: Tensor, es: Tensor, v: Tensor, method: Sld, step: int
) -> tuple[Tensor, Tensor]:
    """Equations 3 to 8 of the paper, element by element: the safety guidance and the next momentum."""
    gamma, following = torch.zeros_like(v), torch.zeros_like(v)
    for i in range(v.numel()):
        phi = method.strength * (ep.flatten()[i] - es.flatten()[i])
        near = ep.flatten()[i] - es.flatten()[i] < method.threshold
        mu = min(1.0, abs(phi)) if near else 0.0
        gamma.view(-1)[i] = mu * (es.flatten()[i] - e0.flatten()[i]) + method.momentum * v.flatten()[i]
        following.view(-1)[i] = method.inertia * v.flatten()[i] + (1 - method.inertia) * gamma.flatten()[i]
    return (gamma if step >= method.warmup else torch.zeros_like(gamma)), following


@pytest.mark.parametrize("preset", SLD)
def test_sld_is_the_papers_formula(preset: str) -> None:
    method = SLD[preset]
    state, v = State(), torch.zeros(2, 3, dtype=torch.float64)
    acted = False
    for step in range(18):
        e0, ep, es = rand(2, 3), rand(2, 3), rand(2, 3)
        es = torch.where(es > 0, ep + 1e-4 * es, es)  # some are near
        expected, v = literal_sld(e0, ep, es, v, method, step)
        close(method.step(ep, e0, [es], 1.0, state, step), expected)
        acted |= bool(expected.any())
    assert acted


def test_sld_means_noise_whatever_the_model_predicts() -> None:
    """The same step, told in clean pictures, gives the same change of the noise."""
    kept, method = 0.4, Sld(0, 30.0, 0.3, 0.3, 0.4)
    x = rand(2, 3)
    in_noise, in_pictures = State(), State()
    for step in range(3):
        pictures = [rand(2, 3) for _ in range(3)]
        noises = [(x - math.sqrt(kept) * x0) / math.sqrt(1 - kept) for x0 in pictures]
        factor = noise_factor("sample", kept)
        of_noise = method.step(noises[0], noises[1], [noises[2]], 1.0, in_noise, step)
        of_pictures = method.step(pictures[0], pictures[1], [pictures[2]], factor, in_pictures, step)
        assert of_noise.any()
        close(factor * of_pictures, of_noise)


def presence(prompt: Tensor, empty: Tensor, concept: Tensor, past: Tensor, gain: float) -> Tensor:
    nearer = (prompt - empty).square().sum(1) - (prompt - concept).square().sum(1)
    return gain / 2 * nearer + past


def test_crg_is_the_least_change_that_meets_the_threshold() -> None:
    method, state, past = Crg(threshold=0.5, gain=1.7), State(), torch.zeros(4, dtype=torch.float64)
    met = 0
    for weight in (0.3, 0.2, 0.1):
        e0, en = rand(4, 6), rand(4, 6)
        ep = torch.stack([en[0], e0[1], en[2] + 0.1 * rand(6), rand(6)])
        before = presence(ep, e0, en, past, 1.7)
        change = method.step(ep, e0, [en], 1.0, state, weight)
        after = presence(ep - change, e0, en, past, 1.7)
        over = before > 0.5
        met += int(over.sum())
        close(after[over], torch.full_like(after[over], 0.5))
        assert not change[~over].any() and (~over).any()
        direction = (en - e0) / (en - e0).norm(dim=1, keepdim=True)
        close(change, (change * direction).sum(1, keepdim=True) * direction)  # so none is shorter
        past = past + weight * ((ep - e0).square().sum(1) - (ep - en).square().sum(1))
    assert met >= 3


def test_crgs_evidence_is_the_likelihood_ratio_of_a_ddpms_path() -> None:
    kept, kept_next = 0.3, 0.45
    alpha, beta = kept / kept_next, 1 - kept / kept_next
    x, drawn, e0, en = rand(5), rand(5), rand(5), rand(5)

    def mean(noise: Tensor) -> Tensor:
        return (x - beta / math.sqrt(1 - kept) * noise) / math.sqrt(alpha)

    def log_density(noise: Tensor) -> Tensor:
        return -(mean(drawn) - mean(noise)).square().sum() / (2 * beta)

    ratio = path_weight(kept, kept_next) * ((drawn - e0).square().sum() - (drawn - en).square().sum())
    close(ratio, log_density(en) - log_density(e0))
    assert path_weight(0.0, 0.1) == 0 and path_weight(0.3, 0.3) == 0


def test_scores_add_up_over_concepts_and_survive_equal_predictions() -> None:
    ep, e0, one, two = (rand(2, 6) for _ in range(4))
    for method, last in ((Sld(0, 5.0, 9.0, 0.0, 0.0), 0), (Crg(threshold=-9.0), 0.2)):
        alone = [method.step(ep, e0, [c], 1.0, State(), last) for c in (one, two)]
        close(method.step(ep, e0, [one, two], 1.0, State(), last), alone[0] + alone[1])
        assert not method.step(ep, e0, [e0], 1.0, State(), last).isnan().any()
        assert not method.step(ep, e0, [one], 0.0, State(), last).any()
