# SPDX-License-Identifier: Apache-2.0
"""The methods that are measured: how each is applied to a batch of cases, and what it can be tuned in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from ...engine.bank import ConceptBank
from ...engine.concepts import Concept
from ...engine.policy import Policy
from ...integrations.diffusers import edits
from ...integrations.diffusers.contract import bare, denoiser, family
from ...integrations.diffusers.install import install
from ...operator.rule import Rule
from ..cases import Case
from ..model import DEFAULT_GUIDANCE
from ..world import World
from .learned import Learned

Value = float | str
Numbers = Mapping[str, Value]
Cases = Sequence[Case[Any]]


class Setting(Protocol):
    """What methods ask of the `Stage` that they are applied on."""

    pipe: Any
    world: World

    @property
    def scale(self) -> str:
        """How the pipeline calls the scale of classifier-free guidance."""

    def bank(self, cases: Cases, directions: bool = False) -> ConceptBank:
        """The concepts of these cases."""

    def known(self, given: Sequence[str]) -> str:
        """The name there of a concept that is known by these words."""

    def words(self, cases: Cases) -> dict[str, Concept]:
        """Each of these words as a concept of its own."""

    def learned_bank(self, cases: Cases) -> ConceptBank:
        """The concepts of these cases, learned from pictures."""

    @property
    def learned(self) -> Learned:
        """Weights that were trained on a concept."""


@dataclass(frozen=True)
class Range:
    """A number from `low` to `high`, both in the method's own units.

    Args:
        log: ratios rather than differences matter.
        whole: it is a whole number.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def check(self, name: str, value: Value) -> None:
        """Raise ValueError if it is none of these."""
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or (self.whole and not isinstance(value, int)):
            raise ValueError(f"{name}={value!r}: must be a {'whole ' * self.whole}number")


@dataclass(frozen=True)
class Choice:
    """One of some words.

    Args:
        joint: it changes nothing but on joint hosts.
    """

    words: tuple[str, ...]
    joint: bool = False

    def check(self, name: str, value: Value) -> None:
        """Raise ValueError if it is none of these."""
        if value not in self.words:
            raise ValueError(f"{name}={value!r}; allowed: {', '.join(self.words)}")


@dataclass(frozen=True)
class Method:
    """A way to negate.

    Args:
        name: as the tables have it.
        applied: `with method.applied(stage, cases, numbers) as changed:` negates the cases' concepts in calls
            of the stage's pipeline, which are made with the arguments `changed`. `numbers` replace the
            method's own, which are the published ones.
        tuned: names and ranges of the numbers that it is tuned in.
        strength: the one of them that says how far it goes, and its published value; presets have theirs as a
            factor of it.
        mixed: each case of a batch may have concepts of its own; otherwise they share them.
        guided: it needs classifier-free guidance.
        apart: it needs layers that attend to text alone, which joint hosts have not.
        learns: what it learns of a concept from pictures, "embeddings" or "weights"; "": nothing.
    """

    name: str
    applied: Callable[[Setting, Cases, Numbers], AbstractContextManager[dict[str, Any]]]
    tuned: Mapping[str, Range | Choice] = field(default_factory=dict)
    strength: tuple[str, float] | None = None
    mixed: bool = False
    guided: bool = False
    apart: bool = False
    learns: str = ""

    def check(self, numbers: Numbers) -> None:
        """Raise ValueError unless each is one that the method is tuned in."""
        for name, value in numbers.items():
            if name not in self.tuned:
                raise ValueError(
                    f"numbers: {self.name} has no {name!r}; allowed: {', '.join(self.tuned) or 'none'}"
                )
            self.tuned[name].check(name, value)

    def tuned_on(self, joint: bool) -> dict[str, Range | Choice]:
        """Those of `tuned` that change something on a host, `joint` or not."""
        return {name: of for name, of in self.tuned.items() if joint or not getattr(of, "joint", False)}

    def stronger(self, factor: float) -> dict[str, Value]:
        """Its numbers with so many times its published strength.

        Raises:
            ValueError: it has none.
        """
        if self.strength is None:
            raise ValueError(f"{self.name} has no strength")
        name, own = self.strength
        return {name: factor * own}


