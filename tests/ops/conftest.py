"""What the op tests share: the instruction-set levels of this machine, and forcing one."""

from __future__ import annotations

import importlib.util

import pytest


def _levels() -> list[str]:
    if importlib.util.find_spec("fastedit._cpu") is None:
        return []
    from fastedit import _cpu

    return list(_cpu.info()["isa_levels"])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`cpu_level` goes through every level of the compiled CPU kernels that this machine can run; so does
    `implementation`, after the eager default."""
    if "cpu_level" in metafunc.fixturenames:
        missing = pytest.param(
            None, marks=pytest.mark.skip(reason="fastedit._cpu is not built: `make build`")
        )
        metafunc.parametrize("cpu_level", _levels() or [missing], indirect=True)
    if "implementation" in metafunc.fixturenames:
        metafunc.parametrize("implementation", ["eager", *_levels()], indirect=True)


@pytest.fixture
def cpu_level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FASTEDIT_ISA", request.param)
    return str(request.param)


@pytest.fixture
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name for `backend`: the eager default, then the compiled kernels on every level of this machine."""
    if request.param == "eager":
        return "eager"
    monkeypatch.setenv("FASTEDIT_ISA", request.param)
    return "cpu"


@pytest.fixture
def native_cpu() -> None:
    """Skips where the CPU module is not built."""
    if not _levels():
        pytest.skip("fastedit._cpu is not built: `make build`")
