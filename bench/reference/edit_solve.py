"""The closed-form edit, twice, straight from its definition: every matrix is built and inverted."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["direct", "edit_solve", "metric_matrix"]


def metric_matrix(metric: object, f: int) -> Tensor:
    """M [f, f]: C^-1 for a Cholesky factor, U U^T or I - U U^T for a basis, else the identity."""
    eye = torch.eye(f, dtype=torch.float64)
    lower = getattr(metric, "lower", None)
    if lower is not None:
        return torch.linalg.inv(lower.double() @ lower.double().T)
    basis = getattr(metric, "basis", None)
    if basis is not None:
        kept = basis.double() @ basis.double().T
        return eye - kept if metric.complement else kept  # type: ignore[attr-defined]
    return eye


def edit_solve(
    metric: object, K: Tensor, R: Tensor, *, mu: float, history: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """left [d, n], right [n, f]: Delta = R^T E^T (mu I + K_all M K_all^T)^-1 (K_all M)."""
    K, R = K.double(), R.double()
    n = K.shape[0]
    K_all = K if history is None else torch.cat([history.double(), K])
    M = metric_matrix(metric, K.shape[1])
    G = mu * torch.eye(K_all.shape[0], dtype=torch.float64) + K_all @ M @ K_all.T
    if mu == 0:
        inverse = torch.linalg.pinv(G, hermitian=True)
    else:
        inverse = torch.linalg.inv(G)
    return R.T, (inverse @ K_all @ M)[-n:] if n else K[:0]


def direct(C: Tensor, K: Tensor, R: Tensor, *, mu: float, history: Tensor | None = None) -> Tensor:
    """Delta [d, f] as the papers write it: R^T K (mu C + K_hist^T K_hist + K^T K)^-1, one f x f solve per batch."""
    A = mu * C + K.T @ K
    if history is not None:
        A = A + history.T @ history
    return R.T @ torch.linalg.solve(A, K.T).T
