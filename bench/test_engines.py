"""ROME and MEMIT on a random GPT-2-medium-size model, published hyper-parameters, against the naive twins.

One thread, process time, fp32, twin and fastedit in one process. The twin runs on a few edits and SAMPLED steps and is
scaled (twin_cost.py says how); results are compared on those edits at those steps. A random model never reaches the
early-stop loss, so every search runs all its steps. The twin's step is timed again at the end: if "after over before"
is far from one, the machine's load changed during the run. Figures go to bench/results/cpu-engines.json.

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
from reference.memit import memit as naive_memit
from reference.rome import rome as naive_rome
from twin_cost import SAMPLED, equation_seconds, key_seconds, time_targets, timed

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
    naive = targets.seconds([twin], steps) + setup - inverse

    short, found = timed(lambda: ed.solve(request, "rome", options, v_num_grad_steps=SAMPLED))
    error = error_of(found, {name: expected})
    given = error_of(ed.solve(request, "rome", options, targets=value[None]), {name: expected})
    green(error, given)
    seconds, edit = benchmark.pedantic(
        lambda: timed(lambda: ed.solve(request, "rome", options, v_num_grad_steps=steps)), rounds=1
    )
    drift = time_targets(ed.model, name, [twin], hyper).step / targets.step
    step = (seconds - short) / max(1, steps - SAMPLED)
    flops = Flops.of(ed.model.config)
    ours = flops.our_targets([twin], layer, steps)
    theirs = flops.twin_targets([twin], layer, steps) + flops.twin_keys([twin], 1, bare=False)
    figures = {
        "steps": steps,
        "tokens": made.statistics_of(ed.tokenizer, [request]),
        "steps_run": edit.info["losses"][0]["steps"],
        "seconds": seconds,
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
    hyper = dict(made.MEMIT)
    layers, steps, lam = hyper.pop("layers"), min(STEPS, int(hyper.pop("steps"))), float(hyper.pop("lam"))
    contexts = made.templates(((10, 5),))
    requests = made.facts(EDITS)
    twins = [made.twin_request(ed.tokenizer, r, contexts, (1, len(contexts) - 1)) for r in requests]
    chosen = list(range(0, EDITS, max(1, EDITS // 3)))[:3]
    few, few_twins = [requests[i] for i in chosen], [twins[i] for i in chosen]
    C = made.second_moments(ed, layers)
    arch = ed.session.arch
    sites = {"module": f"{arch.row.block}.{arch.row.mlp_out}", "site": arch.row.block}
    module, site = (sites[side].format(layers[-1]) for side in ("module", "site"))
    options = {
        "layers": layers,
        "context_templates": ((contexts[0],), tuple(contexts[1:])),
        "mom2_update_weight": lam,
    }

    targets = time_targets(ed.model, site, few_twins, hyper)
    search = targets.seconds(twins, steps)
    keys = key_seconds(ed.model, module, site, few_twins, twins, len(layers))
    equations = equation_seconds(C[layers[0]], EDITS, arch.width, lam, len(layers))
    found = naive_memit(ed.model, few_twins, layers=layers, **sites, C=C, lam=lam, targets=targets.values)
    expected = {arch.name("mlp_out", layer): delta for layer, delta in found.items()}

    error = error_of(ed.solve(few, "memit", options, v_num_grad_steps=SAMPLED), expected)
    given = error_of(ed.solve(few, "memit", options, targets=targets.values), expected)
    green(error, given)
    seconds, edit = benchmark.pedantic(
        lambda: timed(lambda: ed.solve(requests, "memit", options, v_num_grad_steps=steps)), rounds=1
    )
    some = torch.randn(EDITS, arch.width, generator=torch.Generator().manual_seed(0))
    alone, written = timed(lambda: ed.solve(requests, "memit", options, targets=some))
    drift = time_targets(ed.model, site, few_twins[:1], hyper).step / targets.step
    phases, sweep = shared(edit, seconds), shared(written, alone)["sweep"]

    flops, naive = Flops.of(ed.model.config), search + keys + equations
    ours = {
        "targets": flops.our_targets(twins, layers[-1], steps),
        "sweep": flops.our_sweep(twins, layers),
        "equations": flops.our_equations(EDITS, len(layers)),
    }
    theirs = {
        "targets": flops.twin_targets(twins, layers[-1], steps),
        "sweep": flops.twin_keys(twins, len(layers)),
        "equations": flops.twin_equations(EDITS, len(layers)),
    }
    figures = {
        "steps": steps,
        "edits": EDITS,
        "tokens": made.statistics_of(ed.tokenizer, requests),
        "steps_run": sorted({row["steps"] for row in edit.info["losses"]}),
        "seconds": seconds,
        "seconds_by_phase": phases,
        "seconds_sweep_targets_given": sweep,
        "twin_seconds": naive,
        "twin_seconds_by_phase": {"targets": search, "sweep": keys, "equations": equations},
        "twin_scaled_from": f"{len(few)} edits, {SAMPLED} steps, one of {len(layers)} equations",
        "twin_step_after_over_before": drift,
        "ratio": naive / seconds,
        "ratio_keys": keys / sweep,
        "ratio_by_phase": {
            "targets": search / phases["targets"],
            "sweep": keys / phases["sweep"],
            "equations": equations / phases["equations"],
        },
        "ratio_of_flops": sum(theirs.values()) / sum(ours.values()),
        "ratio_of_flops_by_phase": {phase: theirs[phase] / ours[phase] for phase in ours},
        "gflops": sum(ours.values()) / seconds / 1e9,
        "gflops_by_phase": {phase: ours[phase] / phases[phase] / 1e9 for phase in ours},
        "twin_gflops": sum(theirs.values()) / naive / 1e9,
        "error": error,
        "error_targets_given": given,
    }
    report(
        "cpu-engines",
        "memit",
        benchmark,
        figures,
        {"ratio": 6.0, "ratio_keys": 30.0},
        judged=EDITS >= 64 and STEPS >= 20,
    )
