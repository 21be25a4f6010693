"""Triangular solves with the packed factor, row by row from its definition."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pack", "packed_solve", "unpack"]

BLOCK = 128


def pack(lower: Tensor) -> Tensor:
    """Block columns of L [f, f], one after the other: the diagonal block's inverse, then what is below it."""
    f = lower.shape[0]
    parts = []
    for start in range(0, f, BLOCK):
        stop = min(start + BLOCK, f)
        column = lower[start:, start:stop].clone()
        column[: stop - start] = torch.linalg.inv(lower[start:stop, start:stop].tril()).tril()
        parts.append(column.flatten())
    return torch.cat(parts) if parts else lower.new_empty(0)


def unpack(packed: Tensor, f: int) -> Tensor:
    """L [f, f] of its block columns."""
    lower, at = torch.zeros(f, f, dtype=packed.dtype), 0
    for start in range(0, f, BLOCK):
        stop = min(start + BLOCK, f)
        size = (f - start) * (stop - start)
        column = packed[at : at + size].reshape(f - start, stop - start)
        lower[start:, start:stop] = column
        lower[start:stop, start:stop] = torch.linalg.inv(column[: stop - start])
        at += size
    return lower


def packed_solve(packed: Tensor, rows: Tensor, *, transposed: bool = False) -> Tensor:
    """L^-1 x, or L^-T x, for every row x of rows [n, f]: one substitution after another."""
    L = unpack(packed, rows.shape[1])
    L = L.T if transposed else L
    solved = rows.double().clone()
    order = range(L.shape[0])
    for x in solved:
        for i in reversed(order) if transposed else order:
            x[i] = (x[i] - (L[i] @ x - L[i, i] * x[i])) / L[i, i]
    return solved
