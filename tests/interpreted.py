"""What the Triton kernels compute, in Triton's interpreter on small shapes: `python tests/interpreted.py [NAME ...]`.

A process of its own with TRITON_INTERPRET=1, which is read when a kernel is decorated. The interpreter multiplies the
bit patterns of bf16 and cuts float32 off where a GPU rounds it to bf16; kernels widen before a product there, and the
tolerances that have to allow for the cut say so.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
import triton.language as tl

from fastedit.kernels import second_moment as second_moment_kernel
from fastedit.kernels.second_moment import _tile_of

__all__ = ["CHECKS"]

CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


@triton.jit
def _tiles_probe(out, n, tiles, GROUP: tl.constexpr):
    p = tl.minimum(tl.arange(0, 512), n - 1)
    i, j = _tile_of(p, tiles, GROUP)
    tl.store(out + 2 * p, i)
    tl.store(out + 2 * p + 1, j)


@check
def second_moment_tiles() -> None:
    """Every tile of the triangle is somebody's, and nobody else's."""
    for group in (1, 4, 8):
        for tiles in (1, 2, 3, 7, 8, 9, 16, 23, 31):
            n = tiles * (tiles + 1) // 2
            out = torch.full((n, 2), -1, dtype=torch.int32)
            _tiles_probe[(1,)](out, n, tiles, group)
            assert {tuple(row) for row in out.tolist()} == {
                (i, j) for i in range(tiles) for j in range(i + 1)
            }


def _second_moment(arch: int) -> None:
    second_moment_kernel.architecture = lambda tensor: arch
    upper = lambda d: torch.ones(d, d, dtype=torch.bool).triu(1)  # noqa: E731
    for T, d, layers, keys, master in (
        (63, 200, 2, torch.bfloat16, torch.float64),
        (1, 8, 1, torch.float16, torch.float32),
        (0, 63, 1, torch.bfloat16, torch.float32),
        (130, 136, 1, torch.float16, torch.float64),
        (1030, 63, 1, torch.float32, torch.float64),
        (70, 264, 2, torch.float32, torch.float32),
    ):
        for masked in (False, True):
            for products in (4, 6) if keys == torch.float32 else (6,):
                generator = torch.Generator().manual_seed(T + d)
                K = torch.randn(layers, T, d, generator=generator).to(keys)
                mask = torch.rand(T, generator=generator) > 0.4
                if masked:
                    K[:, ~mask] = float("nan")
                C = torch.ones(layers, d, d, dtype=master)
                C[:, upper(d)] = 7
                second_moment_kernel.second_moment_(C, K, mask if masked else None, products)
                kept = (K[:, mask] if masked else K).double()
                exact = (1 + kept.mT @ kept).tril()
                error = float((C.double().tril() - exact).norm() / exact.norm())
                # Two planes keep 16 bits of a key; cut off instead of rounded, twice the error.
                assert error < (3e-5 if products == 4 else 1e-6), (T, d, keys, masked, products, error)
                assert C[:, upper(d)].eq(7).all()


@check
def second_moment() -> None:
    _second_moment(80)


@check
def second_moment_bulk() -> None:
    """The same through descriptors, as on sm_90."""
    _second_moment(90)


@check
def second_moment_strides() -> None:
    """Rows of odd width and alignment, keys that are a part of a wider tensor, C with a stride, several flushes."""
    for arch in (80, 90):
        second_moment_kernel.architecture = lambda tensor, arch=arch: arch
        config = second_moment_kernel.CONFIGS[arch, 8]
        second_moment_kernel.CONFIGS[arch, 8] = dataclasses.replace(
            config, tile_m=32, tile_n=32, parts=1, flush=128, promote=64
        )
        for K in (
            torch.randn(200, 41, dtype=torch.bfloat16)[:, 1:],
            torch.randn(40, 200, dtype=torch.bfloat16).T,
            torch.randn(1, 40).bfloat16().expand(200, 40),
            torch.randn(200, 80).half()[:, :40],
        ):
            C = torch.zeros(50, 64, dtype=torch.float64)[:40, 3:43]
            second_moment_kernel.second_moment_(C, K, None)
            exact = (K.double().T @ K.double()).tril()
            assert (C.tril() - exact).norm() < 1e-6 * exact.norm()
            assert not C.triu(1).any()
            mask = torch.arange(200) % 3 > 0
            second_moment_kernel.second_moment_(C, K, mask)
            exact += (K[mask].double().T @ K[mask].double()).tril()
            assert (C.tril() - exact).norm() < 1e-6 * exact.norm()
        second_moment_kernel.CONFIGS[arch, 8] = config


def main() -> int:
    names = [name for name in sys.argv[1:] if not name.startswith("--json=")]
    out = [Path(name.removeprefix("--json=")) for name in sys.argv[1:] if name.startswith("--json=")]
    results = {}
    for name in names or CHECKS:
        try:
            CHECKS[name]()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()[-3000:]
        print(f"{name}: {results[name] or 'ok'}", flush=True)
    for path in out:
        path.write_text(json.dumps(results), encoding="utf-8")
    return 1 if any(results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
