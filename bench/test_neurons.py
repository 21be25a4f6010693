"""Knowledge neurons on a random GPT-2-medium-size model: all layers in one sweep against full forwards per layer.

One thread, process time, fp32, both in one process. The twin runs SAMPLED layers and is scaled: its time falls linearly
with the layer (the backward ends there), and the sampled layers' mean is the mean of all. Scores are compared on them;
tests/trace/test_neurons.py compares every layer of smaller models. The twin is timed before and after ours and
averaged. Figures go to bench/results/cpu-neurons.json, a section a length of the prompt.

FASTEDIT_BENCH_LAYERS (24) shortens a run; a short one is neither judged nor recorded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import engine_model as made
import pytest
import torch
from judge import report
from reference.neurons import layer_scores
from twin_cost import timed

from fastedit.trace.neurons import NeuronOptions, attribute, fractions
from fastedit.trace.neurons_questions import Row

LAYERS = int(os.environ.get("FASTEDIT_BENCH_LAYERS", "24"))
STEPS = 20
# The mean of the sampled layers is that of all.
SAMPLED = (0, 7, 16, 23) if LAYERS == 24 else (0, LAYERS - 1)

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def ed() -> Iterator[Any]:
    yield made.editor({**made.GPT2_MEDIUM, "n_layer": LAYERS})


@pytest.mark.parametrize("tokens", [20, 10])
def test_neurons(benchmark: Any, ed: Any, tokens: int) -> None:
    arch = ed.session.arch
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, made.GPT2_MEDIUM["vocab_size"], (tokens,), generator=generator).tolist()
    answer, options = 123, NeuronOptions(steps=STEPS)

    def naive(layer: int) -> Any:
        name = arch.name("mlp_out", layer)
        return layer_scores(ed.model, name, ids, answer, fractions=fractions(STEPS, options.grid))[0]

    def ours() -> Any:
        layers = list(range(arch.depth))
        return attribute(ed.session, [(Row(tuple(ids), len(ids) - 1), (answer,))], layers, options)[0][0]

    naive(SAMPLED[-1])  # warm
    before = [timed(lambda layer=layer: naive(layer)) for layer in SAMPLED]
    scores = ours()
    errors = [
        float((scores[layer] - want).norm() / want.norm())
        for layer, (_, want) in zip(SAMPLED, before, strict=True)
    ]
    assert max(errors) <= 1e-4, f"scores differ by {max(errors):.1e}, at most 1e-4"
    seconds = (benchmark.pedantic(lambda: timed(ours), rounds=1)[0] + timed(ours)[0]) / 2
    after = [timed(lambda layer=layer: naive(layer)) for layer in SAMPLED]
    first, later = (sum(time for time, _ in rows) / len(SAMPLED) for rows in (before, after))
    twin = arch.depth * (first + later) / 2
    figures = {
        "tokens": tokens,
        "steps": STEPS,
        "layers": arch.depth,
        "seconds": seconds,
        "twin_seconds": twin,
        "twin_scaled_from": f"layers {SAMPLED}",
        "twin_after_over_before": later / first,
        "ratio": twin / seconds,
        "error": max(errors),
    }
    section = f"neurons, {tokens} tokens"
    report("cpu-neurons", section, benchmark, figures, {"ratio": 10.0}, judged=LAYERS == 24)
