# SPDX-License-Identifier: Apache-2.0
"""The integration under the oldest diffusers that pyproject.toml allows: what is reached into there (its
attention dispatcher, its processors, its pipelines' loops) is what it is in the newest, which is installed.

The oldest is in the folder FASTNEGATE_DIFFUSERS_OLDEST, which .ci/run fills, and is run in a child.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

pytest.importorskip("diffusers")
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OLDEST = os.environ.get("FASTNEGATE_DIFFUSERS_OLDEST")

CHILD = """
import sys, pytest, diffusers
from packaging.version import Version
oldest, *arguments = sys.argv[1:]
assert Version(diffusers.__version__) == Version(oldest), f"{diffusers.__version__} in {diffusers.__file__}"
sys.exit(pytest.main(arguments))
"""
RUNS = {
    "joint": ["models/test_joint.py", "-k", "literal_passes and published or blocks or guidance"],
    "families": ["models/test_families.py", "test_processor.py", "-k", "not compile"],
}


def declared() -> str:
    """The lower bound in pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text()
    return re.search(r'^diffusers = \["diffusers>=([\d.]+)"', text, re.M)[1]


def test_one_number_of_diffusers() -> None:
    """What is declared is what .ci/run installs, and tests with a child."""
    installed = re.findall(r"diffusers==([\w.]+)", (ROOT / ".ci" / "run").read_text())
    assert [Version(version) for version in installed] == [Version(declared())]


@pytest.mark.skipif(not OLDEST, reason="FASTNEGATE_DIFFUSERS_OLDEST is not set; .ci/run sets it")
@pytest.mark.parametrize("run", RUNS)
def test_under_the_oldest_diffusers(run: str) -> None:
    assert OLDEST is not None
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(OLDEST).resolve()), *filter(None, [env.get("PYTHONPATH")])])
    arguments = [str(HERE / part) if part.endswith(".py") else part for part in RUNS[run]]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, declared(), *arguments, "-q", "-x", "-p", "no:cacheprovider"],
        cwd=ROOT, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
