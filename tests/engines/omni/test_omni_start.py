# SPDX-License-Identifier: Apache-2.0
"""What vLLM-Omni's real engine does not start with, and what it would serve without negation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm_omni", reason="not in this environment: see environment.sh")

import omni_served as served
from omni_served import POLICIES, Server, pictures, request

import fastnegate as fn
from fastnegate.integrations.vllm_omni import proof_of

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served.fill(tmp_path_factory.mktemp("served"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bank": "none"}, "No such file"),
        ({"bank": "foreign"}, "another text encoder"),
        ({"given": {"rul": "nag"}}, "'rul'"),
        ({"pipeline": "fastnegate.integrations.vllm_omni.NoPipeline"}, "NoPipeline"),
        ({"step_execution": True}, "step_execution"),
        ({"model_class_name": "StableDiffusionXLPipeline"}, "DiffusersAdapterPipeline"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_negate_never_serves(config: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(Exception, match=message):
        Server(folder, **config)


def test_a_model_that_the_engine_has_a_class_for_starts_as_an_adapter(folder: Path) -> None:
    server = Server(folder, model_class_name="DiffusersAdapterPipeline")
    try:
        (answer,) = server.ask(request(POLICIES[1]))
        proof_of(answer).check(POLICIES[1])
        assert len(pictures(answer)) == 1
    finally:
        server.close()


def test_a_server_without_negation_is_noticed(folder: Path) -> None:
    server = Server(folder, pipeline="omni_recorded.PlainPipeline", max_num_seqs=1)
    try:
        (answer,) = server.ask(request(POLICIES[1]))
        assert len(pictures(answer)) == 1  # it ignores the policy, and says nothing of it
        with pytest.raises(fn.NegationNotAppliedError):
            proof_of(answer)
    finally:
        server.close()
