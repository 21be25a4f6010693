"""The one solver of the closed-form family: ROME, R-ROME, MEMIT, PMET, EMMET, AlphaEdit, UltraEdit.

Each of them is Delta = R^T E^T (mu I + K_all M K_all^T)^-1 (K_all M) for a metric M (the inverse second moment of the
keys, a null-space projector, or the identity), with keys as rows, K_all the history keys followed by the new ones and
E selecting the new ones. M is never formed and nothing f x f is factored per edit: the metric brings its factor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from fastedit.ops._dispatch import Impl, define_op
from fastedit.ops.edit_form import solve_form
from fastedit.ops.edit_metric import (
    CholeskyMetric,
    IdentityMetric,
    Metric,
    PackedMetric,
    ProjectorMetric,
    check_keys,
    cholesky_factor,
    split,
    whitening,
)

__all__ = [
    "CholeskyMetric",
    "EditProblem",
    "IdentityMetric",
    "Metric",
    "PackedMetric",
    "ProjectorMetric",
    "apply_metric",
    "cholesky_factor",
    "edit_residual",
    "edit_solve",
    "edit_solve_layers",
]


@overload
def edit_solve(
    metric: Metric,
    K: Tensor,
    R: Tensor,
    *,
    mu: float,
    history: Tensor | None = ...,
    weights: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def edit_solve(
    metric: Metric,
    K: Tensor,
    R: Sequence[Tensor],
    *,
    mu: float,
    history: Tensor | None = ...,
    weights: Tensor | None = ...,
) -> tuple[tuple[Tensor, ...], Tensor]: ...
def edit_solve(
    metric: Metric,
    K: Tensor,
    R: Tensor | Sequence[Tensor],
    *,
    mu: float,
    history: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor | tuple[Tensor, ...], Tensor]:
    """Factors of Delta = R^T E^T (mu I + K_all M K_all^T)^-1 (K_all M), the update that maps keys to residuals.

    metric: `PackedMetric`, `CholeskyMetric`, `ProjectorMetric` or `IdentityMetric`.
    K: [..., n, f] keys of the new edits; R: [..., n, d] what their outputs must change by; any float dtype. Several
    targets of the same keys are a sequence of R.
    mu: >= 0. With 0 the keys are mapped exactly, (W + Delta) K^T = W K^T + R^T; where keys repeat or depend on each
    other the least-squares, minimum-norm answer is given (eigenvalues below N eps of the largest count as zero).
    history: [..., m, f] keys of earlier edits whose outputs must not change, or None (`EditHistory` keeps them
    factored).
    weights: [..., m] >= 0, how much each of them counts (a key with weight 2 is that key twice); None is 1.

    Returns (left [..., d, r], right [..., r, f]) in float64 with Delta = left @ right, r = min(n, d): for n > d the
    left factor is the identity. For several targets left is a tuple, one per target, and d the sum of theirs.
    Everything inside is float64. When n + m exceeds the metric's dimension the f x f form (mu C + K^T K) is factored
    instead: the same Delta, cheaper.
    Raises ValueError for wrong shapes, mu < 0 or non-finite keys, TypeError for an unknown metric.

        left, right = edit_solve(PackedMetric.of(cholesky_factor(C)), K, R, mu=15000.0)

    Source: arXiv:2210.07229 eq. 14 (MEMIT), arXiv:2410.02355 eq. 14 (AlphaEdit), by the
    push-through identity.
    """
    if isinstance(R, Tensor):
        return _solve(metric, K, R, mu, history, weights)
    targets = list(R)
    if not targets:
        raise ValueError("R must be a tensor or a sequence of at least one, got an empty sequence")
    for target in targets:
        _check_target(K, target)
    left, right = _solve(metric, K, torch.cat([R.double() for R in targets], dim=-1), mu, history, weights)
    return tuple(
        part.contiguous() for part in torch.split(left, [R.shape[-1] for R in targets], dim=-2)
    ), right


@dataclass(frozen=True, kw_only=True)
class EditProblem:
    """The arguments of `edit_solve` for one layer."""

    metric: Metric
    K: Tensor
    R: Tensor
    mu: float
    history: Tensor | None = None
    weights: Tensor | None = None


def edit_solve_layers(problems: Mapping[str, EditProblem]) -> dict[str, tuple[Tensor, Tensor]]:
    """`edit_solve` for many layers in one call: factors by layer, in the order given.

    Layers may differ in everything. Those with the identity metric and equal shapes, dtypes and mu run as one batch;
    factors are never stacked, since a copy of them would cost more than the solve.
    Raises ValueError as `edit_solve`, beginning with the layer's name. All layers are checked before any is solved.
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, p in problems.items():
        try:
            _check(p.metric, p.K, p.R, p.mu, p.history, p.weights)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
        alone = not isinstance(p.metric, IdentityMetric) or p.mu == 0
        tensors = [p.K, p.R, *(t for t in (p.history, p.weights) if t is not None)]
        same = tuple((t.shape, t.dtype, t.device) for t in tensors)
        groups.setdefault((name if alone else "", p.mu, p.weights is None, same), []).append(name)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for names in groups.values():
        layers = [problems[name] for name in names]
        one = layers[0]
        try:
            if len(layers) == 1:
                found[names[0]] = _solve(one.metric, one.K, one.R, one.mu, one.history, one.weights)
                continue
            left, right = _solve(
                one.metric,
                torch.stack([p.K for p in layers]),
                torch.stack([p.R for p in layers]),
                one.mu,
                None
                if one.history is None
                else torch.stack([p.history for p in layers if p.history is not None]),
                None
                if one.weights is None
                else torch.stack([p.weights for p in layers if p.weights is not None]),
            )
        except ValueError as error:
            raise ValueError(f"{', '.join(names)}: {error}") from None
        found.update(zip(names, zip(left.unbind(), right.unbind(), strict=True), strict=True))
    return {name: found[name] for name in problems}


