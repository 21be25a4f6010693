"""Integrated gradients from the gradients of their steps: summed over each group's rows, times its activation."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fastedit.ops._dispatch import Impl, define_op
from fastedit.ops._named import check_integer

__all__ = ["attribution_reduce"]


def attribution_reduce(
    gradient: Tensor, starts: Tensor, activation: Tensor | None = None, *, steps: int = 1
) -> Tensor:
    """scores[g] = activation[g] / steps * sum of gradient[r] over the rows r of group g, starts[g] <= r < starts[g+1].

    gradient: [n, f], a row per (group, step), the rows of a group side by side; any float dtype and strides.
    starts: [G + 1] int64, not decreasing, within [0, n]; a group may be empty, and rows outside all groups are not
    read. A group is one (layer, question), and `steps` the m of its Riemann sum; a group whose steps come in several
    calls is the sum of their results. activation: [G, f], any float dtype; without it the bare sum / steps.
    Summed in float32 (float64 if gradient or activation is), the dtype of the result [G, f].
    Not differentiable. Raises ValueError for wrong shapes, dtypes, devices or steps; for wrong values of `starts` on
    the CPU only, for elsewhere that would synchronise with the device: there they are clamped.

        scores = attribution_reduce(gradient, torch.arange(0, n + 1, 20), activation, steps=20)

    Source: knowledge neurons (arXiv:2104.08696, eq. 4).
    """
    if gradient.ndim != 2 or not gradient.is_floating_point():
        raise ValueError(
            f"gradient must be float of shape [n, f], got {gradient.dtype} {list(gradient.shape)}"
        )
    if starts.ndim != 1 or starts.shape[0] == 0 or starts.dtype != torch.int64:
        raise ValueError(f"starts must be int64 of shape [G + 1], got {starts.dtype} {list(starts.shape)}")
    shape = (starts.shape[0] - 1, gradient.shape[1])
    if activation is not None and (activation.shape != shape or not activation.is_floating_point()):
        raise ValueError(
            f"activation must be float of shape {list(shape)}, got {activation.dtype} {list(activation.shape)}"
        )
    check_integer("steps", steps)
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    for name, tensor in (("starts", starts), ("activation", activation)):
        if tensor is not None and tensor.device != gradient.device:
            raise ValueError(f"{name} must be on gradient's device {gradient.device}, got {tensor.device}")
    fixed = None if activation is None else activation.detach()
    result: Tensor = _op(gradient.detach(), starts, fixed, steps)
    return result


def _dtype(gradient: Tensor, activation: Tensor | None) -> torch.dtype:
    wide = gradient.dtype == torch.float64 or (activation is not None and activation.dtype == torch.float64)
    return torch.float64 if wide else torch.float32


def _bounds(starts: Tensor, n: int) -> list[int]:
    """The values of `starts`, checked."""
    values: list[int] = starts.tolist()
    if values[0] < 0 or values[-1] > n or any(b < a for a, b in pairwise(values)):
        raise ValueError(f"starts must not decrease and lie within [0, {n}], got {values[:8]}")
    return values


def _eager(gradient: Tensor, starts: Tensor, activation: Tensor | None, steps: int) -> Tensor:
    n, f = gradient.shape
    dtype, G = _dtype(gradient, activation), starts.shape[0] - 1
    if starts.device.type == "cpu":
        total = gradient.new_empty(G, f, dtype=dtype)
        for group, (first, last) in enumerate(pairwise(_bounds(starts, n))):
            torch.sum(gradient[first:last], 0, dtype=dtype, out=total[group])
    else:
        # Which group a row is in is found without telling the host: 0 before the first, G + 1 after the last.
        place = torch.bucketize(torch.arange(n, device=starts.device), starts, right=True)
        total = gradient.new_zeros(G + 2, f, dtype=dtype).index_add_(0, place, gradient.to(dtype))[1:-1]
    total = total / steps
    return total if activation is None else total * activation.to(dtype)


def _fake(gradient: Tensor, starts: Tensor, activation: Tensor | None, steps: int) -> Tensor:
    shape = (starts.shape[0] - 1, gradient.shape[1])
    return gradient.new_empty(shape, dtype=_dtype(gradient, activation))


def _bind(
    gradient: Tensor, starts: Tensor, activation: Tensor | None = None, *, steps: int = 1
) -> tuple[object, ...]:
    return gradient, starts, activation, steps


def _refuse_triton(gradient: Tensor, starts: Tensor, activation: Tensor | None, steps: int) -> str | None:
    """Any strides and dtypes; one read of the gradient, where the eager default makes a widened copy."""
    return None


_op = define_op(
    "attribution_reduce",
    "(Tensor gradient, Tensor starts, Tensor? activation, int steps) -> Tensor",
    _fake,
    _eager,
    [
        Impl(
            "triton",
            "cuda",
            "fastedit.kernels.attribution_reduce:attribution_reduce",
            _refuse_triton,
        )
    ],
    bind=_bind,
)
