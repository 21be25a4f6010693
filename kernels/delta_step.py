"""Triton kernel of fastedit.ops.delta_step: one program a row, norm, Adam step and projection in one launch."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["delta_step_"]

_WARPS = 8


@triton.jit
def _delta_step_kernel(
    delta,  # [E, d]
    grad,  # [E, d]
    exp_avg,  # [E, d]
    exp_avg_sq,  # [E, d]
    step,  # [E] int64
    init_norm,  # [E]
    active,  # [E] uint8
    d,
    delta_stride,
    grad_stride,
    exp_avg_stride,
    exp_avg_sq_stride,
    step_stride,
    init_norm_stride,
    active_stride,
    lr: tl.float64,
    weight_decay: tl.float64,
    clamp: tl.float64,
    beta1: tl.float64,
    beta2: tl.float64,
    log_beta1: tl.float64,
    log_beta2: tl.float64,
    eps: tl.float64,
    BLOCK: tl.constexpr,
):
    """g = grad + weight_decay / radius^2 * delta / ||delta||; Adam with the row's own step count; ||delta|| <= limit"""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(active + row * active_stride) == 0:
        return
    dtype = delta.dtype.element_ty
    radius = tl.load(init_norm + row * init_norm_stride).to(dtype)
    count = tl.load(step + row * step_stride) + 1
    delta += row * delta_stride
    grad += row * grad_stride
    exp_avg += row * exp_avg_stride
    exp_avg_sq += row * exp_avg_sq_stride
    block = tl.arange(0, BLOCK)

    squares = tl.zeros((BLOCK,), dtype=dtype)
    for first in range(0, d, BLOCK):
        x = tl.load(delta + first + block, mask=first + block < d, other=0.0)
        squares += x * x
    norm = _root(tl.sum(squares, axis=0))
    # The kink of the norm at 0, where the gradient is 0.
    decay = tl.where(norm > 0, tl.full((), weight_decay, dtype) / (radius * radius * norm), 0.0)
    # 1 - beta^count as the exponential of a product: beta = 0 leaves exp(-inf) = 0.
    times = count.to(tl.float64)
    power1 = tl.exp(times * tl.full((), log_beta1, tl.float64))
    power2 = tl.exp(times * tl.full((), log_beta2, tl.float64))
    step_size = (tl.full((), lr, tl.float64) / (1.0 - power1)).to(dtype)
    root = tl.sqrt(1.0 - power2).to(dtype)
    keep1, take1 = tl.full((), beta1, dtype), tl.full((), 1.0 - beta1, dtype)
    keep2, take2 = tl.full((), beta2, dtype), tl.full((), 1.0 - beta2, dtype)
    least = tl.full((), eps, dtype)

    squares = tl.zeros((BLOCK,), dtype=dtype)
    for first in range(0, d, BLOCK):
        mask = first + block < d
        x = tl.load(delta + first + block, mask=mask, other=0.0)
        g = tl.load(grad + first + block, mask=mask, other=0.0).to(dtype) + decay * x
        m = tl.load(exp_avg + first + block, mask=mask, other=0.0)
        v = tl.load(exp_avg_sq + first + block, mask=mask, other=0.0)
        m = keep1 * m + take1 * g
        v = keep2 * v + take2 * (g * g)
        x -= step_size * m / (_root(v) / root + least)
        x = tl.where(mask, x, 0.0)
        squares += x * x
        tl.store(delta + first + block, x, mask=mask)
        tl.store(exp_avg + first + block, m, mask=mask)
        tl.store(exp_avg_sq + first + block, v, mask=mask)
    norm = _root(tl.sum(squares, axis=0))
    limit = tl.full((), clamp, dtype) * radius
    if norm > limit:
        tl.debug_barrier()  # what other threads wrote is read
        for first in range(0, d, BLOCK):
            mask = first + block < d
            x = tl.load(delta + first + block, mask=mask, other=0.0)
            tl.store(delta + first + block, x * (limit / norm), mask=mask)
    tl.store(step + row * step_stride, count)


@triton.jit
def _root(x):
    """The square root rounded to nearest; plain sqrt of fp32 is an approximation."""
    if x.dtype == tl.float64:
        root = tl.sqrt(x)
    else:
        root = tl.sqrt_rn(x)
    return root


def delta_step_(
    delta: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    init_norm: Tensor,
    active: Tensor,
    lr: float,
    weight_decay: float,
    clamp: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """The op; delta, grad and the moments have unit stride along their rows."""
    rows, d = delta.shape
    if rows == 0:
        return
    logs = [math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2)]
    matrices, vectors = (delta, grad, exp_avg, exp_avg_sq), (step, init_norm, active)
    with torch.cuda.device_of(delta):
        _delta_step_kernel[(rows,)](
            *matrices,
            *vectors[:2],
            active.view(torch.uint8),
            d,
            *(tensor.stride(0) for tensor in (*matrices, *vectors)),
            *(lr, weight_decay, clamp, beta1, beta2, *logs, eps),
            BLOCK=min(2048, max(256, triton.next_power_of_2(d))),
            num_warps=_WARPS,
        )
