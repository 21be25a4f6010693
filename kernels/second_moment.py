"""Triton kernel of fastedit.ops.second_moment: C += K^T diag(m) K on the lower triangle of C.

Tokens are the reduction axis and both operands are slices of the same [tokens, d] keys, so nothing is transposed in
memory. One program owns one tile of C in one layer and adds to it in token order: results repeat bit for bit.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["CONFIGS", "Config", "config_for", "second_moment_"]


@triton.jit
def _second_moment_kernel(
    keys,  # [layers, tokens, d]
    rows,  # [tokens] int32: numbers of the rows that count, those first; with HAS_ROWS
    count,  # [1] int32: how many of them; with HAS_ROWS
    out,  # [layers, d, d]
    tokens,
    d,
    key_layer_stride,
    key_stride,
    out_layer_stride,
    out_stride,
    HAS_ROWS: tl.constexpr,
    TILE_N: tl.constexpr,
    SPLIT: tl.constexpr,  # tile height / tile width
    DEPTH: tl.constexpr,
    PROMOTE: tl.constexpr,  # tokens per tensor-core chain: its rounding is biased, so chains are kept short
    FLUSH: tl.constexpr,  # tokens summed in fp32 registers before they go to `out`
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """out[i, j] += sum over kept tokens t of keys[t, i] * keys[t, j], for j <= i"""
    TILE_M: tl.constexpr = SPLIT * TILE_N
    # The triangle's tiles row by row; the float root is corrected to be exact.
    program = tl.program_id(0)
    pair = program // SPLIT
    i = ((tl.sqrt(8.0 * pair.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > pair, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= pair, i + 1, i)
    j = (pair - i * (i + 1) // 2) * SPLIT + program % SPLIT
    layer = tl.program_id(1).to(tl.int64)
    keys += layer * key_layer_stride
    out += layer * out_layer_stride
    if HAS_ROWS:
        tokens = tl.load(count)

    left = i * TILE_M + tl.arange(0, TILE_M)
    right = j * TILE_N + tl.arange(0, TILE_N)
    depth = tl.arange(0, DEPTH)
    outs = out + left[:, None].to(tl.int64) * out_stride + right[None, :]
    kept = (left[:, None] < d) & (right[None, :] <= left[:, None])

    for span in range(0, tokens, FLUSH):
        total = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
        span_end = tl.minimum(span + FLUSH, tokens)
        for chunk in range(span, span_end, PROMOTE):
            chunk_end = tl.minimum(chunk + PROMOTE, span_end)
            sums = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
            for first in range(chunk, chunk_end, DEPTH):
                t = first + depth
                inside = t < chunk_end
                if HAS_ROWS:
                    t = tl.load(rows + t, mask=inside, other=0)
                base = keys + t.to(tl.int64) * key_stride  # [DEPTH]
                a = tl.load(
                    base[None, :] + left[:, None], mask=inside[None, :] & (left[:, None] < d), other=0.0
                )
                b = tl.load(
                    base[:, None] + right[None, :], mask=inside[:, None] & (right[None, :] < d), other=0.0
                )
                if INTERPRET:  # the interpreter multiplies the bit patterns of bf16
                    a = a.to(tl.float32)
                    b = b.to(tl.float32)
                sums = tl.dot(a, b, sums, input_precision=PRECISION)
            total += sums
        before = tl.load(outs, mask=kept, other=0.0)
        tl.store(outs, before + total.to(out.dtype.element_ty), mask=kept)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tile and schedule of one launch; `precision` is that of fp32 keys (tf32x3 drops terms of 2^-22)."""

    tile_n: int
    split: int
    depth: int
    warps: int
    stages: int
    precision: str = "ieee"

    def constexprs(self, has_rows: bool, interpret: bool) -> dict[str, int | bool | str]:
        return {
            "HAS_ROWS": has_rows,
            "TILE_N": self.tile_n,
            "SPLIT": self.split,
            "DEPTH": self.depth,
            "PROMOTE": 1024,
            "FLUSH": 8192,
            "PRECISION": self.precision,
            "INTERPRET": interpret,
        }


# By (architecture, bytes of a key, bytes of an element of C). Every entry is compiled in the tests, without spills and
# within shared memory. The two fp32 accumulators fill the registers of a 128 x 128 tile, so only the lightest epilogue
# affords one; tf32x3 splits both operands in registers and needs smaller tiles still.
CONFIGS = {
    (80, 2, 4): Config(tile_n=64, split=2, depth=64, warps=8, stages=3),
    (80, 2, 8): Config(tile_n=64, split=2, depth=64, warps=8, stages=3),
    (80, 4, 4): Config(tile_n=64, split=1, depth=16, warps=8, stages=3, precision="tf32x3"),
    (80, 4, 8): Config(tile_n=64, split=1, depth=16, warps=8, stages=3, precision="tf32x3"),
    (90, 2, 4): Config(tile_n=128, split=1, depth=64, warps=8, stages=3),
    (90, 2, 8): Config(tile_n=64, split=2, depth=64, warps=8, stages=3),
    (90, 4, 4): Config(tile_n=64, split=2, depth=32, warps=8, stages=3, precision="tf32x3"),
    (90, 4, 8): Config(tile_n=64, split=2, depth=32, warps=8, stages=3, precision="tf32x3"),
}


def config_for(arch: int, key_dtype: torch.dtype, master_dtype: torch.dtype) -> Config:
    """arch: compute capability as 80, 86, 90, ...; anything but sm_90 takes the sm_80 schedule."""
    return CONFIGS[90 if 90 <= arch < 100 else 80, key_dtype.itemsize, master_dtype.itemsize]


def second_moment_(C: Tensor, K: Tensor, mask: Tensor | None) -> None:
    """C [d, d] or [L, d, d] fp32/fp64 += the second moment of K [T, d] or [L, T, d] fp32/bf16/fp16; mask [T] bool."""
    interpret = os.environ.get("TRITON_INTERPRET") == "1"
    masters, keys = (C, K) if C.dim() == 3 else (C[None], K[None])
    if keys.stride(-1) != 1:
        keys = keys.contiguous()
    layers, tokens, d = keys.shape
    if tokens == 0 or d == 0 or layers == 0:
        return
    rows = count = keys  # not read without a mask
    if mask is not None:
        # A stable sort puts the kept rows first without telling the host how many they are: no synchronisation.
        rows = torch.argsort(~mask, stable=True).to(torch.int32)
        count = mask.sum(dtype=torch.int32).reshape(1)
    major, minor = (8, 0) if interpret else torch.cuda.get_device_capability(keys.device)
    config = config_for(10 * major + minor, keys.dtype, masters.dtype)
    tiles = triton.cdiv(d, config.tile_n * config.split)
    with torch.cuda.device_of(keys):
        _second_moment_kernel[(config.split * tiles * (tiles + 1) // 2, layers)](
            keys,
            rows,
            count,
            masters,
            tokens,
            d,
            keys.stride(0),
            keys.stride(1),
            masters.stride(0),
            masters.stride(1),
            **config.constexprs(mask is not None, interpret),
            num_warps=config.warps,
            num_stages=config.stages,
        )