@contextmanager
def _nothing(_stage: Setting, _cases: Cases, _numbers: Numbers) -> Iterator[dict[str, Any]]:
    yield {}


@contextmanager
def _negative_prompt(stage: Setting, cases: Cases, numbers: Numbers) -> Iterator[dict[str, Any]]:
    """What users do without any method: name it in the negative prompt, and raise the guidance."""
    texts = [" and ".join(case.concepts) for case in cases]
    yield {"negative_prompt": texts, stage.scale: numbers.get("guidance", DEFAULT_GUIDANCE)}


@contextmanager
def _preset(
    name: str, stage: Setting, cases: Cases, numbers: Numbers, learned: bool = False
) -> Iterator[dict[str, Any]]:
    of_policy = {key: value for key, value in numbers.items() if key == "stop"}
    of_rule = {key: value for key, value in numbers.items() if key not in ("strength", "stop")}
    rule = Rule.preset(name, family=family(stage.pipe).constants(stage.pipe), **of_rule)
    strength = numbers.get("strength", 1.0)
    policies = [
        Policy(dict.fromkeys(map(stage.known, case.given), strength), **of_policy)  # type: ignore[arg-type]
        for case in cases
    ]
    bank = stage.learned_bank(cases) if learned else stage.bank(cases, directions=rule.reads.direction)
    engine = install(stage.pipe, bank, max_batch=len(cases), rule=rule)
    try:
        with engine.batch(policies):
            yield {}
    finally:
        engine.remove()


@contextmanager
def _edit(make: Callable[..., edits.Edit], stage: Setting, cases: Cases, numbers: Numbers) -> Any:
    with make(stage.pipe, stage.words(cases), **numbers):
        yield {}


@contextmanager
def _of_scores(make: Callable[..., edits.Edit], stage: Setting, cases: Cases, numbers: Numbers) -> Any:
    """They have a pass for each text: the concepts' own words, as a negative prompt would have them."""
    with make(stage.pipe, list(cases[0].concepts), **numbers):
        yield {}


@contextmanager
def _closed_form(make: Callable[..., edits.Edit], stage: Setting, cases: Cases, numbers: Numbers) -> Any:
    """Weights that forget words, and are to keep the world's other concepts, but for umbrella words."""
    world = stage.world
    away = {word for case in cases for concept in case.concepts for word in world.members(concept)}
    preserved = [c for c in world.CONCEPTS if world.members(c) == [c] and c not in away]
    kept: Case[Any] = Case("", (), (), (), tuple((word,) for word in preserved))
    with make(stage.pipe, stage.words(cases), preserve=stage.words([kept]), **numbers):
        yield {}


@contextmanager
def _task_vector(stage: Setting, cases: Cases, numbers: Numbers) -> Iterator[dict[str, Any]]:
    """Of several concepts: the sum of their vectors."""
    own = dict(bare(denoiser(stage.pipe)).named_parameters())
    trained = {name: weight.detach().clone() for name, weight in own.items()}
    for given in cases[0].given:
        for name, weight in stage.learned.weights(given).items():
            trained[name] += weight - own[name].detach()
    with edits.task_vector(stage.pipe, trained, **numbers):  # type: ignore[arg-type]
        yield {}


_STOP = {"stop": Range(0.5, 1.0)}
_TOKENS = {"tokens": Choice(("prompt", "prototype"))}


_SHARED = {"shared": Choice(("inside", "outside"), joint=True)}


def _of_preset(name: str, low: float, high: float, **more: Range | Choice) -> Method:
    tuned = {"strength": Range(low, high, log=True), **more, **_STOP}
    # In joint layers the prompt is a part of a larger softmax, where the operator refuses to retrieve, and no
    # directions are collected.
    apart = Rule.preset(name).direction in ("retrieve", "fixed")
    return Method(name, partial(_preset, name), tuned, ("strength", 1.0), mixed=True, apart=apart)


