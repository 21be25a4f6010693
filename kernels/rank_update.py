"""Triton kernel of fastedit.ops.rank_update: W += alpha left right, one read and one rounded write of every weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["CONFIGS", "Config", "config_for", "rank_update_"]


@triton.jit
def _rank_update_kernel(
    weight,  # [rows, columns], unit column stride
    left,  # [rows, rank], contiguous
    right,  # [rank, columns], contiguous
    norms,  # [programs, 2] fp64; with MEASURE
    rows,
    columns,
    rank,
    alpha,  # an fp32 scalar: the launcher folds it into fp64 factors
    weight_stride,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    DEPTH: tl.constexpr,  # ranks of one dot; 0: no dot, one outer product per rank
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,  # sum in fp64
    MEASURE: tl.constexpr,
):
    """weight[i, j] = round(weight[i, j] + alpha * sum_k left[i, k] right[k, j])

    With MEASURE, norms = the squares of what the tile changed by and of what its rounding kept from it, summed.
    """
    across = tl.cdiv(columns, TILE_N)
    i = (tl.program_id(0) // across) * TILE_M + tl.arange(0, TILE_M)
    j = (tl.program_id(0) % across) * TILE_N + tl.arange(0, TILE_N)
    i_in, j_in = i < rows, j < columns
    at = weight + i[:, None].to(tl.int64) * weight_stride + j[None, :]
    inside = i_in[:, None] & j_in[None, :]
    if WIDE:
        sums = tl.zeros((TILE_M, TILE_N), dtype=tl.float64)
    else:
        sums = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
    lefts = left + i.to(tl.int64) * rank
    if DEPTH == 0:
        rights = right + j
        for k in range(rank):
            a = tl.load(lefts + k, mask=i_in, other=0.0)
            b = tl.load(rights, mask=j_in, other=0.0)
            sums += a[:, None] * b[None, :]
            rights += columns
    else:
        depth = tl.arange(0, DEPTH)
        for first in range(0, rank, DEPTH):
            k = first + depth
            k_in = k < rank
            a = tl.load(lefts[:, None] + k[None, :], mask=i_in[:, None] & k_in[None, :], other=0.0)
            b = tl.load(
                right + k[:, None].to(tl.int64) * columns + j[None, :],
                mask=k_in[:, None] & j_in[None, :],
                other=0.0,
            )
            sums = tl.dot(a, b, sums, input_precision=PRECISION, out_dtype=sums.dtype)
    before = tl.load(at, mask=inside, other=0.0).to(sums.dtype)
    update = alpha * sums
    after = (before + update).to(weight.dtype.element_ty)
    tl.store(at, after, mask=inside)
    if MEASURE:
        change = after.to(tl.float64) - before.to(tl.float64)
        lost = update.to(tl.float64) - change
        to = norms + 2 * tl.program_id(0)
        tl.store(to, tl.sum(change * change))
        tl.store(to + 1, tl.sum(lost * lost))


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tile and schedule of one launch. depth 0 multiplies without tensor cores, for a handful of ranks."""

    tile_m: int
    tile_n: int
    depth: int
    warps: int
    stages: int

    def constexprs(self, wide: bool, measure: bool) -> dict[str, int | bool | str]:
        return {
            "TILE_M": self.tile_m,
            "TILE_N": self.tile_n,
            "DEPTH": self.depth,
            # Three TF32 products drop terms of 2^-22; fp64 goes to the fp64 tensor cores.
            "PRECISION": "ieee" if wide else "tf32x3",
            "WIDE": wide,
            "MEASURE": measure,
        }


# By (few ranks, fp64 sum). Every entry is compiled in the tests for sm_80 and sm_90, without spills.
CONFIGS = {
    (True, False): Config(tile_m=64, tile_n=128, depth=0, warps=8, stages=2),
    (True, True): Config(tile_m=32, tile_n=128, depth=0, warps=8, stages=2),
    (False, False): Config(tile_m=64, tile_n=128, depth=32, warps=8, stages=2),
    (False, True): Config(tile_m=64, tile_n=64, depth=16, warps=8, stages=2),
}
FEW = 8  # ranks up to which outer products cost less than a dot padded to its least depth


def config_for(rank: int, wide: bool) -> Config:
    return CONFIGS[rank <= FEW, wide]


def rank_update_(W: Tensor, left: Tensor, right: Tensor, alpha: float, norms: Tensor | None = None) -> None:
    """W [rows, columns] of unit column stride += alpha left [rows, rank] right [rank, columns].

    Both factors fp32, or both fp64, which is then the dtype of the sum. norms [2] fp64, if given: the squared norms of
    what W changed by and of what its rounding lost.
    """
    rows, columns = W.shape
    rank = left.shape[1]
    if W.numel() == 0 or rank == 0:
        if norms is not None:
            norms.zero_()
        return
    wide = left.dtype == torch.float64
    if wide:
        left, alpha = alpha * left, 1.0
    config = config_for(rank, wide)
    grid = (triton.cdiv(rows, config.tile_m) * triton.cdiv(columns, config.tile_n),)
    # One pair a program and one sum of them afterwards: the same in every run.
    parts = W if norms is None else torch.empty(grid[0], 2, dtype=torch.float64, device=W.device)
    with torch.cuda.device_of(W):
        _rank_update_kernel[grid](
            W,
            left.contiguous(),
            right.contiguous(),
            parts,
            rows,
            columns,
            rank,
            alpha,
            W.stride(0),
            **config.constexprs(wide, norms is not None),
            num_warps=config.warps,
            num_stages=config.stages,
        )
    if norms is not None:
        torch.sum(parts, 0, out=norms)
