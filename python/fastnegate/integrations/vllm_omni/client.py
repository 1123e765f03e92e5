# SPDX-License-Identifier: Apache-2.0
"""`Client`: ask a server of images over HTTP, and take no picture without its proof."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from os import PathLike
from typing import Any, NamedTuple

from ...engine.policy import Policy
from ...engine.session.proof import Proof
from .answer import proof_of
from .reload import COMMIT, STAGE, agreed

FIELD = "negation"  # of a request's `extra_params` or `extra_args`


class ServerError(RuntimeError):
    """The server refused, or what it said cannot be read: `status` is that of HTTP, 4xx if the request is to
    blame; `message` says why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status, self.message = status, message


class Answer(NamedTuple):
    """`images`: files, as the server wrote them; `proof`: what was negated in them, checked; `body`: all that
    the server said."""

    images: list[bytes]
    proof: Proof
    body: dict[str, Any]


class Client:
    """Of one server. May be used by many threads.

    Args:
        url: of the server, e.g. "http://127.0.0.1:8091".
        timeout: in seconds, of one request.
    """

    def __init__(self, url: str, timeout: float = 600.0) -> None:
        self.url, self.timeout = url.rstrip("/"), timeout

    def generate(
        self, prompt: str, policy: Policy | None = None, *, bank: str | None = None, **fields: Any
    ) -> Answer:
        """Images of a prompt, in which exactly what `policy` asks for was negated.

        Args:
            prompt: of the picture.
            policy: None asks for nothing; then, too, the answer must say that nothing was negated.
            bank: the digest of the bank that must have been used; None: any.
            fields: others of `/v1/images/generations`: `seed`, `n`, `size`, `guidance_scale` and so on.

        Raises:
            NegationNotAppliedError: the answer has no proof, or proves something else. Its pictures are
                thrown away.
            ServerError: the server refused, or answered with a bare file.
            OSError: there is no server, or it fell silent.
        """
        request = {"prompt": prompt, **fields}
        if policy is not None:
            request["extra_params"] = {**request.get("extra_params", {}), FIELD: policy.to_json()}
        body = self._post("/v1/images/generations", request)
        proof = proof_of(body)
        proof.check(policy, bank=bank)
        return Answer([base64.b64decode(image["b64_json"]) for image in body["data"]], proof, body)

    def reload(self, path: str | PathLike[str]) -> str:
        """As `reload_bank`, through `/collective_rpc`, which servers have with VLLM_SERVER_DEV_MODE=1 alone:
        whoever reaches it rules the server, so it must not be public.

        Raises:
            ValueError: a worker refused; all keep the bank that they have.
            ServerError: the server has no such door.
        """
        digest = agreed(self._rpc(STAGE, str(path)))
        return agreed(self._rpc(COMMIT, digest))

    def _rpc(self, method: str, argument: str) -> Any:
        return self._post("/collective_rpc", {"method": method, "args": [argument]})["results"]

    def _post(self, path: str, content: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self.url + path, json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                status, said = response.status, response.read()
        except urllib.error.HTTPError as error:
            raise ServerError(error.code, _message(error.read())) from error
        try:
            body = json.loads(said)
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise ServerError(status, "the answer is no JSON object, so it proves nothing")
        return body


def _message(body: bytes) -> str:
    """Of an error, as OpenAI's servers and FastAPI write it; or all that was said."""
    try:
        form = json.loads(body)
        return str(form["error"]["message"] if "error" in form else form["detail"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")
