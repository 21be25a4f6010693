"""The one solver of the closed-form family: ROME, R-ROME, MEMIT, PMET, EMMET, AlphaEdit, UltraEdit.

Each of them is Delta = R^T E^T (mu I + K_all M K_all^T)^-1 (K_all M) for a metric M (the inverse second moment of the
keys, a null-space projector, or the identity), with keys as rows, K_all the history keys followed by the new ones and
E selecting the new ones. M is never formed and nothing f x f is factored per edit: the metric brings its factor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastedit.ops._dispatch import define_op

__all__ = [
    "CholeskyMetric",
    "IdentityMetric",
    "Metric",
    "ProjectorMetric",
    "apply_metric",
    "cholesky_factor",
    "edit_solve",
]

# Above this ratio of keys to metric dimension one f x f Cholesky costs less than the N x N one with its two triangular
# solves of N columns (flop count; both give the same Delta).
_DIRECT_ABOVE = 0.6
_PANEL = 512  # columns of a symmetric product computed at a time; only the lower triangle is ever read


@dataclass(frozen=True)
class CholeskyMetric:
    """M = C^-1 with C = L L^T; lower: L [f, f] float64, as `cholesky_factor` returns it (either memory order)."""

    lower: Tensor


@dataclass(frozen=True)
class ProjectorMetric:
    """M = U U^T, or I - U U^T when `complement`; basis: U [f, r] with orthonormal columns.

    AlphaEdit's null-space projector takes either side of the spectrum: pass the thinner one.
    """

    basis: Tensor
    complement: bool = False


@dataclass(frozen=True)
class IdentityMetric:
    """M = I."""


Metric = CholeskyMetric | ProjectorMetric | IdentityMetric


def edit_solve(
    metric: Metric, K: Tensor, R: Tensor, *, mu: float, history: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Factors of Delta = R^T E^T (mu I + K_all M K_all^T)^-1 (K_all M), the update that maps keys to residuals.

    metric: `CholeskyMetric`, `ProjectorMetric` or `IdentityMetric`.
    K: [..., n, f] keys of the new edits; R: [..., n, d] what their outputs must change by; any float dtype.
    mu: >= 0. With 0 the keys are mapped exactly, (W + Delta) K^T = W K^T + R^T; where keys repeat or depend on each
    other the least-squares, minimum-norm answer is given (eigenvalues below N eps of the largest count as zero).
    history: [..., m, f] keys of earlier edits whose outputs must not change, or None.

    Returns (left [..., d, r], right [..., r, f]) in float64 with Delta = left @ right, r = min(n, d): for n > d the
    left factor is the identity. Everything inside is float64. When n + m exceeds 0.6 of the metric's dimension the
    f x f form (mu C + K^T K) is factored instead: the same Delta, cheaper.
    Raises ValueError for wrong shapes, mu < 0 or non-finite keys, TypeError for an unknown metric.

        left, right = edit_solve(CholeskyMetric(cholesky_factor(C)), K, R, mu=15000.0)

    Source: arXiv:2210.07229 eq. 14 (MEMIT), arXiv:2410.02355 eq. 14 (AlphaEdit), by the
    push-through identity.
    """
    kind, factor = _split(metric)
    _check(kind, factor, K, R, mu, history)
    left, right = _op(kind, factor, K.detach(), R.detach(), float(mu), history)
    return left, right


def apply_metric(metric: Metric, K: Tensor) -> Tensor:
    """K M, [..., n, f] float64: the keys seen through the metric (ROME's C^-1 k, one row per key)."""
    kind, factor = _split(metric)
    _check_keys(kind, factor, K)
    whiten, unwhiten = _maps(kind, _double(factor))
    seen: Tensor = unwhiten(whiten(K.detach().double().mT)).mT
    return seen


