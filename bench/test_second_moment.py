"""second_moment_ against its naive twin, C += K^T K in C's dtype."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from cases import Case, second_moment_cases

CPU = second_moment_cases("cpu")
GPU = second_moment_cases("cuda")


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("backend", ["reference", "eager", "cpu"])
@pytest.mark.parametrize("case", CPU, ids=lambda case: case.id)
def test_cpu(bench_op: Callable[[Case, str, str], float | None], case: Case, backend: str) -> None:
    bench_op(case, backend, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "eager", "triton", "cuda"])
@pytest.mark.parametrize("case", GPU, ids=lambda case: case.id)
def test_gpu(bench_op: Callable[[Case, str, str], float | None], case: Case, backend: str) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    bench_op(case, backend, "cuda")
