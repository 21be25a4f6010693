"""Half precision: results are float32, near those of the same weights in float32, and can be saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from fastedit.session import Session
from fastedit.trace.neurons import NeuronOptions, find_neurons
from fastedit.trace.neurons_result import Neurons

PROMPT = "The Eiffel Tower is located in the city of"
HALF = {torch.bfloat16: 4e-2, torch.float16: 5e-3}
"""Relative error of all scores: a few units of the type's rounding, through four blocks and back."""
# Every path: joining by arithmetic, joining through blocks (post-norm; pre-activations), whole rows, an encoder, both.
FAMILIES = (
    *("gpt2", "gptj", "gpt_neox", "llama", "qwen2", "gemma", "gemma2", "bloom", "falcon", "bert"),
    "t5",
)


def sessions(family: str, dtype: torch.dtype, **overrides: Any) -> tuple[Session, Session, str]:
    """The model in ``dtype``, the same weights in float32, and a prompt."""
    tokenizer = tiny_tokenizer()
    prompt = PROMPT
    if family == "t5":
        overrides = {"decoder_start_token_id": 1, **overrides}
    if family == "bert":
        tokenizer.add_special_tokens({"mask_token": "[MASK]"})
        prompt = f"{PROMPT} [MASK] today."
    half, wide = (tiny_model(family, dtype=dtype, **overrides) for _ in range(2))
    for model in (half, wide) if family == "t5" else ():
        for name, weight in model.named_parameters():
            # T5's queries are as small as others' scores are divided: a random one's softmax would be a maximum.
            weight.data *= 8**-0.5 if name.endswith("Attention.q.weight") else 1
    return Session(half, tokenizer), Session(wide.float(), tokenizer), prompt


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@pytest.mark.parametrize("dtype", HALF, ids=["bf16", "fp16"])
@pytest.mark.parametrize("activation", ["activation", "pre_activation"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_follow_float32(family: str, activation: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    half, wide, prompt = sessions(family, dtype)
    options = NeuronOptions(activation=activation, steps=10)
    found, want = (find_neurons(made, prompt, " the", options) for made in (half, wide))
    assert found.scores.dtype == found.activations.dtype == torch.float32
    assert error(found.scores, want.scores) <= HALF[dtype]
    assert error(found.activations, want.activations) <= HALF[dtype]
    assert found.probability[0] == pytest.approx(want.probability[0], rel=HALF[dtype])
    found.save(tmp_path / "n.npz")
    assert torch.equal(Neurons.load(tmp_path / "n.npz").scores, found.scores)


@pytest.mark.parametrize("family", ["gpt2", "bloom", "t5"])
def test_small_probabilities_are_not_lost_in_float16(family: str) -> None:
    """Behind a large vocabulary the gradient of a probability is below what float16 holds."""
    half, wide, prompt = sessions(family, torch.float16, vocab_size=30_000)
    found, want = (find_neurons(made, prompt, " the", NeuronOptions(steps=5)) for made in (half, wide))
    assert want.probability[0] < 1e-3
    assert error(found.scores, want.scores) <= HALF[torch.float16]
