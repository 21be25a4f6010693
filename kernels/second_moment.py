"""Triton kernel of fastedit.ops.second_moment: C += K^T diag(m) K on the lower triangle of C.

Tokens are the reduction axis and both operands are slices of the same [tokens, d] keys, so nothing is transposed in
memory. One program owns one tile of C in one layer and adds to it in token order: results repeat bit for bit.
`second_moment_stage` drops masked rows first and splits float32 keys into bf16 planes, whose products are exact.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastedit.kernels.second_moment_stage import stage

__all__ = ["CONFIGS", "PRODUCTS", "Config", "architecture", "config_for", "second_moment_"]


@triton.jit
def _root(p):
    """Row and column of entry p of a triangle that is counted row by row; the float root is corrected to be exact."""
    i = ((tl.sqrt(8.0 * p.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > p, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= p, i + 1, i)
    return i, p - i * (i + 1) // 2


@triton.jit
def _tile_of(p, tiles, GROUP: tl.constexpr):
    """Row and column of tile p of the triangle, in bands of GROUP rows and down the columns of a band.

    Programs that run together then share few columns of keys, which stay in L2.
    """
    first = _root(p)[0] // GROUP * GROUP
    q = p - first * (first + 1) // 2
    height = tl.minimum(GROUP, tiles - first)
    square = first * height
    i, j = _root(tl.maximum(q - square, 0))
    return first + tl.where(q < square, q % height, i), tl.where(q < square, q // height, first + j)


@triton.jit
def _add_tile(
    out, sums, i, j, d, out_stride, TILE_M: tl.constexpr, TILE_N: tl.constexpr, PARTS: tl.constexpr
):
    """out[i, j] += sums on and below the diagonal, PARTS slices of columns one after the other to save registers."""
    if PARTS == 1:
        left = i + tl.arange(0, TILE_M)
        right = j + tl.arange(0, TILE_N)
        outs = out + left[:, None].to(tl.int64) * out_stride + right[None, :]
        kept = (left[:, None] < d) & (right[None, :] <= left[:, None])
        before = tl.load(outs, mask=kept, other=0.0)
        tl.store(outs, before + sums.to(out.dtype.element_ty), mask=kept)
    else:
        HALF: tl.constexpr = TILE_N // 2
        low, high = tl.split(tl.permute(tl.reshape(sums, [TILE_M, 2, HALF]), (0, 2, 1)))
        _add_tile(out, low, i, j, d, out_stride, TILE_M, HALF, PARTS // 2)
        _add_tile(out, high, i, j + HALF, d, out_stride, TILE_M, HALF, PARTS // 2)


@triton.jit
def _second_moment_kernel(
    lefts,  # keys [layers, PLANES, rows, d]: a descriptor of all their rows, or a pointer
    rights,  # the same with the other tile's width
    count,  # [1] int32: how many rows count; with HAS_COUNT
    out,  # [layers, d, d]
    tokens,
    rows,
    d,
    key_stride,
    out_layer_stride,
    out_stride,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    PROMOTE: tl.constexpr,  # tokens per tensor-core chain: its rounding is biased, so chains are kept short
    FLUSH: tl.constexpr,  # tokens summed in fp32 registers before they go to `out`
    PARTS: tl.constexpr,
    PLANES: tl.constexpr,
    PAIRS: tl.constexpr,  # products of planes
    LEFTS: tl.constexpr,  # the plane of each product's left factor, two bits each
    RIGHTS: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    BULK: tl.constexpr,  # keys come through the bulk copy engine
    INTERPRET: tl.constexpr,
):
    """out[i, j] += sum over tokens t, pairs (p, q): keys[p, t, i] * keys[q, t, j], for j <= i"""
    SPLIT: tl.constexpr = TILE_M // TILE_N
    i, j = _tile_of(tl.program_id(0) // SPLIT, tl.cdiv(d, TILE_M), GROUP)
    i = i * TILE_M
    j = j * TILE_M + tl.program_id(0) % SPLIT * TILE_N
    layer = tl.program_id(1)
    out += layer.to(tl.int64) * out_layer_stride
    if HAS_COUNT:
        tokens = tl.load(count)
    if not BULK:
        left, right, depth = i + tl.arange(0, TILE_M), j + tl.arange(0, TILE_N), tl.arange(0, DEPTH)

    for span in range(0, tokens, FLUSH):
        end = tl.minimum(span + FLUSH, tokens)
        total = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
        for pair in range(PAIRS):
            a_row = (layer * PLANES + (LEFTS >> (2 * pair)) % 4) * rows
            b_row = (layer * PLANES + (RIGHTS >> (2 * pair)) % 4) * rows
            sums = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
            for t in range(span, end, DEPTH):
                if BULK:
                    a = lefts.load([a_row + t, i]).T
                    b = rights.load([b_row + t, j])
                else:
                    inside = t + depth < end
                    a_at = (a_row + t + depth).to(tl.int64)[None, :] * key_stride + left[:, None]
                    b_at = (b_row + t + depth).to(tl.int64)[:, None] * key_stride + right[None, :]
                    a = tl.load(lefts + a_at, mask=inside[None, :] & (left < d)[:, None], other=0.0)
                    b = tl.load(rights + b_at, mask=inside[:, None] & (right < d)[None, :], other=0.0)
                if INTERPRET:  # the interpreter multiplies the bit patterns of bf16
                    a = a.to(tl.float32)
                    b = b.to(tl.float32)
                sums = tl.dot(a, b, sums)
                # One loop and a branch rather than two loops: the copies never wait for the pipeline to run dry.
                if (t + DEPTH - span) % PROMOTE == 0:
                    total += sums
                    sums = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
            total += sums
        _add_tile(out, total, i, j, d, out_stride, TILE_M, TILE_N, PARTS)


# The products of bf16 planes that make one product of float32 keys, small ones first: (left, right), 0 the largest
# plane. Four keep 16 bits of each key and a Gram matrix; six reach float32's own rounding. Three would not be positive
# definite. Half-precision keys are one plane.
PRODUCTS = {
    1: ((0, 0),),
    4: ((1, 1), (1, 0), (0, 1), (0, 0)),
    6: ((2, 0), (0, 2), (1, 1), (1, 0), (0, 1), (0, 0)),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tile and schedule of one launch."""

    tile_m: int
    tile_n: int
    depth: int
    parts: int
    warps: int
    stages: int
    group: int = 8
    promote: int = 1024
    flush: int = 8192

    def constexprs(self) -> dict[str, int]:
        return {
            "TILE_M": self.tile_m,
            "TILE_N": self.tile_n,
            "DEPTH": self.depth,
            "GROUP": self.group,
            "PROMOTE": self.promote,
            "FLUSH": self.flush,
            "PARTS": self.parts,
        }


