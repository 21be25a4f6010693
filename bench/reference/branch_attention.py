"""Attention of every branch by itself: its prefix rows and its own keys side by side, one masked softmax."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["branch_attention"]


def branch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    columns: Tensor,
    q_starts: Tensor,
    q_offsets: Tensor,
    k_starts: Tensor,
    *,
    max_q: int,
    max_k: int,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """[R, H, D] in q's dtype; computed in float32, or in float64 if q is."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    heads = q.shape[1] // k.shape[1]
    counts_q, counts_k = q_starts.diff().tolist(), k_starts.diff().tolist()
    own = zip(columns, q.split(counts_q), q_offsets.split(counts_q), k.split(counts_k), v.split(counts_k))
    results = []
    for row, mine, offsets, my_keys, my_values in own:
        rows = row[row >= 0]
        keys = torch.cat([k_prefix[rows], my_keys]).to(dtype).repeat_interleave(heads, 1)  # [n, H, D]
        values = torch.cat([v_prefix[rows], my_values]).to(dtype).repeat_interleave(heads, 1)
        scores = scale * torch.einsum("qhd,khd->hqk", mine.to(dtype), keys)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        at = len(rows) + offsets[:, None]  # position of each query
        place = torch.arange(len(keys), device=q.device)
        seen = place <= at
        if window is not None:
            seen = seen & (at - place < window)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        results.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(results).to(q.dtype) if results else torch.zeros_like(q)
