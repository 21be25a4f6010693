"""The metrics of the closed-form family and how keys go through them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastedit.ops.packed_solve import pack_factor, packed_factor_size, packed_solve

__all__ = [
    "CholeskyMetric",
    "IdentityMetric",
    "Metric",
    "PackedMetric",
    "ProjectorMetric",
    "RowMap",
    "check_keys",
    "cholesky_factor",
    "split",
    "thin_product",
    "whitening",
]


@dataclass(frozen=True)
class CholeskyMetric:
    """M = C^-1 with C = L L^T; lower: L [..., f, f] float64, as `cholesky_factor` returns it (either memory order).

    A float32 `lower` goes with `moment`, C itself [..., f, f] in float64 or float32: the factor then only
    preconditions, and C^-1 k is refined until its float64 residual is that of a float64 factor.
    """

    lower: Tensor
    moment: Tensor | None = None


@dataclass(frozen=True)
class PackedMetric:
    """M = C^-1 with the factor of C in `pack_factor`'s layout: half the memory, and the faster solve for few keys.

    packed: [..., packed_factor_size(width)] float64; width: f.

        metric = PackedMetric.of(cholesky_factor(C))
    """

    packed: Tensor
    width: int

    @staticmethod
    def of(lower: Tensor) -> PackedMetric:
        """From lower Cholesky factors [..., f, f] float64. Raises ValueError as `pack_factor`."""
        return PackedMetric(pack_factor(lower), lower.shape[-1])


@dataclass(frozen=True)
class ProjectorMetric:
    """M = U U^T, or I - U U^T when `complement`; basis: U [..., f, r] with orthonormal columns.

    AlphaEdit's null-space projector takes either side of the spectrum: pass the thinner one.
    """

    basis: Tensor
    complement: bool = False


@dataclass(frozen=True)
class IdentityMetric:
    """M = I."""


Metric = CholeskyMetric | PackedMetric | ProjectorMetric | IdentityMetric

# Rows to rows.
RowMap = Callable[[Tensor], Tensor]


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


def split(metric: Metric) -> tuple[str, Tensor | None, Tensor | None]:
    """A metric as the op takes it: its kind, its factor, and the moment that a float32 factor preconditions."""
    if isinstance(metric, CholeskyMetric):
        refined = metric.lower.dtype == torch.float32 and metric.moment is not None
        return ("refined", metric.lower, metric.moment) if refined else ("cholesky", metric.lower, None)
    if isinstance(metric, PackedMetric):
        return "packed", metric.packed, None
    if isinstance(metric, ProjectorMetric):
        return ("complement" if metric.complement else "basis"), metric.basis, None
    if isinstance(metric, IdentityMetric):
        return "identity", None, None
    raise TypeError(
        "metric must be CholeskyMetric, PackedMetric, ProjectorMetric or IdentityMetric, "
        f"got {type(metric).__name__}"
    )


def check_keys(kind: str, factor: Tensor | None, moment: Tensor | None, K: Tensor) -> None:
    """Raise ValueError unless K is [..., n, f] and the factor fits keys of that width, device and batch."""
    if K.ndim < 2 or not K.is_floating_point():
        raise ValueError(f"K must be float of shape [..., n, f], got {K.dtype} of shape {list(K.shape)}")
    f = K.shape[-1]
    if factor is None:
        return
    square = kind in ("cholesky", "refined")
    name = "metric.lower" if square else "metric.packed" if kind == "packed" else "metric.basis"
    if kind == "packed":
        fits, wanted = factor.shape[-1:] == (packed_factor_size(f),), f"[..., {packed_factor_size(f)}]"
    else:
        fits = factor.ndim >= 2 and factor.shape[-2] == f and (not square or factor.shape[-1] == f)
        wanted = f"[{f}, {f}]" if square else f"[{f}, r]"
    if not fits:
        raise ValueError(f"{name} must be {wanted} for keys of width {f}, got {list(factor.shape)}")
    if kind in ("cholesky", "packed") and factor.dtype != torch.float64:
        hint = ", or float32 beside metric.moment" if kind == "cholesky" else ""
        raise ValueError(f"{name} must be float64, got {factor.dtype}{hint}")
    batch = factor.shape[: -1 if kind == "packed" else -2]
    if len(batch) and batch != K.shape[:-2]:
        raise ValueError(f"{name} must have K's batch shape {list(K.shape[:-2])} or none, got {list(batch)}")
    if factor.device != K.device:
        raise ValueError(f"{name} must be on K's device {K.device}, got {factor.device}")
    if moment is not None and (moment.shape != factor.shape or not moment.is_floating_point()):
        raise ValueError(
            f"metric.moment must be float {list(factor.shape)}, got {moment.dtype} {list(moment.shape)}"
        )
    if moment is not None and moment.device != K.device:
        raise ValueError(f"metric.moment must be on K's device {K.device}, got {moment.device}")


def whitening(kind: str, factor: Tensor | None, moment: Tensor | None) -> tuple[RowMap, RowMap]:
    """Rows k -> k B and t -> t B^T of M = B B^T: B = L^-T, U, I - U U^T or I.

    A refined metric has no B; the second map is then all of M and the first nothing.
    """
    if factor is None:
        return _same, _same
    if kind == "packed":
        return (
            lambda X: packed_solve(factor, X),
            lambda X: packed_solve(factor, X, transposed=True),
        )
    if kind == "refined" and moment is not None:
        return _same, lambda X: _refined(factor, moment, X)
    U = factor.detach().double()
    if kind == "cholesky":
        # solve_triangular reads L in either memory order without a copy; cholesky_solve would loop over columns.
        return (
            lambda X: torch.linalg.solve_triangular(U, X.mT, upper=False).mT,
            lambda X: torch.linalg.solve_triangular(U.mT, X.mT, upper=True).mT,
        )
    if kind == "basis":
        return (lambda X: thin_product(X, U)), (lambda X: thin_product(X, U.mT))

    def project(X: Tensor) -> Tensor:
        return X - thin_product(thin_product(X, U), U.mT)

    # Twice: after one pass the part along U is rounding of X, after two it is rounding of the result. What comes back
    # is made of rows that went through, and has no such part to begin with.
    return (lambda X: project(project(X))), project


_SLAB = 128  # rows or columns of a matrix that lie together, of a size that stays in the L2 cache
_MANY = 192  # rows from which the BLAS is as fast in one call


def thin_product(X: Tensor, V: Tensor) -> Tensor:
    """X V for few rows X [n, p] and a large V [p, q], by the slabs of V that lie together in memory.

    In one call the BLAS rearranges all of V for each product, which costs a third of the time at n = 100.
    """
    if X.ndim > 2 or V.ndim > 2 or not 8 < X.shape[0] < _MANY or V.device.type != "cpu":
        return X @ V
    p, q = V.shape
    if V.stride(0) == 1:
        columns = X.new_empty(X.shape[0], q)
        for start in range(0, q, _SLAB):
            columns[:, start : start + _SLAB] = X @ V[:, start : start + _SLAB]
        return columns
    found = X.new_zeros(X.shape[0], q)
    for start in range(0, p, _SLAB):
        found.addmm_(X[:, start : start + _SLAB], V[start : start + _SLAB])
    return found


def _same(X: Tensor) -> Tensor:
    return X


_ROUNDS, _STEPS = 6, 40  # of refinement; of conjugate gradients in each
_ENOUGH = 2.0**-52  # backward error, |k - x C| / (|k| + |x| |C|), that a float64 factor leaves
_TOO_MUCH = 1e-13


def _refined(lower: Tensor, C: Tensor, K: Tensor) -> Tensor:
    """K C^-1 by rows: float64 residuals, corrections by conjugate gradients on the float32 factor.

    Where kappa(C) eps32 < 1 a correction takes two or three steps; beyond that the gradients still converge.
    """
    if not K.numel():
        return K.clone()
    C = C.detach().double()

    def precondition(r: Tensor) -> Tensor:
        scale = r.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(r.dtype).tiny)  # float32 would underflow
        half = torch.linalg.solve_triangular(lower, (r / scale).float().mT, upper=False)
        solved: Tensor = torch.linalg.solve_triangular(lower.mT, half, upper=True)
        whole: Tensor = solved.mT.double() * scale
        return whole

    size = C.norm(dim=(-2, -1), keepdim=True)
    X, best, left = torch.zeros_like(K), torch.zeros_like(K), float("inf")
    for _ in range(_ROUNDS):
        r = K - X @ C
        scale = K.norm(dim=-1, keepdim=True) + size * X.norm(dim=-1, keepdim=True)
        error = float((r.norm(dim=-1, keepdim=True) / scale.clamp_min(torch.finfo(K.dtype).tiny)).max())
        if not error < left / 2:  # as far as float64 goes
            break
        best, left = X, error
        if error <= _ENOUGH:
            break
        X = X + _gradients(C, r, precondition)
    if not left <= _TOO_MUCH:
        raise ValueError(
            f"metric.lower in float32 is too far from metric.moment: the refined error stays at {left:.1e}; "
            "factor the moment in float64"
        )
    return best


def _gradients(C: Tensor, r: Tensor, precondition: RowMap) -> Tensor:
    """Rows x with x C = r to about 1e-8, each with its own step lengths."""

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(dim=-1, keepdim=True)

    goal = 1e-8 * r.norm(dim=-1, keepdim=True)
    x = torch.zeros_like(r)
    z = precondition(r)
    p, rho = z, dot(r, z)
    for _ in range(_STEPS):
        seen = p @ C
        curvature = dot(p, seen)
        # A row that is done has nothing left to divide by.
        alpha = torch.where(curvature > 0, rho / curvature, torch.zeros_like(rho))
        x, r = x + alpha * p, r - alpha * seen
        if bool((r.norm(dim=-1, keepdim=True) <= goal).all()):
            break
        z = precondition(r)
        before, rho = rho, dot(r, z)
        p = z + torch.where(before > 0, rho / before, torch.zeros_like(rho)) * p
    return x
