"""How an op is timed: correctness first, then interleaved with the reference, on one CPU thread by process time.

Wall-clock ratios on a shared machine swing several-fold; process time on one thread, with the two candidates taking
turns, repeats within a few per cent. On a GPU the time is that of CUDA events around the call.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import record
import torch
from cases import Case

import fastedit

ROUNDS = 5
_ROWS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = []


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def bench_op(
    benchmark: Any, one_thread: None, request: pytest.FixtureRequest
) -> Callable[[Case, str, str], float | None]:
    """bench_op(case, backend, device): gate, time against the reference, record; returns reference time / ours."""

    def run(case: Case, backend: str, device: str) -> float | None:
        at = torch.device(device)
        inputs = case.inputs(at)
        if backend == "reference":
            call = case.reference
        else:
            chosen = fastedit.explain(case.op, *inputs)
            able = next((row for row in chosen if row.name == backend), None)
            if able is None:
                pytest.skip(f"{case.op} has no implementation {backend}")

            def call(*args: Any) -> Any:
                with fastedit.backend(backend):
                    return case.ours(*args)

        try:
            error = case.error(call(*inputs), *inputs)
        except RuntimeError as reason:
            if backend == "reference" or "was asked for" not in str(reason):
                raise
            pytest.skip(str(reason))
        assert error <= case.tolerance, (
            f"{case.op} {case.id} on {backend}: error {error:.1e} > {case.tolerance:.1e}"
        )

        clock = _cuda_clock if at.type == "cuda" else _process_clock
        ours, naive = [], []
        for _ in range(ROUNDS if backend != "reference" else 0):
            naive.append(clock(case.reference, inputs))
            ours.append(clock(call, inputs))
        ratio = statistics.median(naive) / statistics.median(ours) if ours else None

        benchmark.group = f"{case.op} {case.id} {device}"
        benchmark.extra_info.update(
            backend=backend,
            dtype=case.dtype,
            error=error,
            ratio_to_reference=ratio,
            flops=case.flops,
            bytes=case.bytes,
        )
        benchmark.extra_info.update(_machine(device))
        benchmark.pedantic(lambda: _synchronised(call, inputs, at), rounds=3, warmup_rounds=1)
        seconds = statistics.median(ours) if ours else clock(call, inputs)
        request.config.stash[_ROWS].append(
            {
                "case": f"{case.op} {case.id}",
                "backend": backend,
                "ms": 1e3 * seconds,
                "gflops": case.flops / seconds / 1e9,
                "ratio": ratio,
                "goal": case.goal if backend == case.goal_on else None,
                "error": error,
            }
        )
        return ratio

    return run


def _process_clock(call: Callable[..., Any], inputs: tuple[Any, ...]) -> float:
    start = time.process_time()
    call(*inputs)
    return time.process_time() - start


def _cuda_clock(call: Callable[..., Any], inputs: tuple[Any, ...]) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call(*inputs)
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def _synchronised(call: Callable[..., Any], inputs: tuple[Any, ...], device: torch.device) -> None:
    call(*inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _machine(device: str) -> dict[str, Any]:
    report = fastedit.ops._dispatch.report()
    return {**record.machine(device), "isa": report["_cpu"].get("isa", "none")}


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[_ROWS]
    if not rows:
        return
    terminalreporter.section("ratio to the reference twin (same dtypes, one thread, interleaved medians)")
    width = max(len(row["case"]) for row in rows)
    for row in sorted(rows, key=lambda row: row["case"]):
        ratio = f"{row['ratio']:5.2f}x" if row["ratio"] is not None else "  1.00x"
        goal = "" if row["goal"] is None else f"  goal {row['goal']:.1f}x"
        terminalreporter.write_line(
            f"{row['case']:<{width}}  {row['backend']:<9} {row['ms']:9.2f} ms {row['gflops']:8.1f} GF/s {ratio} "
            f" error {row['error']:.0e}{goal}"
        )
