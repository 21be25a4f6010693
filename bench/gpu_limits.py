"""`python bench/gpu_limits.py OUT.json`: what a CUDA device gives where the design had to guess, a few minutes.

- fp64 potrf, getrf, and triangular solves with 1, 32 and 256 right-hand sides, at key widths of 7B models;
- one product of bf16 keys with an fp32 result, the nearest that torch has to `second_moment_`;
- `second_moment_` on every backend: rate as a fraction of the bf16 ceiling at half the operations, and the relative
  error of the diagonal against fp64 for 1,024 to 65,536 tokens, with keys whose products are all positive: the bias of
  the tensor cores' accumulators, which decides how often sums are promoted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import clock
import torch
from ceilings import measure

import fastedit
from fastedit.ops import second_moment_

__all__ = ["main"]

WIDTHS = (11008, 16384)


def seconds(call: Callable[[], Any], rounds: int = 5) -> float:
    call()
    return clock.interleaved([lambda: call()], (), "cuda", 1, rounds)[0]


def factorisations(d: int) -> dict[str, float]:
    X = torch.randn(d, 256, dtype=torch.float64, device="cuda")
    A = X @ X.T
    A.diagonal().add_(d)
    L = torch.linalg.cholesky(A)
    found = {
        "potrf_ms": 1e3 * seconds(lambda: torch.linalg.cholesky(A), 3),
        "getrf_ms": 1e3 * seconds(lambda: torch.linalg.lu_factor(A), 3),
    }
    for n in (1, 32, 256):
        B = X[:, :n].contiguous()
        found[f"trsm_{n}_ms"] = 1e3 * seconds(lambda B=B: torch.linalg.solve_triangular(L, B, upper=False))
    return found


def products(d: int, tokens: int, bf16: float) -> dict[str, float]:
    """Milliseconds and, for the triangle, the fraction of the ceiling at half of a full product's operations."""
    K = torch.randn(tokens, d, device="cuda").bfloat16()
    C = torch.zeros(d, d, device="cuda")
    half = tokens * d * (d + 1.0)
    found: dict[str, float] = {}
    try:
        found["mm_fp32_out_ms"] = 1e3 * seconds(lambda: C.add_(torch.mm(K.T, K, out_dtype=torch.float32)))
    except (TypeError, RuntimeError) as error:
        print(f"torch.mm(out_dtype=) is not there: {error}", file=sys.stderr)
    for name in ("triton", "cuda"):
        for master in (torch.float32, torch.float64):
            target = C.to(master)

            def call(name: str = name, target: torch.Tensor = target) -> None:
                with fastedit.backend(name):
                    second_moment_(target, K)

            target.zero_()
            call()
            last = slice(d - 256, d)
            exact = (K[:, last].double().T @ K.double()).tril(d - 256)
            error = float((target[last].double().tril(d - 256) - exact).norm() / exact.norm())
            if not error <= 5e-6:
                raise AssertionError(f"second_moment_ d={d} on {name}: error {error:.1e} > 5e-6")
            taken = seconds(call)
            key = f"{name}_{'fp64' if master == torch.float64 else 'fp32'}_C"
            found[f"{key}_ms"], found[f"{key}_of_ceiling"] = 1e3 * taken, half / bf16 / taken
    return found


def bias(d: int = 1024) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for tokens in (1024, 2048, 8192, 65536):
        K = torch.rand(tokens, d, device="cuda").bfloat16()
        exact = K.double().square().sum(0)
        for name in ("triton", "cuda"):
            C = torch.zeros(d, d, dtype=torch.float64, device="cuda")
            with fastedit.backend(name):
                second_moment_(C, K)
            off = (C.diagonal() - exact) / exact
            found.setdefault(name, {})[str(tokens)] = float(off.mean())
    return found


def main(path: Path) -> None:
    if not torch.cuda.is_available():
        print("skipped: no device")
        return
    roof = measure("cuda")
    found = {
        "factorisations fp64": {str(d): factorisations(d) for d in WIDTHS},
        "products": {str(d): products(d, 8192, roof.flops["bf16"]) for d in (1600, 4096, *WIDTHS)},
        "relative bias of the diagonal": bias(),
    }
    path.write_text(json.dumps(found))
    print(f"{len(found)} sections measured")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
