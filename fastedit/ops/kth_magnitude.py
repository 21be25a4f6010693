"""The k-th greatest magnitude of a tensor, and keeping only the k entries that reach it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from fastedit.ops._dispatch import Impl, Slower, define_op
from fastedit.ops._named import check_integer, check_tensors
from fastedit.ops._written import check_written, share_memory

__all__ = ["kth_magnitude", "magnitude_mask_"]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def kth_magnitude(x: Tensor, k: int, *, largest: bool = True) -> Tensor:
    """The k-th largest |x| over all entries, or the k-th smallest; exact.

    x: any shape and strides, float64, float32, bfloat16 or float16; 1 <= k <= number of entries. Returns a tensor of
    no dimensions in x's dtype, one of the magnitudes that are there. NaN counts as greater than infinity, as in
    torch.topk and torch.kthvalue, and all NaN are equal. No arithmetic, so nothing is rounded. Not differentiable.
    Raises ValueError for a wrong dtype or k.

        threshold = kth_magnitude(update, round(0.4 * update.numel()))

    Source: the threshold of RECT (arXiv:2401.04700, section 4) and of the merge in WISE (arXiv:2405.14768).
    """
    _check("x", x)
    check_integer("k", k)
    if not 1 <= k <= x.numel():
        raise ValueError(f"k must be in [1, {x.numel()}], the number of entries of x, got {k}")
    result: Tensor = _op(x.detach(), k if largest else x.numel() + 1 - k)
    return result


def magnitude_mask_(
    x: Tensor, k: int, *, score: Tensor | None = None, ties: Literal["first", "all"] = "first"
) -> None:
    """Set all entries of x to zero but the k of greatest |score|, in place; `score` is x itself if not given.

    x: any shape and strides, float64, float32, bfloat16 or float16. score: x's shape, any of these dtypes; NaN counts
    as greater than infinity. 0 <= k <= number of entries. Among entries equal to the k-th, ties="first" keeps those
    of lowest index in row-major order, so that exactly k are kept; ties="all" keeps them all. What is kept keeps its
    bits. A score that shares memory with x counts as it was before. Raises ValueError for wrong shapes, dtypes,
    devices, k or ties and for an x that overlaps itself.

        magnitude_mask_(update, round(0.4 * update.numel()), score=update / (weight + 1e-8), ties="all")

    Source: the sparsification of RECT (arXiv:2401.04700, section 4), ties="all", and the trimming step of TIES
    (arXiv:2306.01708), which WISE merges with.
    """
    _check("x", x)
    if score is not None:
        _check("score", score)
        if score.shape != x.shape:
            raise ValueError(f"score must have x's shape {list(x.shape)}, got {list(score.shape)}")
        if score.device != x.device:
            raise ValueError(f"score must be on x's device {x.device}, got {score.device}")
    check_integer("k", k)
    if not 0 <= k <= x.numel():
        raise ValueError(f"k must be in [0, {x.numel()}], the number of entries of x, got {k}")
    if ties not in ("first", "all"):
        raise ValueError(f"ties must be 'first' or 'all', got {ties!r}")
    check_written({"x": x})
    if score is x:  # it would be two names of what is written
        score = None
    if score is not None:
        # Entries are compared with the last one kept while others are being zeroed.
        score = score.detach().clone() if share_memory(x, score) else score.detach()
    _op_mask(x.detach(), score, k, ties == "all")


def _check(name: str, tensor: Tensor) -> None:
    check_tensors(**{name: tensor})
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"{name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}")


def _eager(x: Tensor, k: int) -> Tensor:
    return x.abs().flatten().kthvalue(x.numel() + 1 - k).values


def _fake(x: Tensor, k: int) -> Tensor:
    return x.new_empty(())


def _eager_mask(x: Tensor, score: Tensor | None, k: int, all_ties: bool) -> None:
    if k == 0 or x.numel() == 0:
        x.zero_()
        return
    # NaN is not equal to itself; as numbers, the bits of magnitudes are in their order.
    size = _ordered(x if score is None else score)
    last = size.flatten().kthvalue(x.numel() + 1 - k).values
    if all_ties:
        kept = size >= last
    else:
        above, tied = size > last, size == last
        rank = tied.flatten().cumsum(0).view_as(tied)
        kept = above | (tied & (rank <= k - above.sum()))
    x.masked_fill_(~kept, 0.0)


def _ordered(score: Tensor) -> Tensor:
    """Magnitudes with NaN as one number above infinity: integers in the order of the magnitudes."""
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[score.element_size()]
    size = score.abs()
    bits = size.view(integer)
    return torch.where(size.isnan(), torch.iinfo(integer).max, bits)


def _fake_mask(x: Tensor, score: Tensor | None, k: int, all_ties: bool) -> None:
    return None


_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # MagnitudeType


def _without_gaps(x: Tensor) -> Tensor:
    """The same numbers side by side, in any order; a copy only where they are not."""
    outer_first = sorted(range(x.ndim), key=x.stride, reverse=True)
    return x.permute(outer_first).contiguous()


def _run_cpu(native: Callable[..., Any], x: Tensor, k: int) -> Tensor:
    out = torch.empty((), dtype=x.dtype)
    flat = _without_gaps(x)
    native(
        x=flat.data_ptr(),
        type=_CODES[x.dtype],
        n=x.numel(),
        k=k,
        out=out.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return out


def _run_mask_cpu(
    native: Callable[..., Any], x: Tensor, score: Tensor | None, k: int, all_ties: bool
) -> None:
    flat = x.contiguous()
    other = flat if score is None else score.contiguous()
    native(
        x=flat.data_ptr(),
        type=_CODES[x.dtype],
        score=other.data_ptr(),
        score_type=_CODES[other.dtype],
        n=x.numel(),
        k=k,
        all_ties=all_ties,
        threads=torch.get_num_threads(),
    )
    if flat.data_ptr() != x.data_ptr():
        x.copy_(flat)


def _refuse_cpu(x: Tensor, k: int) -> str | None:
    return None


def _refuse_mask_cpu(x: Tensor, score: Tensor | None, k: int, all_ties: bool) -> str | None:
    return None


def _bind(x: Tensor, k: int, *, largest: bool = True) -> tuple[object, ...]:
    return x, k if largest else x.numel() + 1 - k


def _bind_mask(x: Tensor, k: int, *, score: Tensor | None = None, ties: str = "first") -> tuple[object, ...]:
    return x, score, k, ties == "all"


def _refuse_triton(x: Tensor, k: int) -> str | None:
    if x.numel() < _FEW:
        return Slower(
            f"{x.numel()} entries are under {_FEW}: the launches of its passes cost more than one sort"
        )
    return None


def _refuse_mask_triton(x: Tensor, score: Tensor | None, k: int, all_ties: bool) -> str | None:
    return _refuse_triton(x, k)


_FEW = 1 << 14  # entries that one block of torch's selection reads in about the time of the passes' launches

_op = define_op(
    "kth_magnitude",
    "(Tensor x, int k) -> Tensor",
    _fake,
    _eager,
    [
        Impl("triton", "cuda", "fastedit.kernels.kth_magnitude:kth_magnitude", _refuse_triton),
        Impl("cpu", "cpu", "fastedit._cpu:kth_magnitude", _refuse_cpu, _run_cpu),
    ],
    bind=_bind,
)
_op_mask = define_op(
    "magnitude_mask_",
    "(Tensor(a!) x, Tensor? score, int k, bool all_ties) -> ()",
    _fake_mask,
    _eager_mask,
    [
        Impl("triton", "cuda", "fastedit.kernels.kth_magnitude:magnitude_mask_", _refuse_mask_triton),
        Impl("cpu", "cpu", "fastedit._cpu:magnitude_mask", _refuse_mask_cpu, _run_mask_cpu),
    ],
    bind=_bind_mask,
)
