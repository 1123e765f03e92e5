# SPDX-License-Identifier: Apache-2.0
"""The repository itself: style, types, licence headers, and what README and CI promise."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    path
    for folder in ("python", "triton_kernels", "csrc", "benchmarks", "tests")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh") and "__pycache__" not in path.parts
]


def _run(*command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff():
    _run("ruff", "check", ".")


def test_format():
    _run("ruff", "format", "--check", ".")


def test_types():
    _run("mypy")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_licence_header(path: Path):
    assert "SPDX-License-Identifier: Apache-2.0" in path.read_text().splitlines()[0]


def test_ci_runs_the_test_command_of_the_readme():
    commands = re.findall(r"^python3 -m venv .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(commands) == 2
    last = (ROOT / ".ci" / "run").read_text().splitlines()[-1]
    assert last == commands[1]


def test_folders_and_modules_stay_small():
    """A folder with more than a dozen files wants rooms, a module of more than 350 lines wants to be two."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode != 0:
        pytest.skip("not a checkout")
    files = [Path(line) for line in tracked.stdout.splitlines()]
    sizes = Counter(file.parent for file in files if len(file.parts) > 1)
    assert {str(folder): size for folder, size in sizes.items() if size > 12} == {}
    modules = [file for file in files if file.match("*.py") and file.parts[0] == "python"]
    lines = {str(file): len((ROOT / file).read_text().splitlines()) for file in modules}
    assert len(lines) > 30 and {name: count for name, count in lines.items() if count > 350} == {}
