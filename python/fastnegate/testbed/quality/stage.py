# SPDX-License-Identifier: Apache-2.0
"""A host with the world that it draws, guided in one way: where methods are measured."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...engine.bank import ConceptBank
from ...engine.concepts import Concept
from ...engine.errors import UnsupportedModelError
from ...engine.host import of
from ...integrations.diffusers.contract import denoisers
from ...integrations.diffusers.learned.means import contrasts
from ..cases import SPLITS, Case
from ..model import DEFAULT_GUIDANCE, DEFAULT_STEPS, load
from ..parts import ShortFluxPipeline
from ..world import World
from .learned import Learned
from .methods import Method, Numbers

GUIDANCE = ("cfg", "free")
"""With classifier-free guidance at the host's default scale; or without any, in half the passes."""

BATCH = 32
"""The most pictures that are drawn together."""

_PAIRS = 16  # of prompts, for a direction
_FOLDER = Path(__file__).parent.parent


class Stage:
    """Where methods are measured.

    Args:
        host: one of `testbed.HOSTS`.
        guidance: one of `GUIDANCE`.
        kept: a folder for what is learned from pictures, which takes a minute for each concept; None: it is
            kept in memory.

    Attributes:
        pipe: the pipeline.
        world: what it draws.
        joint: whether image and text are in one attention.

    Raises:
        ValueError: another host or guidance.
    """

    def __init__(self, host: str, guidance: str = "cfg", kept: Path | None = None) -> None:
        if guidance not in GUIDANCE:
            raise ValueError(f"guidance={guidance!r}; allowed: {', '.join(GUIDANCE)}")
        self.host, self.guidance = host, guidance
        self.pipe: Any = load(host)
        self.world: World = self.pipe.tokenizer.world
        self.joint = isinstance(self.pipe, ShortFluxPipeline)
        self._bank: ConceptBank | None = None
        self._kept = kept

    @cached_property
    def learned(self) -> Learned:
        """What is learned from pictures of concepts."""
        return Learned(self.pipe, self.world, self._identity, self._kept)

    def bank(self, cases: Sequence[Case[Any]], directions: bool = False) -> ConceptBank:
        """The concepts of these cases, by the names that they are `known` by; with `directions` if asked."""
        wanted = {self.known(given): given for case in cases for given in case.given}
        missing = {name: given for name, given in wanted.items() if not self._bank or name not in self._bank}
        if missing:
            made = ConceptBank.from_prompts(self.pipe, missing, templates=self.world.templates)
            old = {} if self._bank is None else dict(self._bank.snapshot().concepts)
            self._bank = ConceptBank({**old, **made.snapshot().concepts}, made.fingerprint, self.pipe)
        assert self._bank is not None
        if directions:
            self._find_directions(self._bank, wanted)
        return ConceptBank({name: self._bank[name] for name in wanted}, self._bank.fingerprint, self.pipe)

    def learned_bank(self, cases: Sequence[Case[Any]]) -> ConceptBank:
        """The same concepts, known by embeddings that were learned from pictures."""
        wanted = {self.known(given): given for case in cases for given in case.given}
        concepts = {name: self.learned.concept(given) for name, given in wanted.items()}
        return ConceptBank(concepts, of(self.pipe).fingerprint(self.pipe), self.pipe)

    def known(self, given: Sequence[str]) -> str:
        """The name of a concept in `bank`: the words that it is known by, in some suites not all."""
        return ", ".join(given)

    def _find_directions(self, bank: ConceptBank, wanted: Mapping[str, Sequence[str]]) -> None:
        pairs = {}
        for name, words in wanted.items():
            if bank[name].directions is None:
                every = contrasts(self.pipe, words)
                pairs[name] = every[:: -(-len(every) // _PAIRS)]
        if pairs:
            bank.add_directions(self.pipe, pairs, batch=BATCH, **self._steps())

    def words(self, cases: Sequence[Case[Any]]) -> dict[str, Concept]:
        """Each word that these negations may know their concepts by, as a concept of its own."""
        words = dict.fromkeys(word for case in cases for given in case.given for word in given)
        alone: Case[Any] = Case("", (), (), (), tuple((word,) for word in words))
        bank = self.bank([alone])
        return {word: bank[word] for word in words}

    def draw(
        self,
        method: Method,
        numbers: Numbers,
        cases: Sequence[Case[Any]],
        noise: Sequence[int],
        on_step: Callable[[], None] = lambda: None,
    ) -> NDArray[np.float32]:
        """Pictures [B, SIZE, SIZE, 3] in [0, 1] of the cases' prompts with their concepts negated.

        Args:
            method: of `METHODS`; one that is not `mixed` takes cases of the same concepts.
            numbers: of the method, in place of its own; all of them known to it.
            cases: at most as many as memory allows; they share a batch.
            noise: a seed for each.
            on_step: called after each denoising step.

        Raises:
            UnsupportedModelError: the method does not fit this host, or its guidance.
        """
        if method.guided and self.guidance != "cfg":
            raise UnsupportedModelError(f"{method.name} needs classifier-free guidance")
        if method.apart and self.joint:
            raise UnsupportedModelError(f"{method.name} needs layers that attend to text alone")

        def on_step_end(_pipe: Any, _i: int, _t: Any, values: dict[str, Any]) -> dict[str, Any]:
            on_step()
            return values

        call = {
            "prompt": [case.prompt for case in cases],
            "generator": [torch.Generator().manual_seed(seed) for seed in noise],
            "output_type": "np",
            "callback_on_step_end": on_step_end,
            **self.call(len(cases)),
        }
        with _unwarned(), method.applied(self, cases, numbers) as changed:
            return np.asarray(self.pipe(**{**call, **changed}).images)

    @property
    def scale(self) -> str:
        """How this pipeline calls the scale of classifier-free guidance."""
        return "true_cfg_scale" if self.joint else "guidance_scale"

    def call(self, pictures: int) -> dict[str, Any]:
        """How the pipeline is called here, beside what is to be drawn."""
        if self.joint and self.guidance == "cfg":
            return {**self._steps(), "negative_prompt": [""] * pictures}
        return self._steps()

    def _steps(self) -> dict[str, Any]:
        scale = DEFAULT_GUIDANCE if self.guidance == "cfg" else 1.0
        return {"num_inference_steps": DEFAULT_STEPS, self.scale: scale}

    def fingerprint(self, cases: Sequence[Case[Any]], learns: str = "") -> str:
        """Changes with the host's weights, its world's judge, the cases, and what a method `learns` of their
        concepts: with all that verdicts are of, but the method."""
        givens = dict.fromkeys(given for case in cases for given in case.given) if learns else ()
        learned = "".join(" " + self.learned.key(learns, given) for given in givens)
        return sha256(f"{self._identity} {list(cases)!r}{learned}".encode()).hexdigest()[:16]

    @cached_property
    def _identity(self) -> str:
        digest = sha256()
        models = (*denoisers(self.pipe).values(), self.pipe.text_encoder)
        for model in (*models, getattr(self.pipe, "text_encoder_2", None)):
            for name, weight in model.state_dict().items() if model is not None else ():
                digest.update(name.encode() + weight.contiguous().view(torch.uint8).numpy().tobytes())
        for file in _judges(self.world.NAME):
            digest.update(file.read_bytes())
        return digest.hexdigest()


@contextmanager
def _unwarned() -> Iterator[None]:
    """What a method leaves in a picture is counted here; a warning for each concept says no more."""
    log = logging.getLogger("fastnegate")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def noise_of(seed: int, index: int, split: str) -> int:
    """The seed of a case's noise: the same for all suites and methods, another one in each split."""
    return seed + index + 2**40 * SPLITS.index(split)


def _judges(world: str) -> list[Path]:
    """The files that verdicts depend on."""
    own = [_FOLDER / world / name for name in ("detector.py", "drawing.py")]
    return [*(_FOLDER / f"{name}.py" for name in ("blobs", "shapes", "verdict")), *filter(Path.exists, own)]
