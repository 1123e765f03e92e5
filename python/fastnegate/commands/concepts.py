# SPDX-License-Identifier: Apache-2.0
"""`fastnegate concepts`: make banks of concepts from words or from pictures, and look into their files."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..engine import host
from ..engine.bank import ConceptBank, calls_for
from ..engine.files import contents
from ..engine.inversion import MOST_TOKENS, invert, phrases_shown
from . import options
from .progress import progress

_BATCH = 8  # prompts in a call of the pipeline


def add(commands: Any) -> None:
    """The command and its options."""
    parser = commands.add_parser("concepts", help="make and inspect files of concepts")
    actions = parser.add_subparsers(dest="action", required=True)

    build = actions.add_parser("build", help="concepts from phrases")
    _add_common(build)
    build.add_argument(
        "--concept", type=options.concept, action="append", required=True, metavar="NAME=PHRASE,PHRASE",
        help="may be given several times",
    )  # fmt: skip
    build.add_argument(
        "--kmeans", type=options.whole(1), metavar="K", help="K prototypes for concepts of more phrases"
    )
    build.add_argument(
        "--images", type=options.pictures, metavar="FOLDER", help="keep the phrases that these pictures show"
    )
    build.add_argument("--directions", action="store_true", help="collect steering directions, for casteer")
    build.add_argument("--orthogonal", action="store_true", help="of several concepts negated together")
    build.add_argument("--steps", type=options.whole(1, 1000), default=20, help="of the runs for directions")
    build.set_defaults(run=_build)

    learn = actions.add_parser("invert", help="a concept from pictures of it")
    _add_common(learn)
    learn.add_argument("--images", type=options.pictures, required=True, metavar="FOLDER")
    learn.add_argument("--name", required=True, help="of the concept")
    learn.add_argument("--tokens", type=options.whole(1, MOST_TOKENS), default=1)
    learn.add_argument("--steps", type=options.whole(1), default=3000)
    learn.add_argument("--rate", type=options.above_0, default=5e-3, help="of Adam")
    learn.add_argument("--batch", type=options.whole(1), default=1, help="pictures in a step")
    learn.add_argument("--caption", metavar="TEXT", help="where the tokens stand: 'a photo of {}'")
    learn.add_argument("--checkpoint", type=Path, metavar="FILE", help="go on from there, if it exists")
    learn.set_defaults(run=_invert)

    for name, run, text in (
        ("inspect", _inspect, "what each concept of a file has"),
        ("list", _list, "the names of a file's concepts"),
    ):
        look = actions.add_parser(name, help=text)
        look.add_argument("file", type=Path, metavar="FILE")
        look.set_defaults(run=run)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=options.model, required=True, help="a pipeline's folder, or 'embedded'"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=options.seed, default=0)
    parser.add_argument("--out", type=options.file, required=True, metavar="FILE")


def _build(given: argparse.Namespace) -> int:
    wanted: dict[str, Sequence[str]] = dict(given.concept)
    if len(wanted) < len(given.concept):
        raise ValueError("--concept: two have the same name")
    if given.orthogonal and not given.directions:
        raise ValueError("--orthogonal: is of --directions")
    pipe = _load(given.model, given.device)
    if given.images is not None:
        images = _opened(given.images)
        wanted = {name: [*phrases_shown(pipe, images, phrases)] for name, phrases in wanted.items()}
    bank = ConceptBank.from_prompts(pipe, wanted, called="--concept")
    for name in bank if given.kmeans is not None else ():
        if len(bank[name].prototypes) > given.kmeans:
            bank.update(name, bank[name].condensed(given.kmeans, given.seed))
    if given.directions:
        _add_directions(pipe, bank, wanted, given)
    bank.save(given.out)
    print("\n".join(_lines(bank)))
    return 0


def _add_directions(
    pipe: Any, bank: ConceptBank, wanted: Mapping[str, Sequence[str]], given: argparse.Namespace
) -> None:
    pairs = {name: host.of(pipe).contrasts(pipe, members) for name, members in wanted.items()}
    with progress("call") as bar:
        bar.expect(calls_for(pairs, _BATCH))
        bank.add_directions(
            pipe, pairs, make_orthogonal=given.orthogonal, seed=given.seed, batch=_BATCH, on_call=bar.step,
            num_inference_steps=given.steps,
        )  # fmt: skip


def _invert(given: argparse.Namespace) -> int:
    images = _opened(given.images)
    pipe = _load(given.model, given.device)
    with progress("step") as bar:
        bar.expect(given.steps)
        concept = invert(
            pipe, images, tokens=given.tokens, steps=given.steps, rate=given.rate, batch=given.batch,
            caption=given.caption, seed=given.seed, checkpoint=given.checkpoint,
            on_step=lambda loss: bar.step(f"loss {loss:.4f}"),
        )  # fmt: skip
    bank = ConceptBank({given.name: concept}, host.of(pipe).fingerprint(pipe), pipe)
    bank.save(given.out)
    print("\n".join(_lines(bank)))
    return 0


def _opened(paths: Sequence[Path]) -> list[Any]:
    from PIL import Image

    return [Image.open(path).convert("RGB") for path in paths]


def _inspect(given: argparse.Namespace) -> int:
    found = contents(given.file)
    print("text encoder: " + ", ".join(f"{name} {fact}" for name, fact in found.encoder.facts.items()))
    print("\n".join(_lines(found.concepts)))
    return 0


def _list(given: argparse.Namespace) -> int:
    for name in contents(given.file).concepts:
        print(name)
    return 0


def _lines(concepts: Mapping[str, Any] | ConceptBank) -> Iterator[str]:
    for name in concepts:
        concept = concepts[name]
        lengths = " ".join(str(len(tokens)) for tokens in concept.prototypes)
        layers = 0 if concept.directions is None else len(concept.directions.layers)
        yield (
            f"{name}: {', '.join(concept.members) or 'learned'}; prompt of {len(concept.prompt)} tokens, "
            f"prototypes of {lengths}, directions of {layers} layers"
        )


def _load(model: str, device: str) -> Any:
    if model == "embedded":
        from ..testbed.model import load

        return load().to(device)
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(model, local_files_only=True)
    return pipe.to(device)
