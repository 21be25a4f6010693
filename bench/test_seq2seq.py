"""Causal tracing and knowledge neurons of a random model of T5-small's shape against the naive twins.

20 source tokens with the subject at 2-5, and a decoder with one forced token. One thread, process time, fp32, twin and
fastedit in one process. A cell costs the twin one full run wherever it is (two of severed kinds, one in the last
layer), and a layer's neurons full forwards and backwards, so the twins are timed on sampled cells and layers, before
and after ours, and scaled. The sampled values are compared here, and those of every cell and layer on a smaller model
first. Weights have the scale of a trained model, and a trace's errors are in units of the largest effect. Figures go to
bench/results/cpu-trace.json and cpu-neurons.json, in sections of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import engine_model as made
import numpy as np
import pytest
import torch
from judge import effect_error, report, same_effects
from reference.neurons_seq2seq import layer_scores
from reference.trace_seq2seq import run
from transformers import T5Config, T5ForConditionalGeneration
from twin_cost import timed

from fastedit.arch import resolve
from fastedit.editor import Editor
from fastedit.trace import Noise, TraceOptions, TracePrompt, trace_prompts
from fastedit.trace.neurons import NeuronOptions, attribute, fractions
from fastedit.trace.neurons_questions import Row

T5_SMALL = {"d_model": 512, "d_ff": 2048, "d_kv": 64, "num_heads": 8, "num_layers": 6, "vocab_size": 32128}
SMALL = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4, "num_layers": 3, "vocab_size": 2048}
TOKENS, SPAN, SAMPLES, WINDOW, SAMPLED, STEPS = 20, (2, 6), 10, 3, 4, 20
PREFIX = " is"
KINDS = {
    "encoder": ("hidden", "mlp", "attn"),
    "encoder, severed": ("severed_mlp",),
    "decoder": ("hidden", "mlp", "attn", "cross"),
}
LEAST = {"encoder": 2.0, "encoder, severed": 2.0, "decoder": 4.0, "neurons": 4.0}
# The mean of the sampled layers is that of all.
LAYERS = (0, 5)

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(1800)]


def editor(shape: dict[str, int]) -> Editor:
    torch.manual_seed(0)
    end = shape["vocab_size"] - 1
    # A head of its own, as the later T5s have: with the embedding's, a decoder of this scale repeats its last token.
    special = {
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": end,
        "tie_word_embeddings": False,
    }
    model = T5ForConditionalGeneration(T5Config(**shape, **special)).eval().requires_grad_(False)
    made.trained_scale(model)
    return Editor(model, made.tokenizer(shape["vocab_size"]))


@pytest.fixture(scope="module")
def ed() -> Editor:
    return editor(T5_SMALL)


def source_of(ed: Any) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randint(0, ed.model.config.vocab_size - 1, (TOKENS,), generator=generator).tolist())


def prompt_of(ed: Any) -> TracePrompt:
    ids = source_of(ed)
    words = tuple(ed.tokenizer.decode([i]) for i in ids)
    return TracePrompt("".join(words), "".join(words[slice(*SPAN)]), ids, SPAN, None, words)


def draws_of(ed: Any) -> torch.Tensor:
    scale = torch.tensor(3 * ed.session.arch.embed.weight.std().item(), dtype=torch.float64)
    return Noise(samples=SAMPLES).draw(SPAN[1] - SPAN[0], ed.session.arch.width, scale)[0]


def behind_of(ed: Any) -> tuple[int, int]:
    return 0, ed.tokenizer.encode(PREFIX)[0]


def twin(ed: Any, side: str, kind: str, cells: Sequence[tuple[int, int]], answer: int) -> np.ndarray:
    """Values of the cells."""
    arch = resolve(ed.model, side=side)
    names = {
        part: [arch.name(part, i) for i in range(arch.depth)]  # type: ignore[arg-type]
        for part in ("block", "mlp", "attn", *(("cross",) if side == "decoder" else ()))
    }
    noise = draws_of(ed)
    given = (ed.model, torch.tensor(source_of(ed)), torch.tensor(behind_of(ed)), SPAN[0], noise)
    found = []
    for token, layer in cells:
        low, high = layer, layer + 1
        part = "block" if kind == "hidden" or kind.startswith("severed") else kind
        if part != "block":
            low, high = max(0, layer - WINDOW // 2), min(arch.depth, layer - (-WINDOW // 2))
        frozen = None
        if kind.startswith("severed") and layer + 1 < arch.depth:
            above = names[kind.removeprefix("severed_")][layer + 1 :]
            frozen = {(name, token): torch.empty(0) for name in above}
            run(*given, seen=frozen)
        p = run(*given, [(names[part][i], token) for i in range(low, high)], frozen)
        found.append(float(p[1:, answer].mean()))
    return np.array(found)


def ours(ed: Any, name: str, kinds: tuple[str, ...] | None = None, tokens: Any = "all") -> Any:
    side: Any = name.split(",")[0]
    options = TraceOptions(
        kinds=kinds or KINDS[name], window=WINDOW, side=side, decoder_prefix=PREFIX, tokens=tokens
    )
    return trace_prompts(ed.session, [prompt_of(ed)], options, draws=[[draws_of(ed)]])[0]


def error_of(found: Any, side: str, ed: Any, cells: Sequence[tuple[int, int]]) -> float:
    """Largest difference from the twin, in units of the largest effect of the kind."""
    answer, low, high = twin_ends(ed)
    assert found.answer_id == answer
    errors = []
    for kind, grid in found.scores.items():
        want = twin(ed, side, kind, cells, answer)
        errors.append(effect_error(np.array([grid[cell] for cell in cells]), want, low, high))
    return max(errors)


def twin_ends(ed: Any) -> tuple[int, float, float]:
    """The answer, and its probability corrupted and clean."""
    p = run(ed.model, torch.tensor(source_of(ed)), torch.tensor(behind_of(ed)), SPAN[0], draws_of(ed))
    answer = int(p[0].argmax())
    return answer, float(p[1:, answer].mean()), float(p[0, answer])


@pytest.mark.parametrize("name", KINDS)
def test_every_cell_on_a_smaller_model(name: str) -> None:
    small = editor(SMALL)
    found = ours(small, name)
    cells = [(t, layer) for t in range(len(found.traced)) for layer in range(SMALL["num_layers"])]
    same_effects(error_of(found, name.split(",")[0], small, cells))


@pytest.mark.parametrize("name", KINDS)
def test_trace(benchmark: Any, ed: Any, name: str) -> None:
    side = name.split(",")[0]
    first = ours(ed, name, ("hidden",), "all" if side == "decoder" else "subject_last")
    tokens, depth = len(first.input_ids), first.scores["hidden"].shape[1]
    rng = np.random.default_rng(0)
    # Cells of the last layer are not all run; of severed kinds they cost one run.
    places = zip(rng.integers(0, tokens, SAMPLED), rng.integers(0, depth - 1, SAMPLED), strict=True)
    cells = [(int(token), int(layer)) for token, layer in places]

    def naive() -> float:
        return sum(
            timed(lambda kind=kind: twin(ed, side, kind, cells, first.answer_id))[0] for kind in KINDS[name]
        )

    before = naive()
    seconds, found = benchmark.pedantic(lambda: timed(lambda: ours(ed, name)), rounds=1)
    later = naive()
    error = error_of(found, side, ed, cells)
    same_effects(error)
    twin_seconds = (before + later) / 2 / SAMPLED * tokens * depth
    if name.endswith("severed"):
        twin_seconds *= (2 * depth - 1) / (2 * depth)
    figures = {
        "layers": depth,
        "tokens": TOKENS,
        "decoder_tokens": len(behind_of(ed)),
        "samples": SAMPLES,
        "kinds": KINDS[name],
        "seconds": seconds,
        "reference_seconds": twin_seconds,
        "ratio": twin_seconds / seconds,
        "sampled_cells": SAMPLED,
        "twin_after_over_before": later / before,
        "error_of_effect": error,
    }
    report("cpu-trace", f"t5 {name}", benchmark, figures, {"ratio": LEAST[name]})


def neurons(ed: Any) -> torch.Tensor:
    """Scores ``[layers, f]`` of a token."""
    behind = behind_of(ed)
    row = Row(source_of(ed), len(behind) - 1, behind)
    layers = range(ed.session.arch.depth)
    found: torch.Tensor = attribute(ed.session, [(row, (123,))], layers, NeuronOptions(steps=STEPS))[0][0]
    return found


def twin_layer(ed: Any, layer: int) -> torch.Tensor:
    name = ed.session.arch.name("mlp_out", layer)
    return layer_scores(ed.model, name, source_of(ed), behind_of(ed), 123, fractions=fractions(STEPS, "left"))


def test_every_layers_neurons_on_a_smaller_model() -> None:
    small = editor(SMALL)
    for layer, scores in enumerate(neurons(small)):
        want = twin_layer(small, layer)
        assert float((scores - want).norm() / want.norm()) <= 1e-4


def test_neurons(benchmark: Any, ed: Any) -> None:
    found = neurons(ed)
    wanted = {layer: twin_layer(ed, layer) for layer in LAYERS}
    error = max(float((found[layer] - want).norm() / want.norm()) for layer, want in wanted.items())
    assert error <= 1e-4, f"scores differ by {error:.1e}, at most 1e-4"
    before = [timed(lambda layer=layer: twin_layer(ed, layer))[0] for layer in LAYERS]
    times = [benchmark.pedantic(lambda: timed(lambda: neurons(ed))[0], rounds=1)]
    times += [timed(lambda: neurons(ed))[0] for _ in range(4)]
    after = [timed(lambda layer=layer: twin_layer(ed, layer))[0] for layer in LAYERS]
    depth = ed.session.arch.depth
    seconds, twin_seconds = sorted(times)[2], depth * (sum(before) + sum(after)) / 2 / len(LAYERS)
    figures = {
        "tokens": TOKENS,
        "decoder_tokens": len(behind_of(ed)),
        "steps": STEPS,
        "layers": depth,
        "seconds": seconds,
        "twin_seconds": twin_seconds,
        "twin_scaled_from": f"layers {LAYERS}",
        "twin_after_over_before": sum(after) / sum(before),
        "ratio": twin_seconds / seconds,
        "error": error,
    }
    report("cpu-neurons", "t5 neurons", benchmark, figures, {"ratio": LEAST["neurons"]})
