"""Running mean and variance of rows, batch by batch: what normalises the gradients that MEND and MALMEN edit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastedit.ops._dispatch import Impl, define_op
from fastedit.ops._named import check_tensors
from fastedit.ops._written import check_written

__all__ = ["RowMoments", "row_moments_"]

_CHUNK_ELEMENTS = 1 << 22  # of the widened rows at a time: 32 MB in float64


@dataclass(frozen=True)
class RowMoments:
    """Count, mean and summed squared deviation of the rows seen so far; with a leading dimension, one per batch.

    count: [] int64, or [G]. mean, m2: [d] float64 or float32, or [G, d]. With count = 0 the others are not read: the
    NaN-filled buffers of an untrained published editor are an empty state.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    @classmethod
    def zeros(
        cls, d: int, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
    ) -> RowMoments:
        """No rows yet, of width d."""
        mean = torch.zeros(d, dtype=dtype, device=device)
        return cls(torch.zeros((), dtype=torch.int64, device=device), mean, torch.zeros_like(mean))

    def std(self, eps: float = 0.0) -> Tensor:
        """sqrt(m2 / (count - 1 + eps)), in the state's dtype: the unbiased deviation with eps = 0, as MEND takes it.

        MALMEN and UltraEdit take eps = 1.1920929e-07. NaN where fewer than two rows were seen and eps is 0.
        """
        left = (self.count.to(torch.float64) - 1 + eps)[..., None]
        return (self.m2.to(torch.float64) / left).sqrt().to(self.m2.dtype)

    def merge_(self, other: RowMoments) -> None:
        """Take over the rows of another state of the same width, as if they had been seen here after one's own."""
        if other.mean.shape != self.mean.shape or self.mean.ndim != 1:
            raise ValueError(
                f"other must be one state of width {self.mean.shape[-1]}, got mean of shape {list(other.mean.shape)}"
            )
        check_written({"count": self.count, "mean": self.mean, "m2": self.m2})
        mean, m2 = (t.to(self.mean.device, torch.float64) for t in (other.mean, other.m2))
        merged = _merge(*_wide(self.count, self.mean, self.m2), other.count.to(self.count.device), mean, m2)
        for old, new in zip((self.count, self.mean, self.m2), merged):
            old.copy_(new)


def row_moments_(
    state: RowMoments,
    X: Tensor,
    D: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    batches: Sequence[int] | None = None,
    inflated: bool = False,
) -> RowMoments:
    """Add rows to a running count, mean and sum of squared deviations, in place; returns the states on the way.

    For a batch of b rows with mean m_b and squared deviations S_b, and with n rows before it,
    mean += b (m_b - mean) / (n + b) and m2 += S_b + (m_b - mean)^2 n b / (n + b), which is what adding its rows one by
    one gives, but for rounding. With `inflated`, S_b is replaced by S_b b / (b - 1), and by 0 for a single row: the
    normaliser of MALMEN and UltraEdit adds b times the unbiased variance (theirs is NaN for ever after a single row).

    state: width d, changed in place. X: [n, d], or [n, d_x] with D: [n, d - d_x] beside it, whose rows are
    [X | D]; any float dtypes and strides. mask: [n] bool, rows that count; others are not read. batches: row counts of
    consecutive batches, which are merged in this order (default: all rows are one batch); a batch without rows changes
    nothing. Sums are in float64 whatever the dtypes; the state is rounded once per batch to its own.
    Returns a `RowMoments` with a leading dimension: the state after each batch. No host synchronisation.
    Raises ValueError for wrong shapes, dtypes and devices and for a state whose tensors overlap.

        state = RowMoments.zeros(d_x + d_d)
        trail = row_moments_(state, X, D, batches=[12, 9, 14])     # three modules, each seeing those before it
        lowrank_transform(X, D, net, (trail.mean, trail.std()), mode=mode)

    Source: the running statistics of MEND (arXiv:2110.11309) and MALMEN (arXiv:2311.04661); merging of Chan, Golub and
    LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
    """
    check_tensors(X=X)
    sizes = [X.shape[0]] if batches is None else [int(size) for size in batches]
    _check(state, X, D, mask, sizes)
    tensors = (state.count, state.mean, state.m2, X, D)
    return RowMoments(*_op(*(None if t is None else t.detach() for t in tensors), mask, sizes, inflated))


