# SPDX-License-Identifier: Apache-2.0
"""Build: the compiled extension through CMake, everything else declared in pyproject.toml.

FASTNEGATE_BUILD_CPU   auto (default): build the CPU kernels if they can be built
                       1: build them or fail; 0: do not build them
FASTNEGATE_BUILD_CUDA  auto (default) or 0: no CUDA kernels; 1: refused, this version has none
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

HERE = Path(__file__).parent.resolve()


def choice(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name}={value!r}: allowed are auto, 0, 1")
    return value


def build_cpu() -> bool:
    wanted = choice("FASTNEGATE_BUILD_CPU")
    compiler = shutil.which((os.environ.get("CXX") or "c++").split()[0]) or shutil.which("g++")
    build = wanted == "1" or (wanted == "auto" and compiler is not None)
    reason = f"compiler {compiler}" if build else "switched off" if wanted == "0" else "no C++ compiler"
    print(f"fastnegate: CPU kernels {'on' if build else 'off'} ({reason})", file=sys.stderr)
    return build


def check_cuda() -> None:
    if choice("FASTNEGATE_BUILD_CUDA") == "1":
        raise SystemExit("FASTNEGATE_BUILD_CUDA=1: this version has no CUDA kernels")
    print("fastnegate: CUDA kernels off (this version has none)", file=sys.stderr)


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt with Ninja; the result goes where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        work = Path(self.build_temp).resolve() / "cmake"
        work.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(HERE), "-B", str(work), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(work)], check=True)
        except subprocess.CalledProcessError as error:
            # An optional extension (auto) is then left out with a warning, a demanded one is an error.
            raise CompileError(f"the CPU kernels do not build: {error}") from error


version = re.search(r'__version__ = "(.+)"', (HERE / "python/fastnegate/__init__.py").read_text())
assert version is not None
check_cuda()
setup(
    version=version.group(1),
    packages=[
        *find_packages("python"),
        "fastnegate.triton_kernels",
        "fastnegate.benchmarks",
        "fastnegate.benchmarks.operator",
        "fastnegate.benchmarks.pipeline",
    ],
    package_dir={
        "": "python",
        "fastnegate.triton_kernels": "triton_kernels",
        "fastnegate.benchmarks": "benchmarks",
    },
    package_data={"fastnegate": ["py.typed"], "fastnegate.testbed": ["weights/**/*"]},
    include_package_data=False,
    ext_modules=[Extension("fastnegate._C", [], optional=choice("FASTNEGATE_BUILD_CPU") == "auto")]
    if build_cpu()
    else [],
    cmdclass={"build_ext": CMakeBuild},
)
