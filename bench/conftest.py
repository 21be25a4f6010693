"""How an op is timed: correctness first, then interleaved with the reference.

On one CPU thread by process time: wall-clock ratios on a shared machine swing several-fold, process time with the two
candidates taking turns repeats within a few per cent. `--wall-threads N` takes a wall-clock table on N threads instead,
for the docs, without goals. On a GPU the time is that of CUDA events. `--gate` fails the cases that miss their goal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ceilings
import clock
import op_table
import pytest
import record
import torch
from cases import Case
from rich.console import Console

import fastedit

ROUNDS = 5
_ROWS = pytest.StashKey[dict[str, list[op_table.Row]]]()
_TRIED = pytest.StashKey[dict[str, set[tuple[str, ...]]]]()
_CEILINGS = pytest.StashKey[dict[str, ceilings.Ceilings]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastedit benches")
    group.addoption("--wall-threads", type=int, default=1, help="time ops by the wall clock on N threads")
    group.addoption("--gate", action="store_true", help="fail op benches that miss their goal")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = {}
    config.stash[_TRIED] = {}
    config.stash[_CEILINGS] = {}


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def bench_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """As many threads as --wall-threads says, 1 without it."""
    threads: int = request.config.getoption("--wall-threads")
    if threads < 1:
        raise pytest.UsageError(f"--wall-threads must be at least 1, got {threads}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    yield threads
    torch.set_num_threads(before)


@pytest.fixture
def bench_op(
    benchmark: Any, bench_threads: int, request: pytest.FixtureRequest
) -> Callable[[Case, str, str], float | None]:
    """bench_op(case, backend, device): gate, time against the reference, record; returns reference time / ours."""

    def run(case: Case, backend: str, device: str) -> float | None:
        at = torch.device(device)
        inputs = case.inputs(at)
        tried = request.config.stash[_TRIED].setdefault(device, set())
        tried.add((case.op, case.shape, case.dtype, backend))
        call = case.reference if backend == "reference" else _forced(case, backend, inputs)
        try:
            error = case.error(call(*inputs), *inputs)
        except RuntimeError as reason:
            if backend == "reference" or "was asked for" not in str(reason):
                raise
            pytest.skip(str(reason))
        # Not `error > tolerance`: that would let a NaN through.
        allowed = case.tolerance
        if backend == "reference" and case.reference_tolerance is not None:
            allowed = case.reference_tolerance
        assert error <= allowed, f"{case.op} {case.id} on {backend}: error {error:.1e} > {allowed:.1e}"

        peak = clock.peak_bytes(call, inputs, device)
        if backend == "reference":
            (seconds,), ratio = clock.interleaved([call], inputs, device, bench_threads, ROUNDS), None
        else:
            naive, seconds = clock.interleaved([case.reference, call], inputs, device, bench_threads, ROUNDS)
            ratio = naive / seconds

        found = _ceilings(request.config, device)
        floor = found.floor(case.roof, case.flops, case.bytes)
        figures = {
            "backend": backend,
            "dtype": case.dtype,
            "error": error,
            "ratio_to_reference": ratio,
            "flops": case.flops,
            "bytes": case.bytes,
            "of_roofline": None if floor is None else floor / seconds,
            "peak_bytes": peak,
            "seconds": seconds,
        }
        benchmark.group = f"{case.op} {case.id} {device}"
        benchmark.extra_info.update(figures)
        benchmark.extra_info.update(_machine(device))
        benchmark.pedantic(lambda: _synchronised(call, inputs, at), rounds=3, warmup_rounds=1)
        judged = backend == case.goal_on and device == "cpu" and bench_threads == 1
        goal = case.goal if judged else None
        del figures["ratio_to_reference"]
        request.config.stash[_ROWS].setdefault(device, []).append(
            {
                "op": case.op,
                "shape": case.shape,
                "ratio": ratio,
                "goal": goal,
                **figures,
            }
        )
        if request.config.getoption("--gate") and goal is not None:
            assert ratio is not None and ratio >= goal, f"{case.op} {case.id}: {ratio:.2f}x, at least {goal}x"
        return ratio

    return run


@pytest.fixture
def bench_row(request: pytest.FixtureRequest) -> Callable[..., None]:
    """bench_row(op=, shape=, dtype=, backend=, seconds=, ratio=, goal=, error=, flops=, bytes=, unit=): into the table.

    For benches that compare with something else than the case's twin, on one CPU thread; the caller has checked the
    result.
    """

    def add(*, unit: str, seconds: float, flops: float, bytes: float, **row: Any) -> None:
        floor = _ceilings(request.config, "cpu").floor(unit, flops, bytes)
        share = None if floor is None else floor / seconds
        request.config.stash[_ROWS].setdefault("cpu", []).append(
            {
                **row,
                "seconds": seconds,
                "flops": flops,
                "bytes": bytes,
                "of_roofline": share,
                "peak_bytes": None,
            }
        )

    return add


def _forced(case: Case, backend: str, inputs: tuple[Any, ...]) -> Callable[..., Any]:
    if not any(row.name == backend for row in fastedit.explain(case.op)):
        pytest.skip(f"{case.op} has no implementation {backend}")

    def call(*args: Any) -> Any:
        with fastedit.backend(backend):
            return case.ours(*args)

    return call


def _ceilings(config: pytest.Config, device: str) -> ceilings.Ceilings:
    """Measured once a run, on the threads of this run."""
    known = config.stash[_CEILINGS]
    if device not in known:
        known[device] = ceilings.measure(device)
    return known[device]


def _synchronised(call: Callable[..., Any], inputs: tuple[Any, ...], device: torch.device) -> None:
    call(*inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _machine(device: str) -> dict[str, Any]:
    report = fastedit.ops._dispatch.report()
    return {**record.machine(device), "isa": report["_cpu"].get("isa", "none")}


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    threads = config.getoption("--wall-threads")
    for device, rows in config.stash[_ROWS].items():
        found = config.stash[_CEILINGS][device]
        clocked = "CUDA events" if device == "cuda" else f"{threads} threads, wall clock"
        if device == "cpu" and threads == 1:
            clocked = "one thread, process time"
        terminalreporter.section(f"ops on {device}: medians, ratio to the reference twin; {clocked}")
        op_table.show(
            rows, Console(file=terminalreporter._tw._file, width=max(terminalreporter._tw.fullwidth, 150))
        )
        peaks = ", ".join(f"{unit} {rate / 1e9:.0f} GF/s" for unit, rate in found.flops.items())
        terminalreporter.write_line(f"roof: {peaks}, {found.bandwidth / 1e9:.1f} GB/s ({found.source})")
        document = f"{device}-ops" if threads == 1 or device == "cuda" else f"{device}-ops-{threads}-threads"
        path = op_table.keep(rows, config.stash[_TRIED].get(device, set()), found, document, device)
        picture = path.with_name(path.stem.replace("ops", "roofline") + ".png")
        op_table.plot(op_table.kept(path), found, picture, f"Ops, {clocked}")
        terminalreporter.write_line(f"written: {path} and {picture.name}")