def cholesky_factor(C: Tensor, *, jitter: float = 0.0) -> Tensor:
    """The lower Cholesky factor of a second moment, float64, [f, f], for `CholeskyMetric`.

    C: [f, f], any float dtype; only its lower triangle is read. jitter: >= 0, times the mean of C's diagonal is added
    to the diagonal (0 keeps the published solution).
    Raises ValueError, saying what to collect, when C is singular to working precision.
    """
    if C.ndim != 2 or C.shape[0] != C.shape[1] or not C.is_floating_point():
        raise ValueError(f"C must be a square float matrix, got {C.dtype} of shape {list(C.shape)}")
    if not jitter >= 0:
        raise ValueError(f"jitter must be >= 0, got {jitter}")
    f = C.shape[0]
    A = C.detach().double().tril()
    diagonal = A.diagonal().clone()
    if not bool(torch.isfinite(A).all()):
        raise ValueError(
            f"C [{f}, {f}] must be finite, but {int((~torch.isfinite(A)).sum())} entries are not"
        )
    if jitter:
        A.diagonal().add_(jitter * diagonal.mean())
    lower: Tensor
    lower, info = torch.linalg.cholesky_ex(A)
    # A rank-deficient C need not stop the factorisation: rounding leaves a pivot of the size of the noise.
    relative = lower.diagonal().square() / A.diagonal()
    if int(info) or not bool((relative > f * torch.finfo(torch.float64).eps).all()):
        raise ValueError(_singular(f, int((diagonal == 0).sum()), int(info), relative))
    return lower


def _singular(f: int, dead: int, order: int, relative: Tensor) -> str:
    if dead:
        return (
            f"C [{f}, {f}] is singular: {dead} of {f} neurons never fired (zero on the diagonal); "
            "collect more text, or pass jitter > 0"
        )
    rank = order - 1 if order else int((relative > f * torch.finfo(torch.float64).eps).sum())
    return (
        f"C [{f}, {f}] is singular: about {rank} independent keys where {f} are needed; collect at least {f} tokens "
        f"({10 * f} is safe), or pass jitter > 0"
    )


def _split(metric: Metric) -> tuple[str, Tensor | None]:
    if isinstance(metric, CholeskyMetric):
        return "cholesky", metric.lower
    if isinstance(metric, ProjectorMetric):
        return ("complement" if metric.complement else "basis"), metric.basis
    if isinstance(metric, IdentityMetric):
        return "identity", None
    raise TypeError(
        f"metric must be CholeskyMetric, ProjectorMetric or IdentityMetric, got {type(metric).__name__}"
    )


def _check_keys(kind: str, factor: Tensor | None, K: Tensor) -> None:
    if K.ndim < 2 or not K.is_floating_point():
        raise ValueError(f"K must be float of shape [..., n, f], got {K.dtype} of shape {list(K.shape)}")
    f = K.shape[-1]
    if factor is None:
        return
    name = "metric.lower" if kind == "cholesky" else "metric.basis"
    if factor.ndim < 2 or factor.shape[-2] != f or (kind == "cholesky" and factor.shape[-1] != f):
        wanted = f"[{f}, {f}]" if kind == "cholesky" else f"[{f}, r]"
        raise ValueError(f"{name} must be {wanted} for keys of width {f}, got {list(factor.shape)}")
    if kind == "cholesky" and factor.dtype != torch.float64:
        raise ValueError(f"{name} must be float64, got {factor.dtype}")
    if factor.device != K.device:
        raise ValueError(f"{name} must be on K's device {K.device}, got {factor.device}")


def _check(kind: str, factor: Tensor | None, K: Tensor, R: Tensor, mu: float, history: Tensor | None) -> None:
    _check_keys(kind, factor, K)
    if R.ndim != K.ndim or R.shape[:-1] != K.shape[:-1] or not R.is_floating_point():
        raise ValueError(
            f"R must be float with one row per key {list(K.shape)}, got {R.dtype} {list(R.shape)}"
        )
    if not 0 <= mu < float("inf"):
        raise ValueError(f"mu must be finite and >= 0, got {mu}")
    if history is not None and (
        history.ndim != K.ndim or history.shape[:-2] != K.shape[:-2] or history.shape[-1] != K.shape[-1]
    ):
        raise ValueError(f"history must hold keys like K {list(K.shape)}, got {list(history.shape)}")
    for name, tensor in (("R", R), ("history", history)):
        if tensor is not None and tensor.device != K.device:
            raise ValueError(f"{name} must be on K's device {K.device}, got {tensor.device}")


