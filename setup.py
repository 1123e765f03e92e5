# SPDX-License-Identifier: Apache-2.0
"""Build: the compiled extensions through CMake, everything else declared in pyproject.toml.

FASTNEGATE_BUILD_CPU   auto (default): build the CPU kernels if they can be built
                       1: build them or fail; 0: do not build them
FASTNEGATE_BUILD_CUDA  the same for the CUDA kernels, which need nvcc of CUDA 13.0 or later: CUDACXX, else the
                       first of CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda and nvidia-cuda-nvcc of PyPI
FASTNEGATE_CUDA_ARCHS  compute capabilities to build them for: "90" is binary and PTX, "90-real" the binary
                       alone, "90-virtual" the PTX alone; separated by semicolons
MAX_JOBS               compilers that run at a time; default: one per core
CMAKE_ARGS             more arguments for CMake, of both extensions, quoted as for a shell; with
                       "-DFASTNEGATE_DRIVE=ON -DCMAKE_RUNTIME_OUTPUT_DIRECTORY=/a/folder" a build of the CUDA
                       kernels puts benchmarks/gpu/drive.cpp there as a program
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

HERE = Path(__file__).parent.resolve()
CPU, CUDA = "fastnegate._C", "fastnegate._cuda"
OLDEST_CUDA = (13, 0)
# A binary also runs on later GPUs of its major version. All others, known and unknown, compile the PTX when
# they load it: it is that of the oldest, because the kernels use nothing that only later ones have.
ARCHS = "80;90-real;100-real;120-real"


def choice(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name}={value!r}: allowed are auto, 0, 1")
    return value


def archs() -> str:
    value = os.environ.get("FASTNEGATE_CUDA_ARCHS") or ARCHS
    if not all(re.fullmatch(r"([89]|1\d)\d(-real|-virtual)?", arch) for arch in value.split(";")):
        raise SystemExit(
            f"FASTNEGATE_CUDA_ARCHS={value!r}: allowed are compute capabilities from 80 on, separated by "
            "semicolons; 90 is binary and PTX, 90-real the binary alone, 90-virtual the PTX alone"
        )
    return value


def cmake_arguments() -> list[str]:
    value = os.environ.get("CMAKE_ARGS", "")
    try:
        return shlex.split(value)
    except ValueError as error:
        raise SystemExit(
            f"CMAKE_ARGS={value!r}: {error}; allowed are arguments quoted as for a shell"
        ) from error


def build_cpu() -> bool:
    wanted = choice("FASTNEGATE_BUILD_CPU")
    compiler = shutil.which((os.environ.get("CXX") or "c++").split()[0]) or shutil.which("g++")
    build = wanted == "1" or (wanted == "auto" and compiler is not None)
    reason = f"compiler {compiler}" if build else "switched off" if wanted == "0" else "no C++ compiler"
    print(f"fastnegate: CPU kernels {'on' if build else 'off'} ({reason})", file=sys.stderr)
    return build


def find_nvcc() -> str | None:
    if compiler := os.environ.get("CUDACXX"):
        return shutil.which(compiler)
    homes = filter(None, map(os.environ.get, ("CUDA_HOME", "CUDA_PATH")))
    sites = [*sys.path, sysconfig.get_path("purelib")]  # the latter is not in sys.path of an isolated build
    places = [
        *(f"{home}/bin/nvcc" for home in homes),
        "nvcc",
        "/usr/local/cuda/bin/nvcc",
        *(f"{site}/nvidia/cu13/bin/nvcc" for site in sites),
    ]
    return next(filter(None, map(shutil.which, places)), None)


def cuda_release(nvcc: str) -> tuple[int, int]:
    try:
        printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    except OSError as error:
        printed = str(error)
    found = re.search(r"release (\d+)\.(\d+)", printed)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def build_cuda() -> str | None:
    """The nvcc to build with, or None."""
    wanted = choice("FASTNEGATE_BUILD_CUDA")
    nvcc = None if wanted == "0" else find_nvcc()
    reason = "switched off" if wanted == "0" else "no nvcc"
    if nvcc is not None:
        release = cuda_release(nvcc)
        reason = f"{nvcc}, CUDA {release[0]}.{release[1]}"
        if release == (0, 0):
            nvcc, reason = None, f"{nvcc} does not say its version"
        elif release < OLDEST_CUDA:
            nvcc, reason = None, f"{reason}, is older than {OLDEST_CUDA[0]}.{OLDEST_CUDA[1]}"
    if wanted == "1" and nvcc is None:
        raise SystemExit(f"FASTNEGATE_BUILD_CUDA=1: {reason}; CUDACXX=/path/to/nvcc names another")
    build = f"on for {archs()}" if nvcc else "off"
    print(f"fastnegate: CUDA kernels {build} ({reason})", file=sys.stderr)
    return nvcc


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt with Ninja; the result goes where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # A folder for each: neither can spoil the other, or be compiled again because of it.
        work = Path(self.build_temp).resolve() / ext.name
        cache = work / "CMakeCache.txt"
        if ext.name == CUDA and cache.exists() and f"{nvcc}\n" not in cache.read_text():
            shutil.rmtree(work)  # CMake does not survive another compiler
        work.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        environment = dict(os.environ)
        configure = [
            "cmake", "-S", str(HERE), "-B", str(work), "-G", "Ninja",
            # Of this build, not of the last one, which an isolated build of pip has removed.
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFASTNEGATE_CPU={ext.name == CPU}",
            f"-DFASTNEGATE_CUDA={ext.name == CUDA}",
        ]  # fmt: skip
        if ext.name == CUDA:
            assert nvcc is not None
            configure += [
                f"-DCMAKE_CUDA_COMPILER={nvcc}",
                f"-DFASTNEGATE_CUDA_ARCHS={archs()}",
            ]
            # nvcc looks in lib64, which the packages of PyPI do not have.
            libraries = Path(nvcc).resolve().parent.parent / "lib"
            if (libraries / "libcudart_static.a").exists():
                environment["LIBRARY_PATH"] = f"{libraries}:{os.environ.get('LIBRARY_PATH', '')}"
        configure += cmake_arguments()
        try:
            subprocess.run(configure, check=True, env=environment)
            subprocess.run(["cmake", "--build", str(work), "-j", str(jobs)], check=True, env=environment)
        except subprocess.CalledProcessError as error:
            target.unlink(missing_ok=True)  # of an earlier build
            # An optional extension (auto) is then left out with a warning, a demanded one is an error.
            raise CompileError(f"{ext.name} does not build: {error}") from error


version = re.search(r'__version__ = "(.+)"', (HERE / "python/fastnegate/__init__.py").read_text())
assert version is not None
archs(), cmake_arguments()
cpu, nvcc = build_cpu(), build_cuda()
extensions = {CPU: ("FASTNEGATE_BUILD_CPU", cpu), CUDA: ("FASTNEGATE_BUILD_CUDA", nvcc)}
setup(
    version=version.group(1),
    packages=[
        *find_packages("python"),
        "fastnegate.triton_kernels",
        "fastnegate.benchmarks",
        *(f"fastnegate.benchmarks.{name}" for name in find_packages("benchmarks")),
    ],
    package_dir={
        "": "python",
        "fastnegate.triton_kernels": "triton_kernels",
        "fastnegate.benchmarks": "benchmarks",
    },
    package_data={"fastnegate": ["py.typed"], "fastnegate.testbed": ["weights/**/*", "hard/sprites/*"]},
    include_package_data=False,
    ext_modules=[
        Extension(name, [], optional=choice(variable) == "auto")
        for name, (variable, build) in extensions.items()
        if build
    ],
    cmdclass={"build_ext": CMakeBuild},
)
