"""Integrated gradients: the gradients of a group's steps summed, times its activation."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["attribution_reduce"]


def attribution_reduce(
    gradient: Tensor, starts: Tensor, activation: Tensor | None = None, *, steps: int = 1
) -> Tensor:
    """[G, f]: activation[g] / steps * the sum of rows starts[g] to starts[g + 1] of gradient."""
    wide = torch.float64 in (gradient.dtype, gradient.dtype if activation is None else activation.dtype)
    dtype = torch.float64 if wide else torch.float32
    bounds = starts.tolist()
    rows = [gradient[a:b].to(dtype).sum(0) for a, b in pairwise(bounds)]
    total = torch.stack(rows) if rows else gradient.new_zeros(0, gradient.shape[1], dtype=dtype)
    return total / steps if activation is None else total * activation.to(dtype) / steps
