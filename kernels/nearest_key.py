"""Triton kernels of fastedit.ops.nearest_key: every key is read once for a block of queries, in two stages.

The first takes the differences of a block of keys and keeps its nearest and the next square per query; the second
reduces the blocks. One tile and one order of additions, so that a pair has one distance in every call; no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["nearest_key"]

_KEYS, _DEPTH, _QUERIES, _BLOCKS = 16, 256, 8, 1024


@triton.jit
def _two_least(squares, index, axis: tl.constexpr):
    """Least value, its lowest index, and the least of the others, along an axis."""
    best = tl.min(squares, axis=axis)
    far = 9223372036854775807
    wide = tl.expand_dims(best, axis)
    which = tl.min(tl.where(squares == wide, index, far), axis=axis)
    second = tl.min(tl.where(index == tl.expand_dims(which, axis), float("inf"), squares), axis=axis)
    return best, which, second


@triton.jit
def _squares_kernel(
    q,  # [B, d]
    keys,  # [N, d]
    bests,  # [B, blocks]
    indices,  # [B, blocks] int64
    seconds,  # [B, blocks]
    B,
    N,
    d,
    q_row,  # strides
    q_column,
    key_row,
    key_column,
    KEYS: tl.constexpr,
    DEPTH: tl.constexpr,
    QUERIES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Of one block of keys and QUERIES queries: the two least of sum_i (q_i - k_i)^2, the first one's key"""
    key = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    first = tl.program_id(1) * QUERIES
    query = tl.arange(0, QUERIES)
    real = key < N
    key_at = keys + key.to(tl.int64)[:, None] * key_row
    dtype = bests.dtype.element_ty
    sums = tl.zeros((KEYS, QUERIES), dtype=dtype)
    for start in tl.range(0, d, DEPTH, num_stages=STAGES):
        column = start + tl.arange(0, DEPTH)
        inside = column < d
        mask = real[:, None] & inside[None, :]
        k = tl.load(key_at + column.to(tl.int64)[None, :] * key_column, mask=mask, other=0.0).to(dtype)
        for b in tl.static_range(QUERIES):
            here = inside & (first + b < B)
            at = q + (first + b).to(tl.int64) * q_row + column.to(tl.int64) * q_column
            away = tl.load(at, mask=here, other=0.0).to(dtype)[None, :] - k
            away = tl.where(inside[None, :], away, 0.0)
            sums += tl.where(query[None, :] == b, tl.sum(away * away, axis=1)[:, None], 0.0)
    # Also NaN, which is not less than infinity.
    sums = tl.where(real[:, None] & (sums < float("inf")), sums, float("inf"))
    best, which, second = _two_least(sums, key.to(tl.int64)[:, None], 0)
    at = (first + query).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    mask = first + query < B
    tl.store(bests + at, best, mask=mask)
    tl.store(indices + at, which, mask=mask)
    tl.store(seconds + at, second, mask=mask)


@triton.jit
def _nearest_kernel(
    bests,  # [B, blocks]
    indices,
    seconds,
    eps,  # [N]
    index,  # [B] int64
    distance,  # [B]
    hit,  # [B] uint8
    second,  # [B]
    blocks,
    eps_stride,
    BLOCKS: tl.constexpr,
):
    """The nearest of all blocks, whether it is within its radius, and the next distance"""
    query = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCKS)
    dtype = bests.dtype.element_ty
    best = tl.full((), float("inf"), dtype=dtype)
    next_best = tl.full((), float("inf"), dtype=dtype)
    which = tl.full((), -1, dtype=tl.int64)
    for start in range(0, blocks, BLOCKS):
        at = query * blocks + start + column
        mask = start + column < blocks
        values = tl.load(bests + at, mask=mask, other=float("inf"))
        names = tl.load(indices + at, mask=mask, other=9223372036854775807)
        others = tl.load(seconds + at, mask=mask, other=float("inf"))
        here, name, runner = _two_least(values, names, 0)
        runner = tl.minimum(runner, tl.min(others, axis=0))
        # Blocks come in the order of their keys: on a tie the one before stays, and the tie is the second.
        next_best = tl.minimum(tl.minimum(next_best, runner), tl.maximum(best, here))
        which = tl.where(here < best, name, which)
        best = tl.minimum(best, here)
    if dtype == tl.float64:
        root, next_root = tl.sqrt(best), tl.sqrt(next_best)
    else:
        root, next_root = tl.sqrt_rn(best), tl.sqrt_rn(next_best)
    radius = tl.load(eps + tl.maximum(which, 0) * eps_stride)
    tl.store(index + query, which)
    tl.store(distance + query, root)
    tl.store(hit + query, ((which >= 0) & (root.to(tl.float64) <= radius.to(tl.float64))).to(tl.uint8))
    tl.store(second + query, next_root)


def nearest_key(q: Tensor, keys: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op: index [B] int64, distance [B], hit [B] bool, second distance [B]."""
    (B, d), N = q.shape, keys.shape[0]
    dtype = torch.float64 if torch.float64 in (q.dtype, keys.dtype) else torch.float32
    index = torch.full((B,), -1, dtype=torch.int64, device=q.device)
    distance = torch.full((B,), torch.inf, dtype=dtype, device=q.device)
    hit = torch.zeros(B, dtype=torch.bool, device=q.device)
    second = distance.clone()
    if B == 0 or N == 0:
        return index, distance, hit, second
    blocks = triton.cdiv(N, _KEYS)
    bests, seconds = (torch.empty(B, blocks, dtype=dtype, device=q.device) for _ in range(2))
    indices = torch.empty(B, blocks, dtype=torch.int64, device=q.device)
    with torch.cuda.device_of(q):
        _squares_kernel[(blocks, triton.cdiv(B, _QUERIES))](
            *(q, keys, bests, indices, seconds, B, N, d, *q.stride(), *keys.stride()),
            KEYS=_KEYS,
            DEPTH=_DEPTH // (4 if dtype == torch.float64 else 1),
            QUERIES=_QUERIES,
            STAGES=3,
            num_warps=4,
        )
        _nearest_kernel[(B,)](
            *(bests, indices, seconds, eps, index, distance, hit.view(torch.uint8), second),
            blocks,
            eps.stride(0),
            BLOCKS=_BLOCKS,
            num_warps=4,
        )
    return index, distance, hit, second
