"""The two tests of an op's bench: every case on every backend, on the CPU and on a CUDA device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cases import Case

__all__ = ["op_benches"]

BenchOp = Callable[[Case, str, str], float | None]


def op_benches(
    cpu: Sequence[Case], gpu: Sequence[Case], *, native: Sequence[str] = (), device: Sequence[str] = ()
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """``test_cpu, test_gpu = op_benches(CPU, GPU, native=["cpu"], device=["triton"])``.

    native, device: implementations to time beside the reference twin and the eager default.
    """

    @pytest.mark.parametrize("backend", ["reference", "eager", *native])
    @pytest.mark.parametrize("case", cpu, ids=lambda case: case.id)
    def test_cpu(bench_op: BenchOp, case: Case, backend: str) -> None:
        bench_op(case, backend, "cpu")

    @pytest.mark.gpu
    @pytest.mark.parametrize("backend", ["reference", "eager", *device])
    @pytest.mark.parametrize("case", gpu, ids=lambda case: case.id)
    def test_gpu(bench_op: BenchOp, case: Case, backend: str) -> None:
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        bench_op(case, backend, "cuda")

    return test_cpu, test_gpu
