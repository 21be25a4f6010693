"""The nearest key by torch.cdist and the best dot products by torch.topk."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["nearest_key", "topk_keys"]


def nearest_key(q: Tensor, keys: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """index [B], distance [B], hit [B] of the nearest of at least one key."""
    dtype = torch.float64 if torch.float64 in (q.dtype, keys.dtype) else torch.float32
    distances = torch.cdist(q.to(dtype), keys.to(dtype))
    index = distances.argmin(1)
    distance = distances.gather(1, index[:, None]).squeeze(1)
    return index, distance, distance <= eps[index]


def topk_keys(q: Tensor, keys: Tensor, k: int, *, cosine: bool = False) -> tuple[Tensor, Tensor]:
    """scores [B, k] and index [B, k] of the greatest dot products (cosines); equal ones in any order."""
    dtype = torch.float64 if torch.float64 in (q.dtype, keys.dtype) else torch.float32
    q, keys = q.to(dtype), keys.to(dtype)
    if cosine:
        q, keys = torch.nn.functional.normalize(q, dim=1), torch.nn.functional.normalize(keys, dim=1)
    scores, index = (q @ keys.T).topk(k, dim=1)
    return scores, index
