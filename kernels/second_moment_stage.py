"""Triton kernel that lays keys out for the product of fastedit.ops.second_moment.

Rows that do not count are dropped once, here, so that the product knows no mask; float32 keys are split into bf16
planes in the same pass; and rows of odd width or alignment become rows that the bulk copy engine takes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["stage"]

_ROWS, _COLUMNS = 16, 256  # of a program: 16 bytes a thread and load


@triton.jit
def _second_moment_stage_kernel(
    keys,  # [layers, tokens, d]
    mask,  # [tokens] uint8; with HAS_MASK
    before,  # [tokens] int32: kept rows up to this one, inclusive; with HAS_MASK
    staged,  # [layers, PLANES, padded, width]
    tokens,
    d,
    padded,
    width,
    layer_stride,
    key_stride,
    HAS_MASK: tl.constexpr,
    PLANES: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """staged[l, :, place(t)] = planes of keys[l, t], kept rows first in their order, then zeros up to a whole DEPTH

    Plane p is what the planes before it leave of the key, rounded to bf16: key = H + M + L up to 2^-24.
    """
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    layer = tl.program_id(2).to(tl.int64)
    here = t < tokens
    if HAS_MASK:
        count = tl.load(before + tokens - 1)
        seen = tl.load(before + t, mask=here, other=0)
        kept = here & (tl.load(mask + t, mask=here, other=0) != 0)
        # The others, padding included, line up behind the kept ones: each row has a place of its own.
        place = tl.where(kept, seen - 1, count + t - tl.where(here, seen, count))
    else:
        count = tokens
        kept = here
        place = t
    limit = tl.cdiv(count, DEPTH) * DEPTH
    at = keys + layer * layer_stride + t.to(tl.int64)[:, None] * key_stride + column[None, :]
    x = tl.load(at, mask=kept[:, None] & (column < d)[None, :], other=0.0)
    to = staged + (layer * PLANES * padded + place)[:, None] * width + column[None, :]
    written = (place < limit)[:, None] & (column < width)[None, :]
    if PLANES == 1:
        tl.store(to, x, mask=written)
    else:
        for _ in tl.static_range(PLANES):
            part = x.to(tl.bfloat16)
            tl.store(to, part, mask=written)
            x -= part.to(tl.float32)
            to += padded.to(tl.int64) * width


def stage(
    K: Tensor, mask: Tensor | None, before: Tensor | None, *, planes: int, depth: int, into: Tensor
) -> None:
    """into [L, planes, padded, width] = the kept rows of K [L, T, d], and zeros up to the next multiple of `depth`.

    padded: T up to a multiple of depth. before: mask [T] summed up to each row. What lies beyond is not written.
    """
    layers, tokens, d = K.shape
    padded, width = into.shape[2:]
    grid = (triton.cdiv(padded, _ROWS), triton.cdiv(width, _COLUMNS), layers)
    with torch.cuda.device_of(K):
        _second_moment_stage_kernel[grid](
            K,
            K if mask is None else mask.view(torch.uint8),
            K if before is None else before,
            into,
            tokens,
            d,
            padded,
            width,
            K.stride(0),
            K.stride(1),
            HAS_MASK=mask is not None,
            PLANES=planes,
            DEPTH=depth,
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
            num_warps=8,
        )
