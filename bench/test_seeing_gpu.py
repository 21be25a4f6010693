"""Causal tracing and knowledge neurons on a GPU: a random model of GPT-J-6B's shape, made on the device, in fp32.

The naive twins run without TF32, on sampled cells and layers (a cell costs them one run wherever it is; the time of a
layer's neurons falls linearly with the layer), and are scaled to all. fastedit runs without TF32 (the same dtype and
arithmetic as the twin) and with TF32 allowed, whose error is reported. Wall time, waited for; medians of ROUNDS.
Figures go to <device>-<date>-seeing.json.
"""

from __future__ import annotations

import gc
import re
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import engine_model as made
import numpy as np
import pytest
import record
import torch
from judge import effect_error, report
from reference.neurons import layer_scores
from reference.trace import trace as twin_trace
from twin_cost import timed

from fastedit.trace import Noise, TraceOptions, TracePrompt, trace_prompts
from fastedit.trace.neurons import NeuronOptions, attribute, fractions
from fastedit.trace.neurons_questions import Row

TOKENS, SPAN, SAMPLES, STEPS, ROUNDS = 20, (2, 6), 10, 20, 3
EXACT, TF32 = 1e-4, 5e-2
"""Largest error for which a time counts, in units of the scores or of the largest effect: without TF32, and with it."""
LEAST = {"ratio": 12.0, "ratio_tf32": 60.0}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.timeout(600),
]


@contextmanager
def products(tf32: bool) -> Iterator[None]:
    """Whether fp32 products may be rounded to TF32; put back afterwards."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(autouse=True)
def emptied() -> Iterator[None]:
    """Each model of 6 billion weights is gone before the next is made."""
    yield
    gc.collect()
    torch.cuda.empty_cache()


def token_ids(vocabulary: int) -> list[int]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, vocabulary - 1, (TOKENS,), generator=generator).tolist()


def measured(call: Callable[[], Any], device: str, tf32: bool) -> tuple[float, Any]:
    """Median seconds after a first call that loads and compiles, and the result."""
    with products(tf32):
        call()
        rounds = [timed(call, device) for _ in range(ROUNDS)]
    return statistics.median(seconds for seconds, _ in rounds), rounds[-1][1]


def compared(figures: dict[str, Any], naive: float, exact: float, rounded: float) -> dict[str, Any]:
    return {
        **figures,
        "seconds": exact,
        "seconds_tf32": rounded,
        "twin_seconds": naive,
        "ratio": naive / exact,
        "ratio_tf32": naive / rounded,
    }


def neurons_against_twin(shape: dict[str, int], device: str) -> dict[str, Any]:
    ed = made.editor(shape, device=device, dtype=torch.float32)
    arch, ids = ed.session.arch, token_ids(shape["vocab_size"])
    options, answer = NeuronOptions(steps=STEPS), 123 % shape["vocab_size"]
    sampled = sorted({0, arch.depth // 3, arch.depth - 1 - arch.depth // 3, arch.depth - 1})

    def naive(layer: int) -> Any:
        name = arch.name("mlp_out", layer)
        return layer_scores(ed.model, name, ids, answer, fractions=fractions(STEPS, options.grid))[0]

    def ours() -> Any:
        rows = [(Row(tuple(ids), len(ids) - 1), (answer,))]
        return attribute(ed.session, rows, range(arch.depth), options)[0][0]

    with products(False):
        naive(sampled[-1])
        theirs = [timed(lambda layer=layer: naive(layer), device) for layer in sampled]

    def error(scores: Any) -> float:
        pairs = [(scores[layer], want) for layer, (_, want) in zip(sampled, theirs, strict=True)]
        return max(float((found.to(want) - want).norm() / want.norm()) for found, want in pairs)

    (exact, scores), (rounded, loose) = (measured(ours, device, tf32) for tf32 in (False, True))
    figures = {
        "tokens": TOKENS,
        "steps": STEPS,
        "layers": arch.depth,
        "twin_scaled_from": f"layers {sampled}",
        "error": error(scores),
        "error_tf32": error(loose),
    }
    seconds = arch.depth * sum(seconds for seconds, _ in theirs) / len(sampled)
    return compared(figures, seconds, exact, rounded)


def trace_against_twin(shape: dict[str, int], device: str) -> dict[str, Any]:
    """Hidden states: every (token, layer); weights of a trained model's scale, so that there are effects."""
    ed = made.editor(shape, device=device, dtype=torch.float32)
    made.trained_scale(ed.model)
    arch, ids = ed.session.arch, token_ids(shape["vocab_size"])
    words = tuple(ed.tokenizer.decode([i]) for i in ids)
    prompt = TracePrompt("".join(words), "".join(words[slice(*SPAN)]), tuple(ids), SPAN, None, words)
    scale = torch.tensor(3 * arch.embed.weight.std().item(), dtype=torch.float64)
    noise = Noise(samples=SAMPLES).draw(SPAN[1] - SPAN[0], arch.width, scale)[0]
    names = [arch.name("block", layer) for layer in range(arch.depth)]
    cells = [(SPAN[1] - 1, 0), (SPAN[0], arch.depth // 2), (TOKENS - 1, arch.depth // 2)]

    def naive() -> Any:
        on = torch.tensor(ids, device=device)
        return twin_trace(ed.model, on, "transformer.wte", names, SPAN[0], noise.to(device), cells=cells)

    def ours() -> Any:
        return trace_prompts(ed.session, [prompt], TraceOptions(kinds=("hidden",)), draws=[[noise]])[0]

    with products(False):
        naive()
        total, (grid, low, high, answer) = timed(naive, device)
    want = np.array([float(grid[cell]) for cell in cells])

    def error(found: Any) -> float:
        assert found.answer_id == answer
        return effect_error(np.array([found.scores["hidden"][cell] for cell in cells]), want, low, high)

    (exact, found), (rounded, loose) = (measured(ours, device, tf32) for tf32 in (False, True))
    figures = {
        "tokens": TOKENS,
        "samples": SAMPLES,
        "layers": arch.depth,
        "twin_scaled_from": f"{len(cells)} cells",
        "probabilities": [low, high],
        "error": error(found),
        "error_tf32": error(loose),
    }
    # Beside the cells' runs the twin makes one that restores nothing.
    return compared(figures, total / (len(cells) + 1) * TOKENS * arch.depth, exact, rounded)


def green(figures: dict[str, Any]) -> None:
    """No time counts for values that are not the twin's."""
    assert figures["error"] <= EXACT, f"values differ by {figures['error']:.1e}, at most {EXACT:.0e}"
    assert figures["error_tf32"] <= TF32, f"with TF32 by {figures['error_tf32']:.1e}, at most {TF32:.0e}"


def document() -> str:
    """<device>-<date>-seeing."""
    about = record.machine("cuda")
    return re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-") + f"-{about['date']}-seeing"


@pytest.mark.parametrize("name", ["neurons", "trace"])
def test_seeing_fp32(benchmark: Any, name: str) -> None:
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs 40 GB of device memory: 24 GB of weights, and activations")
    run = {"neurons": neurons_against_twin, "trace": trace_against_twin}[name]
    figures = benchmark.pedantic(lambda: run(made.GPTJ_6B, "cuda"), rounds=1)
    green(figures)
    report(document(), f"{name} fp32", benchmark, figures, LEAST, device="cuda")
