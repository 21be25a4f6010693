"""Cost per MEMIT edit from 1 to 1,000 edits in one call: process seconds on one thread, by phase, with the curve.

A smaller model and five gradient steps keep it bearable: 8 layers, width 512, vocabulary 16384, layers 2 to 4 edited.
Fewer steps make the equations' share larger than in use, so growth with n would show the sooner. Writes
bench/results/cost-per-edit.json and .png.
"""

from __future__ import annotations

import json
import statistics
from typing import Any

import engine_model as made
import pytest
import record
import torch
from twin_cost import timed

SHAPE = {"n_layer": 8, "n_embd": 512, "n_head": 8, "vocab_size": 16384, "n_positions": 128}
LAYERS, STEPS = (2, 3, 4), 5
COUNTS = (1, 4, 16, 64, 256, 1000)
PHASES = ("targets", "sweep", "equations", "rest")
GROWTH = 1.1


def by_phase(edit: Any, seconds: float, count: int) -> dict[str, float]:
    """Process milliseconds per edit: each phase has its share of the wall clock of the solve."""
    wall = edit.info["seconds"]
    shares = {phase: wall.get(phase, 0.0) / wall["solve"] for phase in PHASES[:3]}
    shares["rest"] = 1.0 - sum(shares.values())
    return {phase: 1e3 * seconds * share / count for phase, share in shares.items()}


def plot(rows: list[dict[str, Any]], path: Any) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="install matplotlib to get the plot")
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    edits = [row["edits"] for row in rows]
    axes.plot(edits, [row["ms_per_edit"] for row in rows], "k-o", label="all")
    for phase in PHASES:
        axes.plot(edits, [row["by_phase"][phase] for row in rows], "--", marker=".", label=phase)
    axes.set(xscale="log", yscale="log", xlabel="edits in one call", ylabel="ms of CPU per edit")
    axes.set_title("MEMIT, one thread: cost per edit")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("one_thread")
def test_cost_per_edit_does_not_grow(benchmark: Any) -> None:
    ed = made.editor(SHAPE)
    made.second_moments(ed, LAYERS)
    contexts = made.templates(((10, 5),), SHAPE["vocab_size"])
    requests = made.facts(max(COUNTS), SHAPE["vocab_size"])
    options = {
        "layers": LAYERS,
        "v_num_grad_steps": STEPS,
        "context_templates": ((contexts[0],), tuple(contexts[1:])),
    }
    ed.solve(requests[:2], "memit", options)

    def measure(count: int) -> dict[str, Any]:
        rounds = {64: 2, 256: 1, 1000: 1}.get(count, 3)
        runs = [timed(lambda: ed.solve(requests[:count], "memit", options)) for _ in range(rounds)]
        seconds = statistics.median(seconds for seconds, _ in runs)
        return {
            "edits": count,
            "ms_per_edit": 1e3 * seconds / count,
            "by_phase": by_phase(runs[-1][1], seconds, count),
            "tokens": made.statistics_of(ed.tokenizer, requests[:count]),
        }

    rows = benchmark.pedantic(lambda: [measure(count) for count in COUNTS], rounds=1)
    cost = {row["edits"]: row["ms_per_edit"] for row in rows}
    growth = cost[1000] / cost[64]
    figures = {"shape": SHAPE, "layers": LAYERS, "steps": STEPS, "curve": rows, "growth_64_to_1000": growth}
    figures["growth_1_to_1000"] = cost[1000] / cost[1]
    benchmark.extra_info.update(record.rounded(figures))
    print("\n" + "\n".join(json.dumps(record.rounded(row)) for row in rows))
    path = record.write("cost-per-edit", "cpu", figures)
    plot(rows, path.with_suffix(".png"))
    assert torch.get_num_threads() == 1
    assert growth <= GROWTH, f"an edit of 1000 costs {growth:.2f} x one of 64, at most {GROWTH}"
