"""edit_solve with a cached factor against one dense solve per edit, both in float64: every form of the solver."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import reference.edit_solve
import torch
from cases import MODELS, Case
from op_bench import op_benches
from torch import Tensor

from fastedit.ops import EditHistory
from fastedit.ops.edit_solve import (
    CholeskyMetric,
    IdentityMetric,
    Metric,
    PackedMetric,
    ProjectorMetric,
    cholesky_factor,
    edit_solve,
)

WIDTH, QUICK = MODELS["gptj-6b"].width, MODELS["gptj-6b"].width // 4
Solved = Tensor | tuple[Tensor, Tensor]


def randn(device: torch.device, *shape: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, device=device, dtype=torch.float64)


@lru_cache(maxsize=1)  # the backends of a case come one after the other
def moment(f: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A second moment with eigenvalues over four decades, and its factor."""
    X = randn(device, f + 1000, f) * torch.logspace(0, -2, f, device=device, dtype=torch.float64)
    C = X.T @ X / X.shape[0]
    return C, cholesky_factor(C)


def residual(found: Solved, A: Callable[[Tensor], Tensor], wanted: Tensor) -> float:
    """Of Delta A = wanted: no second solve is needed to know that the answer is right."""
    delta = found if isinstance(found, Tensor) else found[0] @ found[1]
    return float((A(delta) - wanted).norm() / wanted.norm())


def memit_case(
    shape: str, f: int, d: int, n: int, goal: float | None, *, mu: float = 15000.0, form: str = "packed"
) -> Case:
    """Delta of n edits; the reference solves (mu C + K^T K) X = K^T, as MEMIT's code does, or C X = K^T for mu = 0."""

    def inputs(device: torch.device) -> tuple[Any, ...]:
        C, lower = moment(f, device)
        metric: Metric
        if form == "float32":
            metric = CholeskyMetric(lower.float(), C)
        else:
            metric = PackedMetric.of(lower) if form == "packed" else CholeskyMetric(lower)
        return metric, randn(device, n, f), randn(device, n, d), mu

    def naive(metric: Metric, K: Tensor, R: Tensor, mu: float) -> Tensor:
        C = moment(f, K.device)[0]
        if mu > 0:
            return reference.edit_solve.direct(C, K, R, mu=mu)
        seen = torch.linalg.solve(C, K.T)
        return R.T @ torch.linalg.solve(K @ seen, seen.T)

    def error(found: Solved, metric: Metric, K: Tensor, R: Tensor, mu: float) -> float:
        if mu > 0:
            C = moment(f, K.device)[0]
            return residual(found, lambda delta: mu * (delta @ C) + (delta @ K.T) @ K, R.T @ K)
        return residual(found, lambda delta: delta @ K.T, R.T)

    name = {"packed": "", "square": " square factor", "float32": " float32 factor"}[form]
    return Case(
        op="edit_solve",
        shape=f"{shape} {'memit' if mu else 'rome'}{name} f={f} d={d} n={n}",
        dtype="fp64",
        inputs=inputs,
        ours=lambda metric, K, R, mu: edit_solve(metric, K, R, mu=mu),
        reference=naive,
        error=error,
        tolerance=1e-9,
        flops=2.0 * n * f * f + 2.0 * n * n * (f + d),
        bytes=8.0 * f * f,
        goal=goal,
        goal_on="cpu" if form == "packed" else "eager",
    )


