"""Head, cross-entropy and KL of the target optimisation in one pass over the vocabulary, keeping no logits.

The losses of the rows are independent and the optimisation needs their gradient in the hidden state only. So the
forward accumulates, beside the online log-sum-exp, the gradient itself: d nll / d h = sum_v p_v w_v - w_target is one
more product per chunk with the same rescaling as the normaliser. Nothing of size [rows, vocab] survives a chunk and
the backward multiplies two [rows, d] tensors by the incoming scalars: two products in all, as with every logit kept,
where recomputing the logits in the backward would take three.

A CPU with AMX takes both products in bf16 tiles: numbers are split into planes of bf16 that add up to them, and
products below 2^-24 of the whole are left out. A half-precision head is one plane (float16: two), never widened. A row
has the same bits there whatever rows are beside it, so one or two float32 rows run there too, though slower.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fastedit.ops._dispatch import Impl, define_op

__all__ = ["target_loss"]

# Logits of a chunk: 1 MB in float32, so the exponentials and the second product find them in cache on a CPU, while
# many rows still get matrices of at least _LEAST columns. Other devices take 64 times as many: launches cost more.
_CHUNK_ELEMENTS = 1 << 18
_LEAST = 2048
# Half-precision weights are widened chunk by chunk: 8 MB in float32, so the products find them in cache on a CPU.
_WIDENED_ELEMENTS = 1 << 21


def target_loss(
    H: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    kl_rows: Tensor | None,
    kl_logp: Tensor | None,
    *,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of the target of each row, and KL from a fixed distribution at chosen rows.

    With z = H weight^T + bias, capped to softcap * tanh(z / softcap), and p = softmax(z):
    nll[r] = -log p_r(targets[r]), 0 where targets[r] = -1;
    kl[q] = sum_v p (log p - log p0) at row kl_rows[q], with log p0 = kl_logp[q]: the divergence of the new
    distribution from the old one, KL(p || p0), as in the papers and their code.

    H: [R, d] final-normed hidden states; weight: [V, d] head; bias: [V] or None; targets: [R] int64 in [-1, V);
    kl_rows: [Q] int64 rows of H and kl_logp: [Q, V] log-probabilities, or both None. Any float dtypes.
    Returns (nll [R], kl [Q]), Q = 0 without KL rows: float64 if H is float64, else float32, as is all arithmetic.
    Differentiable in H only. Raises ValueError for wrong shapes and dtypes; IndexError for a target or row
    that is not there, on the CPU: elsewhere the numbers are not checked, for that would synchronise with the device.

        nll, kl = target_loss(H, head.weight, head.bias, targets, rows, logp0)

    Source: the losses of ROME (arXiv:2202.05262, eq. 4) and MEMIT; the rescaling of Milakov & Gimelshein
    (arXiv:1805.02867), applied to the gradient as well.
    """
    _check(H, weight, bias, targets, kl_rows, kl_logp, softcap)
    with_grad = torch.is_grad_enabled() and H.requires_grad
    cap = 0.0 if softcap is None else float(softcap)
    fixed = [None if tensor is None else tensor.detach() for tensor in (bias, kl_logp)]
    nll, kl, _, _ = _op(H, weight.detach(), fixed[0], targets, kl_rows, fixed[1], cap, with_grad)
    return nll, kl


def _check(
    H: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    kl_rows: Tensor | None,
    kl_logp: Tensor | None,
    softcap: float | None,
) -> None:
    if H.ndim != 2 or not H.is_floating_point():
        raise ValueError(f"H must be float of shape [R, d], got {H.dtype} {list(H.shape)}")
    R, d = H.shape
    if weight.ndim != 2 or weight.shape[1] != d or not weight.is_floating_point():
        raise ValueError(f"weight must be float of shape [V, {d}], got {weight.dtype} {list(weight.shape)}")
    V = weight.shape[0]
    if V == 0:
        raise ValueError("weight must have at least one row, got an empty vocabulary")
    if bias is not None and bias.shape != (V,):
        raise ValueError(f"bias must have shape [{V}], got {list(bias.shape)}")
    if targets.shape != (R,) or targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 of shape [{R}], got {targets.dtype} {list(targets.shape)}")
    if (kl_rows is None) != (kl_logp is None):
        raise ValueError("kl_rows and kl_logp must be given together, got only one of them")
    if kl_rows is not None and kl_logp is not None:
        if kl_rows.ndim != 1 or kl_rows.dtype != torch.int64:
            raise ValueError(f"kl_rows must be int64 of shape [Q], got {kl_rows.dtype} {list(kl_rows.shape)}")
        if kl_logp.shape != (kl_rows.shape[0], V):
            raise ValueError(f"kl_logp must have shape [{kl_rows.shape[0]}, {V}], got {list(kl_logp.shape)}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be > 0 or None, got {softcap}")
    tensors = {"weight": weight, "bias": bias, "targets": targets, "kl_rows": kl_rows, "kl_logp": kl_logp}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != H.device:
            raise ValueError(f"{name} must be on H's device {H.device}, got {tensor.device}")


