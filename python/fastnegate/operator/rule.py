# SPDX-License-Identifier: Apache-2.0
"""`Rule`: which similarity, gate, direction, combination and norm an operator call uses.

A rule is a small immutable value. Across boundaries it travels as two flat tuples, `Rule.codes` (integers)
and `Rule.numbers` (floats), whose order is fixed here; what it reads is derived here, too, as `Rule.reads`.

A word that is added here is refused by every backend, by name, until the backend lists it as its own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

SIMILARITIES = ("one", "cosine", "direction", "mass")
GATES = ("open", "step", "ramp", "sigmoid")
DIRECTIONS = ("raw", "difference", "orthogonal", "projection", "fixed", "retrieve")
COMBINES = ("separate", "joint")
SELECTS = ("all", "max")
NORMS = ("none", "limit", "preserve")
NORM_ORDERS = (1, 2)
SCOPES = ("head", "feature")
SHARED = ("inside", "joint", "outside")
CENTERS = ("none", "neutral")
TOKENS = ("full", "content", "weighted", "prototype", "none")

LARGEST, SMALLEST = 3.4028234663852886e38, 1.1754943508222875e-38  # of normal float32

_WORDS = {
    "similarity": SIMILARITIES,
    "gate": GATES,
    "direction": DIRECTIONS,
    "combine": COMBINES,
    "select": SELECTS,
    "norm": NORMS,
    "scope": SCOPES,
    "shared": SHARED,
    "center": CENTERS,
    "tokens": TOKENS,
}


# In the order of `Rule.codes` and `Rule.numbers`. The code of a word is its place in its tuple, that of
# norm_order the order itself.
CODES = (
    "similarity", "gate", "direction", "combine", "select", "norm", "norm_order", "scope", "shared", "center",
)  # fmt: skip
_NUMBERS = ("norm_limit", "blend", "temperature", "strength", "logit_bias", "threshold", "width", "cap")


class Reads(NamedTuple):
    """What a rule reads; the rest need not be there, and is not computed."""

    tokens: bool  # L_e or F_e: an entry without tokens does not exist
    direction: bool  # the fixed vector u: a concept without one does not exist
    products: bool  # <Z, Z>, <Z, F> and <F, F>
    mass: bool  # the share of the concept's softmax mass


@dataclass(frozen=True)
class Rule:
    """How concepts act on a query's attention output: `O = a Z + sum_e b_e X_e`.

    Args:
        similarity: `one`, `cosine`, `direction` or `mass`: the number r measured per query.
        gate: `open`, `step`, `ramp` or `sigmoid`: how r opens the gate g.
        direction: `raw`, `difference`, `orthogonal`, `projection`, `fixed` or `retrieve`: what is subtracted.
        combine: `separate` (`Z - sum strength g D`) or `joint` (one softmax over all; direction `raw`).
        select: `all`, or `max`: per query only the entry with the largest gate acts.
        norm: `none`, `limit` (output norm at most `norm_limit` times the input's) or `preserve`.
        norm_order: 1 or 2, the p of the norm; `preserve` needs 2.
        norm_limit: >= 1, the factor of `limit`.
        blend: in [0, 1]; the output is `blend * Y + (1 - blend) * Z`.
        scope: `head` or `feature`: over which channels inner products and norms run.
        shared: `inside`, `joint` or `outside`: which segments hold the keys that prompt and concepts
            share, in a call that has such keys. `joint` goes with combine `joint`, and only with it. None:
            `joint` there, else `inside`.
        center: `none`, or `neutral`: r and what is subtracted are measured from the row's neutral tokens:
            of Z - F0 and F - F0, where F0 is the attention to these (docs/semantics.md, section 11).
        temperature: softmax temperature of `retrieve`; None means 1 / scale.
        strength, logit_bias, threshold, width, cap: the numbers of an entry that does not name its
            own. `width=None` means `1 - threshold` of the entry.
        tokens: which tokens of a concept a `ConceptBank` hands to this rule: `full`, `content`,
            `weighted` (all of them, only content keeps its value), `prototype` or `none`.
        stop: default end of the active window, as a fraction of the denoising steps.
        name: shown in reports.

    Attributes:
        codes: the words as integers, in the order of `CODES`.
        numbers: norm_limit, blend, temperature (0: 1 / scale), then the numbers of an entry that names
            none: strength, logit_bias, threshold, width (0: 1 - threshold), cap.
        flat: both; rules that agree in it compute the same. `reads`: what the rule reads.

    Raises:
        ValueError: a word or number is outside what is allowed, or words do not go together.
    """

    similarity: str = "one"
    gate: str = "open"
    direction: str = "raw"
    combine: str = "separate"
    select: str = "all"
    norm: str = "none"
    norm_order: int = 2
    norm_limit: float = 1.0
    blend: float = 1.0
    scope: str = "head"
    shared: str | None = None
    center: str = "none"
    temperature: float | None = None
    strength: float = 1.0
    logit_bias: float = 0.0
    threshold: float = 0.0
    width: float | None = 1.0
    cap: float = 1.0
    tokens: str = "full"
    stop: float = 1.0
    name: str = "custom"
    codes: tuple[int, ...] = field(init=False, repr=False, compare=False)
    numbers: tuple[float, ...] = field(init=False, repr=False, compare=False)
    flat: tuple[float, ...] = field(init=False, repr=False, compare=False)
    reads: Reads = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.shared is None or isinstance(self.shared, _Implied):
            object.__setattr__(self, "shared", _implied(self.combine))
        for word, words in _WORDS.items():
            if getattr(self, word) not in words:
                raise ValueError(f"{word}={getattr(self, word)!r}: allowed are {', '.join(words)}")
        for number in ("strength", "logit_bias", "threshold", "norm_limit"):
            check_number(number, getattr(self, number))
        for number in ("blend", "cap", "stop"):
            check_number(number, getattr(self, number), low=0.0, high=1.0)
        if self.norm_limit < 1.0:
            raise ValueError(f"norm_limit={self.norm_limit!r}: must be >= 1")
        if type(self.norm_order) is not int or self.norm_order not in NORM_ORDERS:
            raise ValueError(
                f"norm_order={self.norm_order!r}: allowed are {', '.join(map(str, NORM_ORDERS))}"
            )
        for number in ("width", "temperature"):
            if getattr(self, number) is not None:
                check_number(number, getattr(self, number), above=0.0)
        if self.combine == "joint" and self.direction != "raw":
            raise ValueError(f"direction={self.direction!r}: combine='joint' needs direction='raw'")
        if (self.shared == "joint") is not (self.combine == "joint"):
            raise ValueError(
                f"shared={self.shared!r}: must be 'joint' with combine='joint', and only with it"
            )
        if self.direction == "retrieve" and self.scope != "head":
            raise ValueError(f"scope={self.scope!r}: direction='retrieve' needs scope='head'")
        if self.norm == "preserve" and self.norm_order != 2:
            raise ValueError(f"norm_order={self.norm_order!r}: norm='preserve' needs norm_order=2")
        if self.center == "neutral" and (other := _uncentred(self)) is not None:
            raise ValueError(f"center='neutral': means nothing with {other}")
        # Made once: every call of the operator asks for them.
        codes = tuple(_code(word, getattr(self, word)) for word in CODES)
        numbers = tuple(float(getattr(self, number) or 0.0) for number in _NUMBERS)
        for name, made in (
            ("codes", codes), ("numbers", numbers), ("flat", codes + numbers), ("reads", _reads(self)),
        ):  # fmt: skip
            object.__setattr__(self, name, made)

    def __repr__(self) -> str:
        """What differs from `Rule()`."""
        values = [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if f.init]
        plain = {f.name: f.default for f in dataclasses.fields(self)}
        plain["shared"] = _implied(self.combine)
        return f"Rule({', '.join(f'{name}={value!r}' for name, value in values if value != plain[name])})"

    @classmethod
    def preset(cls, name: str, *, family: str | None = None, **overrides: Any) -> Rule:
        """The published (or reconstructed) method `name`, with fields overridden by keyword.

        Args:
            name: one of `fastnegate.presets()`.
            family: model family whose published constants to use (`sd15`, `sd2`, `sdxl`, `pixart`,
                `sana`, `sd35`, `flux`, `zimage`, `wan`); only `nag` and `nasa` have such constants. None and
                families without published constants mean the Stable Diffusion 1.5 values.
            overrides: fields of `Rule`. A field that changes the method itself (a word, not a
                number) is written into the rule's name, e.g. `nag[scope=head]`: a per-head NAG is
                not NAG.

        Raises:
            ValueError: unknown preset, family or field value.
            TypeError: unknown field.
        """
        if name not in _PRESETS:
            raise ValueError(f"rule={name!r}: presets are {', '.join(_PRESETS)}")
        if family is not None and family not in FAMILIES:
            raise ValueError(f"family={family!r}: allowed are {', '.join(FAMILIES)}")
        published = _PUBLISHED.get((name, family or "sd15"), _PUBLISHED.get((name, "sd15"), {}))
        rule = dataclasses.replace(_PRESETS[name], name=name, **published)
        if "shared" in overrides and overrides["shared"] is None:
            overrides["shared"] = _implied(overrides.get("combine", rule.combine))
        changed = [f for f in _WORDS if f in overrides and overrides[f] != getattr(rule, f)]
        if overrides.get("combine", rule.combine) != rule.combine:
            overrides.setdefault("shared", None)
        if changed:
            name += "[" + ",".join(f"{f}={overrides[f]}" for f in changed) + "]"
        return dataclasses.replace(rule, **{"name": name, **overrides})

    @classmethod
    def from_flat(cls, codes: Sequence[int], numbers: Sequence[float]) -> Rule:
        """The inverse of `codes` and `numbers` (name, tokens and stop are not part of them).

        Raises:
            ValueError: there are more or fewer than a rule has, a code stands for no word, or a number is
                outside what is allowed.
        """
        return _from_flat(tuple(codes), tuple(numbers))

    @property
    def sums_over_heads(self) -> tuple[str, ...]:
        """What a kernel that sees one head at a time sums up before an output of this rule: "moments" (inner
        products of Z and F, <Z, u>, mass), "norms" (of Y and Z)."""
        if self.scope != "feature":
            return ()
        reads = self.reads
        moments = reads.products or reads.direction or reads.mass
        return ("moments",) * moments + ("norms",) * (self.norm != "none")


def _uncentred(rule: Rule) -> str | None:
    """The words of a rule that leave nothing to centre, or do not say what."""
    if rule.combine == "joint" or rule.direction == "retrieve":  # sums of values, and single tokens
        return "combine='joint'" if rule.combine == "joint" else "direction='retrieve'"
    if rule.direction == "difference" and rule.similarity in ("one", "mass"):  # F - F0 - (Z - F0)
        return f"direction='difference' and similarity={rule.similarity!r}"
    return None


class _Implied(str):
    """A word that nobody chose: it follows `combine` in copies of the rule."""


def _implied(combine: str) -> str:
    return _Implied("joint" if combine == "joint" else "inside")


def _reads(rule: Rule) -> Reads:
    return Reads(
        tokens=rule.similarity in ("cosine", "mass") or rule.direction != "fixed",
        direction=rule.similarity == "direction" or rule.direction == "fixed",
        products=rule.similarity == "cosine" or rule.direction in ("orthogonal", "projection"),
        mass=rule.similarity == "mass",
    )


def _code(word: str, value: Any) -> int:
    code: int = value if word == "norm_order" else _WORDS[word].index(value)
    return code


@functools.lru_cache(maxsize=1024)
def _from_flat(codes: tuple[int, ...], numbers: tuple[float, ...]) -> Rule:
    """Kept: the registered operator asks for the same rule at every call. Programs that were exported before
    there were `shared` and `center` hold fewer codes."""
    for name, values, names, later in (("codes", codes, CODES, 2), ("numbers", numbers, _NUMBERS, 0)):
        if not len(names) - later <= len(values) <= len(names):
            raise ValueError(f"{name} of a rule has {len(values)} values: must be {', '.join(names)}")
    fields: dict[str, Any] = dict(zip(_NUMBERS, numbers))
    for name in ("temperature", "width"):
        fields[name] = fields[name] or None
    for word, code in zip(CODES, codes):
        if word == "norm_order":
            fields[word] = code
        elif 0 <= code < len(_WORDS[word]):
            fields[word] = _WORDS[word][code]
        else:
            raise ValueError(f"{word} has code {code}: must be from 0 to {len(_WORDS[word]) - 1}")
    return Rule(**fields)


def check_number(
    name: str, value: Any, *, low: float = -math.inf, high: float = math.inf, above: float | None = None
) -> None:
    """Raise a ValueError that names `name` unless `value` is a finite float32 within the limits."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
        raise ValueError(f"{name}={value!r}: must be a finite number that float32 holds")
    if above is not None and value - above < SMALLEST:
        raise ValueError(f"{name}={value!r}: must be > {above:g}")
    if not low <= value <= high:
        raise ValueError(f"{name}={value!r}: must be in [{low:g}, {high:g}]")


FAMILIES = ("sd15", "sd2", "sdxl", "pixart", "sana", "sd35", "flux", "zimage", "wan")

# Sources: docs/semantics.md, section 5. `protore` and `ong` are reconstructions: the equations
# of those papers are not public.
_PRESETS = {
    # Dong et al., NeurIPS 2023: prototype -> retrieve negative features -> refine.
    "protore": Rule("cosine", "ramp", "projection", select="max", norm="limit", strength=2.0,
                    shared="outside", threshold=0.5, width=None, tokens="prototype"),
    "protore_retrieve": Rule("cosine", "ramp", "retrieve", select="max", norm="limit", strength=2.0,
                             shared="outside", threshold=0.5, width=None, tokens="prototype"),
    # arXiv 2408.01014 v2 (GIE): its own softmax, values of the content tokens only, first 80 %.
    "eiup": Rule(shared="outside", tokens="weighted", stop=0.8),
    # arXiv 2505.21179, eq. 7-10: strength is the paper's phi (public code's nag_scale is phi + 1).
    "nag": Rule(direction="difference", norm="limit", norm_order=1, scope="feature"),
    # arXiv 2508.10931: alpha, beta; NegPiP is beta = 0.
    "vsf": Rule(combine="joint", strength=3.3, logit_bias=0.1, tokens="content"),
    # arXiv 2412.02687, eq. 7-9.
    "nasa": Rule(shared="outside"),
    # arXiv 2605.29390, from the abstract.
    "ong": Rule(direction="orthogonal", scope="feature"),
    # arXiv 2503.09630: beta = 2 reflects; the published hook sits after the output projection.
    "casteer": Rule("direction", "step", "fixed", scope="feature", strength=2.0, tokens="none"),
}  # fmt: skip


def _nag(phi: float, alpha: float) -> dict[str, Any]:
    return {"strength": phi, "norm_limit": 2.5, "blend": alpha}


_PUBLISHED: dict[tuple[str, str], dict[str, Any]] = {
    ("nag", "sd15"): _nag(2.0, 0.375),
    ("nag", "sd2"): _nag(2.0, 0.375),
    ("nag", "sdxl"): _nag(2.0, 0.5),
    ("nag", "pixart"): _nag(4.0, 0.375),
    ("nag", "sana"): _nag(4.0, 0.375),
    ("nag", "sd35"): _nag(4.0, 0.125),
    ("nag", "flux"): _nag(4.0, 0.25),
    ("nag", "wan"): _nag(4.0, 0.25),
    # Its attention output is normed and gated, so a difference is enlarged: ComfyUI-NAG, pull request 64.
    ("nag", "zimage"): _nag(1.0, 0.25),
    ("nasa", "sd15"): {"strength": 0.1},
    ("nasa", "sd2"): {"strength": 0.2},
    ("nasa", "pixart"): {"strength": 0.5},
}


# Smallest and largest strength that somebody reports to work.
_RANGES = {("nag", "zimage"): (0.5, 1.3)}


def strength_range(name: str, *, family: str | None = None) -> tuple[float, float]:
    """The smallest and the largest strength that are reported to work, between which to look for one's own;
    where nobody reports any, half and twice the preset's, which is a rule of thumb. A policy's strengths are
    factors of `Rule.strength`. Arguments and errors as for `Rule.preset`."""
    strength = Rule.preset(name, family=family).strength
    return _RANGES.get((name, family or ""), (strength / 2, 2 * strength))


def presets() -> dict[str, Rule]:
    """Every preset by name, with the Stable Diffusion 1.5 constants where a method has several."""
    return {name: Rule.preset(name) for name in _PRESETS}
