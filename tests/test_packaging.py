"""What gets installed, and that it imports: from a wheel, an editable install, a checkout; with no compiler too."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = ["setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE", "NOTICE"]
FOLDERS = ["fastedit", "kernels", "csrc", "tests/ops", "bench/reference"]
# Where the package and a kernel come from; finding the kernel's file takes no torch, so this is quick.
FIND = """
import fastedit, importlib.util
print(fastedit.__file__, importlib.util.find_spec("fastedit.kernels.second_moment").origin)
"""

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").is_file() or any(shutil.which(name) is None for name in ("cmake", "ninja")),
    reason="needs a checkout, cmake and ninja: `pip install -e .[dev]`",
)


def run(*command: object, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Standard output and error of a command that must succeed."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean_environment(**(env or {})),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}"
    return done.stdout


def clean_environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FASTEDIT_")}
    for name in ("PYTHONPATH", "CXX", "CUDACXX", "CMAKE_ARGS"):
        kept.pop(name, None)
    return {**kept, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **changes}


def pip(*arguments: object, cwd: Path, env: dict[str, str] | None = None) -> str:
    return run(sys.executable, "-m", "pip", *arguments, cwd=cwd, env=env)


def wheel(checkout: Path, out: Path, **env: str) -> Path:
    pip("wheel", "-v", "--no-build-isolation", "--no-deps", "-w", out, checkout, cwd=out.parent, env=env)
    (built,) = out.glob("*.whl")
    return built


def copy_checkout(to: Path) -> Path:
    """The files a build reads, plus some it must leave out; never what an earlier build left in the tree."""
    for name in FILES:
        if (ROOT / name).is_file():
            to.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return to


def empty_environment(at: Path) -> Path:
    """An environment that sees this one's packages but not their .pth files, so not an editable fastedit."""
    run(sys.executable, "-m", "venv", "--without-pip", at, cwd=at.parent)
    (site,) = at.glob("lib/python*/site-packages")
    (site / "parent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return at / "bin" / "python"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("build") / "checkout")


@pytest.fixture(scope="module")
def pure_wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel(checkout, tmp_path_factory.mktemp("pure") / "out", FASTEDIT_SKIP_EXT="1")


def test_wheel_holds_the_package_and_nothing_else(pure_wheel: Path) -> None:
    assert pure_wheel.name.startswith("fastedit_kernels-") and pure_wheel.name.endswith("py3-none-any.whl")
    names = zipfile.ZipFile(pure_wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fastedit"}
    for path in ROOT.glob("kernels/*.py"):
        assert f"fastedit/kernels/{path.name}" in names
    for path in (ROOT / "fastedit").rglob("*.py"):
        assert path.relative_to(ROOT).as_posix() in names
    assert "fastedit/py.typed" in names
    for path in (ROOT / "fastedit").rglob("*.safetensors"):
        assert path.relative_to(ROOT).as_posix() in names
    assert not [name for name in names if name.endswith((".cpp", ".cu", ".so", ".h"))]


def test_kernels_folder_is_no_package() -> None:
    # A top-level package of that name would hide another distribution, which transformers imports.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not [path for path in (ROOT / "kernels").iterdir() if path.is_dir() and path.name != "__pycache__"]


def test_wheel_imports_from_anywhere(pure_wheel: Path, checkout: Path, tmp_path: Path) -> None:
    installed = tmp_path / "site"
    pip("install", "-q", "--no-deps", "--target", installed, pure_wheel, cwd=tmp_path)
    env = {"PYTHONPATH": str(installed)}
    package, kernel = run(sys.executable, "-c", FIND, cwd=tmp_path, env=env).split()
    assert Path(package) == installed / "fastedit" / "__init__.py"
    assert Path(kernel) == installed / "fastedit" / "kernels" / "second_moment.py"
    run(sys.executable, "-c", FIND, cwd=checkout, env=env)  # here the checkout comes first on sys.path
    code = "import fastedit; fastedit.backend; fastedit.explain('second_moment')"
    run(sys.executable, "-c", code, cwd=tmp_path, env=env)
    if importlib.util.find_spec("triton") is not None:
        run(sys.executable, "-c", "import fastedit.kernels.second_moment", cwd=tmp_path, env=env)


def test_checkout_imports_uninstalled(checkout: Path, tmp_path: Path) -> None:
    for cwd, env in ((checkout, {}), (tmp_path, {"PYTHONPATH": str(checkout)})):
        package, kernel = run(sys.executable, "-c", FIND, cwd=cwd, env=env).split()
        assert Path(package) == checkout / "fastedit" / "__init__.py"
        assert Path(kernel) == checkout / "kernels" / "second_moment.py"


def test_editable_install_imports(tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path / "checkout")
    python = empty_environment(tmp_path / "venv")
    pip(
        *("--python", python, "install", "-q", "--no-build-isolation", "--no-deps", "-e", checkout),
        cwd=tmp_path,
        env={"FASTEDIT_SKIP_EXT": "1"},
    )
    for cwd in (tmp_path, checkout):
        package, kernel = run(python, "-c", FIND, cwd=cwd).split()
        assert Path(package) == checkout / "fastedit" / "__init__.py"
        assert Path(kernel) == checkout / "kernels" / "second_moment.py"


def test_source_archive_can_be_built_from(checkout: Path, tmp_path: Path) -> None:
    code = f"import setuptools.build_meta as backend; backend.build_sdist({str(tmp_path)!r})"
    run(sys.executable, "-c", code, cwd=checkout, env={"FASTEDIT_SKIP_EXT": "1"})
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    (top,) = (tmp_path / "unpacked").iterdir()
    for name in (
        "CMakeLists.txt",
        "csrc/bindings_cpu.cpp",
        "kernels/second_moment.py",
        "fastedit/__init__.py",
    ):
        assert (top / name).is_file()
    assert not (top / "tests").exists() and not (top / "bench").exists()


def test_without_a_compiler_one_line_says_so(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    command = [sys.executable, "setup.py", "--version"]
    env = clean_environment(PATH=str(tmp_path / "bin"))
    done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("fastedit: ")]
    assert lines == [
        "fastedit: no C++ compiler and no cmake found: installing without native kernels (PyTorch and Triton only)."
    ]
    built = wheel(checkout, tmp_path / "out", PATH=str(tmp_path / "bin"))
    assert built.name.endswith("py3-none-any.whl")


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"FASTEDIT_CUDA": "yes"}, "FASTEDIT_CUDA must be auto, on or off, got 'yes'"),
        ({"FASTEDIT_CUDA": "on", "PATH": ""}, "FASTEDIT_CUDA=on, but there is no C++ compiler and no cmake"),
    ],
)
def test_bad_switches_stop_the_build(checkout: Path, env: dict[str, str], message: str) -> None:
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(
        command, cwd=checkout, env=clean_environment(**env), capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and message in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_native_wheel(checkout: Path, tmp_path: Path) -> None:
    built = wheel(checkout, tmp_path / "out", FASTEDIT_CUDA="off")
    assert "none-any" not in built.name
    native = [name for name in zipfile.ZipFile(built).namelist() if name.endswith(".so")]
    assert len(native) == 1 and native[0].startswith("fastedit/_cpu.")
    installed = tmp_path / "site"
    pip("install", "-q", "--no-deps", "--target", installed, built, cwd=tmp_path)
    code = "from fastedit import _cpu; print(_cpu.__file__); print('scalar' in _cpu.info()['isa_levels'])"
    out = run(sys.executable, "-c", code, cwd=tmp_path, env={"PYTHONPATH": str(installed)}).split()
    assert Path(out[0]).parent == installed / "fastedit" and out[1] == "True"


@pytest.mark.slow
@pytest.mark.aot
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_cuda_module_builds_without_spills_and_imports_without_a_gpu(checkout: Path, tmp_path: Path) -> None:
    out = tmp_path / "fastedit"
    configure = ["cmake", f"-S{checkout}", f"-B{tmp_path / 'work'}", "-GNinja", "-DFASTEDIT_MODULE=_cuda"]
    run(*configure, f"-DFASTEDIT_OUTPUT={out}", f"-DPython_EXECUTABLE={sys.executable}", cwd=tmp_path)
    log = run("cmake", "--build", tmp_path / "work", "--verbose", cwd=tmp_path)
    frames = [line for line in log.splitlines() if "bytes stack frame" in line]
    assert frames, "the log has no resource table"
    assert all("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in line for line in frames)
    assert "for 'sm_80'" in log and "for 'sm_90'" in log and "for 'sm_90a'" in log
    # The compiler says so where it makes asynchronous products wait for each other.
    assert "C7510" not in log and "C7517" not in log
    run(sys.executable, "-c", "import _cuda; print(_cuda.info())", cwd=out)
