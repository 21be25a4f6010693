"""Lower triangles as vectors, row after row, a few rows at a time so that no second copy of the matrix is made."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

__all__ = ["pack_lower", "packed_size", "unpack_lower"]

# Entries of a group of rows: 2 MB in float64, so that a group and its mask stay in cache.
_ELEMENTS = 1 << 18


def packed_size(n: int) -> int:
    """Entries of an n x n lower triangle."""
    return n * (n + 1) // 2


def pack_lower(lower: Tensor) -> Iterator[Tensor]:
    """The lower triangle of ``lower [n, n]``, on any device: CPU vectors that give its rows one after the other."""
    for start, stop, mask in _groups(len(lower)):
        yield torch.from_numpy(lower[start:stop, :stop].detach().cpu().numpy()[mask])


def unpack_lower(packed: Tensor) -> Tensor:
    """``[n, n]`` with the CPU vector ``packed [n (n + 1) / 2]`` as its lower triangle, zero above.

    Raises:
        ValueError: no triangle has that many entries.
    """
    n = round((2 * packed.numel()) ** 0.5 - 0.5)
    if packed_size(n) != packed.numel():
        raise ValueError(f"packed: must have n (n + 1) / 2 entries, got {packed.numel()}")
    lower = torch.zeros(n, n, dtype=packed.dtype)
    into, values = lower.numpy(), packed.numpy()
    for start, stop, mask in _groups(n):
        into[start:stop, :stop][mask] = values[packed_size(start) : packed_size(stop)]
    return lower


def _groups(n: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """Rows start..stop-1 and, ``[stop - start, stop]``, which of their first entries belong to the triangle."""
    step = max(1, _ELEMENTS // max(n, 1))
    for start in range(0, n, step):
        stop = min(n, start + step)
        yield start, stop, np.tri(stop - start, stop, start, dtype=bool)
