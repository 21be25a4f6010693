"""Triangular solves for rows with a packed Cholesky factor: half the memory of the square, read once per solve.

L [f, f] lives as a vector of block columns of 128: [f - 128 j, 128] row-major, the inverse of the diagonal block on
top (zeros above its diagonal), the blocks of L below it under that. A solve is then a sequence of dense products in
either direction, without the dependence from row to row that keeps a plain substitution from running at the speed of
the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastedit.ops._dispatch import Impl, Slower, define_op

__all__ = ["pack_factor", "packed_factor_size", "packed_solve", "unpack_factor"]

_BLOCK = 128  # csrc/cpu/packed_solve.h: kPackedBlock
# Right-hand sides above which the products of blocks are large enough for the BLAS to be as fast.
_FEW = 128


def packed_factor_size(width: int) -> int:
    """Entries of a packed factor of `width`: f (f + 128) / 2, rounded up by a part of a block."""
    return sum((width - start) * (stop - start) for start, stop in _spans(width))


def pack_factor(lower: Tensor) -> Tensor:
    """The packed form, [..., packed_factor_size(f)] float64, of lower Cholesky factors [..., f, f] float64.

    Only the lower triangle is read. Diagonal blocks of 128 are inverted once, here.
    Raises ValueError for a shape that is not square, another dtype, or zero or non-finite entries on the diagonal.

        packed_solve(pack_factor(torch.linalg.cholesky(C)), K, transposed=False)
    """
    if lower.ndim < 2 or lower.shape[-1] != lower.shape[-2] or lower.dtype != torch.float64:
        raise ValueError(f"lower must be [..., f, f] float64, got {lower.dtype} of shape {list(lower.shape)}")
    lower = lower.detach()
    diagonal = lower.diagonal(dim1=-2, dim2=-1)
    if not bool(((diagonal != 0) & diagonal.isfinite()).all()):
        raise ValueError("lower must have a finite diagonal without zeros to be a Cholesky factor")
    width = lower.shape[-1]
    packed = lower.new_empty(*lower.shape[:-2], packed_factor_size(width))
    for (start, stop), column in zip(_spans(width), _columns(packed, width), strict=True):
        size = stop - start
        eye = torch.eye(size, dtype=lower.dtype, device=lower.device)
        block = lower[..., start:stop, start:stop]
        column[..., :size, :] = torch.linalg.solve_triangular(block, eye, upper=False).tril()
        column[..., size:, :] = lower[..., stop:, start:stop]
    return packed


def unpack_factor(packed: Tensor, width: int) -> Tensor:
    """The lower factor [..., f, f] of a packed one, zero above the diagonal; equal to rounding on diagonal blocks."""
    _check_packed(packed, width)
    lower = packed.new_zeros(*packed.shape[:-1], width, width)
    for (start, stop), column in zip(_spans(width), _columns(packed, width), strict=True):
        size = stop - start
        eye = torch.eye(size, dtype=packed.dtype, device=packed.device)
        inverse = column[..., :size, :]
        lower[..., start:stop, start:stop] = torch.linalg.solve_triangular(inverse, eye, upper=False).tril()
        lower[..., stop:, start:stop] = column[..., size:, :]
    return lower


def packed_solve(packed: Tensor, rows: Tensor, *, transposed: bool = False) -> Tensor:
    """L^-1 x for every row x, or L^-T x when `transposed`: [..., n, f] float64, contiguous.

    packed: [..., packed_factor_size(f)] float64, from `pack_factor`; batch dimensions are those of `rows`, or none.
    rows: [..., n, f], any float dtype and strides; n = 0 is fine. Products and sums are float64; the order of sums
    does not depend on the number of threads.
    Raises ValueError for wrong shapes, dtypes or devices.

        half = packed_solve(packed, K)                          # rows of (L^-1 K^T)^T
        seen = packed_solve(packed, half, transposed=True)      # rows of (C^-1 K^T)^T

    Source: blocked substitution with inverted diagonal blocks, J. J. Du Croz and N. J. Higham, "Stability of methods
    for matrix inversion", IMA J. Numer. Anal. 12 (1992).
    """
    if rows.ndim < 2 or not rows.is_floating_point():
        raise ValueError(f"rows must be float of shape [..., n, f], got {rows.dtype} of {list(rows.shape)}")
    _check_packed(packed, rows.shape[-1])
    if packed.ndim > 1 and packed.shape[:-1] != rows.shape[:-2]:
        raise ValueError(
            f"packed must have the batch shape of rows {list(rows.shape)}, got {list(packed.shape)}"
        )
    if packed.device != rows.device:
        raise ValueError(f"packed must be on rows' device {rows.device}, got {packed.device}")
    solved: Tensor = _op(packed.detach(), rows.detach(), transposed)
    return solved


def _check_packed(packed: Tensor, width: int) -> None:
    size = packed_factor_size(width)
    if packed.ndim < 1 or packed.shape[-1] != size or packed.dtype != torch.float64:
        raise ValueError(
            f"packed must be [..., {size}] float64 for rows of width {width}, "
            f"got {packed.dtype} of shape {list(packed.shape)}"
        )


def _spans(width: int) -> list[tuple[int, int]]:
    return [(start, min(start + _BLOCK, width)) for start in range(0, width, _BLOCK)]


def _columns(packed: Tensor, width: int) -> Iterator[Tensor]:
    """Block columns as views [..., f - start, size] of the vector."""
    at = 0
    for start, stop in _spans(width):
        size = (width - start) * (stop - start)
        yield packed[..., at : at + size].view(*packed.shape[:-1], width - start, stop - start)
        at += size


def _eager(packed: Tensor, rows: Tensor, transposed: bool) -> Tensor:
    X = _own(rows)
    steps = list(zip(_spans(X.shape[-1]), _columns(packed, X.shape[-1]), strict=True))
    for (start, stop), column in reversed(steps) if transposed else steps:
        size = stop - start
        inverse, below = column[..., :size, :], column[..., size:, :]
        own, under = X[..., start:stop], X[..., stop:]
        if transposed:
            own.copy_((own - under @ below) @ inverse)
        else:
            own.copy_(own @ inverse.mT)
            if X.ndim == 2 and stop < X.shape[-1]:
                under.addmm_(own, below.mT, alpha=-1)  # without a copy of the right-hand sides
            else:
                under.sub_(own @ below.mT)
    return X


def _own(rows: Tensor) -> Tensor:
    """A contiguous float64 copy, never the input's memory."""
    return rows.to(torch.float64, copy=True, memory_format=torch.contiguous_format)