def _check(state: RowMoments, X: Tensor, D: Tensor | None, mask: Tensor | None, sizes: list[int]) -> None:
    given = {
        "state.count": state.count,
        "state.mean": state.mean,
        "state.m2": state.m2,
        "X": X,
        "D": D,
        "mask": mask,
    }
    check_tensors(
        **{name: tensor for name, tensor in given.items() if tensor is not None or name not in ("D", "mask")}
    )
    mean = state.mean
    if mean.ndim != 1 or mean.dtype not in (torch.float64, torch.float32):
        raise ValueError(
            f"state.mean must be float64 or float32 of shape [d], got {mean.dtype} {list(mean.shape)}"
        )
    if state.m2.shape != mean.shape or state.m2.dtype != mean.dtype:
        raise ValueError(
            f"state.m2 must be {mean.dtype} of shape {list(mean.shape)} like state.mean, "
            f"got {state.m2.dtype} {list(state.m2.shape)}"
        )
    if state.count.shape != () or state.count.dtype != torch.int64:
        raise ValueError(
            f"state.count must be int64 of shape [], got {state.count.dtype} {list(state.count.shape)}"
        )
    for name, tensor in (("X", X), ("D", D)):
        if tensor is not None and (tensor.ndim != 2 or not tensor.is_floating_point()):
            raise ValueError(f"{name} must be a float matrix, got {tensor.dtype} {list(tensor.shape)}")
    if D is not None and D.shape[0] != X.shape[0]:
        raise ValueError(f"D must have X's {X.shape[0]} rows, got {D.shape[0]}")
    width = X.shape[1] + (0 if D is None else D.shape[1])
    if width != mean.shape[0]:
        raise ValueError(f"state must have the width {width} of the rows, got {mean.shape[0]}")
    if mask is not None and (mask.shape != X.shape[:1] or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool of shape [{X.shape[0]}], got {mask.dtype} {list(mask.shape)}")
    if sum(sizes) != X.shape[0] or min(sizes, default=0) < 0:
        raise ValueError(f"batches must be >= 0 and sum to X's {X.shape[0]} rows, got {sizes}")
    tensors = {"state.count": state.count, "state.m2": state.m2, "X": X, "D": D, "mask": mask}
    for name, other in tensors.items():
        if other is not None and other.device != mean.device:
            raise ValueError(f"{name} must be on the state's device {mean.device}, got {other.device}")
    check_written({"state.count": state.count, "state.mean": mean, "state.m2": state.m2})


def _wide(count: Tensor, mean: Tensor, m2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The state in float64; an empty one is zero, whatever its buffers hold."""
    zero = torch.zeros((), dtype=torch.float64, device=mean.device)
    seen = count > 0
    mean, m2 = (torch.where(seen, tensor.to(torch.float64), zero) for tensor in (mean, m2))
    return count, mean, m2


def _merge(
    count: Tensor, mean: Tensor, m2: Tensor, rows: Tensor, batch_mean: Tensor, batch_m2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Both sides in float64; `rows` of the batch may be 0, and then its other figures are not read."""
    some, share = rows > 0, rows.to(torch.float64) / (count + rows).clamp(min=1)
    shift = torch.where(some, batch_mean - mean, 0.0)
    return (
        count + rows,
        mean + shift * share,
        m2 + torch.where(some, batch_m2, 0.0) + shift.square() * (count * share),
    )


def _batch(
    parts: Sequence[Tensor], mask: Tensor | None, rows: Tensor, inflated: bool
) -> tuple[Tensor, Tensor]:
    """Mean and squared deviations of one batch's rows [parts[0] | parts[1]], in float64."""
    means, m2s = [], []
    n = rows.clamp(min=1).to(torch.float64)
    inflation = n / (n - 1).clamp(min=1) if inflated else None
    for part in parts:
        width = max(1, _CHUNK_ELEMENTS // max(1, part.shape[0]))
        for start in range(0, part.shape[1], width):
            x = part[:, start : start + width].to(torch.float64)
            if mask is not None:
                x = torch.where(mask[:, None], x, 0.0)
            mean = x.sum(0) / n
            away = (x - mean).square_()
            if mask is not None:
                away = torch.where(mask[:, None], away, 0.0)
            means.append(mean)
            m2s.append(away.sum(0) if inflation is None else away.sum(0) * inflation)
    if not means:
        empty = rows.new_empty(0, dtype=torch.float64)
        return empty, empty
    return torch.cat(means), torch.cat(m2s)


def _eager(
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    X: Tensor,
    D: Tensor | None,
    mask: Tensor | None,
    batches: Sequence[int],
    inflated: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    trail = _fake(count, mean, m2, X, D, mask, batches, inflated)
    start = 0
    for index, size in enumerate(batches):
        inside = slice(start, start + size)
        start += size
        on = None if mask is None else mask[inside]
        rows = torch.full_like(count, size) if on is None else on.sum()
        parts = [part[inside] for part in (X, D) if part is not None]
        merged = _merge(*_wide(count, mean, m2), rows, *_batch(parts, on, rows, inflated))
        for old, kept, new in zip((count, mean, m2), trail, merged):
            old.copy_(new)
            kept[index].copy_(old)
    return trail


def _fake(
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    X: Tensor,
    D: Tensor | None,
    mask: Tensor | None,
    batches: Sequence[int],
    inflated: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (len(batches), mean.shape[0])
    return count.new_empty(shape[:1]), mean.new_empty(shape), m2.new_empty(shape)


# csrc/cpu/row_matrix.h: RowType
_ROW_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def _run_cpu(
    native: Callable[..., Any],
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    X: Tensor,
    D: Tensor | None,
    mask: Tensor | None,
    batches: Sequence[int],
    inflated: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    trail = _fake(count, mean, m2, X, D, mask, batches, inflated)
    # What the kernel reads must live until it returns; rows that are not runs of memory are copied into such.
    parts = [part if part.stride(1) == 1 else part.contiguous() for part in (X, X[:, :0] if D is None else D)]
    rows = [(part.data_ptr(), _ROW_CODES[part.dtype], part.stride(0), part.shape[1]) for part in parts]
    on = None if mask is None else mask.contiguous()
    pointers = [tensor.data_ptr() for tensor in (count, mean, m2)]
    native(
        *rows,
        mask=0 if on is None else on.data_ptr(),
        batches=list(batches),
        inflated=inflated,
        state=(*pointers, mean.stride(0), m2.stride(0)),
        trail=(*(tensor.data_ptr() for tensor in trail), 1, 1),
        float64=mean.dtype == torch.float64,
        threads=torch.get_num_threads(),
    )
    return trail


def _refuse_cpu(
    count: Tensor, mean: Tensor, m2: Tensor, X: Tensor, D: Tensor | None, *_rest: Any
) -> str | None:
    for name, part in (("X", X), ("D", D)):
        if part is not None and part.dtype not in _ROW_CODES:
            return f"{name} must be float64, float32, bfloat16 or float16, got {part.dtype}"
    return None


def _bind(
    state: RowMoments,
    X: Tensor,
    D: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    batches: Sequence[int] | None = None,
    inflated: bool = False,
) -> tuple[object, ...]:
    sizes = [X.shape[0]] if batches is None else list(batches)
    return state.count, state.mean, state.m2, X, D, mask, sizes, inflated


def _refuse_triton(
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    X: Tensor,
    D: Tensor | None,
    mask: Tensor | None,
    batches: Sequence[int],
    inflated: bool,
) -> str | None:
    if X.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "the stream is being captured, and where batches begin is copied from the host"
    return None


_op = define_op(
    "row_moments_",
    "(Tensor(a!) count, Tensor(b!) mean, Tensor(c!) m2, Tensor X, Tensor? D, Tensor? mask, int[] batches, "
    "bool inflated) -> (Tensor, Tensor, Tensor)",
    _fake,
    _eager,
    [
        Impl("triton", "cuda", "fastedit.kernels.row_moments:row_moments_", _refuse_triton),
        Impl("cpu", "cpu", "fastedit._cpu:row_moments", _refuse_cpu, _run_cpu),
    ],
    bind=_bind,
)
