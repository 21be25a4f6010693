"""rank_update_ against widening, adding and narrowing the whole weight."""

from __future__ import annotations

import reference.rank_update
import torch
from cases import MODELS, Case
from op_bench import op_benches
from torch import Tensor

from fastedit.ops import rank_update_

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


def rank_update_case(
    shape: str, rows: int, columns: int, rank: int, weight: torch.dtype, factor: torch.dtype
) -> Case:
    def start(device: torch.device) -> Tensor:
        generator = torch.Generator(device).manual_seed(0)
        return torch.randn(rows, columns, generator=generator, device=device).to(weight)

    def inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(1)
        # An update of the size of the weights: one that is missing or halved is far from any rounding.
        left = torch.randn(rows, rank, generator=generator, device=device) / rank**0.5
        right = torch.randn(rank, columns, generator=generator, device=device)
        return start(device), left.to(factor), right.to(factor)

    def ours(W: Tensor, left: Tensor, right: Tensor) -> Tensor:
        rank_update_(W, left, right)
        return W

    def naive(W: Tensor, left: Tensor, right: Tensor) -> Tensor:
        reference.rank_update.rank_update_(W, left, right)
        return W

    def error(found: Tensor, W: Tensor, left: Tensor, right: Tensor) -> float:
        """How much further from the exact sum than its own rounding: 0 for one perfect rounding."""
        some = torch.tensor([*range(128), *range(rows - 128, rows)], device=W.device)
        exact = start(W.device)[some].double() + left[some].double() @ right.double()
        rounding = (exact.to(weight).double() - exact).norm()
        return float((found[some].double() - exact).norm() / rounding - 1)

    return Case(
        op="rank_update_",
        shape=f"{shape} [{rows}, {columns}] r={rank}",
        dtype=f"{NAMES[weight]} W, {NAMES[factor]} factors",
        inputs=inputs,
        ours=ours,
        reference=naive,
        error=error,
        tolerance=1e-2,
        flops=2.0 * rows * columns * rank,
        bytes=2.0 * rows * columns * weight.itemsize + (rows + columns) * rank * factor.itemsize,
        goal=3.0 if weight == torch.bfloat16 else None,
        unit="fp64" if weight == torch.float32 else "fp32",  # what the sums are in
    )


def cases(names: dict[str, tuple[int, int]], ranks: tuple[int, ...]) -> list[Case]:
    kinds = [
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float64),
        (torch.float16, torch.float32),
        (torch.float32, torch.float64),
    ]
    return [
        rank_update_case(name, *size, rank, *kind)
        for name, size in names.items()
        for rank in ranks
        for kind in kinds
    ]


XL = MODELS["gpt2-xl"]
GPTJ = MODELS["gptj-6b"]
CPU = cases({"gpt2-xl": (XL.width, XL.key)}, (1, 8, 100))
CPU += [
    rank_update_case("gptj-6b", GPTJ.width, GPTJ.key, rank, torch.bfloat16, torch.float32)
    for rank in (1, 8, 64, 100)
]
GPU = cases({name: (model.width, model.key) for name, model in MODELS.items()}, (1, 8, 100, 1000))

test_cpu, test_gpu = op_benches(CPU, GPU, native=["cpu"], device=["triton", "cuda"])
