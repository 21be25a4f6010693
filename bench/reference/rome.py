"""ROME (arXiv:2202.05262) from its equations, one request at a time."""

from __future__ import annotations

import torch
from reference.target_vector import Request, captured, device_of, padded, target_vector
from torch import Tensor, nn

__all__ = ["rome"]


def rome(
    model: nn.Module,
    request: Request,
    *,
    module: str,
    site: str,
    C: Tensor | None,
    steps: int = 20,
    lr: float = 0.5,
    clamp: float = 4.0,
    weight_decay: float = 0.5,
    kl_factor: float = 0.0625,
    mixed_keys: bool = True,
    target: Tensor | None = None,
) -> Tensor:
    """Delta [out, in] of the weight of `module` (the MLP's output projection); `site` is the MLP whose output is v.

    u = C^-1 k with k the mean key over the templates (C=None: u = k, the second moment switched off);
    Delta = (v* - W k_b) u^T / (k_b . u) with k_b the key of the bare prompt as in the published code, or with
    k_b replaced by k (`mixed_keys=False`) as in the paper. target: v* [out] computed elsewhere, else searched here.
    """
    ids, mask = padded(request.rows, device_of(model))
    rows = range(len(request.rows))
    with torch.no_grad(), captured(model.get_submodule(module)) as seen:
        model(input_ids=ids, attention_mask=mask)
    inputs, outs = (seen[side].view(*ids.shape, -1) for side in ("in", "out"))  # OPT flattens them
    keys = torch.stack([inputs[i, request.lookup[i]] for i in rows]).double()  # [rows, in]
    outputs = torch.stack([outs[i, request.lookup[i]] for i in rows]).double()  # [rows, out]
    k = keys.mean(0)
    u = k if C is None else torch.linalg.inv(C.double().to(k.device)) @ k
    if target is None:
        h0, delta, _ = target_vector(
            model,
            site,
            request,
            steps=steps,
            lr=lr,
            clamp=clamp,
            weight_decay=weight_decay,
            kl_factor=kl_factor,
        )
        target = h0 + delta
    if mixed_keys:
        at, current = keys[0], outputs[0]
    else:
        at, current = k, outputs.mean(0)
    return torch.outer((target.double() - current) / (at @ u), u)
