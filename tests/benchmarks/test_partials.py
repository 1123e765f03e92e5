# SPDX-License-Identifier: Apache-2.0
"""What negation costs in joint attention is measured of calls that do the same."""

from __future__ import annotations

import pytest
import torch
from fastnegate.benchmarks.operator import partials
from fastnegate.benchmarks.operator.cases import CONCEPTS, METHODS, Layer, make

from fastnegate.operator.backends import cpu

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(cpu.unavailable() is not None, reason=f"{cpu.unavailable()}"),
]


def test_calls_do_what_their_names_say() -> None:
    case = make(Layer("joint", 2, 24, 16, 12, batch=1), CONCEPTS["1x8"], METHODS["nag"])
    with torch.inference_mode():
        found = {name: call() for name, call in partials.calls(case).items()}
    published = found.pop("two passes and a mix")
    torch.testing.assert_close(found["shared, prompt keys"], published)
    torch.testing.assert_close(found["shared, prompt as a partial"], published)
    for name in (partials.PLAIN, "image as a partial"):
        assert not torch.allclose(found[name], published)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--queries", "16", "--keys", "8", "--heads", "2", "--dim", "8", "--rounds", "2"]
    assert partials.main([*small, "--concepts", "1x8", "--dtypes", "bfloat16"]) == 0
    machine, case, *ratios = capsys.readouterr().out.splitlines()
    assert "AMX" in machine and case.startswith("joint 1x8 nag bfloat16: ")
    assert len(ratios) == 4 and all("[" in line for line in ratios)
    with pytest.raises(SystemExit):
        partials.main(["--queries", "0"])
    assert "a whole number >= 1" in capsys.readouterr().err
