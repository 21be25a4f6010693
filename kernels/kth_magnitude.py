"""Triton kernels of fastedit.ops.kth_magnitude: radix select on the bits of magnitudes, then a masked write.

As integers, the bits of magnitudes are in their order. A pass counts the next digit among the entries whose higher
digits are those of the answer; the next pass starts by reading the digit off the counts. Counts are integers, so
atomics leave results exact and the same in every run, and nothing is told to the host.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["kth_magnitude", "magnitude_mask_"]

_BITS, _BLOCK, _PROGRAMS, _WARPS = 8, 2048, 1024, 8
# By bytes of an element: the integer type, its greatest number, infinity's bits (bfloat16's differ), its digits.
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_INFINITY = {
    torch.float16: 0x7C00,
    torch.bfloat16: 0x7F80,
    torch.float32: 0x7F800000,
    torch.float64: 0x7FF0000000000000,
}


@triton.jit
def _size(bits, INFINITY: tl.constexpr, MOST: tl.constexpr):
    """Bits of a number to those of its magnitude, as int32 or int64, every NaN the greatest."""
    if MOST == 0x7FFF:
        bits = bits.to(tl.int32)
    bits = bits & MOST
    return tl.where(bits > INFINITY, MOST, bits)


@triton.jit
def _digit(counts, place, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """The highest digit whose entries and those above it are at least `place`; how many are above it."""
    digits = tl.arange(0, 1 << BITS)
    found = tl.load(counts + digits)
    above = tl.sum(found, axis=0) - tl.cumsum(found, axis=0)
    digit = tl.sum((above >= place).to(tl.int32), axis=0)
    return digit, tl.sum(tl.where(digits == digit, above, 0), axis=0)


@triton.jit
def _count_kernel(
    x,  # [n] as integers
    counts,  # [passes, 2^BITS] int64, zero
    state,  # [passes + 1, 2] int64: the digits so far, the place among the entries that have them
    n,
    INFINITY: tl.constexpr,
    MOST: tl.constexpr,
    PASS: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """counts[PASS, v] = how many entries with the digits so far go on with v"""
    DIGITS: tl.constexpr = 1 << BITS
    head = tl.load(state + 2 * PASS)
    if PASS > 0:
        # The digit of the pass before, found by every program for itself; one writes it down for the next pass.
        place = tl.load(state + 2 * PASS - 1)
        digit, above = _digit(counts + (PASS - 1) * DIGITS, place, SHIFT, BITS)
        head = (tl.load(state + 2 * PASS - 2) << BITS) + digit
        if tl.program_id(0) == 0:
            tl.store(state + 2 * PASS, head)
            tl.store(state + 2 * PASS + 1, place - above)
    found = tl.zeros((DIGITS,), dtype=tl.int32)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0).to(tl.int64) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        size = _size(tl.load(x + at, mask=at < n, other=0), INFINITY, MOST)
        mine = at < n
        if PASS > 0:
            mine &= (size >> (SHIFT + BITS)) == head
        found += tl.histogram(((size >> SHIFT) & (DIGITS - 1)).to(tl.int32), DIGITS, mask=mine)
    tl.atomic_add(
        counts + PASS * DIGITS + tl.arange(0, DIGITS), found.to(tl.int64), mask=found > 0, sem="relaxed"
    )


@triton.jit
def _result_kernel(counts, state, out, PASS: tl.constexpr, BITS: tl.constexpr):
    """The last digit: the magnitude's bits, and the place of the answer among its equals"""
    place = tl.load(state + 2 * PASS - 1)
    digit, above = _digit(counts + (PASS - 1) * (1 << BITS), place, 0, BITS)
    size = (tl.load(state + 2 * PASS - 2) << BITS) + digit
    tl.store(state + 2 * PASS, size)
    tl.store(state + 2 * PASS + 1, place - above)
    tl.store(out, size.to(out.dtype.element_ty))


@triton.jit
def _tied_kernel(score, last, ties, n, INFINITY: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr):
    """ties[b] = how many entries of block b equal the last magnitude that is kept"""
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    size = _size(tl.load(score + at, mask=at < n, other=0), INFINITY, MOST)
    tied = (size == tl.load(last)) & (at < n)
    tl.store(ties + block, tl.sum(tied.to(tl.int32), axis=0))


