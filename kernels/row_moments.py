"""Triton kernels of fastedit.ops.row_moments: a read of the rows, then the merge of what their blocks found, in order.

A block of rows is held in registers, so its mean and deviations take two passes over registers, not over memory. The
merge (Chan, Golub and LeVeque) goes through the blocks of each batch and then through the batches, one order for all
runs; all of it in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["row_moments_"]

_ROWS, _COLUMNS, _WARPS = 32, 64, 4
_MERGE_COLUMNS = 64


@triton.jit
def _blocks_kernel(
    X,  # [n, width_x]
    D,  # [n, width - width_x]; with HAS_D
    mask,  # [n] uint8; with HAS_MASK
    blocks,  # [blocks, 2] int64: first row, end
    counts,  # [blocks] int64
    means,  # [blocks, width] fp64
    m2s,  # [blocks, width] fp64
    width_x,
    width,
    x_row,  # strides
    x_column,
    d_row,
    d_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Count, mean and summed squared deviations of a block's rows [X | D]"""
    block = tl.program_id(0).to(tl.int64)
    r = tl.load(blocks + 2 * block) + tl.arange(0, ROWS)
    kept = r < tl.load(blocks + 2 * block + 1)
    if HAS_MASK:
        kept &= tl.load(mask + r, mask=kept, other=0) != 0
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = kept[:, None] & (c < width_x)[None, :]
    x = tl.load(X + r[:, None] * x_row + c.to(tl.int64)[None, :] * x_column, mask=here, other=0.0).to(
        tl.float64
    )
    if HAS_D:
        # Beside X, so every column is in one of the two and zero in the other.
        other = (c - width_x).to(tl.int64)
        here = kept[:, None] & ((c >= width_x) & (c < width))[None, :]
        x += tl.load(D + r[:, None] * d_row + other[None, :] * d_column, mask=here, other=0.0).to(tl.float64)
    count = tl.sum(kept.to(tl.int64), axis=0)
    mean = tl.sum(x, axis=0) / tl.maximum(count, 1).to(tl.float64)
    away = tl.where(kept[:, None], x - mean[None, :], 0.0)
    at = block * width + c
    tl.store(means + at, mean, mask=c < width)
    tl.store(m2s + at, tl.sum(away * away, axis=0), mask=c < width)
    if tl.program_id(1) == 0:
        tl.store(counts + block, count)


@triton.jit
def _join(count, mean, m2, rows, other_mean, other_m2):
    """The moments of both sides; `rows` may be 0, and then the other's figures are not used."""
    share = rows.to(tl.float64) / tl.maximum(count + rows, 1).to(tl.float64)
    shift = tl.where(rows > 0, other_mean - mean, 0.0)
    m2 += tl.where(rows > 0, other_m2, 0.0) + shift * shift * (count.to(tl.float64) * share)
    return count + rows, mean + shift * share, m2


