"""Triton kernel of fastedit.ops.attribution_reduce: rows of a group summed in their order, one read of the gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["attribution_reduce"]

_COLUMNS, _WARPS = 512, 4


@triton.jit
def _attribution_reduce_kernel(
    gradient,  # [n, f]
    starts,  # [G + 1] int64
    activation,  # [G, f]; with HAS_ACTIVATION
    out,  # [G, f] contiguous
    n,
    f,
    steps,
    row_stride,
    column_stride,
    activation_row_stride,
    activation_column_stride,
    COLUMNS: tl.constexpr,
    AHEAD: tl.constexpr,  # rows that are asked for before the first is added
    HAS_ACTIVATION: tl.constexpr,
):
    """out[g] = activation[g] / steps * sum of gradient[starts[g] : starts[g + 1]]"""
    group = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < f
    first = tl.maximum(tl.load(starts + group), 0)
    last = tl.minimum(tl.load(starts + group + 1), n)
    total = tl.zeros((COLUMNS,), dtype=out.dtype.element_ty)
    at = gradient + column.to(tl.int64) * column_stride
    for r in range(first, last, AHEAD):
        for i in tl.static_range(AHEAD):
            mask = inside & (r + i < last)
            total += tl.load(at + (r + i) * row_stride, mask=mask, other=0.0).to(total.dtype)
    total = total / steps
    if HAS_ACTIVATION:
        own = activation + group.to(tl.int64) * activation_row_stride + column * activation_column_stride
        total *= tl.load(own, mask=inside, other=0.0).to(total.dtype)
    tl.store(out + group.to(tl.int64) * f + column, total, mask=inside)


def attribution_reduce(gradient: Tensor, starts: Tensor, activation: Tensor | None, steps: int) -> Tensor:
    """The op, on one device; the result is float64 where an argument is, else float32."""
    (n, f), groups = gradient.shape, starts.shape[0] - 1
    wide = torch.float64 in (gradient.dtype, gradient.dtype if activation is None else activation.dtype)
    out = gradient.new_empty((groups, f), dtype=torch.float64 if wide else torch.float32)
    if out.numel() == 0:
        return out
    other = gradient if activation is None else activation
    with torch.cuda.device_of(gradient):
        _attribution_reduce_kernel[(groups, triton.cdiv(f, _COLUMNS))](
            gradient,
            starts.contiguous(),
            other,
            out,
            n,
            f,
            float(steps),
            *gradient.stride(),
            *other.stride(),
            COLUMNS=_COLUMNS,
            AHEAD=4,
            HAS_ACTIVATION=activation is not None,
            num_warps=_WARPS,
        )
    return out