def apply_metric(metric: Metric, K: Tensor) -> Tensor:
    """K M, [..., n, f] float64: the keys seen through the metric (ROME's C^-1 k, one row per key)."""
    kind, factor, moment = split(metric)
    check_keys(kind, factor, moment, K)
    whiten, unwhiten = whitening(kind, factor, moment)
    return unwhiten(whiten(K.detach().double()))


def edit_residual(
    metric: Metric,
    K: Tensor,
    R: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    mu: float,
    history: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """How far Delta = left @ right is from solving its system: [...] float64, relative, 0 for an exact solution.

    ||mu Delta + (Delta K_all^T - R_all^T) K_all M|| / ||R^T K M|| in the Frobenius norm, with R_all zero for history:
    the equation that `edit_solve` solves, multiplied out anew with the metric, so that an error of any of its steps
    shows. It costs about two more solves. Arguments are those of `edit_solve` and what it returned.
    """
    kind, factor, moment = _check(metric, K, R, mu, history, weights)
    past = _weighted(history, weights)
    keys = K.detach().double()
    keys = keys if past is None else torch.cat([past.detach().double(), keys], dim=-2)
    n = K.shape[-2]
    reach = right @ keys.mT  # [..., r, N]
    whiten, unwhiten = whitening(kind, factor, moment)
    seen = unwhiten(whiten(torch.cat([reach @ keys, K.detach().double()], dim=-2)))
    back, wanted = (
        seen[..., :-n, :] if n else seen,
        R.detach().double().mT @ seen[..., seen.shape[-2] - n :, :],
    )
    off = left @ (mu * right + back) - wanted
    size = torch.linalg.matrix_norm(wanted)
    relative: Tensor = torch.linalg.matrix_norm(off) / size.clamp_min(torch.finfo(size.dtype).tiny)
    return relative


def _solve(
    metric: Metric, K: Tensor, R: Tensor, mu: float, history: Tensor | None, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    kind, factor, moment = _check(metric, K, R, mu, history, weights)
    past = _weighted(history, weights)
    left, right = _op(kind, factor, K.detach(), R.detach(), float(mu), past, moment)
    return left, right


def _weighted(history: Tensor | None, weights: Tensor | None) -> Tensor | None:
    """The history whose Gram terms carry the weights: rows times their square roots."""
    if history is None or weights is None:
        return None if history is None else history.detach()
    return history.detach().double() * weights.detach().double().sqrt()[..., None]


def _check_target(K: Tensor, R: Tensor) -> None:
    if R.ndim != K.ndim or R.shape[:-1] != K.shape[:-1] or not R.is_floating_point():
        raise ValueError(
            f"R must be float with one row per key {list(K.shape)}, got {R.dtype} {list(R.shape)}"
        )


def _check(
    metric: Metric, K: Tensor, R: Tensor, mu: float, history: Tensor | None, weights: Tensor | None
) -> tuple[str, Tensor | None, Tensor | None]:
    kind, factor, moment = split(metric)
    check_keys(kind, factor, moment, K)
    _check_target(K, R)
    if not 0 <= mu < float("inf"):
        raise ValueError(f"mu must be finite and >= 0, got {mu}")
    if history is not None and (
        history.ndim != K.ndim or history.shape[:-2] != K.shape[:-2] or history.shape[-1] != K.shape[-1]
    ):
        raise ValueError(f"history must hold keys like K {list(K.shape)}, got {list(history.shape)}")
    if weights is not None:
        if history is None or weights.shape != history.shape[:-1] or not weights.is_floating_point():
            wanted = "None without history" if history is None else f"float {list(history.shape[:-1])}"
            raise ValueError(f"weights must be {wanted}, got {weights.dtype} {list(weights.shape)}")
        if not bool((weights >= 0).all()) or not bool(weights.isfinite().all()):
            raise ValueError("weights must be finite and >= 0")
    for name, tensor in (("R", R), ("history", history), ("weights", weights)):
        if tensor is not None and tensor.device != K.device:
            raise ValueError(f"{name} must be on K's device {K.device}, got {tensor.device}")
    return kind, factor, moment


def _fake(
    kind: str,
    factor: Tensor | None,
    K: Tensor,
    R: Tensor,
    mu: float,
    history: Tensor | None,
    moment: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    rank = torch.sym_min(R.shape[-2], R.shape[-1])  # type: ignore[no-untyped-call]
    left = R.new_empty((*R.shape[:-2], R.shape[-1], rank), dtype=torch.float64)
    return left, K.new_empty((*K.shape[:-2], rank, K.shape[-1]), dtype=torch.float64)


def _run_cpu(native: Callable[..., Any], *args: Any) -> tuple[Tensor, Tensor]:
    return solve_form(*args)  # its packed solves pick the compiled ones


def _refuse_cpu(kind: str, *args: Any) -> str | None:
    if kind != "packed":
        return f"only solves with a packed factor are compiled, this metric is {kind!r}"
    return None


def _bind(
    metric: Metric, K: Tensor, R: Tensor, mu: float, history: Tensor | None = None
) -> tuple[object, ...]:
    kind, factor, moment = split(metric)
    return kind, factor, K, R, mu, history, moment


_op = define_op(
    "edit_solve",
    "(str kind, Tensor? factor, Tensor K, Tensor R, float mu, Tensor? history, Tensor? moment=None)"
    " -> (Tensor, Tensor)",
    _fake,
    solve_form,
    [Impl("cpu", "cpu", "fastedit._cpu:packed_solve", _refuse_cpu, _run_cpu)],
    bind=_bind,
)
