# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel under the newest Triton and the oldest that pyproject.toml allows: the layers that are
used most are compiled without a spill, and what is compiled computes the definition.

The newest is the one that is installed. The oldest is in the folder FASTNEGATE_TRITON_OLDEST, which .ci/run
fills, and is run in a child.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from packaging.version import Version

pytest.importorskip("triton")
from compiler import NEGATIONS, Layer

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
OLDEST = os.environ.get("FASTNEGATE_TRITON_OLDEST")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Triton's, for this run alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler")
@pytest.mark.usefixtures("one_thread", "cache")
# Compiling takes seconds; the other dtype is for releases.
@pytest.mark.parametrize(
    "dtype", (pytest.param(torch.float16, marks=pytest.mark.full), torch.bfloat16), ids=str
)
@pytest.mark.parametrize("dim", (40, 64))
@pytest.mark.parametrize("target", ("sm_80", "sm_90"))
def test_spills_nothing(target: str, dim: int, dtype: torch.dtype) -> None:
    """As Stable Diffusion and SDXL launch it. What else compilers make of it is in test_compiled.py, by the
    newest alone."""
    for negation in ("protore", "vsf", "nag"):
        launches = Layer(target, dim, dtype, negation).compiled()
        assert len(launches) == NEGATIONS[negation].launches
        for launch in launches:
            print(launch.kernel)
            assert launch.kernel.matrix and launch.kernel.registers > 0
            assert launch.kernel.spills == launch.kernel.stack == 0


# ---- the oldest -------------------------------------------------------------------------------------

CHILD = """
import sys, pytest, triton
from packaging.version import Version
oldest, *arguments = sys.argv[1:]
assert Version(triton.__version__) == Version(oldest), f"{triton.__version__} in {triton.__file__}"
sys.exit(pytest.main(arguments))
"""
# The simulated problems; what a run on a GPU compiles ahead; and the compiled layers, with a look at whether
# registers, spills and matrix instructions are found in what this compiler writes.
SPILLS = "spills_nothing or counted and (sm_80 or sm_90)"
RUNS = {
    "results": ["test_triton_ptx.py"],
    "ahead": ["test_compiled_ahead.py", "-m", "full or not full"],
    "spills": ["test_triton_versions.py", "test_compiled.py", "-k", SPILLS],
}


def declared() -> str:
    """The lower bound in pyproject.toml."""
    return re.search(r'^triton = \["triton>=([\d.]+)"\]$', (ROOT / "pyproject.toml").read_text(), re.M)[1]


def test_one_number() -> None:
    """What is declared is what .ci/run installs, and tests with a child."""
    installed = re.findall(r"triton==([\w.]+)", (ROOT / ".ci" / "run").read_text())
    assert [Version(version) for version in installed] == [Version(declared())]


@pytest.mark.skipif(not OLDEST, reason="FASTNEGATE_TRITON_OLDEST is not set; .ci/run sets it")
@pytest.mark.parametrize("name", RUNS)
def test_under_the_oldest(name: str) -> None:
    """In one process, whose version is that which is declared."""
    ours = ("PYTEST_", "FASTNEGATE_", "TRITON_")
    env = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(OLDEST).resolve()), *filter(None, [env.get("PYTHONPATH")])])
    files = [str(HERE / word) if word.endswith(".py") else word for word in RUNS[name]]
    child = subprocess.run(
        [sys.executable, "-c", CHILD, declared(), "-q", "-ra", *files],
        env=env, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    output = child.stdout[-8000:] + child.stderr[-2000:]
    assert child.returncode == 0, output
    summary = child.stdout.splitlines()[-1]
    assert " passed" in summary and " skipped" not in summary, output
