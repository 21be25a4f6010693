"""ROME and MEMIT on a random GPT-2-medium-size model, published hyper-parameters, against the naive twins.

One thread, process time, fp32, twin and fastedit in one process. The twin runs on a few edits and SAMPLED steps and is
scaled (twin_cost.py says how); results are compared on those edits at those steps. A random model never reaches the
early-stop loss, so every search runs all its steps. The twin is timed before and after ours and averaged: if "after
over before" is far from one, the machine's load changed during the run. Figures go to bench/results/cpu-engines.json.

FASTEDIT_BENCH_EDITS (64) and FASTEDIT_BENCH_STEPS (20) shorten a run; a short one is neither judged nor recorded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import engine_model as made
import pytest
import torch
from engine_flops import Flops
from judge import error_of, green, report
from memit_case import MemitCase
from reference.rome import rome as naive_rome
from twin_cost import SAMPLED, time_targets, timed

EDITS = int(os.environ.get("FASTEDIT_BENCH_EDITS", "64"))
STEPS = int(os.environ.get("FASTEDIT_BENCH_STEPS", "20"))
FULL = EDITS >= 64 and STEPS >= 20

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def ed() -> Iterator[Any]:
    yield made.editor()


def shared(edit: Any, seconds: float) -> dict[str, float]:
    """Process seconds by phase: the phases' shares of the wall clock of the solve, times its process time."""
    wall = edit.info["seconds"]
    return {
        phase: seconds * wall.get(phase, 0.0) / wall["solve"] for phase in ("targets", "sweep", "equations")
    }


def test_rome_one_edit(benchmark: Any, ed: Any) -> None:
    hyper = dict(made.ROME)
    layer, steps = int(hyper.pop("layer")), min(STEPS, int(hyper.pop("steps")))
    contexts = made.templates(((5, 10), (10, 10)))
    request = made.facts(EDITS)[0]
    twin = made.twin_request(ed.tokenizer, request, contexts)
    C = made.second_moments(ed, (layer,))[layer]
    name = ed.session.arch.name("mlp_out", layer)
    options = {"layers": (layer,), "context_templates": tuple(contexts)}

    targets = time_targets(ed.model, name, [twin], hyper)
    value = targets.values[0]
    setup, expected = timed(lambda: naive_rome(ed.model, twin, module=name, site=name, C=C, target=value))
    # The original inverts C once per layer and process, so its inverse is taken off, as our factor is made before.
    inverse, _ = timed(lambda: torch.linalg.inv(C))

    short, found = timed(lambda: ed.solve(request, "rome", options, v_num_grad_steps=SAMPLED))
    error = error_of(found, {name: expected})
    given = error_of(ed.solve(request, "rome", options, targets=value[None]), {name: expected})
    green(error, given)
    seconds, edit = benchmark.pedantic(
        lambda: timed(lambda: ed.solve(request, "rome", options, v_num_grad_steps=steps)), rounds=1
    )
    later = time_targets(ed.model, name, [twin], hyper)
    targets, drift = targets.mean(later), later.step / targets.step
    naive = targets.seconds([twin], steps) + setup - inverse
    step = (seconds - short) / max(1, steps - SAMPLED)
    flops = Flops.of(ed.model.config)
    ours = flops.our_targets([twin], layer, steps)
    theirs = flops.twin_targets([twin], layer, steps) + flops.twin_keys([twin], 1, bare=False)
    figures = {
        "steps": steps,
        "tokens": made.statistics_of(ed.tokenizer, [request]),
        "steps_run": edit.info["losses"][0]["steps"],
        "seconds": seconds,
        "seconds_by_phase": shared(edit, seconds),
        "seconds_step": step,
        "seconds_setup": seconds - steps * step,
        "twin_seconds": naive,
        "twin_seconds_step": targets.seconds([twin], 2) - targets.seconds([twin], 1),
        "twin_seconds_setup": setup - inverse,
        "twin_seconds_inverse": inverse,
        "twin_scaled_from": f"{SAMPLED} steps",
        "twin_step_after_over_before": drift,
        "ratio": naive / seconds,
        "ratio_of_flops": theirs / ours,
        "gflops": ours / seconds / 1e9,
        "twin_gflops": theirs / naive / 1e9,
        "error": error,
        "error_targets_given": given,
    }
    report("cpu-engines", "rome", benchmark, figures, {"ratio": 4.0}, judged=FULL)


def test_memit(benchmark: Any, ed: Any) -> None:
    case = MemitCase(ed, EDITS, {**made.MEMIT, "steps": min(STEPS, int(made.MEMIT["steps"]))}, sampled=2)
    targets = case.time_targets()
    errors = case.compare(targets)

    seconds, edit = benchmark.pedantic(lambda: timed(case.solve), rounds=1)
    alone, written = timed(case.solve_given)
    later = case.time_targets()
    theirs, drift = case.twin_seconds(targets.mean(later)), later.step / targets.step
    ours, sweep = shared(edit, seconds), shared(written, alone)["sweep"]
    our_flops, twin_flops = case.our_flops(), case.twin_flops()
    figures = {
        "edits": EDITS,
        "steps": case.steps,
        "tokens": made.statistics_of(ed.tokenizer, case.requests),
        "steps_run": sorted({row["steps"] for row in edit.info["losses"]}),
        "seconds": seconds,
        "seconds_by_phase": ours,
        "seconds_sweep_targets_given": sweep,
        "twin_seconds": sum(theirs.values()),
        "twin_seconds_by_phase": theirs,
        "twin_scaled_from": case.twin_scaled_from,
        "twin_step_after_over_before": drift,
        "ratio": sum(theirs.values()) / seconds,
        "ratio_keys": theirs["sweep"] / sweep,
        "ratio_by_phase": {phase: theirs[phase] / ours[phase] for phase in theirs},
        "ratio_of_flops": sum(twin_flops.values()) / sum(our_flops.values()),
        "ratio_of_flops_by_phase": {phase: twin_flops[phase] / our_flops[phase] for phase in theirs},
        "gflops": sum(our_flops.values()) / seconds / 1e9,
        "gflops_by_phase": {phase: our_flops[phase] / ours[phase] / 1e9 for phase in theirs},
        "twin_gflops": sum(twin_flops.values()) / sum(theirs.values()) / 1e9,
        "twin_gflops_by_phase": {phase: twin_flops[phase] / theirs[phase] / 1e9 for phase in theirs},
        **errors,
    }
    report("cpu-engines", "memit", benchmark, figures, {"ratio": 6.0, "ratio_keys": 30.0}, judged=FULL)
