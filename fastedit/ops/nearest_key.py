"""The nearest of many stored keys to each query, and the k of greatest dot product: how memory editors look up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastedit.ops._dispatch import Impl, define_op
from fastedit.ops._named import check_integer

__all__ = ["Nearest", "nearest_key", "topk_keys"]

# Elements of the differences (or of the widened keys) at a time: 1 MB in float32, in cache on a CPU. Other devices take
# 64 times as many: launches cost more.
_CHUNK_ELEMENTS = 1 << 18


class Nearest(NamedTuple):
    """The nearest key of every query, each field ``[B]``.

    Attributes:
        key: int64, its index; -1 where no key is at a finite distance.
        distance: Euclidean, float32 (float64 if a query or key is); inf where key is -1.
        hit: whether the distance is at most the key's radius.
        second: distance of the next nearest key, inf where there is none; equal to `distance` on a tie.
    """

    key: Tensor
    distance: Tensor
    hit: Tensor
    second: Tensor


def nearest_key(q: Tensor, keys: Tensor, eps: Tensor | float) -> Nearest:
    """The key nearest to each query, whether it lies within that key's radius, and how near the next one is.

    distance[b] = min_j ||q_b - k_j||, key[b] = the lowest j that reaches it, hit[b] = distance[b] <= eps[key[b]].

    q: [B, d]; keys: [N, d], N may be 0; any float dtypes. eps: [N] float, or one radius for all keys.
    Differences are taken before they are squared and summed, all in float32 (float64 if q or keys are): the formula
    ||q||^2 - 2 q k + ||k||^2 would lose the digits that a radius is compared with. Squares are compared, so keys tie
    where these are equal. One implementation gives a pair the same distance whatever else is in the call, so a radius
    that was set to a distance is hit again. NaN and infinite distances count as no key. Not differentiable.
    Raises ValueError for wrong shapes, dtypes or devices.

        near = nearest_key(h, codebook, radii)
        output = torch.where(near.hit[:, None], values[near.key], output)

    Source: the deferral rule of GRACE (arXiv:2211.11031, section 3); SERAC (arXiv:2206.06520) takes the nearest edit.
    """
    _check(q, keys)
    radii = _radii(keys, eps)
    if radii.shape != (keys.shape[0],) or not radii.is_floating_point():
        raise ValueError(
            f"eps must be float of shape [{keys.shape[0]}], got {radii.dtype} {list(radii.shape)}"
        )
    if radii.device != q.device:
        raise ValueError(f"eps must be on q's device {q.device}, got {radii.device}")
    return Nearest(*_op(q.detach(), keys.detach(), radii.detach()))


def topk_keys(q: Tensor, keys: Tensor, k: int, *, cosine: bool = False) -> tuple[Tensor, Tensor]:
    """The k keys of greatest dot product with each query, or of greatest cosine; best first.

    Returns (scores [B, k], index [B, k] int64): score = q k, divided by ||q|| ||k|| when `cosine` (0 for a zero
    vector). Equal scores come in the order of their keys; a NaN counts as -inf.
    q: [B, d]; keys: [N, d] with N >= k >= 1; any float dtypes. Products and sums in float32 (float64 if q or keys are),
    which the scores are in. Not differentiable. Raises ValueError for wrong shapes, dtypes, devices or k.

        scores, index = topk_keys(embedded, corpus, 32, cosine=True)

    Source: the retrieval of demonstrations of IKE (arXiv:2305.12740, section 3.3).
    """
    _check(q, keys)
    check_integer("k", k)
    if not 1 <= k <= keys.shape[0]:
        raise ValueError(f"k must be in [1, {keys.shape[0]}], the number of keys, got {k}")
    scores, index = _op_topk(q.detach(), keys.detach(), k, cosine)
    return scores, index


def _check(q: Tensor, keys: Tensor) -> None:
    if q.ndim != 2 or not q.is_floating_point():
        raise ValueError(f"q must be float of shape [B, d], got {q.dtype} {list(q.shape)}")
    if keys.ndim != 2 or keys.shape[1] != q.shape[1] or not keys.is_floating_point():
        raise ValueError(
            f"keys must be float of shape [N, {q.shape[1]}], got {keys.dtype} {list(keys.shape)}"
        )
    if keys.device != q.device:
        raise ValueError(f"keys must be on q's device {q.device}, got {keys.device}")


def _radii(keys: Tensor, eps: Tensor | float) -> Tensor:
    return eps if isinstance(eps, Tensor) else keys.new_full((keys.shape[0],), eps, dtype=torch.float64)


def _dtype(q: Tensor, keys: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (q.dtype, keys.dtype) else torch.float32


def _chunk(q: Tensor, row: int) -> int:
    """Rows of `row` elements that are taken at a time."""
    elements = _CHUNK_ELEMENTS * (1 if q.device.type == "cpu" else 64)
    return max(1, elements // max(row, 1))


def _eager(q: Tensor, keys: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, (B, d), N = _dtype(q, keys), q.shape, keys.shape[0]
    q = q.to(dtype)
    squares = q.new_empty(B, N)
    for start in range(0, N, _chunk(q, d)):
        some = slice(start, start + _chunk(q, d))
        part = keys[some].to(dtype)
        for first in range(0, B, step := _chunk(q, max(part.numel(), 1))):
            rows = slice(first, first + step)
            squares[rows, some] = (q[rows, None] - part).square_().sum(-1)
    squares.nan_to_num_(torch.inf, torch.inf)
    if N == 0:
        index, best = q.new_full((B,), -1, dtype=torch.int64), squares.new_full((B,), torch.inf)
        return index, best, _hit(index, best, eps), best.clone()
    index = squares.argmin(1)
    best = squares.gather(1, index[:, None]).squeeze(1)
    second = squares.scatter(1, index[:, None], torch.inf).amin(1)
    index, distance = torch.where(best < torch.inf, index, -1), best.sqrt()
    return index, distance, _hit(index, distance, eps), second.sqrt()


def _hit(index: Tensor, distance: Tensor, eps: Tensor) -> Tensor:
    if eps.shape[0] == 0:
        return torch.zeros_like(index, dtype=torch.bool)
    return (index >= 0) & (distance <= eps[index.clamp(min=0)])


def _fake(q: Tensor, keys: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, dtype = q.shape[0], _dtype(q, keys)
    index, hit = q.new_empty((B,), dtype=torch.int64), q.new_empty((B,), dtype=torch.bool)
    return index, q.new_empty((B,), dtype=dtype), hit, q.new_empty((B,), dtype=dtype)


def _eager_topk(q: Tensor, keys: Tensor, k: int, cosine: bool) -> tuple[Tensor, Tensor]:
    dtype, N = _dtype(q, keys), keys.shape[0]
    q = q.to(dtype)
    if keys.dtype == dtype:
        scores = q @ keys.mT
        norms = torch.linalg.vector_norm(keys, dim=1) if cosine else None
    else:
        # Widened in pieces: a copy of all keys would be twice their size.
        scores, norms = q.new_empty(q.shape[0], N), q.new_empty(N) if cosine else None
        for start in range(0, N, step := _chunk(q, q.shape[1])):
            part = keys[start : start + step].to(dtype)
            torch.mm(q, part.mT, out=scores[:, start : start + step])
            if norms is not None:
                norms[start : start + step] = torch.linalg.vector_norm(part, dim=1)
    if norms is not None:
        own = torch.linalg.vector_norm(q, dim=1)
        # A zero vector's products are 0, which they stay when divided by 1.
        scores.div_(torch.where(own > 0, own, 1.0)[:, None]).div_(torch.where(norms > 0, norms, 1.0))
    scores.masked_fill_(scores.isnan(), -torch.inf)
    # topk takes any of equal scores: it only tells the last score that is in, and how many are above it.
    last = scores.topk(k, dim=1).values[:, -1:]
    above, tied = scores > last, scores == last
    room = k - above.sum(1, keepdim=True)
    kept = above | (tied & (tied.cumsum(1) <= room))
    order = torch.arange(N, device=q.device).expand_as(kept)
    index = torch.where(kept, order, N).topk(k, dim=1, largest=False, sorted=True).values
    chosen, place = scores.gather(1, index).sort(dim=1, descending=True, stable=True)
    return chosen, index.gather(1, place)


def _fake_topk(q: Tensor, keys: Tensor, k: int, cosine: bool) -> tuple[Tensor, Tensor]:
    shape = (q.shape[0], k)
    return q.new_empty(shape, dtype=_dtype(q, keys)), q.new_empty(shape, dtype=torch.int64)


_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/cpu/nearest_key.h: KeyRowType
Kept = tuple[tuple[int, ...], tuple[Tensor, Tensor]]


def _native_keys(q: Tensor, keys: Tensor) -> Kept:
    """What the kernels are told of queries and keys, and the tensors that must live until they return."""
    wide = q.to(torch.float32).contiguous()
    keys = keys if keys.shape[1] == 1 or keys.stride(1) == 1 else keys.contiguous()
    row = (keys.data_ptr(), _CODES[keys.dtype], keys.stride(0), keys.shape[0])
    return (wide.data_ptr(), *q.shape, *row), (wide, keys)


def _run_cpu(
    native: Callable[..., Any], q: Tensor, keys: Tensor, eps: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B = q.shape[0]
    index, distance, second = torch.empty(B, dtype=torch.int64), torch.empty(B), torch.empty(B)
    given, _kept = _native_keys(q, keys)
    native(
        keys=given,
        index=index.data_ptr(),
        distance=distance.data_ptr(),
        second=second.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return index, distance, _hit(index, distance, eps), second


def _run_topk_cpu(
    native: Callable[..., Any], q: Tensor, keys: Tensor, k: int, cosine: bool
) -> tuple[Tensor, Tensor]:
    shape = (q.shape[0], k)
    scores, index = torch.empty(shape), torch.empty(shape, dtype=torch.int64)
    given, _kept = _native_keys(q, keys)
    native(
        keys=given,
        k=k,
        cosine=cosine,
        scores=scores.data_ptr(),
        index=index.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return scores, index


def _refuse(q: Tensor, keys: Tensor, *_: object) -> str | None:
    if _dtype(q, keys) == torch.float64:
        return "the kernel sums in float32, and float64 queries or keys need float64"
    return None


def _bind(q: Tensor, keys: Tensor, eps: Tensor | float) -> tuple[object, ...]:
    return q, keys, _radii(keys, eps)


def _bind_topk(q: Tensor, keys: Tensor, k: int, cosine: bool = False) -> tuple[object, ...]:
    return q, keys, k, cosine


_MOST_QUERIES = 8 * 65_535  # eight a program along the second axis of a grid


def _refuse_triton(q: Tensor, keys: Tensor, eps: Tensor) -> str | None:
    """Any strides and dtypes; the eager differences are slower at every size."""
    if q.shape[0] > _MOST_QUERIES:
        return f"q has {q.shape[0]} rows, the grid of a launch ends at {_MOST_QUERIES}"
    return None


_op = define_op(
    "nearest_key",
    "(Tensor q, Tensor keys, Tensor eps) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
    _eager,
    [
        Impl("triton", "cuda", "fastedit.kernels.nearest_key:nearest_key", _refuse_triton),
        Impl("cpu", "cpu", "fastedit._cpu:nearest_key", _refuse, _run_cpu),
    ],
    bind=_bind,
)
_op_topk = define_op(
    "topk_keys",
    "(Tensor q, Tensor keys, int k, bool cosine) -> (Tensor, Tensor)",
    _fake_topk,
    _eager_topk,
    [Impl("cpu", "cpu", "fastedit._cpu:topk_keys", _refuse, _run_topk_cpu)],
    bind=_bind_topk,
)
