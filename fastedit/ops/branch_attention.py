"""Attention of many short branches over a shared, frozen store of earlier tokens and over their own tokens.

A branch is a continuation that differs from a clean forward from some token on: the suffix of a prompt behind an
injected vector, or of a corrupted or restored run. What lies before it is a list of rows of the store, which any
number of branches may name, so no prefix is repeated in memory. The store takes no gradient and costs none. The
backward computes the probabilities again from the log-sum-exp: nothing is kept but the arguments and that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fastedit.ops._dispatch import Impl, _forced, backend, define_op

__all__ = ["branch_attention"]

# Gathered elements of a chunk of branches: 2 MB in float32, so the products find them in cache on a CPU. Other
# devices take 128 times as many: launches cost more.
_CHUNK_ELEMENTS = 1 << 19


def branch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    columns: Tensor,
    q_starts: Tensor,
    q_offsets: Tensor,
    k_starts: Tensor,
    *,
    max_q: int,
    max_k: int,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """softmax(mask(cap(scale q K^T))) V per branch and head, with K and V the branch's prefix followed by its own.

    q: [R, H, D] queries; k, v: [N, G, D] own keys and values, both packed branch by branch; head h reads key head
    h // (H / G). k_prefix, v_prefix: [P, G, D], the store, without gradient. Any float dtypes and strides.
    columns: [B, C] int64, the rows of the store a branch sees by position, left-justified, then -1.
    q_starts, k_starts: [B + 1] int64; branch b has queries q_starts[b]:q_starts[b + 1] and own keys k_starts[b]:...
    q_offsets: [R] int64, a query's place o among its branch's own keys: it sees the whole prefix and own keys 0..o.
    max_q, max_k: the most queries and own keys of a branch. Branches may have no prefix, and no queries.
    window: a key is seen if its position is less than this many before the query's; own key o is at position
    (prefix length) + o. softcap: scores become softcap * tanh(score / softcap).

    Returns [R, H, D] in q's dtype; all arithmetic is float64 if q is, else float32. Differentiable in q, k and v.
    Raises ValueError for wrong shapes, dtypes and devices; the numbers in the index tensors are not checked, for that
    would synchronise with the device.

        out = branch_attention(q, k, v, keys, values, columns, starts, offsets, starts, max_q=8, max_k=8, scale=0.125)

    Source: scaled dot-product attention (arXiv:1706.03762); the backward from the log-sum-exp is that of
    FlashAttention (arXiv:2205.14135, appendix B).
    """
    _check(q, k, v, k_prefix, v_prefix, columns, q_starts, q_offsets, k_starts, max_q, max_k, softcap, window)
    if k_prefix.shape[0] == 0:
        columns = columns[:, :0]
    store = k_prefix.detach(), v_prefix.detach()
    index = columns, q_starts, q_offsets, k_starts
    out, _ = _op(q, k, v, *store, *index, max_q, max_k, float(scale), float(softcap or 0.0), window or 0)
    return out  # type: ignore[no-any-return]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    columns: Tensor,
    q_starts: Tensor,
    q_offsets: Tensor,
    k_starts: Tensor,
    max_q: int,
    max_k: int,
    softcap: float | None,
    window: int | None,
) -> None:
    if q.ndim != 3 or not q.is_floating_point():
        raise ValueError(f"q must be float of shape [R, H, D], got {q.dtype} {list(q.shape)}")
    R, H, D = q.shape
    if k.ndim != 3 or k.shape[2] != D or not k.is_floating_point():
        raise ValueError(f"k must be float of shape [N, G, {D}], got {k.dtype} {list(k.shape)}")
    N, G, _ = k.shape
    if G == 0 or H % G:
        raise ValueError(f"q's heads must be a multiple of k's, got {H} and {G}")
    if v.shape != k.shape or not v.is_floating_point():
        raise ValueError(f"v must be float of shape {[N, G, D]}, got {v.dtype} {list(v.shape)}")
    if k_prefix.ndim != 3 or k_prefix.shape[1:] != (G, D) or not k_prefix.is_floating_point():
        raise ValueError(
            f"k_prefix must be float of shape [P, {G}, {D}], got {k_prefix.dtype} {list(k_prefix.shape)}"
        )
    P = k_prefix.shape[0]
    if v_prefix.shape != k_prefix.shape or not v_prefix.is_floating_point():
        raise ValueError(
            f"v_prefix must be float of shape {[P, G, D]}, got {v_prefix.dtype} {list(v_prefix.shape)}"
        )
    if columns.ndim != 2 or columns.dtype != torch.int64:
        raise ValueError(f"columns must be int64 of shape [B, C], got {columns.dtype} {list(columns.shape)}")
    B = columns.shape[0]
    sizes = {"q_starts": (q_starts, B + 1), "q_offsets": (q_offsets, R), "k_starts": (k_starts, B + 1)}
    for name, (tensor, size) in sizes.items():
        if tensor.shape != (size,) or tensor.dtype != torch.int64:
            raise ValueError(
                f"{name} must be int64 of shape [{size}], got {tensor.dtype} {list(tensor.shape)}"
            )
    for name, most, rows in (("max_q", max_q, R), ("max_k", max_k, N)):
        if most * B < rows or most < 0:
            raise ValueError(f"{name} must be the most of a branch, {rows} over {B} branches, got {most}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be > 0 or None, got {softcap}")
    if window is not None and window < 1:
        raise ValueError(f"window must be >= 1 or None, got {window}")
    tensors = {"k": k, "v": v, "k_prefix": k_prefix, "v_prefix": v_prefix, "columns": columns}
    for name, tensor in (*tensors.items(), *((name, tensor) for name, (tensor, _) in sizes.items())):
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {tensor.device}")


class _Rows:
    """The D numbers of every (token, head) as rows, so that a gather leaves a tile per branch and head.

    Queries, keys and values are often slices of one [N, 3 * H * D] tensor: their tokens lie a multiple of D apart, and
    nothing is copied but what is gathered.
    """

    def __init__(self, x: Tensor, groups: int, dtype: torch.dtype) -> None:
        tokens, heads, D = x.shape
        self._step, self._groups, self._dtype = heads, groups, dtype
        step = x.stride(0)
        if x.numel() and x.stride(2) == 1 and x.stride(1) == D and step >= heads * D and step % D == 0:
            self._step = step // D
            self._flat = x.as_strided(((tokens - 1) * self._step + heads, D), (D, 1))
        else:
            self._flat = x.reshape(tokens * heads, D)
        self._heads = torch.arange(heads, device=x.device)[:, None]

    def gather(self, tokens: Tensor) -> Tensor:
        """Tokens [b, t] -> [b * groups, heads / groups * t, D], head by head, in the dtype of the arithmetic."""
        b, t = tokens.shape
        where = tokens[:, None] * self._step + self._heads
        found = self._flat.index_select(0, where.view(-1)).to(self._dtype)
        return found.view(b * self._groups, len(self._heads) // self._groups * t, found.shape[1])


@dataclass(frozen=True)
class _Branches:
    """Branches padded to [B, max_q] queries and [B, C + max_k] keys, and what sees what.

    Padding repeats rows of the same branch where it has any, so that no branch reads what another one made.
    """

    queries: Tensor  # [B, max_q] rows of q
    keys: Tensor  # [B, max_k] rows of k and v
    prefix: Tensor  # [B, C] rows of the store
    real_queries: Tensor  # [B, max_q], False at padding
    real_keys: Tensor  # [B, max_k]
    empty: Tensor  # [B], no prefix
    idle: Tensor  # [B], no queries
    mask: Tensor  # [B, max_q, C + max_k], -inf for keys that a query does not see and for padded queries, else 0

    def chunks(self, row_elements: int) -> Iterator[_Branches]:
        """The same in parts that gather about _CHUNK_ELEMENTS each; row_elements: of one token."""
        most = max(self.queries.shape[1], self.keys.shape[1], self.prefix.shape[1])
        elements = _CHUNK_ELEMENTS * (1 if self.queries.device.type == "cpu" else 128)
        step = max(1, elements // (most * row_elements))
        for first in range(0, len(self.empty), step):
            part = slice(first, first + step)
            yield _Branches(**{field.name: getattr(self, field.name)[part] for field in fields(self)})


def _padded(
    columns: Tensor,
    q_starts: Tensor,
    q_offsets: Tensor,
    k_starts: Tensor,
    max_q: int,
    max_k: int,
    window: int,
    own_tokens: int,
    dtype: torch.dtype,
) -> _Branches:
    slots_q, slots_k, places = (
        torch.arange(n, device=columns.device) for n in (max_q, max_k, columns.shape[1])
    )
    count_q, count_k = q_starts.diff()[:, None], k_starts.diff()[:, None]
    queries = q_starts[:-1, None] + torch.minimum(slots_q, (count_q - 1).clamp(min=0))
    queries = queries.clamp(max=q_offsets.shape[0] - 1)
    keys = k_starts[:-1, None] + torch.minimum(slots_k, (count_k - 1).clamp(min=0))
    length = (columns >= 0).sum(1, keepdim=True)
    offsets = q_offsets[queries][:, :, None]
    unseen = (places >= length)[:, None].expand(-1, max_q, -1)
    later = slots_k > offsets
    if window:
        unseen = unseen | (length[:, :, None] + offsets - places >= window)
        later = later | (offsets - slots_k >= window)
    real_queries = slots_q < count_q
    hidden = torch.cat([unseen, later], dim=2) | ~real_queries[:, :, None]
    return _Branches(
        queries=queries,
        keys=keys.clamp(max=own_tokens - 1),
        prefix=torch.where(columns >= 0, columns, columns[:, :1].clamp(min=0)),
        real_queries=real_queries,
        real_keys=slots_k < count_k,
        empty=length[:, 0] == 0,
        idle=count_q[:, 0] == 0,
        mask=torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf),
    )


class _Products:
    """Masked scores and products of one chunk, [b * G, H / G * max_q, C + max_k] with the prefix first."""

    def __init__(
        self, chunk: _Branches, q: _Rows, k: _Rows, k_prefix: _Rows, scale: float, softcap: float, heads: int
    ) -> None:
        self.heads = heads
        self.q = _blank(q.gather(chunk.queries), chunk.idle)
        self.k_prefix, self.k = _blank(k_prefix.gather(chunk.prefix), chunk.empty), k.gather(chunk.keys)
        self.C = chunk.prefix.shape[1]
        self.scores = self.with_keys(self.q, self.k_prefix, self.k).mul_(scale)
        self.slope = None  # of the cap
        if softcap:
            self.scores.div_(softcap).tanh_()
            self.slope = self.scores.square().neg_().add_(1.0)
            self.scores.mul_(softcap)
        self.by_head(self.scores, len(chunk.empty)).add_(chunk.mask[:, None])

    def with_keys(self, left: Tensor, prefix: Tensor, own: Tensor) -> Tensor:
        """left [n, rows, D] times the transposed prefix and own tiles."""
        # bmm takes its batched path only into a contiguous result: the scores are copied, being few.
        own_part = torch.bmm(left, own.mT)
        return torch.cat([torch.bmm(left, prefix.mT), own_part], dim=2) if prefix.shape[1] else own_part

    def times(self, weights: Tensor, prefix: Tensor, own: Tensor) -> Tensor:
        """weights [n, rows, C + max_k] times the prefix and own tiles, [n, rows, D]."""
        found = torch.bmm(weights[:, :, self.C :], own)
        return found.baddbmm_(weights[:, :, : self.C], prefix) if self.C else found

    def by_head(self, tile: Tensor, branches: int) -> Tensor:
        """[b * G, H / G * rows, n] -> [b, H, rows, n], a view."""
        return tile.view(branches, self.heads, -1, tile.shape[2])


def _blank(tile: Tensor, branches: Tensor) -> Tensor:
    """Zeroes what some branches gathered for want of rows of their own: NaN would survive a weight of 0."""
    tiles = tile.view(branches.shape[0], -1)
    if tile.device.type == "cpu":
        return tiles.index_fill_(0, branches.nonzero()[:, 0], 0.0).view(tile.shape)
    return tiles.masked_fill_(branches[:, None], 0.0).view(tile.shape)


def _unpad(packed: Tensor, rows: Tensor, real: Tensor, tile: Tensor) -> None:
    """tile [b, heads, slots, n] to packed [tokens + 1, heads, n], whose last row takes the padding."""
    if tile.device.type != "cpu":  # how many are real is not known without waiting for the device
        packed[torch.where(real, rows, packed.shape[0] - 1)] = tile.transpose(1, 2).to(packed.dtype)
        return
    _, heads, slots, n = tile.shape
    branch, slot = real.nonzero().unbind(1)
    if len(branch) == 0:
        return
    first = int(rows[branch[0], slot[0]])
    where = (branch[:, None] * heads + torch.arange(heads)) * slots + slot[:, None]
    flat, part = tile.reshape(-1, n), packed[first : first + len(branch)].view(-1, n)
    if part.dtype == flat.dtype:
        torch.index_select(flat, 0, where.view(-1), out=part)
    else:
        part.copy_(flat.index_select(0, where.view(-1)))


def _arithmetic(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    columns: Tensor,
    q_starts: Tensor,
    q_offsets: Tensor,
    k_starts: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """The result [R, H, D] and the log-sum-exp of the scores [R, H]."""
    R, H, D = q.shape
    dtype = _arithmetic(q)
    out, lse = q.new_empty(R + 1, H, D), q.new_empty(R + 1, H, 1, dtype=dtype)
    if R == 0:
        return out[:R], lse[:R, :, 0]
    q_rows, k_rows, v_rows, *store = (_Rows(x, k.shape[1], dtype) for x in (q, k, v, k_prefix, v_prefix))
    branches = _padded(columns, q_starts, q_offsets, k_starts, max_q, max_k, window, k.shape[0], dtype)
    for chunk in branches.chunks(H * D):
        products = _Products(chunk, q_rows, k_rows, store[0], scale, softcap, H)
        weights, b = products.scores, len(chunk.empty)
        # Padded queries see nothing: the lowest number, not -inf, as the peak of theirs.
        peak = weights.amax(2, keepdim=True).clamp_(min=torch.finfo(dtype).min)
        total = weights.sub_(peak).exp_().sum(2, keepdim=True)
        values = _blank(store[1].gather(chunk.prefix), chunk.empty), v_rows.gather(chunk.keys)
        found = products.times(weights, *values).div_(total)
        rows = chunk.queries, chunk.real_queries
        _unpad(out, *rows, products.by_head(found, b))
        _unpad(lse, *rows, products.by_head(total.log_().add_(peak), b))
    return out[:R], lse[:R, :, 0]


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    columns: Tensor,
    q_starts: Tensor,
    q_offsets: Tensor,
    k_starts: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=_arithmetic(q))


def _eager_backward(
    grad: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    columns: Tensor,
    q_starts: Tensor,
    q_offsets: Tensor,
    k_starts: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in q, k and v.

    p = exp(s - lse); dv = p^T g; dp = g v^T; ds = p (dp - sum(p dp)) (1 - (s / cap)^2); dq = scale ds k;
    dk = scale ds^T q. The sum is that of g and the result, taken here so that the result need not be kept.
    """
    R, H, D = q.shape
    N, G, _ = k.shape
    dtype = _arithmetic(q)
    if R == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    dq, dk, dv = q.new_empty(R + 1, H, D), k.new_empty(N + 1, G, D), v.new_empty(N + 1, G, D)
    rows = (_Rows(x, G, dtype) for x in (grad, lse[:, :, None], q, k, v, k_prefix, v_prefix))
    grad_rows, lse_rows, q_rows, k_rows, v_rows, *store = rows
    branches = _padded(columns, q_starts, q_offsets, k_starts, max_q, max_k, window, N, dtype)
    for chunk in branches.chunks(H * D):
        products = _Products(chunk, q_rows, k_rows, store[0], scale, softcap, H)
        b, C = len(chunk.empty), products.C
        g = _blank(grad_rows.gather(chunk.queries), chunk.idle)
        p = products.scores.sub_(_blank(lse_rows.gather(chunk.queries), chunk.idle)).exp_()
        values = _blank(store[1].gather(chunk.prefix), chunk.empty), v_rows.gather(chunk.keys)
        dp = products.with_keys(g, *values)
        dv_tile = torch.bmm(p[:, :, C:].mT, g)
        ds = dp.sub_((p * dp).sum(2, keepdim=True)).mul_(p).mul_(scale)
        if products.slope is not None:
            ds.mul_(products.slope)
        dq_tile = products.times(ds, products.k_prefix, products.k)
        dk_tile = torch.bmm(ds[:, :, C:].mT, products.q)
        _unpad(dq, chunk.queries, chunk.real_queries, products.by_head(dq_tile, b))
        for packed, tile in ((dk, dk_tile), (dv, dv_tile)):
            _unpad(packed, chunk.keys, chunk.real_keys, tile.view(b, G, max_k, D))
    return dq[:R], dk[:N], dv[:N]


