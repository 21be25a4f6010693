"""One step of the target optimisation for many edits at once: weight decay, Adam, clamp to a ball."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastedit.ops._dispatch import Impl, define_op
from fastedit.ops._written import check_written

__all__ = ["delta_step_"]


def delta_step_(
    delta: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    init_norm: Tensor,
    active: Tensor,
    *,
    lr: float,
    weight_decay: float,
    clamp: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
) -> None:
    """Advance the active rows of delta [E, d] by one Adam step and project them to ||delta|| <= clamp * init_norm.

    The loss gains weight_decay * ||delta|| / init_norm^2, whose gradient weight_decay / init_norm^2 * delta / ||delta||
    (0 at delta = 0) is added to grad, which is left as it was. Adam has no decay of its own and a bias correction by
    each row's own step count; the projection leaves the moments alone.

    delta, exp_avg, exp_avg_sq: [E, d] float32 or float64, changed in place. grad: [E, d] any float dtype.
    step: [E] int64, the steps taken so far; active rows are incremented. init_norm: [E], > 0 in active rows.
    active: [E] bool; other rows keep every bit, whatever their gradient holds.
    Arithmetic is in delta's dtype, the bias corrections in float64. No host synchronisation. Raises ValueError for
    wrong shapes, dtypes, devices or hyper-parameters, and where what is changed overlaps; init_norm > 0 is not checked,
    for that would wait for the device.

        delta_step_(delta, grad, m, v, step, norms, active, lr=0.5, weight_decay=0.5, clamp=0.75)

    Source: the optimisation of v* in ROME (arXiv:2202.05262) and of z in MEMIT (arXiv:2210.07229).
    """
    _check(delta, grad, exp_avg, exp_avg_sq, step, init_norm, active)
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("clamp", clamp), ("eps", eps)):
        if not value >= 0:
            raise ValueError(f"{name} must be >= 0, got {value}")
        if value == math.inf and name != "clamp":  # no ball is a choice
            raise ValueError(f"{name} must be finite, got {value}")
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), got {value}")
    _op(
        delta.detach(),
        grad.detach(),
        exp_avg.detach(),
        exp_avg_sq.detach(),
        step,
        init_norm,
        active,
        lr,
        weight_decay,
        clamp,
        beta1,
        beta2,
        eps,
    )


def _check(
    delta: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    init_norm: Tensor,
    active: Tensor,
) -> None:
    if delta.ndim != 2 or delta.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"delta must be float32 or float64 of shape [E, d], got {delta.dtype} {list(delta.shape)}"
        )
    for name, tensor in (("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if tensor.shape != delta.shape or not tensor.is_floating_point():
            raise ValueError(
                f"{name} must be float of delta's shape {list(delta.shape)}, got {tensor.dtype} {list(tensor.shape)}"
            )
    for name, tensor in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if tensor.dtype != delta.dtype:
            raise ValueError(f"{name} must have delta's dtype {delta.dtype}, got {tensor.dtype}")
    for name, tensor in (("step", step), ("init_norm", init_norm), ("active", active)):
        if tensor.shape != delta.shape[:1]:
            raise ValueError(f"{name} must have shape [{delta.shape[0]}], got {list(tensor.shape)}")
    if step.dtype != torch.int64:
        raise ValueError(f"step must be int64, got {step.dtype}")
    if active.dtype != torch.bool:
        raise ValueError(f"active must be bool, got {active.dtype}")
    given = {"grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "step": step}
    for name, tensor in (given | {"init_norm": init_norm, "active": active}).items():
        if tensor.device != delta.device:
            raise ValueError(f"{name} must be on delta's device {delta.device}, got {tensor.device}")
    check_written({"delta": delta, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "step": step})


def _eager(
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
    dtype = delta.dtype
    on = active[:, None]
    radius = init_norm.to(dtype)[:, None]
    norm = torch.linalg.vector_norm(delta, dim=1, keepdim=True)
    # 0 / 0 at delta = 0 is the kink of the norm, where the original code's autograd gives 0.
    decay = torch.where(norm > 0, weight_decay / (radius.square() * norm), torch.zeros_like(norm))
    g = grad.to(dtype) + decay * delta
    m = torch.lerp(exp_avg, g, 1 - beta1)
    v = beta2 * exp_avg_sq + (1 - beta2) * g.square()
    count = (step + 1).to(torch.float64)[:, None]
    step_size = (lr / (1 - beta1**count)).to(dtype)
    root = (1 - beta2**count).sqrt().to(dtype)
    new = delta - step_size * m / (v.sqrt() / root + eps)
    norm = torch.linalg.vector_norm(new, dim=1, keepdim=True)
    limit = clamp * radius
    new = torch.where(norm > limit, new * (limit / norm), new)
    # where, not masking by a product: a NaN of a finished row must not reach anything.
    delta.copy_(torch.where(on, new, delta))
    exp_avg.copy_(torch.where(on, m, exp_avg))
    exp_avg_sq.copy_(torch.where(on, v, exp_avg_sq))
    step.add_(active)


def _fake(
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
    return None


_ROW_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/cpu/row_matrix.h: RowType


def _run_cpu(
    native: Callable[..., Any],
    delta: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    init_norm: Tensor,
    active: Tensor,
    *rates: float,
) -> None:
    # What the kernel reads must live until it returns.
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    radius, on = init_norm.to(torch.float32).contiguous(), active.contiguous()
    native(
        delta=(delta.data_ptr(), delta.stride(0)),
        grad=(grad.data_ptr(), _ROW_CODES[grad.dtype], grad.stride(0), grad.shape[1]),
        exp_avg=(exp_avg.data_ptr(), exp_avg.stride(0)),
        exp_avg_sq=(exp_avg_sq.data_ptr(), exp_avg_sq.stride(0)),
        step=step.data_ptr(),
        init_norm=radius.data_ptr(),
        active=on.data_ptr(),
        rows=delta.shape[0],
        rates=list(rates),
        threads=torch.get_num_threads(),
    )


def _refuse_cpu(
    delta: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, *_rest: Any
) -> str | None:
    if delta.dtype != torch.float32:
        return f"the kernel computes in float32, delta is {delta.dtype}"
    if grad.dtype not in _ROW_CODES:
        return f"grad must be float32, bfloat16 or float16, got {grad.dtype}"
    for name, tensor in (("delta", delta), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if tensor.stride(1) != 1 and tensor.shape[1] > 1:
            return f"{name} must have unit stride along a row, got strides {list(tensor.stride())}"
        if tensor.shape[0] > 1 and tensor.stride(0) < tensor.shape[1]:
            return f"the rows of {name} must not overlap, got strides {list(tensor.stride())}"
    if not step.is_contiguous():
        return f"step must be contiguous, got stride {step.stride(0)}"
    return None


def _bind(
    delta: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    init_norm: Tensor,
    active: Tensor,
    lr: float = 0.5,
    weight_decay: float = 0.0,
    clamp: float = 1.0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
) -> tuple[object, ...]:
    """For `explain`: which implementation runs does not depend on the rates."""
    state = (delta, grad, exp_avg, exp_avg_sq, step, init_norm, active)
    return (*state, lr, weight_decay, clamp, beta1, beta2, eps)


def _refuse_triton(
    delta: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *rest: object
) -> str | None:
    matrices = {"delta": delta, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    for name, tensor in matrices.items():
        if tensor.shape[1] > 1 and tensor.stride(1) != 1:
            return f"{name} must have unit stride along its rows, got strides {list(tensor.stride())}"
    return None


_op = define_op(
    "delta_step_",
    "(Tensor(a!) delta, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) step, Tensor init_norm, "
    "Tensor active, float lr, float weight_decay, float clamp, float beta1, float beta2, float eps) -> ()",
    _fake,
    _eager,
    [
        Impl("triton", "cuda", "fastedit.kernels.delta_step:delta_step_", _refuse_triton),
        Impl("cpu", "cpu", "fastedit._cpu:delta_step", _refuse_cpu, _run_cpu),
    ],
    bind=_bind,
)
