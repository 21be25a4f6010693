"""W += alpha left right in place, rounded once: how every weight edit reaches the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, overload

import torch
from torch import Tensor

from fastedit.ops._dispatch import Impl, Slower, define_op
from fastedit.ops._written import check_written

__all__ = ["rank_update_"]

_WEIGHTS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_Some: TypeAlias = Tensor | Sequence[Tensor]
_Rate: TypeAlias = float | Sequence[float]
_Lists: TypeAlias = Sequence[Tensor]
_CHUNK_ELEMENTS = 1 << 22  # of the widened weight at a time: 16 MB in float32


@overload
def rank_update_(
    W: _Some,
    left: _Some,
    right: _Some,
    *,
    alpha: _Rate = ...,
    transposed: bool = ...,
    measure: Literal[False] = ...,
) -> None: ...
@overload
def rank_update_(
    W: _Some, left: _Some, right: _Some, *, alpha: _Rate = ..., transposed: bool = ..., measure: Literal[True]
) -> tuple[Tensor, Tensor]: ...


def rank_update_(
    W: _Some,
    left: _Some,
    right: _Some,
    *,
    alpha: _Rate = 1.0,
    transposed: bool = False,
    measure: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """W += alpha left @ right, summed wide and rounded once into W's dtype; of one module or of several in one call.

    W: [out, in], or [in, out] when `transposed` (GPT-2's Conv1D): float64, float32, bfloat16 or float16, any strides.
    left: [out, r]; right: [r, in]; any float dtype and strides, r >= 0. Half-precision weights are widened to float32
    for the sum; float32 weights to float64 when a factor is float64; float64 weights are summed in float64.
    Several: sequences of equal length, of any shapes and dtypes, on one device; alpha is one number, or one for each.
    measure: also return (added, lost), float64 [G], one number a module (G = 1 for one): the squared Frobenius norm of
    what W really changed by, and of what the rounding kept from it, alpha left right - (W' - W).
    Raises ValueError for wrong shapes, dtypes or devices and for weights that overlap themselves or each other.

        rank_update_(linear.weight, left, right)
        rank_update_(conv1d.weight, left, right, transposed=True)
        added, lost = rank_update_(weights, lefts, rights, alpha=rates, measure=True)

    Source: the rank-one update of ROME (arXiv:2202.05262, eq. 2) and its sum over edits in MEMIT; the sum over tokens
    of MEND (arXiv:2110.11309).
    """
    arguments = _bind(W, left, right, alpha=alpha, transposed=transposed, measure=measure)
    _check(*arguments[:5])
    norms: Tensor = _op(*arguments)
    return (norms[:, 0], norms[:, 1]) if measure else None


def _bind(
    W: _Some,
    left: _Some,
    right: _Some,
    *,
    alpha: _Rate = 1.0,
    transposed: bool = False,
    measure: bool = False,
) -> tuple[Any, ...]:
    """The public function's arguments as the op's schema has them."""
    lists = [
        [part.detach()] if isinstance(part, Tensor) else [t.detach() for t in part]
        for part in (W, left, right)
    ]
    alphas = [float(a) for a in alpha] if isinstance(alpha, Sequence) else [float(alpha)] * len(lists[0])
    return (*lists, alphas, transposed, measure)


def _check(
    W: list[Tensor], left: list[Tensor], right: list[Tensor], alpha: list[float], transposed: bool
) -> None:
    if not W:
        raise ValueError("W must be at least one weight, got an empty sequence")
    for name, part in (("left", left), ("right", right), ("alpha", alpha)):
        if len(part) != len(W):
            raise ValueError(f"{name} must have one entry for each of the {len(W)} weights, got {len(part)}")
    for index in range(len(W)):
        of = f"[{index}]" if len(W) > 1 else ""
        _check_one(W[0].device, W[index], left[index], right[index], transposed, of)
    check_written({f"W[{index}]" if len(W) > 1 else "W": weight for index, weight in enumerate(W)})


def _check_one(
    device: torch.device, W: Tensor, left: Tensor, right: Tensor, transposed: bool, of: str
) -> None:
    if W.ndim != 2 or W.dtype not in _WEIGHTS:
        raise ValueError(f"W{of} must be a float matrix, got {W.dtype} of shape {list(W.shape)}")
    out, width = (W.shape[1], W.shape[0]) if transposed else (W.shape[0], W.shape[1])
    for name, tensor in (("W", W), ("left", left), ("right", right)):
        if tensor.ndim != 2 or not tensor.is_floating_point():
            raise ValueError(f"{name}{of} must be a float matrix, got {tensor.dtype} {list(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"{name}{of} must be on W's device {device}, got {tensor.device}")
    if left.shape[0] != out:
        raise ValueError(f"left{of} must be [{out}, r] for W {list(W.shape)}, got {list(left.shape)}")
    if right.shape != (left.shape[1], width):
        raise ValueError(f"right{of} must be [{left.shape[1]}, {width}], got {list(right.shape)}")


def _exact_dtype(W: Tensor, left: Tensor, right: Tensor) -> torch.dtype:
    """The dtype of the sum. A half-precision weight cannot tell a float64 sum from a float32 one."""
    if W.dtype == torch.float32 and torch.float64 in (left.dtype, right.dtype):
        return torch.float64
    return torch.float64 if W.dtype == torch.float64 else torch.float32


def _eager(
    W: _Lists, left: _Lists, right: _Lists, alpha: Sequence[float], transposed: bool, measure: bool
) -> Tensor:
    norms = _fake(W, left, right, alpha, transposed, measure).zero_()
    for index, (weight, columns, rows) in enumerate(zip(W, left, right)):
        if columns.shape[1] == 0 or weight.numel() == 0:
            continue
        if transposed:
            columns, rows = rows.mT, columns.mT
        dtype = _exact_dtype(weight, columns, rows)
        columns, rows = columns.to(dtype), rows.to(dtype)
        if weight.dtype == dtype and not measure:
            weight.addmm_(columns, rows, alpha=alpha[index])
            continue
        step = max(1, _CHUNK_ELEMENTS // weight.shape[1])
        for start in range(0, weight.shape[0], step):
            part, of = weight[start : start + step], columns[start : start + step]
            if not measure:
                part.copy_(torch.addmm(part.to(dtype), of, rows, alpha=alpha[index]))
                continue
            before, update = part.to(torch.float64, copy=True), alpha[index] * (of @ rows)
            part.copy_(part.to(dtype) + update)
            change = part.to(torch.float64) - before
            norms[index, 0] += change.square().sum()
            norms[index, 1] += (update.to(torch.float64) - change).square_().sum()
    return norms


def _fake(
    W: _Lists, left: _Lists, right: _Lists, alpha: Sequence[float], transposed: bool, measure: bool
) -> Tensor:
    """[modules, 2]: squared norms of what was added and of what was lost; [0, 2] unless measured."""
    return W[0].new_empty(len(W) if measure else 0, 2, dtype=torch.float64)


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
    native: Callable[..., Any],
    W: _Lists,
    left: _Lists,
    right: _Lists,
    alpha: Sequence[float],
    transposed: bool,
    measure: bool,
) -> Tensor:
    norms = _fake(W, left, right, alpha, transposed, measure).zero_()
    for index in range(len(W)):
        weight, columns, rows, dtype = _row_major(W[index], left[index], right[index], transposed)
        native(
            weight=weight.data_ptr(),
            weight_type=_WEIGHT_CODES[weight.dtype],
            weight_stride=weight.stride(0),
            left=columns.data_ptr(),
            left_row_stride=columns.stride(0),
            left_rank_stride=columns.stride(1),
            right=rows.data_ptr(),
            right_rank_stride=rows.stride(0),
            right_column_stride=rows.stride(1),
            factor_type=_FACTOR_CODES[dtype],
            rows=weight.shape[0],
            columns=weight.shape[1],
            rank=columns.shape[1],
            alpha=alpha[index],
            threads=torch.get_num_threads(),
            norms=norms[index].data_ptr() if measure else 0,
        )
    return norms


def _run_cuda(
    native: Callable[..., Any],
    W: _Lists,
    left: _Lists,
    right: _Lists,
    alpha: Sequence[float],
    transposed: bool,
    measure: bool,
) -> Tensor:
    for index in range(len(W)):
        weight, columns, rows, dtype = _row_major(W[index], left[index], right[index], transposed)
        columns, rows = columns.contiguous(), rows.contiguous()
        with torch.cuda.device(weight.device):
            native(
                weight=weight.data_ptr(),
                weight_type=_WEIGHT_CODES[weight.dtype],
                weight_stride=weight.stride(0),
                left=columns.data_ptr(),
                right=rows.data_ptr(),
                float64=dtype == torch.float64,
                rows=weight.shape[0],
                columns=weight.shape[1],
                rank=columns.shape[1],
                alpha=alpha[index],
                stream=torch.cuda.current_stream(weight.device).cuda_stream,
            )
    return _fake(W, left, right, alpha, transposed, measure)


def _run_triton(
    kernel: Callable[..., Any],
    W: _Lists,
    left: _Lists,
    right: _Lists,
    alpha: Sequence[float],
    transposed: bool,
    measure: bool,
) -> Tensor:
    norms = _fake(W, left, right, alpha, transposed, measure)
    for index in range(len(W)):
        weight, columns, rows, _ = _row_major(W[index], left[index], right[index], transposed)
        kernel(weight, columns, rows, alpha[index], norms[index] if measure else None)
    return norms


def _refuse(
    W: _Lists, left: _Lists, right: _Lists, alpha: Sequence[float], transposed: bool, measure: bool
) -> str | None:
    for weight in W:
        if 1 not in weight.stride():
            return f"W must have unit stride along one dimension, got strides {list(weight.stride())}"
    if not measure and all(w.dtype == _exact_dtype(w, u, v) for w, u, v in zip(W, left, right)):
        return Slower(
            f"W is {W[0].dtype} and needs no conversion: torch's addmm_ is at the limit of the machine"
        )
    return None


def _refuse_cpu(
    W: _Lists, left: _Lists, right: _Lists, alpha: Sequence[float], transposed: bool, measure: bool
) -> str | None:
    if any(weight.dtype == torch.float64 for weight in W):
        return "W is float64: torch's addmm_ is at the limit of the machine"
    return _refuse(W, left, right, alpha, transposed, measure)


def _refuse_cuda(
    W: _Lists, left: _Lists, right: _Lists, alpha: Sequence[float], transposed: bool, measure: bool
) -> str | None:
    most = max(part.shape[1] for part in left)
    if most > _CUDA_RANKS:
        return f"the kernel keeps the right factor in registers, up to rank {_CUDA_RANKS}, got {most}"
    if measure:
        return "the kernel does not measure what rounding loses"
    return _refuse(W, left, right, alpha, transposed, measure)


_CUDA_RANKS = 8  # csrc/cuda/rank_update.h: kRankUpdateMost

_op = define_op(
    "rank_update_",
    "(Tensor(a!)[] W, Tensor[] left, Tensor[] right, float[] alpha, bool transposed, bool measure) -> Tensor",
    _fake,
    _eager,
    [
        Impl("cuda", "cuda", "fastedit._cuda:rank_update", _refuse_cuda, _run_cuda),
        Impl("triton", "cuda", "fastedit.kernels.rank_update:rank_update_", _refuse, _run_triton),
        Impl("cpu", "cpu", "fastedit._cpu:rank_update", _refuse_cpu, _run_cpu),
    ],
    bind=_bind,
)
