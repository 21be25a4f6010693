"""Causal tracing of one prompt on a random GPT-2-medium-size model against the naive twin: 20 tokens, subject at 2-5.

One thread, process time, fp32, twin and fastedit in one process. A cell costs the twin one full run (two for severed
ones) wherever it is, so it is timed on SAMPLED cells, before and after ours, and scaled to the grid; those cells'
values are compared here, and those of every cell on a smaller model of the same prompt. Figures go to
bench/results/cpu-trace.json.

FASTEDIT_BENCH_LAYERS (24) shortens a run; a short one is neither judged nor recorded.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import engine_model as made
import numpy as np
import pytest
import torch
from judge import report
from reference.trace import severed as twin_severed
from reference.trace import trace as twin_trace

from fastedit.trace import Noise, TraceOptions, TracePrompt, trace_prompts

LAYERS = int(os.environ.get("FASTEDIT_BENCH_LAYERS", "24"))
FULL = LAYERS >= 24
TOKENS, SPAN, SAMPLES, WINDOW, SAMPLED = 20, (2, 6), 10, 10, 3
LEAST = {"hidden": {"ratio": 5.0}, "all kinds": {"ratio": 4.5}, "severed": {"ratio": 8.0}}
KINDS = {
    "hidden": ("hidden",),
    "all kinds": ("hidden", "mlp", "attn"),
    "severed": ("severed_mlp",),
}

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(7200)]


def prompt_of(ed: Any) -> TracePrompt:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, ed.model.config.vocab_size - 1, (TOKENS,), generator=generator).tolist()
    words = tuple(ed.tokenizer.decode([i]) for i in ids)
    return TracePrompt("".join(words), "".join(words[slice(*SPAN)]), tuple(ids), SPAN, None, words)


def draws_of(ed: Any) -> torch.Tensor:
    scale = torch.tensor(3 * ed.session.arch.embed.weight.std().item(), dtype=torch.float64)
    return Noise(samples=SAMPLES).draw(SPAN[1] - SPAN[0], ed.session.arch.width, scale)[0]


def twin(ed: Any, prompt: TracePrompt, kind: str, noise: torch.Tensor, cells: Any, answer: int) -> np.ndarray:
    arch = ed.session.arch
    names = {part: [arch.name(part, i) for i in range(arch.depth)] for part in ("block", "mlp", "attn")}
    given = (ed.model, torch.tensor(prompt.ids), "transformer.wte")
    if kind == "severed_mlp":
        found = twin_severed(*given, names["block"], names["mlp"], SPAN[0], noise, answer, cells=cells)
        return found.numpy()
    part, window = ("block", None) if kind == "hidden" else (kind, WINDOW)
    return twin_trace(*given, names[part], SPAN[0], noise, window=window, cells=cells)[0].double().numpy()


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    found = call()
    return time.process_time() - start, found


@pytest.fixture(scope="module")
def ed() -> Any:
    return made.editor({**made.GPT2_MEDIUM, "n_layer": LAYERS})


@pytest.mark.parametrize("name", KINDS)
def test_every_cell_on_a_smaller_model(name: str) -> None:
    small = made.editor({**made.GPT2_MEDIUM, "n_layer": 6, "n_embd": 64, "n_head": 4, "vocab_size": 2048})
    prompt, noise = prompt_of(small), draws_of(small)
    options = TraceOptions(kinds=KINDS[name], window=WINDOW)
    (found,) = trace_prompts(small.session, [prompt], options, draws=[[noise]])
    for kind, grid in found.scores.items():
        expected = twin(small, prompt, kind, noise, None, found.answer_id)
        assert np.abs(grid - expected).max() <= 1e-5


@pytest.mark.parametrize("name", KINDS)
def test_trace(benchmark: Any, ed: Any, name: str) -> None:
    kinds = KINDS[name]
    prompt, noise = prompt_of(ed), draws_of(ed)
    options = TraceOptions(kinds=kinds, window=WINDOW)
    rng = np.random.default_rng(0)
    cells = [
        (int(t), int(layer))
        for t, layer in zip(rng.integers(SPAN[0], TOKENS, SAMPLED), rng.integers(0, LAYERS - 1, SAMPLED))
    ]
    (first,) = trace_prompts(
        ed.session, [prompt], TraceOptions(kinds=kinds, window=WINDOW, tokens="subject_last"), draws=[[noise]]
    )
    before = {
        kind: timed(lambda k=kind: twin(ed, prompt, k, noise, cells, first.answer_id)) for kind in kinds
    }
    seconds, (found,) = benchmark.pedantic(
        lambda: timed(lambda: trace_prompts(ed.session, [prompt], options, draws=[[noise]])), rounds=1
    )
    after = {kind: timed(lambda k=kind: twin(ed, prompt, k, noise, cells, first.answer_id)) for kind in kinds}
    error = max(
        abs(found.scores[kind][cell] - value[cell]) for kind, (_, value) in before.items() for cell in cells
    )
    assert error <= 1e-5, f"probabilities differ by {error:.1e}"
    # Beside the cells' runs the twin of ordinary kinds makes one that restores nothing.
    per_cell = {
        kind: (before[kind][0] + after[kind][0]) / 2 / (SAMPLED if name == "severed" else SAMPLED + 1)
        for kind in kinds
    }
    naive = sum(per_cell.values()) * TOKENS * LAYERS
    figures = {
        "layers": LAYERS,
        "tokens": TOKENS,
        "samples": SAMPLES,
        "seconds": seconds,
        "reference_seconds": naive,
        "ratio": naive / seconds,
        "sampled_cells": SAMPLED,
        "twin_after_over_before": sum(s for s, _ in after.values()) / sum(s for s, _ in before.values()),
        "error": error,
    }
    report("cpu-trace", name, benchmark, figures, LEAST[name], judged=FULL)
