"""Head, softmax, cross-entropy and KL with every logit kept."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["target_loss"]


def target_loss(
    H: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    kl_rows: Tensor | None,
    kl_logp: Tensor | None,
    *,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """nll [R] = -log p(targets[r]) (0 where the target is -1); kl [Q] = sum_v p (log p - log p0)."""
    dtype = torch.float64 if H.dtype == torch.float64 else torch.float32
    logits = H.to(dtype) @ weight.to(dtype).T  # [R, V]
    if bias is not None:
        logits = logits + bias.to(dtype)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logp = torch.log_softmax(logits, dim=-1)
    picked = logp.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    nll = torch.where(targets >= 0, -picked, torch.zeros_like(picked))
    if kl_rows is None or kl_logp is None:
        return nll, nll.new_zeros(0)
    new = logp[kl_rows]
    terms = new.exp() * (new - kl_logp.to(dtype))
    return nll, torch.where(new.exp() > 0, terms, torch.zeros_like(terms)).sum(-1)