@triton.jit
def _mask_kernel(
    x,  # [n] as integers
    score,
    last,  # state of the select: the last magnitude that is kept, how many of its equals are
    ties,  # [blocks] int64: equals up to and with this block; with FIRST
    n,
    INFINITY: tl.constexpr,
    MOST: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x = 0 where the score is below the last magnitude, or equal to it and too late"""
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    size = _size(tl.load(score + at, mask=at < n, other=0), INFINITY, MOST)
    least = tl.load(last)
    kept = size >= least
    if FIRST:
        tied = ((size == least) & (at < n)).to(tl.int32)
        rank = tl.load(ties + block) - tl.sum(tied, axis=0) + tl.cumsum(tied, axis=0)
        kept = (size > least) | ((size == least) & (rank <= tl.load(last + 1)))
    tl.store(x + at, tl.zeros((BLOCK,), dtype=x.dtype.element_ty), mask=(at < n) & ~kept)


def kth_magnitude(x: Tensor, k: int) -> Tensor:
    """The k-th greatest |x|, a tensor of no dimensions in x's dtype."""
    out = torch.empty((), dtype=x.dtype, device=x.device)
    _select(_bits(x), x.dtype, k, out)
    return out


def magnitude_mask_(x: Tensor, score: Tensor | None, k: int, all_ties: bool) -> None:
    """Zero all of x but the k entries of greatest |score|; of equals the first, or with all_ties all."""
    if k == 0 or x.numel() == 0:
        x.zero_()
        return
    written = x if x.is_contiguous() else x.contiguous()
    score = written if score is None else score.contiguous()
    bits, n = _bits(score), x.numel()
    last = _select(bits, score.dtype, k, torch.empty((), dtype=score.dtype, device=x.device))
    blocks, ties = triton.cdiv(n, _BLOCK), last
    options: dict[str, Any] = {**_constants(score.dtype), "BLOCK": _BLOCK, "num_warps": _WARPS}
    with torch.cuda.device_of(x):
        if not all_ties:
            ties = torch.empty(blocks, dtype=torch.int64, device=x.device)
            _tied_kernel[(blocks,)](bits, last, ties, n, **options)
            ties = ties.cumsum(0)
        _mask_kernel[(blocks,)](_bits(written), bits, last, ties, n, FIRST=not all_ties, **options)
    if written is not x:
        x.copy_(written)


def _bits(x: Tensor) -> Tensor:
    """All entries as a row of integers, in memory order where that is dense."""
    if not x.is_contiguous():
        dense = torch.ops.aten.is_non_overlapping_and_dense(x)
        x = x.as_strided((x.numel(),), (1,)) if dense else x.contiguous()
    return x.reshape(-1).view(_INTEGERS[x.element_size()])


def _constants(dtype: torch.dtype) -> dict[str, int]:
    return {"INFINITY": _INFINITY[dtype], "MOST": (1 << 8 * dtype.itemsize - 1) - 1}


def _select(bits: Tensor, dtype: torch.dtype, k: int, out: Tensor) -> Tensor:
    """Writes the k-th greatest magnitude to `out`; returns [its bits, how many of its equals are among the k]."""
    passes, n = dtype.itemsize * 8 // _BITS, bits.shape[0]
    counts = torch.zeros(passes, 1 << _BITS, dtype=torch.int64, device=bits.device)
    state = torch.zeros(passes + 1, 2, dtype=torch.int64, device=bits.device)
    state[0, 1] = k
    grid = (min(triton.cdiv(n, _BLOCK), _PROGRAMS),)
    with torch.cuda.device_of(bits):
        for index in range(passes):
            _count_kernel[grid](
                *(bits, counts, state, n),
                **_constants(dtype),
                PASS=index,
                SHIFT=8 * (passes - 1 - index),
                BITS=_BITS,
                BLOCK=_BLOCK,
                num_warps=_WARPS,
            )
        _result_kernel[(1,)](counts, state, out.view(bits.dtype), PASS=passes, BITS=_BITS, num_warps=_WARPS)
    return state[passes]
