"""A lower triangular factor that grows and shrinks at its end: blocks of rows, half the memory of the square."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["RowFactor"]

_BLOCK = 128  # rows of a block: products large enough for the BLAS, little to copy when one row comes


class RowFactor:
    """L [m, m] float64 as blocks of rows [128, up to the diagonal], with the diagonal blocks' inverses beside them.

    The inverses are a function of the blocks alone, so that a factor read from a file gives the same bits.
    """

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._inverses: list[Tensor] = []

    def __len__(self) -> int:
        """m."""
        return self._blocks[-1].shape[1] if self._blocks else 0

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in (*self._blocks, *self._inverses))

    def copy(self) -> RowFactor:
        """A factor that later changes of this one do not reach; blocks are shared, they are never written to."""
        other = RowFactor()
        other._blocks, other._inverses = list(self._blocks), list(self._inverses)
        return other

    def append(self, B: Tensor, D: Tensor) -> None:
        """Add the rows [B | D]: B [n, m], D [n, n] lower triangular."""
        m, n = len(self), len(B)
        rows = torch.cat([B, D.tril()], dim=1)
        at = 0
        while at < n:
            start = (m + at) // _BLOCK * _BLOCK
            stop = min(start + _BLOCK, m + n)
            new = rows[at : stop - m, :stop]
            if start < m + at:  # the last block is not full
                old = self._blocks.pop()
                self._inverses.pop()
                new = torch.cat([torch.nn.functional.pad(old, (0, stop - old.shape[1])), new])
            self._push(new.contiguous())
            at = stop - m

    def truncate(self, m: int) -> None:
        """Keep the first m rows and columns."""
        while len(self) > m:
            block = self._blocks.pop()
            self._inverses.pop()
            kept = m - (block.shape[1] - len(block))
            if kept > 0:
                self._push(block[:kept, :m].contiguous())

    def solve(self, rows: Tensor, *, transposed: bool) -> Tensor:
        """L^-1 x for every row x of rows [n, m], or L^-T x."""
        X = rows.clone()
        steps = list(zip(self._blocks, self._inverses, strict=True))
        for block, inverse in reversed(steps) if transposed else steps:
            stop = block.shape[1]
            start = stop - len(block)
            own, before = X[:, start:stop], X[:, :start]
            if transposed:
                own.copy_(own @ inverse)
                if start:
                    before.addmm_(own, block[:, :start], alpha=-1)
            else:
                own.copy_((own - before @ block[:, :start].mT) @ inverse.mT)
        return X

    def packed(self) -> Tensor:
        """All blocks as one vector, for a file."""
        if not self._blocks:
            return torch.empty(0, dtype=torch.float64)
        return torch.cat([block.flatten() for block in self._blocks])

    @staticmethod
    def of(packed: Tensor, m: int) -> RowFactor:
        """The factor [m, m] that `packed` gave. Raises ValueError for another number of entries."""
        shapes = [(min(_BLOCK, m - start), min(start + _BLOCK, m)) for start in range(0, m, _BLOCK)]
        size = sum(rows * columns for rows, columns in shapes)
        if packed.shape != (size,) or packed.dtype != torch.float64:
            raise ValueError(
                f"factor must be [{size}] float64 for {m} keys, got {packed.dtype} {list(packed.shape)}"
            )
        found = RowFactor()
        for rows, columns in shapes:
            found._push(packed[: rows * columns].view(rows, columns).clone())
            packed = packed[rows * columns :]
        return found

    def _push(self, block: Tensor) -> None:
        n = len(block)
        eye = torch.eye(n, dtype=block.dtype, device=block.device)
        self._blocks.append(block)
        self._inverses.append(torch.linalg.solve_triangular(block[:, -n:], eye, upper=False).tril())
