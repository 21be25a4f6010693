"""Products with an MLP's last matrix in the stream's type, for a few rows.

What comes out of a sweep is a sum over all steps; a half-precision product would round it, and in float16 lose what is
small. The weights are widened a few rows at a time, so that no second copy of the matrix exists.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

__all__ = ["mlp_gradient", "mlp_product"]

_ROWS = 512


def mlp_product(module: nn.Module, activation: Tensor) -> Tensor:
    """``[n, d]`` what the matrix, without its bias, makes of activations ``[n, f]``; in their type."""
    weight = _matrix(module)
    if weight is None:
        zero = torch.zeros_like(activation[:1])
        return (module(activation) - module(zero)).to(activation.dtype)  # type: ignore[no-any-return]
    at = activation.to(weight.device)
    return torch.cat([at @ part.T for _, part in _parts(weight, at.dtype)], dim=1)


def mlp_gradient(module: nn.Module, activation: Tensor, gradient: Tensor) -> Tensor:
    """``[n, f]`` gradient of the activations from that of the product, ``[n, d]``; in the latter's type."""
    weight = _matrix(module)
    if weight is None:
        leaf = activation.clone().requires_grad_()
        with torch.enable_grad():
            output = module(leaf)
        (found,) = torch.autograd.grad(output, leaf, gradient.to(output))
        return found.to(gradient.dtype)
    at = gradient.to(weight.device)
    total = at.new_zeros(len(at), weight.shape[1])
    for rows, part in _parts(weight, at.dtype):
        total.addmm_(at[:, rows], part)
    return total


def _matrix(module: nn.Module) -> Tensor | None:
    """The weight as (out, in); ``None`` for modules (quantised, offloaded, a user's own) that are asked themselves."""
    weight = getattr(module, "weight", None)
    if type(module) not in (nn.Linear, Conv1D) or type(weight) is not nn.Parameter or weight.is_meta:
        return None
    return weight.detach().T if type(module) is Conv1D else weight.detach()


def _parts(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The matrix in another type, some rows at a time; as a whole where it has the type."""
    size = len(weight) if weight.dtype == dtype else _ROWS
    for start in range(0, len(weight), size):
        rows = slice(start, start + size)
        yield rows, weight[rows].to(dtype)
