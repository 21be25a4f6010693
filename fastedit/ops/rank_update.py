"""W += alpha left right in place, rounded once: how every weight edit reaches the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastedit.ops._dispatch import Impl, Slower, define_op

__all__ = ["rank_update_"]

_WEIGHTS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_CHUNK_ELEMENTS = 1 << 22  # of the widened weight at a time: 16 MB in float32


def rank_update_(
    W: Tensor, left: Tensor, right: Tensor, *, alpha: float = 1.0, transposed: bool = False
) -> None:
    """W += alpha left @ right, summed wide and rounded once into W's dtype.

    W: [out, in], or [in, out] when `transposed` (GPT-2's Conv1D): float64, float32, bfloat16 or float16, any strides.
    left: [out, r]; right: [r, in]; any float dtype and strides, r >= 0. Half-precision weights are widened to float32
    for the sum; float32 weights to float64 when a factor is float64; float64 weights are summed in float64.
    Raises ValueError for wrong shapes, dtypes or devices.

        rank_update_(linear.weight, left, right)
        rank_update_(conv1d.weight, left, right, transposed=True)

    Source: the rank-one update of ROME (arXiv:2202.05262, eq. 2) and its sum over edits in MEMIT.
    """
    _check(W, left, right, transposed)
    _op(W.detach(), left.detach(), right.detach(), float(alpha), transposed)


def _check(W: Tensor, left: Tensor, right: Tensor, transposed: bool) -> None:
    if W.ndim != 2 or W.dtype not in _WEIGHTS:
        raise ValueError(f"W must be a float matrix, got {W.dtype} of shape {list(W.shape)}")
    out, width = (W.shape[1], W.shape[0]) if transposed else (W.shape[0], W.shape[1])
    for name, tensor in (("left", left), ("right", right)):
        if tensor.ndim != 2 or not tensor.is_floating_point():
            raise ValueError(f"{name} must be a float matrix, got {tensor.dtype} {list(tensor.shape)}")
        if tensor.device != W.device:
            raise ValueError(f"{name} must be on W's device {W.device}, got {tensor.device}")
    if left.shape[0] != out:
        raise ValueError(f"left must be [{out}, r] for W {list(W.shape)}, got {list(left.shape)}")
    if right.shape != (left.shape[1], width):
        raise ValueError(f"right must be [{left.shape[1]}, {width}], got {list(right.shape)}")


def _exact_dtype(W: Tensor, left: Tensor, right: Tensor) -> torch.dtype:
    """The dtype of the sum. A half-precision weight cannot tell a float64 sum from a float32 one."""
    if W.dtype == torch.float32 and torch.float64 in (left.dtype, right.dtype):
        return torch.float64
    return torch.float64 if W.dtype == torch.float64 else torch.float32


def _eager(W: Tensor, left: Tensor, right: Tensor, alpha: float, transposed: bool) -> None:
    if left.shape[1] == 0 or W.numel() == 0:
        return
    if transposed:
        left, right = right.mT, left.mT
    dtype = _exact_dtype(W, left, right)
    left, right = left.to(dtype), right.to(dtype)
    if W.dtype == dtype:
        W.addmm_(left, right, alpha=alpha)
        return
    rows = max(1, _CHUNK_ELEMENTS // W.shape[1])
    for start in range(0, W.shape[0], rows):
        part = W[start : start + rows]
        part.copy_(torch.addmm(part.to(dtype), left[start : start + rows], right, alpha=alpha))


def _fake(W: Tensor, left: Tensor, right: Tensor, alpha: float, transposed: bool) -> None:
    return None


# csrc/cpu/rank_update.h: WeightType; csrc/cuda/rank_update.h takes float64 too.
_WEIGHT_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_FACTOR_CODES = {torch.float32: 0, torch.float64: 1}  # FactorType


def _row_major(
    W: Tensor, left: Tensor, right: Tensor, transposed: bool
) -> tuple[Tensor, Tensor, Tensor, torch.dtype]:
    """The same update with `transposed` folded in, unit stride along W's rows, factors in the dtype of the sum."""
    dtype = _exact_dtype(W, left, right)
    left, right = left.to(dtype), right.to(dtype)
    if transposed:
        left, right = right.mT, left.mT
    if W.stride(1) != 1:
        W, left, right = W.mT, right.mT, left.mT
    return W, left, right, dtype


def _run_cpu(
    native: Callable[..., Any], W: Tensor, left: Tensor, right: Tensor, alpha: float, transposed: bool
) -> None:
    W, left, right, dtype = _row_major(W, left, right, transposed)
    native(
        weight=W.data_ptr(),
        weight_type=_WEIGHT_CODES[W.dtype],
        weight_stride=W.stride(0),
        left=left.data_ptr(),
        left_row_stride=left.stride(0),
        left_rank_stride=left.stride(1),
        right=right.data_ptr(),
        right_rank_stride=right.stride(0),
        right_column_stride=right.stride(1),
        factor_type=_FACTOR_CODES[dtype],
        rows=W.shape[0],
        columns=W.shape[1],
        rank=left.shape[1],
        alpha=alpha,
        threads=torch.get_num_threads(),
    )


def _run_cuda(
    native: Callable[..., Any], W: Tensor, left: Tensor, right: Tensor, alpha: float, transposed: bool
) -> None:
    W, left, right, dtype = _row_major(W, left, right, transposed)
    left, right = left.contiguous(), right.contiguous()
    with torch.cuda.device(W.device):
        native(
            weight=W.data_ptr(),
            weight_type=_WEIGHT_CODES[W.dtype],
            weight_stride=W.stride(0),
            left=left.data_ptr(),
            right=right.data_ptr(),
            float64=dtype == torch.float64,
            rows=W.shape[0],
            columns=W.shape[1],
            rank=left.shape[1],
            alpha=alpha,
            stream=torch.cuda.current_stream(W.device).cuda_stream,
        )


def _run_triton(
    kernel: Callable[..., Any], W: Tensor, left: Tensor, right: Tensor, alpha: float, transposed: bool
) -> None:
    W, left, right, _ = _row_major(W, left, right, transposed)
    kernel(W, left, right, alpha)


def _refuse(W: Tensor, left: Tensor, right: Tensor, alpha: float, transposed: bool) -> str | None:
    if 1 not in W.stride():
        return f"W must have unit stride along one dimension, got strides {list(W.stride())}"
    if W.dtype == _exact_dtype(W, left, right):
        return Slower(
            f"W is {W.dtype} and needs no conversion: torch's addmm_ is at the limit of the machine"
        )
    return None


def _refuse_cpu(W: Tensor, left: Tensor, right: Tensor, alpha: float, transposed: bool) -> str | None:
    if W.dtype == torch.float64:
        return "W is float64: torch's addmm_ is at the limit of the machine"
    return _refuse(W, left, right, alpha, transposed)


def _refuse_cuda(W: Tensor, left: Tensor, right: Tensor, alpha: float, transposed: bool) -> str | None:
    if left.shape[1] > _CUDA_RANKS:
        return (
            f"the kernel keeps the right factor in registers, up to rank {_CUDA_RANKS}, got {left.shape[1]}"
        )
    return _refuse(W, left, right, alpha, transposed)


_CUDA_RANKS = 8  # csrc/cuda/rank_update.h: kRankUpdateMost


def _bind(
    W: Tensor, left: Tensor, right: Tensor, *, alpha: float = 1.0, transposed: bool = False
) -> tuple[object, ...]:
    return W, left, right, alpha, transposed


_op = define_op(
    "rank_update_",
    "(Tensor(a!) W, Tensor left, Tensor right, float alpha, bool transposed) -> ()",
    _fake,
    _eager,
    [
        Impl("cuda", "cuda", "fastedit._cuda:rank_update", _refuse_cuda, _run_cuda),
        Impl("triton", "cuda", "fastedit.kernels.rank_update:rank_update_", _refuse, _run_triton),
        Impl("cpu", "cpu", "fastedit._cpu:rank_update", _refuse_cpu, _run_cpu),
    ],
    bind=_bind,
)
