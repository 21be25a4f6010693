"""W += alpha left right, as one would write it: widen, add, narrow."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rank_update_"]


def rank_update_(
    W: Tensor, left: Tensor, right: Tensor, *, alpha: float = 1.0, transposed: bool = False
) -> None:
    """W [out, in] (transposed: [in, out]), left [out, r], right [r, in]; the sum is rounded once."""
    wide = W.dtype == torch.float64 or (
        W.dtype == torch.float32 and torch.float64 in (left.dtype, right.dtype)
    )
    exact = torch.float64 if wide else torch.float32
    update = alpha * (left.to(exact) @ right.to(exact))
    W.copy_((W.to(exact) + (update.T if transposed else update)).to(W.dtype))
