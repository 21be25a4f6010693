"""Running statistics of rows as the published editors keep them: MEND row by row, MALMEN batch by batch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["malmen_normaliser", "welford_"]


def welford_(count: int, mean: Tensor, m2: Tensor, rows: Iterable[Tensor]) -> int:
    """MEND: one row after the other. mean, m2: [d], changed in place; returns the new count.

    k += 1; m' = m + (z - m) / k; s' = s + (z - m) (z - m'); the deviation is sqrt(s / (k - 1)).
    """
    for row in rows:
        z = row.to(mean.dtype)
        if count == 0:
            count, new, spread = 1, z.clone(), torch.zeros_like(m2)
        else:
            count += 1
            new = mean + (z - mean) / count
            spread = m2 + (z - mean) * (z - new)
        mean.copy_(new)
        m2.copy_(spread)
    return count


def malmen_normaliser(count: int, mean: Tensor, m2: Tensor, batch: Tensor) -> tuple[int, Tensor, Tensor]:
    """MALMEN and UltraEdit: N = n + b; D = mean_b - mean; mean += b D / N; var += b Var_b + n b D^2 / N.

    Var_b is the unbiased variance of the batch, so that a batch of one row gives NaN.
    """
    b, z = batch.shape[0], batch.to(mean.dtype)
    total = count + b
    shift = z.mean(0) - mean
    return total, mean + b * shift / total, m2 + b * z.var(0) + count * b * shift**2 / total
