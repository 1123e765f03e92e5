# SPDX-License-Identifier: Apache-2.0
"""`Rule`: the numbers of the presets, their names, and what does not go together."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastnegate as fn
from fastnegate.operator.rule import (
    COMBINES,
    DIRECTIONS,
    FAMILIES,
    GATES,
    NORMS,
    SCOPES,
    SELECTS,
    SIMILARITIES,
    TOKENS,
    Rule,
    presets,
    strength_range,
)

# The table of the definition: similarity, gate, direction, combine, select, norm, order, limit, blend,
# scope, tokens, strength, logit_bias, threshold, width, cap, stop.
TABLE = {
    "protore": ("cosine", "ramp", "projection", "separate", "max", "limit", 2, 1.0, 1.0, "head", "prototype",
                2.0, 0.0, 0.5, None, 1.0, 1.0),
    "protore_retrieve": ("cosine", "ramp", "retrieve", "separate", "max", "limit", 2, 1.0, 1.0, "head",
                         "prototype", 2.0, 0.0, 0.5, None, 1.0, 1.0),
    "eiup": ("one", "open", "raw", "separate", "all", "none", None, None, 1.0, "head", "weighted",
             1.0, 0.0, None, None, 1.0, 0.8),
    "nag": ("one", "open", "difference", "separate", "all", "limit", 1, 2.5, 0.375, "feature", "full",
            2.0, 0.0, None, None, 1.0, 1.0),
    "vsf": ("one", "open", "raw", "joint", "all", "none", None, None, 1.0, "head", "content",
            3.3, 0.1, None, None, 1.0, 1.0),
    "nasa": ("one", "open", "raw", "separate", "all", "none", None, None, 1.0, "head", "full",
             0.1, 0.0, None, None, 1.0, 1.0),
    "ong": ("one", "open", "orthogonal", "separate", "all", "none", None, None, 1.0, "feature", "full",
            1.0, 0.0, None, None, 1.0, 1.0),
    "casteer": ("direction", "step", "fixed", "separate", "all", "none", None, None, 1.0, "feature", "none",
                2.0, 0.0, 0.0, None, 1.0, 1.0),
}  # fmt: skip
FIELDS = (
    "similarity", "gate", "direction", "combine", "select", "norm", "norm_order", "norm_limit", "blend",
    "scope", "tokens", "strength", "logit_bias", "threshold", "width", "cap", "stop",
)  # fmt: skip


def test_presets_are_those_of_the_definition() -> None:
    assert list(fn.presets()) == list(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_preset_numbers(name: str) -> None:
    rule = fn.presets()[name]
    assert rule == Rule.preset(name) and rule.name == name
    for field, expected in zip(FIELDS, TABLE[name]):
        unused = expected is None and field != "width"  # a number the preset does not read
        assert unused or getattr(rule, field) == expected or (field == "width" and rule.gate != "ramp"), field


# strength, norm_limit, blend of NAG and strength of NASA by model family
NAG = {
    "sd15": (2.0, 2.5, 0.375),
    "sd2": (2.0, 2.5, 0.375),
    "sdxl": (2.0, 2.5, 0.5),
    "pixart": (4.0, 2.5, 0.375),
    "sana": (4.0, 2.5, 0.375),
    "sd35": (4.0, 2.5, 0.125),
    "flux": (4.0, 2.5, 0.25),
    "zimage": (1.0, 2.5, 0.25),
    "wan": (4.0, 2.5, 0.25),
}
NASA = {"sd15": 0.1, "sd2": 0.2, "pixart": 0.5}


@pytest.mark.parametrize("family", FAMILIES)
def test_family_constants(family: str) -> None:
    nag = Rule.preset("nag", family=family)
    assert (nag.strength, nag.norm_limit, nag.blend) == NAG[family]
    assert Rule.preset("nasa", family=family).strength == NASA.get(family, 0.1)
    for name in set(TABLE) - {"nag", "nasa"}:
        assert Rule.preset(name, family=family) == Rule.preset(name)
    assert nag.name == "nag" and set(NAG) == set(FAMILIES)


def test_strength_ranges_hold_the_preset() -> None:
    for name in presets():
        for family in (None, *FAMILIES):
            low, high = strength_range(name, family=family)
            assert 0 < low <= Rule.preset(name, family=family).strength <= high
    assert strength_range("nag", family="zimage") == (0.5, 1.3) and strength_range("nag") == (1.0, 4.0)
    with pytest.raises(ValueError, match="family='flux9'"):
        strength_range("nag", family="flux9")


def test_overrides_are_told_in_the_name_where_they_change_the_method() -> None:
    assert Rule.preset("nag", scope="head").name == "nag[scope=head]"
    assert Rule.preset("protore", select="all", norm="none").name == "protore[select=all,norm=none]"
    assert Rule.preset("nag", strength=3.0, blend=0.5).name == "nag"
    assert Rule.preset("nag", scope="feature").name == "nag"
    assert Rule.preset("nag", scope="head") == dataclasses.replace(
        Rule.preset("nag"), scope="head", name="nag[scope=head]"
    )
    assert Rule.preset("protore", threshold=0.25).threshold == 0.25


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Rule.preset("nope"), ("rule='nope'", "protore", "casteer")),
        (lambda: Rule.preset("nag", family="sd9"), ("family='sd9'", "sdxl")),
        (lambda: Rule.preset("nag", scope="layer"), ("scope='layer'", "head, feature")),
        (lambda: Rule(similarity="dot"), ("similarity='dot'", "cosine")),
        (lambda: Rule(gate="Ramp"), ("gate='Ramp'", "ramp")),
        (lambda: Rule(direction=None), ("direction=None", "raw")),
        (lambda: Rule(combine="sum"), ("combine='sum'", "joint")),
        (lambda: Rule(select="min"), ("select='min'", "max")),
        (lambda: Rule(norm="l2"), ("norm='l2'", "preserve")),
        (lambda: Rule(scope=0), ("scope=0", "feature")),
        (lambda: Rule(tokens="all"), ("tokens='all'", "prototype")),
        (lambda: Rule(norm_order=3), ("norm_order=3", "1, 2")),
        (lambda: Rule(norm_order=1.5), ("norm_order=1.5",)),
        (lambda: Rule(norm_order=True), ("norm_order=True",)),
        (lambda: Rule(norm_order=2.0), ("norm_order=2.0",)),
        (lambda: Rule(norm_limit=0.9), ("norm_limit=0.9", ">= 1")),
        (lambda: Rule(norm_limit=float("inf")), ("norm_limit=inf", "finite")),
        (lambda: Rule(blend=1.5), ("blend=1.5", "[0, 1]")),
        (lambda: Rule(blend=-0.5), ("blend=-0.5",)),
        (lambda: Rule(cap=2.0), ("cap=2.0", "[0, 1]")),
        (lambda: Rule(stop=-1.0), ("stop=-1.0",)),
        (lambda: Rule(width=0.0), ("width=0.0", "> 0")),
        (lambda: Rule(width=-1.0), ("width=-1.0",)),
        (lambda: Rule(temperature=0.0), ("temperature=0.0", "> 0")),
        (lambda: Rule(strength=float("nan")), ("strength=nan", "finite")),
        (lambda: Rule(threshold=float("inf")), ("threshold=inf", "finite")),
        (lambda: Rule(logit_bias="1"), ("logit_bias='1'", "finite")),
        (lambda: Rule(strength=None), ("strength=None",)),
        (lambda: Rule(combine="joint", direction="difference"), ("direction='difference'", "joint", "raw")),
        (lambda: Rule(direction="retrieve", scope="feature"), ("scope='feature'", "retrieve", "head")),
        (lambda: Rule(norm="preserve", norm_order=1), ("norm_order=1", "preserve", "2")),
        (lambda: Rule.preset("vsf", direction="orthogonal"), ("direction='orthogonal'", "joint")),
    ],
)  # fmt: skip
def test_what_is_refused(make, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


def test_an_unknown_field_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        Rule.preset("nag", lambda_=2.0)


def test_every_other_combination_is_legal() -> None:
    for words in itertools.product(SIMILARITIES, GATES, DIRECTIONS, COMBINES, SELECTS, NORMS, (1, 2), SCOPES):
        similarity, gate, direction, combine, select, norm, order, scope = words
        legal = (
            (combine == "separate" or direction == "raw")
            and (scope == "head" or direction != "retrieve")
            and (order == 2 or norm != "preserve")
        )
        try:
            rule = Rule(similarity, gate, direction, combine, select, norm, order, scope=scope)
        except ValueError:
            assert not legal, words
        else:
            assert legal, words
            assert Rule.from_flat(rule.codes, rule.numbers) == rule
    # As programs hold it that were exported before there was `center`, or `shared`.
    assert Rule.from_flat(rule.codes[:-1], rule.numbers) == rule
    if rule.shared != "outside":
        assert Rule.from_flat(rule.codes[:-2], rule.numbers) == rule


finite = st.floats(-1e6, 1e6)
positive = st.floats(1e-6, 1e6)
share = st.floats(0, 1)


@given(
    st.builds(
        Rule,
        similarity=st.sampled_from(SIMILARITIES),
        gate=st.sampled_from(GATES),
        select=st.sampled_from(SELECTS),
        norm=st.sampled_from(("none", "limit")),
        norm_order=st.sampled_from((1, 2)),
        norm_limit=st.floats(1, 1e6),
        blend=share,
        scope=st.sampled_from(SCOPES),
        shared=st.sampled_from((None, "inside", "outside")),
        temperature=st.none() | positive,
        strength=finite,
        logit_bias=finite,
        threshold=finite,
        width=st.none() | positive,
        cap=share,
    )
)
def test_codes_and_numbers_say_it_all(rule: Rule) -> None:
    assert len(rule.codes) == 10 and all(type(code) is int for code in rule.codes)
    assert len(rule.numbers) == 8 and all(isinstance(number, float) for number in rule.numbers)
    assert Rule.from_flat(rule.codes, rule.numbers) == rule


@pytest.mark.parametrize("name", TABLE)
def test_presets_go_through_codes_and_numbers(name: str) -> None:
    rule = Rule.preset(name)
    back = Rule.from_flat(rule.codes, rule.numbers)
    assert dataclasses.replace(back, name=name, tokens=rule.tokens, stop=rule.stop) == rule


def test_the_order_of_words_is_that_of_the_kernels() -> None:
    """csrc/include/fastnegate/problem.h lists the same words in the same order."""
    assert SIMILARITIES == ("one", "cosine", "direction", "mass")
    assert GATES == ("open", "step", "ramp", "sigmoid")
    assert DIRECTIONS == ("raw", "difference", "orthogonal", "projection", "fixed", "retrieve")
    assert COMBINES == ("separate", "joint") and SELECTS == ("all", "max")
    assert NORMS == ("none", "limit", "preserve") and SCOPES == ("head", "feature")
    assert TOKENS == ("full", "content", "weighted", "prototype", "none")


def test_what_a_rule_reads() -> None:
    assert Rule.preset("nasa").reads.tokens and not Rule.preset("nasa").reads.direction
    assert Rule.preset("casteer").reads.direction and not Rule.preset("casteer").reads.tokens
    both = Rule("direction", "step", "raw")
    assert both.reads.tokens and both.reads.direction
    assert Rule("mass", "open", "fixed").reads.tokens and Rule("mass", "open", "fixed").reads.direction


@pytest.mark.parametrize("rule", [Rule(), *fn.presets().values(), Rule.preset("nag", scope="head")])
def test_a_rule_shows_what_makes_it_one(rule: Rule) -> None:
    assert eval(repr(rule), {"Rule": Rule}) == rule
    assert repr(Rule()) == "Rule()" and len(repr(rule)) < 250