def _check_numbers(H: Tensor, weight: Tensor, targets: Tensor, kl_rows: Tensor | None) -> None:
    """Inside the op: the numbers are not there while it is compiled. On the CPU, where none has to be awaited."""
    if H.device.type != "cpu":
        return
    (R, _), V = H.shape, weight.shape[0]
    if targets.numel() and int(targets.max()) >= V:
        raise IndexError(f"targets must be below {V}, the rows of weight, got {int(targets.max())}")
    if kl_rows is not None and kl_rows.numel():
        low, high = (int(end) for end in torch.aminmax(kl_rows))
        if low < -R or high >= R:
            raise IndexError(f"kl_rows must be rows of H, below {R}, got {kl_rows.tolist()[:8]}")


def _accumulate_dtype(H: Tensor) -> torch.dtype:
    return torch.float64 if H.dtype == torch.float64 else torch.float32


def _eager(
    H: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    kl_rows: Tensor | None,
    kl_logp: Tensor | None,
    softcap: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """nll [R], kl [Q] and, with_grad, their gradients [R, d] and [Q, d] in H (else empty)."""
    _check_numbers(H, weight, targets, kl_rows)
    dtype = _accumulate_dtype(H)
    X = H.to(dtype)
    R, V = X.shape[0], weight.shape[0]
    rows = targets.new_empty(0) if kl_rows is None else kl_rows
    Q = rows.shape[0]
    # The lowest finite number, not -inf: a chunk of -inf logits (a masked, padded vocabulary) must not give NaN.
    peak = X.new_full((R,), torch.finfo(dtype).min)
    total = X.new_zeros(R)  # sum of exp(z - peak)
    picked = X.new_zeros(R)  # z at the target
    gap = X.new_zeros(Q)  # sum of exp(z - peak) (z - peak - log p0)
    # Sums of the same two weights times z'(raw) w, one below the other so that one product per chunk makes both.
    pulls = X.new_zeros(R + Q, X.shape[1] if with_grad else 0)
    elements = _CHUNK_ELEMENTS * (1 if X.device.type == "cpu" else 64)
    width = max(_LEAST, elements // max(R, 1))
    wide = None
    if weight.dtype != dtype:
        if X.device.type == "cpu":
            width = min(width, max(_LEAST // 8, _WIDENED_ELEMENTS // max(X.shape[1], 1)))
        # One buffer for all chunks: the pages of a fresh one cost more than the conversion into it.
        wide = weight.new_empty(min(width, V), weight.shape[1], dtype=dtype)
    for start in range(0, V, width):
        w = weight[start : start + width]
        if wide is not None:
            w = wide[: w.shape[0]].copy_(w)
        weights = X.new_empty(R + Q, w.shape[0])
        z, away = weights[:R], weights[R:]
        torch.mm(X, w.mT, out=z)
        if bias is not None:
            z.add_(bias[start : start + width])
        if softcap:
            z.div_(softcap).tanh_().mul_(softcap)
        slope = 1 - (z / softcap).square() if softcap and with_grad else None
        column = targets - start
        here = (column >= 0) & (column < w.shape[0])
        at = z.gather(1, column.clamp(0, w.shape[0] - 1)[:, None]).squeeze(1)
        picked = torch.where(here, at, picked)
        risen = torch.maximum(peak, z.amax(dim=1))
        rise, peak = risen - peak, risen
        fade = (-rise).exp()
        z.sub_(peak[:, None])
        if kl_logp is not None and Q:
            torch.sub(z[rows], kl_logp[:, start : start + width].to(dtype), out=away)
            # The sums so far were taken against the old peak: their factor (z - peak - log p0) shifts with it.
            gap = (gap - rise[rows] * total[rows]) * fade[rows]
            if with_grad:
                pulls[R:] -= rise[rows][:, None] * pulls[rows]
        z.exp_()
        total = total * fade + z.sum(1)
        if kl_logp is not None and Q:
            # Where p is 0 the term is 0, also for log p0 = -inf.
            p = z[rows]
            away.mul_(p).masked_fill_(p == 0, 0.0)
            gap = gap + away.sum(1)
        if with_grad:
            if slope is not None:
                z.mul_(slope), away.mul_(slope[rows])
            pulls.mul_(torch.cat([fade, fade[rows]])[:, None]).addmm_(weights, w)
    return _finish(H, weight, targets, rows, softcap, (peak, total, picked, gap, pulls))


def _finish(
    H: Tensor, weight: Tensor, targets: Tensor, rows: Tensor, softcap: float, sums: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses and gradients from the sums over the vocabulary, which are relative to e^peak."""
    peak, total, picked, gap, pulls = sums
    R = H.shape[0]
    log_total = total.log()
    wanted = targets >= 0
    nll = torch.where(wanted, (peak - picked) + log_total, 0.0)
    mean = gap / total[rows]
    kl = mean - log_total[rows]
    if pulls.shape[1] == 0:
        return nll, kl, pulls[:R].clone(), pulls[R:].clone()
    pull = pulls[:R] / total[:, None]
    d_kl = pulls[R:] / total[rows][:, None] - mean[:, None] * pull[rows]
    own = weight[targets.clamp(min=0)].to(pulls.dtype)
    if softcap:
        own = own * (1 - (picked / softcap).square())[:, None]
    return nll, kl, torch.where(wanted[:, None], pull - own, 0.0), d_kl


_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/cpu/target_loss_amx.h: HeadType


def _run_cpu(
    native: Callable[..., Any],
    H: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    kl_rows: Tensor | None,
    kl_logp: Tensor | None,
    softcap: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_numbers(H, weight, targets, kl_rows)
    (R, d), V = H.shape, weight.shape[0]
    X, targets = H.to(torch.float32).contiguous(), targets.contiguous()
    rows = targets.new_empty(0) if kl_rows is None else kl_rows.contiguous()
    Q = rows.shape[0]
    rows = torch.where(rows < 0, rows + R, rows)
    logp = X if kl_logp is None else kl_logp.to(torch.float32)
    logp = logp if logp.stride(-1) == 1 or logp.numel() < 2 else logp.contiguous()
    weight = weight if weight.stride(1) == 1 or d == 1 else weight.contiguous()
    wide = None if bias is None else bias.to(torch.float32).contiguous()
    peak, total, picked, gap = (torch.empty(n) for n in (R, R, R, Q))
    pulls = torch.empty(R + Q, d if with_grad else 0)
    native(
        weight=(weight.data_ptr(), _CODES[weight.dtype], weight.stride(0), V, d),
        bias=0 if wide is None else wide.data_ptr(),
        hidden=(X.data_ptr(), _CODES[H.dtype], R),
        targets=targets.data_ptr(),
        kl=(rows.data_ptr(), logp.data_ptr(), Q, logp.stride(0)),
        softcap=softcap,
        with_grad=with_grad,
        sums=tuple(part.data_ptr() for part in (peak, total, picked, gap, pulls)),
        threads=torch.get_num_threads(),
    )
    return _finish(X, weight, targets, rows, softcap, (peak, total, picked, gap, pulls))


def _refuse_cpu(H: Tensor, weight: Tensor, bias: Tensor | None, *_: object) -> str | None:
    if H.dtype == torch.float64 or weight.dtype == torch.float64:
        return "the kernel's arithmetic is float32, and float64 rows or weights need float64"
    if H.dtype not in _CODES or weight.dtype not in _CODES:
        return f"it takes float32, bfloat16 and float16, got rows of {H.dtype} and weights of {weight.dtype}"
    level = import_module("fastedit._cpu").info()["isa"]
    if level != "amx":
        return f"it is for AMX tiles, and the instruction-set level is {level}"
    return None


def _fake(H: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, kl_rows, with_grad = _accumulate_dtype(H), rest[3], rest[6]
    R, columns = H.shape[0], H.shape[1] if with_grad else 0
    Q = 0 if kl_rows is None else kl_rows.shape[0]
    shapes = ((R,), (Q,), (R, columns), (Q, columns))
    nll, kl, pull, pull0 = (H.new_empty(shape, dtype=dtype) for shape in shapes)
    return nll, kl, pull, pull0


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    H, kl_rows, with_grad = inputs[0], inputs[4], inputs[7]
    if not with_grad:
        raise RuntimeError("target_loss was called without with_grad, so it has no gradient to give")
    _, _, d_nll, d_kl = output
    ctx.mark_non_differentiable(d_nll, d_kl)
    ctx.save_for_backward(d_nll, d_kl, *(() if kl_rows is None else (kl_rows,)))
    ctx.dtype = H.dtype


def _backward(ctx: Any, g_nll: Tensor, g_kl: Tensor, _d_nll: Tensor, _d_kl: Tensor) -> tuple[Any, ...]:
    d_nll, d_kl, *kl_rows = ctx.saved_tensors
    grad = d_nll * g_nll[:, None]
    if kl_rows:
        grad = grad.index_add(0, kl_rows[0], d_kl * g_kl[:, None])
    return grad.to(ctx.dtype), None, None, None, None, None, None, None


def _bind(H: Tensor, *tensors: Tensor | None, softcap: float | None = None) -> tuple[object, ...]:
    return H, *tensors, softcap or 0.0, H.requires_grad


def _refuse_triton(H: Tensor, weight: Tensor, *rest: object) -> str | None:
    if torch.float64 in (H.dtype, weight.dtype):
        return "H or weight is float64, the kernels compute in float32"
    return None


_op = define_op(
    "target_loss",
    "(Tensor H, Tensor weight, Tensor? bias, Tensor targets, Tensor? kl_rows, Tensor? kl_logp, float softcap, "
    "bool with_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
    _eager,
    [
        Impl("triton", "cuda", "fastedit.kernels.target_loss:target_loss", _refuse_triton),
        Impl("cpu", "cpu", "fastedit._cpu:target_loss", _refuse_cpu, _run_cpu),
    ],
    autograd=(_backward, _setup),
    bind=_bind,
)
