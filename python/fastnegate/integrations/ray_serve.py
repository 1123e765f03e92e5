# SPDX-License-Identifier: Apache-2.0
"""Ray Serve: `Negation` is one replica, a pipeline behind HTTP with a policy per request.

    deployment = serve.deployment(Negation, num_replicas=2, max_ongoing_requests=32)
    serve.run(deployment.bind(make_pipeline, "bank.safetensors"))

A request is {"prompt": "a mouse", "negation": {"concepts": {"disney": 1.0}}, "seed": 0, "steps": 30}, of
which the prompt must be there; `negation` is a policy (`Policy.from_json`). The answer is {"image": PNG in
base64, "negation": a proof (`Proof`), "batch": how many were made together}; clients read it with `picture`.
What is wrong with a request is answered with 400 and {"error": why}, to that request alone.

The bank is a file, and another one in its place (`os.replace`) is what requests that come later are served
from, by every replica that sees the file, also one that is started later. Nothing here imports Ray.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..engine.bank import ConceptBank
from ..engine.policy import LONGEST_PROMPT, Policy, shortened
from ..engine.session.proof import Proof
from .diffusers.install import install

log = logging.getLogger("fastnegate")
FIELDS = ("prompt", "negation", "seed", "steps")
LARGEST_BODY = 1 << 16  # bytes of a request


class Request(NamedTuple):
    """What a client asks for, as far as it can be told from the request alone."""

    prompt: str
    policy: Policy | None
    seed: int
    steps: int


class Waiting(NamedTuple):
    """A request, and who waits for its answer."""

    request: Request
    answer: asyncio.Future[dict[str, Any]]


class Negation:
    """A pipeline with an engine, and the queue in front of it.

    Args:
        make_pipeline: makes the pipeline, where the replica runs.
        bank: the file of concepts.
        max_batch: the most requests that are made together.
        steps: denoising steps of a request that does not say; `most_steps` are the most that one may ask for.
        call: further arguments of every call of the pipeline, e.g. `guidance_scale`.
        options: of `fastnegate.install`, e.g. `rule`.

    Raises:
        ValueError, UnsupportedModelError, BankMismatchError: as `ConceptBank.load` and `install`.
        NegationNotAppliedError: a picture that was made to see it was not negated.
    """

    def __init__(
        self,
        make_pipeline: Callable[[], Any],
        bank: str | Path,
        *,
        max_batch: int = 8,
        steps: int = 50,
        most_steps: int = 100,
        call: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.pipe, self._path = make_pipeline(), bank
        self._max_batch, self._steps, self._most_steps = max_batch, steps, most_steps
        self._call = dict(call or {})
        self._seen = self._stamp()
        options = {"unasked": "raise", **options}
        self.engine = install(self.pipe, ConceptBank.load(bank, self.pipe), max_batch, **options)
        self._turn = threading.Lock()  # the pipeline makes one batch at a time
        self._waiting: list[Waiting] = []
        self._worker: asyncio.Task[None] | None = None
        self._proven = False  # that it negates, since the last look at its health
        try:
            self._prove()
        except BaseException:
            self.engine.remove()
            raise

    async def __call__(self, http: Any) -> Any:
        """Answer an HTTP request (`starlette.requests.Request`)."""
        from starlette.responses import JSONResponse

        status, answer = await self.answer(await http.body())
        return JSONResponse(answer, status)

    async def check_health(self) -> None:
        """What Ray asks every few seconds; a replica that does not pass is replaced. A picture that was
        negated since is proof enough; else one is made, after those that are at work:
        `health_check_timeout_s` of the deployment has to be longer than a batch.

        Raises:
            NegationNotAppliedError: it was not negated.
        """
        proven, self._proven = self._proven, False
        if not proven:
            await asyncio.to_thread(self._prove)

    async def answer(self, body: bytes) -> tuple[int, dict[str, Any]]:
        """HTTP status and answer."""
        if self._stamp() != self._seen:
            await asyncio.to_thread(self._reload)
        try:
            return 200, await self._make(self._read(body))
        except ValueError as error:
            return 400, {"error": shortened(error)}
        except Exception as error:
            log.exception("a request failed")
            return 500, {"error": shortened(error)}

    def _read(self, body: bytes) -> Request:
        """Raises ValueError for whatever is wrong with a request."""
        if len(body) > LARGEST_BODY:
            raise ValueError(f"the request has {len(body)} bytes: at most {LARGEST_BODY} are allowed")
        try:
            form = json.loads(body, object_pairs_hook=_once)
        except RecursionError as error:
            raise ValueError("the request is nested too deeply") from error
        if not isinstance(form, dict):
            raise ValueError(f"the request is a {type(form).__name__}: must be an object")
        for name in form:
            if name not in FIELDS:
                raise ValueError(f"the request has {name!r}: its fields are {', '.join(FIELDS)}")
        prompt, negation = form.get("prompt"), form.get("negation")
        if not isinstance(prompt, str):
            raise ValueError(f"prompt={shortened(repr(prompt))}: must be a text")
        if len(prompt) > LONGEST_PROMPT:
            raise ValueError(f"prompt has {len(prompt)} characters: at most {LONGEST_PROMPT} are allowed")
        policy = None if negation is None else Policy.from_json(negation)
        seed = _whole("seed", form.get("seed", 0), 0, 2**63 - 1)
        steps = _whole("steps", form.get("steps", self._steps), 1, self._most_steps)
        self.engine.check(policy, steps)
        return Request(prompt, policy, seed, steps)

    # ---- one batch after the other ----------------------------------------------------------

    async def _make(self, request: Request) -> dict[str, Any]:
        """The answer, or whatever error there is. `@serve.batch` would close a batch at its timeout, also
        while the pipeline is busy; here a batch is whatever waits when it is free."""
        waiting = Waiting(request, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await waiting.answer

    async def _work(self) -> None:
        """Make pictures until nobody waits."""
        while rows := self._batch():
            made = await asyncio.to_thread(self._serve, [row.request for row in rows])
            for row, answer in zip(rows, made):
                if row.answer.done():  # the client has gone
                    continue
                if isinstance(answer, Exception):
                    row.answer.set_exception(answer)
                else:
                    row.answer.set_result(answer)

    def _batch(self) -> list[Waiting]:
        """The request that has waited longest, and those that may share a call with it."""
        rows: list[Waiting] = []
        rest: list[Waiting] = []
        for row in self._waiting:
            if row.answer.done():
                continue
            fits = len(rows) < self._max_batch and (not rows or self._share(row.request, rows[0].request))
            (rows if fits else rest).append(row)
        self._waiting = rest
        return rows

    def _share(self, one: Request, other: Request) -> bool:
        """Whether two requests may share a call of the pipeline, which has one number of steps."""
        return one.steps == other.steps

    def _serve(self, requests: Sequence[Request]) -> Sequence[dict[str, Any] | Exception]:
        """Answers, or errors. What stops a batch need not be the fault of all: a concept has gone since, or
        the pipeline minds a prompt. So each is tried alone."""
        with self._turn:
            try:
                return self._pictures(requests)
            except Exception as error:
                if len(requests) == 1:
                    return [error]
        return [self._serve([request])[0] for request in requests]

    def _pictures(self, requests: Sequence[Request]) -> list[dict[str, Any]]:
        with self.engine.batch([request.policy for request in requests]) as batch:
            images = self.pipe(
                [request.prompt for request in requests],
                num_inference_steps=requests[0].steps,
                generator=[torch.Generator().manual_seed(request.seed) for request in requests],
                **self._call,
            ).images
        if len(images) != len(requests):
            raise RuntimeError(f"the pipeline made {len(images)} pictures of {len(requests)} requests")
        answers = []
        for request, image, proof in zip(requests, images, batch.proofs):
            proof.check(request.policy)
            self._proven |= request.policy is not None and request.policy.asks
            answers.append({"image": _png(image), "negation": proof.to_json(), "batch": len(requests)})
        return answers

    # ---- the bank, and health ---------------------------------------------------------------

    def _stamp(self) -> tuple[int, int, int] | None:
        """What tells the file from another one; None: there is none."""
        try:
            facts = os.stat(self._path)
        except OSError:
            return None
        return facts.st_ino, facts.st_mtime_ns, facts.st_size

    def _reload(self) -> None:
        """Serve from the file that is there now. One that cannot be served from is logged, once."""
        with self._turn:
            if (stamp := self._stamp()) == self._seen:
                return
            self._seen = stamp
            try:
                self.engine.replace_bank(ConceptBank.load(self._path, self.pipe))
            except (OSError, ValueError) as error:
                log.error("the bank stays as it was: %s", error)

    def _prove(self) -> None:
        """Make a picture of nothing without some concept."""
        with self._turn:
            names = list(self.engine.bank)[:1]
            self._pictures([Request("", Policy(dict.fromkeys(names, 1.0), stop=1.0), 0, 1)])


def picture(answer: Mapping[str, Any], policy: Policy | None, bank: str | None = None) -> Any:
    """The picture (PIL) of an answer that proves that `policy` acted.

    Args:
        answer: what `json.loads` made of it.
        policy: what was asked for.
        bank: the digest of the bank that it should be from; None: of any.

    Raises:
        NegationNotAppliedError: no proof, as from a server that knows no negation, or one of something else.
    """
    from PIL import Image

    Proof.from_json(answer.get("negation")).check(policy, bank=bank)
    return Image.open(io.BytesIO(base64.b64decode(answer["image"])))


def _png(image: Any) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. The second of two fields of a name would silently be what counts."""
    form = dict(pairs)
    if len(form) < len(pairs):
        raise ValueError("the request has a field twice")
    return form


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name}={shortened(repr(value))}: must be a whole number from {low} to {high}")
    return value