def alphaedit_case(shape: str, f: int, d: int, old: int, n: int, goal: float, *, state: bool = False) -> Case:
    """AlphaEdit's step after `old` edits; the reference solves its f x f system with P and the past moment at hand.

    state: the past is an `EditHistory`, as in a sequence of edits; else `edit_solve` gets the past keys.
    """
    kept: dict[str, Any] = {}

    def inputs(device: torch.device) -> tuple[Any, ...]:
        basis = torch.linalg.qr(randn(device, f, f // 2))[0]
        past = randn(device, old, f)
        kept.update(P=basis @ basis.T, C=past.T @ past)
        if state:
            kept["history"] = EditHistory(ProjectorMetric(basis), f, mu=10.0)
            kept["history"].append(past)
        return ProjectorMetric(basis), randn(device, n, f), randn(device, n, d), 10.0, past

    def ours(metric: ProjectorMetric, K: Tensor, R: Tensor, mu: float, past: Tensor) -> tuple[Tensor, Tensor]:
        if state:
            found: tuple[Tensor, Tensor] = kept["history"].solve(K, R)
            return found
        return edit_solve(metric, K, R, mu=mu, history=past)

    def naive(metric: ProjectorMetric, K: Tensor, R: Tensor, mu: float, past: Tensor) -> Tensor:
        A = kept["P"] @ (K.T @ K + kept["C"])
        A.diagonal().add_(mu)
        return torch.linalg.solve(A, kept["P"] @ (K.T @ R)).T

    def error(found: Solved, metric: ProjectorMetric, K: Tensor, R: Tensor, mu: float, past: Tensor) -> float:
        def system(delta: Tensor) -> Tensor:
            return ((delta @ K.T) @ K + (delta @ past.T) @ past + mu * delta) @ metric.basis

        return residual(found, system, (R.T @ K) @ metric.basis)

    return Case(
        op="edit_solve",
        shape=f"{shape} alphaedit {'state' if state else 'past keys'} f={f} d={d} past={old} n={n}",
        dtype="fp64",
        inputs=inputs,
        ours=ours,
        reference=naive,
        error=error,
        tolerance=1e-9,
        flops=2.0 * (n if state else old + n) * f * (f // 2)
        + 2.0 * n * f * (f // 2)
        + 2.0 * old * n * (f // 2),
        bytes=8.0 * f * (f // 2),
        goal=goal,
        goal_on="eager",
    )


def ultraedit_case(shape: str, f: int, d: int, n: int, goal: float) -> Case:
    """UltraEdit's turn of n tokens: the identity metric; the reference solves its f x f system."""

    def inputs(device: torch.device) -> tuple[Any, ...]:
        return IdentityMetric(), randn(device, n, f), randn(device, n, d), 1.0

    def naive(metric: IdentityMetric, K: Tensor, R: Tensor, mu: float) -> Tensor:
        A = K.T @ K
        A.diagonal().add_(mu)
        return torch.linalg.solve(A, K.T @ R).T

    def error(found: Solved, metric: IdentityMetric, K: Tensor, R: Tensor, mu: float) -> float:
        return residual(found, lambda delta: (delta @ K.T) @ K + mu * delta, R.T @ K)

    return Case(
        op="edit_solve",
        shape=f"{shape} ultraedit f={f} d={d} n={n}",
        dtype="fp64",
        inputs=inputs,
        ours=lambda metric, K, R, mu: edit_solve(metric, K, R, mu=mu),
        reference=naive,
        error=error,
        tolerance=1e-9,
        flops=1.0 * n * n * (f + 2 * d),
        bytes=8.0 * n * (f + d),
        goal=goal,
        goal_on="eager",
    )


def sequential_case(shape: str, f: int, d: int, old: int, n: int, goal: float | None) -> Case:
    """MEMIT's n edits after `old` others, past as an `EditHistory`; the reference has the past moment at hand."""
    kept: dict[str, Any] = {}

    def inputs(device: torch.device) -> tuple[Any, ...]:
        metric, past = PackedMetric.of(moment(f, device)[1]), randn(device, old, f)
        kept.update(C=past.T @ past, history=EditHistory(metric, f, mu=15000.0))
        kept["history"].append(past)
        return metric, randn(device, n, f), randn(device, n, d), 15000.0, past

    def ours(metric: PackedMetric, K: Tensor, R: Tensor, mu: float, past: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = kept["history"].solve(K, R)
        return found

    def naive(metric: PackedMetric, K: Tensor, R: Tensor, mu: float, past: Tensor) -> Tensor:
        return R.T @ torch.linalg.solve(mu * moment(f, K.device)[0] + kept["C"] + K.T @ K, K.T).T

    def error(found: Solved, metric: PackedMetric, K: Tensor, R: Tensor, mu: float, past: Tensor) -> float:
        C = moment(f, K.device)[0]

        def system(delta: Tensor) -> Tensor:
            return mu * (delta @ C) + (delta @ K.T) @ K + (delta @ past.T) @ past

        return residual(found, system, R.T @ K)

    return Case(
        op="edit_solve",
        shape=f"{shape} sequential memit f={f} d={d} past={old} n={n}",
        dtype="fp64",
        inputs=inputs,
        ours=ours,
        reference=naive,
        error=error,
        tolerance=1e-9,
        flops=2.0 * n * f * f + 4.0 * old * n * f + 2.0 * n * old**2,
        bytes=8.0 * f * f + 16.0 * old * f + 8.0 * old**2,
        goal=goal,
    )


# Ratios grow with f: a solve is f^3, an edit f^2.
FULL_GOALS = {1: 60.0, 32: 25.0, 256: 5.0, "past keys": 8.0, "state": 40.0, "ultraedit": 10.0}
QUICK_GOALS = {1: 10.0, 32: 5.0, 256: 2.0, "past keys": 8.0, "state": 10.0, "ultraedit": 10.0}


def goals(f: int) -> dict[Any, float]:
    return QUICK_GOALS if f == QUICK else FULL_GOALS


def packed(shape: str, f: int) -> list[Case]:
    """Forms whose solves are compiled."""
    d = f // 4
    return [
        memit_case(shape, f, d, 1, goals(f)[1], mu=0.0),
        *(memit_case(shape, f, d, n, goals(f)[n]) for n in (1, 32, 256)),
        sequential_case(shape, f, d, f // 4, 1, None),
        sequential_case(shape, f, d, f // 4, f // 40, None),
    ]


def others(shape: str, f: int) -> list[Case]:
    """Forms that are torch products on every device."""
    d = f // 4
    return [
        memit_case(shape, f, d, 32, None, form="square"),
        memit_case(shape, f, d, 32, None, form="float32"),
        alphaedit_case(shape, f, d, f // 16, f // 64, goals(f)["past keys"]),
        alphaedit_case(shape, f, d, f // 4, f // 40, goals(f)["state"], state=True),
        ultraedit_case(shape, f, d, 300 * f // WIDTH, goals(f)["ultraedit"]),
    ]


CPU = [
    *packed("gptj-6b width / 4", QUICK),
    memit_case("gptj-6b width / 4", QUICK, QUICK // 4, 3 * QUICK // 2, None),  # the f x f form
    *packed("gptj-6b width", WIDTH),
]
GPU = [
    memit_case(f"{name} key", MODELS[name].key, MODELS[name].width, n, None)
    for name in MODELS
    for n in (1, 100, 1000)
]
GPU.append(sequential_case("gpt2-xl key", MODELS["gpt2-xl"].key, MODELS["gpt2-xl"].width, 1600, 100, None))
FORMS_CPU = [*others("gptj-6b width / 4", QUICK), *others("gptj-6b width", WIDTH)]
FORMS_GPU = others("gpt2-xl key", MODELS["gpt2-xl"].key)

test_cpu, test_gpu = op_benches(CPU, GPU, native=["cpu"])
test_forms_cpu, test_forms_gpu = op_benches(FORMS_CPU, FORMS_GPU)
