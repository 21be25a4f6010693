"""Muon for the hidden matrices, AdamW for everything else (plain PyTorch, from the published update rule)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Muon"]


def _orthogonalise(matrices: Tensor) -> Tensor:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrix; [n, a, b] fp32 -> [n, a, b]."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + torch.baddbmm(-4.7750 * gram, gram, gram, alpha=2.0315) @ x
    return x.mT if tall else x


class Muon:
    """One optimiser for a whole model; `step(scale)` takes the gradients, clears them, and applies the schedule."""

    def __init__(self, model: nn.Module, *, lr: float, lr_rest: float, weight_decay: float) -> None:
        self._lr, self._lr_rest, self._decay, self._count = lr, lr_rest, weight_decay, 0
        groups: dict[tuple[int, ...], list[nn.Parameter]] = {}
        rest: list[nn.Parameter] = []
        for name, p in model.named_parameters():
            if p.ndim == 2 and not any(s in name for s in ("wte", "wpe", "embed", "lm_head")):
                groups.setdefault((*p.shape, "c_attn" in name), []).append(p)
            else:
                rest.append(p)
        self._hidden = [(key[-1], ps, torch.zeros(len(ps), *ps[0].shape)) for key, ps in groups.items()]
        self._rest = [(p, torch.zeros_like(p), torch.zeros_like(p)) for p in rest]

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One update from the gradients in place, with every learning rate times `scale`."""
        self._count += 1
        for fused, ps, momentum in self._hidden:
            grad = torch.stack([p.grad for p in ps])  # type: ignore[misc]
            momentum.lerp_(grad, 0.05)
            update = grad.lerp_(momentum, 0.95)
            if fused:  # GPT-2 keeps query, key and value side by side: three matrices
                n, a, b = update.shape
                parts = update.view(n, a, 3, b // 3).transpose(1, 2).reshape(3 * n, a, b // 3)
                update = _orthogonalise(parts).view(n, 3, a, b // 3).transpose(1, 2).reshape(n, a, b)
                factor = 1.0
            else:
                update = _orthogonalise(update)
                factor = (max(update.shape[1:]) / min(update.shape[1:])) ** 0.5
            for p, u in zip(ps, update, strict=True):
                p.mul_(1 - self._lr * scale * self._decay).add_(u, alpha=-self._lr * scale * factor)
                p.grad = None
        for p, first, second in self._rest:
            if p.grad is None:
                continue
            first.lerp_(p.grad, 0.1)
            second.lerp_(p.grad.square(), 0.02)
            update = (first / (1 - 0.9**self._count)) / ((second / (1 - 0.98**self._count)).sqrt() + 1e-8)
            if p.ndim == 2:
                p.mul_(1 - self._lr_rest * scale * self._decay)
            p.add_(update, alpha=-self._lr_rest * scale)
            p.grad = None
