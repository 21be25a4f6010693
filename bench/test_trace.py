"""Causal tracing of one prompt on a random GPT-2-medium-size model against the naive twin: 20 tokens, subject at 2-5.

One thread, process time, fp32, twin and fastedit in one process. A cell costs the twin one full run wherever it is (two
of severed kinds, one in the last layer), so it is timed on three cells, before and after ours, and scaled to the grid;
those cells' values are compared here, and those of every cell on a smaller model of the same prompt. Weights have the
scale of a trained model, and errors are in units of the largest effect. Figures go to bench/results/cpu-trace.json.

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
from judge import effect_error, report, same_effects
from reference.trace import run
from reference.trace import severed as twin_severed
from reference.trace import trace as twin_trace

from fastedit.trace import Noise, TraceOptions, TracePrompt, trace_prompts

LAYERS = int(os.environ.get("FASTEDIT_BENCH_LAYERS", "24"))
FULL = LAYERS >= 24
TOKENS, SPAN, SAMPLES, WINDOW = 20, (2, 6), 10, 10
SMALL = {"n_layer": 6, "n_embd": 64, "n_head": 4, "vocab_size": 2048, "n_positions": 1024}
LEAST = {"hidden": {"ratio": 5.0}, "all kinds": {"ratio": 4.5}, "severed": {"ratio": 8.0}}
KINDS = {
    "hidden": ("hidden",),
    "all kinds": ("hidden", "mlp", "attn"),
    "severed": ("severed_mlp",),
}

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(7200)]


def editor(shape: dict[str, int]) -> Any:
    found = made.editor(shape)
    made.trained_scale(found.model)
    return found


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


def sampled(layers: int) -> list[tuple[int, int]]:
    """Cells of different tokens and depths: the subject's last token, one behind it, and the last one."""
    return [
        (SPAN[1] - 1, 1),
        (TOKENS // 2, layers // 2),
        (TOKENS - 1, max(0, min(layers - 2, 3 * layers // 4))),
    ]


def ours(ed: Any, kinds: tuple[str, ...], tokens: Any = "all") -> Any:
    options = TraceOptions(kinds=kinds, window=WINDOW, tokens=tokens)
    return trace_prompts(ed.session, [prompt_of(ed)], options, draws=[[draws_of(ed)]])[0]


def twin_ends(ed: Any) -> tuple[int, float, float]:
    """The answer, and its probability corrupted and clean."""
    p = run(ed.model, torch.tensor(prompt_of(ed).ids), "transformer.wte", SPAN[0], draws_of(ed))
    answer = int(p[0].argmax())
    return answer, float(p[1:, answer].mean()), float(p[0, answer])


def grid_error(ed: Any, found: Any) -> float:
    """Of every cell of a trace, in units of the largest effect of its kind."""
    answer, low, high = twin_ends(ed)
    assert found.answer_id == answer
    prompt, noise = prompt_of(ed), draws_of(ed)
    return max(
        effect_error(grid, twin(ed, prompt, kind, noise, None, answer), low, high)
        for kind, grid in found.scores.items()
    )


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    found = call()
    return time.process_time() - start, found


@pytest.fixture(scope="module")
def ed() -> Any:
    return editor({**made.GPT2_MEDIUM, "n_layer": LAYERS})


@pytest.mark.parametrize("name", KINDS)
def test_every_cell_on_a_smaller_model(name: str) -> None:
    small = editor(SMALL)
    same_effects(grid_error(small, ours(small, KINDS[name])))


def figures_of(ed: Any, name: str) -> dict[str, Any]:
    """Ours, timed, between two timings of the twin on sampled cells, whose values are compared."""
    kinds, layers = KINDS[name], ed.session.arch.depth
    prompt, noise, cells = prompt_of(ed), draws_of(ed), sampled(layers)
    answer, low, high = twin_ends(ed)

    def naive() -> dict[str, tuple[float, np.ndarray]]:
        return {kind: timed(lambda k=kind: twin(ed, prompt, k, noise, cells, answer)) for kind in kinds}

    ours(ed, kinds, "subject_last")  # warm
    before = naive()
    seconds, found = timed(lambda: ours(ed, kinds))
    after = naive()
    assert found.answer_id == answer
    at = tuple(np.array(cells).T)
    error = max(
        effect_error(found.scores[kind][at], value[at], low, high) for kind, (_, value) in before.items()
    )
    same_effects(error)
    total = sum((before[kind][0] + after[kind][0]) / 2 for kind in kinds)
    # Beside the cells' runs the twin of ordinary kinds makes one that restores nothing; that of severed ones makes two
    # runs a cell, and in the last layer one.
    if name == "severed":
        per_cell = total / len(cells) * (2 * layers - 1) / (2 * layers)
    else:
        per_cell = total / (len(cells) + 1)
    twin_seconds = per_cell * TOKENS * layers
    return {
        "layers": layers,
        "tokens": TOKENS,
        "samples": SAMPLES,
        "seconds": seconds,
        "reference_seconds": twin_seconds,
        "ratio": twin_seconds / seconds,
        "sampled_cells": len(cells),
        "twin_after_over_before": sum(s for s, _ in after.values()) / sum(s for s, _ in before.values()),
        "probabilities": [low, high],
        "error_of_effect": error,
    }


@pytest.mark.parametrize("name", KINDS)
def test_trace(benchmark: Any, ed: Any, name: str) -> None:
    figures = benchmark.pedantic(lambda: figures_of(ed, name), rounds=1)
    report("cpu-trace", name, benchmark, figures, LEAST[name], judged=FULL)
