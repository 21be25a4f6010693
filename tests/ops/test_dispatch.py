"""The waist: order of preference, refusals with reasons, forced backends, nothing silent."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch

from fastedit.ops import _dispatch
from fastedit.ops._dispatch import Candidate, Impl, Slower, backend, define_op, explain, report

CALLS: list[str] = []


def _fast(C: torch.Tensor, K: torch.Tensor) -> None:
    CALLS.append("fast")
    C.add_(K.sum())


def _refuse(C: torch.Tensor, K: torch.Tensor) -> str | None:
    if K.dim() > 1:
        return f"K must be flat, got {K.dim()} dimensions"
    return Slower("K is short") if K.numel() < 4 else None


def _eager(C: torch.Tensor, K: torch.Tensor) -> None:
    CALLS.append("eager")
    C.add_(K.sum())


@pytest.fixture(scope="module")
def toy():
    here = sys.modules[__name__]
    sys.modules["fastedit_toy_kernels"] = here
    op = define_op(
        "toy_",
        "(Tensor(a!) C, Tensor K) -> ()",
        lambda C, K: None,
        _eager,
        [
            Impl("cuda", "cuda", "fastedit_toy_kernels:_fast", lambda *args: None),
            Impl("cpu", "cpu", "fastedit_toy_kernels:_fast", _refuse),
        ],
    )
    yield op
    del sys.modules["fastedit_toy_kernels"]
    del _dispatch._OPS["toy_"]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTEDIT_BACKEND", raising=False)
    CALLS.clear()


def test_first_that_accepts_runs(toy) -> None:
    C = torch.zeros(2)
    toy(C, torch.ones(5))
    toy(C, torch.ones(3))  # refused as slower
    toy(C, torch.ones(2, 2))  # refused
    assert CALLS == ["fast", "eager", "eager"]
    assert C.tolist() == [12.0, 12.0]


def test_forced_backend_runs_what_is_only_slower(toy) -> None:
    with backend("cpu"):
        toy(torch.zeros(2), torch.ones(3))
    with backend("eager"):
        toy(torch.zeros(2), torch.ones(5))
    assert CALLS == ["fast", "eager"]


def test_forced_backend_raises_with_the_reason(toy) -> None:
    C = torch.zeros(2)
    with backend("cpu"), pytest.raises(RuntimeError, match="K must be flat, got 2 dimensions"):
        toy(C, torch.ones(2, 2))
    with (
        backend("triton"),
        pytest.raises(RuntimeError, match=r"no such implementation \(it has: eager, cuda, cpu\)"),
    ):
        toy(C, torch.ones(5))
    with backend("cuda"), pytest.raises(RuntimeError, match="it takes cuda tensors, these are on cpu"):
        toy(C, torch.ones(5))
    assert CALLS == [] and C.eq(0).all()


def test_backend_nests_restores_and_stays_in_its_thread(toy) -> None:
    seen = []
    with backend("eager"):
        with backend("cpu"):
            toy(torch.zeros(1), torch.ones(5))
        toy(torch.zeros(1), torch.ones(5))
        thread = threading.Thread(target=lambda: seen.append(_dispatch._forced()))
        thread.start()
        thread.join()
    assert CALLS == ["fast", "eager"] and seen == [None] and _dispatch._forced() is None


def test_environment_forces_too(toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTEDIT_BACKEND", "eager")
    toy(torch.zeros(1), torch.ones(5))
    with backend("cpu"):
        toy(torch.zeros(1), torch.ones(5))
    assert CALLS == ["eager", "fast"]
    monkeypatch.setenv("FASTEDIT_BACKEND", "gpu")
    with pytest.raises(
        ValueError, match="FASTEDIT_BACKEND must be one of eager, cpu, triton, cuda, got 'gpu'"
    ):
        toy(torch.zeros(1), torch.ones(5))


def test_unknown_backend_is_refused_on_entry() -> None:
    with (
        pytest.raises(ValueError, match="name must be one of eager, cpu, triton, cuda, got 'fpga'"),
        backend("fpga"),
    ):
        pass


def test_explain_tells_what_runs_and_why(toy) -> None:
    rows = explain("toy", torch.zeros(1), torch.ones(5))
    assert [row.name for row in rows] == ["cuda", "cpu", "eager"]
    assert rows[0] == Candidate("cuda", False, "it takes cuda tensors, these are on cpu")
    assert rows[1].chosen and not rows[2].chosen
    rows = explain("toy_", torch.zeros(1), K=torch.ones(3))
    assert rows[1].reason == "K is short" and rows[2].chosen
    with backend("cpu"):
        assert explain("toy_", torch.zeros(1), torch.ones(3))[1].chosen
    with pytest.raises(ValueError, match="op must be one of .*toy_.*, got 'nosuch'"):
        explain("nosuch")


def test_a_missing_module_is_a_recorded_reason() -> None:
    impl = Impl("cpu", "cpu", "fastedit._cpu:no_such_function", lambda *args: None)
    assert "fastedit._cpu" in str(_dispatch._refusal(impl, "cpu", ()))
    absent = replace(impl, load="no_such_module_at_all:f")
    assert _dispatch._refusal(absent, "cpu", ()) == "module no_such_module_at_all is not installed"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "fpga"}, "name must be one of"),
        ({"device": "tpu"}, "device must be"),
        ({"load": "module.function"}, "load must be 'module:function'"),
    ],
)
def test_impl_checks_itself(change: dict[str, str], message: str) -> None:
    impl = Impl("cpu", "cpu", "a:b", lambda *args: None)
    with pytest.raises(ValueError, match=message):
        replace(impl, **change)


def test_op_names_are_unique(toy) -> None:
    with pytest.raises(ValueError, match="op 'toy_' is already defined"):
        define_op("toy_", "(Tensor K) -> ()", lambda K: None, lambda K: None)


def test_opcheck_and_compile(toy) -> None:
    torch.library.opcheck(toy, (torch.zeros(2), torch.ones(5)))
    C = torch.zeros(2)
    torch.compile(lambda C, K: toy(C, K), backend="eager", fullgraph=True)(C, torch.ones(5))
    assert C.tolist() == [5.0, 5.0]


def test_report_is_json() -> None:
    found = json.loads(json.dumps(report()))
    assert found["torch"] == torch.__version__
    assert [row["name"] for row in found["ops"]["second_moment_"]] == ["triton", "cuda", "cpu", "eager"]
    for name in ("triton", "_cpu", "_cuda"):
        assert found[name]["available"] or found[name]["reason"]


def test_importing_the_ops_imports_no_kernel() -> None:
    code = (
        "import sys, fastedit, fastedit.ops.second_moment\n"
        "fastedit.backend, fastedit.explain\n"
        "print([m for m in ('triton', 'transformers', 'fastedit._cpu', 'fastedit._cuda') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