def _fake(packed: Tensor, rows: Tensor, transposed: bool) -> Tensor:
    return rows.new_empty(rows.shape, dtype=torch.float64)


def _run_cpu(native: Callable[..., Any], packed: Tensor, rows: Tensor, transposed: bool) -> Tensor:
    X = _own(rows)
    if X.numel() == 0:
        return X
    n, width = X.shape[-2:]
    factors = packed.contiguous().view(-1, packed.shape[-1])
    problems = X.view(-1, n, width) if packed.ndim > 1 else X.view(1, -1, width)
    for factor, problem in zip(factors, problems, strict=True):
        native(
            packed=factor.data_ptr(),
            width=width,
            rows=problem.data_ptr(),
            row_stride=width,
            count=len(problem),
            transposed=transposed,
            threads=torch.get_num_threads(),
        )
    return X


def _refuse_cpu(packed: Tensor, rows: Tensor, transposed: bool) -> str | None:
    if rows.shape[-2] > _FEW:
        return Slower(f"above {_FEW} right-hand sides the BLAS is as fast, got {rows.shape[-2]}")
    return None


_op = define_op(
    "packed_solve",
    "(Tensor packed, Tensor rows, bool transposed) -> Tensor",
    _fake,
    _eager,
    [Impl("cpu", "cpu", "fastedit._cpu:packed_solve", _refuse_cpu, _run_cpu)],
)
