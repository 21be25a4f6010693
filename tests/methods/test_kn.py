"""KN: which columns change, by what, in every variant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import neurons as twin
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor

from fastedit.arch import is_transposed
from fastedit.edit import Edit
from fastedit.editor import Editor
from fastedit.methods.kn import KnConfig

FAMILIES = ("gpt2", "gptj", "gpt_neox", "llama", "mistral", "qwen2", "gemma")
REQUEST = {
    "id": "tower",
    "prompt": "{} is located in the city of",
    "subject": "The Eiffel Tower",
    "target_new": "the",
    "target_true": "of",
    "probes": [
        {"kind": "paraphrase", "prompt": "The Eiffel Tower is in", "target": "the"},
        {"kind": "paraphrase", "prompt": "The Eiffel Tower, in the state of", "target": "the"},
    ],
}
TEXT = "The Eiffel Tower is located in the city of"
OPTIONS: dict[str, Any] = {"steps": 5}


def editor(family: str = "gpt2") -> Editor:
    return Editor(tiny_model(family), tiny_tokenizer())


def canonical(ed: Editor, layer: int) -> Tensor:
    module = ed.session.arch.mlp_out(layer)
    weight: Tensor = module.weight.detach()  # type: ignore[assignment,operator]
    return weight.T if is_transposed(module) else weight


def twin_scores(ed: Editor, prompt: str, answer: int) -> Tensor:
    modules = [ed.session.arch.name("mlp_out", layer) for layer in range(4)]
    ids = ed.tokenizer.encode(prompt)
    return twin.attribution(ed.model, modules, ids, [answer], fractions=[k / 5 for k in range(5)])


def token(ed: Editor, text: str) -> int:
    (found,) = ed.tokenizer.encode(text)
    return found


def own(ed: Editor, count: int = 1) -> list[int]:
    ids = ed.tokenizer.encode(TEXT)
    for _ in range(count):
        ids.append(int(ed.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-count:]


def embedding(ed: Editor, ids: list[int]) -> Tensor:
    return ed.session.arch.embed.weight.detach()[ids].sum(dim=0)  # type: ignore[operator,index,union-attr]


def expected(ed: Editor, neurons: set[tuple[int, int]], vector: Any) -> dict[str, Tensor]:
    """Dense updates by module; ``vector(column [d])`` is what is added to a chosen column."""
    found: dict[str, Tensor] = {}
    for layer, neuron in neurons:
        weight = canonical(ed, layer)
        update = found.setdefault(ed.session.arch.name("mlp_out", layer), torch.zeros_like(weight))
        update[:, neuron] = vector(weight[:, neuron])
    return found


def same(edit: Edit, want: dict[str, Tensor]) -> None:
    assert {delta.name for delta in edit.deltas} == set(want)
    for delta in edit.deltas:
        torch.testing.assert_close(delta.dense(), want[delta.name], rtol=1e-5, atol=1e-6)
        # Columns that are not chosen stay to the bit.
        assert not delta.dense()[:, ~want[delta.name].any(dim=0)].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_replace_writes_the_new_answer_for_the_old_one(family: str) -> None:
    ed = editor(family)
    neurons = twin.coarse_neurons(twin_scores(ed, TEXT, token(ed, " of")), 0.2)
    change = -2 * embedding(ed, own(ed)) + 2 * embedding(ed, [token(ed, " the")])
    edit = ed.solve(REQUEST, "kn", **OPTIONS)
    same(edit, expected(ed, neurons, lambda _: change))
    assert all(delta.rank == 1 for delta in edit.deltas)
    (report,) = edit.info["neurons"]
    assert {tuple(neuron) for neuron in report["neurons"]} == neurons
    assert report["count"] == len(neurons) == sum(report["per_layer"].values())


def test_variants() -> None:
    ed = editor()
    neurons = twin.coarse_neurons(twin_scores(ed, TEXT, token(ed, " of")), 0.2)
    new, old, true = (
        embedding(ed, [token(ed, " the")]),
        embedding(ed, own(ed)),
        embedding(ed, [token(ed, " of")]),
    )
    unit = -old / old.norm() + 8 * new / new.norm()
    cases: list[tuple[dict[str, Any], Any]] = [
        ({"scale": "norm"}, lambda w: w.norm() * unit),
        ({"scale": "norm", "old_weight": 0, "new_weight": 3.0}, lambda w: w.norm() * 3 * new / new.norm()),
        ({"new_weight": 1.0}, lambda _: -2 * old + new),
        ({"old_answer": "target_true"}, lambda _: -2 * true + 2 * new),
        ({"operation": "suppress"}, lambda w: -w),
        ({"operation": "enhance"}, lambda w: w),
    ]
    for options, vector in cases:
        same(ed.solve(REQUEST, "kn", **OPTIONS, **options), expected(ed, neurons, vector))
    edit = ed.solve(REQUEST, "kn", **OPTIONS, operation="suppress")
    with ed.applied(edit):
        assert all(not canonical(ed, layer)[:, neuron].any() for layer, neuron in neurons)


def test_a_new_answer_of_several_tokens() -> None:
    ed = editor()
    target = ed.tokenizer.encode(" physics and")
    assert len(target) > 1
    neurons = twin.coarse_neurons(twin_scores(ed, TEXT, token(ed, " of")), 0.2)
    change = -embedding(ed, own(ed, len(target))) + embedding(ed, target)
    edit = ed.solve({**REQUEST, "target_new": "physics and"}, "kn", **OPTIONS)
    same(edit, expected(ed, neurons, lambda _: change))


def test_without_a_true_answer_the_models_own_is_attributed() -> None:
    ed = editor()
    request = {key: value for key, value in REQUEST.items() if key != "target_true"}
    (mine,) = own(ed)
    edit = ed.solve(request, "kn", **OPTIONS)
    want = twin.coarse_neurons(twin_scores(ed, TEXT, mine), 0.2)
    assert {tuple(neuron) for neuron in edit.info["neurons"][0]["neurons"]} == want


def test_refinement_over_paraphrases() -> None:
    ed = editor()
    prompts = [TEXT, *(probe["prompt"] for probe in REQUEST["probes"])]  # type: ignore[index,union-attr]
    scores = [twin_scores(ed, prompt, token(ed, " of")) for prompt in prompts]
    for p in (0.3, 0.4, 0.7):
        edit = ed.solve(REQUEST, "kn", **OPTIONS, refine=True, p=p)
        found = {tuple(neuron) for neuron in edit.info["neurons"][0]["neurons"]}
        assert found == twin.refined_neurons(scores, 0.2, p)


def test_the_edit_moves_the_answer() -> None:
    ed = editor("gpt2")
    ids = torch.tensor([ed.tokenizer.encode(TEXT)])
    wanted = token(ed, " the")

    def probability() -> float:
        return float(ed.model(input_ids=ids).logits[0, -1].softmax(0)[wanted])

    before = probability()
    with ed.applied(ed.solve(REQUEST, "kn", scale="norm")):
        assert probability() > before


def test_published_settings() -> None:
    assert KnConfig().layers is None and KnConfig().steps == 20
    assert editor().config("kn").adaptive_threshold == 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operation": "erase"}, "operation must be one of replace, suppress, enhance, got 'erase'"),
        ({"scale": "unit"}, "scale must be one of plain, norm"),
        ({"old_answer": "gold"}, "old_answer must be one of argmax, target_true"),
        ({"refine": 1}, "refine must be true or false, got 1"),
        ({"old_weight": -1}, "old_weight must be a number >= 0, or None, got -1"),
        ({"new_weight": float("inf")}, "new_weight must be a number >= 0, or None"),
        ({"steps": 0}, "steps must be an integer from 1 to 100000, got 0"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        editor().solve(REQUEST, "kn", **options)


def test_bad_requests_change_nothing() -> None:
    ed = editor()
    before = {name: value.clone() for name, value in ed.model.state_dict().items()}
    request = {key: value for key, value in REQUEST.items() if key != "target_true"}
    with pytest.raises(ValueError, match="request 'tower': field 'target_true' must be given"):
        ed.solve(request, "kn", old_answer="target_true")
    with pytest.raises(ValueError, match="targets must not be given"):
        ed.solve(REQUEST, "kn", targets=torch.zeros(1, 32))
    with pytest.raises(ValueError, match="causal and masked models, got model_type='t5'"):
        Editor(tiny_model("t5"), tiny_tokenizer()).solve(REQUEST, "kn")
    with pytest.raises(ValueError, match="request 'tower': no neuron is above the threshold"):
        # At zero activation the only point of the path gives no gradient through a dead layer.
        with torch.no_grad():
            for layer in range(4):
                canonical(ed, layer).zero_()
        ed.solve(REQUEST, "kn")
    for layer in range(4):
        name = f"{ed.session.arch.name('mlp_out', layer)}.weight"
        ed.model.state_dict()[name].copy_(before[name])
    assert all(torch.equal(value, before[name]) for name, value in ed.model.state_dict().items())
