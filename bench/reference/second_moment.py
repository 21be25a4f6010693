"""Naive twin of fastedit.ops.second_moment: ROME (arXiv:2202.05262) eq. 15, as one matrix product."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["second_moment_"]


def second_moment_(C: Tensor, K: Tensor, mask: Tensor | None = None) -> None:
    """C [d, d] += sum over the kept rows k of K of k k^T; both triangles, in C's dtype."""
    if C.dim() == 3:
        for matrix, keys in zip(C, K):
            second_moment_(matrix, keys, mask)
        return
    K = K.detach().reshape(-1, K.shape[-1])
    if mask is not None:
        K = K[mask.reshape(-1) != 0]
    K = K.to(C.dtype)
    C += torch.matmul(K.T, K)
