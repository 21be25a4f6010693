"""How one call is timed and how much memory it takes.

On one thread by process time, which repeats within a few per cent on a shared machine; process time sums threads, so on
more of them by the wall clock, for tables only. On a GPU by CUDA events, with a cold second-level cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["interleaved", "peak_bytes", "seconds"]

_COLD = 1 << 28  # bytes written between calls on a GPU: five times an H200's second-level cache


def seconds(call: Callable[..., Any], inputs: tuple[Any, ...], device: str, threads: int = 1) -> float:
    """Seconds of one call."""
    if device == "cuda":
        torch.empty(_COLD, dtype=torch.int8, device="cuda").zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call(*inputs)
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3
    clock = time.process_time if threads == 1 else time.perf_counter
    began = clock()
    call(*inputs)
    return clock() - began


def interleaved(
    calls: list[Callable[..., Any]], inputs: tuple[Any, ...], device: str, threads: int, rounds: int
) -> list[float]:
    """Median seconds of each call, in turns, so that a busy spell of the machine meets all of them."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, found in zip(calls, times, strict=True):
            found.append(seconds(call, inputs, device, threads))
    return [statistics.median(found) for found in times]


def peak_bytes(call: Callable[..., Any], inputs: tuple[Any, ...], device: str) -> float | None:
    """Bytes that one call takes at its peak above what was there; None where the system does not tell."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call(*inputs)
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - before)
    try:
        # Linux: 5 sets the high-water mark to what is resident now.
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        call(*inputs)
        return max(_resident("VmHWM") - before, 0.0)
    except (OSError, StopIteration):
        return None


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(field)).split()[1]) * 1024
