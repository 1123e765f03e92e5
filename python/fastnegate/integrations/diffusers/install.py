# SPDX-License-Identifier: Apache-2.0
"""Put an `Engine` into a pipeline and take it out again."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from ...engine import host
from ...engine.bank import ConceptBank
from ...engine.concepts import Templates
from ...engine.engine import Engine
from ...engine.errors import NegationNotAppliedError, UnsupportedModelError
from ...engine.policy import Policy
from ...engine.session.slots import check_neutral
from ...operator.choice import check_backend
from ...operator.rule import Rule
from .by_hand import release
from .contract import bare, cross_attention_layers, denoiser, denoisers, encoders_of, family, text_tokenizer
from .hook import INSTALLED, Hook
from .joint.hook import wrap

MOST_IMAGES = 64  # of one call under `negate`, which is not told how many there will be
ON_DISPLACED = ("raise", "warn", "reinstall")


def engine_of(pipe: Any) -> Engine | None:
    """The engine installed in the pipeline, or None."""
    references = (INSTALLED.get(bare(model)) for model in denoisers(pipe).values())
    return next((reference() for reference in references if reference is not None), None)


def processors_for(pipe: Any, engine: Engine, backend: str = "auto") -> dict[str, Any]:
    """A complete dict for `set_attn_processor`: cross-attention layers wrapped, the rest as it is.

    Raises:
        UnsupportedModelError: a layer has a processor that cannot be wrapped.
    """
    processors = dict(bare(denoiser(pipe)).attn_processors)
    for name in cross_attention_layers(denoiser(pipe)):
        key = f"{name}.processor"
        processors[key] = wrap(family(pipe).joint, engine, name, processors[key], backend)
    return processors


def install(
    pipe: Any,
    bank: ConceptBank,
    max_batch: int = 8,
    on_displaced: str = "raise",
    *,
    rule: Rule | str | None = None,
    backend: str = "auto",
    unasked: str = "plain",
    max_tokens: int | None = None,
    sound: bool = False,
) -> Engine:
    """Install per-request concept negation in a pipeline.

    Compile the denoiser before, not after: what prepares each call must stay outside the compiled code.

    Args:
        pipe: a supported diffusers pipeline.
        bank: concepts made with this pipeline's text encoders.
        max_batch: the most images (requests x images per prompt) in one call.
        on_displaced: what to do when something else has replaced an installed processor, an attention module
            or the pipeline's denoiser: `raise` (default), `warn`, or `reinstall`.
        rule: `Rule` or preset name; presets take the constants of the pipeline's family. By default the
            family's: `protore` for UNets and PixArt, `nag` as published for Sana, video and joint models.
        backend: as for `negated_attention`; a named backend never falls back.
        unasked: what becomes of a call that is in no `engine.batch` while nothing is set for everybody:
            `plain` (default) runs it without negation, which is logged once; `raise` stops it, so that no
            request can be forgotten. Servers want `raise`: a batch whose policies are None asks for nothing.
        max_tokens: of models in whose text concepts ride: the most tokens that the concepts of a row may have
            together; more raise before the first step. Compiled code is made for so many, so that no other
            concept compiles it again. Default: as many as there are, and compiled again for more.
        sound: of LTX-2: negate in what the sound reads as well; it has attention to text of its own.

    Returns:
        The engine: `with engine.batch(policies): pipe(prompts)`, and `engine.remove()`.

    Raises:
        UnsupportedModelError: unknown pipeline, no denoiser in it, a processor that cannot be wrapped, or a
            rule that retrieves tokens in a joint model.
        BankMismatchError: the bank belongs to another text encoder.
        ValueError: bad arguments, or an engine is installed already.
    """
    if on_displaced not in ON_DISPLACED:
        raise ValueError(f"on_displaced={on_displaced!r}: allowed are {', '.join(ON_DISPLACED)}")
    if not isinstance(bank, ConceptBank):
        raise TypeError(f"bank is a {type(bank).__name__}: must be a ConceptBank")
    check_backend(backend)
    entry = family(pipe)
    if max_tokens is not None and (not _whole(max_tokens) or entry.joint is None):
        allowed = "must be an int >= 1" if entry.joint is not None else "concepts ride in joint models alone"
        raise ValueError(f"max_tokens={max_tokens!r}: {allowed}")
    if sound and entry.connectors is None:
        raise ValueError(f"sound={sound!r}: {type(pipe).__name__} makes none")
    if engine_of(pipe) is not None:
        raise ValueError("pipe has an engine already: call its remove() first, or fastnegate.remove(pipe)")
    if not denoisers(pipe):
        raise UnsupportedModelError(f"pipe.{entry.denoisers[0]} is None: there is nothing to install in")
    bank.check(pipe)
    if rule is None or isinstance(rule, str):
        rule = Rule.preset(rule or entry.method, family=entry.constants(pipe))
    if not isinstance(rule, Rule):
        raise TypeError(f"rule is a {type(rule).__name__}: must be a Rule or the name of a preset")
    if entry.joint is not None and rule.direction == "retrieve":
        raise UnsupportedModelError(
            f"rule {rule.name!r}: direction='retrieve' reads the prompt's own tokens, and in "
            f"{type(pipe).__name__} they share one softmax with the image"
        )
    of_pipe = weakref.ref(pipe)
    engine = Engine(
        bank,
        rule,
        (),  # which the hook names
        max_batch=max_batch,
        unasked=unasked,
        encode=lambda text: host.of(_living(of_pipe)).negative_prompt(_living(of_pipe), text),
        check_text=lambda text: host.of(_living(of_pipe)).check_negative_prompt(_living(of_pipe), text),
        encoder_state=functools.partial(_encoder_state, of_pipe),
    )
    hook = Hook(pipe, engine, on_displaced, backend, max_tokens, sound)
    engine.on_remove(hook.remove)
    hook.put()
    return engine


def _whole(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 1


def _living(pipe: weakref.ref[Any]) -> Any:
    living = pipe()
    if living is None:
        raise NegationNotAppliedError("the pipeline that the engine was installed in is gone")
    return living


def _encoder_state(pipe: weakref.ref[Any]) -> Hashable:
    """Which text encoders the pipeline has, their weights, and how many words their tokenizers know: learned
    words and adapters change what a text means. None if an encoder was freed."""
    living = pipe()
    state: list[int] = []
    for names in encoders_of(living) if living is not None else ():
        tokenizer, encoder = (getattr(living, name, None) for name in names)
        if tokenizer is None or encoder is None:
            return None
        state += [id(tokenizer), len(text_tokenizer(tokenizer)), id(encoder)]
        for weight in encoder.parameters():
            state += [id(weight), 0 if weight.is_inference() else weight._version]
    return tuple(state)


def remove(pipe: Any) -> None:
    """Take everything of this package out of a pipeline: an installed engine, `negate`, and processors that
    were set by hand. Nothing to do is no error.

    Raises:
        UnsupportedModelError: not a supported pipeline, so there is nothing of this package in it.
    """
    engine = engine_of(pipe)
    if engine is not None:
        engine.remove()
    for model in denoisers(pipe).values():
        release(bare(model))


class Handle:
    """What `negate` returns: a context manager, and `remove()` for use without `with`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def remove(self) -> None:
        """Restore exactly what was there."""
        self.engine.remove()

    def __enter__(self) -> Handle:
        if self.engine.removed:
            raise NegationNotAppliedError("this handle was removed: call negate again")
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"Handle({self.engine!r})"


