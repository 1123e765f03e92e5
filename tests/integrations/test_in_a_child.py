# SPDX-License-Identifier: Apache-2.0
"""The integration beside packages that are not installed. The oldest diffusers that pyproject.toml allows:
all that is reached into (its attention dispatcher, its processors, its pipelines' loops) has to be there what
it is in the newest. And torchao, which other packages import wherever they find it.

Each is in a folder that .ci/run fills and names in a variable, and is run in a child.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.version import Version

pytest.importorskip("diffusers")
HERE = Path(__file__).parent
ROOT = HERE.parents[1]

CHILD = """
import importlib.metadata, sys, pytest
from packaging.version import Version
package, folder, version, *arguments = sys.argv[1:]
assert Version(importlib.metadata.version(package)) == Version(version)
assert __import__(package).__file__.startswith(folder), __import__(package).__file__
sys.exit(pytest.main(arguments))
"""


class Run(NamedTuple):
    """Tests under one package."""

    package: str
    folder: str  # the variable that names it
    tests: tuple[str, ...]


RUNS = {
    "joint": Run(
        "diffusers",
        "FASTNEGATE_DIFFUSERS_OLDEST",
        ("models/test_joint.py", "-k", "literal_passes and published or blocks or guidance"),
    ),
    "families": Run(
        "diffusers",
        "FASTNEGATE_DIFFUSERS_OLDEST",
        # It offloads groups on accelerators alone, and caches within models alone that were never called.
        (
            "models/test_families.py",
            "test_processor.py",
            "models/test_features.py::test_what_a_call_that_failed_left_in_a_cache_is_not_used[MagCache]",
            "-k",
            "not compile and not _group_offload and not _first_block_cache",
        ),
    ),
    "torchao": Run("torchao", "FASTNEGATE_TORCHAO", ("models/test_features.py", "-k", "torchao")),
}


def version(package: str) -> str:
    """What .ci/run installs."""
    return re.search(rf"\b{package}==([\w.]+)", (ROOT / ".ci" / "run").read_text())[1]


def test_the_oldest_diffusers_is_the_one_that_is_declared() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    declared = re.search(r'^diffusers = \["diffusers>=([\d.]+)"', text, re.M)[1]
    assert Version(version("diffusers")) == Version(declared)


@pytest.mark.parametrize("name", RUNS)
def test_in_a_child(name: str) -> None:
    package, variable, tests = RUNS[name]
    if variable not in os.environ:
        pytest.skip(f"{variable} is not set; .ci/run sets it")
    folder = str(Path(os.environ[variable]).resolve())
    ours = ("PYTEST_", "FASTNEGATE_")
    env = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    env["PYTHONPATH"] = os.pathsep.join([folder, *filter(None, [env.get("PYTHONPATH")])])
    arguments = [str(HERE / word) if ".py" in word else word for word in tests]
    child = subprocess.run(
        [sys.executable, "-c", CHILD, package, folder, version(package), "-q", "-x", *arguments],
        cwd=ROOT, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    output = child.stdout[-8000:] + child.stderr[-2000:]
    assert child.returncode == 0, output
    assert " passed" in child.stdout.splitlines()[-1], output
