# SPDX-License-Identifier: Apache-2.0
"""The import graph: arrows go one way, and `import fastnegate` needs torch alone."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import fastnegate

ROOT = Path(fastnegate.__file__).parent
# The rooms. A module may import those of its own line and of the lines above; "" is the package itself.
# Within `operator`, the room that is one call, the modules have an order of their own.
LAYERS = (
    ("_C", "_cuda"),
    ("operator",),
    ("operator.rule", "operator.tokens", "operator.statistics"),
    ("operator.problem",),
    ("operator.plan",),
    ("operator.mixing", "operator.reference", "triton_kernels"),
    ("operator.backends",),
    ("operator.checks",),
    ("operator.choice", "operator.registration"),
    ("operator.attention", "operator.partials"),
    ("engine",),
    ("",),
    ("integrations",),
    ("testing",),
    ("testbed",),
    ("commands.doctor", "commands.options", "commands.progress"),  # what benchmarks share with commands
    ("benchmarks",),
    ("commands",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def rank(module: str) -> int:
    """Of the longest name in LAYERS that the module is, or is within."""
    name = module
    while name not in RANK:
        assert name, f"{module} is new: give it a place in LAYERS"
        name = name.rpartition(".")[0]
    assert name or not module, f"{module} is new: give it a place in LAYERS"
    return RANK[name]


class Import(NamedTuple):
    source: str  # "backends.cpu"; "" is the package
    target: str  # the same, or "diffusers.models" if outside
    inside: bool  # of this package
    scope: tuple[str, ...]  # names of the classes and functions around it


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(source: str) -> Iterator[Import]:
    path = MODULES[source]
    package = ["fastnegate", *source.split(".")] if source else ["fastnegate"]
    package = package if path.name == "__init__.py" else package[:-1]

    def of_package(name: str) -> Import | None:
        if name.split(".")[0] != "fastnegate":
            return None
        target = name.partition(".")[2]
        while target and target not in MODULES and target != "_C":
            target = target.rpartition(".")[0]  # a name in a module
        return Import(source, target, True, scope)

    def visit(node: ast.AST) -> Iterator[Import]:
        nonlocal scope
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        for name in names:
            yield of_package(name) or Import(source, name, False, scope)
        before = scope
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            scope = (*scope, node.name)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            scope = (*scope, "TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            yield from visit(child)
        scope = before

    scope: tuple[str, ...] = ()
    yield from visit(ast.parse(path.read_text()))


IMPORTS = [item for source in MODULES for item in imports(source)]


def test_the_graph_was_read() -> None:
    edges = {(i.source, i.target) for i in IMPORTS}
    assert ("operator.tokens", "operator.rule") in edges
    assert ("operator.backends.cpu", "operator.problem") in edges
    assert ("integrations.diffusers.install", "integrations.diffusers.contract") in edges
    assert ("integrations.diffusers.processor", "diffusers.models.attention_processor") in edges


def test_arrows_go_one_way() -> None:
    wrong = [
        f"{i.source} imports {i.target}" for i in IMPORTS if i.inside and rank(i.target) > rank(i.source)
    ]
    assert wrong == []


def test_there_are_no_cycles() -> None:
    graph: dict[str, set[str]] = {}
    for i in IMPORTS:
        # `from . import name` in a package is about the submodule, not the package.
        if i.inside and i.source != i.target:
            graph.setdefault(i.source, set()).add(i.target)
    list(graphlib.TopologicalSorter(graph).static_order())


def test_backends_stand_alone() -> None:
    """None imports another, none the reference that judges it or what chooses between them."""
    backends = [name for name in MODULES if name.startswith("operator.backends.")]
    assert {"operator.backends.cpu", "operator.backends.triton"} <= {*backends}
    others = ("reference", "mixing", "backends", "checks", "choice", "registration", "attention")
    forbidden = tuple(f"operator.{name}" for name in others)
    shared = "operator.backends.native"  # by cpu and cuda
    wrong = [
        f"{i.source} imports {i.target}"
        for i in IMPORTS
        if i.source in backends or i.source.startswith("triton_kernels")
        if i.inside and i.target.startswith(forbidden) and i.target != shared
    ]
    assert wrong == []


def test_modules_below_the_integrations_import_torch_alone() -> None:
    foreign = {
        (i.source, i.target.split(".")[0])
        for i in IMPORTS
        if not i.inside and not i.scope and rank(i.source) < RANK["integrations"]
        if i.target.split(".")[0] not in {*sys.stdlib_module_names, "torch"}
        if not i.source.startswith("triton_kernels")
    }
    assert foreign == set()


def run(code: str, *options: str, cwd: Path | None = None) -> str:
    command = [sys.executable, *options, "-c", code]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_fastnegate_loads_no_other_library() -> None:
    code = "import sys, torch; before = {*sys.modules}; import fastnegate; print(*({*sys.modules} - before))"
    loaded = {name.split(".")[0] for name in run(code).split()}
    assert "fastnegate" in loaded
    heavy = {"diffusers", "transformers", "triton", "triton_kernels", "matplotlib", "PIL", "safetensors"}
    assert not loaded & heavy


def test_triton_kernels_is_not_a_package_of_its_own(tmp_path: Path) -> None:
    """That name belongs to another package; ours is fastnegate.triton_kernels."""
    if not (ROOT / "triton_kernels").is_dir():
        pytest.skip("fastnegate is run from its source tree, where triton_kernels is a top-level folder")
    code = "import importlib.util as u; s = u.find_spec('triton_kernels'); print(s.origin if s else '')"
    origin = run(code, "-I", cwd=tmp_path)
    assert not origin or Path(origin).read_text() != (ROOT / "triton_kernels" / "__init__.py").read_text()