_GATED = {"threshold": Range(0.0, 0.9), "norm_limit": Range(1.0, 3.0)}

_METHODS = (
    Method("none", _nothing, mixed=True),
    Method(
        "negative prompt",
        _negative_prompt,
        {"guidance": Range(1.5, 15.0, log=True)},
        ("guidance", DEFAULT_GUIDANCE),
        mixed=True,
        guided=True,
    ),
    _of_preset("protore", 0.25, 4.0, **_GATED, **_SHARED),
    _of_preset("protore_retrieve", 0.25, 4.0, **_GATED),
    _of_preset("nag", 0.25, 8.0, blend=Range(0.05, 1.0), norm_limit=Range(1.0, 5.0), **_SHARED),
    _of_preset("vsf", 0.1, 8.0, logit_bias=Range(-4.0, 2.0)),
    _of_preset("eiup", 0.25, 8.0, **_SHARED),
    _of_preset("nasa", 0.5, 20.0, **_SHARED),
    _of_preset("ong", 0.1, 8.0, **_SHARED),
    _of_preset("casteer", 0.25, 4.0),
    Method(
        "ine",
        partial(_preset, "protore", learned=True),
        {"strength": Range(0.25, 4.0, log=True), **_GATED, **_SHARED, **_STOP},
        ("strength", 1.0),
        mixed=True,
        learns="embeddings",
    ),
    Method(
        "adavd",
        partial(_edit, edits.adavd),
        {"strength": Range(0.25, 4.0, log=True), "threshold": Range(-1.0, 0.99), **_TOKENS},
        ("strength", 1.0),
    ),
    Method(
        "safree",
        partial(_edit, edits.safree),
        {
            "most_steps": Range(1.0, 40.0, log=True),
            "margin": Range(0.0, 0.2),
            "rise": Range(0.5, 5.0),
            "middle": Range(0.0, 8.0),
        },
        ("most_steps", 10.0),
    ),
    Method(
        "sld",
        partial(_of_scores, edits.sld),
        {
            "strength": Range(20.0, 20000.0, log=True),
            "threshold": Range(0.0, 1.0),
            "warmup": Range(0, 15, whole=True),
            "momentum": Range(0.0, 0.9),
            "inertia": Range(0.0, 0.9),
        },
        ("strength", 1000.0),
        guided=True,
    ),
    Method(
        "crg",
        partial(_of_scores, edits.crg),
        {"strength": Range(0.25, 8.0, log=True), "gain": Range(0.1, 10.0, log=True)},
        ("strength", 1.0),
        guided=True,
    ),
    Method(
        "uce",
        partial(_closed_form, edits.uce),
        {
            "erase_scale": Range(0.05, 50.0, log=True),
            "preserve_scale": Range(0.05, 50.0, log=True),
            "ridge": Range(0.01, 10.0, log=True),
            **_TOKENS,
        },
        ("erase_scale", 1.0),
    ),
    Method(
        "rece",
        partial(_closed_form, edits.rece),
        {
            "erase_scale": Range(0.005, 5.0, log=True),
            "adversarial_ridge": Range(0.001, 10.0, log=True),
            "epochs": Range(1, 5, whole=True),
            **_TOKENS,
        },
        ("erase_scale", 0.1),
    ),
    Method(
        "task vector",
        _task_vector,
        {"strength": Range(0.5, 50.0, log=True)},
        ("strength", 1.0),
        learns="weights",
    ),
)

METHODS: Mapping[str, Method] = {method.name: method for method in _METHODS}
"""Every method by its name; the first is none."""


def method_of(name: str) -> Method:
    """Raises ValueError: no method of that name."""
    if name not in METHODS:
        raise ValueError(f"method={name!r}; allowed: {', '.join(METHODS)}")
    return METHODS[name]
