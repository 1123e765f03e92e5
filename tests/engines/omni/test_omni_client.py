# SPDX-License-Identifier: Apache-2.0
"""The client of a server of images: it takes no picture without its proof. It needs no vLLM-Omni."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest

import fastnegate as fn
from fastnegate.integrations.vllm_omni import Client, ServerError, proof_of
from fastnegate.integrations.vllm_omni.answer import written

BANK = "ab" * 32
PROOF = fn.Proof("protore", BANK, 20, {"red": 20})
POLICY = fn.Policy({"red": 1.0})


def answer(durations: Any, **more: Any) -> dict[str, Any]:
    image = {"b64_json": base64.b64encode(b"a picture").decode()}
    return {"data": [image], "metrics": {"stage_durations": durations, **more}}


class Script:
    """A server that says what it is told to say, and what it was asked."""

    def __init__(self) -> None:
        self.says: list[tuple[int, Any]] = []
        self.asked: list[tuple[str, Any]] = []
        script = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                script.asked.append((self.path, json.loads(content)))
                status, body = script.says.pop(0)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

            def log_message(self, *_args: Any) -> None:
                """Nobody reads it."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.client = Client(f"http://127.0.0.1:{self.server.server_port}/", timeout=60)


@pytest.fixture
def script() -> Iterator[Script]:
    script = Script()
    yield script
    script.server.shutdown()
    script.server.server_close()


# ---- proofs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        answer({"stage_0_gen_ms": 12.0, **written(PROOF)}),
        {"id": "video-1", "stage_durations": written(PROOF)},
        SimpleNamespace(stage_durations=written(PROOF)),
    ],
    ids=["images", "videos", "offline"],
)
def test_a_proof_is_read_wherever_it_is(said: Any) -> None:
    assert proof_of(said) == PROOF


@pytest.mark.parametrize(
    "said",
    [
        answer(None),
        answer({"stage_0_gen_ms": 12.0}),
        answer({**written(PROOF), **written(fn.Proof("protore", BANK, 20, {}))}),
        answer({"negation ": 0.0}),
        answer({"negation {}": 0.0}),
        answer({"negation null": 0.0}),
        {"data": []},
        {"metrics": None},
        {"metrics": "fast"},
        SimpleNamespace(stage_durations={}),
        None,
    ],
)
def test_no_proof_is_no_answer(said: Any) -> None:
    with pytest.raises(fn.NegationNotAppliedError):
        proof_of(said)


# ---- the client -----------------------------------------------------------------------------------


def test_a_request_and_its_answer(script: Script) -> None:
    script.says = [(200, answer(written(PROOF)))]
    got = script.client.generate("a red circle", POLICY, bank=BANK, seed=3, extra_params={"flow_shift": 3.0})
    assert got.images == [b"a picture"] and got.proof == PROOF and got.body["metrics"]
    extra = {"flow_shift": 3.0, "negation": {"concepts": {"red": 1.0}}}
    body = {"prompt": "a red circle", "seed": 3, "extra_params": extra}
    assert script.asked == [("/v1/images/generations", body)]


def test_who_asks_for_nothing_says_nothing_and_gets_nothing(script: Script) -> None:
    script.says = [(200, answer(written(fn.Proof("protore", BANK, 20, {})))), (200, answer(written(PROOF)))]
    script.client.generate("a red circle")
    assert script.asked[0][1] == {"prompt": "a red circle"}
    with pytest.raises(fn.NegationNotAppliedError):
        script.client.generate("a red circle")


@pytest.mark.parametrize(
    "said",
    [
        answer({"stage_0_gen_ms": 12.0}),  # of a server without the plugin
        answer(written(fn.Proof("protore", BANK, 20, {}))),
        answer(written(fn.Proof("protore", BANK, 20, {"blue": 20}))),
        answer(written(fn.Proof("protore", "cd" * 32, 20, {"red": 20}))),
    ],
    ids=["no proof", "nothing acted", "another concept", "another bank"],
)
def test_a_picture_without_its_proof_is_thrown_away(said: Any, script: Script) -> None:
    script.says = [(200, said)]
    with pytest.raises(fn.NegationNotAppliedError):
        script.client.generate("a red circle", POLICY, bank=BANK)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": {"message": "negation: no such concept"}}, "negation: no such concept"),
        ({"detail": "Not Found"}, "Not Found"),
        (b"<html>", "<html>"),
        (b"[]", r"\[\]"),
    ],
)
def test_a_refusal_is_told(body: Any, message: str, script: Script) -> None:
    script.says = [(404, body)]
    with pytest.raises(ServerError, match=f"^404: {message}$") as error:
        script.client.generate("a red circle", POLICY)
    assert error.value.status == 404


@pytest.mark.parametrize("body", [b"\x89PNG", b"[]"], ids=["a bare file", "a list"])
def test_what_is_no_answer_is_none(body: bytes, script: Script) -> None:
    script.says = [(200, body)]
    with pytest.raises(ServerError, match=r"^200: the answer is no JSON object"):
        script.client.generate("a red circle", POLICY, response_format="file")


def test_a_reload_is_two_calls(script: Script) -> None:
    workers = {"results": [[{"bank": BANK}, {"bank": BANK}]]}
    script.says = [(200, workers), (200, workers)]
    assert script.client.reload("banks/new") == BANK
    assert script.asked == [
        ("/collective_rpc", {"method": "negation_stage", "args": ["banks/new"]}),
        ("/collective_rpc", {"method": "negation_commit", "args": [BANK]}),
    ]


def test_a_reload_that_one_worker_refuses_is_one_call(script: Script) -> None:
    script.says = [(200, {"results": [[{"bank": BANK}, {"refused": "no such file"}]]})]
    with pytest.raises(ValueError, match="no such file"):
        script.client.reload("banks/new")
    assert len(script.asked) == 1