@triton.jit
def _merge_kernel(
    count,  # [] int64
    mean,  # [width], changed in place
    m2,
    counts,  # [blocks]
    means,  # [blocks, width]
    m2s,
    firsts,  # [batches + 1] int64: a batch's first block
    trail_count,  # [batches]
    trail_mean,  # [batches, width]
    trail_m2,
    batches,
    width,
    mean_stride,
    m2_stride,
    COLUMNS: tl.constexpr,
    INFLATED: tl.constexpr,
):
    """The state after each batch; rounded to its dtype every time, as it is kept"""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = c < width
    seen = tl.load(count)
    # An empty state is zero, whatever its buffers hold.
    used = inside & (seen > 0)
    state_mean = tl.load(mean + c * mean_stride, mask=used, other=0.0).to(tl.float64)
    state_m2 = tl.load(m2 + c * m2_stride, mask=used, other=0.0).to(tl.float64)
    for batch in range(batches):
        rows = tl.zeros((), dtype=tl.int64)
        batch_mean = tl.zeros((COLUMNS,), dtype=tl.float64)
        batch_m2 = tl.zeros((COLUMNS,), dtype=tl.float64)
        for block in range(tl.load(firsts + batch), tl.load(firsts + batch + 1)):
            at = block * width + c
            block_mean = tl.load(means + at, mask=inside, other=0.0)
            block_m2 = tl.load(m2s + at, mask=inside, other=0.0)
            rows, batch_mean, batch_m2 = _join(
                rows, batch_mean, batch_m2, tl.load(counts + block), block_mean, block_m2
            )
        if INFLATED:
            batch_m2 *= rows.to(tl.float64) / tl.maximum(rows - 1, 1).to(tl.float64)
        seen, state_mean, state_m2 = _join(seen, state_mean, state_m2, rows, batch_mean, batch_m2)
        state_mean = state_mean.to(mean.dtype.element_ty).to(tl.float64)
        state_m2 = state_m2.to(mean.dtype.element_ty).to(tl.float64)
        tl.store(trail_mean + c, state_mean.to(mean.dtype.element_ty), mask=inside)
        tl.store(trail_m2 + c, state_m2.to(mean.dtype.element_ty), mask=inside)
        trail_mean += width
        trail_m2 += width
        if tl.program_id(0) == 0:
            tl.store(trail_count + batch, seen)
    # What an empty state's buffers hold is replaced by zeros even if no row came: as the eager merge does.
    if batches > 0:
        tl.store(mean + c * mean_stride, state_mean.to(mean.dtype.element_ty), mask=inside)
        tl.store(m2 + c * m2_stride, state_m2.to(mean.dtype.element_ty), mask=inside)


def _blocks_of(batches: Sequence[int]) -> tuple[list[list[int]], list[int]]:
    """Rows [first, end) of the blocks, and each batch's first block."""
    blocks: list[list[int]] = []
    firsts, start = [0], 0
    for size in batches:
        end = start + size
        blocks += [[first, min(first + _ROWS, end)] for first in range(start, end, _ROWS)]
        firsts.append(len(blocks))
        start = end
    return blocks, firsts


def _to_device(numbers: list[int], device: torch.device) -> Tensor:
    """Through pinned memory, which the caching host allocator keeps until the copy is done: the host does not wait."""
    tensor = torch.tensor(numbers, dtype=torch.int64)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def row_moments_(
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    X: Tensor,
    D: Tensor | None,
    mask: Tensor | None,
    batches: Sequence[int],
    inflated: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op: count [], mean and m2 [width] in place; the states after each batch."""
    width, device = mean.shape[0], mean.device
    trail = (
        torch.empty(len(batches), dtype=torch.int64, device=device),
        *(torch.empty(len(batches), width, dtype=mean.dtype, device=device) for _ in range(2)),
    )
    if not batches:
        return trail
    blocks, firsts = _blocks_of(batches)
    table = _to_device([*firsts, *(row for block in blocks for row in block)], device)
    counts = torch.empty(len(blocks), dtype=torch.int64, device=device)
    means, m2s = (torch.empty(len(blocks), width, dtype=torch.float64, device=device) for _ in range(2))
    other = X if D is None else D
    with torch.cuda.device_of(X):
        if blocks:
            _blocks_kernel[(len(blocks), max(1, triton.cdiv(width, _COLUMNS)))](
                X,
                other,
                X if mask is None else mask.contiguous().view(torch.uint8),
                *(table[len(firsts) :], counts, means, m2s, X.shape[1], width, *X.stride(), *other.stride()),
                ROWS=_ROWS,
                COLUMNS=_COLUMNS,
                HAS_D=D is not None,
                HAS_MASK=mask is not None,
                num_warps=_WARPS,
            )
        _merge_kernel[(max(1, triton.cdiv(width, _MERGE_COLUMNS)),)](
            *(count, mean, m2, counts, means, m2s, table, *trail),
            *(len(batches), width, mean.stride(0), m2.stride(0)),
            COLUMNS=_MERGE_COLUMNS,
            INFLATED=inflated,
            num_warps=2,
        )
    # Not by the merge: its programs read the count, each when it starts.
    count.copy_(trail[0][-1])
    return trail
