# SPDX-License-Identifier: Apache-2.0
"""What `pip install .` builds: every choice of setup.py, and a small build of the CUDA kernels."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import setuptools

import fastnegate as fn

ROOT = Path(__file__).resolve().parent.parent
VARIABLES = ("FASTNEGATE_BUILD_CPU", "FASTNEGATE_BUILD_CUDA", "FASTNEGATE_CUDA_ARCHS", "CUDACXX", "CUDA_HOME",
             "CUDA_PATH", "MAX_JOBS", "CMAKE_ARGS")  # fmt: skip
CPU, CUDA = "fastnegate._C", "fastnegate._cuda"


# ---- choices ------------------------------------------------------------------------------------


@pytest.fixture
def nvcc(tmp_path: Path) -> Callable[..., Path]:
    """Writes an nvcc that knows its version and compiles nothing."""

    def write(release: str = "13.0", folder: str = "bin") -> Path:
        path = tmp_path / folder / "nvcc"
        path.parent.mkdir(parents=True, exist_ok=True)
        said = f"Cuda compilation tools, release {release}, V{release}.88"
        path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "{said}" && exit\nexit 1\n')
        path.chmod(0o755)
        return path

    return write


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, bool]]:
    """Runs setup.py up to `setup` where `found` are the only programs: extension -> whether it may fail."""

    def run(found: dict[str, Path] | None = None, **environment: str) -> dict[str, bool]:
        programs = {"c++": "/usr/bin/c++", **{name: str(path) for name, path in (found or {}).items()}}
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(shutil, "which", lambda program: programs.get(program))
        given: dict = {}
        monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
        runpy.run_path(str(ROOT / "setup.py"))
        return {extension.name: extension.optional for extension in given["ext_modules"]}

    return run


def test_without_nvcc(choose, capfd: pytest.CaptureFixture[str]):
    assert choose() == {CPU: True}
    printed = capfd.readouterr().err
    assert "CPU kernels on" in printed and printed.count("CUDA kernels off (no nvcc)") == 1
    with pytest.raises(SystemExit, match="FASTNEGATE_BUILD_CUDA=1: no nvcc"):
        choose(FASTNEGATE_BUILD_CUDA="1")


@pytest.mark.parametrize("place", ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "PATH", "usual", "PyPI"))
def test_nvcc_is_found(place: str, choose, nvcc, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    compiler = nvcc()
    site = sysconfig.get_path("purelib")
    names = {"PATH": "nvcc", "usual": "/usr/local/cuda/bin/nvcc", "PyPI": f"{site}/nvidia/cu13/bin/nvcc"}
    variables = {"CUDACXX": str(compiler), "CUDA_HOME": str(tmp_path), "CUDA_PATH": str(tmp_path)}
    environment = {place: variables[place]} if place in variables else {}
    assert choose({names.get(place, str(compiler)): compiler}, **environment) == {CPU: True, CUDA: True}
    assert f"CUDA kernels on for 80;90-real;100-real;120-real ({compiler}, CUDA 13.0)" in (
        capfd.readouterr().err
    )


def test_cudacxx_is_the_only_candidate(choose, nvcc, capfd: pytest.CaptureFixture[str]):
    assert choose({"nvcc": nvcc()}, CUDACXX="/nowhere/nvcc") == {CPU: True}
    assert "CUDA kernels off (no nvcc)" in capfd.readouterr().err


def test_an_old_nvcc(choose, nvcc, capfd: pytest.CaptureFixture[str]):
    found = {"nvcc": nvcc("12.8")}
    assert choose(found) == {CPU: True}
    assert "CUDA 12.8, is older than 13.0)" in capfd.readouterr().err
    with pytest.raises(SystemExit, match=r"FASTNEGATE_BUILD_CUDA=1: .*nvcc, CUDA 12\.8, is older than 13\.0"):
        choose(found, FASTNEGATE_BUILD_CUDA="1")


def test_an_nvcc_that_does_not_run(choose, nvcc, capfd: pytest.CaptureFixture[str]):
    broken = nvcc()
    broken.write_text("")
    assert choose({"nvcc": broken}) == {CPU: True}
    assert f"CUDA kernels off ({broken} does not say its version)" in capfd.readouterr().err


def test_a_later_nvcc(choose, nvcc):
    assert choose({"nvcc": nvcc("14.1")}) == {CPU: True, CUDA: True}


def test_each_is_chosen_for_itself(choose, nvcc):
    found = {"nvcc": nvcc()}
    assert choose(found, FASTNEGATE_BUILD_CUDA="0") == {CPU: True}
    assert choose(found, FASTNEGATE_BUILD_CUDA="1") == {CPU: True, CUDA: False}
    assert choose(found, FASTNEGATE_BUILD_CPU="0", FASTNEGATE_BUILD_CUDA="1") == {CUDA: False}
    assert choose(found, FASTNEGATE_BUILD_CPU="1") == {CPU: False, CUDA: True}
    assert choose(FASTNEGATE_BUILD_CPU="0") == {}
    for name in ("FASTNEGATE_BUILD_CPU", "FASTNEGATE_BUILD_CUDA"):
        with pytest.raises(SystemExit, match=f"{name}='yes': allowed are auto, 0, 1"):
            choose(**{name: "yes"})


@pytest.mark.parametrize("archs", ("75", "9.0", "90a", "80,90", "80;;90", "80;", "native", "sm_80", "80-ptx"))
def test_wrong_architectures(archs: str, choose):
    message = f"FASTNEGATE_CUDA_ARCHS={archs!r}: allowed are compute capabilities from 80 on"
    with pytest.raises(SystemExit, match=re.escape(message)):
        choose(FASTNEGATE_CUDA_ARCHS=archs)


def test_architectures(choose, nvcc, capfd: pytest.CaptureFixture[str]):
    choose({"nvcc": nvcc()}, FASTNEGATE_CUDA_ARCHS="80-virtual;90;120-real")
    assert "CUDA kernels on for 80-virtual;90;120-real (" in capfd.readouterr().err


def test_wrong_arguments_for_cmake(choose):
    message = """CMAKE_ARGS='-DA="b': No closing quotation; allowed are arguments quoted as for a shell"""
    with pytest.raises(SystemExit, match=re.escape(message)):
        choose(CMAKE_ARGS='-DA="b')


# ---- builds -------------------------------------------------------------------------------------

PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
needs_cmake = pytest.mark.skipif(
    importlib.util.find_spec("pybind11") is None
    or None in (shutil.which("cmake", path=PATH), shutil.which("ninja", path=PATH)),
    reason="the requirements of a build are not installed: pybind11, cmake, ninja",
)


def build(
    folder: Path, wanted: str, cudacxx: str | Path, arguments: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    """The package with the CUDA kernels alone, one architecture, one head_dim."""
    environment = {
        **{name: value for name, value in os.environ.items() if name not in VARIABLES},
        "PATH": PATH,
        "FASTNEGATE_BUILD_CPU": "0",
        "FASTNEGATE_BUILD_CUDA": wanted,
        "FASTNEGATE_CUDA_ARCHS": "80-real;90-virtual",
        "CUDACXX": str(cudacxx),
        "CMAKE_ARGS": f"-DFASTNEGATE_CUDA_DIMS=64 {arguments}",
        **variables,
    }
    command = [
        sys.executable,
        "setup.py",
        "build",
        "--build-lib",
        folder / "lib",
        "--build-temp",
        folder / "temp",
    ]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@needs_cmake
def test_a_failing_build(nvcc, tmp_path: Path):
    done = build(tmp_path, "auto", nvcc())
    assert done.returncode == 0, done.stderr
    assert "fastnegate._cuda does not build" in done.stdout + done.stderr
    assert (tmp_path / "lib/fastnegate/commands/cli.py").exists()
    assert not any((tmp_path / "lib").rglob("_cuda*.so"))
    assert build(tmp_path, "1", nvcc()).returncode != 0


@needs_cmake
def test_cmake_gets_more_arguments(nvcc, tmp_path: Path):
    cmake = nvcc(folder="programs").with_name("cmake")
    cmake.write_text('#!/bin/sh\nprintf "[%s]" "$@"\nexit 1\n')
    cmake.chmod(0o755)
    path = f"{cmake.parent}{os.pathsep}{PATH}"
    done = build(tmp_path, "1", nvcc(), "-DA=1 '-DB=two words'", PATH=path)
    assert done.returncode != 0 and "[-DA=1][-DB=two words]" in done.stdout


def system_nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def pypi_nvcc(folder: Path) -> Path | None:
    """That of PyPI's packages, installed here or, from the folder FASTNEGATE_CUDA_WHEELS, into `folder`."""
    site = Path(sysconfig.get_path("purelib"))
    if wheels := os.environ.get("FASTNEGATE_CUDA_WHEELS"):
        site = folder / "site"
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", site]
        subprocess.run([*install, *Path(wheels).glob("nvidia_*.whl")], check=True)
    found = site / "nvidia/cu13/bin/nvcc"
    return found if found.exists() else None