def _fake_backward(
    grad: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *inputs[:9])
    ctx.numbers = inputs[9:]
    ctx.forced = _forced()


def _backward(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple[Any, ...]:
    # On a GPU autograd calls this from a thread of its own, where a backend forced around the forward is unknown.
    with nullcontext() if ctx.forced is None else backend(ctx.forced):
        gradients = _backward_op(grad, *ctx.saved_tensors, *ctx.numbers)
    return (*gradients, *(None for _ in range(11)))


def _bind(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    columns: Tensor,
    q_starts: Tensor,
    q_offsets: Tensor,
    k_starts: Tensor,
    *,
    max_q: int = 0,
    max_k: int = 0,
    scale: float = 1.0,
    softcap: float | None = None,
    window: int | None = None,
) -> tuple[object, ...]:
    """For `explain`: no choice depends on the numbers, so it may be asked without them."""
    tensors = q, k, v, k_prefix, v_prefix, columns, q_starts, q_offsets, k_starts
    return (*tensors, max_q, max_k, scale, softcap or 0.0, window or 0)


_KERNELS = "fastedit.kernels.branch_attention"
# kernels/branch_attention.py: CONFIGS
_WIDEST = 256
_WIDEST_FLOAT = 128
_WIDEST_FLOAT_BACKWARD = 64  # the gradient of the queries holds four tiles, each split into two TF32 parts


def _refuse(q: Tensor, k: Tensor, v: Tensor, k_prefix: Tensor, v_prefix: Tensor, *_: Any) -> str | None:
    dtypes = [tensor.dtype for tensor in (q, k, v, k_prefix, v_prefix)]
    if torch.float64 in dtypes:
        return "the kernels compute in float32, and some input is float64"
    widest = _WIDEST_FLOAT if torch.float32 in dtypes else _WIDEST
    if q.shape[2] > widest:
        return f"heads of these dtypes fit in registers up to a width of {widest}, got {q.shape[2]}"
    return None


def _refuse_backward(grad: Tensor, lse: Tensor, *rest: Any) -> str | None:
    width = rest[0].shape[2]
    if width > _WIDEST_FLOAT_BACKWARD and torch.float32 in [
        grad.dtype,
        *(tensor.dtype for tensor in rest[:5]),
    ]:
        return f"float32 heads fit in registers up to a width of {_WIDEST_FLOAT_BACKWARD} here, got {width}"
    return _refuse(*rest)


_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/cpu/branch_attention.h: BranchType


def _rows(tensor: Tensor) -> tuple[int, int, int, int]:
    return tensor.data_ptr(), _CODES[tensor.dtype], tensor.stride(0), tensor.stride(1)


def _problem(
    tensors: tuple[Tensor, ...], scale: float, softcap: float, window: int
) -> tuple[dict[str, Any], list[Tensor]]:
    """What both entry points take, and the tensors that must outlive the call."""
    q, k, _, k_prefix, *_ = floats = tensors[:5]
    index = [tensor.contiguous() for tensor in tensors[5:]]
    arguments = {
        "inputs": [_rows(tensor) for tensor in floats],
        "index": tuple(tensor.data_ptr() for tensor in index),
        "sizes": (*index[0].shape, len(q), len(k), len(k_prefix), q.shape[1], k.shape[1], q.shape[2]),
        "scale": scale,
        "softcap": softcap,
        "window": window,
        "threads": torch.get_num_threads(),
    }
    return arguments, index


def _run_cpu(native: Callable[..., Any], q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *tensors, _, _, scale, softcap, window = rest
    arguments, _index = _problem((q, *tensors), scale, softcap, window)
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[:2], dtype=torch.float32)
    native(**arguments, lse=lse.data_ptr(), out=_rows(out))
    return out, lse


def _run_cpu_backward(
    native: Callable[..., Any], grad: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, _, _, scale, softcap, window = rest
    arguments, _index = _problem((q, k, v, *tensors), scale, softcap, window)
    grad, lse = grad.contiguous(), lse.contiguous()
    dq, dk, dv = gradients = tuple(torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    rows = {name: _rows(x) for name, x in zip(("dq", "dk", "dv"), gradients)}
    native(**arguments, lse=lse.data_ptr(), grad=_rows(grad), **rows)
    return dq, dk, dv


def _refuse_cpu(q: Tensor, k: Tensor, v: Tensor, k_prefix: Tensor, v_prefix: Tensor, *_: Any) -> str | None:
    tensors = {"q": q, "k": k, "v": v, "k_prefix": k_prefix, "v_prefix": v_prefix}
    for name, tensor in tensors.items():
        if tensor.dtype not in _CODES:
            return f"the kernel computes in float32 from float32, bfloat16 or float16, and {name} is {tensor.dtype}"
        if tensor.stride(2) != 1 and tensor.shape[2] > 1 and tensor.numel():
            return (
                f"{name} must have unit stride along its last dimension, got strides {list(tensor.stride())}"
            )
    return None


def _refuse_cpu_backward(grad: Tensor, lse: Tensor, *rest: Any) -> str | None:
    if grad.dtype not in _CODES or lse.dtype != torch.float32:
        return f"the kernel computes in float32, and grad and lse are {grad.dtype} and {lse.dtype}"
    return _refuse_cpu(*rest)


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor k_prefix, Tensor v_prefix, Tensor columns, Tensor q_starts, "
    "Tensor q_offsets, Tensor k_starts, SymInt max_q, SymInt max_k, float scale, float softcap, SymInt window"
)

_backward_op = define_op(
    "branch_attention_backward",
    f"(Tensor grad, Tensor lse, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
    _eager_backward,
    [
        Impl("triton", "cuda", f"{_KERNELS}:branch_attention_backward", _refuse_backward),
        Impl(
            *("cpu", "cpu", "fastedit._cpu:branch_attention_backward"),
            _refuse_cpu_backward,
            _run_cpu_backward,
        ),
    ],
)

_op = define_op(
    "branch_attention",
    f"({_ARGUMENTS}) -> (Tensor, Tensor)",
    _fake,
    _eager,
    [
        Impl("triton", "cuda", f"{_KERNELS}:branch_attention", _refuse),
        Impl("cpu", "cpu", "fastedit._cpu:branch_attention", _refuse_cpu, _run_cpu),
    ],
    autograd=(_backward, _setup),
    bind=_bind,
)