def _double(factor: Tensor | None) -> Tensor | None:
    return None if factor is None else factor.detach().double()


_Map = Callable[[Tensor], Tensor]


def _maps(kind: str, factor: Tensor | None) -> tuple[_Map, _Map]:
    """B^T and B of M = B B^T, on columns: B = L^-T, U, I - U U^T, or I."""
    if factor is None:
        return _same, _same
    U = factor
    if kind == "cholesky":
        # solve_triangular reads L in either memory order without a copy; cholesky_solve would loop over columns.
        return (
            lambda X: torch.linalg.solve_triangular(U, X, upper=False),
            lambda X: torch.linalg.solve_triangular(U.mT, X, upper=True),
        )
    if kind == "basis":
        return (lambda X: U.mT @ X), (lambda X: U @ X)

    def project(X: Tensor) -> Tensor:
        # Twice: after one pass the part along U is rounding of X, after two it is rounding of the result.
        X = X - U @ (U.mT @ X)
        return X - U @ (U.mT @ X)

    return project, project


def _same(X: Tensor) -> Tensor:
    return X


def _eager(
    kind: str, factor: Tensor | None, K: Tensor, R: Tensor, mu: float, history: Tensor | None
) -> tuple[Tensor, Tensor]:
    K, R, factor = K.double(), R.double(), _double(factor)
    keys = K if history is None else torch.cat([history.double(), K], dim=-2)
    n, f, d = K.shape[-2], K.shape[-1], R.shape[-1]
    if n == 0:
        return K.new_zeros(*K.shape[:-2], d, 0), K.clone()
    dimension = factor.shape[-1] if factor is not None and kind == "basis" else f
    if mu > 0 and keys.shape[-2] > _DIRECT_ABOVE * dimension:
        left, right = _direct(kind, factor, keys, R, mu)
        return left.contiguous(), right.contiguous()
    whiten, unwhiten = _maps(kind, factor)
    T, solve = _dual(whiten(keys.mT), n, mu)
    if n > d:
        return _identity_like(R, d), unwhiten(T @ solve(R)).mT.contiguous()
    if d <= f:  # S^-1 goes to the side with fewer columns
        return _owned(solve(R).mT), _owned(unwhiten(T).mT)
    return _owned(R.mT), solve(unwhiten(T).mT).contiguous()


def _dual(Y: Tensor, n: int, mu: float) -> tuple[Tensor, _Map]:
    """T [q, n] and the solver of S [n, n] with E^T (mu I + Y^T Y)^-1 Y^T = S^-1 T^T, S the Schur complement.

    With the Cholesky factor [[A, 0], [B, D]] of the Gram matrix, history first: S = D D^T, T = Y_n - Y_h A^-T B^T.
    """
    m = Y.shape[-1] - n
    G = _gram(Y, mu)
    lower, info = torch.linalg.cholesky_ex(G)
    if mu == 0 and not (bool((info == 0).all()) and _well_conditioned(lower)):
        return Y @ _pseudo_inverse(G)[..., -n:], _same
    if not bool((info == 0).all()):
        raise ValueError("K, history and the metric must be finite: the Gram matrix of the keys is not")
    D = lower[..., m:, m:]
    T = Y[..., m:]
    if m:
        past = torch.linalg.solve_triangular(lower[..., :m, :m].mT, lower[..., m:, :m].mT, upper=True)
        T = T - Y[..., :m] @ past
    return T, lambda X: _solve_spd(D, X)


def _direct(kind: str, factor: Tensor | None, keys: Tensor, R: Tensor, mu: float) -> tuple[Tensor, Tensor]:
    """The primal form: Delta = R^T Y_n^T (mu N + Y Y^T)^-1 B^T, N = C with plain keys for a Cholesky metric, else I."""
    n, d = R.shape[-2], R.shape[-1]
    unwhiten: _Map = _same
    if kind == "cholesky" and factor is not None:
        Y = keys.mT
        A = _gram(Y.mT, 0.0) + mu * _factor_product(factor)
    else:
        whiten, unwhiten = _maps(kind, factor)
        Y = whiten(keys.mT)
        A = _gram(Y.mT, mu)
    lower, info = torch.linalg.cholesky_ex(A)
    if not bool((info == 0).all()):
        raise ValueError("K, history and the metric must be finite: mu C + K^T K is not positive definite")
    Y_new = Y[..., -n:]
    if n > d:
        return _identity_like(R, d), unwhiten(_solve_spd(lower, Y_new @ R)).mT
    return _owned(R.mT), unwhiten(_solve_spd(lower, Y_new)).mT


