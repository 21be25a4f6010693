"""What a machine gives at best, measured in the run whose figures are held against it.

On a CPU the arithmetic peaks are those of loops that touch registers only, times the threads that torch is set to,
and the bandwidth that of a copy on as many, bytes read and written.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

__all__ = ["Ceilings", "measure"]


@dataclass(frozen=True)
class Ceilings:
    """flops: operations a second by unit ("bf16", "fp32", "fp64", on a GPU also "tf32"); bandwidth: bytes a second.

    source: how they were measured, in words.
    """

    flops: dict[str, float]
    bandwidth: float
    source: str

    def floor(self, unit: str, flops: float, moved: float) -> float | None:
        """Seconds that the call takes at least; None for a unit that was not measured."""
        rate = self.flops.get(unit)
        return None if rate is None else max(flops / rate, moved / self.bandwidth)

    def as_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "gbytes_per_s": self.bandwidth / 1e9,
            "gflops": {k: v / 1e9 for k, v in self.flops.items()},
        }


def measure(device: str) -> Ceilings:
    """The ceilings of "cpu" or "cuda", about two seconds."""
    return _of_gpu() if device == "cuda" else _of_cpu()


def _of_cpu() -> Ceilings:
    threads = torch.get_num_threads()
    try:
        native = import_module("fastedit._cpu")
    except ImportError:
        native = None
    if native is None:
        # Without the native module a large product of torch's is the nearest thing to a peak.
        flops = {
            "fp32": _product(torch.float32, 1024, time.perf_counter),
            "fp64": _product(torch.float64, 1024, time.perf_counter),
        }
        return Ceilings({**flops, "bf16": flops["fp32"]}, _copy("cpu"), f"torch products, {threads} threads")
    fp32 = native.peak("fma_f32", 0.2)
    try:
        bf16 = native.peak("amx_bf16", 0.2)
    except (ValueError, RuntimeError):  # no such unit, or FASTEDIT_ISA forbids it
        bf16 = fp32
    flops = {"bf16": bf16, "fp32": fp32, "fp64": native.peak("fma_f64", 0.2)}
    # The loops run on one core; a call may use as many as torch is set to.
    scaled = {unit: rate * threads for unit, rate in flops.items()}
    bandwidth = native.bandwidth() if threads == 1 else _copy("cpu")
    return Ceilings(
        scaled, bandwidth, f"register loops times {threads} threads; a copy, bytes read and written"
    )


def _of_gpu() -> Ceilings:
    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = False
        flops = {
            name: _product(dtype, 8192, clock, "cuda")
            for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32), ("fp64", torch.float64))
        }
        torch.backends.cuda.matmul.allow_tf32 = True
        flops["tf32"] = _product(torch.float32, 8192, clock, "cuda")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return Ceilings(flops, _copy("cuda", clock), "torch products of 8192 cubed and a copy of 4 GB")


def _product(dtype: torch.dtype, size: int, clock: Callable[[], float], device: str = "cpu") -> float:
    # Random data: zeros would run faster than any real product.
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2.0 * size**3 / _seconds(lambda: a @ b, clock)


def _copy(device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    source = torch.ones((1 << 30) if device == "cuda" else (1 << 26), device=device)
    target = torch.empty_like(source)
    return 2.0 * source.nbytes / _seconds(lambda: target.copy_(source), clock)


def _seconds(call: Callable[[], Any], clock: Callable[[], float]) -> float:
    times = []
    for _ in range(8):
        start = clock()
        call()
        times.append(clock() - start)
    return statistics.median(times[3:])
