"""MEMIT (arXiv:2210.07229) from its equations: targets one request at a time, then full forwards layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from reference.target_vector import Request, captured, device_of, padded, target_vector, weight_canonical
from torch import Tensor, nn

__all__ = ["hidden", "mean_key", "memit", "update"]


def memit(
    model: nn.Module,
    requests: Sequence[Request],
    *,
    layers: Sequence[int],
    module: str,
    site: str,
    C: dict[int, Tensor],
    lam: float = 15000.0,
    steps: int = 25,
    lr: float = 0.5,
    clamp: float = 0.75,
    weight_decay: float = 0.5,
    kl_factor: float = 0.0625,
    targets: Tensor | None = None,
) -> dict[int, Tensor]:
    """Delta [out, in] by layer, float64; the weights are as before when it returns.

    module: template of the edited projection, "transformer.h.{}.mlp.c_proj"; site: template of the block,
    "transformer.h.{}". C: second moment of the keys by layer. targets: z [n, d] computed elsewhere, else searched here.
    Delta_l = R_l K_l^T (lam C_l + K_l K_l^T)^-1 with R_l = (z - h) / (layers left), h re-read after each layer.
    """
    last = layers[-1]
    if targets is None:
        found = []
        for request in requests:
            h0, delta, _ = target_vector(
                model,
                site.format(last),
                request,
                steps=steps,
                lr=lr,
                clamp=clamp,
                weight_decay=weight_decay,
                kl_factor=kl_factor,
            )
            found.append(h0 + delta)
        targets = torch.stack(found)
    Z = targets.double()
    deltas: dict[int, Tensor] = {}
    kept = {layer: weight_canonical(model.get_submodule(module.format(layer))).clone() for layer in layers}
    try:
        with torch.no_grad():
            for i, layer in enumerate(layers):
                edited = model.get_submodule(module.format(layer))
                K = torch.stack([mean_key(model, edited, request) for request in requests])  # [n, in]
                H = torch.stack([hidden(model, site.format(last), request) for request in requests])
                R = (Z - H.double()) / (len(layers) - i)
                deltas[layer] = update(C[layer].double().to(K.device), K, R, lam)
                weight_canonical(edited).add_(deltas[layer].to(edited.weight.dtype))
    finally:
        with torch.no_grad():
            for layer, weight in kept.items():
                weight_canonical(model.get_submodule(module.format(layer))).copy_(weight)
    return deltas


def update(C: Tensor, K: Tensor, R: Tensor, lam: float) -> Tensor:
    """R^T K (lam C + K^T K)^-1 as [out, in], for keys K [n, in] and residuals R [n, out]."""
    return R.T @ torch.linalg.solve(lam * C + K.T @ K, K.T).T


def mean_key(model: nn.Module, edited: nn.Module, request: Request) -> Tensor:
    """The key of one edit: the mean over groups of templates of the mean over their texts, float64."""
    ids, mask = padded(request.rows, device_of(model))
    with captured(edited) as seen:
        model(input_ids=ids, attention_mask=mask)
    inputs = seen["in"].view(*ids.shape, -1)  # OPT flattens batch and sequence
    keys = torch.stack([inputs[i, at] for i, at in enumerate(request.lookup)]).double()
    sizes = request.groups or (len(request.rows),)
    return torch.stack([group.mean(0) for group in keys.split(list(sizes))]).mean(0)


def hidden(model: nn.Module, site: str, request: Request) -> Tensor:
    """Output of module `site` at the subject's last token of the bare prompt."""
    with captured(model.get_submodule(site)) as seen:
        model(input_ids=torch.tensor([request.rows[0]], device=device_of(model)))
    return seen["out"][0, request.lookup[0]]
