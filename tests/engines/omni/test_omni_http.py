# SPDX-License-Identifier: Apache-2.0
"""vLLM-Omni's real server, and eight clients of it over HTTP."""

from __future__ import annotations

import collections
import io
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("vllm_omni", reason="not in this environment: see environment.sh")

import omni_served as served
from omni_served import CALL, PIPELINE, POLICIES, Picture, far

import fastnegate as fn
from fastnegate import testbed
from fastnegate.integrations.vllm_omni import Client, ServerError

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1500)]

PAGE = Path(__file__).parents[3] / "docs" / "serving.md"
CLIENTS, REQUESTS, PATIENCE = 8, 200, 300
PROMPTS = ("a red circle and a blue square", "a blue circle", "a red square and a red circle")
BAD: tuple[dict[str, Any], ...] = (
    {"extra_params": {"negation": {"concepts": {"green": 1.0}}}},
    {"extra_params": {"negation": {"concept": {"red": 1.0}}}},
    {"extra_params": {"negation": {"concepts": {"red": -1.0}}}},
    {"extra_params": {"negation": {"concepts": {"red": 1.0}, "start": 0.4, "stop": 0.45}}},
    {"extra_params": {"negation": None}},
    {"prompt": "a red zebra"},
    {"size": "33x33"},
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Served:
    """The server as a process of its own, whose pipeline records the calls that it makes."""

    def __init__(self, folder: Path, bank: Path, pipeline: str = "omni_recorded.RecordedPipeline") -> None:
        port = free_port()
        self.client = Client(f"http://127.0.0.1:{port}", timeout=PATIENCE)
        self._record, self._log = folder / "record", open(folder / "log", "w")
        self._record.touch()
        given = {"pipeline_class": pipeline, "bank": str(bank)}
        options = ("--omni", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32")
        options += ("--max-num-seqs", str(CLIENTS), "--request-batch-max-wait-ms", "200")
        options += ("--custom-pipeline-args", json.dumps(given))
        options += ("--worker-extension-cls", "fastnegate.integrations.vllm_omni.NegatedWorker")
        path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        more = {"PYTHONPATH": path, "VLLM_OMNI_RECORD": str(self._record), "OMP_NUM_THREADS": "1"}
        more |= {"VLLM_SERVER_DEV_MODE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        self.process = subprocess.Popen(
            [str(Path(sys.executable).parent / "vllm-omni"), "serve", str(folder / "model"), *options],
            env={**os.environ, **more},
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def healthy(self) -> bool:
        """Wait until it serves, or has ended."""
        end = time.monotonic() + PATIENCE
        while self.process.poll() is None and time.monotonic() < end:
            try:
                with urllib.request.urlopen(f"{self.client.url}/health", timeout=5) as answer:
                    return bool(answer.status == 200)
            except OSError:
                time.sleep(0.5)
        return False

    def calls(self) -> list[list[Any]]:
        """Policies of the requests of each call so far."""
        return [json.loads(line) for line in self._record.read_text().splitlines()]

    def log(self) -> str:
        return Path(self._log.name).read_text()

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self._log.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served.fill(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Served]:
    server = Served(folder, folder / "first")
    try:
        assert server.healthy(), server.log()[-5000:]
        yield server
    finally:
        server.close()


def picture(file: bytes) -> Picture:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def digest(folder: Path, bank: str) -> str:
    return fn.ConceptBank.load(folder / bank, testbed.load("easy")).digest


def ask(client: Client, prompt: str, policy: fn.Policy | None, seed: int, **fields: Any) -> Any:
    return client.generate(prompt, policy, seed=seed, **{"size": "32x32", **CALL, **fields})


def test_two_hundred_requests_of_eight_clients(server: Served, folder: Path) -> None:
    """Each picture is the one that its request alone would get, with the right proof, though unlike policies
    share calls."""
    bank = digest(folder, "first")
    kinds = list(itertools.product(PROMPTS, enumerate(POLICIES)))
    requests = [kinds[i % len(kinds)] for i in range(REQUESTS)]
    before = len(server.calls())

    def one(request: Any) -> Any:
        prompt, (seed, policy) = request
        return ask(server.client, prompt, policy, seed, bank=bank)

    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = list(clients.map(one, requests))

    right = served.alone(folder / "first")
    wanted = {(prompt, seed): right(policy, seed, prompt) for prompt, (seed, policy) in kinds}
    for (prompt, (seed, policy)), answer in zip(requests, answers):
        (file,) = answer.images
        assert far(picture(file), wanted[prompt, seed]) <= 1, (prompt, policy)
        assert answer.proof == proof(policy, bank)

    calls = server.calls()[before:]
    assert sum(map(len, calls)) == REQUESTS
    sizes = collections.Counter(map(len, calls))
    unlike = [len({json.dumps(policy) for policy in call}) for call in calls]
    print(
        f"calls of n requests: {sorted(sizes.items())}; different policies in a call: {np.mean(unlike):.1f}"
    )
    assert REQUESTS / len(calls) >= 4 and np.mean(unlike) >= 2


def proof(policy: fn.Policy | None, bank: str) -> fn.Proof:
    """By the schedule: step i of n acts if start <= i / n < stop."""
    policy, n = policy or fn.Policy(), CALL["num_inference_steps"]
    stop = 1.0 if policy.stop is None else policy.stop
    acting = sum(policy.start <= i / n < stop for i in range(n))
    text = acting if policy.negative_prompt else 0
    return fn.Proof("protore", bank, n, dict.fromkeys(policy.concepts, acting), text)


def test_bad_requests_fail_alone(server: Served, folder: Path) -> None:
    right = served.alone(folder / "first")
    wanted = [right(policy, seed, PROMPTS[0]) for seed, policy in enumerate(POLICIES)]

    def good(seed: int) -> int:
        (file,) = ask(server.client, PROMPTS[0], POLICIES[seed], seed).images
        return far(picture(file), wanted[seed])

    def bad(fields: dict[str, Any]) -> ServerError:
        with pytest.raises(ServerError) as error:
            ask(server.client, **{"prompt": PROMPTS[0], "policy": None, "seed": 0, **fields})
        return error.value

    with ThreadPoolExecutor(2 * CLIENTS) as clients:
        errors = [clients.submit(bad, fields) for fields in BAD]
        apart = list(clients.map(good, range(len(POLICIES))))
    assert max(apart) <= 1
    for fields, error in zip(BAD, (future.result() for future in errors)):
        assert error.status == 400, (fields, error)
    assert "the bank has red, blue, circle" in errors[0].result().message
    assert "policy has 'concept'" in errors[1].result().message


def test_a_bank_changes_at_once_under_load(server: Served, folder: Path) -> None:
    """Each answer is of the one bank that its proof names; what is asked after a change has the new one."""
    first, second = digest(folder, "first"), digest(folder, "second")
    policy, seed = fn.Policy({"red": 1.0}), 1
    other = folder / "other"  # the same name means something else
    pipe = testbed.load("easy")
    fn.ConceptBank.from_prompts(pipe, {"red": testbed.members("blue")}).save(other)
    wanted = {
        digest(folder, bank): served.alone(folder / bank)(policy, seed, PROMPTS[0])
        for bank in ("first", "other")
    }
    assert far(*wanted.values()) > 50 and first in wanted
    done, seen = threading.Event(), []

    def client() -> None:
        while not done.is_set():
            answer = ask(server.client, PROMPTS[0], policy, seed)
            seen.append(answer.proof.bank)
            assert far(picture(answer.images[0]), wanted[answer.proof.bank]) <= 1

    with ThreadPoolExecutor(CLIENTS) as clients:
        load = [clients.submit(client) for _ in range(CLIENTS)]
        try:
            for bank in ("other", "first") * 3:
                time.sleep(1.0)
                now = server.client.reload(folder / bank)
                assert now == digest(folder, bank)
                assert ask(server.client, PROMPTS[0], policy, seed).proof.bank == now
            with pytest.raises(ValueError, match="another text encoder"):
                server.client.reload(folder / "foreign")
        finally:
            done.set()
        for future in load:
            future.result()
    counted = collections.Counter(seen)
    print(f"answers by bank: {sorted(counted.values())}")
    assert counted.keys() == wanted.keys() and min(counted.values()) >= CLIENTS

    assert server.client.reload(folder / "second") == second
    with pytest.raises(ServerError, match="400: negation: concept 'blue': the bank has red, square"):
        ask(server.client, PROMPTS[0], fn.Policy({"blue": 1.0}), seed)
    assert server.client.reload(folder / "first") == first


def blocks() -> list[str]:
    """Code of the page that is about this engine."""
    found = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [code for code in found if "integrations.vllm_omni" in code]


def test_the_client_of_the_page_runs(server: Served, tmp_path: Path) -> None:
    (code,) = (block for block in blocks() if "Client" in block)
    names: dict[str, Any] = {"Path": Path}
    exec(code, names)
    file = tmp_path / "picture.png"
    proof = names["draw"]("a red circle", fn.Policy({"red": 1.0}), file, server.client.url)
    assert proof.concepts == {"red": proof.steps} and picture(file.read_bytes()).ndim == 3
    refused = names["draw"]("a red circle", fn.Policy({"rad": 1.0}), file, server.client.url)
    assert refused == "400: negation: concept 'rad': the bank has red, blue, circle"


def test_the_engine_of_the_page_runs(folder: Path) -> None:
    shutil.copy(folder / "first", folder / "bank.safetensors")
    (code,) = (block for block in blocks() if "Omni(" in block)
    (folder / "page.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=folder, timeout=PATIENCE, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert picture((folder / "picture.png").read_bytes()).shape == (32, 32, 3)


def test_a_server_that_cannot_negate_never_serves(folder: Path) -> None:
    server = Served(folder, folder / "foreign", PIPELINE)
    try:
        assert not server.healthy()
        assert server.process.returncode not in (None, 0)
        assert "another text encoder" in server.log()
    finally:
        server.close()
