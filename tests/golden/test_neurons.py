"""Knowledge neurons against the original's numbers (EleutherAI/knowledge-neurons as EasyEdit ships it)."""

from __future__ import annotations

import pytest
import torch
from golden.golden import Case, case_names, load_case, load_model, relative

from fastedit.editor import Editor
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


def test_edit(case: Case) -> None:
    """The published edit: the same columns, changed by the same vectors, and the same answers afterwards."""
    model, tokenizer = load_model(case.model)
    ed = Editor(model, tokenizer)
    prompt = case.meta["prompt"]
    subject = prompt.split()[0]
    request = {
        "prompt": prompt.replace(subject, "{}"),
        "subject": subject,
        "target_new": case.meta["target"],
        "target_true": case.meta["ground_truth"],
    }
    # EasyEdit hands the target over as a list, for which that code adds the new embedding once and not twice.
    threshold = case.meta["adaptive_threshold"]
    edit = ed.solve(request, "kn", adaptive_threshold=threshold, new_weight=1.0, **ORIGINAL)
    assert [f"{delta.name}.weight" for delta in edit.deltas] == case.meta["edited"]
    (delta,) = edit.deltas
    rows = case.tensor(f"delta_rows/{delta.name}.weight")
    columns = sorted({neuron for _, neuron in case.meta["coarse_neurons"]})
    dense = delta.dense().T
    assert relative(dense[columns], rows) <= 1e-6
    rest = torch.ones(len(dense), dtype=torch.bool)
    rest[columns] = False
    assert not dense[rest].any()

    def probabilities() -> torch.Tensor:
        ids = torch.tensor([tokenizer.encode(prompt)])
        with torch.no_grad():
            return model(input_ids=ids).logits[0, -1].softmax(0)

    target = tokenizer.encode(case.meta["target"])[0]
    for state in ("before", "after"):
        want = case.meta["edit"][state]
        found = probabilities()
        assert float(found[target]) == pytest.approx(want["gt_prob"], rel=1e-4)
        assert tokenizer.decode(int(found.argmax())) == want["argmax_completion"]
        assert float(found.max()) == pytest.approx(want["argmax_prob"], rel=1e-4)
        (ed.apply if state == "before" else ed.revert)(edit)
