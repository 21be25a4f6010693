"""Build of fastedit: a pure-Python package plus two optional native modules, fastedit._cpu and fastedit._cuda.

FASTEDIT_SKIP_EXT=1          no native module (the package then runs on PyTorch and Triton)
FASTEDIT_CUDA=auto|on|off    _cuda: built when nvcc is found (default), always, never
CMAKE_CUDA_ARCHITECTURES     default "80-real;90": SASS for sm_80 and sm_90, PTX for what comes later
CMAKE_ARGS, CXX, CUDACXX     as usual
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def say(message: str) -> None:
    print(f"fastedit: {message}", file=sys.stderr, flush=True)


class CMakeExtension(Extension):
    """A module that CMake builds; `optional` ones may fail without failing the install."""

    def __init__(self, name: str, optional: bool = False) -> None:
        super().__init__(name, sources=[], optional=optional)


class CMakeBuild(build_ext):
    """Runs one CMake configure and build per module, output where setuptools wants it (in place when editable)."""

    def build_extension(self, ext: Extension) -> None:
        module = ext.name.rpartition(".")[2]
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        work = Path(self.build_temp).resolve() / module
        work.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            f"-S{ROOT}",
            f"-B{work}",
            f"-DFASTEDIT_MODULE={module}",
            f"-DFASTEDIT_OUTPUT={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DCMAKE_BUILD_TYPE=Release",
        ]
        if shutil.which("ninja"):
            configure.append("-GNinja")
        architectures = os.environ.get("CMAKE_CUDA_ARCHITECTURES")
        if architectures:
            configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={architectures}")
        configure += os.environ.get("CMAKE_ARGS", "").split()
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(work), "--parallel", jobs], check=True)
        except subprocess.CalledProcessError as error:
            if ext.optional:
                say(f"{ext.name} could not be built and is left out; FASTEDIT_CUDA=on makes this an error.")
                return
            raise SystemExit(
                f"fastedit: building {ext.name} failed ({error.cmd[0]} exit {error.returncode}); "
                "FASTEDIT_SKIP_EXT=1 installs without native kernels."
            ) from error


def extensions() -> list[Extension]:
    """The modules this machine can build; says in one line what is left out."""
    if os.environ.get("FASTEDIT_SKIP_EXT", "0") not in ("", "0"):
        return []
    cuda = os.environ.get("FASTEDIT_CUDA", "auto").lower()
    if cuda not in ("auto", "on", "off"):
        raise SystemExit(f"fastedit: FASTEDIT_CUDA must be auto, on or off, got {cuda!r}")
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    missing = []
    if compiler is None or shutil.which(compiler.split()[0]) is None:
        missing.append("C++ compiler")
    if shutil.which("cmake") is None:
        missing.append("cmake")
    if missing:
        if cuda == "on":
            raise SystemExit(f"fastedit: FASTEDIT_CUDA=on, but there is no {' and no '.join(missing)}")
        say(
            f"no {' and no '.join(missing)} found: installing without native kernels (PyTorch and Triton only)."
        )
        return []
    modules = [CMakeExtension("fastedit._cpu")]
    nvcc = (
        os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    )
    if cuda == "on" and nvcc is None:
        raise SystemExit("fastedit: FASTEDIT_CUDA=on, but nvcc is not on PATH and CUDACXX is not set")
    if cuda != "off" and nvcc is not None:
        os.environ.setdefault("CUDACXX", nvcc)
        modules.append(CMakeExtension("fastedit._cuda", optional=cuda == "auto"))
    return modules


setup(
    packages=[*find_packages(include=["fastedit", "fastedit.*"]), "fastedit.kernels"],
    # kernels/ has no __init__.py and is never installed under its own name, which belongs to another distribution.
    package_dir={"fastedit.kernels": "kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": CMakeBuild},
)
