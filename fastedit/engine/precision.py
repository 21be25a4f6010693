"""Half-precision blocks on a single-precision residual stream.

A target vector is optimised in float32 by steps that bfloat16 would round away where they are added to the residual.
Inside `wide_residual` the blocks of a half-precision model take and return float32 hidden states: products run in the
weights' own type, sums on the residual, norms and softmax in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastedit.arch import ResolvedArch

__all__ = ["stream_dtype", "wide_residual"]

_HALF = (torch.bfloat16, torch.float16)


def stream_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of the residual stream that targets are optimised on: float32 for half-precision models."""
    return torch.float32 if dtype in _HALF else dtype


@contextmanager
def wide_residual(arch: ResolvedArch) -> Iterator[None]:
    """Let the blocks of a half-precision model run on float32 hidden states; nothing changes for other models."""
    weight: Tensor = arch.mlp_out(0).weight  # type: ignore[assignment]
    if weight.dtype not in _HALF:
        yield
        return
    # RMS norms are written to compute in float32 and to multiply by any weight; LayerNorm insists on one type.
    norms = [
        module
        for module in arch.model.modules()
        if isinstance(module, nn.LayerNorm) and module.elementwise_affine and module.weight.dtype in _HALF
    ]

    def widened(norm: nn.LayerNorm) -> object:
        scale = norm.weight.detach().float()
        shift = None if norm.bias is None else norm.bias.detach().float()

        def forward(hidden: Tensor) -> Tensor:
            return nn.functional.layer_norm(hidden.float(), norm.normalized_shape, scale, shift, norm.eps)

        return forward

    # Sharded models carry a forward of their own on the instance: it comes back afterwards.
    before = [vars(norm).get("forward") for norm in norms]
    try:
        for norm in norms:
            norm.forward = widened(norm)  # type: ignore[method-assign,assignment]
        with torch.autocast(weight.device.type, dtype=weight.dtype, cache_enabled=False):
            yield
    finally:
        for norm, forward in zip(norms, before, strict=True):
            vars(norm).pop("forward", None)
            if forward is not None:
                norm.forward = forward  # type: ignore[method-assign]
