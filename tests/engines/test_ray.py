# SPDX-License-Identifier: Apache-2.0
"""Ray Serve itself, as docs/serving.md has it: two replicas behind HTTP, with all that a day brings.
`tests/engines/ray.sh` makes the environment and runs this.

Pictures are compared with those that one pipeline makes of one request at a time, in this process.
"""

from __future__ import annotations

import dataclasses
import functools
import http.client
import itertools
import json
import os
import re
import socket
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("ray", reason="not in this environment: see tests/engines/ray.sh")

import ray
from fastnegate.benchmarks.serving.load import POLICIES, PROMPT
from ray import serve

import fastnegate as fn
from fastnegate import testbed
from fastnegate.integrations.ray_serve import picture

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1500)]

CLIENTS, REQUESTS, STEPS, SEEDS = 8, 200, 6, 3
CALL = {"guidance_scale": testbed.DEFAULT_GUIDANCE}
BAD: tuple[dict[str, Any], ...] = (
    {"prompt": PROMPT, "negation": {"concepts": {"rot": 1.0}}},
    {"prompt": PROMPT, "negation": {"concepts": {"red": -1.0}}},
    {"prompt": PROMPT, "negation": {"concept": {"red": 1.0}}},
    {"prompt": "a word that it does not know"},
    {"prompt": PROMPT, "negatoin": {}},
)


PAGE = Path(__file__).parents[2] / "docs" / "serving.md"


@dataclasses.dataclass
class Served:
    port: int
    file: Path  # the bank
    pipe: Any  # of this process, as is what it makes
    ask: Callable[..., Any]  # of the page

    @functools.cache  # noqa: B019
    def alone(self, file: str, policy: int, seed: int) -> np.ndarray:
        """The picture that one request has when it is made alone, from the bank in a file."""
        engine = fn.install(self.pipe, fn.ConceptBank.load(file, self.pipe))
        with engine.batch([POLICIES[policy]]):
            image = self.pipe(
                PROMPT, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(seed), **CALL
            ).images[0]
        engine.remove()
        return np.asarray(image, np.int16)

    def __hash__(self) -> int:
        return id(self)

    def post(self, form: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """An answer; one that a replica took with it when it was killed is asked for again."""
        for _ in range(60):
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
            try:
                connection.request("POST", "/", json.dumps(form))
                response = connection.getresponse()
                body = response.read()
            except (ConnectionError, http.client.HTTPException):
                response = None
            finally:
                connection.close()
            if response is not None and response.status < 500:
                return response.status, json.loads(body)
            time.sleep(0.5)
        raise AssertionError("nobody answers")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    torch.set_num_threads(1)
    pipe = testbed.load()
    pipe.set_progress_bar_config(disable=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    _start_ray()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("served"))
    names: dict[str, Any] = {"fn": fn, "json": json}
    try:
        for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
            if "ray_serve import" in block:  # the deployment, and a client
                exec(compile(block, str(PAGE), "exec"), names)
    finally:
        os.chdir(before)
    yield Served(port, names["path"], pipe, names["ask"])
    serve.shutdown()
    ray.shutdown()


def _start_ray() -> None:
    """On busy cores its node may need longer than the 30 seconds that it has."""
    for last in (False, False, True):
        try:
            ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
            return
        except Exception:
            ray.shutdown()
            if last:
                raise


def replicas() -> list[str]:
    named = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in named if actor["name"].startswith("SERVE_REPLICA::")]


def at_once(work: Callable[[int], None], count: int) -> None:
    """So many pieces of work, by CLIENTS threads; the first error is raised here."""
    left, errors = iter(range(count)), []
    taking = threading.Lock()

    def client() -> None:
        while not errors:
            with taking:
                i = next(left, None)
            if i is None:
                return
            try:
                work(i)
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error


def request(policy: int, seed: int) -> dict[str, Any]:
    form: dict[str, Any] = {"prompt": PROMPT, "seed": seed, "steps": STEPS}
    if (asked := POLICIES[policy]) is not None:
        form["negation"] = asked.to_json()
    return form


KINDS = list(itertools.product(range(len(POLICIES)), range(SEEDS)))


