"""packed_solve against LAPACK's triangular solve with the square factor, both in float64."""

from __future__ import annotations

from typing import Any

import torch
from cases import MODELS, Case
from op_bench import op_benches
from torch import Tensor

from fastedit.ops.packed_solve import pack_factor, packed_solve


def case(name: str, f: int, n: int, transposed: bool) -> Case:
    """n right-hand sides of L or L^T."""

    def inputs(device: torch.device) -> tuple[Any, ...]:
        generator = torch.Generator(device).manual_seed(0)
        make = {"generator": generator, "device": device, "dtype": torch.float64}
        lower = torch.randn(f, f, **make).tril(-1) / f
        lower.diagonal().fill_(1.0)
        kept["lower"] = lower.mT.contiguous().mT  # column-major, as LAPACK factors and reads it
        return pack_factor(lower), torch.randn(n, f, **make), transposed

    def naive(packed: Tensor, rows: Tensor, transposed: bool) -> Tensor:
        lower = kept["lower"]
        return torch.linalg.solve_triangular(lower.mT if transposed else lower, rows.mT, upper=transposed).mT

    def error(found: Tensor, packed: Tensor, rows: Tensor, transposed: bool) -> float:
        lower = kept["lower"]
        return float((found @ (lower if transposed else lower.mT) - rows).norm() / rows.norm())

    kept: dict[str, Tensor] = {}
    return Case(
        op="packed_solve",
        shape=f"{name} {'L^T' if transposed else 'L'} f={f} n={n}",
        dtype="fp64",
        inputs=inputs,
        ours=lambda packed, rows, transposed: packed_solve(packed, rows, transposed=transposed),
        reference=naive,
        error=error,
        tolerance=1e-12,
        flops=1.0 * n * f * f,
        bytes=4.0 * f * f + 16.0 * n * f,
    )


CPU = [
    case("gptj-6b width", MODELS["gptj-6b"].width, n, transposed)
    for n in (1, 8, 32, 128)
    for transposed in (False, True)
]
GPU = [
    case(f"{name} key", MODELS[name].key, n, transposed)
    for name in ("gpt2-xl", "gptj-6b")
    for n in (1, 100)
    for transposed in (False, True)
]

test_cpu, test_gpu = op_benches(CPU, GPU, native=["cpu"])
