"""One optimiser step per edit with torch.optim.Adam itself, one edit at a time."""

from __future__ import annotations

import torch
from torch import Tensor

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
    """Gradient of the norm penalty, Adam, projection to the ball, for every active row of delta [E, d]."""
    for row in range(delta.shape[0]):
        if not active[row]:
            continue
        d = delta[row].clone().requires_grad_()
        loss = weight_decay * d.norm() / init_norm[row] ** 2
        (decay,) = torch.autograd.grad(loss, d)
        if not d.detach().any():
            decay = torch.zeros_like(d)  # the papers' code starts at 0, where torch's norm has gradient 0 too
        d.grad = grad[row].to(d.dtype) + decay.nan_to_num(0.0)
        optimizer = torch.optim.Adam([d], lr=lr, betas=(beta1, beta2), eps=eps)
        optimizer.state[d] = {
            "step": torch.tensor(float(step[row])),
            "exp_avg": exp_avg[row].clone(),
            "exp_avg_sq": exp_avg_sq[row].clone(),
        }
        optimizer.step()
        state, d = optimizer.state[d], d.detach()
        if d.norm() > clamp * init_norm[row]:
            d = d * (clamp * init_norm[row] / d.norm())
        delta[row], step[row] = d, int(state["step"])
        exp_avg[row], exp_avg_sq[row] = state["exp_avg"], state["exp_avg_sq"]
