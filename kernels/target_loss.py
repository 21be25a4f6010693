"""Triton kernels of fastedit.ops.target_loss: what lies between its two products per chunk of the vocabulary.

The products are torch's. A bfloat16 head is multiplied as it is, by the three bf16 planes of the other factor, whose
products are exact: widening it to float32 would move three times its bytes. The rest of the eager default's ten passes
over a chunk of logits are two: one for the running maximum, sum and target, one for the weights of the gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["target_loss"]

_BLOCK, _WARPS = 2048, 8
_COLUMNS = 1024  # of a program over [rows, d]
_PLANES = 3
# Logits of a chunk, and columns of a chunk whose gradient is summed by the tensor cores' own truncating additions.
_CHUNK_ELEMENTS, _CHUNK_COLUMNS, _LEAST_COLUMNS = 1 << 24, 1 << 14, 2048
_LOWEST = torch.finfo(torch.float32).min


@triton.jit
def _planes_kernel(x, out, n, PLANES: tl.constexpr, BLOCK: tl.constexpr):
    """out[p] = the bf16 planes of x: each is what those before it leave, rounded"""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rest = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32)
    for _ in tl.static_range(PLANES):
        part = rest.to(tl.bfloat16)
        tl.store(out + at, part, mask=at < n)
        rest -= part.to(tl.float32)
        out += n


@triton.jit
def _sums_kernel(
    z,  # [PLANES, R, width]: logits, their sum; the first plane becomes z, biased and capped
    bias,  # [width]; with HAS_BIAS
    targets,  # [R]
    state,  # [6, R]: peak, total, picked; then of this chunk: fade, rise, total before
    R,
    start,
    width,
    bias_stride,
    targets_stride,
    softcap,
    PLANES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """peak = max(peak, z); total = total * fade + sum exp(z - peak); picked = z[target]"""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row * targets_stride) - start
    before = tl.load(state + row)
    total = tl.load(state + R + row)
    z += row * width
    peaks = tl.full((BLOCK,), -float("inf"), dtype=tl.float32)
    found = tl.full((BLOCK,), -float("inf"), dtype=tl.float32)
    for first in range(0, width, BLOCK):
        c = first + tl.arange(0, BLOCK)
        x = tl.load(z + c, mask=c < width, other=-float("inf"))
        for plane in tl.static_range(1, PLANES):
            x += tl.load(z + plane * R.to(tl.int64) * width + c, mask=c < width, other=0.0)
        if HAS_BIAS:
            x += tl.load(bias + c.to(tl.int64) * bias_stride, mask=c < width, other=0.0).to(tl.float32)
        if CAPPED:
            # tanh from the exponential of a negative number, which cannot overflow.
            e = tl.exp(-2.0 * tl.abs(x / softcap))
            t = softcap * ((1.0 - e) / (1.0 + e))
            x = tl.where(c < width, tl.where(x < 0, -t, t), -float("inf"))
        peaks = tl.where((x > peaks) | (x != x), x, peaks)
        found = tl.where(c == target, x, found)
        if PLANES > 1 or HAS_BIAS or CAPPED:
            tl.store(z + c, x, mask=c < width)
    tl.debug_barrier()
    nan = tl.max((peaks != peaks).to(tl.int32), axis=0) > 0
    peak = tl.where(
        nan, float("nan"), tl.maximum(before, tl.max(tl.where(peaks != peaks, 0.0, peaks), axis=0))
    )
    rise = peak - before
    fade = tl.exp(-rise)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, width, BLOCK):
        c = first + tl.arange(0, BLOCK)
        sums += tl.exp(tl.load(z + c, mask=c < width, other=-float("inf")) - peak)
    tl.store(state + row, peak)
    tl.store(state + R + row, total * fade + tl.sum(sums, axis=0))
    if (target >= 0) & (target < width):
        hit = tl.max(tl.where(found != found, -float("inf"), found), axis=0)
        tl.store(
            state + 2 * R + row,
            tl.where(tl.max((found != found).to(tl.int32), axis=0) > 0, float("nan"), hit),
        )
    tl.store(state + 3 * R + row, fade)
    tl.store(state + 4 * R + row, rise)
    tl.store(state + 5 * R + row, total)


@triton.jit
def _store_planes(to, x, plane_stride, mask, PLANES: tl.constexpr):
    if PLANES == 1:
        tl.store(to, x, mask=mask)
    else:
        for _ in tl.static_range(PLANES):
            part = x.to(tl.bfloat16)
            tl.store(to, part, mask=mask)
            x -= part.to(tl.float32)
            to += plane_stride


@triton.jit
def _slope(x, softcap, CAPPED: tl.constexpr):
    """The derivative of the cap, from its value."""
    if CAPPED:
        slope = 1.0 - (x / softcap) * (x / softcap)
    else:
        slope = 1.0
    return slope


@triton.jit
def _gap_kernel(
    z,  # [R, width]
    rows,  # [Q]
    logp,  # [Q, width] of the fixed distribution
    state,  # [6, R]
    gap,  # [Q]
    weights,  # [PLANES, R + Q, width]: rows R and on; with WEIGHTS
    R,
    Q,
    width,
    rows_stride,
    logp_row,
    logp_column,
    softcap,
    PLANES: tl.constexpr,
    WEIGHTS: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """gap = (gap - rise * total before) * fade + sum of exp(z - peak) (z - peak - log p0)"""
    q = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + q * rows_stride)
    peak = tl.load(state + row)
    z += row * width
    weights += (R + q) * width
    plane_stride = (R + Q).to(tl.int64) * width
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, width, BLOCK):
        c = first + tl.arange(0, BLOCK)
        mask = c < width
        x = tl.load(z + c, mask=mask, other=-float("inf"))
        at = logp + q * logp_row + c.to(tl.int64) * logp_column
        p = tl.exp(x - peak)
        # Where p is 0 the term is 0, also for log p0 = -inf.
        term = tl.where(p == 0, 0.0, p * (x - peak - tl.load(at, mask=mask, other=0.0).to(tl.float32)))
        sums += term
        if WEIGHTS:
            _store_planes(weights + c, term * _slope(x, softcap, CAPPED), plane_stride, mask, PLANES)
    fade = tl.load(state + 3 * R + row)
    shifted = tl.load(gap + q) - tl.load(state + 4 * R + row) * tl.load(state + 5 * R + row)
    tl.store(gap + q, shifted * fade + tl.sum(sums, axis=0))


@triton.jit
def _weights_kernel(
    z,  # [R, width]
    state,  # [6, R]
    weights,  # [PLANES, R + Q, width]: rows up to R
    R,
    Q,
    width,
    softcap,
    PLANES: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """weights = exp(z - peak), times the slope of the cap"""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(z + row * width + c, mask=c < width, other=-float("inf"))
    p = tl.exp(x - tl.load(state + row)) * _slope(x, softcap, CAPPED)
    _store_planes(weights + row * width + c, p, (R + Q).to(tl.int64) * width, c < width, PLANES)


@triton.jit
def _pulls_kernel(
    old,  # [R + Q, d]
    product,  # [PLANES, R + Q, d]
    rows,  # [Q]
    state,  # [6, R]
    new,  # [R + Q, d]
    R,
    Q,
    d,
    rows_stride,
    PLANES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """new = fade * old + product; of a KL row, whose weights hold (z - peak), fade * (old - rise * its row's) + ..."""
    i = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = c < d
    x = tl.load(old + i * d + c, mask=mask, other=0.0)
    row = i
    if i >= R:
        row = tl.load(rows + (i - R) * rows_stride)
        x -= tl.load(state + 4 * R + row) * tl.load(old + row * d + c, mask=mask, other=0.0)
    x *= tl.load(state + 3 * R + row)
    for plane in tl.static_range(PLANES):
        x += tl.load(product + (plane * (R + Q) + i) * d + c, mask=mask, other=0.0)
    tl.store(new + i * d + c, x, mask=mask)


@triton.jit
def _result_kernel(
    pulls,  # [R + Q, d]
    weight,  # [V, d]
    targets,  # [R]
    rows,  # [Q]
    state,  # [6, R]
    gap,  # [Q]
    losses,  # [R + Q]: nll, kl
    gradients,  # [R + Q, d]
    R,
    d,
    weight_row,
    weight_column,
    targets_stride,
    rows_stride,
    softcap,
    CAPPED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """nll = log total + peak - picked; kl = gap / total - log total; and their gradients in the hidden state"""
    i = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = c < d
    x = tl.load(pulls + i * d + c, mask=mask, other=0.0)
    if i < R:
        target = tl.load(targets + i * targets_stride)
        total = tl.load(state + R + i)
        picked = tl.load(state + 2 * R + i)
        loss = tl.where(target >= 0, tl.load(state + i) - picked + tl.log(total), 0.0)
        own = tl.maximum(target, 0) * weight_row + c.to(tl.int64) * weight_column
        w = tl.load(weight + own, mask=mask, other=0.0).to(tl.float32) * _slope(picked, softcap, CAPPED)
        x = tl.where(target >= 0, x / total - w, 0.0)
    else:
        row = tl.load(rows + (i - R) * rows_stride)
        total = tl.load(state + R + row)
        mean = tl.load(gap + (i - R)) / total
        loss = mean - tl.log(total)
        x = x / total - mean * (tl.load(pulls + row * d + c, mask=mask, other=0.0) / total)
    tl.store(gradients + i * d + c, x, mask=mask)
    if tl.program_id(1) == 0:
        tl.store(losses + i, loss)


def _planes(x: Tensor) -> Tensor:
    """x [n, k] float32 as bf16 [3 n, k], plane after plane."""
    out = torch.empty(_PLANES * x.shape[0], x.shape[1], dtype=torch.bfloat16, device=x.device)
    if x.numel():
        grid = (triton.cdiv(x.numel(), _BLOCK),)
        _planes_kernel[grid](x, out, x.numel(), PLANES=_PLANES, BLOCK=_BLOCK, num_warps=_WARPS)
    return out


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32; bf16 factors by the tensor cores, with float32 sums."""
    if a.dtype == torch.bfloat16 and a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.to(torch.float32), b.to(torch.float32))


def target_loss(
    H: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    kl_rows: Tensor | None,
    kl_logp: Tensor | None,
    softcap: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op, in float32: nll [R], kl [Q] and, with_grad, their gradients in H [R, d] and [Q, d] (else [.., 0])."""
    (R, d), V, device = H.shape, weight.shape[0], H.device
    Q = 0 if kl_rows is None else kl_rows.shape[0]
    columns = d if with_grad else 0

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    losses, gradients = new(R + Q), new(R + Q, columns)
    if R + Q == 0:
        return losses[:R], losses[R:], gradients[:R], gradients[R:]
    rows, logp = (targets, H) if kl_rows is None or kl_logp is None else (kl_rows, kl_logp)
    own, capped = weight.dtype == torch.bfloat16, softcap > 0
    planes = _PLANES if own else 1
    width = min(V, max(_LEAST_COLUMNS, _CHUNK_ELEMENTS // (R + Q)), _CHUNK_COLUMNS if own else V)
    state, gap = torch.zeros(6, R, device=device), torch.zeros(Q, device=device)
    state[0] = _LOWEST  # not -inf: a chunk of -inf logits (a masked, padded vocabulary) must not give NaN
    pulls, spare = torch.zeros(R + Q, columns, device=device), new(R + Q, columns)
    with torch.cuda.device_of(H):
        X = H.to(torch.float32).contiguous()
        X = _planes(X) if own else X
        for start in range(0, V, width):
            w = weight[start : start + width] if own else weight[start : start + width].to(torch.float32)
            n = w.shape[0]
            z = _product(X, w.mT)
            some = bias if bias is None else bias[start : start + width]
            _sums_kernel[(R,)](
                *(z, z if some is None else some, targets, state, R, start, n),
                *(0 if some is None else some.stride(0), targets.stride(0), softcap),
                PLANES=planes,
                HAS_BIAS=some is not None,
                CAPPED=capped,
                BLOCK=_BLOCK,
                num_warps=_WARPS,
            )
            weights = new(planes * (R + Q), n, dtype=w.dtype) if with_grad else z
            if Q:
                part = logp[:, start : start + width]
                _gap_kernel[(Q,)](
                    *(z, rows, part, state, gap, weights, R, Q, n, rows.stride(0), *part.stride(), softcap),
                    PLANES=planes,
                    WEIGHTS=with_grad,
                    CAPPED=capped,
                    BLOCK=_BLOCK,
                    num_warps=_WARPS,
                )
            if with_grad:
                _weights_kernel[(R, triton.cdiv(n, _BLOCK))](
                    *(z, state, weights, R, Q, n, softcap),
                    PLANES=planes,
                    CAPPED=capped,
                    BLOCK=_BLOCK,
                    num_warps=_WARPS,
                )
                _pulls_kernel[(R + Q, max(1, triton.cdiv(d, _COLUMNS)))](
                    *(pulls, _product(weights, w), rows, state, spare, R, Q, d, rows.stride(0)),
                    PLANES=planes,
                    COLUMNS=_COLUMNS,
                    num_warps=4,
                )
                pulls, spare = spare, pulls
        _result_kernel[(R + Q, max(1, triton.cdiv(columns, _COLUMNS)))](
            *(pulls, weight, targets, rows, state, gap, losses, gradients, R, columns, *weight.stride()),
            *(targets.stride(0), rows.stride(0), softcap),
            CAPPED=capped,
            COLUMNS=_COLUMNS,
            num_warps=4,
        )
    return losses[:R], losses[R:], gradients[:R], gradients[R:]
