"""Knowledge neurons against the original's numbers (EleutherAI/knowledge-neurons as EasyEdit ships it)."""

from __future__ import annotations

import pytest
import torch
from golden.golden import Case, case_names, load_case, load_model, relative

from fastedit.session import Session
from fastedit.trace.neurons import NeuronOptions, find_neurons

NAMES = case_names("kn-gpt2-facts")
# That code scales what the first matrix gives, over a grid with both ends.
ORIGINAL = {"activation": "pre_activation", "grid": "ends", "continuation": "fixed"}


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest) -> Case:
    return load_case(request.param)


def session(case: Case, dtype: torch.dtype = torch.float32) -> Session:
    model, tokenizer = load_model(case.model)
    if dtype != torch.float32:
        import copy

        model = copy.deepcopy(model).to(dtype)
    return Session(model, tokenizer)


@pytest.mark.parametrize("steps", [10, 20])
def test_scores(case: Case, steps: int) -> None:
    found = find_neurons(
        session(case), case.meta["prompt"], case.meta["ground_truth"], NeuronOptions(steps=steps, **ORIGINAL)
    )
    assert relative(found.scores[0], case.tensor(f"scores_steps{steps}")) <= 1e-5
    assert relative(found.activations[0], case.tensor("max_activations")) <= 1e-5


def test_scores_in_double_precision(case: Case) -> None:
    found = find_neurons(
        session(case, torch.float64),
        case.meta["prompt"],
        case.meta["ground_truth"],
        NeuronOptions(**ORIGINAL),
    )
    assert relative(found.scores[0], case.tensor("float64_ref/scores_steps20")) <= 1e-10


def test_neurons_of_one_prompt(case: Case) -> None:
    options = NeuronOptions(adaptive_threshold=case.meta["adaptive_threshold"], **ORIGINAL)
    found = find_neurons(session(case), case.meta["prompt"], case.meta["ground_truth"], options)
    assert set(found.neurons) == {tuple(neuron) for neuron in case.meta["coarse_neurons"]}


def test_neurons_that_prompts_share(case: Case) -> None:
    options = NeuronOptions(adaptive_threshold=case.meta["adaptive_threshold"], p=case.meta["p"], **ORIGINAL)
    found = find_neurons(session(case), case.meta["refined_prompts"], case.meta["ground_truth"], options)
    assert set(found.neurons) == {tuple(neuron) for neuron in case.meta["refined_neurons"]}
