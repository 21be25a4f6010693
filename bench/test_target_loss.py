"""target_loss with its gradient against log-softmax of every logit and autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import reference.target_loss
import torch
from cases import MODELS, Case
from op_bench import op_benches
from torch import Tensor

from fastedit.ops.target_loss import target_loss

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def target_loss_case(shape: str, d: int, V: int, R: int, Q: int, dtype: torch.dtype) -> Case:
    """Losses and gradient at R rows, KL at Q of them."""

    def inputs(device: torch.device) -> tuple[Any, ...]:
        generator = torch.Generator(device).manual_seed(0)
        make = {"generator": generator, "device": device}
        H = torch.randn(R, d, **make)
        weight = torch.randn(V, d, **make) / d**0.5
        targets = torch.randint(0, V, (R,), **make)
        logp = torch.log_softmax(torch.randn(Q, V, **make), -1)
        return H.to(dtype), weight.to(dtype), None, targets, torch.arange(Q, device=device), logp

    def gradient(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        def call(H: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
            h = H.detach().requires_grad_()
            nll, kl = function(h, *rest)
            (grad,) = torch.autograd.grad(nll.sum() + kl.sum(), h)
            return nll.detach(), kl.detach(), grad

        return call

    def error(found: tuple[Tensor, ...], *inputs: Any) -> float:
        """The largest of losses, divergences and gradients, over all rows."""
        H, weight, bias, targets, rows, logp = inputs
        exact = gradient(reference.target_loss.target_loss)(
            H.double(), weight.double(), bias, targets, rows, logp.double()
        )
        return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))

    return Case(
        op="target_loss",
        shape=f"{shape} R={R} Q={Q} d={d} V={V}",
        dtype=NAMES[dtype],
        inputs=inputs,
        ours=gradient(target_loss),
        reference=gradient(reference.target_loss.target_loss),
        error=error,
        tolerance=1e-5 if dtype == torch.float32 else 5e-3,
        flops=4.0 * R * V * d,
        bytes=2.0 * V * d * dtype.itemsize,
        goal=2.0 if R == 64 and V == 50257 else None,
    )


def cases(names: list[str], rows: tuple[int, ...]) -> list[Case]:
    return [
        target_loss_case(name, MODELS[name].width, MODELS[name].vocab, R, 4, dtype)
        for name in names
        for R in rows
        for dtype in (torch.float32, torch.bfloat16)
    ]


CPU = cases(["gpt2"], (8, 64)) + cases(["gpt2-xl"], (64,))
GPU = cases(list(MODELS), (64, 1024))

test_cpu, test_gpu = op_benches(CPU, GPU, native=["cpu"], device=["triton"])
