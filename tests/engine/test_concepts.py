# SPDX-License-Identifier: Apache-2.0
"""`Concept`: which of its tokens a rule reads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastnegate import Concept, Rule
from fastnegate.engine.concepts import Role

SOT, CONTENT, EOT, PADDING = Role


def make_concept() -> Concept:
    roles = torch.tensor([SOT, CONTENT, CONTENT, EOT, PADDING], dtype=torch.int8)
    return Concept(torch.arange(10.0).view(5, 2), roles, (torch.ones(1, 2), torch.zeros(3, 2)), ("p", "q"))


@pytest.mark.parametrize(
    ("preset", "tokens", "weights"),
    [
        ("nag", [[0, 1, 2, 3, 4]], [None]),
        ("nasa", [[0, 1, 2, 3, 4]], [None]),
        ("ong", [[0, 1, 2, 3, 4]], [None]),
        ("vsf", [[1, 2]], [None]),
        ("eiup", [[0, 1, 2, 3, 4]], [[0, 1, 1, 0, 0]]),
    ],
)
def test_groups_of_prompt_tokens(preset: str, tokens: list, weights: list) -> None:
    concept = make_concept()
    groups = concept.groups(Rule.preset(preset))
    assert [g.embeddings.tolist() for g in groups] == [concept.prompt[t].tolist() for t in tokens]
    assert [None if g.weight is None else g.weight.tolist() for g in groups] == weights


@pytest.mark.parametrize("preset", ["protore", "protore_retrieve"])
def test_each_prototype_is_a_group(preset: str) -> None:
    concept = make_concept()
    groups = concept.groups(Rule.preset(preset))
    assert [g.embeddings for g in groups] == list(concept.prototypes)
    assert [g.weight for g in groups] == [None, None]


def test_a_concept_without_the_tokens_of_a_rule_is_refused() -> None:
    full = make_concept()
    with pytest.raises(ValueError, match=r"'casteer' reads a steering direction.*add_directions"):
        full.groups(Rule.preset("casteer"))
    with pytest.raises(ValueError, match="no prototype tokens for rule 'protore'"):
        Concept(full.prompt, full.roles, ()).groups(Rule.preset("protore"))
    empty = Concept(full.prompt, torch.full_like(full.roles, PADDING), full.prototypes)
    for preset in ("vsf", "eiup"):
        with pytest.raises(ValueError, match=f"for rule '{preset}'"):
            empty.groups(Rule.preset(preset))
    assert empty.groups(Rule.preset("nag"))
    with pytest.raises(ValueError, match="no full tokens"):
        Concept(full.prompt[:0], full.roles[:0], ()).groups(Rule.preset("nag"))


@pytest.mark.parametrize("preset", ["nag", "vsf", "eiup"])
def test_a_concept_of_too_many_members_serves_rules_that_read_prototypes(preset: str) -> None:
    full = make_concept()
    many = Concept(full.prompt[:0], full.roles[:0], full.prototypes, tuple("abcde"))
    assert [g.embeddings for g in many.groups(Rule.preset("protore"))] == list(many.prototypes)
    message = f"'a', 'b', 'c', 2 more: .*more members than one prompt holds, and rule '{preset}' reads"
    with pytest.raises(ValueError, match=message):
        many.groups(Rule.preset(preset))


def test_given_embeddings_are_copied() -> None:
    """A concept is what it was checked to be, whatever becomes of the caller's tensor."""
    given = torch.ones(2, 4)
    concept = Concept.from_embeddings(given)
    given.fill_(float("nan"))
    assert concept.prompt.isfinite().all() and concept.prototypes[0].isfinite().all()


def test_concepts_of_inference_tensors_are_ordinary() -> None:
    with torch.inference_mode():
        concept = Concept.from_embeddings(torch.ones(2, 4))
    assert not concept.prompt.is_inference() and not concept.prototypes[0].is_inference()


NAN, INF = float("nan"), float("inf")
ROLES = torch.tensor([CONTENT, EOT], dtype=torch.int8)


@pytest.mark.parametrize(
    ("prompt", "roles", "prototypes", "message"),
    [
        (torch.ones(2), ROLES, (), "prompt has shape"),
        (torch.ones(2, 2), ROLES.int(), (), "roles is torch.int32"),
        (torch.ones(2, 2), ROLES + 3, (), r"roles is torch.int8 \[4, 5\]: must be int8, of \[0, 1, 2, 3\]"),
        (torch.ones(3, 2), ROLES, (), "roles"),
        (torch.ones(2, 2), ROLES, (torch.ones(1, 3),), r"prototypes\[0\].*2"),
        (torch.ones(2, 2), ROLES, (torch.ones(1, 2), torch.ones(0, 2)), r"prototypes\[1\]"),
        (torch.tensor([[1.0, NAN], [0, 0]]), ROLES, (), "prompt holds nan"),
        (torch.ones(2, 2), ROLES, (torch.tensor([[INF, 0]]),), r"prototypes\[0\] holds nan or inf"),
    ],
)
def test_bad_concepts(prompt: Tensor, roles: Tensor, prototypes: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Concept(prompt, roles, prototypes)


def test_members_are_phrases() -> None:
    for members in ("cat", (1,)):
        with pytest.raises(ValueError, match=r"members=.*: must be a tuple of phrases"):
            Concept(torch.ones(2, 2), ROLES, (), members)  # type: ignore[arg-type]


def test_concepts_say_what_they_are() -> None:
    assert repr(make_concept()) == "Concept('p', 'q': prompt [5, 2], 2 prototypes)"
    assert (
        repr(Concept.from_embeddings(torch.ones(1, 4)))
        == "Concept(of embeddings: prompt [1, 4], 1 prototype)"
    )
