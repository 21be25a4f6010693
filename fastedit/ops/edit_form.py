"""The two forms of the closed-form update on whitened keys: the dual n x n and the direct f x f, both float64."""

from __future__ import annotations

import torch
from torch import Tensor

from fastedit.ops.edit_metric import RowMap, whitening
from fastedit.ops.packed_solve import unpack_factor

__all__ = [
    "DIRECT_ABOVE",
    "factors_of",
    "gram",
    "identity_like",
    "not_definite",
    "owned",
    "solve_form",
    "solve_spd",
]

# Above this ratio of keys to metric dimension the f x f Cholesky costs less than the N x N one with its two passes of
# N rows (both give the same Delta). Dual time over direct time at ratios 0.6, 0.8, 1.0, 1.3 (f = 2048, d = 512, one
# thread, AVX-512): packed factor 0.51 0.69 1.06 1.25; thin projector 0.65 0.77 0.98 1.05; complement 0.69 0.79 1.00
# 1.08; identity 0.36 0.54 0.96 1.21. At f = 1024 alike; with d = 2 f they meet at 0.8-0.9.
DIRECT_ABOVE = 1.0
_PANEL = 512  # columns of a symmetric product computed at a time; only the lower triangle is ever read


def solve_form(
    kind: str,
    factor: Tensor | None,
    K: Tensor,
    R: Tensor,
    mu: float,
    history: Tensor | None,
    moment: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """left, right of `edit_solve` by the form that is cheaper for these sizes."""
    K, R = K.double(), R.double()
    keys = K if history is None else torch.cat([history.double(), K], dim=-2)
    n, f, d = K.shape[-2], K.shape[-1], R.shape[-1]
    if n == 0:
        return K.new_zeros(*K.shape[:-2], d, 0), K.clone(memory_format=torch.contiguous_format)
    dimension = factor.shape[-1] if factor is not None and kind == "basis" else f
    if mu > 0 and keys.shape[-2] > DIRECT_ABOVE * dimension:
        left, right = _direct(kind, factor, keys, R, mu, moment)
        return left.contiguous(), right.contiguous()
    whiten, unwhiten = whitening(kind, factor, moment)
    Y = whiten(keys)
    if kind == "refined":  # no square root of M at hand: M itself goes to the keys first
        Y, unwhiten = unwhiten(keys), _same
        G = gram(keys, mu, Y)
    else:
        G = gram(Y, mu)
    T, solve = _dual(Y, G, n, mu)
    return factors_of(T, solve, R, f, unwhiten)


def factors_of(T: Tensor, solve: RowMap, R: Tensor, f: int, unwhiten: RowMap) -> tuple[Tensor, Tensor]:
    """left, right of Delta = R^T S^-1 T B^T, with S^-1 = `solve` on columns and B^T = `unwhiten` on rows."""
    n, d = R.shape[-2:]
    if n > d:
        return identity_like(R, d), unwhiten(solve(R).mT @ T).contiguous()
    if d <= f:  # S^-1 goes to the side with fewer columns
        return owned(solve(R).mT), owned(unwhiten(T))
    return owned(R.mT), solve(unwhiten(T)).contiguous()


def _same(X: Tensor) -> Tensor:
    return X


def _dual(Y: Tensor, G: Tensor, n: int, mu: float) -> tuple[Tensor, RowMap]:
    """T [n, q] and the solver of S [n, n] with E^T G^-1 Y = S^-1 T for the last n rows, S the Schur complement.

    With the Cholesky factor [[A, 0], [B, D]] of the Gram matrix, history first: S = D D^T, T = Y_n - B A^-1 Y_h.
    """
    m = Y.shape[-2] - n
    lower, info = torch.linalg.cholesky_ex(G)
    if mu == 0 and not (bool((info == 0).all()) and _well_conditioned(lower)):
        return _pseudo_inverse(G)[..., -n:, :] @ Y, _same
    if not bool((info == 0).all()):
        raise ValueError(not_definite(G, f"the Gram matrix of the keys [{n + m}, {n + m}]", mu))
    D = lower[..., m:, m:]
    T = Y[..., m:, :]
    if m:
        A, B = lower[..., :m, :m], lower[..., m:, :m]
        T = T - torch.linalg.solve_triangular(A, B, upper=False, left=False) @ Y[..., :m, :]
    return T, lambda X: solve_spd(D, X)


def _direct(
    kind: str, factor: Tensor | None, keys: Tensor, R: Tensor, mu: float, moment: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The primal form: Delta = R^T Y_n (mu N + Y^T Y)^-1 B^T, N = C with plain keys for a moment's metric, else I."""
    n, d, f = R.shape[-2], R.shape[-1], keys.shape[-1]
    unwhiten: RowMap = _same
    if factor is not None and kind in ("cholesky", "packed", "refined"):
        Y = keys
        if kind == "refined" and moment is not None:
            C = moment.double()
        else:
            C = _factor_product(unpack_factor(factor, f) if kind == "packed" else factor.double())
        A = gram(Y.mT, 0.0) + mu * C
    else:
        whiten, unwhiten = whitening(kind, factor, moment)
        Y = whiten(keys)
        A = gram(Y.mT, mu)
    lower, info = torch.linalg.cholesky_ex(A)
    if not bool((info == 0).all()):
        raise ValueError(not_definite(A, f"mu C + K^T K [{A.shape[-1]}, {A.shape[-1]}]", mu))
    Y_new = Y[..., -n:, :]
    if n > d:
        return identity_like(R, d), unwhiten(solve_spd(lower, Y_new.mT @ R).mT)
    return owned(R.mT), unwhiten(solve_spd(lower, Y_new.mT).mT)


def solve_spd(lower: Tensor, X: Tensor) -> Tensor:
    """(L L^T)^-1 X by two triangular solves."""
    half = torch.linalg.solve_triangular(lower, X, upper=False)
    solved: Tensor = torch.linalg.solve_triangular(lower.mT, half, upper=True)
    return solved


def gram(rows: Tensor, mu: float, others: Tensor | None = None) -> Tensor:
    """Lower triangle of X Y^T + mu I, [..., N, N] for X, Y [..., N, q]; above the diagonal panels it is zero.

    others: Y, where X Y^T is known to be symmetric; None takes X.
    """
    others = rows if others is None else others
    N = rows.shape[-2]
    G = rows.new_zeros(*rows.shape[:-2], N, N)
    for start in range(0, N, _PANEL):
        stop = min(start + _PANEL, N)
        G[..., start:, start:stop] = rows[..., start:, :] @ others[..., start:stop, :].mT
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


def not_definite(G: Tensor, what: str, mu: float) -> str:
    """Why a Cholesky factorisation stopped, and what to do."""
    if not bool(torch.isfinite(G).all()):
        return f"K, history and the metric must be finite: {what} is not"
    hint = "pass a larger mu" if mu > 0 else "pass mu > 0, or leave repeated keys out"
    return f"{what} is not positive definite to working precision with mu = {mu:g}; {hint}"


def _pseudo_inverse(G: Tensor) -> Tensor:
    values: Tensor
    vectors: Tensor
    if not bool(torch.isfinite(G).all()):
        raise ValueError("K, history and the metric must be finite: the Gram matrix of the keys is not")
    values, vectors = torch.linalg.eigh(G)  # reads the lower triangle
    cut = G.shape[-1] * torch.finfo(G.dtype).eps * values[..., -1:].clamp(min=0)
    inverse = torch.where(values > cut, 1 / values, torch.zeros_like(values))
    return (vectors * inverse[..., None, :]) @ vectors.mT


def owned(X: Tensor) -> Tensor:
    """A row-major copy: float64 inputs pass through unchanged, and an op must not return its input's memory."""
    return X.clone(memory_format=torch.contiguous_format)


def identity_like(R: Tensor, d: int) -> Tensor:
    """[..., d, d]: the left factor where there are more edits than outputs."""
    return torch.eye(d, dtype=R.dtype, device=R.device).expand(*R.shape[:-2], d, d).contiguous()
