# SPDX-License-Identifier: Apache-2.0
"""What a call costs the host is measured as it is said."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from fastnegate.benchmarks.operator import host
from fastnegate.benchmarks.pipeline import host as layers

from fastnegate.operator.backends import cpu

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(cpu.unavailable() is not None, reason=f"{cpu.unavailable()}"),
]


def test_calls_do_what_their_names_say() -> None:
    with torch.inference_mode():
        found = {name: call() for name, call in host.calls("cpu").items()}
    output, statistics = found["with statistics"]
    torch.testing.assert_close(found["no concepts"], found["torch"])
    assert not torch.allclose(found["one concept"], found["no concepts"])
    assert torch.equal(output, found["one concept"]) and statistics.gate_max.shape == (2,)


def test_medians_are_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "wall", lambda call: call() or 40e-6)
    calls = host.calls("cpu")
    assert host.medians(calls, 3) == pytest.approx(dict.fromkeys(calls, 2.0))


def test_layers_do_what_their_names_say() -> None:
    calls = layers.calls("cpu")
    with torch.no_grad():
        found = {name: call() for name, call in calls.items()}
    assert torch.equal(found["nobody asks"], found["AttnProcessor2_0"])
    assert not torch.allclose(found["one concept"], found["nobody asks"])


@pytest.mark.parametrize("command", (host, layers), ids=("operator", "pipeline"))
def test_the_command(command: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--rounds", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:16].strip() for line in lines] == [*command.calls("cpu")]
    assert all(" us " in line for line in lines) and lines[0].endswith("+0.00")
    with pytest.raises(SystemExit):
        command.main(["--rounds", "0"])
    assert "--rounds 0: must be at least 1" in capsys.readouterr().err
