"""Triton kernels of fastedit.ops.lowrank_transform: what lies between its matrix products, one pass each.

The products are torch's: they are at the limit of the machine. Normalising and joining, the end of a layer, and the
gradients of that end would otherwise be five to ten passes over [n, d], with a gather of each module's rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["lowrank_transform", "lowrank_transform_backward"]

_COLUMNS, _WARPS = 1024, 8
_SUM_ROWS, _SUM_COLUMNS = 16, 128


@triton.jit
def _normalise_kernel(
    X,  # [n, width_x]
    D,  # [n, width - width_x]; with HAS_D
    mean,  # [modules, width]; with HAS_MEAN
    std,  # [modules, width]; with HAS_STD
    mode,  # [n] int64; with HAS_MODE
    out,  # [n, width] contiguous
    width_x,
    width,
    x_row,  # strides
    x_column,
    d_row,
    d_column,
    mode_stride,
    eps: tl.float64,
    COLUMNS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_STD: tl.constexpr,
    HAS_MODE: tl.constexpr,
):
    """out = ([X | D] - mean) / (std + eps), statistics of the row's module; without HAS_MEAN they are not taken off"""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = c < width
    dtype = out.dtype.element_ty
    z = tl.load(X + row * x_row + c.to(tl.int64) * x_column, mask=c < width_x, other=0.0).to(dtype)
    if HAS_D:
        at = D + row * d_row + (c - width_x).to(tl.int64) * d_column
        z = tl.where(c < width_x, z, tl.load(at, mask=inside & (c >= width_x), other=0.0).to(dtype))
    module = tl.zeros((), dtype=tl.int64)
    if HAS_MODE:
        module = tl.load(mode + row * mode_stride)
    if HAS_MEAN:
        z -= tl.load(mean + module * width + c, mask=inside, other=0.0).to(dtype)
    if HAS_STD:
        z = z / (
            tl.load(std + module * width + c, mask=inside, other=1.0).to(dtype) + tl.full((), eps, dtype)
        )
    tl.store(out + row * width + c, z, mask=inside)


@triton.jit
def _layer_end_kernel(
    z,  # [n, width] contiguous
    a,  # [n, width] contiguous: U (V z) + bias
    scale,  # [modules, width] contiguous
    shift,
    mode,
    out,  # [n, width] contiguous, may be z
    width,
    mode_stride,
    COLUMNS: tl.constexpr,
    CLAMP_FIRST: tl.constexpr,
    HAS_MODE: tl.constexpr,
):
    """out = z + max(scale a + shift, 0), or z + scale max(a, 0) + shift"""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = c < width
    module = tl.zeros((), dtype=tl.int64)
    if HAS_MODE:
        module = tl.load(mode + row * mode_stride)
    x = tl.load(a + row * width + c, mask=inside, other=0.0)
    s = tl.load(scale + module * width + c, mask=inside, other=0.0)
    h = tl.load(shift + module * width + c, mask=inside, other=0.0)
    if CLAMP_FIRST:
        # Not tl.maximum: NaN is not less than 0 and stays.
        x = s * tl.where(x < 0, 0.0, x) + h
    else:
        x = s * x + h
        x = tl.where(x < 0, 0.0, x)
    tl.store(out + row * width + c, tl.load(z + row * width + c, mask=inside, other=0.0) + x, mask=inside)


@triton.jit
def _layer_end_gradient_kernel(
    dz,  # [n, width] contiguous
    a,  # [n, width] contiguous
    scale,  # [modules, width] contiguous
    shift,
    mode,
    da,  # [n, width] contiguous
    da_sum,  # [modules, width] contiguous: of each module's rows
    dscale,  # [modules, width] contiguous
    dshift,
    n,
    width,
    mode_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CLAMP_FIRST: tl.constexpr,
    HAS_MODE: tl.constexpr,
):
    """The gradients of one module's rows and their sums; every row is one module's, so da is written once"""
    module = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = c < width
    s = tl.load(scale + module * width + c, mask=inside, other=0.0)[None, :]
    h = tl.load(shift + module * width + c, mask=inside, other=0.0)[None, :]
    dtype = da.dtype.element_ty
    a_sums = tl.zeros((ROWS, COLUMNS), dtype=dtype)
    scale_sums = tl.zeros((ROWS, COLUMNS), dtype=dtype)
    shift_sums = tl.zeros((ROWS, COLUMNS), dtype=dtype)
    for first in range(0, n, ROWS):
        r = first + tl.arange(0, ROWS)
        mine = r < n
        if HAS_MODE:
            mine &= tl.load(mode + r.to(tl.int64) * mode_stride, mask=mine, other=-1) == module
        elif tl.program_id(1) > 0:
            mine &= r < 0
        mask = mine[:, None] & inside[None, :]
        at = r.to(tl.int64)[:, None] * width + c[None, :]
        g = tl.load(dz + at, mask=mask, other=0.0)
        x = tl.load(a + at, mask=mask, other=0.0)
        # where, not products with the mask: a NaN that the clamp cut off must not come back.
        if CLAMP_FIRST:
            found = tl.where(x >= 0, g * s, 0.0)
            scale_sums += tl.where(mask, g * tl.where(x < 0, 0.0, x), 0.0)
            shift_sums += g
        else:
            g = tl.where(s * x + h >= 0, g, 0.0)
            found = g * s
            scale_sums += tl.where(g == 0, 0.0, g * x)
            shift_sums += g
        a_sums += tl.where(mask, found, 0.0)
        tl.store(da + at, found, mask=mask)
    at = module * width + c
    tl.store(da_sum + at, tl.sum(a_sums, axis=0), mask=inside)
    tl.store(dscale + at, tl.sum(scale_sums, axis=0), mask=inside)
    tl.store(dshift + at, tl.sum(shift_sums, axis=0), mask=inside)


