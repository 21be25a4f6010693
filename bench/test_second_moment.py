"""second_moment_ against its naive twin, C += K^T K in C's dtype, and against one fp32 product of upcast keys.

The second comparison has the goals: it is what a user would write, and it is less exact than ours. Its speed is read
against the ceiling of the instructions that run, its error is that of C and of an update solved with C.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import record
import torch
from cases import second_moment_cases
from op_bench import op_benches
from torch import Tensor

import fastedit
from fastedit.ops import mirror_, second_moment_
from fastedit.ops.second_moment import Precision

CPU = second_moment_cases("cpu")
GPU = second_moment_cases("cuda")

test_cpu, test_gpu = op_benches(CPU, GPU, native=["cpu"], device=["triton", "cuda"])

TOKENS = 4096
ROUNDS = 5


@dataclass(frozen=True)
class Way:
    """Keys, level and precision; tile products a product of keys takes; goal: ratio to reach at d=4096."""

    keys: torch.dtype
    level: str
    precision: Precision = "default"
    planes: int = 1
    goal: float = 1.0

    @property
    def id(self) -> str:
        return f"{str(self.keys).removeprefix('torch.')}-{self.level}-{self.precision}"


WAYS = [
    Way(torch.bfloat16, "amx", goal=10.0),
    Way(torch.bfloat16, "avx512", goal=1.3),
    Way(torch.float16, "amx", planes=4, goal=2.0),
    Way(torch.float32, "amx", planes=4, goal=2.0),
    Way(torch.float32, "amx", "exact", planes=6, goal=1.4),
    Way(torch.float32, "avx512", "exact", goal=1.4),
]


def upcast(C: Tensor, K: Tensor) -> None:
    """What a user would write; C fp32."""
    X = K.float()
    C.addmm_(X.T, X)


def levels() -> list[str]:
    from fastedit import _cpu

    return list(_cpu.info()["isa_levels"])


def seconds(call: Callable[..., None], *args: Any) -> float:
    start = time.process_time()
    call(*args)
    return time.process_time() - start


@pytest.mark.parametrize("master", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.id)
@pytest.mark.parametrize("d", [1024, 1600, 4096, 6400])
def test_against_one_fp32_product(
    request: pytest.FixtureRequest,
    benchmark: Any,
    bench_row: Callable[..., None],
    one_thread: None,
    monkeypatch: pytest.MonkeyPatch,
    d: int,
    way: Way,
    master: torch.dtype,
) -> None:
    from fastedit import _cpu

    if way.level not in levels():
        pytest.skip(f"this machine has no {way.level}")
    monkeypatch.setenv("FASTEDIT_ISA", way.level)
    K = torch.randn(TOKENS, d, generator=torch.Generator().manual_seed(0)).to(way.keys)
    C, product = torch.zeros(d, d, dtype=master), torch.zeros(d, d)

    def ours() -> None:
        with fastedit.backend("cpu"):
            second_moment_(C, K, precision=way.precision)

    ours()
    upcast(product, K)
    error, its_error = (last_rows_error(result, K) for result in (C, product))
    assert error <= (5e-6 if way.precision == "default" and way.planes > 1 else 3e-7), f"{error:.1e}"
    naive, fast = [], []
    for _ in range(ROUNDS):
        naive.append(seconds(upcast, product, K))
        fast.append(seconds(ours))
    took = statistics.median(fast)
    ratio = statistics.median(naive) / took
    ceiling = _cpu.peak("amx_bf16" if way.level == "amx" else "fma_f32", 0.2)
    share = way.planes * TOKENS * d * (d + 1) / took / ceiling
    benchmark.group = f"second_moment_ d={d}"
    benchmark.extra_info.update(
        record.machine(),
        way=way.id,
        master=str(master),
        seconds=took,
        ratio_to_fp32_product=ratio,
        ceiling=ceiling,
        share_of_ceiling=share,
        error=error,
        error_of_fp32_product=its_error,
    )
    benchmark.pedantic(ours, rounds=1)
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
    bench_row(
        op="second_moment_ against one fp32 product",
        shape=f"d={d} T={TOKENS}",
        dtype=f"{names[way.keys]} keys{', exact' * (way.precision == 'exact')}, {names[master]} C",
        backend=way.level,
        seconds=took,
        ratio=ratio,
        goal=way.goal if d == 4096 and way.goal > 1 else None,
        error=error,
        unit="bf16" if way.level == "amx" else "fp32",
        flops=float(way.planes * TOKENS * d * (d + 1)),
        bytes=float(TOKENS * d * way.keys.itemsize + d * (d + 1) * master.itemsize),
    )
    print(
        f"\nd={d} {way.id} C {str(master).removeprefix('torch.')}: {1e3 * took:.1f} ms, {ratio:.2f}x one fp32 product, "
        f"{100 * share:.0f} % of {ceiling / 1e9:.0f} GF/s, error {error:.1e} (product {its_error:.1e}), "
        f"load {os.getloadavg()[0]:.1f}"
    )
    if d == 4096 and request.config.getoption("--gate"):
        assert ratio >= way.goal, f"{ratio:.2f}x, the goal is {way.goal:.1f}x"


def last_rows_error(C: Tensor, K: Tensor) -> float:
    """Relative Frobenius error of the last 256 rows of the triangle against fp64."""
    first = C.shape[0] - 256
    exact = (K[:, first:].double().T @ K.double()).tril(first)
    return float((C[first:].double().tril(first) - exact).norm() / exact.norm())


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.id)
def test_error_of_an_update(
    benchmark: Any, one_thread: None, monkeypatch: pytest.MonkeyPatch, way: Way
) -> None:
    """D = R ((15000 C + K K^T)^-1 K)^T magnifies the error of C by its condition."""
    if way.level not in levels():
        pytest.skip(f"this machine has no {way.level}")
    monkeypatch.setenv("FASTEDIT_ISA", way.level)
    for condition in (1e3, 1e5, 1e7):
        keys, update = update_problem(condition, way.keys)
        ours, product = torch.zeros(512, 512, dtype=torch.float64), torch.zeros(512, 512)
        with fastedit.backend("cpu"):
            second_moment_(ours, keys, precision=way.precision)
        upcast(product, keys)
        exact = update(keys.double().T @ keys.double())
        error, its_error = (float((update(C) - exact).norm() / exact.norm()) for C in (ours, product))
        print(f"\n{way.id} condition {condition:.0e}: {error:.1e}, with one fp32 product {its_error:.1e}")
        benchmark.extra_info.update({f"{condition:.0e}": (error, its_error)})
        assert error < its_error
    benchmark.pedantic(lambda: None, rounds=1)


def update_problem(condition: float, dtype: torch.dtype) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Keys with a second moment of that condition, and the update as a function of it."""
    d, n = 512, 32
    generator = torch.Generator().manual_seed(1)
    basis, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    scales = torch.logspace(0, -0.5 * torch.tensor(condition).log10().item(), d, dtype=torch.float64)
    keys = torch.randn(16_384, d, generator=generator, dtype=torch.float64) * scales @ basis.T
    new = torch.randn(d, n, generator=generator, dtype=torch.float64)
    residual = torch.randn(64, n, generator=generator, dtype=torch.float64)

    def update(C: Tensor) -> Tensor:
        mirror_(C)
        return residual @ torch.linalg.solve(15_000 * C.double() / len(keys) + new @ new.T, new).T

    return keys.to(dtype), update
