"""The engines on a GPU: a random model of GPT-J-6B's shape, made on the device.

100 MEMIT edits in fp32 (no TF32) against the naive twin on two edits and SAMPLED steps, scaled as on the CPU; wall
time, waited for. The latency of one edit in bf16. Figures go to bench/results/<device>-<date>-engines.json.
"""

from __future__ import annotations

import gc
import re
import statistics
from collections.abc import Iterator
from typing import Any

import engine_model as made
import pytest
import record
import torch
from judge import report
from memit_case import MemitCase
from twin_cost import SAMPLED, timed

EDITS = 100
CONTEXTS = made.templates(((10, 5),), made.GPTJ_6B["vocab_size"])
ROME_CONTEXTS = made.templates(((5, 10), (10, 10)), made.GPTJ_6B["vocab_size"])

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.timeout(600),
]


@pytest.fixture(autouse=True)
def exact_and_empty() -> Iterator[None]:
    """fp32 means fp32; and each model of 6 billion weights is gone before the next is made."""
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    gc.collect()
    torch.cuda.empty_cache()


def gemm_ceiling(dtype: torch.dtype, device: str, size: int = 8192) -> float:
    """flop/s of a large square product of random matrices: what the device gives at best."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = [timed(lambda: a @ b, device)[0] for _ in range(8)]
    return 2.0 * size**3 / statistics.median(seconds[3:])


def gemm_seconds(call: Any, dtype_marks: str = r"gemm|cutlass|xmma") -> float:
    """Device seconds inside fp32 and half-precision matrix products (by kernel name) during a call."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    rows = [r for r in profile.key_averages() if re.search(dtype_marks, r.key, re.IGNORECASE)]
    return sum(r.self_device_time_total for r in rows if not re.search("dgemm|d884|f64", r.key)) / 1e6


def memit_against_twin(shape: dict[str, int], edits: int, device: str) -> dict[str, Any]:
    case = MemitCase(made.editor(shape, device=device), edits, made.MEMIT_GPTJ, sampled=2)
    case.time_targets()  # loads the libraries
    targets = case.time_targets()
    theirs = case.twin_seconds(targets)
    errors = case.compare(targets)
    case.C.clear()

    case.solve(v_num_grad_steps=2)  # compiles, captures, sizes the batches
    seconds, edit = timed(case.solve, device)
    wall, our_flops, twin_flops = edit.info["seconds"], case.our_flops(), case.twin_flops()
    figures = {
        "edits": edits,
        "steps": case.steps,
        "seconds": seconds,
        "seconds_by_phase": wall,
        "twin_seconds": sum(theirs.values()),
        "twin_seconds_by_phase": theirs,
        "twin_scaled_from": case.twin_scaled_from,
        "ratio": sum(theirs.values()) / seconds,
        "ratio_by_phase": {phase: theirs[phase] / wall[phase] for phase in theirs},
        "ratio_of_flops_by_phase": {phase: twin_flops[phase] / our_flops[phase] for phase in theirs},
        "tflops_targets": our_flops["targets"] / wall["targets"] / 1e12,
        "twin_tflops_targets": twin_flops["targets"] / theirs["targets"] / 1e12,
        **errors,
    }
    if device == "cuda":
        ceiling = gemm_ceiling(torch.float32, device)
        short = case.our_flops(SAMPLED)
        products = gemm_seconds(lambda: case.solve(v_num_grad_steps=SAMPLED))
        figures |= {
            "tflops_gemm_ceiling": ceiling / 1e12,
            "fraction_of_ceiling_targets": figures["tflops_targets"] * 1e12 / ceiling,
            "fraction_of_ceiling_gemm_kernels": (short["targets"] + short["sweep"]) / products / ceiling
            if products
            else None,
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        }
    return figures


def latency(shape: dict[str, int], device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Median seconds of one ROME and one MEMIT edit, factors made before."""
    ed = made.editor(shape, device=device, dtype=dtype)
    (request,) = made.facts(1, shape["vocab_size"])
    layers, steps = made.MEMIT_GPTJ["layers"], {"rome": 20, "memit": made.MEMIT_GPTJ["steps"]}
    groups = ((CONTEXTS[0],), tuple(CONTEXTS[1:]))
    options = {
        "rome": {"layers": (5,), "context_templates": tuple(ROME_CONTEXTS)},
        "memit": {"layers": layers, "context_templates": groups},
    }
    made.second_moments(ed, layers)
    figures: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch.")}
    for method, chosen in options.items():

        def solve(method: str = method, chosen: dict[str, Any] = chosen) -> Any:
            return ed.solve(request, method, chosen, v_num_grad_steps=steps[method])

        solve()
        runs = [timed(solve, device) for _ in range(5)]
        figures[method] = {
            "seconds": statistics.median(seconds for seconds, _ in runs),
            "seconds_by_phase": runs[-1][1].info["seconds"],
            "steps_run": runs[-1][1].info["losses"][0]["steps"],
        }
        figures[f"{method}_edits_per_second"] = 1 / figures[method]["seconds"]
    return figures


def document() -> str:
    """<device>-<date>-engines."""
    about = record.machine("cuda")
    return re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-") + f"-{about['date']}-engines"


def test_memit_fp32(benchmark: Any) -> None:
    if torch.cuda.get_device_properties(0).total_memory < 100e9:
        pytest.skip(
            "needs 100 GB of device memory: 24 GB of weights, 39 GB of fp64 statistics, the twin's solve"
        )
    figures = benchmark.pedantic(lambda: memit_against_twin(made.GPTJ_6B, EDITS, "cuda"), rounds=1)
    report(document(), "memit fp32", benchmark, figures, {"ratio": 25.0}, device="cuda")


def test_latency_bf16(benchmark: Any) -> None:
    if torch.cuda.get_device_properties(0).total_memory < 70e9:
        pytest.skip("needs 70 GB of device memory: 12 GB of weights, 39 GB of fp64 statistics")
    figures = benchmark.pedantic(lambda: latency(made.GPTJ_6B, "cuda", torch.bfloat16), rounds=1)
    least = {"rome_edits_per_second": 1 / 0.35, "memit_edits_per_second": 1 / 0.35}
    report(document(), "latency bf16", benchmark, figures, least, device="cuda")