def _normalise(
    X: Tensor,
    D: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    mode: Tensor | None,
    eps: float,
    out: Tensor,
) -> None:
    n, width = out.shape
    # A table of one row serves all modules.
    several = mode is not None and std is not None and std.shape[0] > 1
    other = X if D is None else D
    _normalise_kernel[(n, triton.cdiv(width, _COLUMNS))](
        X,
        other,
        X if mean is None else mean.contiguous(),
        X if std is None else std.contiguous(),
        X if mode is None else mode,
        out,
        X.shape[1],
        width,
        *X.stride(),
        *other.stride(),
        0 if mode is None else mode.stride(0),
        eps,
        COLUMNS=_COLUMNS,
        HAS_D=D is not None,
        HAS_MEAN=mean is not None,
        HAS_STD=std is not None,
        HAS_MODE=several,
        num_warps=_WARPS,
    )


def lowrank_transform(
    X: Tensor,
    D: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    V: Sequence[Tensor],
    U: Sequence[Tensor],
    bias: Sequence[Tensor],
    scale: Sequence[Tensor],
    shift: Sequence[Tensor],
    mode: Tensor | None,
    eps: float,
    clamp_first: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op: z [n, d] and, with_grad, each layer's input, U (V z) + bias and V z."""
    n, d, layers = X.shape[0], X.shape[1] + D.shape[1], len(V)
    dtype = V[0].dtype if layers else torch.float64 if torch.float64 in (X.dtype, D.dtype) else torch.float32
    kept, ranks = (layers, sum(v.shape[0] for v in V)) if with_grad else (0, 0)
    z, Z, A, H = (
        torch.empty(shape, dtype=dtype, device=X.device)
        for shape in ((n, d), (kept, n, d), (kept, n, d), (n, ranks))
    )
    if z.numel() == 0:
        return z, Z, A, H.zero_()
    with torch.cuda.device_of(X):
        now = Z[0] if kept else z
        _normalise(X, D, mean, std, mode, eps, now)
        column = 0
        for index in range(layers):
            if kept:
                hidden = torch.mm(now, V[index].mT, out=H[:, column : column + V[index].shape[0]])
                column += V[index].shape[0]
                a = torch.addmm(bias[index], hidden, U[index].mT, out=A[index])
            else:
                a = torch.addmm(bias[index], now @ V[index].mT, U[index].mT)
            after = Z[index + 1] if index + 1 < kept else z
            _layer_end_kernel[(n, triton.cdiv(d, _COLUMNS))](
                *(now, a, scale[index].contiguous(), shift[index].contiguous()),
                X if mode is None else mode,
                *(after, d, 0 if mode is None else mode.stride(0)),
                COLUMNS=_COLUMNS,
                CLAMP_FIRST=clamp_first,
                HAS_MODE=mode is not None and scale[index].shape[0] > 1,
                num_warps=_WARPS,
            )
            now = after
    return z, Z, A, H


def lowrank_transform_backward(
    grad: Tensor,
    Z: Tensor,
    A: Tensor,
    H: Tensor,
    std: Tensor | None,
    V: Sequence[Tensor],
    U: Sequence[Tensor],
    scale: Sequence[Tensor],
    shift: Sequence[Tensor],
    mode: Tensor | None,
    eps: float,
    clamp_first: bool,
    need_rows: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """The op: gradients in the rows, then per layer in V, U, bias, scale and shift."""
    (n, d), layers = grad.shape, len(V)
    rows = torch.empty(n if need_rows else 0, d, dtype=grad.dtype, device=grad.device)
    dV, dU, dbias, dscale, dshift = ([grad.new_empty(0)] * layers for _ in range(5))
    dz, column = grad.clone(memory_format=torch.contiguous_format), H.shape[1]
    with torch.cuda.device_of(grad):
        for index in reversed(range(layers)):
            v, u, modules = V[index], U[index], scale[index].shape[0]
            column -= v.shape[0]
            hidden = H[:, column : column + v.shape[0]]
            da = torch.empty_like(dz)
            da_sum, dscale[index], dshift[index] = (
                torch.empty(modules, d, dtype=dz.dtype, device=dz.device) for _ in range(3)
            )
            if d and modules:
                _layer_end_gradient_kernel[(triton.cdiv(d, _SUM_COLUMNS), modules)](
                    *(dz, A[index], scale[index].contiguous(), shift[index].contiguous()),
                    dz if mode is None else mode,
                    *(da, da_sum, dscale[index], dshift[index], n, d),
                    0 if mode is None else mode.stride(0),
                    ROWS=_SUM_ROWS,
                    COLUMNS=_SUM_COLUMNS,
                    CLAMP_FIRST=clamp_first,
                    HAS_MODE=mode is not None and modules > 1,
                    num_warps=_WARPS,
                )
            dbias[index] = da_sum.sum(0)
            dU[index] = da.mT @ hidden
            dh = da @ u
            dV[index] = dh.mT @ Z[index]
            if index or need_rows:
                dz.addmm_(dh, v)
        if need_rows and rows.numel():
            _normalise(dz, None, None, std, mode, eps, rows)
    return rows, dV, dU, dbias, dscale, dshift
