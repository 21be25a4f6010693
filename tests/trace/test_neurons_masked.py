"""Masked language models: BERT's neurons at its mask token, against whole forwards layer by layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import neurons as twin
from tiny import DEPTH, tiny_model, tiny_tokenizer

from fastedit.session import Session
from fastedit.trace.neurons import NeuronOptions, find_neurons, fractions

PROMPTS = (
    "The Eiffel Tower is located in [MASK] today.",
    "[MASK] is the city of the Eiffel Tower",
    "LeBron James plays the sport of [MASK]",
)


def session(dtype: torch.dtype = torch.float32, **overrides: Any) -> Session:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    return Session(tiny_model("bert", dtype=dtype, **overrides), tokenizer)


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 1e-4), (torch.float64, 1e-10)], ids=["fp32", "fp64"]
)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("activation", ["activation", "pre_activation"])
def test_scores_and_neurons_are_the_twins(
    activation: Any, attention: str, dtype: torch.dtype, most: float
) -> None:
    made = session(dtype, attn_implementation=attention)
    options = NeuronOptions(steps=6, activation=activation)
    found = find_neurons(made, PROMPTS, " the", options)
    output = activation == "pre_activation"
    names = [made.arch.name("mlp_in" if output else "mlp_out", layer) for layer in range(DEPTH)]
    want = []
    for prompt in PROMPTS:
        ids = made.tokenizer(prompt)["input_ids"]
        place = ids.index(made.tokenizer.mask_token_id)
        points = fractions(6, "left")
        want.append(
            twin.attribution(
                made.model, names, ids, found.answer_ids, fractions=points, output=output, position=place
            )
        )
    scores = torch.stack(want)
    assert float((found.scores - scores).norm() / scores.norm()) <= most
    assert [set(one) for one in found.coarse] == [twin.coarse_neurons(one, 0.2) for one in want]
    assert set(found.neurons) == twin.refined_neurons(want, 0.2, 0.4)


def test_the_models_own_answer_is_read_at_the_mask() -> None:
    made = session()
    found = find_neurons(made, PROMPTS[0], None, NeuronOptions(steps=2))
    ids = made.tokenizer(PROMPTS[0])["input_ids"]
    logits = made.model(input_ids=torch.tensor([ids])).logits[0, ids.index(made.tokenizer.mask_token_id)]
    assert found.answer_ids == (int(logits.argmax()),)


@pytest.mark.parametrize(
    ("prompt", "answer", "message"),
    [
        ("no mask", " the", "prompts must hold the mask token '\\[MASK\\]' once each, got 'no mask'"),
        ("[MASK] and [MASK]", " the", "prompts must hold the mask token"),
        (PROMPTS[0], " physics and chemistry", "answer must be one token for a masked language model, got"),
        ("word " * 200 + "[MASK]", " the", "tokens with the answer, the model has 128 positions"),
        ("word " * 200 + "[MASK]", None, "tokens with the answer, the model has 128 positions"),
    ],
)
def test_bad_input_is_one_line(prompt: str, answer: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        find_neurons(session(), prompt, answer, NeuronOptions())
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_a_mask_token() -> None:
    made = Session(tiny_model("bert"), tiny_tokenizer())
    with pytest.raises(ValueError, match="prompts must hold the mask token None once each"):
        find_neurons(made, "The Eiffel Tower", " the", NeuronOptions())
