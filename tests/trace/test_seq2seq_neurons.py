"""Knowledge neurons of T5, and the edit by them, against the naive twin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import neurons_seq2seq as twin
from reference.neurons import coarse_neurons
from tiny import tiny_model, tiny_tokenizer
from tiny_seq2seq import PREFIX, VARIANTS, session_of

from fastedit.edit import Edit
from fastedit.editor import Editor
from fastedit.session import Session
from fastedit.trace.neurons import NeuronOptions, attribution_bytes, find_neurons
from fastedit.trace.neurons_questions import Row
from fastedit.trace.prompts import decoder_ids

PROMPTS = ["LeBron James plays the sport of", "LeBron James, whose sport is"]
REQUEST = {
    "id": "sport",
    "prompt": "{} plays the sport of",
    "subject": "LeBron James",
    "target_new": "the",
    "target_true": "of",
    "probes": [{"kind": "paraphrase", "prompt": PROMPTS[1], "target": "the"}],
}


def scores(session: Session, prompt: str, answer: list[int], options: NeuronOptions) -> torch.Tensor:
    arch: Any = session.arch
    gated = arch.mlp_gate(0) is not None
    output = options.activation == "pre_activation"
    site = "mlp_out" if not output else "mlp_gate" if gated else "mlp_in"
    steps = options.steps
    points = [k / steps for k in range(steps)]
    if options.grid == "ends":
        points = torch.linspace(0, 1, steps, dtype=torch.float64).tolist()
    return twin.attribution(
        session.model,
        [arch.name(site, layer) for layer in options.layers or range(arch.depth)],
        session.tokenizer.encode(prompt),
        decoder_ids(session, options.decoder_prefix),
        answer,
        fractions=points,
        output=output,
        rule=options.continuation,
        every=options.positions == "all",
    )


@pytest.mark.parametrize("positions", ["answer", "all"])
@pytest.mark.parametrize("activation", ["activation", "pre_activation"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_are_the_twins(variant: str, activation: Any, positions: Any) -> None:
    session = session_of(variant)
    for prefix in (None, PREFIX):
        options = NeuronOptions(
            steps=4, activation=activation, positions=positions, decoder_prefix=prefix, grid="ends"
        )
        found = find_neurons(session, PROMPTS[0], " of", options)
        want = scores(session, PROMPTS[0], list(found.answer_ids), options)
        assert found.scores.shape == (1, 3, 64)
        assert float((found.scores[0] - want).abs().max()) <= 1e-12
        assert set(found.neurons) == coarse_neurons(want, 0.2)
        assert float(want.abs().max()) > 1e-6


@pytest.mark.parametrize("rule", ["argmax", "answer", "fixed"])
@pytest.mark.parametrize("positions", ["answer", "all"])
def test_answers_of_several_tokens_and_a_subset_of_layers(rule: Any, positions: Any) -> None:
    session = session_of("v1.1")
    options = NeuronOptions(steps=3, continuation=rule, layers=(0, 2), positions=positions)
    found = find_neurons(session, PROMPTS, " physics and", options)
    assert len(found.answer_ids) > 1
    for prompt, own in zip(PROMPTS, found.scores, strict=True):
        want = scores(session, prompt, list(found.answer_ids), options)
        assert float((own - want).abs().max()) <= 1e-12


@pytest.mark.parametrize("variant", VARIANTS)
def test_single_precision_and_any_memory(variant: str) -> None:
    session = session_of(variant, torch.float32)
    for activation in ("activation", "pre_activation"):
        options = NeuronOptions(steps=5, activation=activation)  # type: ignore[arg-type]
        found = find_neurons(session, PROMPTS[0], " of", options)
        want = scores(session, PROMPTS[0], list(found.answer_ids), options)
        assert float((found.scores[0] - want).abs().max()) <= 1e-4 * float(want.abs().max())
        assert set(found.neurons) == coarse_neurons(want, 0.2)
        little = find_neurons(session, PROMPTS[0], " of", options.replace(memory=1))
        torch.testing.assert_close(little.scores, found.scores, rtol=1e-4, atol=1e-8)
    row = Row((5, 6, 0), 0, (1,))
    assert all(size > 0 for size in attribution_bytes(session, [(row, (7,))], (0, 1, 2), options))


@pytest.mark.parametrize("positions", ["answer", "all"])
@pytest.mark.parametrize("activation", ["activation", "pre_activation"])
def test_half_precision_with_last_matrices_in_float32(activation: Any, positions: Any) -> None:
    """As T5's float16 checkpoints are loaded: all but the MLPs' last matrices is in float16."""
    half, wide = session_of("v1.1", torch.float16), session_of("v1.1", torch.float16)
    wide.model.float()  # type: ignore[operator]
    for model in (half.model, wide.model):
        for name, weight in model.named_parameters():
            weight.data *= 8**-0.5 if name.endswith("Attention.q.weight") else 1
            if name.endswith("wo.weight"):
                weight.data = weight.data.float()
    options = NeuronOptions(steps=3, activation=activation, positions=positions, decoder_prefix=PREFIX)
    found, want = (find_neurons(made, PROMPTS[0], " of", options) for made in (half, wide))
    assert found.scores.dtype == torch.float32
    assert float((found.scores - want.scores).norm() / want.scores.norm()) <= 1e-2


def test_the_models_own_answer_is_attributed_without_one() -> None:
    session = session_of("v1.0")
    found = find_neurons(session, PROMPTS[0], None, NeuronOptions(steps=2, decoder_prefix=PREFIX))
    ids = torch.tensor([session.tokenizer.encode(PROMPTS[0])])
    logits = session.model(
        input_ids=ids, decoder_input_ids=torch.tensor([decoder_ids(session, PREFIX)])
    ).logits
    assert found.answer_ids == (int(logits[0, -1].argmax()),)
    assert abs(found.probability[0] - float(logits[0, -1].softmax(0).max())) <= 1e-12


@pytest.mark.parametrize("prefix", [None, PREFIX])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_edit(variant: str, prefix: str | None) -> None:
    session = session_of(variant)
    ed = Editor(session.model, session.tokenizer)
    options = NeuronOptions(steps=3, decoder_prefix=prefix)
    (old,) = find_neurons(session, PROMPTS[0], None, options).answer_ids
    (true,) = ed.tokenizer.encode(" of", add_special_tokens=False)
    (new,) = ed.tokenizer.encode(" the", add_special_tokens=False)
    want = coarse_neurons(scores(session, PROMPTS[0], [true], options), 0.2)
    embedding: Any = session.arch.embed.weight
    before = {name: tensor.clone() for name, tensor in ed.model.state_dict().items()}
    edit = ed.edit(REQUEST, method="kn", steps=3, decoder_prefix=prefix)
    assert {tuple(neuron) for neuron in edit.info["neurons"][0]["neurons"]} == want
    change = 2 * embedding[new] - 2 * embedding[old]
    for layer in range(3):
        name = f"decoder.block.{layer}.layer.2.DenseReluDense.wo"
        columns = [neuron for at, neuron in want if at == layer]
        expected = before[f"{name}.weight"].clone()
        expected[:, columns] += change[:, None]
        torch.testing.assert_close(ed.model.state_dict()[f"{name}.weight"], expected, rtol=1e-12, atol=1e-12)
    ed.revert(edit)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ed.model.state_dict().items())


def test_the_edit_saves_refines_and_is_estimated(tmp_path: Any) -> None:
    session = session_of("v1.1", torch.float32)
    ed = Editor(session.model, session.tokenizer)
    settings: dict[str, Any] = {"steps": 3, "refine": True, "positions": "all", "adaptive_threshold": 0.05}
    edit = ed.solve([REQUEST, {**REQUEST, "id": "again", "target_new": "and"}], "kn", **settings)
    edit.save(tmp_path / "e.safetensors")
    ed.apply(edit)
    one = {name: tensor.clone() for name, tensor in ed.model.state_dict().items()}
    ed.revert(edit)
    ed.apply(Edit.load(tmp_path / "e.safetensors"))
    assert all(torch.equal(tensor, one[name]) for name, tensor in ed.model.state_dict().items())
    assert ed.estimate(REQUEST, "kn", **settings).targets > 0
    with pytest.raises(ValueError, match="layer: must be"):
        ed.solve(REQUEST, "kn", layers=(3,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": "some"}, "positions must be one of answer, all, got 'some'"),
        ({"decoder_prefix": " "}, "decoder_prefix must be a text that is not blank, or None, got ' '"),
    ],
)
def test_bad_options(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeuronOptions(**change)


def test_bad_input_and_other_models() -> None:
    made = session_of("v1.0", torch.float32, n_positions=8)
    with pytest.raises(ValueError, match="prompts: 20 tokens, the model has 8 positions, got"):
        find_neurons(made, PROMPTS[0], " of", NeuronOptions())
    with pytest.raises(ValueError, match="prompts: 9 tokens of the decoder with the answer, the model has 8"):
        find_neurons(made, "the", " of", NeuronOptions(decoder_prefix=" the" * 8))
    with pytest.raises(ValueError, match="layer: must be an integer from 0 to 2, got 3"):
        find_neurons(made, "a", " of", NeuronOptions(layers=(3,)))
    other = Session(tiny_model("gpt2"), tiny_tokenizer())
    with pytest.raises(ValueError, match="positions must be 'answer' for a model that is no encoder-decoder"):
        find_neurons(other, "a", " of", NeuronOptions(positions="all"))
    with pytest.raises(
        ValueError, match="decoder_prefix must be None for a model that is no encoder-decoder"
    ):
        find_neurons(other, "a", " of", NeuronOptions(decoder_prefix="x"))
    broken = session_of("v1.0", torch.float32)
    broken.arch.mlp_out(2).weight.data[0, 0] = float("nan")  # type: ignore[index,union-attr]
    with pytest.raises(ValueError, match="the model gives NaN or infinity in a clean run"):
        find_neurons(broken, "a", " of", NeuronOptions(steps=2))