def test_the_client_of_the_page_asks(served: Served) -> None:
    image = served.ask(PROMPT, POLICIES[1], f"http://127.0.0.1:{served.port}/", seed=1, steps=STEPS)
    assert abs(np.asarray(image, np.int16) - served.alone(str(served.file), 1, 1)).max() <= 1
    with pytest.raises(urllib.error.HTTPError, match="400"):
        served.ask("a word that it does not know", url=f"http://127.0.0.1:{served.port}/")


def test_every_answer_is_that_of_its_request_alone(served: Served) -> None:
    """200 requests of six policies and none, from 8 clients, bad ones between them; a replica is killed."""
    digest = fn.ConceptBank.load(served.file, served.pipe).digest
    for kind in KINDS:
        served.alone(str(served.file), *kind)
    sizes: list[int] = []
    killed: list[str] = []

    def work(i: int) -> None:
        if i == REQUESTS // 2:
            killed.append(replicas()[0])
            ray.kill(ray.get_actor(killed[0], namespace="serve"))
        if i % 10 == 0:
            status, answer = served.post(BAD[i // 10 % len(BAD)])
            assert status == 400 and answer["error"], answer
        policy, seed = KINDS[i % len(KINDS)]
        status, answer = served.post(request(policy, seed))
        assert status == 200, answer
        image = np.asarray(picture(answer, POLICIES[policy], bank=digest), np.int16)
        assert abs(image - served.alone(str(served.file), policy, seed)).max() <= 1
        sizes.append(answer["batch"])

    at_once(work, REQUESTS)
    mean = sum(1 for _ in sizes) / sum(1 / size for size in sizes)
    print(f"\n{len(sizes)} answers, {mean:.2f} requests a batch; killed {killed}")
    assert len(sizes) == REQUESTS and len(killed) == 1
    assert mean > 1.5, sizes
    assert killed[0] not in _both_again()


def _both_again() -> list[str]:
    """The replicas, once there are two of them that serve."""
    for _ in range(240):
        status = serve.status().applications["default"].deployments["Negation"]
        if status.replica_states.get("RUNNING", 0) == 2 and len(replicas()) == 2:
            return replicas()
        time.sleep(0.5)
    raise AssertionError("the killed replica was not replaced")


def test_another_bank_is_served_at_once_by_both_replicas(served: Served, tmp_path: Path) -> None:
    """An answer is all of the old bank or all of the new one; what is sent after the file is there is of the
    new one, and a concept that is gone is refused."""
    files = {name: tmp_path / name for name in ("old", "new")}
    files["old"].write_bytes(served.file.read_bytes())
    new = fn.ConceptBank.load(served.file, served.pipe)
    new.remove("warm")
    new.update("red", new["circle"])
    new.save(files["new"])
    digests = {fn.ConceptBank.load(path, served.pipe).digest: str(path) for path in files.values()}
    assert len(digests) == 2
    kinds = [(policy, seed) for policy, seed in KINDS if policy in (0, 1, 2, 3)]
    for path, kind in itertools.product(digests.values(), kinds):
        served.alone(path, *kind)
    replaced = threading.Event()
    seen: list[tuple[bool, str]] = []

    def work(i: int) -> None:
        if i == 40:
            files["new"].replace(moved := served.file.with_name("moved"))
            files["new"].write_bytes(moved.read_bytes())
            os.replace(moved, served.file)
            replaced.set()
        after = replaced.is_set()
        policy, seed = kinds[i % len(kinds)]
        status, answer = served.post(request(policy, seed))
        assert status == 200, answer
        image = np.asarray(picture(answer, POLICIES[policy]), np.int16)
        path = digests[answer["negation"]["bank"]]
        assert abs(image - served.alone(path, policy, seed)).max() <= 1
        seen.append((after, path))

    at_once(work, 100)
    assert {path for after, path in seen if after} == {str(files["new"])}
    assert {path for after, path in seen if not after} >= {str(files["old"])}
    status, answer = served.post({"prompt": PROMPT, "negation": {"concepts": {"warm": 1.0}}})
    assert status == 400 and "concept 'warm': the bank has red, blue" in answer["error"]
