"""kth_magnitude against torch.kthvalue, magnitude_mask_ against torch.topk and a mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import reference.kth_magnitude
import torch
from cases import MODELS, Case
from op_bench import op_benches
from torch import Tensor

from fastedit.ops import magnitude_mask_
from fastedit.ops.kth_magnitude import kth_magnitude

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float64: "fp64"}
SHARE = 0.4  # of the entries that RECT keeps


def inputs_of(n: int, dtype: torch.dtype) -> Callable[[torch.device], tuple[Tensor, int]]:
    def inputs(device: torch.device) -> tuple[Tensor, int]:
        generator = torch.Generator(device).manual_seed(0)
        # A low-rank update's entries, and not one scale for all.
        x = torch.randn(n, generator=generator, device=device)
        return (x * x.roll(1)).to(dtype), round(SHARE * n)

    return inputs


def kth_case(shape: str, n: int, dtype: torch.dtype, goal: float | None = None) -> Case:
    def error(found: Tensor, x: Tensor, k: int) -> float:
        return 0.0 if found == x.abs().sort(descending=True).values[k - 1] else 1.0

    return Case(
        op="kth_magnitude",
        shape=f"{shape} n={n}",
        dtype=NAMES[dtype],
        inputs=inputs_of(n, dtype),
        ours=kth_magnitude,
        reference=reference.kth_magnitude.kth_magnitude,
        error=error,
        tolerance=0.0,
        flops=float(n),
        bytes=float(n * dtype.itemsize),
        goal=goal,
    )


def mask_case(shape: str, n: int, dtype: torch.dtype) -> Case:
    def call(function: Callable[..., Any]) -> Callable[..., Tensor]:
        def masked(x: Tensor, k: int) -> Tensor:
            y = x.clone()
            function(y, k)
            return y

        return masked

    def error(found: Tensor, x: Tensor, k: int) -> float:
        """Which of equal magnitudes stay is up to torch.topk: how many, and none below one that is gone."""
        kept, gone = x[found != 0].abs(), x[found == 0].abs()
        # An entry that is zero is kept and gone.
        same = len(kept) == min(k, int((x != 0).sum())) and found[found != 0].equal(x[found != 0])
        return 0.0 if same and kept.min() >= gone.max() else 1.0

    return Case(
        op="magnitude_mask_",
        shape=f"{shape} n={n}",
        dtype=NAMES[dtype],
        inputs=inputs_of(n, dtype),
        ours=call(magnitude_mask_),
        reference=call(reference.kth_magnitude.magnitude_mask_),
        error=error,
        tolerance=0.0,
        flops=float(n),
        bytes=3.0 * n * dtype.itemsize,
    )


def size(name: str) -> int:
    return MODELS[name].width * MODELS[name].key


DTYPES = (torch.float32, torch.bfloat16, torch.float64)
CPU = [kth_case("16 M", 1 << 24, dtype, 3.0 if dtype == torch.float32 else None) for dtype in DTYPES]
CPU += [kth_case("gpt2-xl update", size("gpt2-xl"), torch.float32, 3.0)]
CPU += [mask_case("gpt2-xl update", size("gpt2-xl"), dtype) for dtype in DTYPES[:2]]
GPU = [
    case(f"{name} update", size(name), dtype)
    for name in ("gpt2-xl", "gptj-6b")
    for dtype in DTYPES[:2]
    for case in (kth_case, mask_case)
]

test_cpu, test_gpu = op_benches(CPU, GPU, native=["cpu"], device=["triton"])
