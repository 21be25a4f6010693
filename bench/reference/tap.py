"""Inputs and output gradients of linears by plain autograd: all weight gradients, all logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["tap"]


def tap(
    model: nn.Module,
    inputs: dict[str, Tensor],
    labels: Tensor,
    modules: Sequence[str],
    *,
    weights: Tensor | None = None,
    reduction: str = "mean",
    every_weight: bool = True,
) -> tuple[dict[str, tuple[Tensor, Tensor, Tensor]], Tensor]:
    """Per module X [rows, S, in], D [rows, S, out] and the gradient of its weight as stored; and the losses [rows].

    inputs: what the model's forward takes; labels: [rows, S] aligned with the logits, -100 where there is none.
    every_weight: let every parameter require a gradient, as MEND does, or only the weights of the modules (UltraEdit).
    """
    X: dict[str, Tensor] = {}
    D: dict[str, Tensor] = {}
    handles = []
    for name in modules:

        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            X[name] = args[0].detach().clone()
            output.register_hook(lambda grad: D.__setitem__(name, grad.clone()))

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    edited = [model.get_submodule(name).weight for name in modules]
    trained = list(model.parameters()) if every_weight else edited
    for parameter in trained:
        parameter.requires_grad_(True)
    try:
        logits = model(**inputs).logits  # [rows, S, V]
        dtype = torch.promote_types(logits.dtype, torch.float32)
        logp = torch.log_softmax(logits.to(dtype), dim=-1)
        real = labels != -100
        nll = -logp.gather(2, labels.clamp(min=0)[:, :, None]).squeeze(2) * real
        losses = nll.sum(1)
        if reduction == "mean":
            losses = losses / real.sum(1)
        elif reduction == "batch_mean":
            losses = losses / real.sum()
        total = losses.sum() if weights is None else (weights.to(dtype) * losses).sum()
        total.backward()
        gradients = [weight.grad.clone() for weight in edited]
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(False)
            parameter.grad = None
    rows = labels.shape[0]
    found = {
        name: (
            X[name].reshape(rows, -1, X[name].shape[-1]),
            D[name].reshape(rows, -1, D[name].shape[-1]),
            gradient,
        )
        for name, gradient in zip(modules, gradients)
    }
    return found, losses.detach()
