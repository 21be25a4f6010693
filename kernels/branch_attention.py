"""Triton kernels of fastedit.ops.branch_attention: rows of the store are read where they are, nothing is gathered.

The rows of a tile are the queries of one branch for all query heads of one key head, so that a key is read once for
the group. A program writes what no other one does: no atomics, and results repeat bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["CONFIGS", "Config", "branch_attention", "branch_attention_backward", "config_for"]


@triton.jit
def _span(starts, branch):
    """First row and number of rows of a branch."""
    first = tl.load(starts + branch)
    return first, (tl.load(starts + branch + 1) - first).to(tl.int32)


@triton.jit
def _prefix_length(columns, branch, width, TILE: tl.constexpr):
    length = 0
    for first in range(0, width, TILE):
        c = first + tl.arange(0, TILE)
        rows = tl.load(columns + branch.to(tl.int64) * width + c, mask=c < width, other=-1)
        length += tl.sum((rows >= 0).to(tl.int32), axis=0)
    return length


@triton.jit
def _tile(pointer, tokens, heads, real, token_stride, head_stride, d, D: tl.constexpr):
    """Rows (token, head) of a [tokens, heads, d] tensor as float32 [rows, D], 0 where they are not real."""
    column = tl.arange(0, D)
    at = tokens.to(tl.int64) * token_stride + heads * head_stride
    mask = real[:, None] & (column < d)[None, :]
    return tl.load(pointer + at[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _scores(q, k, scale, softcap, CAPPED: tl.constexpr, PRECISION: tl.constexpr):
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if CAPPED:
        # tanh from the exponential of a negative number, which cannot overflow.
        x = s / softcap
        e = tl.exp(-2.0 * tl.abs(x))
        t = (1.0 - e) / (1.0 + e)
        s = softcap * tl.where(x < 0, -t, t)
    return s


@triton.jit
def _seen(query, key, real_query, real_key, window, WINDOWED: tl.constexpr):
    """Which keys a query sees, by position."""
    seen = real_query[:, None] & real_key[None, :] & (key[None, :] <= query[:, None])
    if WINDOWED:
        seen &= query[:, None] - key[None, :] < window
    return seen


@triton.jit
def _forward_kernel(
    q,  # [R, H, d]
    k,  # [N, G, d]
    v,
    k_prefix,  # [P, G, d]
    v_prefix,
    columns,  # [B, width]
    q_starts,
    q_offsets,
    k_starts,
    out,  # [R, H, d] contiguous
    lse,  # [R, H] contiguous
    q_token,  # strides
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    kp_token,
    kp_head,
    vp_token,
    vp_head,
    width,
    d,
    scale,
    softcap,
    window,
    GROUP: tl.constexpr,  # query heads of one key head
    D: tl.constexpr,  # d, up to a power of two
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    EXACT: tl.constexpr,  # precision of a product of two inputs
):
    """out = softmax(mask(cap(scale q K^T))) V, one pass over the keys with a running maximum"""
    branch, head = tl.program_id(0), tl.program_id(1)
    first_q, count_q = _span(q_starts, branch)
    first_row = tl.program_id(2) * TILE_M
    if first_row >= count_q * GROUP:
        return
    first_k, count_k = _span(k_starts, branch)
    length = _prefix_length(columns, branch, width, TILE_N)
    row = first_row + tl.arange(0, TILE_M)
    real = row < count_q * GROUP
    token, heads = first_q + row // GROUP, head * GROUP + row % GROUP
    offset = tl.load(q_offsets + token, mask=real, other=0).to(tl.int32)
    queries = _tile(q, token, heads, real, q_token, q_head, d, D)

    peak = tl.full((TILE_M,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((TILE_M,), dtype=tl.float32)
    sums = tl.zeros((TILE_M, D), dtype=tl.float32)
    for first in range(0, length + count_k, TILE_N):
        place = first + tl.arange(0, TILE_N)
        early, own = place < length, (place >= length) & (place < length + count_k)
        line = tl.load(columns + branch.to(tl.int64) * width + place, mask=early, other=0)
        mine = first_k + (place - length)
        keys = _tile(k_prefix, line, head, early, kp_token, kp_head, d, D)
        keys += _tile(k, mine, head, own, k_token, k_head, d, D)
        s = _scores(queries, keys, scale, softcap, CAPPED, EXACT)
        seen = _seen(length + offset, place, real, early | own, window, WINDOWED)
        s = tl.where(seen, s, -float("inf"))
        risen = tl.maximum(peak, tl.max(s, axis=1))
        # A row that has seen nothing yet (padding, or keys before its window): -inf - -inf would be NaN.
        base = tl.where(risen == -float("inf"), 0.0, risen)
        fade = tl.exp(peak - base)
        p = tl.exp(s - base[:, None])
        total = total * fade + tl.sum(p, axis=1)
        values = _tile(v_prefix, line, head, early, vp_token, vp_head, d, D)
        values += _tile(v, mine, head, own, v_token, v_head, d, D)
        sums = tl.dot(p, values, sums * fade[:, None], input_precision="tf32x3")
        peak = risen
    total = tl.where(total > 0, total, 1.0)
    sums = sums / total[:, None]
    at = token * (tl.num_programs(1) * GROUP) + heads
    column = tl.arange(0, D)
    tl.store(
        out + at[:, None] * d + column[None, :],
        sums.to(out.dtype.element_ty),
        mask=real[:, None] & (column < d)[None, :],
    )
    tl.store(lse + at, peak + tl.log(total), mask=real)


@triton.jit
def _query_gradient_kernel(
    q,
    k,
    v,
    k_prefix,
    v_prefix,
    columns,
    q_starts,
    q_offsets,
    k_starts,
    grad,  # [R, H, d] contiguous
    lse,  # [R, H] contiguous
    dq,  # [R, H, d] contiguous
    means,  # [R, H] contiguous: sum over keys of p dp, for the other kernel
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    kp_token,
    kp_head,
    vp_token,
    vp_head,
    width,
    d,
    scale,
    softcap,
    window,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    EXACT: tl.constexpr,
):
    """dq = scale sum_j p_j (dp_j - m) c_j k_j with m = sum_j p_j dp_j and c the slope of the cap

    In one pass: the sums of p dp c k and of p c k are taken side by side, and m is known at their end.
    """
    branch, head = tl.program_id(0), tl.program_id(1)
    first_q, count_q = _span(q_starts, branch)
    first_row = tl.program_id(2) * TILE_M
    if first_row >= count_q * GROUP:
        return
    first_k, count_k = _span(k_starts, branch)
    length = _prefix_length(columns, branch, width, TILE_N)
    row = first_row + tl.arange(0, TILE_M)
    real = row < count_q * GROUP
    token, heads = first_q + row // GROUP, head * GROUP + row % GROUP
    offset = tl.load(q_offsets + token, mask=real, other=0).to(tl.int32)
    all_heads = tl.num_programs(1) * GROUP
    at = token * all_heads + heads
    queries = _tile(q, token, heads, real, q_token, q_head, d, D)
    grads = _tile(grad, token, heads, real, all_heads * d, d, d, D)
    norm = tl.load(lse + at, mask=real, other=0.0)

    mean = tl.zeros((TILE_M,), dtype=tl.float32)
    pulled = tl.zeros((TILE_M, D), dtype=tl.float32)
    plain = tl.zeros((TILE_M, D), dtype=tl.float32)
    for first in range(0, length + count_k, TILE_N):
        place = first + tl.arange(0, TILE_N)
        early, own = place < length, (place >= length) & (place < length + count_k)
        line = tl.load(columns + branch.to(tl.int64) * width + place, mask=early, other=0)
        mine = first_k + (place - length)
        keys = _tile(k_prefix, line, head, early, kp_token, kp_head, d, D)
        keys += _tile(k, mine, head, own, k_token, k_head, d, D)
        s = _scores(queries, keys, scale, softcap, CAPPED, EXACT)
        seen = _seen(length + offset, place, real, early | own, window, WINDOWED)
        p = tl.where(seen, tl.exp(s - norm[:, None]), 0.0)
        values = _tile(v_prefix, line, head, early, vp_token, vp_head, d, D)
        values += _tile(v, mine, head, own, v_token, v_head, d, D)
        dp = tl.dot(grads, tl.trans(values), input_precision=EXACT)
        mean += tl.sum(p * dp, axis=1)
        if CAPPED:
            p *= 1.0 - (s / softcap) * (s / softcap)
        pulled = tl.dot(p * dp, keys, pulled, input_precision="tf32x3")
        plain = tl.dot(p, keys, plain, input_precision="tf32x3")
    found = scale * (pulled - mean[:, None] * plain)
    column = tl.arange(0, D)
    tl.store(
        dq + at[:, None] * d + column[None, :],
        found.to(dq.dtype.element_ty),
        mask=real[:, None] & (column < d)[None, :],
    )
    tl.store(means + at, mean, mask=real)


@triton.jit
def _key_gradient_kernel(
    q,
    k,
    v,
    q_starts,
    q_offsets,
    k_starts,
    grad,
    lse,
    means,
    dk,  # [N, G, d] contiguous
    dv,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    d,
    scale,
    softcap,
    window,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    EXACT: tl.constexpr,
):
    """dv_j = sum_i p_ij g_i and dk_j = scale sum_i p_ij (dp_ij - m_i) c_ij q_i, for a branch's own keys j"""
    branch, head = tl.program_id(0), tl.program_id(1)
    first_k, count_k = _span(k_starts, branch)
    first_own = tl.program_id(2) * TILE_N
    if first_own >= count_k:
        return
    first_q, count_q = _span(q_starts, branch)
    place = first_own + tl.arange(0, TILE_N)
    own = place < count_k
    mine = first_k + place
    keys = _tile(k, mine, head, own, k_token, k_head, d, D)
    values = _tile(v, mine, head, own, v_token, v_head, d, D)
    all_heads = tl.num_programs(1) * GROUP

    key_sums = tl.zeros((TILE_N, D), dtype=tl.float32)
    value_sums = tl.zeros((TILE_N, D), dtype=tl.float32)
    for first_row in range(0, count_q * GROUP, TILE_M):
        row = first_row + tl.arange(0, TILE_M)
        real = row < count_q * GROUP
        token, heads = first_q + row // GROUP, head * GROUP + row % GROUP
        offset = tl.load(q_offsets + token, mask=real, other=0).to(tl.int32)
        at = token * all_heads + heads
        queries = _tile(q, token, heads, real, q_token, q_head, d, D)
        grads = _tile(grad, token, heads, real, all_heads * d, d, d, D)
        norm = tl.load(lse + at, mask=real, other=0.0)
        mean = tl.load(means + at, mask=real, other=0.0)
        s = _scores(queries, keys, scale, softcap, CAPPED, EXACT)
        seen = _seen(offset, place, real, own, window, WINDOWED)
        p = tl.where(seen, tl.exp(s - norm[:, None]), 0.0)
        value_sums = tl.dot(tl.trans(p), grads, value_sums, input_precision="tf32x3")
        ds = p * (tl.dot(grads, tl.trans(values), input_precision=EXACT) - mean[:, None])
        if CAPPED:
            ds *= 1.0 - (s / softcap) * (s / softcap)
        key_sums = tl.dot(tl.trans(ds), queries, key_sums, input_precision="tf32x3")
    column = tl.arange(0, D)
    at = (mine * tl.num_programs(1) + head)[:, None] * d + column[None, :]
    mask = own[:, None] & (column < d)[None, :]
    tl.store(dk + at, (scale * key_sums).to(dk.dtype.element_ty), mask=mask)
    tl.store(dv + at, value_sums.to(dv.dtype.element_ty), mask=mask)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tile and schedule of the launches. exact: precision of the product of two inputs."""

    tile_n: int
    warps: int
    stages: int
    exact: str
    tile_m: int = 16  # the least of a dot; a branch rarely has more queries

    def constexprs(self, D: int, *, group: int, capped: bool, windowed: bool) -> dict[str, int | bool | str]:
        return {
            "GROUP": group,
            "D": D,
            "TILE_M": self.tile_m,
            "TILE_N": self.tile_n,
            "CAPPED": capped,
            "WINDOWED": windowed,
            "EXACT": self.exact,
        }


# TF32 holds the products of half-precision numbers exactly; three of them drop terms of 2^-22 for float32.
_HALF, _FLOAT = "tf32", "tf32x3"

# By (D, all inputs in half precision). Every entry is compiled in the tests for sm_80 and sm_90. float32 heads of 256
# do not fit in registers.
CONFIGS = {
    (16, False): Config(tile_n=32, warps=2, stages=2, exact=_FLOAT),
    (32, False): Config(tile_n=32, warps=4, stages=2, exact=_FLOAT),
    (64, False): Config(tile_n=16, warps=8, stages=2, exact=_FLOAT),
    (128, False): Config(tile_n=16, warps=8, stages=1, exact=_FLOAT),
    (16, True): Config(tile_n=32, warps=4, stages=2, exact=_HALF),
    (32, True): Config(tile_n=16, warps=4, stages=2, exact=_HALF),
    (64, True): Config(tile_n=16, warps=4, stages=2, exact=_HALF),
    (128, True): Config(tile_n=32, warps=8, stages=2, exact=_HALF),
    (256, True): Config(tile_n=16, warps=8, stages=1, exact=_HALF),
}


def config_for(d: int, *tensors: Tensor) -> tuple[int, Config]:
    """d up to a power of two, and the launch for it."""
    D = max(16, triton.next_power_of_2(d))
    return D, CONFIGS[D, all(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in tensors)]


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


def _unit(*tensors: Tensor) -> list[Tensor]:
    return [tensor if tensor.stride(2) == 1 else tensor.contiguous() for tensor in tensors]


def branch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    columns: Tensor,
    q_starts: Tensor,
    q_offsets: Tensor,
    k_starts: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """The result [R, H, d] and the log-sum-exp [R, H] in float32."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if q.numel() == 0:
        return out, lse
    floats = _unit(q, k, v, k_prefix, v_prefix)
    D, config = config_for(q.shape[2], *floats)
    group = q.shape[1] // k.shape[1]
    constexprs = config.constexprs(D, group=group, capped=softcap > 0, windowed=window > 0)
    grid = (columns.shape[0], k.shape[1], triton.cdiv(max_q * group, config.tile_m))
    index = (columns.contiguous(), q_starts, q_offsets, k_starts)
    numbers = (*_strides(*floats), columns.shape[1], q.shape[2], scale, softcap, window)
    with torch.cuda.device_of(q):
        _forward_kernel[grid](
            *(*floats, *index, out, lse, *numbers),
            **constexprs,
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return out, lse


def branch_attention_backward(
    grad: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    columns: Tensor,
    q_starts: Tensor,
    q_offsets: Tensor,
    k_starts: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in q, k and v: queries first, then, with what that found, keys and values."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if q.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    floats = _unit(q, k, v, k_prefix, v_prefix)
    D, config = config_for(q.shape[2], *floats, grad)
    group = q.shape[1] // k.shape[1]
    constexprs = config.constexprs(D, group=group, capped=softcap > 0, windowed=window > 0)
    options = {"num_warps": config.warps, "num_stages": config.stages}
    branches, width, heads = columns.shape[0], columns.shape[1], k.shape[1]
    columns, grad, means = columns.contiguous(), grad.contiguous(), torch.empty_like(lse)
    index = (columns, q_starts, q_offsets, k_starts)
    numbers = (q.shape[2], scale, softcap, window)
    with torch.cuda.device_of(q):
        grid = (branches, heads, triton.cdiv(max_q * group, config.tile_m))
        _query_gradient_kernel[grid](
            *(*floats, *index, grad, lse, dq, means, *_strides(*floats), width, *numbers),
            **constexprs,
            **options,
        )
        grid = (branches, heads, triton.cdiv(max_k, config.tile_n))
        own = floats[:3]
        _key_gradient_kernel[grid](
            *(*own, *index[1:], grad, lse, means, dk, dv, *_strides(*own), *numbers), **constexprs, **options
        )
    return dq, dk, dv
