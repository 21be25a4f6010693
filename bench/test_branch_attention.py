"""branch_attention, forward and with its gradients, against a loop over the branches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import reference.branch_attention
import torch
from cases import Case
from op_bench import op_benches
from torch import Tensor

from fastedit.ops.branch_attention import branch_attention

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def branch_attention_case(
    shape: str,
    branches: int,
    *,
    own: tuple[int, int],
    prefix: tuple[int, int],
    heads: int,
    groups: int,
    D: int,
    dtype: torch.dtype,
    gradient: bool,
) -> Case:
    """Suffixes of prompts: every token of a branch asks, and four branches share each prefix."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(own[0], own[1] + 1, (branches,), generator=generator)
    lengths = torch.randint(prefix[0], prefix[1] + 1, (branches,), generator=generator)
    tokens, pairs = int(counts.sum()), int((counts * lengths + counts * (counts + 1) // 2).sum())
    options = {"max_q": own[1], "max_k": own[1], "scale": D**-0.5}

    def inputs(device: torch.device) -> tuple[Any, ...]:
        draw = torch.Generator(device).manual_seed(0)
        prompts = -(-branches // 4)

        def normal(rows: int, rows_heads: int) -> Tensor:
            return torch.randn(rows, rows_heads, D, generator=draw, device=device).to(dtype)

        places = torch.arange(prefix[1])
        columns = torch.arange(branches)[:, None] // 4 * prefix[1] + places
        columns = torch.where(places < lengths[:, None], columns, -1)
        starts = torch.cat([torch.zeros(1).long(), counts.cumsum(0)])
        offsets = torch.arange(tokens) - starts[:-1].repeat_interleave(counts)
        own_tensors = normal(tokens, heads), normal(tokens, groups), normal(tokens, groups)
        store = normal(prompts * prefix[1], groups), normal(prompts * prefix[1], groups)
        index = (x.to(device) for x in (columns, starts, offsets, starts))
        return (*own_tensors, *store, *index)

    def forward(function: Callable[..., Tensor], *tensors: Any) -> Tensor:
        with torch.no_grad():
            return function(*tensors, **options)

    def backward(function: Callable[..., Tensor], *tensors: Any) -> Tensor:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
        out = function(*leaves, *tensors[3:], **options)
        return torch.cat([x.flatten() for x in torch.autograd.grad(out, leaves, out.detach())])

    run = backward if gradient else forward

    def error(found: Tensor, *tensors: Any) -> float:
        wide = (tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors)
        exact = run(reference.branch_attention.branch_attention, *wide)
        return float((found.double() - exact).norm() / exact.norm())

    def call(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *tensors: run(function, *tensors)

    return Case(
        op="branch_attention",
        shape=f"{shape} B={branches} H={heads}/{groups} D={D} {'with gradient' if gradient else 'forward'}",
        dtype=NAMES[dtype],
        inputs=inputs,
        ours=call(branch_attention),
        reference=call(reference.branch_attention.branch_attention),
        error=error,
        tolerance=1e-5 if dtype == torch.float32 else 5e-3,
        flops=(14.0 if gradient else 4.0) * pairs * heads * D,
        bytes=(2.0 if gradient else 1.0) * dtype.itemsize * D * tokens * (2 * heads + 2 * groups),
    )


def cases(sizes: dict[str, dict[str, Any]], dtypes: tuple[torch.dtype, ...]) -> list[Case]:
    return [
        branch_attention_case(name, **size, dtype=dtype, gradient=gradient)
        for name, size in sizes.items()
        for dtype in dtypes
        for gradient in (False, True)
    ]


# GPT-2 medium: prompts with contexts and short targets; the same with Llama-3-8B's heads; the suffixes of a trace.
SHORT = {"branches": 450, "own": (4, 8), "prefix": (10, 20)}
MEDIUM = {"heads": 16, "groups": 16, "D": 64}
LLAMA = {"heads": 32, "groups": 8, "D": 128}
CPU = cases(
    {
        "gpt2-medium": {**SHORT, **MEDIUM},
        "gpt2-medium one edit": {**SHORT, **MEDIUM, "branches": 21},
        "llama3-8b": {**SHORT, **LLAMA},
    },
    (torch.float32, torch.bfloat16),
)
GPU = cases(
    {
        "gpt2-medium": {**SHORT, **MEDIUM},
        "llama3-8b": {**SHORT, **LLAMA},
        "llama3-8b trace": {"branches": 3000, "own": (1, 30), "prefix": (0, 30), **LLAMA},
    },
    (torch.float32, torch.bfloat16),
)

test_cpu, test_gpu = op_benches(CPU, GPU, native=["cpu"], device=["triton"])
