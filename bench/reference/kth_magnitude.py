"""The k-th greatest magnitude by torch.kthvalue, and keeping the k greatest by torch.topk."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["kth_magnitude", "magnitude_mask_"]


def kth_magnitude(x: Tensor, k: int, *, largest: bool = True) -> Tensor:
    """The k-th largest (or smallest) |x|."""
    return x.abs().flatten().kthvalue(x.numel() + 1 - k if largest else k).values


def magnitude_mask_(x: Tensor, k: int, *, score: Tensor | None = None, ties: str = "first") -> None:
    """Zero all of x but the k entries of greatest |score|; which of equal ones are kept is up to torch.topk."""
    size = (x if score is None else score).abs().flatten()
    kept = torch.zeros_like(size, dtype=torch.bool)
    if ties == "all" and k:
        kept = size >= size.kthvalue(size.numel() + 1 - k).values
    else:
        kept[size.topk(k).indices] = True
    x.mul_(kept.view_as(x))