@needs_cmake
@pytest.mark.parametrize("toolchain", ("system", "PyPI"))
def test_the_built_package_works_without_cuda(toolchain: str, tmp_path: Path):
    compiler = system_nvcc() if toolchain == "system" else pypi_nvcc(tmp_path)
    if compiler is None:
        pytest.skip({
            "system": "no nvcc in PATH or /usr/local/cuda",
            "PyPI": "nvidia-cuda-nvcc 13 is not installed, nor in a folder FASTNEGATE_CUDA_WHEELS",
        }[toolchain])  # fmt: skip
    drive = f"-DFASTNEGATE_DRIVE=ON '-DCMAKE_RUNTIME_OUTPUT_DIRECTORY={tmp_path / 'a folder'}'"
    done = build(tmp_path, "1", compiler, drive)
    assert done.returncode == 0, done.stdout + done.stderr
    (module,) = (tmp_path / "lib/fastnegate").glob("_cuda*.so")
    needed = subprocess.run(["ldd", module], capture_output=True, text=True, check=True).stdout
    assert "libc.so" in needed and "cuda" not in needed.replace(str(module), "").lower()

    # Beside the CPU kernels of this install, as a package of its own.
    cpu = importlib.util.find_spec(CPU)
    if cpu is not None:
        shutil.copy(cpu.origin, module.parent)
    said = subprocess.run(
        [sys.executable, "-m", "fastnegate", "doctor"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "lib")},
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0, said.stdout + said.stderr
    assert "CUDA architectures of this build: 80-real;90-virtual\n" in said.stdout
    assert (cpu is None) or "  cpu: ok: 8 presets in " in said.stdout
    assert "; needed: CUDA 13.0 (driver 580) or later for this build\n" in said.stdout
    if not has_driver():
        assert "  cuda: not available: no driver\n" in said.stdout
        driven = subprocess.run([tmp_path / "a folder/drive", "small"], capture_output=True, text=True)
        assert (driven.returncode, driven.stdout, driven.stderr) == (3, "", "drive: no driver\n")


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def test_the_installed_module_says_what_is_missing():
    built = importlib.util.find_spec(CUDA) is not None
    if not built:
        assert fn.backends()["cuda"] == "not part of this install"
    elif not has_driver():
        assert fn.backends()["cuda"] == "no driver"
