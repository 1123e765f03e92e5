# SPDX-License-Identifier: Apache-2.0
"""`host.of`: which integration answers for a pipeline."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest

from fastnegate import ConceptBank, UnsupportedModelError, audit
from fastnegate.engine import host
from fastnegate.engine.host import Host

pytest.importorskip("diffusers")

import diffusers
import pipelines
from pipelines import one_thread  # noqa: F401

from fastnegate.integrations.diffusers import host as diffusers_host


class Own(diffusers.StableDiffusionPipeline):
    """A user's subclass lives in a module of the user's."""


class Elsewhere:
    pass


def test_the_host_is_that_of_the_class_or_its_bases() -> None:
    pipe = pipelines.build("sd15")
    assert host.of(pipe) is diffusers_host
    assert host.of(Own(**pipe.components, requires_safety_checker=False)) is diffusers_host
    assert host.of(pipelines.build("flux")) is diffusers_host  # which then says what it supports


def test_the_host_does_what_it_must() -> None:
    asked = {name: f for name, f in vars(Host).items() if callable(f) and not name.startswith("_")}
    assert {"encode", "negative_prompt", "fingerprint", "engine_of"} <= {*asked}
    for name, declared in asked.items():
        ours = inspect.signature(getattr(diffusers_host, name)).parameters
        theirs = [*inspect.signature(declared).parameters.values()][1:]
        assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs], name


@pytest.mark.parametrize("pipe", [None, "runwayml/model", Elsewhere()])
def test_other_objects_are_refused(pipe: Any) -> None:
    def listen() -> None:
        with audit(pipe):
            pass

    for ask in (lambda: ConceptBank.from_prompts(pipe, {"x": "cat"}), listen):
        message = f"pipe is a {type(pipe).__name__}: supported are pipelines of diffusers"
        with pytest.raises(UnsupportedModelError, match=message):
            ask()


def test_a_name_that_begins_like_a_library_is_not_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Elsewhere, "__module__", "diffusers_of_mine.pipelines")
    with pytest.raises(UnsupportedModelError):
        host.of(Elsewhere())


def test_asking_for_a_host_imports_no_other_library() -> None:
    code = (
        "import sys, fastnegate\n"
        "from fastnegate.engine import host\n"
        "try: host.of(object())\n"
        "except fastnegate.UnsupportedModelError: print('diffusers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
