"""MEMIT with the frozen layers in bf16 on a CPU with AMX: speed against the fp32 twin, and what it does to the results.

The same GPT-2-medium-size model, facts and settings as test_engines.py, 16 edits. Residuals, losses and targets stay
fp32 in either run; the change is reported as the targets' losses and as the updates' relative difference.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engine_model as made
import pytest
import torch
from judge import report
from memit_case import MemitCase
from twin_cost import timed

EDITS = 16


def has_amx() -> bool:
    path = Path("/proc/cpuinfo")
    return path.exists() and "amx_bf16" in path.read_text()


def final(edit: Any, term: str) -> float:
    """Mean over edits of a term of the last loss."""
    rows = edit.info["losses"]
    return sum(float(row["last"][term]) for row in rows) / len(rows)


@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("one_thread")
@pytest.mark.skipif(not has_amx(), reason="needs a CPU with AMX (bf16 products are slow without)")
def test_memit_bf16(benchmark: Any) -> None:
    case = MemitCase(made.editor(), EDITS, made.MEMIT, sampled=2)
    targets = case.time_targets()
    theirs = case.twin_seconds(targets)
    errors = case.compare(targets)
    exact_seconds, exact = timed(case.solve)

    half = made.editor(dtype=torch.bfloat16)
    with torch.no_grad():
        # The same weights, rounded: drawing in bf16 would give others.
        half.model.load_state_dict(case.ed.model.state_dict())
    made.second_moments(half, case.layers)
    seconds, edit = benchmark.pedantic(lambda: timed(lambda: case.solve(ed=half)), rounds=1)
    difference = max(
        float((ours.dense().float() - want.dense()).norm() / want.dense().norm())
        for ours, want in zip(edit.deltas, exact.deltas, strict=True)
    )
    figures = {
        "edits": EDITS,
        "steps": case.steps,
        "seconds": seconds,
        "seconds_fp32": exact_seconds,
        "seconds_wall_by_phase": edit.info["seconds"],
        "twin_seconds": sum(theirs.values()),
        "twin_scaled_from": case.twin_scaled_from,
        "ratio": sum(theirs.values()) / seconds,
        "ratio_fp32": sum(theirs.values()) / exact_seconds,
        "nll_bf16_over_fp32": final(edit, "nll") / final(exact, "nll"),
        "probability": {"bf16": final(edit, "probability"), "fp32": final(exact, "probability")},
        "updates_relative_difference": difference,
        **errors,
    }
    report("cpu-engines", "memit bf16", benchmark, figures, {"ratio": 12.0})