def negate(
    pipe: Any,
    concepts: str | Sequence[str] | Mapping[str, str | Sequence[str]] | ConceptBank | None = None,
    method: Rule | str | None = None,
    strength: float = 1.0,
    start: float = 0.0,
    stop: float | None = None,
    *,
    negative_prompts: Sequence[str | None] | None = None,
    templates: Templates | None = None,
    backend: str = "auto",
) -> Handle:
    """Negate concepts, or one negative prompt per prompt, in every call of a pipeline, until removed. It
    holds for everybody: calls of all threads.

    Args:
        pipe: a supported diffusers pipeline.
        concepts: a phrase, several (each its own concept), a mapping from names to member phrases,
            or a `ConceptBank`.
        method: `Rule` or preset name; default as `install` has it.
        strength: relative; 1.0 is the method's own.
        start, stop: active window as fractions of the steps; `stop=None` is the method's own.
        negative_prompts: one text per prompt of the calls to come (None: nothing for that prompt), or one for
            all; beside the concepts, if there are any. Each is encoded once.
        templates: as for `ConceptBank.from_prompts`.
        backend: as for `negated_attention`.

    Raises:
        UnsupportedModelError, BankMismatchError, ValueError: as `install`; or neither concepts nor negative
            prompts.
        TypeError: `negative_prompts` that are not a list of texts.
    """
    check_backend(backend)
    entry = family(pipe)
    if method is None or isinstance(method, str):
        method = Rule.preset(method or entry.method, family=entry.constants(pipe))
    if concepts is None and negative_prompts is None:
        raise ValueError("concepts=None: name concepts, negative_prompts, or both")
    if isinstance(negative_prompts, str):
        raise TypeError(f"negative_prompts={negative_prompts!r}: must be a list with one text per prompt")
    texts = [None] if negative_prompts is None else list(negative_prompts)
    if negative_prompts is not None and not any(texts) and concepts is None:
        raise ValueError(f"negative_prompts={texts!r}: holds no text")
    if len(texts) > MOST_IMAGES:
        raise ValueError(f"negative_prompts has {len(texts)} texts: must be at most {MOST_IMAGES}")
    if isinstance(concepts, str):
        concepts = [concepts]
    names = list(concepts) if concepts is not None else []
    policies = [
        Policy({name: strength for name in names}, start, stop, negative_prompt=t, negative_strength=strength)
        for t in texts
    ]
    for policy in policies:
        policy.check(method)  # before any work
    check_neutral(method, concepts.neutral if isinstance(concepts, ConceptBank) else None)
    if isinstance(concepts, ConceptBank):
        bank = concepts
    elif concepts is None:
        bank = ConceptBank({}, host.of(pipe).fingerprint(pipe), pipe)
    else:
        named = concepts if isinstance(concepts, Mapping) else {c: [c] for c in concepts}
        bank = ConceptBank.from_prompts(pipe, named, templates=templates, called="concepts")
    engine = install(pipe, bank, MOST_IMAGES, rule=method, backend=backend)
    try:
        engine.set_requests(policies)
    except BaseException:
        engine.remove()
        raise
    return Handle(engine)
