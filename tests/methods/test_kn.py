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


def test_a_request_that_does_not_fit_is_named_before_the_first_is_solved() -> None:
    ed = editor()
    long = {**REQUEST, "id": "long", "prompt": "{} " + "word " * 100}
    for request in (long, {key: value for key, value in long.items() if key != "target_true"}):
        with pytest.raises(
            ValueError, match="request 'long': prompts: .* the model has 128 positions"
        ) as caught:
            ed.solve([REQUEST, request], "kn")
        assert "\n" not in str(caught.value)
        with pytest.raises(ValueError, match="request 'long': prompts: .* the model has 128 positions"):
            ed.estimate([REQUEST, request], "kn")


def test_options_that_would_be_ignored_are_refused() -> None:
    ed = editor()
    for options, message in (
        ({"operation": "suppress", "scale": "norm"}, "scale must be left out with operation='suppress'"),
        ({"operation": "enhance", "new_weight": 1.0}, "new_weight must be left out with operation='enhance'"),
        ({"p": 0.7}, "p must be left out without refine=True, got 0.7"),
    ):
        with pytest.raises(ValueError, match=message):
            ed.solve(REQUEST, "kn", **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gpt2", "bloom", "bert"])
def test_half_precision(family: str, dtype: torch.dtype) -> None:
    """Neurons are those of the same weights in float32, and the update is float32."""
    half, wide = (masked(tiny_model(family, dtype=dtype)) for _ in range(2))
    wide.model.float()
    request = MASKED if family == "bert" else REQUEST
    found, want = (ed.solve(request, "kn", adaptive_threshold=0.5, **OPTIONS) for ed in (half, wide))
    one, other = ({tuple(neuron) for neuron in edit.info["neurons"][0]["neurons"]} for edit in (found, want))
    prompt = TEXT if family != "bert" else "The Eiffel Tower is located in [MASK] today"
    scores = wide.neurons(prompt, "of", **OPTIONS).scores[0]
    # A neuron that lies on the threshold to the type's rounding may fall either way.
    edge = ((scores / (0.5 * scores.max()) - 1).abs() < 0.05).nonzero().tolist()
    assert one ^ other <= {(layer, neuron) for layer, neuron in edge}
    assert one & other
    assert all(delta.dense().dtype == torch.float32 for delta in found.deltas)


MASKED = {
    "id": "tower",
    "prompt": "{} is located in [MASK] today",
    "subject": "The Eiffel Tower",
    "target_new": "the",
    "target_true": "of",
    "probes": [{"kind": "paraphrase", "prompt": "[MASK] has The Eiffel Tower", "target": "the"}],
}


def masked(model: Any) -> Editor:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    return Editor(model, tokenizer)


def bert_scores(ed: Editor, prompt: str, answer: int) -> Tensor:
    ids = ed.tokenizer(prompt)["input_ids"]
    modules = [ed.session.arch.name("mlp_out", layer) for layer in range(4)]
    place = ids.index(ed.tokenizer.mask_token_id)
    points = [k / 5 for k in range(5)]
    return twin.attribution(ed.model, modules, ids, [answer], fractions=points, position=place)


@pytest.mark.parametrize("scale", ["plain", "norm"])
@pytest.mark.parametrize("refine", [False, True])
def test_bert_writes_into_value_slots_at_its_mask(scale: str, refine: bool) -> None:
    ed = masked(tiny_model("bert"))
    prompts = ["The Eiffel Tower is located in [MASK] today", "[MASK] has The Eiffel Tower"]
    scores = [bert_scores(ed, prompt, token(ed, " of")) for prompt in prompts[: 1 + refine]]
    neurons = twin.refined_neurons(scores, 0.2, 0.4)
    ids = ed.tokenizer(prompts[0])["input_ids"]
    at = ed.model(input_ids=torch.tensor([ids])).logits[0, ids.index(ed.tokenizer.mask_token_id)]
    old, new = embedding(ed, [int(at.argmax())]), embedding(ed, [token(ed, " the")])
    edit = ed.solve(MASKED, "kn", scale=scale, refine=refine, **OPTIONS)
    if scale == "plain":
        want = expected(ed, neurons, lambda _: -2 * old + 2 * new)
    else:
        want = expected(ed, neurons, lambda w: w.norm() * (-old / old.norm() + 8 * new / new.norm()))
    same(edit, want)
    before = {name: value.clone() for name, value in ed.model.state_dict().items()}
    ed.apply(edit)
    ed.revert(edit)
    assert all(torch.equal(value, before[name]) for name, value in ed.model.state_dict().items())


def test_bert_takes_answers_of_one_token_and_prompts_with_a_mask() -> None:
    ed = masked(tiny_model("bert"))
    for changes, message in (
        ({"target_new": "physics and chemistry"}, "field 'target_new': must be one token"),
        ({"target_true": "physics and chemistry"}, "answer must be one token for a masked language model"),
        ({"prompt": "{} is in"}, "prompts must hold the mask token"),
    ):
        with pytest.raises(ValueError, match=f"request 'tower': {message}"):
            ed.solve({**MASKED, **changes}, "kn", **OPTIONS)
