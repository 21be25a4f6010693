"""Naive twin of `fastedit.stats.collect_statistics`: one pass over the corpus per layer, as ROME's layer_stats does it.

Texts in groups of 100, sorted by length within a group, cut greedily into batches of rows x width <= 3 x positions and
padded; the forward stops behind the module; the keys of real tokens are summed in fp32 by one whole product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["layer_second_moment"]


class _Stop(Exception):
    pass


def _batches(rows: Sequence[Sequence[int]], limit: int, group: int = 100) -> Iterator[list[Sequence[int]]]:
    for start in range(0, len(rows), group):
        batch: list[Sequence[int]] = []
        for row in sorted(rows[start : start + group], key=len, reverse=True):
            if batch and len(batch[0]) * (len(batch) + 1) > limit:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch


def layer_second_moment(
    model: nn.Module,
    module: str,
    rows: Sequence[Sequence[int]],
    *,
    positions: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, int]:
    """Sum of k kᵀ over the inputs k of `module`, [f, f], and the number of tokens, over token-id rows."""
    caught: list[Tensor] = []

    def catch(_: nn.Module, args: tuple[Any, ...], __: Any) -> None:
        caught.append(args[0])
        raise _Stop

    total: Tensor | None = None
    count = 0
    handle = model.get_submodule(module).register_forward_hook(catch)
    try:
        for batch in _batches([row[:positions] for row in rows], 3 * positions):
            width = max(map(len, batch))
            ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in batch])
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch])
            with torch.no_grad(), suppress(_Stop):
                model(input_ids=ids, attention_mask=mask, position_ids=torch.arange(width).expand_as(ids))
            keys = caught.pop()
            features = keys.reshape(-1, keys.shape[-1])[mask.reshape(-1) == 1].to(dtype)
            if total is None:
                total = torch.zeros(features.shape[1], features.shape[1], dtype=dtype)
            total += features.T @ features
            count += features.shape[0]
    finally:
        handle.remove()
    if total is None:
        raise ValueError("rows must not be empty")
    return total, count
