"""row_moments_ of all modules of an editor's group at once against MEND's loop over rows."""

from __future__ import annotations

import torch
from cases import MODELS, Case
from op_bench import op_benches
from reference.row_moments import welford_
from torch import Tensor

from fastedit.ops import RowMoments, row_moments_


def row_moments_case(shape: str, n: int, d_x: int, d_d: int, dtype: torch.dtype) -> Case:
    """n rows [x | d] into a float32 state, as the published editors keep it."""

    def inputs(device: torch.device) -> tuple[RowMoments, Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        X = torch.randn(n, d_x, generator=generator, device=device).to(dtype)
        D = (1e-4 * torch.randn(n, d_d, generator=generator, device=device)).to(dtype)
        return RowMoments.zeros(d_x + d_d, dtype=torch.float32, device=device), X, D

    def ours(state: RowMoments, X: Tensor, D: Tensor) -> Tensor:
        state.count.zero_()
        row_moments_(state, X, D)
        return torch.stack([state.mean, state.std()])

    def naive(state: RowMoments, X: Tensor, D: Tensor) -> Tensor:
        mean, m2 = torch.zeros_like(state.mean), torch.zeros_like(state.m2)
        for part, columns in ((X, slice(0, d_x)), (D, slice(d_x, d_x + d_d))):
            count = welford_(0, mean[columns], m2[columns], part)
        return torch.stack([mean, (m2 / (count - 1)).sqrt()])

    def error(found: Tensor, state: RowMoments, X: Tensor, D: Tensor) -> float:
        rows = torch.cat([X, D], 1).double()
        exact = torch.stack([rows.mean(0), rows.std(0)])
        return float(((found.double() - exact) / rows.std(0)).abs().max())

    return Case(
        op="row_moments_",
        shape=f"{shape} n={n} d={d_x}+{d_d}",
        dtype=f"{'bf16' if dtype == torch.bfloat16 else 'fp32'} rows, fp32 state",
        inputs=inputs,
        ours=ours,
        reference=naive,
        error=error,
        tolerance=1e-5,
        flops=5.0 * n * (d_x + d_d),
        bytes=float(n * (d_x + d_d) * dtype.itemsize),
        goal=3.0,
    )


def cases(names: tuple[str, ...], rows: tuple[int, ...]) -> list[Case]:
    return [
        row_moments_case(name, n, MODELS[name].width, MODELS[name].key, dtype)
        for name in names
        for n in rows
        for dtype in (torch.float32, torch.bfloat16)
    ]


CPU = cases(("gpt2", "llama2-7b"), (12, 300))
GPU = cases(tuple(MODELS), (36, 1024))

test_cpu, test_gpu = op_benches(CPU, GPU, native=["cpu"], device=["triton"])
