"""edit_solve with a cached factor against one dense solve per edit, both in float64."""

from __future__ import annotations

from typing import Any

import reference.edit_solve
import torch
from cases import MODELS, Case
from op_bench import op_benches
from torch import Tensor

from fastedit.ops.edit_solve import CholeskyMetric, ProjectorMetric, cholesky_factor, edit_solve

WIDTH = MODELS["gptj-6b"].width


def memit_case(shape: str, f: int, d: int, n: int) -> Case:
    """Delta of n edits; the reference solves (mu C + K^T K) X = K^T, as MEMIT's code does."""
    kept: dict[str, Tensor] = {}

    def inputs(device: torch.device) -> tuple[Any, ...]:
        generator = torch.Generator(device).manual_seed(0)
        make = {"generator": generator, "device": device, "dtype": torch.float64}
        X = torch.randn(f + 1000, f, **make) * torch.logspace(0, -2, f, device=device, dtype=torch.float64)
        kept["C"] = X.T @ X / X.shape[0]
        K, R = torch.randn(n, f, **make), torch.randn(n, d, **make)
        return CholeskyMetric(cholesky_factor(kept["C"])), K, R, 15000.0

    def ours(metric: CholeskyMetric, K: Tensor, R: Tensor, mu: float) -> tuple[Tensor, Tensor]:
        return edit_solve(metric, K, R, mu=mu)

    def naive(metric: CholeskyMetric, K: Tensor, R: Tensor, mu: float) -> Tensor:
        return reference.edit_solve.direct(kept["C"], K, R, mu=mu)

    def error(found: Any, metric: CholeskyMetric, K: Tensor, R: Tensor, mu: float) -> float:
        # The residual of Delta (mu C + K^T K) = R^T K: no second solve is needed to know that the answer is right.
        delta = found if isinstance(found, Tensor) else found[0] @ found[1]
        wanted = R.T @ K
        return float((mu * (delta @ kept["C"]) + (delta @ K.T) @ K - wanted).norm() / wanted.norm())

    return Case(
        op="edit_solve",
        shape=f"{shape} f={f} d={d} n={n}",
        dtype="fp64",
        inputs=inputs,
        ours=ours,
        reference=naive,
        error=error,
        tolerance=1e-9,
        flops=2.0 * n * f * f + 2.0 * n * n * (f + d),
        bytes=8.0 * f * f,
    )


def alphaedit_case(shape: str, f: int, d: int, old: int, n: int) -> Case:
    """AlphaEdit's step in the dual; the reference solves its non-symmetric f x f system."""

    def inputs(device: torch.device) -> tuple[Any, ...]:
        generator = torch.Generator(device).manual_seed(0)
        make = {"generator": generator, "device": device, "dtype": torch.float64}
        basis = torch.linalg.qr(torch.randn(f, f // 2, **make))[0]
        K, R, history = torch.randn(n, f, **make), torch.randn(n, d, **make), torch.randn(old, f, **make)
        return ProjectorMetric(basis), K, R, 10.0, history

    def ours(
        metric: ProjectorMetric, K: Tensor, R: Tensor, mu: float, history: Tensor
    ) -> tuple[Tensor, Tensor]:
        return edit_solve(metric, K, R, mu=mu, history=history)

    def naive(metric: ProjectorMetric, K: Tensor, R: Tensor, mu: float, history: Tensor) -> Tensor:
        P = metric.basis @ metric.basis.T
        A = P @ (K.T @ K + history.T @ history)
        A.diagonal().add_(mu)
        return torch.linalg.solve(A, P @ (K.T @ R)).T

    def error(found: Any, metric: ProjectorMetric, K: Tensor, R: Tensor, mu: float, history: Tensor) -> float:
        delta = found if isinstance(found, Tensor) else found[0] @ found[1]
        wanted = (R.T @ K) @ metric.basis
        seen = (delta @ K.T) @ K + (delta @ history.T) @ history
        return float((seen @ metric.basis + mu * (delta @ metric.basis) - wanted).norm() / wanted.norm())

    return Case(
        op="edit_solve",
        shape=f"{shape} alphaedit f={f} d={d} history={old} n={n}",
        dtype="fp64",
        inputs=inputs,
        ours=ours,
        reference=naive,
        error=error,
        tolerance=1e-9,
        flops=2.0 * (old + n) * f * (f // 2) + 1.0 * (old + n) ** 2 * (f // 2),
        bytes=8.0 * f * (f // 2),
    )


CPU = [memit_case("gptj-6b width", WIDTH, WIDTH // 4, n) for n in (1, 32, 256)]
CPU.append(alphaedit_case("gpt2 key / 2", MODELS["gpt2"].key // 2, MODELS["gpt2"].width, 256, 64))
GPU = [
    memit_case(f"{name} key", MODELS[name].key, MODELS[name].width, n)
    for name in MODELS
    for n in (1, 100, 1000)
]

test_cpu, test_gpu = op_benches(CPU, GPU)