def _solve_spd(lower: Tensor, X: Tensor) -> Tensor:
    half = torch.linalg.solve_triangular(lower, X, upper=False)
    solved: Tensor = torch.linalg.solve_triangular(lower.mT, half, upper=True)
    return solved


def _gram(Y: Tensor, mu: float) -> Tensor:
    """Lower triangle of Y^T Y + mu I, [..., N, N] for Y [..., q, N]; above the diagonal panels it is zero."""
    N = Y.shape[-1]
    G = Y.new_zeros(*Y.shape[:-2], N, N)
    for start in range(0, N, _PANEL):
        stop = min(start + _PANEL, N)
        G[..., start:, start:stop] = Y[..., start:].mT @ Y[..., start:stop]
    G.diagonal(dim1=-2, dim2=-1).add_(mu)
    return G


def _factor_product(lower: Tensor) -> Tensor:
    """Lower triangle of L L^T, skipping the zeros of L."""
    f = lower.shape[-1]
    C = lower.new_zeros(lower.shape)
    for start in range(0, f, _PANEL):
        stop = min(start + _PANEL, f)
        C[..., start:, start:stop] = lower[..., start:, :stop] @ lower[..., start:stop, :stop].mT
    return C


def _well_conditioned(lower: Tensor) -> bool:
    """Whether no eigenvalue of G = L L^T can lie below N eps of the largest, by the 1-norm condition number."""
    N = lower.shape[-1]
    G_norm = torch.linalg.matrix_norm(lower @ lower.mT, 1)
    inverse_norm = torch.linalg.matrix_norm(torch.cholesky_inverse(lower), 1)
    return bool((G_norm * inverse_norm < 1 / (N * torch.finfo(lower.dtype).eps)).all())


def _pseudo_inverse(G: Tensor) -> Tensor:
    values: Tensor
    vectors: Tensor
    if not bool(torch.isfinite(G).all()):
        raise ValueError("K, history and the metric must be finite: the Gram matrix of the keys is not")
    values, vectors = torch.linalg.eigh(G)  # reads the lower triangle
    cut = G.shape[-1] * torch.finfo(G.dtype).eps * values[..., -1:].clamp(min=0)
    inverse = torch.where(values > cut, 1 / values, torch.zeros_like(values))
    return (vectors * inverse[..., None, :]) @ vectors.mT


def _owned(X: Tensor) -> Tensor:
    """A row-major copy: float64 inputs pass through unchanged, and an op must not return its input's memory."""
    return X.clone(memory_format=torch.contiguous_format)


def _identity_like(R: Tensor, d: int) -> Tensor:
    return torch.eye(d, dtype=R.dtype, device=R.device).expand(*R.shape[:-2], d, d).contiguous()


def _fake(
    kind: str, factor: Tensor | None, K: Tensor, R: Tensor, mu: float, history: Tensor | None
) -> tuple[Tensor, Tensor]:
    rank = torch.sym_min(R.shape[-2], R.shape[-1])  # type: ignore[no-untyped-call]
    left = R.new_empty((*R.shape[:-2], R.shape[-1], rank), dtype=torch.float64)
    return left, K.new_empty((*K.shape[:-2], rank, K.shape[-1]), dtype=torch.float64)


def _bind(
    metric: Metric, K: Tensor, R: Tensor, mu: float, history: Tensor | None = None
) -> tuple[object, ...]:
    return (*_split(metric), K, R, mu, history)


_op = define_op(
    "edit_solve",
    "(str kind, Tensor? factor, Tensor K, Tensor R, float mu, Tensor? history) -> (Tensor, Tensor)",
    _fake,
    _eager,
    bind=_bind,
)