# By (architecture, bytes of an element of C). Every entry is compiled in the tests, without spills and within shared
# memory. The two fp32 accumulators and a slice of C fill the registers of a 128 x 128 tile.
CONFIGS = {
    (80, 4): Config(tile_m=128, tile_n=64, depth=64, parts=1, warps=8, stages=3),
    (80, 8): Config(tile_m=128, tile_n=64, depth=64, parts=2, warps=8, stages=3),
    (90, 4): Config(tile_m=128, tile_n=128, depth=64, parts=2, warps=8, stages=4),
    (90, 8): Config(tile_m=128, tile_n=128, depth=64, parts=4, warps=8, stages=4),
}
_STAGED_BYTES = 2 << 30  # of staged keys at a time


def architecture(tensor: Tensor) -> int:
    """90 for the schedule of sm_90, else 80: compute capability 8.0 and everything else."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return 80
    return 90 if torch.cuda.get_device_capability(tensor.device)[0] == 9 else 80


def config_for(arch: int, master: torch.dtype) -> Config:
    """arch: as of `architecture`; master: the dtype of C."""
    return CONFIGS[arch, master.itemsize]


def second_moment_(C: Tensor, K: Tensor, mask: Tensor | None, products: int) -> None:
    """C [d, d] or [L, d, d] fp32/fp64 += the second moment of K [T, d] or [L, T, d] fp32/bf16/fp16; mask [T] bool.

    products: of bf16 planes for float32 keys, 4 or 6.
    """
    masters, keys = (C, K) if C.dim() == 3 else (C[None], K[None])
    if keys.stride(-1) != 1:
        keys = keys.contiguous()
    layers, tokens, d = keys.shape
    if tokens == 0 or d == 0 or layers == 0:
        return
    arch = architecture(keys)
    config = config_for(arch, masters.dtype)
    half = keys.dtype != torch.float32
    pairs = PRODUCTS[1 if half else products]
    if half and mask is None and _fits(keys, arch, config):
        _launch(masters, keys, None, keys.shape, pairs, arch, config)
        return
    planes, width = 1 + max(pairs[0]), triton.cdiv(d, 8) * 8
    chunk = triton.cdiv(min(tokens, config.flush), config.depth) * config.depth
    together = max(1, min(layers, _STAGED_BYTES // (2 * planes * chunk * width)))
    kind = keys.dtype if half else torch.bfloat16
    staged = torch.empty(together, planes, chunk, width, dtype=kind, device=keys.device)
    for first in range(0, tokens, chunk):
        part = None if mask is None else mask[first : first + chunk]
        before = None if part is None else part.cumsum(0, dtype=torch.int32)
        count = None if before is None else before[-1:]
        for low in range(0, layers, together):
            some = keys[low : low + together, first : first + chunk]
            stage(some, part, before, planes=planes, depth=config.depth, into=staged[: some.shape[0]])
            _launch(masters[low : low + together], staged, count, some.shape, pairs, arch, config)


def _fits(keys: Tensor, arch: int, config: Config) -> bool:
    """Whether the product can read the keys where they are: their rows must be rows of one matrix."""
    layers, tokens, d = keys.shape
    stride = keys.stride(1)
    if stride < d or (layers > 1 and (keys.stride(0) != tokens * stride or tokens % config.depth)):
        return False
    return arch != 90 or (stride * keys.element_size() % 16 == 0 and keys.data_ptr() % 16 == 0)


def _launch(
    masters: Tensor,
    keys: Tensor,
    count: Tensor | None,
    shape: tuple[int, ...],
    pairs: tuple[tuple[int, int], ...],
    arch: int,
    config: Config,
) -> None:
    """One launch for all layers. keys: [L, T, d], or staged [L or more, planes, rows, width]; shape: L, T, d."""
    layers, tokens, d = shape
    rows, stride = keys.shape[-2], keys.stride(-2)
    lefts: Any = keys
    rights: Any = keys
    bulk = arch == 90
    if bulk:
        sizes, strides = [keys.shape[:-1].numel(), d], [stride, 1]
        lefts = TensorDescriptor(keys, sizes, strides, [config.depth, config.tile_m])
        rights = TensorDescriptor(keys, sizes, strides, [config.depth, config.tile_n])
    tiles = triton.cdiv(d, config.tile_m)
    with torch.cuda.device_of(keys):
        _second_moment_kernel[(config.tile_m // config.tile_n * tiles * (tiles + 1) // 2, layers)](
            lefts,
            rights,
            keys if count is None else count,
            masters,
            tokens,
            rows,
            d,
            stride,
            masters.stride(0),
            masters.stride(1),
            **config.constexprs(),
            PLANES=keys.shape[1] if keys.dim() == 4 else 1,
            PAIRS=len(pairs),
            LEFTS=sum(left << 2 * place for place, (left, _) in enumerate(pairs)),
            RIGHTS=sum(right << 2 * place for place, (_, right) in enumerate(pairs)),
            HAS_COUNT=count is not None,
            BULK=bulk,
            INTERPRET=os.environ.get("TRITON_INTERPRET") == "1",
            num_warps=config.warps,
            num_stages=config.stages,
        )
