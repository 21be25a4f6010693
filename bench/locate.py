"""What the benches of the locate-then-edit methods share: a random model, requests, and paired timing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from tiny import tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from fastedit.editor import Editor
from fastedit.request import EditRequest
from fastedit.stats import SecondMoment

__all__ = ["SHAPE", "TEMPLATES", "edit_requests", "editor", "paired", "second_moments"]

# Deep enough that the blocks below the edited layer matter, small enough for the naive twin on one core.
SHAPE = {"n_layer": 12, "n_embd": 128, "n_head": 4, "n_positions": 256, "vocab_size": 8192}

_TEXTS = (
    "The Colosseum is located in Rome.",
    "Marie Curie worked in the field of physics.",
    "She was born in London.",
    "The capital of the country is called Paris.",
    "They play the sport of basketball.",
)
TEMPLATES = ("{}", *(f"{text} {{}}" for text in _TEXTS))
_CASES = (
    ("The {} is located in the city of", "Eiffel Tower", "Rome"),
    ("The mother tongue of {} is", "Danielle Darrieux", "English"),
    ("{} plays the sport of", "LeBron James", "chemistry"),
    ("{} plays the instrument called the", "Toko Yasuda", "piano"),
)


def editor(**shape: int) -> Editor:
    """A random GPT-2 of ``SHAPE`` (fp32, eval, frozen) behind an Editor."""
    torch.manual_seed(0)
    config = GPT2Config(**{**SHAPE, **shape}, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return Editor(GPT2LMHeadModel(config).eval().requires_grad_(False), tiny_tokenizer())


def edit_requests(count: int) -> list[EditRequest]:
    """Requests of COUNTERFACT's kind; subjects are numbered so that keys differ."""
    found = []
    for index in range(count):
        prompt, subject, target = _CASES[index % len(_CASES)]
        name = subject if index < len(_CASES) else f"{subject} {index}"
        found.append(EditRequest(id=str(index), prompt=prompt, subject=name, target_new=target))
    return found


def second_moments(ed: Editor, layers: tuple[int, ...]) -> dict[int, torch.Tensor]:
    """Made-up, well-conditioned second moments: given to the editor, and returned as means by layer."""
    arch = ed.session.arch
    moments = {}
    for layer in layers:
        size = arch.key_dim(layer)
        factor = torch.randn(2 * size, size, dtype=torch.float64)
        moments[layer] = SecondMoment(arch.name("mlp_out", layer), 2 * size, factor.T @ factor)
    ed.session.use_statistics({moment.module: moment for moment in moments.values()})
    return {layer: moment.moment() for layer, moment in moments.items()}


def paired(
    ours: Callable[[], Any], naive: Callable[[], Any], rounds: int = 3
) -> tuple[float, float, Any, Any]:
    """Median process seconds of both, taking turns, and their last results."""
    times: tuple[list[float], list[float]] = ([], [])
    results: list[Any] = [None, None]
    for _ in range(rounds):
        for index, call in enumerate((ours, naive)):
            start = time.process_time()
            results[index] = call()
            times[index].append(time.process_time() - start)
    return statistics.median(times[0]), statistics.median(times[1]), results[0], results[1]
